"""This module makes one optimizer of several (`ChainedOptimizer`)."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _States(ChainMap):
    """Shows the states of all parts as one mapping.

    Each part's state is a defaultdict, to the first of which `ChainMap` itself would add what it looks up.
    """

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        """Return the state of a parameter. Raise KeyError if no part has one, and add nothing."""
        for states in self.maps:
            if param in states:
                return states[param]
        raise KeyError(param)


class ChainedOptimizer(Optimizer):
    """Joins optimizers of disjoint parameters. Its step is one step of each part, in order.

    ``optimizers`` are the parts. ``param_groups`` are the parts' own, so that a learning-rate scheduler reaches them,
    and ``state`` shows the parts' states. `state_dict` joins the parts' state dicts, with parameters numbered across
    all parts, and `load_state_dict` gives each part its own.

    Raises:
        ValueError: two parts have a parameter in common.
    """

    def __init__(self, *optimizers: Optimizer):
        self.optimizers = optimizers
        params = [param for part in optimizers for group in part.param_groups for param in group["params"]]
        if len(set(params)) < len(params):
            raise ValueError(
                "two of the optimizers have a parameter in common; expected each parameter in one of them"
            )
        super().__init__(params, {})
        self._join()

    def _join(self) -> None:
        """Take groups and states from the parts, which make new ones when they load a state."""
        self.param_groups = [group for part in self.optimizers for group in part.param_groups]
        # If ``state`` were empty, FSDP2 would take this optimizer for a new one, and make a step before it saves.
        self.state = _States(*(part.state for part in self.optimizers))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of each part, and return the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.optimizers:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' state dicts as one, as a single optimizer of all parameters would save it."""
        joined: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0  # This is the number of the part's first parameter.
        for part in self.optimizers:
            saved = part.state_dict()
            joined["state"] |= {first + number: state for number, state in saved["state"].items()}
            joined["param_groups"] += [
                group | {"params": [first + number for number in group["params"]]} for group in saved["param_groups"]
            ]
            first += sum(len(group["params"]) for group in saved["param_groups"])
        return joined

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Raise ValueError if it has another number of parameter groups."""
        groups = list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(f"found {len(groups)} saved parameter groups; expected {len(self.param_groups)}")
        for part in self.optimizers:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            # The keys of parameters stay as they are, because they need not be numbers. FSDP2 has names of its own.
            names = [name for group in own for name in group["params"]]
            state = {name: state_dict["state"][name] for name in names if name in state_dict["state"]}
            part.load_state_dict({"state": state, "param_groups": own})
        self._join()
