"""This module inverts small Gram matrices and finds low-rank factors of large matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .float64 import float64_device, wide

# Up to this rank Gram matrices are inverted by a few operations on all matrices at once. LAPACK takes 2 µs for each
# matrix of a batch.
ELIMINATED = 4
# Up to this side length an exact SVD takes less time than subspace iteration (`top_factors`).
EXACT_SVD_SIZE = 128
# The subspace iteration uses this many extra directions and power steps (Halko, Martinsson and Tropp 2011, sections
# 4.4 and 4.5).
OVERSAMPLING = 8
POWER_STEPS = 3


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
    A = wide(A)
    return A @ A.mT


def new_columns(W: Tensor, A: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Return A' = W [A; projected] and A' A'ᵀ, both float64. W: [..., k, 2k] float64."""
    A_new = W @ wide(torch.cat([A, projected], -2))
    return A_new, A_new @ A_new.mT


def top_factors(
    times: Callable[[Tensor], Tensor],
    transposed_times: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    rank: int,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return rank-k factors of a large matrix x by subspace iteration: B [..., p, k] and A [..., k, q].

    times(Q) gives x Q and transposed_times(Y) gives xᵀ Y, so that x need not exist as a whole. The test matrix is
    fixed, so that every process computes the same factors. like: a tensor of x's leading dimensions, dtype and device.
    """
    p, q = shape
    width = min(rank + OVERSAMPLING, p, q)
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(q, width, generator=generator, dtype=torch.float64, device="cpu").to(like.dtype).to(like.device)
    basis = _orthonormal(times(test.expand(*like.shape[:-2], q, width)))
    for _ in range(POWER_STEPS):
        basis = _orthonormal(times(_orthonormal(transposed_times(basis))))
    B, A = best_factors(transposed_times(basis).mT, rank)
    return basis @ B, A


def _orthonormal(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of x [..., p, c]."""
    return torch.linalg.qr(x.to(float64_device(x.device)))[0].to(x.device)


def best_factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best rank-k approximation of x [..., p, q]: B [..., p, k] and A [..., k, q] of equal norms."""
    parts = torch.linalg.svd(x.to(float64_device(x.device)), full_matrices=False)
    U, S, Vh = (part.to(x.device) for part in parts)
    root = S[..., :rank].sqrt()
    return U[..., :rank] * root[..., None, :], root[..., :, None] * Vh[..., :rank, :]
