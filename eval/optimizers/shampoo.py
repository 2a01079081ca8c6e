"""This module implements Shampoo, which preconditions gradients from both sides by roots of averaged covariances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .matrix import MatrixOptimizer


class Shampoo(MatrixOptimizer):
    """Implements Shampoo (Gupta, Koren and Singer, arXiv 1802.09568, Algorithm 1) with steps of Adam's length.

    The covariances are the paper's sums, L ← L + G Gᵀ and R ← R + Gᵀ G. The direction d = L^(−1/4) G R^(−1/4) gets the
    Frobenius norm of G/(√v̂ + ε), where v̂ is Adam's second moment (grafting). Before the first roots d is that quotient
    itself. The momentum is m ← β1 m + (1−β1) d, and the update is u = m/(1−β1ᵗ). Grafting, momentum and the later
    start are those of Anil et al., arXiv 2002.09018. The state is 2 (p q + p² + q²) numbers of a p×q matrix.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        betas, eps: decay rates (β1, β2) and ε.
        gap: number of steps before the roots are first computed, and from one computation to the next.
        damping: what is added to L and R before the roots, relative to their largest eigenvalue.
        weight_decay: decoupled λ.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        gap: int = 10,
        damping: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, gap=gap, damping=damping, weight_decay=weight_decay)
        )

    def update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u [p, q], and move the averages and the momentum on."""
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = 0
            state["L"], state["R"] = (gradient.new_zeros(side, side) for side in gradient.shape)
            state["m"], state["v"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        state["L"] += gradient @ gradient.mT
        state["R"] += gradient.mT @ gradient
        state["v"].lerp_(gradient.square(), 1 - beta2)
        if state["step"] % group["gap"] == 0:
            for name in ("L", "R"):
                state[f"{name}_root"] = _inverse_fourth_root(state[name], group["damping"])
        direction = adam = gradient / ((state["v"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"])
        if "L_root" in state:
            direction = state["L_root"] @ gradient @ state["R_root"]
            direction *= adam.norm() / direction.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
        state["m"].lerp_(direction, 1 - beta1)
        return state["m"] / (1 - beta1 ** state["step"])


def _inverse_fourth_root(matrix: Tensor, damping: float) -> Tensor:
    """Return (matrix + damping · its largest eigenvalue · I)^(−1/4) in the matrix's dtype.

    The eigendecomposition is float64.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    tiny = torch.finfo(torch.float32).tiny
    values = (values.clamp_min(0) + damping * values[-1]).clamp_min(tiny)
    return ((vectors * values**-0.25) @ vectors.mT).to(matrix.dtype)
