"""This module implements MoFaSGD, which holds the momentum as a truncated SVD and follows its spectral direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .matrix import MatrixOptimizer


class MoFaSGD(MatrixOptimizer):
    """Implements momentum factorised SGD (Mahdavinia and Mahdavi, arXiv 2507.08091, Algorithm 1).

    The momentum M = U diag(σ) Vᵀ of rank r starts as the best approximation of the first gradient. Later gradients are
    projected onto the tangent space of the rank-r matrices at M, ĝ = U Uᵀ g + g V Vᵀ − U Uᵀ g V Vᵀ, and M becomes
    the best rank-r approximation of β M + ĝ. It is found from two QR factorisations and an SVD of 2r×2r numbers. The
    update is u = U Vᵀ, whose singular values are 1, or 0 where M's are. The state is r (p + q + 1) numbers.

    The authors' code starts from the SVD of the weight instead, and divides by clipped singular values where the
    paper's update has 1.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        rank: rank r of the momentum, or the smaller side of a matrix if that is less.
        beta: decay β of the momentum.
        weight_decay: decoupled λ.
    """

    def __init__(self, params: ParamsT, lr: float = 0.05, *, rank: int, beta: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, rank=rank, beta=beta, weight_decay=weight_decay))

    def update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u = U Vᵀ [p, q] of the momentum after this gradient."""
        rank = min(group["rank"], *gradient.shape)
        if not state or not state["sigma"].any():  # A momentum of zero has no directions to go on from.
            U, sigma, Vh = torch.linalg.svd(gradient, full_matrices=False)
            V = Vh.T
        else:
            U, sigma, V = state["U"], state["sigma"], state["V"]
            projected, across = gradient @ V, U.T @ gradient
            left, left_r = torch.linalg.qr(torch.cat([U, projected], dim=1))
            right, right_r = torch.linalg.qr(torch.cat([V, across.T], dim=1))
            one = torch.eye(rank).to(gradient)
            blocks = [[torch.diag(group["beta"] * sigma) - across @ V, one], [one, torch.zeros_like(one)]]
            middle = left_r @ torch.cat([torch.cat(row, dim=1) for row in blocks]) @ right_r.T
            found_left, sigma, found_right = torch.linalg.svd(middle, full_matrices=False)
            U, V = left @ found_left, right @ found_right.T
        state["U"], state["sigma"], state["V"] = U[:, :rank].clone(), sigma[:rank].clone(), V[:, :rank].clone()
        # The vectors of singular values that are only round-off are arbitrary.
        known = state["sigma"] > sum(gradient.shape) * torch.finfo(gradient.dtype).eps * state["sigma"][0]
        return state["U"] * known @ state["V"].T
