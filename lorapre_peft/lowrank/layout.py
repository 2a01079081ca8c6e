"""Which parameters are compressed, at which ranks, and which of them are stepped together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .experts import Stack, stack_of
from .sharding import WHOLE, Placement, local, placement_of

# Temporaries of the size of a tile, or of a batch's factors, that the eager backend holds at once, at most; a test
# counts them.
TEMPORARIES = 8
# The paper's momentum rank for fine-tuning the weights of 7B and 8B models (Table 2).
MOMENTUM_RANK = 8
# The position of expert e of a stack is the parameter's own plus e times this: more parameters than any model has.
EXPERT_POSITIONS = 1 << 20


@functools.lru_cache(maxsize=4096)
def matrix_shape(shape: torch.Size, stack: Stack | None = None) -> tuple[int, int]:
    """Return the p×q under which a tensor of two or more dimensions is compressed: trailing dimensions are flattened.

    Of a stack of experts: the p×q of each.
    """
    return (shape[0], math.prod(shape[1:])) if stack is None else stack.matrix_shape(shape)


@functools.lru_cache(maxsize=4096)
def compressed_rank(shape: torch.Size, momentum_rank: int | None, stack: Stack | None = None) -> int:
    """Return the rank k of the first moment of a parameter of this shape, or of each expert of a stack; 0 if the
    parameter takes the AdamW path.

    None stands for 8, or a quarter of the smaller side if that is less, at least 1. A matrix is compressed when k <
    min(p, q) and the factors, k(p+q) numbers, are smaller than the p·q that they replace.
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return 0
    p, q = matrix_shape(shape, stack)
    k = max(1, min(MOMENTUM_RANK, min(p, q) // 4)) if momentum_rank is None else momentum_rank
    return k if 0 < k < min(p, q) and k * (p + q) < p * q else 0


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter that a step updates: its group, its position in the optimizer, the ranks of its moments, and the
    shapes of its state.

    ``ranks`` has one number for each factored moment, of m and, where there is one, of v. It is empty on the AdamW
    path. A parameter that stacks experts is many matrices: `matrices` lists them, and `split` and `split_state` give
    what belongs to each.
    """

    group: dict[str, Any]
    param: Tensor
    position: int
    ranks: tuple[int, ...]
    state_shapes: dict[str, tuple[int, ...]]

    @property
    def shape(self) -> tuple[int, int]:
        """The p×q of a compressed parameter, or of one expert of a stack."""
        return matrix_shape(self.param.shape, self.stack)

    @property
    def stack(self) -> Stack | None:
        """How a compressed parameter holds experts; None if it is one matrix."""
        return stack_of(self.group) if self.ranks else None

    @property
    def placement(self) -> Placement:
        """The processes that share the rows of a matrix. Where a stack's first dimension is sharded, each expert is
        whole on one process.
        """
        return WHOLE if self.stack is not None and self.stack.dim == 0 else placement_of(self.param)

    def matrices(self) -> list[Member]:
        """Return the matrices that are here: the parameter itself, or a member for each expert with a position of its
        own.
        """
        stack = self.stack
        if stack is None:
            return [self]
        here = range(stack.experts)[placement_of(self.param).rows(stack.experts) if stack.dim == 0 else slice(None)]
        return [replace(self, position=self.position + expert * EXPERT_POSITIONS) for expert in here]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return each matrix's view of this process's part of the parameter or of its gradient."""
        stack = self.stack
        return [tensor] if stack is None else list(stack.matrices(tensor, self.shape[0]).unbind())

    def split_state(self, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return each matrix's state; that of an expert is a view into the stack's."""
        if self.stack is None:
            return [state]
        values = zip(*(local(state[name]).unbind() for name in self.state_shapes))
        return [dict(zip(self.state_shapes, of_expert)) for of_expert in values]


@dataclass
class Part:
    """The parameters of a step that live on one device and, if they are sharded, are shared by the same processes.

    ``tables`` holds what a backend that has a kernel for a whole step takes; ``members`` are the other parameters, and
    ``matrices`` these with each expert of a stack by itself. ``plain`` holds the indices of the matrices that take the
    AdamW path, group by group; ``batches`` holds those of the compressed ones that are stepped together.
    """

    device: torch.device
    placement: Placement
    members: list[Member]
    matrices: list[Member] = field(default_factory=list)
    tables: list[Any] = field(default_factory=list)
    plain: list[list[int]] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)

    def split(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return each matrix's view of what the members have: their parameters or gradients, as they are on this
        process.
        """
        return [part for member, tensor in zip(self.members, tensors) for part in member.split(tensor)]

    def split_states(self, states: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return each matrix's state."""
        return [part for member, state in zip(self.members, states) for part in member.split_state(state)]


def parts_of(members: Iterable[Member]) -> list[Part]:
    """Divide parameters by device and by the processes among which they are sharded."""
    found: dict[Any, Part] = {}
    for member in members:
        param, placement = member.param, member.placement
        part = found.setdefault((param.device, placement), Part(param.device, placement, []))
        part.members.append(member)
    return list(found.values())


def lay_out(part: Part, alike: Callable[[dict[str, Any]], tuple], temporaries: int) -> None:
    """Fill ``part.matrices``, ``part.plain`` and ``part.batches``.

    alike(group) gives the options that the matrices of a batch must have in common. The factors of a batch fit
    ``temporaries`` times into half of its ``temporary_bytes``, unless it is a single matrix.
    """
    plain: dict[int, list[int]] = {}
    equal: dict[tuple, list[int]] = {}
    part.matrices = [matrix for member in part.members for matrix in member.matrices()]
    for i, member in enumerate(part.matrices):
        group, param = member.group, member.param
        if member.ranks:
            # The whole shape: a step stacks gradients as they are, and a linear layer may be as large as a flattened
            # convolution.
            shape = tuple(param.shape) if member.stack is None else member.shape
            equal.setdefault((shape, param.dtype, member.ranks, alike(group)), []).append(i)
        else:
            plain.setdefault(id(group), []).append(i)
    part.plain, part.batches = list(plain.values()), []
    for indices in equal.values():
        first = part.matrices[indices[0]]
        limit = min(tile_entries(part.matrices[i].group, temporaries) for i in indices)
        part.batches += map(indices.__getitem__, slices(len(indices), limit // (sum(first.ranks) * sum(first.shape))))


def tile_entries(group: dict[str, Any], temporaries: int = TEMPORARIES) -> int:
    """Return the entries of one float32 temporary of which ``temporaries`` fit into half of the group's
    ``temporary_bytes``.
    """
    return max(1, int(group["temporary_bytes"]) // (2 * 4 * temporaries))


def slices(count: int, size: int) -> Iterator[slice]:
    """Cut 0 to ``count`` into slices of at most ``size``, and of at least 1."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
