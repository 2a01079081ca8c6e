"""This module holds the step loop that the optimizers of matrices share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MatrixOptimizer(Optimizer, ABC):
    """Takes steps θ ← θ − lr (u + λ θ) of matrices, where u depends on that matrix's gradients alone.

    A subclass says what u is (`update`). Arithmetic and state are float32, or float64 for float64 parameters. Every
    group needs the options ``lr`` and ``weight_decay`` λ.

    Raises:
        ValueError: a parameter that is not a matrix.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices. Raise ValueError for a parameter that is not a matrix."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.ndim != 2:
                raise ValueError(
                    f"{type(self).__name__} got a parameter of shape {tuple(param.shape)}; expected matrices: give "
                    "norms and biases to torch.optim.AdamW, and join the two by ChainedOptimizer"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient, and return the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    gradient = param.grad.to(torch.promote_types(param.dtype, torch.float32))
                    update = self.update(self.state[param], gradient, group)
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update, alpha=-group["lr"])
        return loss

    @abstractmethod
    def update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u [p, q] of one step of a matrix, in the gradient's dtype.

        Args:
            state: state of the matrix, which is empty at its first step and is changed in place.
            gradient: gradient [p, q], float32 or float64, which must not be changed.
            group: options of the matrix.
        """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as torch does, but keep the dtype in which each tensor was saved."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for param, key in zip(group["params"], saved["params"]):
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor):
                        self.state[param][name] = value.to(param.device, copy=True)
