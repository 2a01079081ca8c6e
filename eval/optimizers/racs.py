"""This module implements RACS and Alice (Gong et al., arXiv 2502.07752).

Both follow from structured approximations of the Fisher matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .matrix import MatrixOptimizer


def limited(update: Tensor, state: dict[str, Any], growth: float) -> Tensor:
    """Return the update, shortened if its Frobenius norm is more than ``growth`` times that of the step before.

    This is Fira's limiter, whose ``growth`` is the papers' γ. ``state["norm"]`` holds the norm that was returned last.
    """
    norm = update.norm()
    if "norm" in state:
        allowed = growth * state["norm"]
        # A norm of zero says nothing about the next one.
        factor = torch.where((norm > allowed) & (allowed > 0), allowed / norm, 1.0)
        update, norm = update * factor, norm * factor
    state["norm"] = norm
    return update


class RACS(MatrixOptimizer):
    """Implements row and column scaled SGD (arXiv 2502.07752, Algorithm 1).

    The scales q of the rows and s of the columns are the fixed point of Eq. 16 for one gradient g, found by
    ``iterations`` rounds from q = 1:
        s = (g∘g)ᵀ q / ‖q‖²,   q = (g∘g) s / ‖s‖².
    Each is averaged over the steps with decay β, from zero. The update is u = α Diag(q)^(-1/2) g Diag(s)^(-1/2), and
    the growth of its norm is limited by γ. The state is p + q + 1 numbers of a p×q matrix. pytorch-optimizer 4.1.0
    takes the means of g∘g over rows and over columns instead. Their product is of the order of g⁴, so that its steps
    grow as gradients shrink.

    Args:
        params: matrices, or groups of them.
        lr: learning rate, which is 0.02 in the paper.
        beta, alpha, gamma: β, α and γ of Algorithm 1. The defaults are the paper's for up to 350M parameters.
        iterations: number of rounds, which is 5 in the paper.
        weight_decay: decoupled λ.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        beta: float = 0.9,
        alpha: float = 0.05,
        gamma: float = 1.01,
        iterations: int = 5,
        weight_decay: float = 0.0,
    ):
        options = dict(lr=lr, beta=beta, alpha=alpha, gamma=gamma, iterations=iterations, weight_decay=weight_decay)
        super().__init__(params, options)

    def update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u [p, q], and move the averages of q and s on."""
        tiny = torch.finfo(gradient.dtype).tiny
        square = gradient.square()
        q = torch.ones_like(square[:, 0])
        for _ in range(group["iterations"]):
            s = square.T @ q / q.square().sum().clamp_min(tiny)
            # s is divided by its largest entry first, because the squares of squares underflow.
            largest = s.max().clamp_min(tiny)
            q = square @ (s / largest) / (s / largest).square().sum().clamp_min(tiny) / largest
        for name, found in (("q", q), ("s", s)):
            average = state.setdefault(name, torch.zeros_like(found))
            average.lerp_(found, 1 - group["beta"])
        row, column = state["q"].clamp_min(tiny).rsqrt(), state["s"].clamp_min(tiny).rsqrt()
        return group["alpha"] * limited(row[:, None] * gradient * column, state, group["gamma"])


class Alice(MatrixOptimizer):
    """Implements adaptive low-dimensional subspace estimation (arXiv 2502.07752, Algorithms 2 to 4).

    Let the gradient g have p ≤ q; other matrices are transposed. At every ``gap``-th step the subspace U [p, r] is
    switched. One step of subspace iteration is made on Q = β3 U Q̃ Uᵀ + (1−β3) g gᵀ. The ``leading`` best directions
    that it finds are kept, and the other r − ``leading`` are drawn from the directions outside of what it finds. Then,
    with σ = Uᵀ g,
        Q̃ ← β3 Q̃ + (1−β3) σ σᵀ,   m ← β1 m + (1−β1) σ,   v ← β2 v + (1−β2) σ∘σ,
        e ← β1 e + (1−β1) (column sums of g∘g − those of σ∘σ),
        u = α (U m/√v + α_c √(p−r) (g − U σ) Diag(e)^(-1/2)),
    where the growth of the second term's norm is limited by γ. The state is p r + r² + 2 r q + q + 1 numbers.

    The paper leaves two choices open. Here the first U holds the r leading eigenvectors of g gᵀ, since one step of
    subspace iteration from U = 0 is not defined. The step seeds the generator that draws the directions, so that all
    processes draw the same ones. As published, m and v are not turned with the subspace.

    Args:
        params: matrices, or groups of them.
        lr: learning rate, which is 0.02 in the paper.
        rank: number r of directions, or the smaller side of a matrix if that is less.
        leading: number of the r directions that are the best ones (40 of 128 in the paper's 60M run).
        betas: decay rates (β1, β2, β3).
        alpha, alpha_c, gamma: α, α_c and γ.
        gap: number of steps between two switches.
        weight_decay: decoupled λ.

    Raises:
        ValueError: ``leading`` is not between 1 and ``rank``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        *,
        rank: int,
        leading: int,
        betas: tuple[float, float, float] = (0.9, 0.9, 0.999),
        alpha: float = 0.3,
        alpha_c: float = 0.4,
        gamma: float = 1.01,
        gap: int = 200,
        weight_decay: float = 0.0,
    ):
        if not 1 <= leading <= rank:
            raise ValueError(f"leading={leading}: expected 1 to rank={rank}")
        options = dict(lr=lr, rank=rank, leading=leading, betas=betas, alpha=alpha, alpha_c=alpha_c, gamma=gamma)
        super().__init__(params, options | dict(gap=gap, weight_decay=weight_decay))

    def update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u [p, q], and move the state on."""
        if gradient.shape[0] > gradient.shape[1]:
            return self._update_wide(state, gradient.T, group).T
        return self._update_wide(state, gradient, group)

    def _update_wide(self, state: dict[str, Any], g: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u of a gradient g [p, q] with p ≤ q."""
        beta1, beta2, beta3 = group["betas"]
        rank = min(group["rank"], g.shape[0])
        if not state:
            state["step"] = 0
            state["Q"] = g.new_zeros(rank, rank)
            state["m"], state["v"] = g.new_zeros(rank, g.shape[1]), g.new_zeros(rank, g.shape[1])
            state["energy"] = g.new_zeros(g.shape[1])
        state["step"] += 1
        if state["step"] == 1:
            state["U"] = torch.linalg.eigh(g @ g.T).eigenvectors[:, -rank:].clone()
        elif state["step"] % group["gap"] == 0:
            tracked = beta3 * state["U"] @ state["Q"] @ state["U"].T + (1 - beta3) * g @ g.T
            state["U"] = _switched(tracked, state["U"], min(group["leading"], rank), state["step"])
        U = state["U"]
        sigma = U.T @ g
        state["Q"].lerp_(sigma @ sigma.T, 1 - beta3)
        state["m"].lerp_(sigma, 1 - beta1)
        state["v"].lerp_(sigma.square(), 1 - beta2)
        outside = g - U @ sigma
        # The sum of squares of what is outside is the difference in Algorithm 3, without its cancellation.
        state["energy"].lerp_(outside.square().sum(0), 1 - beta1)
        tiny = torch.finfo(g.dtype).tiny
        scale = state["energy"].clamp_min(tiny).rsqrt()
        compensation = limited((g.shape[0] - rank) ** 0.5 * outside * scale, state, group["gamma"])
        inside = U @ (state["m"] * state["v"].clamp_min(tiny).rsqrt())
        return group["alpha"] * (inside + group["alpha_c"] * compensation)


def _switched(tracked: Tensor, U: Tensor, leading: int, seed: int) -> Tensor:
    """Return the new subspace [p, r] (Algorithm 2) from the tracked matrix Q [p, p] and the old subspace U [p, r].

    leading: number of best directions to keep. seed: seed for the draw of the others.
    """
    p, rank = U.shape
    basis = torch.linalg.qr(tracked @ U).Q
    vectors = torch.linalg.eigh(basis.T @ tracked @ basis).eigenvectors
    found = (basis @ vectors).flip(1)  # The best direction comes first.
    outside = torch.linalg.qr(found, mode="complete").Q[:, rank:]
    drawn = torch.randperm(p - rank, generator=torch.Generator().manual_seed(seed))[: rank - leading]
    kept = rank - len(drawn)  # It is above `leading` if too few directions are outside.
    return torch.cat([found[:, :kept], outside[:, drawn.to(U.device)]], dim=1)
