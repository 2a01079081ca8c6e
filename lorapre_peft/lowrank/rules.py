"""This module defines the update rules, by which low-rank factors follow a running average of gradients.

A running average ``M ← decay · M + weight · x`` of p×q matrices is held as ``M ≈ B A`` with ``B`` p×k and ``A`` k×q. A
rule says how ``B`` and ``A`` change when ``x`` arrives. Both rules are written as a *row part* and a *column part*:

* the row part (`RowCoefficients`) needs only some rows of ``B`` and ``x``, and all of ``A``;
* the column part (``columns``) needs only sums over the rows: Gram matrices, k×k or k×2k, and ``Bᵀx``, k×q.

A step can therefore work through a matrix in tiles of rows, or in shards of rows on several devices, with the same
result. This module computes what is k×k, for n matrices together. A backend computes what is p×k, k×q or p×q. Numbers
that belong to a matrix are tensors [n] of float64, so that matrices of groups with different options can share a step.

The Gram matrices are formed and inverted in float64, at a negligible cost beside the p×q products. A Cholesky
factorisation of a positive matrix plus 1e-6 of its mean diagonal then does not fail. In float32, an inverse whose
entries reach 1/δ would turn the round-off in ``Bᵀx`` into momentum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import damped_inverse, inverse_root
from .rounding import random_bits

# A factor's Frobenius norm never decays below this. Otherwise a long run of zero gradients could underflow the factors
# to zero, from where no gradient could bring them back. The norm of their product, 1e-24, is below the resolution of
# float32 moments.
MIN_FACTOR_NORM = 1e-12


class Average(NamedTuple):
    """Holds decay and weight of a running average ``M ← decay · M + weight · x`` of each matrix: [n] float64.

    They are (β1, 1−β1) for Adam's first moment, (√β2, 1−√β2) for the root of its second one, and (μ, 1) for the
    heavy-ball sum of Muon.
    """

    decay: Tensor
    weight: Tensor


def test_rows(k: int, q: int, device: torch.device) -> Tensor:
    """Return the rows from which directions of `als` start: [k, q] float32, uniform in [0, 1), equal on all devices.

    They are positive because |g| is positive. A row of random signs would see little of the leading direction of |g|.
    """
    bits = random_bits(torch.Size((1, k, q)), torch.zeros(1, dtype=torch.int64, device=device), 0)[0]
    return ((bits >> 8) & 0xFFFFFF).float() * 2.0**-24


# This is ρ of `als` if none is given. For AdamW it is the best of those that `python -m eval.rerun rules` trains, and
# for Muon on adapters of those that `table2-small` trains, both with an earlier form of `als` (docs/history.md).
RESIDUAL_WEIGHT = 1.0


class RowCoefficients(NamedTuple):
    """Holds keep and gain, [n] float64 each, of the row part B' = (keep · B + gain · X) · unit.

    X = x Aᵀ (A Aᵀ + damping)⁻¹ is the fit of x by the rows of A, and unit is a factor that the rule chooses.
    """

    keep: Tensor
    gain: Tensor


class Mixture(NamedTuple):
    """Holds the coefficients of the momentum (c_B · B + c_X · X) A + residual · x at step t: [n] float64 each.

    B and A are the old factors, and X is the fit of `RowCoefficients`.
    """

    c_B: Tensor
    c_X: Tensor
    residual: Tensor


def _as_matrix(numbers: Tensor) -> Tensor:
    return numbers[..., None, None]


class Newton:
    """Implements the published rule (Theorem 3.1, Algorithms 1 and 2): a damped Newton step on each factor.

    Both steps read the old factors. With the coupling of Appendix B.1 each factor decays by √decay and adds
    (1−√decay)/(1−decay) times its least-squares fit of weight · x. ``damping`` is the absolute δ. The factors start at
    B = 0 and A ~ N(0, 0.02²).
    """

    name = "newton"
    tracked = False  # It has no energy correction of v, no clamp and no residual weight.
    projects_new = False  # The step is simultaneous: A' comes from the old B, and from BᵀB.
    second_momentum_rank = None  # The second moment has the rank of the first, as published.
    residual_weight = None  # What lies outside the factors has Adam's own weight.

    def __init__(self, damping: float = 1e-6):
        self.damping = damping

    def init_columns(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw A ~ N(0, 0.02²) of shape (k, q), float32 on the CPU."""
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * 0.02

    def inverse(self, gram: Tensor) -> Tensor:
        """Return (gram + δI)⁻¹ in float64."""
        return damped_inverse(gram, self.damping)

    def rows(self, average: Average) -> RowCoefficients:
        """Return keep and gain of the row part."""
        root = average.decay.sqrt()
        return RowCoefficients(root, average.weight * (1 - root) / (1 - average.decay))

    def mixture(self, average: Average, residual_weight: None, t: Tensor) -> Mixture:
        """Return the coefficients of m = decay · B A + weight · x, which do not depend on the step."""
        return Mixture(average.decay, torch.zeros_like(t), average.weight)

    def unit(self, gram: Tensor, old_square: Tensor, norm: Tensor, rows: RowCoefficients) -> Tensor:
        """Return 1 as the factor on B', because nothing rescales B' afterwards."""
        return torch.ones_like(norm)

    def columns(self, grams: Tensor, average: Average) -> tuple[Tensor, Tensor | None]:
        """Return W [n, k, 2k] float64 of A' = W [A; Bᵀx], from BᵀB over all rows, and None.

        The None says that the columns of B' are not made orthonormal.
        """
        root = average.decay.sqrt()
        identity = torch.eye(grams.shape[-2], dtype=grams.dtype, device=grams.device)
        step = _as_matrix(average.weight * (1 - root) / (1 - average.decay)) * self.inverse(grams)
        return torch.cat([(_as_matrix(root) * identity).expand_as(step), step], dim=-1), None

    def balance(self, grams: Tensor, root_T: None, gram_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return 1, 1 and NaN, [n] float64 each, as B' and A' are not rescaled and ‖B'A'‖²_F is not known."""
        one = grams.new_ones(grams.shape[:-2])
        return one, one, torch.full_like(one, float("nan"))


class Als:
    """Implements the tracked rule (this project): a sweep of alternating least squares on decay · B A + weight · x.

    First, B is solved for given A. The Cholesky factor of its Gram matrix makes its columns orthonormal, like Q in a
    QR decomposition. Then A is the target's part in their span, Qᵀ(decay · B A + weight · x). Finally both are scaled
    to equal Frobenius norms. ``damping`` is relative to the mean diagonal of the Gram matrix, so that scaling all
    gradients scales the factors and changes nothing else.

    Without the orthonormal columns the product B A would be the same, but the directions would become more alike with
    every step. The condition number of B then reached 1e3 and more, at which the round-off of float32 and the damping
    had an effect (`docs/rules.md`).
    """

    name = "als"
    tracked = True  # v keeps Adam's energy, the normalised update is clamped, and zero directions restart.
    projects_new = True  # A is solved for given the new B, from B'ᵀ [B' | B] and B'ᵀx.
    second_momentum_rank = 1  # This is the rank of v if none is given.
    residual_weight = RESIDUAL_WEIGHT

    def __init__(self, damping: float = 1e-6):
        self.damping = damping

    def init_columns(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return zeros, as all directions start at the first gradient (`restart`)."""
        return torch.zeros(shape, dtype=torch.float32, device="cpu")

    def inverse(self, gram: Tensor) -> Tensor:
        """Return (gram + δ'I)⁻¹ in float64, with δ' the damping times the mean diagonal of gram."""
        return damped_inverse(gram, self._ridge(gram))

    def _ridge(self, gram: Tensor) -> Tensor:
        return self.damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1)

    def restart(self, A: Tensor, B: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B with each direction restarted whose row of A is zero: a test row in A, and zeros in B.

        A state begins as zeros, and resets (ReLoRA) and pruning leave zeros behind. From B = 0 the first sweep is one
        step of subspace iteration on x. A test row is as long as the mean row that is not zero, or has length 1 if all
        rows are zero. A: [n, k, q], B: [n, p, k], gram: A Aᵀ in float64.
        """
        k, q = A.shape[-2:]
        squares = gram.diagonal(dim1=-2, dim2=-1)
        dead = squares == 0
        level = squares.sum(-1) / (~dead).sum(-1)
        length = (3 / q * torch.where(dead.all(-1), 1.0, level)).sqrt()  # A test row's mean square is 1/3.
        rows = test_rows(k, q, A.device) * _as_matrix(length).to(A.dtype).to(A.device)
        dead = dead.to(A.device)
        return torch.where(dead[..., None], rows, A), B.masked_fill(dead[..., None, :], 0)

    def rows(self, average: Average) -> RowCoefficients:
        """Return keep and gain of the row part."""
        return RowCoefficients(*average)

    def mixture(self, average: Average, residual_weight: Tensor, t: Tensor) -> Mixture:
        """Return the coefficients of the momentum at step t.

        The part of x outside A's rows has the bias-corrected weight min(1, ρ/(1−βᵗ)). At ρ = 1 it enters as it is,
        from the first step on. At ρ = 1−β its weight is Adam's own. This is stated for an EMA, of which any other
        average is a multiple.
        """
        beta, weight = average
        residual = torch.minimum(1 - beta**t, residual_weight) * (weight / (1 - beta))
        return Mixture(beta, weight - residual, residual)

    def unit(self, gram: Tensor, old_square: Tensor, norm: Tensor, rows: RowCoefficients) -> Tensor:
        """Return the factor on B', [n] float64, that makes its norm about 1, so that B'ᵀx stays within float32.

        gram: A Aᵀ [n, k, k]. old_square: ‖A‖²_F before any restart, which is also ‖B‖²_F. norm: ‖x‖_F, from which
        ‖X‖ ≈ ‖x‖/‖A‖ follows. `balance` rescales B' afterwards.
        """
        length = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
        size = torch.maximum(rows.keep * old_square.sqrt() * length, rows.gain * norm)
        return length / size.clamp_min(MIN_FACTOR_NORM**2)

    def columns(self, grams: Tensor, average: Average) -> tuple[Tensor, Tensor]:
        """Return W [n, k, 2k] float64 of A' = W [A; B'ᵀx], from B'ᵀ [B' | B] over all rows, and L⁻ᵀ.

        L is the Cholesky factor of B'ᵀB'. Multiplied from the right by L⁻ᵀ, [n, k, k] float64, B' has orthonormal
        columns.
        """
        gram, cross = grams.chunk(2, dim=-1)
        root = inverse_root(gram, self._ridge(gram))
        return torch.cat(
            [_as_matrix(average.decay) * (root @ cross), _as_matrix(average.weight) * root], dim=-1
        ), root.mT

    def balance(self, grams: Tensor, root_T: Tensor, gram_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factors that give B' and A' equal Frobenius norms, and ‖B'A'‖²_F afterwards: [n] float64 each.

        grams: as in `columns`. root_T: the second result of `columns`, L⁻ᵀ. gram_A: A' A'ᵀ.
        """
        gram = root_T.mT @ grams[..., : gram_A.shape[-1]] @ root_T
        norm_B, norm_A = (g.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt() for g in (gram, gram_A))
        common = (norm_B.sqrt() * norm_A.sqrt()).clamp_min(MIN_FACTOR_NORM)
        tiny = torch.finfo(torch.float32).tiny
        scale_B, scale_A = common / norm_B.clamp_min(tiny), common / norm_A.clamp_min(tiny)
        return scale_B, scale_A, (gram * gram_A).sum((-2, -1)) * (scale_B * scale_A).square()


RULES = {rule.name: rule for rule in (Als(), Newton())}
