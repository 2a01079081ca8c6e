"""This module holds the interface of backends with kernels for AdamW's whole step, and the tables that they take."""

from __future__ import annotations

import contextlib
import itertools
import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..lowrank.layout import Member, temporary_bytes
from ..lowrank.metrics import Metrics
from ..lowrank.rules import RULES
from ..lowrank.sharding import local
from .eager import Eager

# The kernels read and write gradients and weights of these types. The numbers are those by which C++ knows the types.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The kernels take these options of a group, in this order, which ``Options`` in ``kernels.cpp`` and the names in
# ``gpu/blocks.py`` repeat.
OPTIONS = (
    *("beta1", "beta2", "lr", "weight_decay", "eps", "residual_weight", "update_scale"),
    *("max_norm", "sign", "bound", "newton", "damping", "seed", "stochastic", "skips_zeros"),
)
# The kernels take the addresses of this state of a matrix, in this order, after those of its gradient and weights. The
# same two files repeat it.
POINTERS = ("step", "m_B", "m_A", "v_B", "v_A", "v_energy", "v_scale")


def named_options(group: dict[str, Any], **own: Any) -> tuple[Any, ...]:
    """Return the values of `OPTIONS` for a group as it is now.

    They are the options that all optimizers have and the optimizer's ``own``. Options that are in neither are 0.
    """
    rule, clip = RULES[group["update_rule"]], group["max_param_grad_norm"]
    values: dict[str, Any] = dict(
        residual_weight=group["residual_weight"] or 0.0,
        max_norm=float("inf") if clip is None else clip,
        sign=-1.0 if group["maximize"] else 1.0,
        newton=not rule.tracked,
        damping=rule.damping,
    )
    values.update(own)
    return tuple(values.get(name, 0.0) for name in OPTIONS)


class Table:
    """Holds matrices of one update rule that a backend steps together, and what stays the same from step to step.

    ``members`` are the parameters, ``matrices`` are the same with each expert of a stack by itself, and ``of_group``
    are the numbers of the matrices' groups in ``groups``.
    """

    def __init__(self, members: list[Member]):
        self.members = members
        self.device = members[0].param.device
        self.params = [member.param for member in members]
        groups = {id(member.group): member.group for member in members}
        self.groups = list(groups.values())
        number = {key: i for i, key in enumerate(groups)}
        self.stacked = any(member.stack is not None for member in members)
        by_member = [member.matrices() for member in members]
        self.counts = list(map(len, by_member))
        self.matrices = list(itertools.chain.from_iterable(by_member))
        self.of_group = [number[id(matrix.group)] for matrix in self.matrices]
        self.names = tuple(members[0].state_shapes)
        self.state: list[Tensor] = []  # `take_state` sets this and what belongs to it.

    def stacks(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return views of this process's parameters or gradients: [p, q], or [experts, p, q] for a stack."""
        if not self.stacked:
            return list(tensors)
        found = (local(tensor) for tensor in tensors)
        return [
            x if member.stack is None else member.stack.matrices(x, member.shape[0])
            for member, x in zip(self.members, found)
        ]

    def gradients(self) -> list[Tensor]:
        """Return the gradients as contiguous tensors, viewed as by `stacks`."""
        grads: list[Any] = [param.grad for param in self.params]  # None of them is None: `takes` has asked.
        return contiguous(self.stacks(grads))

    @contextlib.contextmanager
    def weights(self) -> Iterator[list[Tensor]]:
        """Provide the parameters as contiguous tensors, viewed as by `stacks`, and write copies back afterwards."""
        params = self.stacks(self.params)
        written = contiguous(params)
        yield written
        if written is not params:
            for param, value in zip(params, written):
                if value is not param:
                    param.copy_(value)
        torch.autograd.graph.increment_version(self.params)  # Autograd does not see what kernels write.

    def pointers(self, tensors: Sequence[Tensor]) -> Iterable[int]:
        """Return the addresses of all matrices in contiguous tensors.

        The tensors are one for each member, once or several times over.
        """
        found = map(Tensor.data_ptr, tensors)
        if not self.stacked:
            return found
        spans = zip(found, tensors, itertools.cycle(self.counts))
        return itertools.chain.from_iterable(
            range(at, at + tensor.nbytes, max(1, tensor.nbytes // max(1, count))) for at, tensor, count in spans
        )

    def holds_state(self, states: list[dict[str, Tensor]]) -> bool:
        """Return whether the state's tensors are the ones that the table holds from the last step, where they were.

        Of the addresses only those of m_B are compared, since looking at all of them takes longer than the arithmetic
        of a small adapter. A tool that moves the state to other memory moves all tensors of a parameter.
        """
        found = [state.get(name) for state in states for name in self.names]
        same = len(found) == len(self.state) and all(map(operator.is_, found, self.state))
        return same and self._factor_addresses() == self.factor_addresses

    def take_state(self, states: list[dict[str, Tensor]]) -> None:
        """Hold the state's tensors, after making all of them float32 and contiguous on the parameters' device."""
        for state, param in zip(states, self.params):
            for name in self.names:
                state[name] = state[name].to(param.device, torch.float32).contiguous()
        self.state = [state[name] for state in states for name in self.names]
        by_name = [local(state[name]) for name in self.names for state in states]
        self.storages = list(map(Tensor.untyped_storage, by_name))  # The addresses stay valid with them.
        self.state_addresses = array("Q", list(self.pointers(by_name)))
        factor = self.names.index("m_B")
        self.factors = by_name[factor * len(states) : (factor + 1) * len(states)]
        self.factor_addresses = self._factor_addresses()

    def _factor_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.factors))


def tables_of(members: list[Member]) -> Iterator[list[Member]]:
    """Divide parameters of one update rule into those of each table.

    A step copies the gradients and the weights of a table's interleaved experts. The copies fit ``temporary_bytes``,
    unless they are of a single parameter.
    """
    in_place: list[Member] = []
    copied: list[Member] = []
    held = 0
    for member in members:
        if member.stack is None or member.stack.dim == 0:
            in_place.append(member)
            continue
        size = member.param.nbytes + cast(Tensor, member.param.grad).nbytes
        if copied and held + size > temporary_bytes(member.group):
            yield copied
            copied, held = [], 0
        copied.append(member)
        held += size
    yield from filter(None, (in_place, copied))


def contiguous(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, with contiguous copies of those that are not contiguous."""
    return tensors if all(map(Tensor.is_contiguous, tensors)) else [tensor.contiguous() for tensor in tensors]


class WholeStep(Eager):
    """Takes the whole AdamW step of matrices that are not sharded, and the row part of a step of all others."""

    table: type[Table] = Table

    @staticmethod
    def takes(member: Member) -> bool:
        """Return whether `step` takes a compressed parameter, which depends on its own and its gradient's types.

        A parameter that is not contiguous may be the transpose of another one, as in PEFT's tied adapters. A step with
        both would lose one's update, since it writes back a copy.
        """
        param, grad = member.param, member.param.grad
        return grad is not None and param.is_contiguous() and param.dtype in TYPES and grad.dtype in TYPES

    def step(self, table: Any, options: list[tuple], metrics: Metrics | None) -> Tensor:
        """Take one AdamW step with all matrices of a table: change their weights, factors and counts in place.

        options: the options of each of the table's groups, in the order of `OPTIONS`. metrics: receives the figures of
        this step, or None. Returns ‖g‖_F of each matrix after clipping, in any order: [N] float64. The norm is −1 for
        an expert that is left alone, as its gradient is zero.
        """
        raise NotImplementedError
