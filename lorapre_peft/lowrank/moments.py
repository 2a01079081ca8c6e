"""This module handles a factored moment of a batch during one step: it reads the old factors and writes the new ones.

It does the k×k work. A backend does what is larger.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .batch import Batch
from .float64 import reads_are_free, to_float64
from .linalg import gram_rows, new_columns
from .rules import Als, Average, Newton
from .sharding import WHOLE


class Runner(Protocol):
    """Describes a backend, which decides how functions of tensors are called."""

    def run(self, function: Callable, *args: Any) -> Any:
        """Call a function of tensors in the backend's way."""


class Moment:
    """Holds one moment of a batch, B A with B [n, p, k] and A [n, k, q], which follows a running average.

    Attributes:
        B, A: old factors, after any restart.
        gram: A Aᵀ, [n, k, k] float64.
        started: whether A had a direction before any restart, [n] bool.
        R, keep, gain: [n, k, k], [n, 1, 1] and [n, 1, 1], float32, of B' = keep · B + gain · X with X = x Aᵀ R.
        B_new, projected, grams: what a backend's row part fills in: B'; B'ᵀx or Bᵀx [n, k, q]; and, in float64,
            B'ᵀ[B' | B] [n, k, 2k] or BᵀB [n, k, k].
    """

    grams: Tensor

    def __init__(self, backend: Runner, batch: Batch, name: str, average: Average):
        self.batch, self.name, self.average = batch, name, average
        rule = batch.rule
        self.B, self.A = batch.read(f"{name}_B"), batch.read(f"{name}_A")
        self.gram = backend.run(gram_rows, self.A)
        squares = self.gram.diagonal(dim1=-2, dim2=-1)
        old_square = squares.sum(-1)
        # Where the host reads the device for free, the restart is left out if there is nothing to restart.
        if rule.tracked and not (reads_are_free(squares.device) and squares.all()):
            self.A, self.B = cast(Als, rule).restart(self.A, self.B, self.gram)
            self.gram = backend.run(gram_rows, self.A)
        self.started = (old_square > 0).to(batch.device)
        prepared = backend.run(_prepare, rule, self.gram, old_square, batch.norms, average)
        self.R, self.keep, self.gain = (value.to(batch.device) for value in prepared)
        self.B_new, self.projected = torch.empty_like(self.B), torch.zeros_like(self.A)

    def captured(self) -> Tensor:
        """Return ‖X A‖²_F, x's energy in the row space of the old A, over this process's rows and all matrices."""
        X = (to_float64(self.B_new) - to_float64(self.keep * self.B)) / to_float64(self.gain)
        self.batch.mask(slice(None), X)
        return ((X.mT @ X) * self.gram).sum()


def move_on(backend: Runner, batch: Batch, moments: list[Moment]) -> Generator[None, None, list[Tensor]]:
    """Write some moments' new factors into the state, and return ‖B'A'‖²_F of each: [n] float64, NaN if not known.

    Two collectives add up the sums over rows where several processes share the rows. The projections are float32. The
    Gram matrices are float64, so that a Cholesky factorisation sees the same as in a single process. With several
    processes the generator stops once, while the sums travel.
    """
    placement, found = batch.placement, []
    waits = [placement.sum([m.projected for m in moments]), placement.sum([m.grams for m in moments])]
    if placement is not WHOLE:
        yield
    for wait in waits:
        wait()
    for m in moments:
        W, root_T = backend.run(_columns, batch.rule, m.grams, m.average)
        A_new, gram_A = backend.run(new_columns, W, m.A, m.projected)
        by_B, by_A, squared_norm = backend.run(_balance, batch.rule, m.grams, root_T, gram_A)
        by_B, by_A = by_B.to(batch.device), by_A.to(A_new.device)
        batch.save(f"{m.name}_B", m.B_new * by_B if root_T is None else m.B_new @ by_B)
        batch.save(f"{m.name}_A", A_new * by_A)
        found.append(squared_norm)
    return found


def _prepare(
    rule: Als | Newton, gram: Tensor, old_square: Tensor, norms: Tensor, average: Average
) -> tuple[Tensor, Tensor, Tensor]:
    """Return R = (A Aᵀ + damping)⁻¹ and, as [n, 1, 1], keep and gain of B', all float32."""
    rows = rule.rows(Average(*average))
    unit = rule.unit(gram, old_square, norms, rows)
    keep, gain = ((number * unit).float()[..., None, None] for number in rows)
    return rule.inverse(gram).float(), keep, gain


def _columns(rule: Als | Newton, grams: Tensor, average: Average) -> tuple[Tensor, Any]:
    return rule.columns(grams, Average(*average))


def _balance(rule: Als | Newton, grams: Tensor, root_T: Any, gram_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors on B' ([n, 1, 1], or [n, k, k] from the right) and on A' ([n, 1, 1]), and ‖B'A'‖²_F [n]."""
    scale_B, scale_A, squared_norm = rule.balance(grams, root_T, gram_A)
    scale_B, most = scale_B[..., None, None], torch.finfo(torch.float32).max
    by_B = scale_B if root_T is None else (scale_B * root_T).clamp(-most, most)  # L⁻ᵀ of a zero B is huge.
    return by_B.float(), scale_A.float()[..., None, None], squared_norm
