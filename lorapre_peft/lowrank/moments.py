"""The factored moments of a wave during one step: read from the old factors, then moved on.

What is k×k is done here, for all moments and matrices of a wave at once; what is larger, a backend does bucket by bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..optim.gradients import reads_are_free
from .batch import Bucket, Wave
from .float64 import wide
from .rules import Als, Average, Mixture, Newton
from .sharding import WHOLE

if TYPE_CHECKING:
    from ..kernels.eager import Eager


@functools.lru_cache(maxsize=64)
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 [s, 1]; made once by filling, as a copy from the host could not be captured in a CUDA graph."""
    return torch.stack([torch.full((1,), value, dtype=torch.float64, device=device) for value in values])


def prepare(
    rule: Als | Newton, grams: Tensor, old_squares: Tensor, norms: Tensor, keep: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of A Aᵀ [s, N, k, k], ‖A‖²_F before any restart [s, N] and ‖x‖_F [N]: R = (A Aᵀ + damping)⁻¹, and keep and gain of B' [s, N, 1, 1].

    All float32.
    """
    unit = rule.unit(grams, old_squares, norms, keep, gain)
    return rule.inverse(grams).float(), (keep * unit).float()[..., None, None], (gain * unit).float()[..., None, None]


def columns(rule: Als | Newton, grams: Tensor, decay: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """`rule.columns` for averages [s, 1]."""
    return rule.columns(grams, decay[..., None, None], weight[..., None, None])


def balance(rule: Als | Newton, grams: Tensor, turn: Tensor | None, gram_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rule.balance`, with what B' is multiplied by as a number or a matrix, [s, N, 1, 1] or [s, N, k, k], and A' [s, N, 1, 1]; float32."""
    scale_B, scale_A, squared_norm = rule.balance(grams, turn, gram_A)
    scale_B, most = scale_B[..., None, None], torch.finfo(torch.float32).max
    by_B = scale_B if turn is None else (scale_B * turn).clamp(-most, most)  # of a B that is zero
    return by_B.float(), scale_A.float()[..., None, None], squared_norm


class Factors:
    """The s moments of a bucket's n matrices in one step.

    B [s, n, p, k] and A [s, n, k, q] are the old factors, after any restart, and old_square [s, n] is ‖A‖²_F before it; gram = A Aᵀ
    [s, n, k, k] float64, R = (gram + damping)⁻¹; B' = keep · B + gain · X with keep and gain [s, n, 1, 1]. A backend's row part fills B_new, projected = B'ᵀx or Bᵀx [s, n, k, q], and grams,
    float64: B'ᵀ[B' | B] [s, n, k, 2k] or BᵀB [s, n, k, k].
    """

    R: Tensor
    keep: Tensor
    gain: Tensor
    grams: Tensor

    def __init__(self, backend: Eager, bucket: Bucket, count: int):
        self.bucket = bucket
        self.B = bucket.B.values.unflatten(0, (count, -1))
        self.A = bucket.A.values.unflatten(0, (count, -1))
        self.gram = backend.gram(self.A)
        squares = self.gram.diagonal(dim1=-2, dim2=-1)
        self.old_square = squares.sum(-1)
        # Where reading is free, only if there is something to restart.
        if bucket.wave.rule.tracked and not (reads_are_free(squares.device) and squares.all()):
            self.A, self.B = bucket.wave.rule.restart(self.A, self.B, self.gram)
            self.gram = backend.gram(self.A)
        self.B_new = torch.empty_like(self.B)
        self.projected = torch.zeros_like(self.A)

    def captured(self) -> Tensor:
        """‖X A‖²_F of the first moment's rows that are here, over all matrices: what x has inside the row space of the old A."""
        X = (wide(self.B_new[0]) - wide(self.keep[0] * self.B[0])) / wide(self.gain[0])
        self.bucket.mask(slice(None), X)
        return ((X.mT @ X) * self.gram[0]).sum()


class Moments:
    """All factored moments of a wave: averages, one per moment. Iterating gives the `Factors` of its buckets."""

    def __init__(self, backend: Eager, wave: Wave, averages: list[Average]):
        self.backend, self.wave, self.averages = backend, wave, averages
        rows = [wave.rule.rows(average) for average in averages]
        self._factors = [Factors(backend, bucket, len(averages)) for bucket in wave.buckets]
        keep, gain = (self._constants([getattr(row, name) for row in rows]) for name in ("keep", "gain"))
        gram = torch.cat([part.gram for part in self._factors], 1)
        old_square = torch.cat([part.old_square for part in self._factors], 1)  # of m and v: [s, N]
        self.started = (old_square[0] > 0).to(wave.device)  # [N]: whether m has a direction
        prepared = backend.run(prepare, wave.rule, gram, old_square, wave.norms, keep, gain)
        R, self.keep, self.gain = (value.to(wave.device) for value in prepared)
        for part in self._factors:
            part.R, part.keep, part.gain = (value[:, part.bucket.part] for value in (R, self.keep, self.gain))

    def mixture(self, t: Tensor) -> Mixture:
        """Of the first moment, the only one that is needed whole, at its steps t: [N] float64."""
        return self.wave.rule.mixture(self.averages[0], self.wave.group["residual_weight"], t)

    def _constants(self, values: list[float]) -> Tensor:
        return constants(tuple(values), self.wave.norms.device)

    def __iter__(self):
        return iter(self._factors)

    def finish(self) -> Generator[None, None, Tensor]:
        """Write the new factors; their ‖B'A'‖²_F as the rule knows it, [s, N] float64.

        The sums over rows are added up over the processes that share them in two collectives: the projections are float32, the Gram
        matrices float64, so that a Cholesky factorisation sees what a single process's would. Stops once, while they travel;
        without such processes not at all.
        """
        wave, rule, run = self.wave, self.wave.rule, self.backend.run
        grams = torch.cat([part.grams for part in self], 1)
        waits = [wave.placement.sum([part.projected for part in self]), wave.placement.sum([grams])]
        if wave.placement is not WHOLE:
            yield
        for wait in waits:
            wait()
        decay, weight = (self._constants([getattr(average, n) for average in self.averages]) for n in Average._fields)
        W, turn = run(columns, rule, grams, decay, weight)
        new = [self.backend.columns(W[:, part.bucket.part], part) for part in self]
        gram_A = torch.cat([gram for _, gram in new], 1)
        by_B, by_A, squared_norm = run(balance, rule, grams, turn, gram_A)
        for part, (A_new, _) in zip(self, new):
            bucket, matrices = part.bucket, part.bucket.part
            own = by_B[:, matrices].to(wave.device)
            if turn is None:
                bucket.B.write(part.B_new, bucket.finite, scale=own)
            else:
                bucket.B.write(part.B_new @ own, bucket.finite)
            bucket.A.write(A_new, bucket.finite, scale=by_A[:, matrices])
        return squared_norm
