"""Per-parameter state: where it lives, whether a saved one fits, and how it comes back from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .placement import local, place
from .plain import adamw_dtype

if TYPE_CHECKING:
    from .optimizer import LoRAPreOptimizer


def state_dtype(param: Tensor, name: str) -> torch.dtype:
    """float32; the AdamW path of a float64 parameter keeps float64 moments."""
    return adamw_dtype(param) if name.startswith("exp_avg") else torch.float32


def matched_states(
    optimizer: LoRAPreOptimizer, state_dict: dict[str, Any]
) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
    """(parameter, saved state) pairs: parameters are matched by their order in the groups, as torch does it."""
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for saved_id, param in zip(saved_ids, params):
        if saved_id in state_dict["state"]:
            yield param, state_dict["state"][saved_id]


def restore_state(optimizer: LoRAPreOptimizer, state_dict: dict[str, Any]) -> None:
    """Put the saved tensors back as they were saved, after torch has cast its copies to the parameters' dtypes."""
    for param, saved in matched_states(optimizer, state_dict):
        for name, value in saved.items():
            placed = value.detach().to(device=param.device, dtype=state_dtype(param, name), copy=True)
            optimizer.state[param][name] = placed


def check_loaded_state(optimizer: LoRAPreOptimizer, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if ``state_dict`` was not saved by this kind of optimizer over the same parameters."""
    name = type(optimizer).__name__
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"found no 'state' and 'param_groups' in what was to be loaded; expected a state_dict of {name}"
        )
    # Not all of `defaults`: torch adds entries of its own to it when it loads.
    own = optimizer.defaults.keys() & optimizer.param_groups[0].keys()
    missing = own - set().union(*(group.keys() for group in state_dict["param_groups"]))
    if state_dict["param_groups"] and missing:
        raise ValueError(
            f"the saved groups have no {', '.join(sorted(missing))}: they are another optimizer's, expected {name}'s. "
            "Load a checkpoint of the same optimizer, or start without its state"
        )
    group_of = {param: group for group in optimizer.param_groups for param in group["params"]}
    for index, (param, saved) in enumerate(matched_states(optimizer, state_dict)):
        group = group_of[param]
        expected = optimizer.state_shapes(param, group)
        found = {
            key: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            for key, value in saved.items()
        }
        if found == expected:
            _check_placements(index, param, saved)
        else:
            raise ValueError(
                f"the saved state of parameter {index} of shape {tuple(param.shape)} is {found}; {name} with "
                f"momentum_rank={group['momentum_rank']}, update_rule={group['update_rule']!r} expects {expected}. "
                "Build the optimizer with the options of the saved run, or start without its state"
            )


def _check_placements(index: int, param: Tensor, saved: dict[str, Tensor]) -> None:
    """Raise ValueError for state that lies otherwise over the processes than this parameter's does."""
    for key, value in saved.items():
        like = place(torch.empty(value.shape, device="meta"), param, key)
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
