"""This module makes and inverts small Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .float64 import to_float64

# Up to this rank Gram matrices are inverted by a few operations on all matrices at once. LAPACK takes 2 µs for each
# matrix of a batch.
ELIMINATED = 4


def damped_inverse(gram: Tensor, ridge: Tensor | float) -> Tensor:
    """Return (gram + ridge·I)⁻¹ of Gram matrices [..., k, k] float64. ridge: [...] or a number, ≥ 0.

    The inverse is found by a Cholesky factorisation, or for small k by elimination. Where that fails, which on a GPU
    the host does not see, only the diagonal is inverted. That gives a shorter step and no NaN.
    """
    if gram.shape[-1] > ELIMINATED:
        root = inverse_root(gram, ridge)
        return root.mT @ root
    damped = _damped(gram, ridge)
    inverse, failed = _eliminated(damped)
    return torch.where(failed[..., None, None], torch.diag_embed(1 / damped.diagonal(dim1=-2, dim2=-1)), inverse)


def inverse_root(gram: Tensor, ridge: Tensor | float) -> Tensor:
    """Return L⁻¹ of the lower Cholesky factor L, L Lᵀ = gram + ridge·I. All else is as in `damped_inverse`."""
    damped = _damped(gram, ridge)
    factor, info = torch.linalg.cholesky_ex(damped)
    diagonal = torch.diag_embed(damped.diagonal(dim1=-2, dim2=-1).sqrt())
    factor = torch.where(info[..., None, None] > 0, diagonal, factor)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def _damped(gram: Tensor, ridge: Tensor | float) -> Tensor:
    """Return gram + ridge·I.

    Float64 round-off in a Gram matrix is relative to its trace. An absolute ridge below it would not keep the matrix
    positive, and is raised to it.
    """
    floor = 1e-15 * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(gram.dtype).tiny
    ridge = floor.clamp_min(ridge) if isinstance(ridge, float) else torch.maximum(ridge, floor)
    return gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _eliminated(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse by symmetric Gauss–Jordan elimination, and where a pivot was not positive: [...] bool.

    A positive matrix needs no other pivots (Higham, Accuracy and Stability of Numerical Algorithms, section 14.4).
    """
    swept, pivots = matrix.clone(), []
    for j in range(matrix.shape[-1]):
        column = swept[..., j].clone()
        pivots.append(column[..., j])
        row = column / pivots[-1][..., None]
        swept -= column[..., :, None] * row[..., None, :]
        swept[..., j] = swept[..., j, :] = row
        swept[..., j, j] = -1 / pivots[-1]
    return -swept, ~(torch.stack(pivots, -1) > 0).all(-1)


def gram_rows(A: Tensor) -> Tensor:
    """Return A Aᵀ in float64. A: [..., k, q]."""
    A = to_float64(A)
    return A @ A.mT


def new_columns(W: Tensor, A: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Return A' = W [A; projected] and A' A'ᵀ, both float64. W: [..., k, 2k] float64."""
    A_new = W @ to_float64(torch.cat([A, projected], -2))
    return A_new, A_new @ A_new.mT
