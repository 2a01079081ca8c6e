"""This module computes the row part of a step with tensor operations, eager or compiled.

It defines the interface of all backends, and each of them falls back on it. The row part is what is larger than k×k.
It reads a batch's gradients and the old factors of its moments (`lowrank.moments.Moment`), writes the parameters, and
fills in what the rule's column part needs: B_new, projected and grams. It knows neither the rule nor on which process
rows are. The C++ and Triton backends take the whole step where they can (`table.WholeStep`), and have both rules in
their own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..lowrank.batch import Batch
from ..lowrank.float64 import to_float32, to_float64
from ..lowrank.metrics import Metrics
from ..lowrank.moments import Moment
from ..lowrank.rules import Mixture

# These are what `follow_rows` takes of a moment after x: B, A, R, keep and gain.
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# A product of small inner size k is bound by memory. Up to this k it is written out as a sum, which the compiler
# merges into the pass that uses it.
UNROLLED = 4

# Adam's row part takes these numbers of each matrix, as the rows of a table [len(COEFFICIENTS), n] float32. They
# include the bias corrections and the energy of v. The update m/(√v + ε) is u = ((c_B m_B + c_X m_X) m_A +
# residual · g) / (√((v_scale v_B v_A)² + g²) + eps), and the weight becomes θ ← θ − (step · u + decay · θ) where
# ``updates`` is 1.
COEFFICIENTS = (
    *("g_scale", "m_keep", "m_gain", "v_keep", "v_gain", "c_B", "c_X"),
    *("residual", "v_scale", "eps", "step", "decay", "updates"),
)


def adam_scalars(
    m: Mixture, t: Tensor, c: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the rows c_B, c_X, residual, v_scale and eps of the table, [n] float64 like all arguments.

    m: the mixture of the first moment. t: the counts of the bias corrections. c: the factor on (v_B v_A)².
    """
    c_B, c_X, residual = m
    # With √v̂ = root · √(β2/(1−β2) c (v_B v_A)² + g²), the root is divided out of the momentum and of ε.
    root = ((1 - beta2) / (1 - beta2**t)).sqrt()
    scale = 1 / ((1 - beta1**t) * root)
    return c_B * scale, c_X * scale, residual * scale, (c * (beta2 / (1 - beta2))).sqrt(), eps / root


def adam_table(batch: Batch, m: Moment, v: Moment, scalars: tuple[Tensor, ...]) -> Tensor:
    """Return the whole table. scalars: what `adam_scalars` returns."""
    step, decay = batch.steps()
    one = torch.ones_like(step)
    rows = dict(
        g_scale=one if batch.scale is None else batch.scale,
        **{"m_keep": m.keep, "m_gain": m.gain, "v_keep": v.keep, "v_gain": v.gain},
        **dict(zip(("c_B", "c_X", "residual", "v_scale", "eps"), (to_float32(x, batch.device) for x in scalars))),
        step=step,
        decay=0 * one if decay is None else decay,
        updates=one if batch.update is None else batch.update.float(),
    )
    return torch.stack([rows[name].reshape(-1) for name in COEFFICIENTS])


# ---- tiles, eager or compiled ---------------------------------------------------------------------------------------


def _unrolls(k: int) -> bool:
    return torch.compiler.is_compiling() and k <= UNROLLED


def _outer(B: Tensor, A: Tensor) -> Tensor:
    """Return B A."""
    if not _unrolls(B.shape[-1]):
        return B @ A
    product: Any = sum(B[..., i, None] * A[..., i, None, :] for i in range(B.shape[-1]))
    return product


def _times_transposed(x: Tensor, A: Tensor) -> Tensor:
    """Return x Aᵀ."""
    if not _unrolls(A.shape[-2]):
        return x @ A.mT
    return torch.stack([(x * A[..., i, None, :]).sum(-1) for i in range(A.shape[-2])], -1)


def _transposed_times(B: Tensor, x: Tensor) -> Tensor:
    """Return Bᵀ x."""
    if not _unrolls(B.shape[-1]):
        return B.mT @ x
    return torch.stack([(B[..., i, None] * x).sum(-2) for i in range(B.shape[-1])], -2)


