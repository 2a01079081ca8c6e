"""The update rules: how low-rank factors follow a running average of gradients.

A running average ``M ← decay · M + weight · x`` of p×q matrices is held as ``M ≈ B A`` with ``B`` p×k and ``A`` k×q. A rule
says how ``B`` and ``A`` change when ``x`` arrives. Both rules are written as a *row part* and a *column part*:

* the row part (``pinv``, ``coefficients``, ``rows``) needs nothing but some rows of ``B`` and ``x``, and all of ``A``;
* the column part (``columns``) needs only ``sums``: small k×(k+q) or k×(2k+q) matrices, added up over the rows.

So a step can work through a matrix in tiles of rows, with the same result. Every tensor may have leading batch dimensions.
The k×k Gram matrices are formed and solved in float64: they cost nothing beside the p×q products, and a Cholesky
factorisation of a positive matrix plus a relative 1e-6 of its diagonal then cannot fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Below this side length the start takes an exact SVD; above it, subspace iteration (`top_factors`).
EXACT_SVD_SIZE = 128
# Extra directions and power steps of the subspace iteration: Halko, Martinsson and Tropp (2011), section 4.4 and 4.5.
OVERSAMPLING = 8
POWER_STEPS = 3
# Relative floor under the singular values that `als` starts from. A first gradient may have fewer than k directions, and a row
# and column that start at exactly zero stay zero for good; from float32's round-off they grow within a few steps.
START_FLOOR = torch.finfo(torch.float32).eps
# A factor's Frobenius norm never decays below this, so that a long run of zero gradients cannot underflow the factors to
# zero, from where no gradient could bring them back. The product's norm, 1e-24, is below what float32 moments resolve.
MIN_FACTOR_NORM = 1e-12


class Average(NamedTuple):
    """A running average ``M ← decay · M + weight · x``. Adam's first moment is (β1, 1−β1), Muon's heavy-ball sum (μ, 1)."""

    decay: float
    weight: float


def solve_ridge(gram: Tensor, right: Tensor, ridge: Tensor | float) -> Tensor:
    """(gram + ridge·I)⁻¹ right, solved in float64 and returned in the dtype of ``right``.

    gram: [..., k, k], symmetric and not negative. right: [..., k, q]. ridge: [...] or a number, above 0.
    """
    gram = gram.double()
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = torch.as_tensor(ridge, dtype=gram.dtype, device=gram.device)
    # float64 round-off in a Gram matrix is relative to its trace: an absolute ridge below that would not keep it positive.
    floor = 1e-15 * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(gram.dtype).tiny
    factor, _ = torch.linalg.cholesky_ex(gram + torch.maximum(ridge, floor)[..., None, None] * identity)
    return torch.cholesky_solve(right.double(), factor).to(right.dtype)


def gram_rows(A: Tensor) -> Tensor:
    """A Aᵀ in float64; A: [..., k, q]."""
    A = A.double()
    return A @ A.mT


def top_factors(
    times: Callable[[Tensor], Tensor],
    transposed_times: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    rank: int,
    like: Tensor,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rank-k factors of a large matrix x by subspace iteration from a fixed test matrix: B [..., p, k], A [..., k, q].

    times(Q) gives x Q and transposed_times(Y) gives xᵀ Y, so that x need not exist at once. The test matrix comes from a
    generator of its own, so that every process computes the same factors. ``like`` gives batch shape, dtype and device.
    """
    p, q = shape
    width = min(rank + OVERSAMPLING, p, q)
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(q, width, generator=generator, dtype=torch.float64).to(like)
    basis = torch.linalg.qr(times(test.expand(*like.shape[:-2], q, width)))[0]
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(times(torch.linalg.qr(transposed_times(basis))[0]))[0]
    B, A = best_factors(transposed_times(basis).mT, rank, floor)
    return basis @ B, A


