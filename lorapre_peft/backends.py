"""How the row part of a step is computed: one interface, several backends, the same results to float32 round-off.

A backend reads a bucket's gradients and its moments' old factors (`bucket.Moment`), writes the parameters, and leaves in each
moment what the rule's column part needs: B_new and projected. It knows neither the rule nor where rows live.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .bucket import Bucket, Metrics, Moment

if TYPE_CHECKING:
    from collections.abc import Callable

# A product of inner size k is bound by memory: up to here the compiler writes it out inside the pass that uses it.
UNROLLED = 4


class AdamScalars(NamedTuple):
    """The numbers of Adam's row part, each [n, 1, 1] float32 on the device; bias corrections and v's energy are inside.

    m/(√v + ε) becomes ((c_B B_m + c_X X_m) A_m + residual · g) / (√((s v_B v_A)² + g²) + eps): s is v_scale.
    """

    c_B: Tensor
    c_X: Tensor
    residual: Tensor
    v_scale: Tensor
    eps: Tensor


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
    scalars: tuple[Tensor, ...],
    projects_new: bool,
) -> tuple[Tensor, ...]:
    """The normalised update of a tile before any clamp, then B_new and projected of m and of v.

    g: [n, rows, q] float32. m, v: what `follow_rows` takes after x. scalars: `AdamScalars`.
    """
    c_B, c_X, residual, v_scale, eps = scalars
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


class Eager:
    """Batched tensor operations, tile by tile; ``transform`` may compile a tile's function."""

    def __init__(self, transform: Callable = lambda function: function):
        self._adam_rows = transform(adam_rows)
        self._momentum_rows = transform(momentum_rows)

    @staticmethod
    def _operands(moment: Moment, matrices: slice, rows: slice) -> tuple[Tensor, ...]:
        return (
            moment.B[matrices, rows],
            moment.A[matrices],
            moment.R[matrices],
            moment.keep[matrices],
            moment.gain[matrices],
        )

    @staticmethod
    def _take(moment: Moment, matrices: slice, rows: slice, B_new: Tensor, projected: Tensor) -> None:
        moment.B_new[matrices, rows] = B_new
        moment.projected[matrices] += projected

    def adam(
        self, bucket: Bucket, m: Moment, v: Moment, scalars: AdamScalars, bound: float | None, metrics: Metrics | None
    ) -> None:
        """Adam's row part: writes the parameters, fills both moments. bound: the clamp of the normalised update."""
        for matrices, rows in bucket.tiles():
            update, m_B, m_projected, v_B, v_projected = self._adam_rows(
                bucket.gradients(matrices, rows),
                self._operands(m, matrices, rows),
                self._operands(v, matrices, rows),
                tuple(scalar[matrices] for scalar in scalars),
                bucket.rule.projects_new,
            )
            self._take(m, matrices, rows, m_B, m_projected)
            self._take(v, matrices, rows, v_B, v_projected)
            bucket.mask(matrices, update)
            if metrics is not None:
                metrics.add_update(update, bound)
            if bound is not None:
                update.clamp_(-bound, bound)
            bucket.write(matrices, rows, update)

    def momentum(self, bucket: Bucket, g: Tensor, m: Moment) -> Tensor:
        """Muon's row part on whole matrices g [n, p, q]: the momentum, and m filled."""
        everything = slice(0, len(bucket.params)), slice(0, bucket.shape[0])
        row = tuple(torch.full((1, 1, 1), c, device=g.device) for c in m.rows[2:])
        update, B_new, projected = self._momentum_rows(
            g, self._operands(m, *everything), row, bucket.rule.projects_new
        )
        self._take(m, *everything, B_new, projected)
        return update


# ---- the choice -----------------------------------------------------------------------------------------------------


def _compile(function: Callable) -> Callable:
    """`torch.compile` for any shape, so that few of them are compiled: one per rank k, and for a single matrix or row."""
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*args):
        # Each rank and rule is a graph of its own; torch's default of 8 per function is meant to catch leaks.
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(*_without_bases(args))

    return call


def _without_bases(args: tuple) -> tuple:
    """The same tensors, not known as views: torch.compile makes a graph for every shape of what a tensor is a view of."""
    return tuple(
        _without_bases(arg) if isinstance(arg, tuple) else arg.detach() if isinstance(arg, Tensor) else arg
        for arg in args
    )


def _compiled_needs(device: torch.device) -> str | None:
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return "a C++ compiler (g++ or clang++) on the PATH"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    return None


def _triton_needs(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton: pip install 'lorapre-peft[triton]'"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"a CUDA device, found {device} (TRITON_INTERPRET=1 runs its kernels on a CPU, for tests)"
    return None


def _load_triton() -> Any:
    from .triton_backend import Triton

    return Triton()


# name → (what it lacks on a device, or None; what makes it). The first that lacks nothing is "auto" on a GPU.
_BACKENDS: dict[str, tuple[Callable[[torch.device], str | None], Callable[[], Any]]] = {
    "triton": (_triton_needs, _load_triton),
    "eager": (lambda device: None, Eager),
    "compiled": (_compiled_needs, lambda: Eager(_compile)),
}
NAMES = ("auto", *_BACKENDS)


def available(device: torch.device | str) -> list[str]:
    """The backends that can run on a device, the one that "auto" takes there first."""
    device = torch.device(device)
    return [name for name, (lacks, _) in _BACKENDS.items() if lacks(device) is None]


@functools.cache
def _made(name: str) -> Any:
    return _BACKENDS[name][1]()


def choose(name: str, device: torch.device) -> Any:
    """The backend for tensors on a device. ValueError if ``name`` cannot run there; "auto": the first of `available`."""
    if name == "auto":
        return _made("eager" if device.type != "cuda" else available(device)[0])
    missing = _BACKENDS[name][0](device)
    if missing is not None:
        raise ValueError(f"backend={name!r} needs {missing}. Use backend='auto', or one of {available(device)}")
    return _made(name)
