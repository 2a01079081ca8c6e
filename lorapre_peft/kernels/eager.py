"""The row part of a step in tensor operations, eager or compiled: the interface of all backends, and what each of them falls back on.

A backend does what is larger than k×k. It reads a bucket's gradients and old factors (`moments.Factors`), writes the parameters, and
leaves what the rule's column part needs: B_new, projected and grams. It knows neither the rule nor where rows live.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lowrank.batch import TEMPORARIES, Wave
from ..lowrank.float64 import narrow, wide
from ..lowrank.metrics import Metrics
from ..lowrank.rules import Mixture, gram_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..lowrank.moments import Factors

# A product of inner size k is bound by memory: up to here the compiler writes it out inside the pass that uses it.
UNROLLED = 4


# Rows of the table of numbers that Adam's row part takes for each matrix, [len(TABLE), N] float32. Bias corrections and v's energy are
# inside: m/(√v + ε) becomes ((c_B B_m + c_X X_m) A_m + residual · g) / (√((v_scale v_B v_A)² + g²) + eps).
TABLE = (
    "g_scale",
    "m_keep",
    "m_gain",
    "v_keep",
    "v_gain",
    "c_B",
    "c_X",
    "residual",
    "v_scale",
    "eps",
    "step",
    "decay",
    "updates",
)


def adam_scalars(m: Mixture, t: Tensor, c: Tensor, beta1: float, beta2: float, eps: float) -> Tensor:
    """Five rows of the table, c_B to eps, [5, N] float32.

    From the mixture of m, the counts t and what (v_B v_A)² is multiplied by: all [N] float64.
    """
    # √v̂ = root · √(β2/(1−β2) c (v_B v_A)² + g²): what is common is divided out of the momentum and of ε.
    root = ((1 - beta2) / (1 - beta2**t)).sqrt()
    scale = 1 / ((1 - beta1**t) * root)
    numbers = m.m_keep * scale, m.m_gain * scale, m.residual * scale, (c * (beta2 / (1 - beta2))).sqrt(), eps / root
    return torch.stack(numbers).float()


def adam_table(wave: Wave, keep: Tensor, gain: Tensor, scalars: Tensor) -> Tensor:
    """The whole table. keep, gain: [2, N, 1, 1]; scalars: of `adam_scalars`."""
    group, one = wave.group, torch.ones_like(scalars[0])
    lr = group["lr"].to(one.device).reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
    coefficients = torch.stack([keep, gain], 1).flatten(0, 1)[..., 0, 0]  # of m, then of v
    scale = one if wave.scale is None else wave.scale
    updates = one if wave.finite is None else wave.finite.float()
    rest = [one * lr * group["update_scale"], one * lr * group["weight_decay"], updates]
    return torch.cat([scale[None], coefficients, scalars, torch.stack(rest)])


# ---- tiles, eager or compiled ---------------------------------------------------------------------------------------


def _unrolls(k: int) -> bool:
    return torch.compiler.is_compiling() and k <= UNROLLED


def _outer(B: Tensor, A: Tensor) -> Tensor:
    """B A"""
    if not _unrolls(B.shape[-1]):
        return B @ A
    return sum(B[..., i, None] * A[..., i, None, :] for i in range(B.shape[-1]))


def _times_transposed(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ"""
    if not _unrolls(A.shape[-2]):
        return x @ A.mT
    return torch.stack([(x * A[..., i, None, :]).sum(-1) for i in range(A.shape[-2])], -1)


def _transposed_times(B: Tensor, x: Tensor) -> Tensor:
    """Bᵀ x"""
    if not _unrolls(B.shape[-1]):
        return B.mT @ x
    return torch.stack([(B[..., i, None] * x).sum(-2) for i in range(B.shape[-1])], -2)


