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
    k = gram.shape[-1]
    identity = torch.eye(k, dtype=gram.dtype, device=gram.device)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Float64 round-off in a Gram matrix is relative to its trace. An absolute ridge below it would not keep the matrix
    # positive.
    floor = 1e-15 * diagonal.sum(-1) + torch.finfo(gram.dtype).tiny
    ridge = floor.clamp_min(ridge) if isinstance(ridge, float) else torch.maximum(ridge, floor)
    damped = gram + ridge[..., None, None] * identity
    if k <= ELIMINATED:
        inverse, failed = _eliminated(damped)
    else:
        factor, info = torch.linalg.cholesky_ex(damped)
        failed = info > 0
        factor = torch.where(failed[..., None, None], identity, factor)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        inverse = inverse.mT @ inverse
    return torch.where(failed[..., None, None], torch.diag_embed(1 / (diagonal + ridge[..., None])), inverse)


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


def inverse_root(gram: Tensor, ridge: Tensor) -> Tensor:
    """Return L⁻¹ of the lower Cholesky factor L, L Lᵀ = gram + ridge·I. Arguments are as in `damped_inverse`."""
    k = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    ridge = torch.maximum(ridge, 1e-15 * diagonal.sum(-1) + torch.finfo(gram.dtype).tiny)
    damped = gram + ridge[..., None, None] * torch.eye(k, dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    factor = torch.where(info[..., None, None] > 0, torch.diag_embed((diagonal + ridge[..., None]).sqrt()), factor)
    identity = torch.eye(k, dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def gram_rows(A: Tensor) -> Tensor:
    """Return A Aᵀ in float64. A: [..., k, q]."""
    A = to_float64(A)
    return A @ A.mT


def new_columns(W: Tensor, A: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Return A' = W [A; projected] and A' A'ᵀ, both float64. W: [..., k, 2k] float64."""
    A_new = W @ to_float64(torch.cat([A, projected], -2))
    return A_new, A_new @ A_new.mT
