"""This module implements SinkGD, which normalises the rows and columns of a gradient in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .matrix import MatrixOptimizer


class SinkGD(MatrixOptimizer):
    """Implements SinkGD (Scetbon, Ma, Gong and Meeds, arXiv 2502.06742, Algorithms 3 and 4).

    The update u of a p×q matrix is the gradient after ``iterations`` rounds of Algorithm 3. A round scales every row
    to the norm √q, then every column to the norm √p. There is no state. A row or column of zeros stays zero. If no
    column is zero, the root mean square of u is 1. The paper multiplies the rate of these matrices by 0.05, because it
    shares one rate with Adam's parameters. Here the rate is the matrices' own.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        iterations: number of rounds, which is 5 in the paper.
        weight_decay: decoupled λ.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, iterations: int = 5, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, iterations=iterations, weight_decay=weight_decay))

    def update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u [p, q]."""
        # This comes before squares are taken, as those of small gradients would underflow.
        x = gradient / gradient.abs().max().clamp_min(torch.finfo(gradient.dtype).tiny)
        for _ in range(group["iterations"]):
            for dim in (1, 0):
                norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
                x = x / norm.clamp_min(torch.finfo(x.dtype).tiny) * x.shape[dim] ** 0.5
        return x