def follow_rows(
    x: Tensor, B: Tensor, A: Tensor, R: Tensor, keep: Tensor, gain: Tensor, projects_new: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return X = x Aᵀ R, B' = keep · B + gain · X, and B'ᵀx (or Bᵀx). x: [n, rows, q]; keep, gain: [n, 1, 1]."""
    X = _times_transposed(x, A) @ R
    B_new = keep * B + gain * X
    return X, B_new, _transposed_times(B_new if projects_new else B, x)


def adam_rows(
    g: Tensor,
    m: Operands,
    v: Operands,
    scalars: Tensor,
    projects_new: bool,
) -> tuple[Tensor, ...]:
    """Return the normalised update of a tile before any clamp, and then B_new and projected of m and of v.

    g: [n, rows, q] float32. m, v: what `follow_rows` takes after x. scalars: the table's rows c_B to eps, [5, n].
    """
    c_B, c_X, residual, v_scale, eps = scalars[..., None, None].unbind()
    size = g.abs()
    _, v_B_new, v_projected = follow_rows(size, *v, projects_new)
    X, m_B_new, m_projected = follow_rows(g, *m, projects_new)
    update = _outer(c_B * m[0] + c_X * X, m[1]).addcmul_(g, residual)
    root = _outer(v_scale * v[0], v[1]).square_().addcmul_(g, g).sqrt_().add_(eps)
    return update.div_(root), m_B_new, m_projected, v_B_new, v_projected


def momentum_rows(
    g: Tensor, m: Operands, mixture: tuple[Tensor, Tensor, Tensor], projects_new: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the momentum (c_B B + c_X X) A + residual · g of a tile, and then B_new and projected.

    mixture: c_B, c_X and residual, [n, 1, 1] each.
    """
    c_B, c_X, residual = mixture
    X, B_new, projected = follow_rows(g, *m, projects_new)
    return _outer(c_B * m[0] + c_X * X, m[1]).addcmul_(g, residual), B_new, projected


def gram_columns(B: Tensor, B_new: Tensor, projects_new: bool) -> Tensor:
    """Return B'ᵀ[B' | B] or BᵀB in float64. B, B_new: [..., p, k]."""
    B = to_float64(B)
    if not projects_new:
        return B.mT @ B
    B_new = to_float64(B_new)
    return torch.cat([B_new.mT @ B_new, B_new.mT @ B], -1)


class Eager:
    """Computes a step with batched tensor operations, tile by tile."""

    def run(self, function: Callable, *args: Any) -> Any:
        """Call a function of tensors in this backend's way."""
        return function(*args)

    def norms(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Return ‖x‖_F of tensors of one dtype, accumulated in ``dtype``: [n] float64."""
        return to_float64(torch.stack(torch._foreach_norm(tensors, 2, dtype)))

    def adam(
        self, batch: Batch, m: Moment, v: Moment, table: Tensor, bound: Tensor | None, metrics: Metrics | None
    ) -> None:
        """Compute Adam's row part: write the parameters, and fill in what `move_on` needs of both moments.

        table: [len(COEFFICIENTS), n]. bound: the bound at which the normalised update is clamped, [n] float32, or
        None.
        """
        scalars = table[COEFFICIENTS.index("c_B") : COEFFICIENTS.index("eps") + 1]
        step = table[COEFFICIENTS.index("step")]
        decay = table[COEFFICIENTS.index("decay")] if batch.decays else None
        for matrices, rows in batch.tiles():
            update, m_B, m_projected, v_B, v_projected = self.run(
                adam_rows,
                batch.gradients(matrices, rows),
                _operands(m, matrices, rows),
                _operands(v, matrices, rows),
                scalars[:, matrices],
                batch.rule.projects_new,
            )
            _fill(m, matrices, rows, m_B, m_projected)
            _fill(v, matrices, rows, v_B, v_projected)
            batch.mask(matrices, update)
            limit = None if bound is None else bound[matrices, None, None]
            if metrics is not None:
                metrics.add_update(update, limit)
            if limit is not None:
                update.clamp_(-limit, limit)
            batch.write(matrices, rows, update, step, decay)
        self.finish_rows(m)
        self.finish_rows(v)

    def momentum(self, m: Moment, matrices: slice, g: Tensor, mixture: Mixture) -> Tensor:
        """Compute Muon's row part: return the momenta of some matrices, and fill in what `finish_rows` needs.

        g: the gradients of these matrices, [n, rows, q]. mixture: the mixture of all matrices of the batch.
        """
        rows = m.batch.all_rows
        numbers = tuple(to_float32(value[matrices], g.device)[:, None, None] for value in mixture)
        operands = _operands(m, matrices, rows)
        update, B_new, projected = self.run(momentum_rows, g, operands, numbers, m.batch.rule.projects_new)
        _fill(m, matrices, rows, B_new, projected)
        return update

    def finish_rows(self, m: Moment) -> None:
        """Fill in the Gram matrices of the old and the new rows."""
        m.grams = self.run(gram_columns, m.B, m.B_new, m.batch.rule.projects_new)


def _operands(m: Moment, matrices: slice, rows: slice) -> Operands:
    return m.B[matrices, rows], m.A[matrices], m.R[matrices], m.keep[matrices], m.gain[matrices]


def _fill(m: Moment, matrices: slice, rows: slice, B_new: Tensor, projected: Tensor) -> None:
    m.B_new[matrices, rows] = B_new
    m.projected[matrices] += projected


class Compiled(Eager):
    """Calls the same functions through `torch.compile`.

    They are compiled for any shape, so that there are few of them: one for each rank k, and one for a single matrix.
    """

    def __init__(self) -> None:
        self._compiled = functools.cache(functools.partial(torch.compile, dynamic=True, fullgraph=True))

    def run(self, function: Callable, *args: Any) -> Any:
        # Each rank and rule has a graph of its own. Torch's limit of 8 for each function is meant to catch leaks.
        with torch._dynamo.config.patch(recompile_limit=64):
            return self._compiled(function)(*_without_bases(args))


def _without_bases(args: tuple) -> tuple:
    """Return the same tensors, but such that torch.compile does not know them as views.

    Otherwise it would make a graph for every shape of the tensor that an argument is a view of.
    """
    return tuple(
        _without_bases(arg) if isinstance(arg, tuple) else arg.detach() if isinstance(arg, Tensor) else arg
        for arg in args
    )
