"""This module decides which parameters are compressed, at which ranks, and which of them are stepped together."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .experts import Stack, stack_of
from .sharding import WHOLE, Placement, local, placement_of

# The eager backend holds at most this many temporaries of the size of a tile, or of a batch's factors, at once. A test
# counts them.
TEMPORARIES = 8
# These are the defaults of ``temporary_bytes``. A batch of any size takes a GPU some 450 launches.
TEMPORARY_BYTES, GPU_BATCH_BYTES = 64_000_000, 512_000_000
# This is the paper's momentum rank for fine-tuning the weights of 7B and 8B models (Table 2).
MOMENTUM_RANK = 8
# The position of expert e of a stack is the parameter's own plus e times this. No model has as many parameters.
EXPERT_POSITIONS = 1 << 20


@functools.lru_cache(maxsize=4096)
def matrix_shape(shape: torch.Size, stack: Stack | None = None) -> tuple[int, int]:
    """Return the shape (p, q) as which a tensor of two or more dimensions is compressed, or each expert of a stack.

    Without a stack, all dimensions after the first are flattened.
    """
    return (shape[0], math.prod(shape[1:])) if stack is None else stack.matrix_shape(shape)


@functools.lru_cache(maxsize=4096)
def compressed_rank(shape: torch.Size, momentum_rank: int | None, stack: Stack | None = None) -> int:
    """Return the rank k of the first moment of a parameter of this shape, or of each expert of a stack.

    The rank is 0 if the parameter takes the AdamW path. A momentum_rank of None stands for 8, or for a quarter of the
    smaller side if that is less, and at least 1. A matrix is compressed if k < min(p, q) and the k(p+q) numbers of its
    factors are fewer than the p·q that they replace.
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return 0
    p, q = matrix_shape(shape, stack)
    k = max(1, min(MOMENTUM_RANK, min(p, q) // 4)) if momentum_rank is None else momentum_rank
    return k if 0 < k < min(p, q) and k * (p + q) < p * q else 0


@dataclass(frozen=True, eq=False)
class Member:
    """Holds a parameter that a step updates, with its group, its position in the optimizer, and its ranks and shapes.

    ``ranks`` has one number for each factored moment: for m and, where there is one, for v. It is empty on the AdamW
    path. ``state_shapes`` has the shapes of the parameter's state. A parameter that stacks experts is many matrices:
    `matrices` lists them, and `split` and `split_state` give what belongs to each.
    """

    group: dict[str, Any]
    param: Tensor
    position: int
    ranks: tuple[int, ...]
    state_shapes: dict[str, tuple[int, ...]]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape (p, q) of a compressed parameter, or of one expert of a stack."""
        return matrix_shape(self.param.shape, self.stack)

    @property
    def stack(self) -> Stack | None:
        """Return how a compressed parameter holds experts, or None if it is one matrix."""
        return stack_of(self.group) if self.ranks else None

    @property
    def placement(self) -> Placement:
        """Return the processes that share the rows of a matrix.

        Where a stack's first dimension is sharded, each expert is whole on one process.
        """
        return WHOLE if self.stack is not None and self.stack.dim == 0 else placement_of(self.param)

    def matrices(self) -> list[Member]:
        """Return the matrices on this process: the parameter, or for each expert a member with its own position."""
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
        """Return each matrix's state. The state of an expert is a view into the stack's."""
        if self.stack is None:
            return [state]
        values = zip(*(local(state[name]).unbind() for name in self.state_shapes))
        return [dict(zip(self.state_shapes, of_expert)) for of_expert in values]


@dataclass
class Part:
    """Holds the parameters of a step on one device. If they are sharded, the same processes share all of them.

    ``tables`` holds the parameters that a backend with kernels for a whole step takes. ``members`` are the other
    parameters, and ``matrices`` are these with each expert of a stack by itself. ``plain`` holds the indices of the
    matrices that take the AdamW path, group by group. ``batches`` holds the indices of the compressed matrices that
    are stepped together.
    """

    device: torch.device
    placement: Placement
    members: list[Member]
    matrices: list[Member] = field(default_factory=list)
    tables: list[Any] = field(default_factory=list)
    plain: list[list[int]] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)

    def split(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return each matrix's view of the members' parameters or gradients, as they are on this process."""
        return [part for member, tensor in zip(self.members, tensors) for part in member.split(tensor)]

    def split_states(self, states: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return each matrix's state."""
        return [part for member, state in zip(self.members, states) for part in member.split_state(state)]


class Layout:
    """Holds the division of a step into parts, and the parameters and options for which it is valid.

    objects: the groups and the parameters. options: what of the groups' options decides. kinds: the shapes and types
    of the parameters and of their gradients.
    """

    def __init__(self, objects: list[Any], options: dict[int, tuple], kinds: list[Any], parts: list[Part]):
        self.objects, self.options, self.parts = objects, options, parts
        equal: dict[Any, Any] = {}
        self.kinds = [equal.setdefault(kind, kind) for kind in kinds]  # A few objects, which stay in the cache.

    def describes(self, objects: list[Any], options: dict[int, tuple], kinds: list[Any]) -> bool:
        """Return whether these are the same parameters and groups, of the same options and kinds."""
        same = len(objects) == len(self.objects) and all(map(operator.is_, objects, self.objects))
        return same and options == self.options and kinds == self.kinds


def parts_of(members: Iterable[Member]) -> list[Part]:
    """Divide parameters by device and by the processes among which they are sharded."""
    found: dict[Any, Part] = {}
    for member in members:
        param, placement = member.param, member.placement
        part = found.setdefault((param.device, placement), Part(param.device, placement, []))
        part.members.append(member)
    return list(found.values())


def lay_out(part: Part, alike: Callable[[dict[str, Any]], tuple]) -> None:
    """Fill in ``part.matrices``, ``part.plain`` and ``part.batches``.

    alike(group) gives the options that the matrices of a batch must have in common. The factors of a batch fit
    `TEMPORARIES` times into half of its ``temporary_bytes``, unless the batch is a single matrix.
    """
    plain: dict[int, list[int]] = {}
    equal: dict[tuple, list[int]] = {}
    part.matrices = [matrix for member in part.members for matrix in member.matrices()]
    for i, member in enumerate(part.matrices):
        group, param = member.group, member.param
        if member.ranks:
            # The whole shape is compared, as a step stacks gradients unflattened. A linear layer can have the p×q of a
            # flattened convolution.
            shape = tuple(param.shape) if member.stack is None else member.shape
            equal.setdefault((shape, param.dtype, member.ranks, alike(group)), []).append(i)
        else:
            plain.setdefault(id(group), []).append(i)
    part.plain, part.batches = list(plain.values()), []
    for indices in equal.values():
        first = part.matrices[indices[0]]
        limit = min(tile_entries(part.matrices[i].group, part.device) for i in indices)
        part.batches += map(indices.__getitem__, slices(len(indices), limit // (sum(first.ranks) * sum(first.shape))))


def tile_entries(group: dict[str, Any], device: torch.device, temporaries: int = TEMPORARIES) -> int:
    """Return how many entries a float32 temporary of a group's step may have.

    This many ``temporaries`` of that size fit into half of the group's ``temporary_bytes``.
    """
    default = GPU_BATCH_BYTES if device.type == "cuda" else TEMPORARY_BYTES
    return max(1, temporary_bytes(group, default) // (2 * 4 * temporaries))


def temporary_bytes(group: dict[str, Any], default: int = TEMPORARY_BYTES) -> int:
    """Return the bound on the temporaries of a group's step in bytes."""
    return int(group["temporary_bytes"] or default)


def slices(count: int, size: int) -> Iterator[slice]:
    """Cut 0 to ``count`` into slices of at most ``size``, and of at least 1."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
