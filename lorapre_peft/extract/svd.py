"""This module finds low-rank factors of a matrix, by an SVD or by subspace iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lowrank.float64 import float64_device

# Up to this side length an exact SVD takes less time than subspace iteration (`top_factors`).
EXACT_SVD_SIZE = 128
# The subspace iteration uses this many extra directions and power steps (Halko, Martinsson and Tropp 2011, sections
# 4.4 and 4.5).
OVERSAMPLING = 8
POWER_STEPS = 3


def top_factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return rank-k factors of a large matrix x [p, q] by subspace iteration: B [p, k] and A [k, q].

    The test matrix is fixed, so that the same matrix has the same factors each time, and torch's generator is left
    alone. `torch.svd_lowrank` draws from that.
    """
    generator = torch.Generator().manual_seed(0)
    width = min(rank + OVERSAMPLING, *x.shape)
    test = torch.randn(x.shape[1], width, generator=generator, dtype=torch.float64, device="cpu")
    basis = _orthonormal(x @ test.to(x.dtype).to(x.device))
    for _ in range(POWER_STEPS):
        basis = _orthonormal(x @ _orthonormal(x.mT @ basis))
    B, A = best_factors(basis.mT @ x, rank)
    return basis @ B, A


def _orthonormal(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of x [p, c]."""
    return torch.linalg.qr(x.to(float64_device(x.device)))[0].to(x.device)


def best_factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best rank-k approximation of x [p, q]: B [p, k] and A [k, q] of equal norms."""
    parts = torch.linalg.svd(x.to(float64_device(x.device)), full_matrices=False)
    U, S, Vh = (part.to(x.device) for part in parts)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]
