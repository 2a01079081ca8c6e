"""RACS and Alice, from structured approximations of the Fisher matrix (Gong et al., arXiv 2502.07752)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .matrix import MatrixOptimizer


def limited(update: Tensor, state: dict[str, Any], growth: float) -> Tensor:
    """The update, shortened so that its norm grows by ``growth`` a step at most (Fira's limiter, the papers' γ).

    ``state["norm"]`` holds the norm that was let through last.
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
    """Row and column scaled SGD (arXiv 2502.07752, Algorithm 1).

    The scales of rows and columns are the fixed point of Eq. 16 for one gradient, by ``iterations`` rounds from q = 1:
        s = (g∘g)ᵀ q / ‖q‖²,   q = (g∘g) s / ‖s‖²,
    each averaged over the steps with β from zero, and u = α Diag(q)^(-1/2) g Diag(s)^(-1/2), its growth limited by γ.
    State: p + q + 1 numbers. (pytorch-optimizer 4.1.0 takes the means of g∘g over rows and over columns instead. Their
    product is of the order of g⁴, so that its steps grow as gradients shrink.)

    Args:
        params: matrices, or groups of them.
        lr: learning rate; 0.02 in the paper.
        beta, alpha, gamma: β, α and γ of Algorithm 1, with the paper's values up to 350M parameters.
        iterations: 5 in the paper.
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
        tiny = torch.finfo(gradient.dtype).tiny
        square = gradient.square()
        q = torch.ones_like(square[:, 0])
        for _ in range(group["iterations"]):
            s = square.T @ q / q.square().sum().clamp_min(tiny)
            # Divided by its own largest entry first, for the squares of squares underflow.
            largest = s.max().clamp_min(tiny)
            q = square @ (s / largest) / (s / largest).square().sum().clamp_min(tiny) / largest
        for name, found in (("q", q), ("s", s)):
            average = state.setdefault(name, torch.zeros_like(found))
            average.lerp_(found, 1 - group["beta"])
        row, column = state["q"].clamp_min(tiny).rsqrt(), state["s"].clamp_min(tiny).rsqrt()
        return group["alpha"] * limited(row[:, None] * gradient * column, state, group["gamma"])


class Alice(MatrixOptimizer):
    """Adaptive low-dimensional subspace estimation (arXiv 2502.07752, Algorithms 2 to 4).

    For g with p ≤ q (others are transposed). At every ``gap``-th step the subspace U (p×r) is switched: one step of
    subspace iteration on Q = β3 U Q̃ Uᵀ + (1−β3) g gᵀ, of which the ``leading`` best directions are kept, while the
    other r − ``leading`` are drawn from the directions outside it. Then, with σ = Uᵀ g,
        Q̃ ← β3 Q̃ + (1−β3) σ σᵀ,   m ← β1 m + (1−β1) σ,   v ← β2 v + (1−β2) σ∘σ,
        e ← β1 e + (1−β1) (column sums of g∘g − those of σ∘σ),
        u = α (U m/√v + α_c √(p−r) (g − U σ) Diag(e)^(-1/2)), the second term's growth limited by γ.
    State: p r + r² + 2 r q + q + 1 numbers.

    This project's choices, where the paper leaves one open: the first U is the r leading eigenvectors of g gᵀ, since
    one step of subspace iteration from U = 0 is not defined; the directions are drawn by a generator that is seeded by
    the step, so that all processes draw the same. As published, m and v are not turned with the subspace.

    Args:
        params: matrices, or groups of them.
        lr: learning rate; 0.02 in the paper.
        rank, leading: r, and how many of the r directions are the best ones (40 of 128 in the paper's 60M run).
        betas: (β1, β2, β3).
        alpha, alpha_c, gamma: α, α_c and γ.
        gap: steps between two switches.
        weight_decay: decoupled λ.
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
        if gradient.shape[0] > gradient.shape[1]:
            return self._update_wide(state, gradient.T, group).T
        return self._update_wide(state, gradient, group)

    def _update_wide(self, state: dict[str, Any], g: Tensor, group: dict[str, Any]) -> Tensor:
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
        # The squares' sum of what is outside is the difference in Algorithm 3, without its cancellation.
        state["energy"].lerp_(outside.square().sum(0), 1 - beta1)
        tiny = torch.finfo(g.dtype).tiny
        scale = state["energy"].clamp_min(tiny).rsqrt()
        compensation = limited((g.shape[0] - rank) ** 0.5 * outside * scale, state, group["gamma"])
        inside = U @ (state["m"] * state["v"].clamp_min(tiny).rsqrt())
        return group["alpha"] * (inside + group["alpha_c"] * compensation)


def _switched(tracked: Tensor, U: Tensor, leading: int, seed: int) -> Tensor:
    """The new subspace (Algorithm 2) from the tracked p×p matrix and the old p×r one."""
    p, rank = U.shape
    basis = torch.linalg.qr(tracked @ U).Q
    vectors = torch.linalg.eigh(basis.T @ tracked @ basis).eigenvectors
    found = (basis @ vectors).flip(1)  # the best first
    outside = torch.linalg.qr(found, mode="complete").Q[:, rank:]
    drawn = torch.randperm(p - rank, generator=torch.Generator().manual_seed(seed))[: rank - leading]
    kept = rank - len(drawn)  # more than `leading` where fewer directions are outside than are to be drawn
    return torch.cat([found[:, :kept], outside[:, drawn.to(U.device)]], dim=1)
