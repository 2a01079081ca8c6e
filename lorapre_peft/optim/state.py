"""This module keeps the state of parameters, checks that a saved state fits, and restores it from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from ..lowrank.experts import Stack, stack_of
from ..lowrank.layout import EXPERT_POSITIONS, Member, compressed_rank, matrix_shape
from ..lowrank.rules import RULES
from ..lowrank.sharding import local, place
from .adamw_path import adamw_dtype
from .options import check_parameter, check_stack, without_round_off

# These options decide the shapes of a parameter's state.
RANK_OPTIONS = ("momentum_rank", "second_momentum_rank", "update_rule")
STACK_OPTIONS = ("experts", "experts_dim")
# These keys of a group speak of its parameters by their places, or of their number.
OF_PLACES = ("param_names", "uncompressed", "num_params", "num_matrices")
# These are all names that a state of these optimizers can hold.
OWN_STATE = {"step", "m_B", "m_A", "v_B", "v_A", "v_energy", "v_scale", "exp_avg", "exp_avg_sq"}


def state_dtype(param: Tensor, name: str) -> torch.dtype:
    """Return float32, or float64 for the moments of a float64 parameter on the AdamW path."""
    return adamw_dtype(param) if name.startswith("exp_avg") else torch.float32


def matched_states(
    optimizer: StatefulOptimizer, state_dict: dict[str, Any]
) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
    """Yield (parameter, saved state). Parameters are matched by their order in the groups, as torch does it."""
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for saved_id, param in zip(saved_ids, params):
        if saved_id in state_dict["state"]:
            yield param, state_dict["state"][saved_id]


def with_own_places(optimizer: StatefulOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state, in which this optimizer's `OF_PLACES` replace those of groups that list names.

    `torch.distributed.checkpoint.state_dict.set_optimizer_state_dict` gives such a state: its groups hold names, in
    the order of this optimizer's groups, and options of the saved run. Any other state is returned as it is.
    """
    groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) and group["params"] for group in groups
    ):
        return state_dict
    if not all(isinstance(name, str) for group in groups for name in group["params"]):
        return state_dict
    kept = [
        saved | {name: group[name] for name in OF_PLACES if name in group and len(saved) > 1}
        for group, saved in zip(optimizer.param_groups, groups)
    ]
    return {**state_dict, "param_groups": [*kept, *groups[len(kept) :]]}


def restore_state(optimizer: StatefulOptimizer, state_dict: dict[str, Any]) -> None:
    """Put the optimizer's own saved tensors back as they were saved.

    Before this, torch has cast its copies of them to the parameters' dtypes, and has taken over the saved options.
    ``update_in_backward`` stays as this optimizer was built, whatever the checkpoint says.
    """
    for group in optimizer.param_groups:
        group["update_in_backward"] = optimizer.defaults["update_in_backward"]
    group_of = {param: group for group in optimizer.param_groups for param in group["params"]}
    for param, saved in matched_states(optimizer, state_dict):
        for name in saved.keys() & optimizer.state_shapes(param, group_of[param]).keys():
            placed = saved[name].detach().to(device=param.device, dtype=state_dtype(param, name), copy=True)
            optimizer.state[param][name] = placed


def check_held_state(member: Member, state: dict[str, Tensor]) -> None:
    """Raise ValueError if a parameter's shape or its group's options have changed and no longer fit its state."""
    expected = member.state_shapes
    if all(name in state and state[name].shape == shape for name, shape in expected.items()):
        return
    raise ValueError(
        f"a parameter of shape {tuple(member.param.shape)} with {_rank_options(member.group)} has the state "
        f"{shapes_of(state)}, expected {expected}: its shape or these options have changed since its first step. "
        "Build a new optimizer, or delete optimizer.state[param] to start without it"
    )


def _rank_options(group: dict[str, Any]) -> str:
    names = RANK_OPTIONS if group.get("experts") is None else (*RANK_OPTIONS, *STACK_OPTIONS)
    return ", ".join(f"{name}={group[name]!r}" for name in names if name in group)


def shapes_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of a state's tensors, and the names of the types of everything else in it."""
    return {
        key: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for key, value in state.items()
    }


