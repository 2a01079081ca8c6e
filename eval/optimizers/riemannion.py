"""This module implements Riemannion, which is Muon on the manifold of matrices of rank r."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .pairs import PairOptimizer


class Riemannion(PairOptimizer):
    """Implements Riemannion (Bogachev et al., "LoRA meets Riemannion", arXiv 2507.12142), a Muon step of X = B A.

    X keeps the rank r. Let G be the gradient of X, Q_B and Q_A orthonormal bases of X's columns and rows, and
    P(Z) = Z − (I − Q_B Q_Bᵀ) Z (I − Q_A Q_Aᵀ) the projection onto the tangent space at X. A step is
        M ← β P(M) + P(G),   D = P(U Vᵀ) with the 2r singular vectors U and V of M,
        X ← the best rank-r approximation of (1 − lr λ) X − lr D.
    G Q_A and Gᵀ Q_B come from the gradients of B and A, so that no p×q matrix is formed. The path of X does not depend
    on how it is factored. B and A are kept with equal singular values. X must have rank r, so training cannot start
    from B = 0. The state is 2 r (p + q) numbers.

    The paper's text was not at hand. The algorithm is taken from implementations that quote it line by line. Some of
    them keep D as the momentum. Others keep M, as Muon does and as it is here, which trained better. The authors'
    published code holds an earlier variant with Adam's scaling, which has the same projection and retraction.

    Args:
        params: A and B of each layer in turns, as `lora_pairs` returns them.
        lr: learning rate. Every singular value of a step is about lr.
        beta: decay β of the momentum.
        weight_decay: decoupled λ.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-2, beta: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, beta=beta, weight_decay=weight_decay))

    def step_pair(self, A: Tensor, B: Tensor, group: dict[str, Any]) -> None:
        """Update A and B in place by one step of X = B A."""
        rank, lr, state = len(A), group["lr"], self.state[A]
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.T)
        # A tangent vector is left Q_Aᵀ + Q_B rightᵀ with Q_Bᵀ left = 0.
        along = torch.linalg.solve_triangular(R_A, B.grad, upper=True, left=False)  # This is G Q_A.
        left = along - Q_B @ (Q_B.T @ along)
        right = torch.linalg.solve_triangular(R_B, A.grad.T, upper=True, left=False)  # This is Gᵀ Q_B.
        if state:
            moved_left, moved_right = _tangent(state["left"], state["right"], Q_B, Q_A)
            left, right = group["beta"] * moved_left + left, group["beta"] * moved_right + right
        state["left"], state["right"] = torch.cat([left, Q_B], dim=1), torch.cat([Q_A, right], dim=1)
        U, _, V = _thin_svd(state["left"], state["right"])
        left, right = _tangent(U, V, Q_B, Q_A)
        kept = (1 - lr * group["weight_decay"]) * A.T @ R_B.T - lr * right
        U, sigma, V = _thin_svd(torch.cat([left, Q_B], dim=1), torch.cat([-lr * Q_A, kept], dim=1))
        root = sigma[:rank].sqrt()
        B.copy_(U[:, :rank] * root)
        A.copy_((V[:, :rank] * root).T)


def _tangent(left: Tensor, right: Tensor, Q_B: Tensor, Q_A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left [p, r] and right [q, r] of the tangent vector left Q_Aᵀ + Q_B rightᵀ.

    It is the projection of ``left rightᵀ`` onto the tangent space.
    """
    outside = left - Q_B @ (Q_B.T @ left)
    return outside @ (right.T @ Q_A), right @ (left.T @ Q_B)


def _thin_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [p, c], σ [c] and V [q, c] of ``left rightᵀ``, from thin QR factorisations of left and right."""
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right)
    U, sigma, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    return Q_left @ U, sigma, Q_right @ Vh.T
