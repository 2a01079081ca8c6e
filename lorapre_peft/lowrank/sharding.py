"""This module knows where the rows of a matrix are: all here, or sharded by FSDP2 (DTensors of placement Shard(0)).

Of other processes' rows a step only needs sums over all rows, two for each moment: the rule's column part (`rules`).
B factors are sharded as their matrix is. A factors are whole on every process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .experts import Stack


def world_size() -> int:
    """Return the number of processes of the running distributed job, or 1 without such a job."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Return this process's number in the running distributed job, or 0 without such a job."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@dataclass(frozen=True)
class Placement:
    """Describes the processes that share a matrix's rows. ``group`` is None if all rows are here."""

    group: Any = None  # torch.distributed.ProcessGroup
    rank: int = 0
    size: int = 1

    def rows(self, p: int) -> slice:
        """Return this process's rows of p, divided as by `torch.chunk`: the last processes may have fewer or none."""
        count = -(-p // self.size)
        return slice(min(self.rank * count, p), min((self.rank + 1) * count, p))

    def sum(self, tensors: list[Tensor]) -> Callable[[], None]:
        """Begin to sum tensors of one dtype over processes, in place, in one collective. Call the result to finish."""
        if self.group is None:
            return lambda: None
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        work = torch.distributed.all_reduce(flat, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            for tensor, value in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(value.view_as(tensor))

        return finish

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over the processes."""
        if self.group is not None:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, x: Tensor, p: int) -> Tensor:
        """Return all rows [n, p, c], gathered from each process's rows [n, rows, c]."""
        if self.group is None:
            return x
        count = -(-p // self.size)
        padded = x.new_zeros(x.shape[0], count, x.shape[2])
        padded[:, : x.shape[1]] = x
        out = x.new_empty(self.size * padded.numel())
        torch.distributed.all_gather_into_tensor(out, padded.view(-1), group=self.group)
        return out.view(self.size, *padded.shape).transpose(0, 1).reshape(x.shape[0], -1, x.shape[2])[:, :p]


WHOLE = Placement()


def placement_of(param: Tensor) -> Placement:
    """Return the placement of a parameter that has passed `optim.options.check_parameter`."""
    if not isinstance(param, DTensor):
        return WHOLE
    mesh = param.device_mesh
    dimension = next(i for i, placement in enumerate(param.placements) if placement.is_shard())
    return Placement(mesh.get_group(dimension), mesh.get_local_rank(dimension), mesh.size(dimension))


def is_supported(param: DTensor) -> bool:
    """Return whether a DTensor is sharded by rows over one dimension of its mesh and replicated over the others."""
    shards = [placement for placement in param.placements if not isinstance(placement, Replicate)]
    return len(shards) == 1 and type(shards[0]) is Shard and shards[0].dim == 0


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor as a view. Writing to it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(value: Tensor, param: Tensor, name: str, stack: Stack | None = None) -> Tensor:
    """Return a whole state tensor placed like its parameter: B factors and moments sharded like it, A factors whole.

    If the experts of a stack are sharded, each process keeps everything that belongs to its own experts. Counters and
    other scalars stay plain tensors.
    """
    if not isinstance(param, DTensor) or value.ndim == 0:
        return value
    dim, part = _sharded_dim(name, stack), value
    placements: list[Any] = [Replicate()] * param.device_mesh.ndim
    if dim is not None:
        rows = placement_of(param).rows(value.shape[dim])
        part = value.narrow(dim, rows.start, rows.stop - rows.start).clone()
        placements = [Shard(dim) if placement.is_shard() else placement for placement in param.placements]
    return DTensor.from_local(
        part, param.device_mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def _sharded_dim(name: str, stack: Stack | None) -> int | None:
    """Return the dimension in which a state tensor is sharded as its parameter is by rows, or None if it is whole."""
    if stack is None:
        return None if name.endswith("_A") else 0
    if stack.dim == 0:
        return 0
    return 1 if name.endswith("_B") else None
