"""The state of parameters: whether a saved one fits, and how it comes back from a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..lowrank.experts import Stack, stack_of
from ..lowrank.layout import Member
from ..lowrank.sharding import local, place
from .adamw_path import adamw_dtype

# The options that decide the shapes of a parameter's state.
RANK_OPTIONS = ("momentum_rank", "second_momentum_rank", "update_rule", "experts", "experts_dim")
# Every name that a state of this project's can have.
OWN_STATE = {"step", "m_B", "m_A", "v_B", "v_A", "v_energy", "v_scale", "exp_avg", "exp_avg_sq"}


class StateOwner(Protocol):
    """What the checks need of an optimizer."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]

    def state_shapes(self, param: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of a parameter's state."""

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for options out of their ranges."""


def state_dtype(param: Tensor, name: str) -> torch.dtype:
    """Return float32; the AdamW path of a float64 parameter keeps float64 moments."""
    return adamw_dtype(param) if name.startswith("exp_avg") else torch.float32


def matched_states(optimizer: StateOwner, state_dict: dict[str, Any]) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
    """Yield (parameter, saved state): parameters are matched by their order in the groups, as torch does it."""
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for saved_id, param in zip(saved_ids, params):
        if saved_id in state_dict["state"]:
            yield param, state_dict["state"][saved_id]


def restore_state(optimizer: StateOwner, state_dict: dict[str, Any]) -> None:
    """Put the optimizer's own saved tensors back as they were saved, after torch has cast its copies to the parameters' dtypes."""
    group_of = {param: group for group in optimizer.param_groups for param in group["params"]}
    for param, saved in matched_states(optimizer, state_dict):
        for name in saved.keys() & optimizer.state_shapes(param, group_of[param]).keys():
            placed = saved[name].detach().to(device=param.device, dtype=state_dtype(param, name), copy=True)
            optimizer.state[param][name] = placed


def check_held_state(member: Member, state: dict[str, Tensor]) -> None:
    """Raise ValueError if a parameter's shape or its group's options have changed into what its state is not made for."""
    expected = member.state_shapes
    if all(name in state and state[name].shape == shape for name, shape in expected.items()):
        return
    raise ValueError(
        f"a parameter of shape {tuple(member.param.shape)} with {_rank_options(member.group)} has the state {shapes_of(state)}, expected {expected}: its shape "
        "or these options have changed since its first step. Build a new optimizer, or delete optimizer.state[param] to start without it"
    )


def _rank_options(group: dict[str, Any]) -> str:
    stacked = group.get("experts") is not None
    names = RANK_OPTIONS if stacked else RANK_OPTIONS[:3]
    return ", ".join(f"{name}={group[name]!r}" for name in names if name in group)


def shapes_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of a state's tensors, and the types of what else it holds."""
    return {
        key: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for key, value in state.items()
    }


def check_loaded_state(optimizer: StateOwner, state_dict: dict[str, Any]) -> None:
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
    # Not all of `defaults`: torch adds entries of its own to it when it loads.
    own = optimizer.defaults.keys() & optimizer.param_groups[0].keys()
    missing = set().union(*(own - group.keys() for group in saved_groups))
    if missing:
        raise ValueError(
            f"the saved groups have no {', '.join(sorted(missing))}: they are another optimizer's, expected {name}'s. "
            "Load a checkpoint of the same optimizer, or start without its state"
        )
    for group, saved in zip(optimizer.param_groups, saved_groups):
        check_saved_group(optimizer, group, saved)
    group_of = {param: group for group in optimizer.param_groups for param in group["params"]}
    for index, (param, saved) in enumerate(matched_states(optimizer, state_dict)):
        group = group_of[param]
        expected, found = optimizer.state_shapes(param, group), shapes_of(saved)
        # Other tools keep keys of their own there, such as a Lookahead's slow weights; also beside a state that has not begun.
        if any(found.get(key) != shape for key, shape in expected.items()) and found.keys() & OWN_STATE:
            raise ValueError(
                f"the saved state of parameter {index} of shape {tuple(param.shape)} is {found}; {name} with "
                f"{_rank_options(group)} expects {expected}. "
                "Build the optimizer with the options of the saved run, or start without its state"
            )
        stack = None if "exp_avg" in expected else stack_of(group)
        _check_placements(index, param, {key: saved[key] for key in expected if key in saved}, stack)


def check_saved_group(optimizer: StateOwner, group: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError if the saved options are out of their ranges, or another rank or rule than the group's.

    Loading takes over all other options, as in torch. Factors of another rank, or kept by another rule, are no start for
    this one's; before the first step there are none, but the run would still not be the one that its options say.
    """
    optimizer.check_group(saved | {"update_in_backward": group["update_in_backward"]})
    saved = saved | {"params": group["params"]}
    for param in group["params"]:
        same_rule = saved["update_rule"] == group["update_rule"] or "exp_avg" in optimizer.state_shapes(param, group)
        if not same_rule or optimizer.state_shapes(param, saved) != optimizer.state_shapes(param, group):
            found, expected = _rank_options(saved), _rank_options(group)
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} was saved with {found}; this {type(optimizer).__name__} has {expected}, "
                "and factors are not converted. Build the optimizer with the options of the saved run, or start without its state"
            )


def _check_placements(index: int, param: Tensor, saved: dict[str, Tensor], stack: Stack | None) -> None:
    """Raise ValueError for state that is distributed over the processes otherwise than this parameter's is."""
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
                f"the saved {key} of parameter {index} of shape {tuple(param.shape)} is {found}; expected {expected}. Load what was "
                "saved in other processes through torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which "
                "distributes it (a whole state_dict with StateDictOptions(full_state_dict=True))"
            )
