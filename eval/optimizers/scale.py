"""This module implements SCALE, which normalises gradients by column and has momentum in the output head only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .matrix import MatrixOptimizer


class Scale(MatrixOptimizer):
    """Implements SCALE ("A Minimalist Optimizer Design for LLM Pretraining", Glentis et al., arXiv 2506.16659).

    By Algorithm 1 the update is u = x / rms(x), where x is the gradient g. With ``momentum`` β > 0, which the authors
    use for the output head alone, x is the average m ← β m + (1−β) g. rms is the root of the mean square over the
    entries that feed one output, so that the norm of these entries in u is the root of their number. This is the scale
    of the authors' code, to which their rates belong (1e-3 for 60M to 350M parameters). A p×q matrix has no state
    without momentum, and p q numbers with it.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        momentum: β in [0, 1).
        dim: dimension of the inputs, which is 1 for a linear layer's weight [outputs, inputs] and 0 for an embedding's
            [tokens, width].
        weight_decay: decoupled λ.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.0, dim: int = 1, weight_decay: float = 0.0
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, dim=dim, weight_decay=weight_decay))

    def update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u [p, q], and move the momentum on if there is one."""
        if group["momentum"]:
            if not state:
                state["exp_avg"] = torch.zeros_like(gradient)
            gradient = state["exp_avg"].lerp_(gradient, 1 - group["momentum"])
        return gradient / gradient.square().mean(group["dim"], keepdim=True).sqrt().clamp_min(1e-8)
