"""This module holds the C++ backend for CPUs.

It computes AdamW's whole step, for all matrices in one call, and all of Muon's step but the orthogonalization. `build`
finds or compiles its library. State and weights are read and written where they lie. Each thread holds about
(k + k_v)(p + 2q) float32 numbers and up to 400 kB of its own, which do not count towards ``temporary_bytes``.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from array import array
from typing import Any, cast

import torch
from torch import Tensor

from ..lowrank.batch import Batch, usable
from ..lowrank.layout import Member, temporary_bytes
from ..lowrank.metrics import Metrics
from ..lowrank.sharding import WHOLE
from . import build
from .table import POINTERS, TYPES, Table, WholeStep, contiguous

# The kernel ``step_matrices`` returns this many numbers for each matrix: ‖g‖_F after clipping and, if metrics are
# recorded, the largest update, the number of clamped entries, and the energy that the rows of m_A captured.
FOUND = 4
# This is the state of a matrix without a second moment, with which `POINTERS` begins. The kernel then writes the
# momentum in place of the weights.
MOMENTUM_STATE = ("step", "m_B", "m_A")
# The rows of a matrix with more entries than this are split among threads.
SPLIT_ENTRIES = 1 << 20
# Muon steps as many matrices in one call as `temporary_bytes` has room for momenta: few, which threads have to share.
MOMENTA_SPLIT_ENTRIES = 1 << 19


@functools.cache
def library() -> ctypes.CDLL:
    """Return the kernels for this CPU, from the wheel, from an earlier compilation, or compiled now.

    Raises RuntimeError with the message of the compiler or of the loader.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    path = build.find(capability) or build.compile_library(capability, build.cache())
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"the C++ kernels in {path} could not be loaded: {error}") from error


class HostTable(Table):
    """Holds a table as the kernels take it: the facts of each matrix, and the order of work, largest matrix first."""

    def __init__(self, members: list[Member]):
        super().__init__(members)
        self.sizes = [math.prod(matrix.shape) for matrix in self.matrices]
        self.order = array("q", sorted(range(len(self.sizes)), key=lambda i: -self.sizes[i]))
        self.shapes = array("q")
        for matrix, group in zip(self.matrices, self.of_group):
            self.shapes.extend(_known(matrix, group, cast(Tensor, matrix.param.grad).dtype, matrix.param.dtype))


def _known(matrix: Member, group: int, grad: torch.dtype, written: torch.dtype) -> tuple[int, ...]:
    """Return the facts that the kernels take of a matrix. Without a second moment, the rank of that is 0.

    grad, written: the types of its gradient, and of its weights or momentum.
    """
    return (*matrix.shape, *(*matrix.ranks, 0)[:2], group, matrix.position, TYPES[grad], TYPES[written])


