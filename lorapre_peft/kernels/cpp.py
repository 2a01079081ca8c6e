"""The backend that computes AdamW's whole step in C++ for CPUs, all matrices in one call; `kernels.cpp` is compiled on
first use.

The compiled library is kept in ``$XDG_CACHE_HOME/lorapre_peft`` (default ``~/.cache/lorapre_peft``), under a name that
source, compiler, flags and the CPU's vector instructions decide. It needs no header or library of PyTorch's. State and
weights are read and written where they lie. Each thread holds about (k + k_v)(p + 2q) float32 numbers and 200 kB of
its own, outside ``temporary_bytes``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import math
import operator
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..lowrank.layout import Member
from ..lowrank.sharding import local
from .eager import Eager

SOURCE = Path(__file__).with_name("kernels.cpp")
SOURCES = (SOURCE, *(SOURCE.with_name(f"{name}.h") for name in ("rows", "linalg", "blocks", "numbers")))
# Without errno and traps the compiler may use vector instructions for √ and comparisons; sums keep the order they are
# written in.
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
# By what PyTorch calls the CPU's capability; any other one gets the compiler's own default.
_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-DLANES=16"),
    "AVX2": ("-mavx2", "-mfma", "-DLANES=8"),
}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What the kernel ``adam_step`` takes of a group, in its order.
OPTIONS = (
    *("beta1", "beta2", "lr", "weight_decay", "eps", "residual_weight", "update_scale"),
    *("max_norm", "sign", "bound", "newton", "damping", "seed", "stochastic", "skips_zeros"),
)
# Numbers that it returns of a matrix.
FOUND = 4
# Entries of a matrix above which its rows are split among threads.
SPLIT_ENTRIES = 1 << 20
# Pointers that it takes of a matrix: gradient, weights, and the state's step, m_B, m_A, v_B, v_A, v_energy and
# v_scale.
POINTERS = 9


def compiler() -> str | None:
    """Return the C++ compiler: ``$CXX``, g++ or clang++; None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels. Raises RuntimeError with the compiler's output, or the loader's, if it fails."""
    command = [str(compiler()), *_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]
    name = hashlib.sha256(b"".join(map(Path.read_bytes, SOURCES)) + " ".join(command).encode()).hexdigest()[:16]
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


class Table:
    """Matrices of one update rule that `Cpp.step` takes in one call, and what stays the same from step to step.

    ``members`` are parameters; each expert of a stack is a matrix of its own.
    """

    def __init__(self, members: list[Member]):
        self.members = members
        self.params = [member.param for member in members]
        groups = {id(member.group): member.group for member in members}
        self.groups = list(groups.values())
        number = {key: i for i, key in enumerate(groups)}
        self.shapes, self.sizes = array("q"), []
        self.counts: list[int] = []  # matrices of each parameter
        self.stacked = any(member.stack is not None for member in members)
        for member in members:
            types = _TYPES[cast(Tensor, member.param.grad).dtype], _TYPES[member.param.dtype]
            matrices = member.matrices()
            for matrix in matrices:
                self.shapes.extend((*matrix.shape, *matrix.ranks, number[id(matrix.group)], matrix.position, *types))
                self.sizes.append(math.prod(matrix.shape))
            self.counts.append(len(matrices))
        self.order = array("q", sorted(range(len(self.sizes)), key=lambda i: -self.sizes[i]))
        self.names = tuple(members[0].state_shapes)
        self.state: list[Tensor] = []

    def stacks(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return views of the parameters or of their gradients on this process: [p, q], or of a stack
        [experts, p, q].
        """
        if not self.stacked:
            return list(tensors)
        found = (local(tensor) for tensor in tensors)
        return [
            x if member.stack is None else member.stack.matrices(x, member.shape[0])
            for member, x in zip(self.members, found)
        ]

    def pointers(self, tensors: Sequence[Tensor]) -> Iterable[int]:
        """Return the addresses of all matrices of contiguous tensors, of which each group of ``len(self.members)`` has
        one a member.
        """
        found = map(Tensor.data_ptr, tensors)
        if not self.stacked:
            return found
        spans = zip(found, tensors, itertools.cycle(self.counts))
        return itertools.chain.from_iterable(
            range(at, at + tensor.nbytes, max(1, tensor.nbytes // max(1, count))) for at, tensor, count in spans
        )

    def holds_state(self, states: list[dict[str, Tensor]]) -> bool:
        """Whether the state's tensors are those of the last step."""
        found = [state.get(name) for name in self.names for state in states]
        return len(found) == len(self.state) and all(map(operator.is_, found, self.state))

    def take_state(self, states: list[dict[str, Tensor]]) -> None:
        """Hold the state's tensors, all of them float32, contiguous and on the CPU afterwards."""
        for state in states:
            for name in self.names:
                state[name] = state[name].to("cpu", torch.float32).contiguous()
        self.state = [state[name] for name in self.names for state in states]
        self.local_state = list(map(local, self.state))


class Cpp(Eager):
    """Calls the kernels. Float64, and what is sharded, takes the eager path."""

    def __init__(self) -> None:
        made, size, whole = library(), ctypes.c_int64, ctypes.c_int32
        self._step, self._norms = made.adam_step, made.norms
        self._step.argtypes = [*[ctypes.c_void_p] * 5, size, size, size, whole, whole]
        self._norms.argtypes = [ctypes.c_void_p, ctypes.c_void_p, size, whole, ctypes.c_void_p, whole]

    @staticmethod
    def takes(param: Tensor) -> bool:
        """Whether `step` reads and writes a matrix of this dtype, with its gradient."""
        return param.grad is not None and param.dtype in _TYPES and param.grad.dtype in _TYPES

    def step(
        self, table: Table, options: list[tuple[float, ...]], sum_bytes: int, record: bool
    ) -> list[tuple[float, ...]]:
        """Take one AdamW step with all matrices of a table: weights, factors and counters, in place.

        options: of each of the table's groups, in the order of `OPTIONS`. sum_bytes: room for the sums of split
        matrices. record: whether to look at the updates. Returns ‖g‖_F after clipping, and of those recorded the
        largest update, the number that were clamped and the energy that m's rows captured, by matrix.
        """
        params, n = table.stacks(table.params), len(table.sizes)
        if n == 0:  # a process may hold no expert of any stack
            return []
        grads, written = (
            _contiguous(table.stacks([cast(Tensor, param.grad) for param in table.params])),
            _contiguous(params),
        )
        pointers = array("Q", table.pointers([*grads, *written, *table.local_state]))
        if 0 in pointers:
            raise RuntimeError(
                "found a parameter, gradient or state without memory, expected tensors on the CPU: another tool has "
                "freed it"
            )
        pointers.extend([0] * (n * POINTERS - len(pointers)))
        numbers = array("d", itertools.chain.from_iterable(options))
        found = array("d", bytes(8 * n * FOUND))
        arrays: tuple[array, ...] = (table.shapes, numbers, pointers, found, table.order)
        self._step(*map(_at, arrays), n, SPLIT_ENTRIES, sum_bytes, record, torch.get_num_threads())
        if written is not params:  # what is not contiguous was copied
            for param, value in zip(params, written):
                if value is not param:
                    param.copy_(value)
        return list(zip(*[iter(found)] * FOUND))

    def norms(self, grads: list[Tensor], dtype: torch.dtype) -> Tensor:
        if grads[0].dtype not in _TYPES:
            return super().norms(grads, dtype)
        grads = _contiguous(grads)
        pointers, sizes = _pointers(grads), array("q", map(Tensor.numel, grads))
        out, kind = grads[0].new_empty(len(grads), dtype=torch.float64), _TYPES[grads[0].dtype]
        self._norms(_at(pointers), _at(sizes), len(grads), kind, _at(out), torch.get_num_threads())
        return out


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return tensors if all(map(Tensor.is_contiguous, tensors)) else [tensor.contiguous() for tensor in tensors]


def _pointers(tensors: list[Tensor]) -> array:
    return array("Q", map(Tensor.data_ptr, tensors))


def _at(place: Tensor | array) -> int:
    """Return the address of the first entry."""
    return place.data_ptr() if isinstance(place, Tensor) else place.buffer_info()[0]
