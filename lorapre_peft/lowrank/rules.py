"""The update rules: how low-rank factors follow a running average of gradients.

A running average ``M ← decay · M + weight · x`` of p×q matrices is held as ``M ≈ B A`` with ``B`` p×k and ``A`` k×q. A rule
says how ``B`` and ``A`` change when ``x`` arrives. Both rules are written as a *row part* and a *column part*:

* the row part (`Rows`: five numbers) needs nothing but some rows of ``B`` and ``x``, and all of ``A``;
* the column part (``columns``) needs only sums over the rows: Gram matrices, k×k or k×2k, and ``Bᵀx``, k×q.

So a step can work through a matrix in tiles of rows, or in shards of rows on several devices, with the same result. What is here
is k×k: matrices of all shapes go through it together, [..., k, k], and what is p×k, k×q or p×q is a backend's. The Gram
matrices are formed and inverted in float64: they cost nothing beside the p×q products, a Cholesky factorisation of a
positive matrix plus a relative 1e-6 of its diagonal then does not fail, and an inverse whose entries reach 1/δ would turn
float32's round-off in ``Bᵀx`` into momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .float64 import float64_device, wide
from .rounding import random_bits

# Up to this rank a Gram matrix is inverted by a few operations on all matrices at once: LAPACK takes 2 µs for each matrix of a batch.
ELIMINATED = 4
# Below this side length an exact SVD takes less time than subspace iteration (`top_factors`).
EXACT_SVD_SIZE = 128
# Extra directions and power steps of the subspace iteration: Halko, Martinsson and Tropp (2011), section 4.4 and 4.5.
OVERSAMPLING = 8
POWER_STEPS = 3
# A factor's Frobenius norm never decays below this, so that a long run of zero gradients cannot underflow the factors to
# zero, from where no gradient could bring them back. The product's norm, 1e-24, is below what float32 moments resolve.
MIN_FACTOR_NORM = 1e-12


class Average(NamedTuple):
    """A running average ``M ← decay · M + weight · x``. Adam's first moment is (β1, 1−β1), Muon's heavy-ball sum (μ, 1)."""

    decay: float
    weight: float


def damped_inverse(gram: Tensor, ridge: Tensor | float) -> Tensor:
    """(gram + ridge·I)⁻¹ in float64; gram: [..., k, k] float64, symmetric and not negative. ridge: [...] or a number, ≥ 0.

    By Cholesky, or for small k by elimination. Where that fails, and on a GPU nobody looks, the diagonal alone is inverted: a
    shorter step, and no NaN.
    """
    k = gram.shape[-1]
    identity = torch.eye(k, dtype=gram.dtype, device=gram.device)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # float64 round-off in a Gram matrix is relative to its trace: an absolute ridge below that would not keep it positive.
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
    """The inverse by symmetric Gauss–Jordan elimination along the diagonal, and where a pivot was not positive: [...] bool.

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
    """L⁻¹ of the Cholesky factor L Lᵀ = gram + ridge·I, lower triangular; arguments as in `damped_inverse`."""
    k = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    ridge = torch.maximum(ridge, 1e-15 * diagonal.sum(-1) + torch.finfo(gram.dtype).tiny)
    damped = gram + ridge[..., None, None] * torch.eye(k, dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    factor = torch.where(info[..., None, None] > 0, torch.diag_embed((diagonal + ridge[..., None]).sqrt()), factor)
    identity = torch.eye(k, dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def gram_rows(A: Tensor) -> Tensor:
    """A Aᵀ in float64; A: [..., k, q]."""
    A = wide(A)
    return A @ A.mT


def top_factors(
    times: Callable[[Tensor], Tensor],
    transposed_times: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    rank: int,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rank-k factors of a large matrix x by subspace iteration from a fixed test matrix: B [..., p, k], A [..., k, q].

    times(Q) gives x Q and transposed_times(Y) gives xᵀ Y, so that x need not exist at once. The test matrix comes from a
    generator of its own, so that every process computes the same factors. ``like`` gives batch shape, dtype and device.
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
    """An orthonormal basis of the columns of x [..., p, c]."""
    return torch.linalg.qr(x.to(float64_device(x.device)))[0].to(x.device)


def best_factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-k approximation of x [..., p, q] as B [..., p, k] and A [..., k, q] of equal Frobenius norms."""
    parts = torch.linalg.svd(x.to(float64_device(x.device)), full_matrices=False)
    U, S, Vh = (part.to(x.device) for part in parts)
    root = S[..., :rank].sqrt()
    return U[..., :rank] * root[..., None, :], root[..., :, None] * Vh[..., :rank, :]


def test_rows(k: int, q: int, device: torch.device) -> Tensor:
    """The rows that directions of `als` start from: [k, q] float32, uniform in [0, 1), the same on every device and process.

    They are positive because |g| is: a row of random signs would see little of its leading direction.
    """
    bits = random_bits(torch.Size((1, k, q)), torch.zeros(1, dtype=torch.int64, device=device), 0)[0]
    return ((bits >> 8) & 0xFFFFFF).float() * 2.0**-24


# ρ of `als` where none is given: of those that `python -m eval.rerun rules` (AdamW) and `table2-small` (Muon) train, the best.
RESIDUAL_WEIGHT = 1.0


class Rows(NamedTuple):
    """The row part of a rule for one average, with X = x Aᵀ (A Aᵀ + damping)⁻¹ the least-squares fit of x to A's rows:

    B' = (keep · B + gain · X) · unit.
    """

    keep: float
    gain: float


class Mixture(NamedTuple):
    """The momentum of a rule at step t, from the old factors: (m_keep · B + m_gain · X) A + residual · x. Each [N] float64."""

    m_keep: Tensor
    m_gain: Tensor
    residual: Tensor


class Newton:
    """The published rule (Theorem 3.1, Algorithms 1 and 2): one damped Newton step on each factor, from the old factors.

    With the coupling of Appendix B.1 each factor decays by √decay and adds (1−√decay)/(1−decay) times its least-squares fit of
    weight·x. ``damping`` is δ, absolute. It starts at B = 0 and A ~ N(0, 0.02²).
    """

    name = "newton"
    tracked = False  # no energy correction of v, no clamp, no residual weight
    projects_new = False  # the step is simultaneous: A's new rows come from the old B, and from BᵀB

    def __init__(self, damping: float = 1e-6, init_std: float = 0.02):
        self.damping = damping
        self.init_std = init_std

    def init_columns(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """A ~ N(0, 0.02²), float32 on the CPU; shape: (k, q)."""
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * self.init_std

    def inverse(self, gram: Tensor) -> Tensor:
        """(gram + δI)⁻¹, float64."""
        return damped_inverse(gram, self.damping)

    def rows(self, average: Average) -> Rows:
        """The row part."""
        return Rows(average.decay**0.5, average.weight * (1 - average.decay**0.5) / (1 - average.decay))

    def mixture(self, average: Average, residual_weight: None, t: Tensor) -> Mixture:
        """m = decay · B A + weight · x at every step t [N] float64."""
        one = torch.ones_like(t)
        return Mixture(average.decay * one, 0 * one, average.weight * one)

    def unit(self, gram: Tensor, old_square: Tensor, norm: Tensor, keep: Tensor, gain: Tensor) -> Tensor:
        """What B' is multiplied by: 1, as nothing rescales it afterwards."""
        return torch.ones_like(norm, dtype=torch.float64).expand(gram.shape[:-2])

    def columns(self, grams: Tensor, decay: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """W with A' = W [A; Bᵀx], from BᵀB over all rows: [..., k, 2k]. decay, weight: the average's, [..., 1, 1]. All float64.

        And what B' is multiplied by from the right: None, nothing.
        """
        root = decay.sqrt()
        identity = torch.eye(grams.shape[-2], dtype=grams.dtype, device=grams.device)
        step = (weight * (1 - root) / (1 - decay)) * self.inverse(grams)
        return torch.cat([(root * identity).expand_as(step), step], dim=-1), None

    def balance(self, grams: Tensor, turn: None, gram_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What B' and A' are multiplied by, and ‖B'A'‖²_F, which this rule does not know: 1, 1 and NaN, [...] float64."""
        one = grams.new_ones(grams.shape[:-2])
        return one, one, torch.full_like(one, float("nan"))


class Als:
    """The tracked rule (this project): one sweep of alternating least squares on the target decay · B A + weight · x.

    B is solved given A; its columns are made orthonormal by the Cholesky factor of its Gram matrix, which is Q of a QR decomposition; A is
    the target's part in their span, Qᵀ(decay · B A + weight · x); then both are scaled to equal Frobenius norms. ``damping`` is relative
    to the mean diagonal of the Gram matrix, so that scaling all gradients scales the factors and changes nothing else.

    Solved for A without the orthonormal columns the product would be the same, but directions grow alike from step to step: the
    condition of B reached 1e3 to 1e5, and float32 and damping were felt (`docs/rules.md`).
    """

    name = "als"
    tracked = True  # v keeps Adam's energy, the normalised update is clamped, directions of zeros start anew
    projects_new = True  # A is solved given the new B: from B'ᵀ [B' | B] and B'ᵀx

    def __init__(self, damping: float = 1e-6):
        self.damping = damping

    def inverse(self, gram: Tensor) -> Tensor:
        """(gram + δ'I)⁻¹, float64."""
        return damped_inverse(gram, self.damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1))

    def restart(self, A: Tensor, B: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """A and B in which every direction whose row of A is zero starts anew: its row of A is a test row, its column of B zero.

        Zeros are how a state begins, and what resets (ReLoRA) and pruning leave behind. From B = 0 the first sweep is one step of
        subspace iteration on x. A test row is as long as the mean row that is not zero, or has length 1 if all are.
        A: [..., k, q], B: [..., p, k], gram: A Aᵀ in float64.
        """
        k, q = A.shape[-2:]
        squares = gram.diagonal(dim1=-2, dim2=-1)
        dead = squares == 0
        level = squares.sum(-1) / (~dead).sum(-1)
        length = (3 / q * torch.where(dead.all(-1), 1.0, level)).sqrt()[
            ..., None, None
        ]  # a test row's mean square is 1/3
        rows = test_rows(k, q, A.device) * length.to(A.dtype).to(A.device)
        dead = dead.to(A.device)
        return torch.where(dead[..., None], rows, A), B.masked_fill(dead[..., None, :], 0)

    def rows(self, average: Average) -> Rows:
        """The row part."""
        return Rows(*average)

    def mixture(self, average: Average, residual_weight: float, t: Tensor) -> Mixture:
        """The momentum at step t [N] float64: after bias correction what lies outside A's rows has the weight min(1, ρ/(1−βᵗ)).

        At ρ = 1 it enters as it is, from the first step on; at ρ = 1−β its weight is Adam's own. Stated for an EMA; another average is
        its multiple.
        """
        beta, weight = average
        residual = (1 - beta**t).clamp_max(residual_weight) * (weight / (1 - beta))
        return Mixture(torch.full_like(t, beta), weight - residual, residual)

    def unit(self, gram: Tensor, old_square: Tensor, norm: Tensor, keep: Tensor, gain: Tensor) -> Tensor:
        """What B' is multiplied by so that its norm is about 1, and B'ᵀx neither overflows nor underflows float32: [...] float64.

        gram: A Aᵀ [..., k, k] and old_square: ‖A‖²_F before any restart; norm: ‖x‖_F, and keep and gain, [...]. With a = ‖A‖,
        ‖B‖² is old_square and ‖X‖ ≈ ‖x‖/a; `balance` rescales B'.
        """
        length = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
        size = torch.maximum(keep * old_square.sqrt() * length, gain * norm)
        return length / size.clamp_min(MIN_FACTOR_NORM**2)

    def columns(self, grams: Tensor, decay: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W with A' = W [A; B'ᵀx], from B'ᵀ [B' | B] over all rows: [..., k, 2k]. decay, weight: the average's, [..., 1, 1].

        And L⁻ᵀ, by which B' is multiplied from the right: [..., k, k]. All float64.
        """
        gram, cross = grams.chunk(2, dim=-1)
        root = inverse_root(gram, self.damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1))
        return torch.cat([decay * (root @ cross), weight * root], dim=-1), root.mT

    def balance(self, grams: Tensor, turn: Tensor, gram_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What B' and A' are multiplied by for equal Frobenius norms, and ‖B'A'‖²_F then: [...] float64.

        grams: as in `columns`; turn: what that multiplies B' by; gram_A: A' A'ᵀ.
        """
        gram = turn.mT @ grams[..., : gram_A.shape[-1]] @ turn
        norm_B, norm_A = (g.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt() for g in (gram, gram_A))
        common = (norm_B.sqrt() * norm_A.sqrt()).clamp_min(MIN_FACTOR_NORM)
        tiny = torch.finfo(torch.float32).tiny
        scale_B, scale_A = common / norm_B.clamp_min(tiny), common / norm_A.clamp_min(tiny)
        return scale_B, scale_A, (gram * gram_A).sum((-2, -1)) * (scale_B * scale_A).square()


RULES = {rule.name: rule for rule in (Als(), Newton())}
