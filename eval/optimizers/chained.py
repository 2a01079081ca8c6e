"""Several optimizers as one."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _States(ChainMap):
    """The parts' states as one mapping. `ChainMap` itself would add what it looks up to the first, a defaultdict."""

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        for states in self.maps:
            if param in states:
                return states[param]
        raise KeyError(param)


class ChainedOptimizer(Optimizer):
    """Optimizers of disjoint parameters as one: its step is a step of each, in order.

    ``param_groups`` are the parts' own, so that a learning-rate scheduler reaches them, and ``state`` shows the parts'
    (``optimizers``). `state_dict` joins theirs, parameters counted through, and `load_state_dict` hands each its own.
    Raises ValueError if two parts have a parameter in common.
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
        self.param_groups = [group for part in self.optimizers for group in part.param_groups]
        # FSDP2 takes an optimizer without state for a new one, and makes a step with it before it saves.
        self.state = _States(*(part.state for part in self.optimizers))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.optimizers:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        joined: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0  # the number of the part's first parameter
        for part in self.optimizers:
            saved = part.state_dict()
            joined["state"] |= {first + number: state for number, state in saved["state"].items()}
            joined["param_groups"] += [
                group | {"params": [first + number for number in group["params"]]} for group in saved["param_groups"]
            ]
            first += sum(len(group["params"]) for group in saved["param_groups"])
        return joined

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(f"found {len(groups)} saved parameter groups; expected {len(self.param_groups)}")
        for part in self.optimizers:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            # Names of parameters as they are, for they need not be numbers: FSDP2 brings its own.
            names = [name for group in own for name in group["params"]]
            state = {name: state_dict["state"][name] for name in names if name in state_dict["state"]}
            part.load_state_dict({"state": state, "param_groups": own})
        self._join()  # loading makes new groups and states
