"""The update rules: how low-rank factors follow a running average of gradients.

A running average ``M ← decay · M + weight · x`` of p×q matrices is held as ``M ≈ B A`` with ``B`` p×k and ``A`` k×q. A
rule says how ``B`` and ``A`` change when ``x`` arrives. Both rules are written as a *row part* and a *column part*:

* the row part (`Rows`) needs nothing but some rows of ``B`` and ``x``, and all of ``A``;
* the column part (``columns``) needs only sums over the rows: Gram matrices, k×k or k×2k, and ``Bᵀx``, k×q.

So a step can work through a matrix in tiles of rows, or in shards of rows on several devices, with the same result.
This module computes what is k×k, for n matrices together; a backend computes what is p×k, k×q or p×q. Numbers that
belong to a matrix are tensors [n] of float64, so that matrices of groups with different options can share a step. The
Gram matrices are formed and inverted in float64: they cost nothing beside the p×q products, a Cholesky factorisation
of a positive matrix plus a relative 1e-6 of its diagonal then does not fail, and an inverse whose entries reach 1/δ
would turn float32's round-off in ``Bᵀx`` into momentum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import damped_inverse, inverse_root
from .rounding import random_bits

# A factor's Frobenius norm never decays below this, so that a long run of zero gradients cannot underflow the factors
# to zero, from where no gradient could bring them back. The product's norm, 1e-24, is below what float32 moments
# resolve.
MIN_FACTOR_NORM = 1e-12


class Average(NamedTuple):
    """A running average ``M ← decay · M + weight · x`` of each matrix: [n] float64.

    Adam's first moment is (β1, 1−β1), the root of its second (√β2, 1−√β2), Muon's heavy-ball sum (μ, 1).
    """

    decay: Tensor
    weight: Tensor


def test_rows(k: int, q: int, device: torch.device) -> Tensor:
    """Return the rows that directions of `als` start from: [k, q] float32, uniform in [0, 1), equal on all devices.

    They are positive because |g| is: a row of random signs would see little of its leading direction.
    """
    bits = random_bits(torch.Size((1, k, q)), torch.zeros(1, dtype=torch.int64, device=device), 0)[0]
    return ((bits >> 8) & 0xFFFFFF).float() * 2.0**-24


# ρ of `als` where none is given: of those that `python -m eval.rerun rules` (AdamW) and `table2-small` (Muon) train,
# the best.
RESIDUAL_WEIGHT = 1.0


class Rows(NamedTuple):
    """The row part B' = (keep · B + gain · X) · unit: [n] float64. X = x Aᵀ (A Aᵀ + damping)⁻¹ fits x to A's rows."""

    keep: Tensor
    gain: Tensor


class Mixture(NamedTuple):
    """The momentum at step t, from the old factors: (m_keep · B + m_gain · X) A + residual · x; [n] float64."""

    m_keep: Tensor
    m_gain: Tensor
    residual: Tensor


def _as_matrix(numbers: Tensor) -> Tensor:
    return numbers[..., None, None]


class Newton:
    """The published rule (Theorem 3.1, Algorithms 1 and 2): one damped Newton step on each factor from the old ones.

    With the coupling of Appendix B.1 each factor decays by √decay and adds (1−√decay)/(1−decay) times its
    least-squares fit of weight·x. ``damping`` is δ, absolute. It starts at B = 0 and A ~ N(0, 0.02²).
    """

    name = "newton"
    tracked = False  # no energy correction of v, no clamp, no residual weight
    projects_new = False  # the step is simultaneous: A's new rows come from the old B, and from BᵀB
    second_momentum_rank = None  # v has the rank of m, as published
    residual_weight = None  # what lies outside the factors has Adam's own weight

    def __init__(self, damping: float = 1e-6, init_std: float = 0.02):
        self.damping = damping
        self.init_std = init_std

    def init_columns(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw A ~ N(0, 0.02²) of shape (k, q), float32 on the CPU."""
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * self.init_std

    def inverse(self, gram: Tensor) -> Tensor:
        """Return (gram + δI)⁻¹, float64."""
        return damped_inverse(gram, self.damping)

    def rows(self, average: Average) -> Rows:
        """Return the row part."""
        root = average.decay.sqrt()
        return Rows(root, average.weight * (1 - root) / (1 - average.decay))

    def mixture(self, average: Average, residual_weight: None, t: Tensor) -> Mixture:
        """Return m = decay · B A + weight · x, whatever the step."""
        return Mixture(average.decay, torch.zeros_like(t), average.weight)

    def unit(self, gram: Tensor, old_square: Tensor, norm: Tensor, rows: Rows) -> Tensor:
        """Return what B' is multiplied by: 1, as nothing rescales it afterwards."""
        return torch.ones_like(norm)

    def columns(self, grams: Tensor, average: Average) -> tuple[Tensor, Tensor | None]:
        """Return W [n, k, 2k] float64 of A' = W [A; Bᵀx], from BᵀB over all rows, and None: nothing multiplies B'."""
        root = average.decay.sqrt()
        identity = torch.eye(grams.shape[-2], dtype=grams.dtype, device=grams.device)
        step = _as_matrix(average.weight * (1 - root) / (1 - average.decay)) * self.inverse(grams)
        return torch.cat([(_as_matrix(root) * identity).expand_as(step), step], dim=-1), None

    def balance(self, grams: Tensor, turn: None, gram_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return 1, 1 and NaN, [n] float64: B' and A' are not rescaled, and ‖B'A'‖²_F is not known."""
        one = grams.new_ones(grams.shape[:-2])
        return one, one, torch.full_like(one, float("nan"))


class Als:
    """The tracked rule (this project): one sweep of alternating least squares on the target decay · B A + weight · x.

    B is solved given A; its columns are made orthonormal by the Cholesky factor of its Gram matrix, which is Q of a QR
    decomposition; A is the target's part in their span, Qᵀ(decay · B A + weight · x); then both are scaled to equal
    Frobenius norms. ``damping`` is relative to the mean diagonal of the Gram matrix, so that scaling all gradients
    scales the factors and changes nothing else.

    Solved for A without the orthonormal columns the product would be the same, but directions grow alike from step to
    step: the condition of B reached 1e3 to 1e5, and float32 and damping were felt (`docs/rules.md`).
    """

    name = "als"
    tracked = True  # v keeps Adam's energy, the normalised update is clamped, directions of zeros start anew
    projects_new = True  # A is solved given the new B: from B'ᵀ [B' | B] and B'ᵀx
    second_momentum_rank = 1  # of v where none is given
    residual_weight = RESIDUAL_WEIGHT

    def __init__(self, damping: float = 1e-6):
        self.damping = damping

    def init_columns(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return zeros: all directions start anew at the first gradient (`restart`)."""
        return torch.zeros(shape, dtype=torch.float32, device="cpu")

    def inverse(self, gram: Tensor) -> Tensor:
        """Return (gram + δ'I)⁻¹, float64."""
        return damped_inverse(gram, self._ridge(gram))

    def _ridge(self, gram: Tensor) -> Tensor:
        return self.damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1)

    def restart(self, A: Tensor, B: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B with all directions started anew whose row of A is zero: a test row in A, zeros in B.

        A state begins as zeros, and resets (ReLoRA) and pruning leave zeros behind. From B = 0 the first sweep is
        one step of subspace iteration on x. A test row is as long as the mean row that is not zero, or has length 1 if
        all are.
        A: [n, k, q], B: [n, p, k], gram: A Aᵀ in float64.
        """
        k, q = A.shape[-2:]
        squares = gram.diagonal(dim1=-2, dim2=-1)
        dead = squares == 0
        level = squares.sum(-1) / (~dead).sum(-1)
        length = (3 / q * torch.where(dead.all(-1), 1.0, level)).sqrt()  # a test row's mean square is 1/3
        rows = test_rows(k, q, A.device) * _as_matrix(length).to(A.dtype).to(A.device)
        dead = dead.to(A.device)
        return torch.where(dead[..., None], rows, A), B.masked_fill(dead[..., None, :], 0)

    def rows(self, average: Average) -> Rows:
        """Return the row part."""
        return Rows(*average)

    def mixture(self, average: Average, residual_weight: Tensor, t: Tensor) -> Mixture:
        """Return the momentum at step t. Bias-corrected, what lies outside A's rows has the weight min(1, ρ/(1−βᵗ)).

        At ρ = 1 it enters as it is, from the first step on; at ρ = 1−β its weight is Adam's own. Stated for an EMA;
        another average is its multiple.
        """
        beta, weight = average
        residual = torch.minimum(1 - beta**t, residual_weight) * (weight / (1 - beta))
        return Mixture(beta, weight - residual, residual)

    def unit(self, gram: Tensor, old_square: Tensor, norm: Tensor, rows: Rows) -> Tensor:
        """Return the factor on B', [n] float64, that makes its norm about 1, so that B'ᵀx stays within float32.

        gram: A Aᵀ [n, k, k] and old_square: ‖A‖²_F before any restart; norm: ‖x‖_F. With a = ‖A‖, ‖B‖² is old_square
        and ‖X‖ ≈ ‖x‖/a; `balance` rescales B'.
        """
        length = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
        size = torch.maximum(rows.keep * old_square.sqrt() * length, rows.gain * norm)
        return length / size.clamp_min(MIN_FACTOR_NORM**2)

    def columns(self, grams: Tensor, average: Average) -> tuple[Tensor, Tensor]:
        """Return W with A' = W [A; B'ᵀx], from B'ᵀ [B' | B] over all rows: [n, k, 2k] float64.

        The second tensor is L⁻ᵀ, by which B' is multiplied from the right: [n, k, k] float64.
        """
        gram, cross = grams.chunk(2, dim=-1)
        root = inverse_root(gram, self._ridge(gram))
        return torch.cat(
            [_as_matrix(average.decay) * (root @ cross), _as_matrix(average.weight) * root], dim=-1
        ), root.mT

    def balance(self, grams: Tensor, turn: Tensor, gram_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what B' and A' are multiplied by for equal Frobenius norms, and ‖B'A'‖²_F then: [n] float64.

        grams: as in `columns`; turn: what that multiplies B' by; gram_A: A' A'ᵀ.
        """
        gram = turn.mT @ grams[..., : gram_A.shape[-1]] @ turn
        norm_B, norm_A = (g.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt() for g in (gram, gram_A))
        common = (norm_B.sqrt() * norm_A.sqrt()).clamp_min(MIN_FACTOR_NORM)
        tiny = torch.finfo(torch.float32).tiny
        scale_B, scale_A = common / norm_B.clamp_min(tiny), common / norm_A.clamp_min(tiny)
        return scale_B, scale_A, (gram * gram_A).sum((-2, -1)) * (scale_B * scale_A).square()


RULES = {rule.name: rule for rule in (Als(), Newton())}
