"""The backend that computes AdamW's whole step in C++ for CPUs, all matrices in one call.

`build` says where its library comes from. State and weights are read and written where they lie. Each thread holds
about (k + k_v)(p + 2q) float32 numbers and 200 kB of its own, outside ``temporary_bytes``.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from array import array
from typing import cast

import torch
from torch import Tensor

from ..lowrank.batch import usable
from ..lowrank.metrics import Metrics
from . import build
from .table import POINTERS, TYPES, Table, WholeStep, contiguous

# Numbers that the kernel ``adam_step`` returns of a matrix: ‖g‖_F after clipping, and where they are recorded the
# largest update, the number of clamped entries and the energy that m's rows captured.
FOUND = 4
# Entries of a matrix above which its rows are split among threads.
SPLIT_ENTRIES = 1 << 20


@functools.cache
def library() -> ctypes.CDLL:
    """Return the kernels for this CPU: the wheel's, those compiled before, or compiled now.

    Raises RuntimeError with what the compiler or the loader said.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    path = build.find(capability) or build.compile_library(capability, build.cache())
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"the C++ kernels in {path} could not be loaded: {error}") from error


class Cpp(WholeStep):
    """Calls the kernels. Float64, and what is sharded, takes the eager path."""

    def __init__(self) -> None:
        made, size, whole = library(), ctypes.c_int64, ctypes.c_int32
        self._step, self._norms = made.adam_step, made.norms
        self._step.argtypes = [*[ctypes.c_void_p] * 5, size, size, size, whole, whole]
        self._norms.argtypes = [ctypes.c_void_p, ctypes.c_void_p, size, whole, ctypes.c_void_p, whole]

    def step(self, table: Table, options: list[tuple], metrics: Metrics | None) -> Tensor:
        params, n = table.stacks(table.params), len(table.sizes)
        if n == 0:  # a process may hold no expert of any stack
            return torch.empty(0, dtype=torch.float64)
        grads, written = (
            contiguous(table.stacks([cast(Tensor, param.grad) for param in table.params])),
            contiguous(params),
        )
        pointers = array("Q", table.pointers([*grads, *written, *table.local_state]))
        if 0 in pointers:
            raise RuntimeError(
                "found a parameter, gradient or state without memory, expected tensors on the CPU: another tool has "
                "freed it"
            )
        pointers.extend([0] * (n * (2 + len(POINTERS)) - len(pointers)))
        numbers = array("d", itertools.chain.from_iterable(options))
        found = array("d", bytes(8 * n * FOUND))
        arrays: tuple[array, ...] = (table.shapes, numbers, pointers, found, table.order)
        sum_bytes = (
            min(int(group["temporary_bytes"]) for group in table.groups) // 2
        )  # room for sums of split matrices
        self._step(*map(_at, arrays), n, SPLIT_ENTRIES, sum_bytes, metrics is not None, torch.get_num_threads())
        if written is not params:  # what is not contiguous was copied
            for param, value in zip(params, written):
                if value is not param:
                    param.copy_(value)
        seen = torch.frombuffer(found, dtype=torch.float64).view(n, FOUND)
        norms = seen[:, 0]
        if metrics is not None:
            kept = usable(norms)
            sizes = torch.tensor(table.sizes)[kept]
            metrics.add_steps(seen[kept], int(sizes.sum()))
        return norms

    def norms(self, grads: list[Tensor], dtype: torch.dtype) -> Tensor:
        if grads[0].dtype not in TYPES:
            return super().norms(grads, dtype)
        grads = contiguous(grads)
        pointers, sizes = _pointers(grads), array("q", map(Tensor.numel, grads))
        out, kind = grads[0].new_empty(len(grads), dtype=torch.float64), TYPES[grads[0].dtype]
        self._norms(_at(pointers), _at(sizes), len(grads), kind, _at(out), torch.get_num_threads())
        return out


def _pointers(tensors: list[Tensor]) -> array:
    return array("Q", map(Tensor.data_ptr, tensors))


def _at(place: Tensor | array) -> int:
    """Return the address of the first entry."""
    return place.data_ptr() if isinstance(place, Tensor) else place.buffer_info()[0]
