"""Adam's row part in C++ for CPUs, for all matrices of a bucket in one call: `cpp_kernels.cpp`, compiled on first use.

The compiled library is kept in ``$XDG_CACHE_HOME/lorapre_peft`` (default ``~/.cache/lorapre_peft``), under a name that source, compiler,
flags and the CPU's vector instructions decide. It needs no header or library of PyTorch's. Beside the tensors that the other backends
have too, each thread holds about 4k(q + 4) float32 numbers of its own, outside ``temporary_bytes``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from array import array
from pathlib import Path

import torch
from torch import Tensor

from .bucket import rounds_stochastically, slices, tile_entries
from .eager import Eager
from .metrics import Metrics
from .moments import Factors
from .rounding import round_keys

SOURCE = Path(__file__).with_name("cpp_kernels.cpp")
HEADER = SOURCE.with_name("cpp_blocks.h")
# Without errno and traps the compiler may use vector instructions for √ and comparisons; sums keep the order they are written in.
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
# By what PyTorch calls the CPU's capability; any other one gets the compiler's own default.
_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-DLANES=16"),
    "AVX2": ("-mavx2", "-mfma", "-DLANES=8"),
}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
# Entries of a matrix above which its rows are split among threads, and the most parts.
SPLIT_ENTRIES = 1 << 18
MAX_SPLITS = 16


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, g++ or clang++; None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises RuntimeError with the compiler's output, or the loader's, if it fails."""
    command = [str(compiler()), *_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]
    name = hashlib.sha256(SOURCE.read_bytes() + HEADER.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorapre_peft"
    path = cache / f"kernels-{name}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:  # renamed when whole: others may compile it too
                made = Path(folder) / path.name
                subprocess.run([*command, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True)
                made.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise RuntimeError(
            f"the C++ kernels could not be compiled to {path} and loaded, with {' '.join(command)}: {said[-2000:]}"
        ) from error


class Adam(ctypes.Structure):
    """The arguments of the kernel ``adam``, in its order."""

    _fields_ = [(name, ctypes.c_int64) for name in ("n", "p", "q", "k", "splits", "first_row")] + [
        (name, ctypes.c_void_p)
        for name in [
            "grads",
            "params",
            "B",
            "A",
            "R",
            "B_new",
            "projected",
            "grams",
            "table",
            "keys",
            "largest",
            "clamped",
        ]
    ]
    _fields_ += [("bound", ctypes.c_float)]
    _fields_ += [(name, ctypes.c_int32) for name in ("grad_type", "param_type", "projects_new", "threads")]


class Cpp(Eager):
    """The kernels' calls. Weights or gradients that are neither float32 nor bfloat16, and mixed gradients, take the eager path."""

    factor_temporaries = 4

    def __init__(self):
        made, size, whole = library(), ctypes.c_int64, ctypes.c_int32
        self._adam, self._norms, self._gram, self._columns = made.adam, made.norms, made.gram, made.columns
        self._adam.argtypes = [ctypes.POINTER(Adam)]
        self._norms.argtypes = [ctypes.c_void_p, ctypes.c_void_p, size, whole, ctypes.c_void_p, whole]
        self._gram.argtypes = [ctypes.c_void_p, size, size, size, ctypes.c_void_p, whole]
        self._columns.argtypes = [*[ctypes.c_void_p] * 3, size, size, size, *[ctypes.c_void_p] * 2, whole]

    def norms(self, grads: list[Tensor], dtype: torch.dtype) -> Tensor:
        if grads[0].dtype not in _TYPES:
            return super().norms(grads, dtype)
        grads = _contiguous(grads)
        pointers, sizes = _pointers(grads), array("q", map(Tensor.numel, grads))
        out, kind = grads[0].new_empty(len(grads), dtype=torch.float64), _TYPES[grads[0].dtype]
        self._norms(_at(pointers), _at(sizes), len(grads), kind, _at(out), torch.get_num_threads())
        return out

    def gram(self, A: Tensor) -> Tensor:
        s, n, k, q = A.shape
        A, out = A.contiguous(), A.new_empty(s, n, k, k, dtype=torch.float64)
        self._gram(_at(A), s * n, k, q, _at(out), torch.get_num_threads())
        return out

    def columns(self, W: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
        s, n, k, q = factors.A.shape
        W, A, projected = W.contiguous(), factors.A.contiguous(), factors.projected.contiguous()
        A_new, gram = torch.empty_like(A), W.new_empty(s, n, k, k)
        threads = torch.get_num_threads()
        self._columns(_at(W), _at(A), _at(projected), s * n, k, q, _at(A_new), _at(gram), threads)
        return A_new, gram

    def adam(self, factors: Factors, table: Tensor, bound: float | None, metrics: Metrics | None) -> None:
        bucket = factors.bucket
        kinds = {grad.dtype for grad in bucket.grads}  # the kernel reads one
        if bucket.params[0].dtype not in _TYPES or len(kinds) > 1 or not kinds <= _TYPES.keys():
            return super().adam(factors, table, bound, metrics)
        n, (p, q), k = len(bucket.params), (bucket.all_rows.stop, bucket.shape[1]), bucket.wave.k
        width = 2 * k if bucket.wave.rule.projects_new else k
        factors.grams = table.new_zeros(2, n, k, width, dtype=torch.float64)
        if p == 0:  # an empty shard
            return
        # The sums of splits, and their total, take the place of a tile's temporaries.
        sums, limit = 2 * k * (q + 2 * width), tile_entries(bucket.group, 2)
        splits = max(1, min(MAX_SPLITS, p * q // SPLIT_ENTRIES, limit // sums))
        size = n if splits == 1 else max(1, limit // (splits * sums))
        for matrices in slices(n, size):
            self._step(factors, matrices, (p, q, k, width, splits), table, bound, metrics)

    def _step(
        self,
        factors: Factors,
        matrices: slice,
        sizes: tuple[int, ...],
        table: Tensor,
        bound: float | None,
        metrics: Metrics | None,
    ) -> None:
        bucket, (p, q, k, width, splits) = factors.bucket, sizes
        params, grads = bucket.params[matrices], _contiguous(bucket.grads[matrices])
        # What is not contiguous is copied, parameters back again.
        written, n = _contiguous(params), len(params)
        everything = n == factors.B.shape[1]
        B, A, R = (value if everything else value[:, matrices] for value in (factors.B, factors.A, factors.R))
        B, A, R, table = B.contiguous(), A.contiguous(), R.contiguous(), table[:, matrices].contiguous()
        B_new = factors.B_new if everything else torch.empty_like(B)
        direct = everything and splits == 1
        projected = factors.projected if direct else factors.projected.new_empty(splits, 2, n, k, q)
        grams = factors.grams if direct else factors.grams.new_empty(splits, 2, n, k, width)
        keys = None
        if rounds_stochastically(params[0], bucket.group):
            keys = round_keys(bucket.keys(matrices))
        largest = clamped = None
        if metrics is not None:
            largest, clamped = table.new_empty(splits, n), table.new_empty(splits, n, dtype=torch.int64)
        grad_pointers, param_pointers = _pointers(grads), _pointers(written)
        arguments = Adam(
            *(n, p, q, k, splits, bucket.rows.start),
            *map(
                _at, (grad_pointers, param_pointers, B, A, R, B_new, projected, grams, table, keys, largest, clamped)
            ),
            float("inf") if bound is None else bound,
            *(_TYPES[grads[0].dtype], _TYPES[params[0].dtype], bucket.wave.rule.projects_new, torch.get_num_threads()),
        )
        self._adam(ctypes.byref(arguments))
        if not everything:
            factors.B_new[:, matrices] = B_new
        if not direct:
            factors.projected[:, matrices] = projected.sum(0)
            factors.grams[:, matrices] = grams.sum(0)
        if metrics is not None:
            metrics.add_sizes(largest.amax(), clamped.sum(), n * p * q)
        for param, value in zip(params, written):
            if value is not param:
                param.copy_(value)  # no effect on one that was contiguous


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return tensors if all(map(Tensor.is_contiguous, tensors)) else [tensor.contiguous() for tensor in tensors]


def _pointers(tensors: list[Tensor]) -> array:
    return array("Q", map(Tensor.data_ptr, tensors))


def _at(place: Tensor | array | None) -> int | None:
    """The address of the first entry."""
    return place.data_ptr() if isinstance(place, Tensor) else place and place.buffer_info()[0]