def follow_rows(
    x: Tensor, B: Tensor, A: Tensor, R: Tensor, keep: Tensor, gain: Tensor, projects_new: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """X = x Aᵀ R, B' = keep · B + gain · X, and B'ᵀx (or Bᵀx). x: [n, rows, q]; keep, gain: [n, 1, 1]."""
    X = _times_transposed(x, A) @ R
    B_new = keep * B + gain * X
    return X, B_new, _transposed_times(B_new if projects_new else B, x)


def adam_rows(
    g: Tensor,
    m: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
    scalars: Tensor,
    projects_new: bool,
) -> tuple[Tensor, ...]:
    """The normalised update of a tile before any clamp, then B_new and projected of m and of v.

    g: [n, rows, q] float32. m, v: what `follow_rows` takes after x. scalars: as `adam_scalars` gives them, [5, n].
    """
    c_B, c_X, residual, v_scale, eps = scalars[..., None, None].unbind()
    size = g.abs()
    _, v_B_new, v_projected = follow_rows(size, *v, projects_new)
    X, m_B_new, m_projected = follow_rows(g, *m, projects_new)
    update = _outer(c_B * m[0] + c_X * X, m[1]).addcmul_(g, residual)
    root = _outer(v_scale * v[0], v[1]).square_().addcmul_(g, g).sqrt_().add_(eps)
    return update.div_(root), m_B_new, m_projected, v_B_new, v_projected


def momentum_rows(
    g: Tensor, m: tuple[Tensor, ...], rows: tuple[Tensor, Tensor, Tensor], projects_new: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The momentum (c_B B + c_X X) A + residual · g of a tile, then B_new and projected. rows: c_B, c_X, residual."""
    c_B, c_X, residual = rows
    X, B_new, projected = follow_rows(g, *m, projects_new)
    return _outer(c_B * m[0] + c_X * X, m[1]).addcmul_(g, residual), B_new, projected


def gram_columns(B: Tensor, B_new: Tensor, projects_new: bool) -> Tensor:
    """B'ᵀ[B' | B] or BᵀB in float64; [..., p, k]."""
    B = wide(B)
    if not projects_new:
        return B.mT @ B
    B_new = wide(B_new)
    return torch.cat([B_new.mT @ B_new, B_new.mT @ B], -1)


def new_columns(W: Tensor, A: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """A' = W [A; projected] and A' A'ᵀ, both float64. W: [..., k, 2k] float64."""
    A_new = W @ wide(torch.cat([A, projected], -2))
    return A_new, A_new @ A_new.mT


class Eager:
    """Batched tensor operations, tile by tile."""

    # Float32 temporaries of the size of a wave's factors that a step holds at once, at most.
    factor_temporaries = TEMPORARIES

    def run(self, function: Callable, *args: Any) -> Any:
        """A function of tensors, computed the way of this backend."""
        return function(*args)

    def norms(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """‖x‖_F of tensors of one dtype, accumulated in ``dtype``: [n] float64."""
        return wide(torch.stack(torch._foreach_norm(tensors, 2, dtype)))

    def gram(self, A: Tensor) -> Tensor:
        """A Aᵀ of [s, n, k, q] in float64."""
        return self.run(gram_rows, A)

    def columns(self, W: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
        """A' = W [A; projected] and A' A'ᵀ [s, n, k, k] float64. W: [s, n, k, 2k] float64."""
        return self.run(new_columns, W, factors.A, factors.projected)

    @staticmethod
    def _operands(factors: Factors, moment: int, matrices: slice, rows: slice) -> tuple[Tensor, ...]:
        others = (factors.A, factors.R, factors.keep, factors.gain)
        return (factors.B[moment, matrices, rows], *(value[moment, matrices] for value in others))

    @staticmethod
    def _take(factors: Factors, moment: int, matrices: slice, rows: slice, B_new: Tensor, projected: Tensor) -> None:
        factors.B_new[moment, matrices, rows] = B_new
        factors.projected[moment, matrices] += projected

    def finish_rows(self, factors: Factors) -> None:
        """The Gram matrices of a bucket's rows, old and new."""
        projects_new = factors.bucket.wave.rule.projects_new
        factors.grams = self.run(gram_columns, factors.B, factors.B_new, projects_new)

    def adam(self, factors: Factors, table: Tensor, bound: float | None, metrics: Metrics | None) -> None:
        """Adam's row part: writes a bucket's parameters, fills its factors. bound: the clamp of the normalised update.

        table: [len(TABLE), n].
        """
        bucket = factors.bucket
        scalars = table[TABLE.index("c_B") : TABLE.index("eps") + 1]
        for matrices, rows in bucket.tiles():
            update, m_B, m_projected, v_B, v_projected = self.run(
                adam_rows,
                bucket.gradients(matrices, rows),
                self._operands(factors, 0, matrices, rows),
                self._operands(factors, 1, matrices, rows),
                scalars[:, matrices],
                bucket.wave.rule.projects_new,
            )
            self._take(factors, 0, matrices, rows, m_B, m_projected)
            self._take(factors, 1, matrices, rows, v_B, v_projected)
            bucket.mask(matrices, update)
            if metrics is not None:
                metrics.add_update(update, bound)
            if bound is not None:
                update.clamp_(-bound, bound)
            bucket.write(matrices, rows, update)
        self.finish_rows(factors)

    def momentum(self, factors: Factors, matrices: slice, g: Tensor, m: Mixture) -> Tensor:
        """Muon's row part of some matrices, g [n, rows, q]: their momenta; fills their factors, up to `finish_rows`.

        m: of all matrices of the wave.
        """
        rows = factors.bucket.all_rows
        scalars = tuple(narrow(value[factors.bucket.part][matrices], g.device)[:, None, None] for value in m)
        projects_new = factors.bucket.wave.rule.projects_new
        operands = self._operands(factors, 0, matrices, rows)
        update, B_new, projected = self.run(momentum_rows, g, operands, scalars, projects_new)
        self._take(factors, 0, matrices, rows, B_new, projected)
        return update


class Compiled(Eager):
    """The same functions through `torch.compile`, for any shape, so that few are compiled: one per rank k, and for a single matrix."""

    def __init__(self):
        self._compiled = functools.cache(functools.partial(torch.compile, dynamic=True, fullgraph=True))

    def run(self, function: Callable, *args: Any) -> Any:
        # Each rank and rule is a graph of its own; torch's default of 8 per function is meant to catch leaks.
        with torch._dynamo.config.patch(recompile_limit=64):
            return self._compiled(function)(*_without_bases(args))


def _without_bases(args: tuple) -> tuple:
    """The same tensors, not known as views: torch.compile makes a graph for every shape of what a tensor is a view of."""
    return tuple(
        _without_bases(arg) if type(arg) is tuple else arg.detach() if isinstance(arg, Tensor) else arg for arg in args
    )