def best_factors(x: Tensor, rank: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """The best rank-k approximation of x [..., p, q] as B [..., p, k] and A [..., k, q] of equal Frobenius norms.

    Singular values below ``floor`` times the largest are raised to it.
    """
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    root = torch.maximum(S[..., :rank], floor * S[..., :1]).sqrt()
    return U[..., :rank] * root[..., None, :], root[..., :, None] * Vh[..., :rank, :]


class Newton:
    """The published rule (Theorem 3.1, Algorithms 1 and 2): one damped Newton step on each factor, from the old factors.

    With the coupling of Appendix B.1 each factor decays by √decay and adds (1−√decay)/(1−decay) times its least-squares fit of
    weight·x. ``damping`` is δ, absolute. It starts at B = 0 and A ~ N(0, 0.02²).
    """

    name = "newton"
    tracked = False  # no energy correction of v, no clamp, no residual weight

    def __init__(self, damping: float = 1e-6, init_std: float = 0.02):
        self.damping = damping
        self.init_std = init_std

    def init_columns(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """A ~ N(0, 0.02²), float32 on the CPU; shape: (k, q)."""
        return torch.randn(shape, generator=generator, dtype=torch.float32) * self.init_std

    def pinv(self, A: Tensor) -> Tensor:
        """(A Aᵀ + δI)⁻¹ A: [..., k, q]. x times its transpose is the least-squares fit of x to A's rows."""
        return solve_ridge(gram_rows(A), A, self.damping)

    def residual(self, average: Average, residual_weight: float | None) -> float:
        """The weight of x itself in the momentum: always ``average.weight``."""
        return average.weight

    def coefficients(self, B: Tensor, fit: Tensor, average: Average, residual: float) -> Tensor:
        """C such that the momentum used for the update is C A + residual · x. B, fit: [..., rows, k]."""
        return average.decay * B

    def _gain(self, average: Average) -> float:
        return average.weight * (1 - average.decay**0.5) / (1 - average.decay)

    def rows(self, B: Tensor, fit: Tensor, average: Average) -> Tensor:
        """The new rows of B, from fit = x pinv(A)ᵀ."""
        return average.decay**0.5 * B + self._gain(average) * fit

    def sums(self, B: Tensor, B_new: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bᵀ [B] in float64 and Bᵀ x of the *old* rows (the step is simultaneous), to be added up over the rows."""
        return gram_rows(B.mT), B.mT @ x

    def columns(
        self, A: Tensor, B_new: Tensor, sums: tuple[Tensor, Tensor], average: Average
    ) -> tuple[Tensor, Tensor]:
        """The new (B, A) from the summed ``sums``."""
        gram, projected = sums
        A_new = average.decay**0.5 * A + self._gain(average) * solve_ridge(gram, projected, self.damping)
        return B_new, A_new


class Als:
    """The tracked rule (this project): one sweep of alternating least squares on the target decay · B A + weight · x.

    B is solved given A, then A given the new B, then both are scaled to equal Frobenius norms. ``damping`` is relative
    to the mean diagonal of the Gram matrix, so that scaling all gradients scales the factors and changes nothing else.
    """

    name = "als"
    tracked = True  # v keeps Adam's energy, the normalised update is clamped, the start is the first gradient

    def __init__(self, damping: float = 1e-6):
        self.damping = damping

    def _ridge(self, gram: Tensor) -> Tensor:
        return self.damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1)

    def pinv(self, A: Tensor) -> Tensor:
        """(A Aᵀ + δ'I)⁻¹ A: [..., k, q]. x times its transpose is the least-squares fit of x to A's rows."""
        gram = gram_rows(A)
        return solve_ridge(gram, A, self._ridge(gram))

    def residual(self, average: Average, residual_weight: float | None) -> float:
        """ρ, the weight of the part of x outside the factors' span, as a multiple of what an EMA would have used.

        None: ρ = √((1−β)/(1+β)), the length that an EMA keeps of a gradient without direction.
        """
        beta = average.decay
        rho = ((1 - beta) / (1 + beta)) ** 0.5 if residual_weight is None else residual_weight
        return rho * average.weight / (1 - beta)

    def coefficients(self, B: Tensor, fit: Tensor, average: Average, residual: float) -> Tensor:
        """C such that the momentum used for the update is C A + residual · x. B, fit: [..., rows, k]."""
        return average.decay * B + (average.weight - residual) * fit

    def rows(self, B: Tensor, fit: Tensor, average: Average) -> Tensor:
        """The new rows of B, from fit = x pinv(A)ᵀ."""
        return average.decay * B + average.weight * fit

    def sums(self, B: Tensor, B_new: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """B'ᵀ [B' | B] in float64 and B'ᵀ x, to be added up over the rows."""
        B_new_64 = B_new.double()
        return B_new_64.mT @ torch.cat([B_new_64, B.double()], dim=-1), B_new.mT @ x

    def columns(
        self, A: Tensor, B_new: Tensor, sums: tuple[Tensor, Tensor], average: Average
    ) -> tuple[Tensor, Tensor]:
        """The new (B, A) from the summed ``sums``, of equal Frobenius norms."""
        grams, projected = sums
        gram, cross = grams.split(A.shape[-2], dim=-1)
        target = average.decay * (cross @ A.double()) + average.weight * projected.double()
        A_new = solve_ridge(gram, target, self._ridge(gram))
        norm_B = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[..., None, None]
        norm_A = torch.linalg.matrix_norm(A_new)[..., None, None]
        common = (norm_B.sqrt() * norm_A.sqrt()).clamp_min(MIN_FACTOR_NORM)
        tiny = torch.finfo(torch.float32).tiny
        B_new = B_new * (common / norm_B.clamp_min(tiny)).to(B_new.dtype)
        return B_new, (A_new * (common / norm_A.clamp_min(tiny))).to(A.dtype)


RULES = {rule.name: rule for rule in (Als(), Newton())}