def check_loaded_state(optimizer: StatefulOptimizer, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if ``state_dict`` was not saved by this kind of optimizer over the same parameters."""
    name = type(optimizer).__name__
    if not isinstance(state_dict, dict) or not (
        isinstance(state_dict.get("state"), dict) and isinstance(state_dict.get("param_groups"), list)
    ):
        raise ValueError(
            f"found no 'state' and 'param_groups' in what was to be loaded; expected a state_dict of {name}"
        )
    saved_groups, states = state_dict["param_groups"], state_dict["state"]
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in saved_groups) or not all(
        isinstance(state, dict) for state in states.values()
    ):
        raise ValueError(f"'param_groups' or 'state' of what was to be loaded are not those of a state_dict of {name}")
    # Not all of `defaults` are options of this optimizer, as torch adds entries of its own when it loads.
    own = optimizer.defaults.keys() & optimizer.param_groups[0].keys()
    missing = set().union(*(own - group.keys() for group in saved_groups))
    if any(group.keys() <= {"params"} for group in saved_groups):
        raise ValueError(
            f"a saved group has no options: the saved run divided its parameters otherwise than this {name}. Build "
            "the optimizer with the groups of the saved run, or save and load with flatten_optimizer_state_dict=True"
        )
    if missing:
        raise ValueError(
            f"the saved groups have no {', '.join(sorted(missing))}: they are another optimizer's, expected {name}'s. "
            "Load a checkpoint of the same optimizer, or start without its state"
        )
    counts, saved_counts = (
        [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, saved_groups)
    )
    if counts != saved_counts:
        raise ValueError(
            f"the saved state has groups of {saved_counts} parameters; this {name} has groups of {counts}. Build the "
            "optimizer with the parameters and groups of the saved run, or start without its state"
        )
    for group, saved in zip(optimizer.param_groups, saved_groups):
        check_saved_group(optimizer, group, saved)
        names, found = group.get("param_names"), saved.get("param_names")
        if names and found and names != found and sorted(names) == sorted(found):
            first = next(i for i, (name, other) in enumerate(zip(names, found)) if name != other)
            raise ValueError(
                f"the saved state has the same parameters in another order: {found[first]!r} is where this {name} has "
                f"{names[first]!r}, and a state is matched by its place. Build the optimizer with the parameters in "
                "the order of the saved run"
            )
    group_of = {param: group for group in optimizer.param_groups for param in group["params"]}
    for index, (param, saved) in enumerate(matched_states(optimizer, state_dict)):
        group = group_of[param]
        expected, found = optimizer.state_shapes(param, group), shapes_of(saved)
        # Other tools keep keys of their own in a state, such as Lookahead's slow weights, even before its first step.
        if any(found.get(key) != shape for key, shape in expected.items()) and found.keys() & OWN_STATE:
            raise ValueError(
                f"the saved state of parameter {index} of shape {tuple(param.shape)} is {found}; {name} with "
                f"{_rank_options(group)} expects {expected}. Build the optimizer with the options of the saved run, "
                "or start without its state"
            )
        stack = None if "exp_avg" in expected else stack_of(group)
        _check_placements(index, param, {key: saved[key] for key in expected if key in saved}, stack)


def check_saved_group(optimizer: StatefulOptimizer, group: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError if the saved options are out of their ranges, or have another rank or rule than the group.

    Loading takes over all other options, as in torch. Factors of another rank or rule cannot be continued. A state
    that was saved before the first step has no factors, but the run would still not be the one that its options say.
    """
    optimizer.check_group(without_round_off(saved) | {"update_in_backward": group["update_in_backward"]})
    saved = saved | {"params": group["params"]}
    for param in group["params"]:
        same_rule = saved["update_rule"] == group["update_rule"] or "exp_avg" in optimizer.state_shapes(param, group)
        if not same_rule or optimizer.state_shapes(param, saved) != optimizer.state_shapes(param, group):
            found, expected = _rank_options(saved), _rank_options(group)
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} was saved with {found}; this {type(optimizer).__name__} "
                f"has {expected}, and factors are not converted. Build the optimizer with the options of the saved "
                "run, or start without its state"
            )