class Cpp(WholeStep):
    """Calls the kernels. Float64 tensors and sharded matrices take the eager path."""

    table = HostTable

    def __init__(self) -> None:
        made, size, whole = library(), ctypes.c_int64, ctypes.c_int32
        self._step, self._norms = made.step_matrices, made.norms
        self._step.argtypes = [*[ctypes.c_void_p] * 5, size, size, size, whole, whole]
        self._norms.argtypes = [ctypes.c_void_p, ctypes.c_void_p, size, whole, ctypes.c_void_p, whole]

    def step(self, table: HostTable, options: list[tuple], metrics: Metrics | None) -> Tensor:
        if not table.matrices:  # A process may hold no expert of any stack.
            return torch.empty(0, dtype=torch.float64)
        grads = table.gradients()
        with table.weights() as written:
            pointers = array("Q", list(table.pointers([*grads, *written])))
            pointers.extend(table.state_addresses)
            arrays = table.shapes, pointers, table.order
            seen = self._call(*arrays, table.groups, options, False, SPLIT_ENTRIES, metrics is not None)
        norms = seen[:, 0]
        if metrics is not None:
            kept = usable(norms)
            sizes = torch.tensor(table.sizes, device="cpu")[kept]
            metrics.add_steps(seen[kept], int(sizes.sum()))
        return norms

    @staticmethod
    def takes_batch(batch: Batch) -> bool:
        """Return whether `momenta` takes these matrices.

        They have to be whole and all updated, and their state has to be as this package makes it.
        """
        return (
            batch.placement is WHOLE
            and batch.update is None
            and {grad.dtype for grad in batch.grads} <= TYPES.keys()
            and all(
                value.dtype is torch.float32 and value.is_contiguous() and value.device.type == "cpu"
                for state in batch.states
                for value in map(state.__getitem__, MOMENTUM_STATE)
            )
        )

    def momenta(
        self, batch: Batch, matrices: slice, options: list[tuple], nesterov: bool, metrics: Metrics | None
    ) -> Tensor:
        """Update the factors and step counts of some matrices of a batch, and return their momenta: [n, p, q] float32.

        The momentum is m = μ m_B m_A + g or, with Nesterov, g + μ m.
        options: the options of each of the batch's groups, in the order of `OPTIONS`, with μ for β1. Options of a
        second moment or of a weight are not read. metrics: as in `step`.
        """
        members, grads = batch.members[matrices], contiguous(batch.grads[matrices])
        number = {id(group): i for i, group in enumerate(batch.groups)}
        momenta = torch.empty(len(members), *batch.shape, dtype=torch.float32, device="cpu")
        shapes = array("q")
        for member, grad in zip(members, grads):
            shapes.extend(_known(member, number[id(member.group)], grad.dtype, momenta.dtype))
        tensors = [*grads, *momenta.unbind()]
        tensors += [state[name] for name in MOMENTUM_STATE for state in batch.states[matrices]]
        pointers, order = array("Q", map(Tensor.data_ptr, tensors)), array("q", range(len(members)))
        arrays = shapes, pointers, order
        seen = self._call(*arrays, batch.groups, options, nesterov, MOMENTA_SPLIT_ENTRIES, metrics is not None)
        if metrics is not None:
            metrics.add_energy(seen[:, 0])
            metrics.add_captured(seen[:, 3].sum())
        return momenta

    def _call(
        self,
        shapes: array,
        pointers: array,
        order: array,
        groups: list[dict[str, Any]],
        options: list[tuple],
        nesterov: bool,
        split_entries: int,
        record: bool,
    ) -> Tensor:
        """Call the kernel ``step_matrices``, and return what it found of each matrix: [n, FOUND] float64.

        pointers: the addresses of all tensors. Null pointers are appended for those left out at the end.
        split_entries: the rows of a matrix with more entries are split among threads.
        """
        n = len(order)
        _check_addresses(pointers)
        pointers.extend([0] * (n * (2 + len(POINTERS)) - len(pointers)))
        numbers = array("d", itertools.chain.from_iterable((*row, nesterov) for row in options))
        found = array("d", bytes(8 * n * FOUND))
        arrays: tuple[array, ...] = (shapes, numbers, pointers, found, order)
        # Half of the temporaries is for the sums of split matrices.
        sum_bytes = min(map(temporary_bytes, groups)) // 2
        self._step(*map(_at, arrays), n, split_entries, sum_bytes, record, torch.get_num_threads())
        return torch.frombuffer(found, dtype=torch.float64).view(n, FOUND)

    def norms(self, grads: list[Tensor], dtype: torch.dtype) -> Tensor:
        if grads[0].dtype not in TYPES:
            return super().norms(grads, dtype)
        if not all(map(Tensor.is_contiguous, grads)):  # One copy at a time.
            return torch.cat([self.norms([grad.contiguous()], dtype) for grad in grads])
        pointers, sizes = array("Q", map(Tensor.data_ptr, grads)), array("q", map(Tensor.numel, grads))
        _check_addresses(array("Q", [at for at, size in zip(pointers, sizes) if size]))  # An empty shard has none.
        out, kind = grads[0].new_empty(len(grads), dtype=torch.float64), TYPES[grads[0].dtype]
        self._norms(_at(pointers), _at(sizes), len(grads), kind, _at(out), torch.get_num_threads())
        return out


def _check_addresses(addresses: array) -> None:
    if addresses and not torch.frombuffer(addresses, dtype=torch.int64).all():
        raise RuntimeError(
            "found a parameter, gradient or state without memory, expected tensors on the CPU: another tool has freed "
            "it"
        )


def _at(place: Tensor | array) -> int:
    """Return the address of the first entry of a tensor or an array."""
    return place.data_ptr() if isinstance(place, Tensor) else place.buffer_info()[0]
