"""This module mends what packages keep of projected gradients (GaLore, Fira, APOLLO, Conda)."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


def compact_projections(optimizer: Optimizer, *_: Any) -> None:
    """Replace each projection that is a view by a copy. This is a step post-hook of the optimizer.

    With float32 gradients GaLore and Fira keep views, which hold all singular vectors in memory.
    """
    for state in optimizer.state.values():
        projection = getattr(state.get("projector"), "ortho_matrix", None)
        if projection is not None and projection.untyped_storage().nbytes() > projection.nbytes:
            state["projector"].ortho_matrix = projection.clone(memory_format=torch.contiguous_format)


def saved_as_numbers(optimizer: Optimizer, projector: type) -> Optimizer:
    """Make the optimizer save its projectors as dictionaries and load them again, and return it.

    ``weights_only`` loading of a checkpoint refuses objects of the packages' classes. projector: class of the objects
    to be made from the dictionaries.
    """

    def saved(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = state_dict["state"]
        plain = {
            key: {"projector": dict(vars(states[key]["projector"]))} for key in states if "projector" in states[key]
        }
        return state_dict | {"state": {key: state | plain.get(key, {}) for key, state in states.items()}}

    def loaded(_: Optimizer, state_dict: dict[str, Any]) -> None:
        for state in state_dict["state"].values():
            if isinstance(state.get("projector"), dict):  # In place, as pytorch-optimizer reads the dictionary twice.
                made = projector.__new__(projector)
                vars(made).update(state["projector"])
                state["projector"] = made

    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(loaded)
    return optimizer