def _check_placements(index: int, param: Tensor, saved: dict[str, Tensor], stack: Stack | None) -> None:
    """Raise ValueError if the saved state is not distributed over the processes as this parameter's state is."""
    for key, value in saved.items():
        like = place(torch.empty(value.shape, device="meta"), param, key, stack)
        expected, found = (
            f"a DTensor with placements {t.placements} over {t.device_mesh}"
            if isinstance(t, DTensor)
            else "a plain tensor"
            for t in (like, value)
        )
        if expected != found or local(like).shape != local(value).shape:
            raise ValueError(
                f"the saved {key} of parameter {index} of shape {tuple(param.shape)} is {found}; expected {expected}. "
                "Load what was saved in other processes through "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which distributes it (a whole "
                "state_dict with StateDictOptions(full_state_dict=True))"
            )


class StatefulOptimizer(Optimizer):
    """Keeps the state of each parameter for an optimizer with factored moments.

    It decides the names, shapes and first values of the state, and takes it through a checkpoint.
    """

    moments: tuple[str, ...]  # These prefix the factored state: m, and v for a second moment.

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for an option out of its range."""
        raise NotImplementedError

    def ranks(self, param: Tensor, group: dict[str, Any]) -> tuple[int, ...]:
        """Return the rank of each factored moment of a parameter, or () if it takes the AdamW path."""
        if any(group["params"][i] is param for i in group.get("uncompressed", ())):
            return ()
        k = compressed_rank(param.shape, group["momentum_rank"], stack_of(group))
        return (k,) if k else ()

    def state_shapes(self, param: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of a parameter's state, which depend only on its shape and its group's options."""
        ranks = self.ranks(param, group)
        if not ranks:
            return {"step": (), "exp_avg": tuple(param.shape), "exp_avg_sq": tuple(param.shape)}
        stack = stack_of(group)
        p, q = matrix_shape(param.shape, stack)
        shapes: dict[str, tuple[int, ...]] = {"step": ()}
        for moment, k in zip(self.moments, ranks):
            shapes |= {f"{moment}_B": (p, k), f"{moment}_A": (k, q)}
        if RULES[group["update_rule"]].tracked and "v" in self.moments:
            shapes |= {"v_energy": (), "v_scale": ()}
        return shapes if stack is None else {name: (stack.experts, *shape) for name, shape in shapes.items()}

    def _state_of(self, member: Member) -> dict[str, Tensor]:
        """Return a parameter's state, and make it at the first step. Keys of other tools are left alone."""
        state = self.state[member.param]
        if "step" not in state:
            self._init_state(member, state)
        check_held_state(member, state)
        return state

    def _init_state(self, member: Member, state: dict[str, Tensor]) -> None:
        """Fill in a parameter's first state: zeros, and A factors as the rule starts them.

        The gradient has no influence on it. Each matrix has a random generator of its own.
        """
        group, param = member.group, member.param
        check_parameter(param)  # An engine may have replaced the group's parameters.
        check_stack(param, group)
        rule, stack = RULES[group["update_rule"]], member.stack
        whole = {
            name: torch.zeros(shape, dtype=state_dtype(param, name), device=param.device)
            for name, shape in member.state_shapes.items()
        }
        if member.ranks:
            for expert in range(1 if stack is None else stack.experts):
                position = member.position + expert * EXPERT_POSITIONS
                generator = torch.Generator().manual_seed((group["seed"] * 1_000_003 + position) % 2**63)
                for moment in self.moments:
                    A = whole[f"{moment}_A"] if stack is None else whole[f"{moment}_A"][expert]
                    A.copy_(rule.init_columns(A.shape, generator))
        for name, value in whole.items():
            state[name] = place(value, param, name, stack)

    def param_state_bytes(self, param: Tensor, group: dict[str, Any]) -> int:
        """Return the bytes of one parameter's state. They follow from its shape, even before the first step."""
        shapes = self.state_shapes(param, group)
        return sum(math.prod(shape) * state_dtype(param, name).itemsize for name, shape in shapes.items())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, and keep every state tensor in its own dtype (`state_dtype`).

        `torch.optim.Optimizer.load_state_dict` casts state to the parameter's dtype, which would round the factors of
        a bf16 parameter. A resumed run would then not continue as the uninterrupted one. Raises ValueError, before
        anything changes, if the state is not this optimizer's.
        """
        loaded: dict[str, Any] = {}

        def capture(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            # This is the last pre-hook, as the user's own may have replaced the given state.
            final = with_own_places(self, final)
            check_loaded_state(self, final)
            loaded.update(final)
            return final

        def restore(_: Optimizer) -> None:
            restore_state(self, loaded)

        handles = [
            self.register_load_state_dict_pre_hook(capture),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
