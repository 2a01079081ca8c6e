"""SCALE: gradients normalised by column, and a momentum in the output head only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .matrix import MatrixOptimizer


class Scale(MatrixOptimizer):
    """SCALE (Glentis, Li, Han and Hong, "A Minimalist Optimizer Design for LLM Pretraining", arXiv 2506.16659).

    Algorithm 1: u = x / rms(x), where x is the gradient, or its average m ← β m + (1−β) g with ``momentum`` β > 0,
    which the authors use for the output head alone; rms is the root of the mean square over the entries that feed one
    output, so that their norm in u is √(their number), as in the authors' code, to which their rates (1e-3 for 60M to
    350M parameters) belong. A matrix has no state without momentum, and p q numbers with it.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        momentum: β in [0, 1).
        dim: the dimension of the inputs: 1 for a linear layer's weight (outputs × inputs), 0 for an embedding's
            (tokens × width).
        weight_decay: decoupled λ.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.0, dim: int = 1, weight_decay: float = 0.0
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, dim=dim, weight_decay=weight_decay))

    def update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if group["momentum"]:
            if not state:
                state["exp_avg"] = torch.zeros_like(gradient)
            gradient = state["exp_avg"].lerp_(gradient, 1 - group["momentum"])
        return gradient / gradient.square().mean(group["dim"], keepdim=True).sqrt().clamp_min(1e-8)
