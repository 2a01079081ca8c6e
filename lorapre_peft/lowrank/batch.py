"""This module holds `Batch`: equal matrices that one step updates together, and what it reads and writes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .constants import constants
from .float64 import to_float32, to_float64
from .layout import TEMPORARIES, Member, slices, tile_entries
from .rounding import random_keys, write_stochastic
from .rules import RULES
from .sharding import Placement, local

# This is the largest gradient norm whose square float32 holds. Beyond it second moments would be infinite.
MAX_NORM = torch.finfo(torch.float32).max ** 0.5


class Batch:
    """Holds n matrices p×q of one shape, dtype, update rule and ranks on one device, during one step.

    Stacked tensors are [n, rows, columns] float32. If the matrices are sharded over processes, parameters, gradients
    and B factors are this process's rows.

    Attributes:
        params, grads: this process's rows of each matrix and of its gradient.
        norms: ‖g‖_F of the whole matrices after clipping, [n] float64 on the `float64_device`.
        scale: factor on each gradient, which clips it and is negative to maximize: [n] float32. None stands for 1.
        update: false where a matrix has no usable gradient and keeps its values, [n] bool. None stands for all true.
    """

    def __init__(
        self,
        members: list[Member],
        params: list[Tensor],
        states: list[dict[str, Tensor]],
        grads: list[Tensor],
        norms: Tensor,
        update: Tensor | None,
        placement: Placement,
    ):
        self.members, self.states, self.placement = members, states, placement
        self.params, self.grads = params, grads
        self.device = self.params[0].device
        self.shape, self.ranks = members[0].shape, members[0].ranks
        self.groups = list({id(member.group): member.group for member in members}.values())
        self.rule = RULES[self.groups[0]["update_rule"]]
        self.rows = placement.rows(self.shape[0])  # These are this process's rows of the p×q matrices.
        self.norms = norms if update is None else norms.where(update, 0)
        self.scale = gradient_scale(self.norms, self.numbers("max_param_grad_norm"), self.numbers("maximize"))
        if self.scale is not None:
            self.norms = self.norms * self.scale.abs()
            self.scale = to_float32(self.scale, self.device)
        self.update = None if update is None else update.to(self.device)

    def __len__(self) -> int:
        return len(self.members)

    # ---- hyperparameters --------------------------------------------------------------------------------------------

    @overload
    def numbers(  # type: ignore[overload-overlap]  # These are strings too, of options that may be None or False.
        self, option: Literal["max_param_grad_norm", "maximize"]
    ) -> Tensor | None: ...
    @overload
    def numbers(self, option: Literal["residual_weight"]) -> Any: ...  # Each rule knows whether it has one.
    @overload
    def numbers(self, option: str | Callable[[dict[str, Any]], float]) -> Tensor: ...
    def numbers(self, option: str | Callable[[dict[str, Any]], float]) -> Tensor | None:
        """Return an option, or a function of the options, for each matrix: [n] float64.

        The result is None if all groups have None or False.
        """
        values = [group[option] if isinstance(option, str) else option(group) for group in self.groups]
        if all(value is None or value is False for value in values):
            return None
        if any(isinstance(value, Tensor) for value in values):
            by_group = torch.stack([self._number(float("inf") if value is None else value) for value in values])
        else:
            by_group = constants(tuple(float("inf") if v is None else float(v) for v in values), self.norms.device)
        if len(values) == 1:
            return by_group.repeat(len(self))
        numbers = {id(group): i for i, group in enumerate(self.groups)}
        order = tuple(numbers[id(member.group)] for member in self.members)
        return by_group.gather(0, constants(order, self.norms.device, torch.int64))

    def _number(self, value: float | Tensor) -> Tensor:
        """Return a hyperparameter as a tensor []. The host does not read a tensor that is on another device."""
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return to_float64(value.detach().reshape(()))
        return torch.full((), float(value), dtype=torch.float64, device=self.norms.device)

    def steps(self) -> tuple[Tensor, Tensor | None]:
        """Return step and decay of θ ← θ − (step · update + decay · θ): [n] float32 each, or None for no decay."""
        lr, decay = self.numbers("lr"), self.numbers("weight_decay")
        step = to_float32(lr * self.numbers("update_scale"), self.device)
        return step, to_float32(lr * decay, self.device) if self.decays else None

    @property
    def decays(self) -> bool:
        """Return whether any of the matrices has weight decay."""
        return any(group["weight_decay"] for group in self.groups)

    # ---- state ------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        """Return the named tensor of each matrix's state, stacked and contiguous: [n, ...] float32."""
        found = [local(state[name]) for state in self.states]
        return found[0].contiguous()[None] if len(found) == 1 else torch.stack(found)

    def save(self, name: str, values: Tensor) -> None:
        """Write values [n, ...] of any dtype into the state. Matrices that are not updated keep theirs."""
        targets = [local(state[name]) for state in self.states]
        values = to_float32(values, self.device)
        if self.update is not None:
            values = torch.where(self.update.view(-1, *[1] * (values.ndim - 1)), values, self.read(name))
        torch._foreach_copy_(targets, list(values.unbind()))

    def advance(self, started: Tensor | None) -> Tensor:
        """Count one step for every matrix, and return the t ≥ 1 of the bias corrections: [n] float32.

        Where ``started`` [n] is false, the count begins at the first gradient that is not zero. None means all true.
        """
        counts = self.read("step") + 1
        if started is not None:
            counts = torch.where(started, counts, (self.norms > 0).to(self.device).to(counts.dtype))
        self.save("step", counts)
        return counts.clamp_min(1)

    # ---- gradients and weights --------------------------------------------------------------------------------------

    @property
    def all_rows(self) -> slice:
        """Return the slice of all rows that this process has of the matrices, counted from the first of them."""
        return slice(0, self.rows.stop - self.rows.start)

    def chunks(self) -> Iterator[slice]:
        """Yield slices of `matrices_at_once`, which are the same on every process."""
        return slices(len(self), self.matrices_at_once())

    def matrices_at_once(self, temporaries: int = TEMPORARIES) -> int:
        """Return for how many matrices there is room for so many temporaries of their size, and at least 1."""
        entries = min(tile_entries(group, self.device, temporaries) for group in self.groups)
        return max(1, entries // (self.shape[0] * self.shape[1]))

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Yield (matrices, rows) of at most `tile_entries` entries: some whole matrices, or some rows of one."""
        here, q = self.all_rows.stop, self.shape[1]
        for matrices in slices(len(self), self._tile_entries // max(1, here * q)):
            for rows in slices(here, self._tile_entries // q):
                yield matrices, rows

    @property
    def _tile_entries(self) -> int:
        return min(tile_entries(group, self.device) for group in self.groups)

    def gradients(self, matrices: slice, rows: slice) -> Tensor:
        """Return a tile of the clipped gradients, negated to maximize: [n, rows, q] float32. Do not write to it."""
        grads = self.grads[matrices]
        parts = grads if rows == slice(0, len(grads[0])) else [grad[rows] for grad in grads]
        stacked = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        stacked = stacked.reshape(len(parts), rows.stop - rows.start, self.shape[1]).float()
        return stacked if self.scale is None else stacked * self.scale[matrices, None, None]

    def mask(self, matrices: slice, update: Tensor) -> None:
        """Zero the updates, in place, of matrices that are not to be updated."""
        if self.update is not None:
            skipped = ~self.update[matrices].to(update.device)
            update.masked_fill_(skipped.view(-1, *[1] * (update.ndim - 1)), 0)

    def write(self, matrices: slice, rows: slice, update: Tensor, step: Tensor, decay: Tensor | None) -> None:
        """Take the step θ ← θ − (step · update + decay · θ) of a tile, rounded once to the parameter's dtype.

        step, decay: what `steps` returns. update: the update of the tile, which is overwritten.
        """
        params = self.params[matrices]
        targets = params if rows == slice(0, len(params[0])) else [param[rows] for param in params]
        update = update.mul_(step[matrices, None, None])
        if decay is not None:
            theta = targets[0][None] if len(params) == 1 else torch.stack(targets)
            update.addcmul_(theta.reshape(update.shape), decay[matrices, None, None].to(update.dtype))
        self.mask(matrices, update)
        update = update.view(len(params), *targets[0].shape)
        if self.rounds_stochastically:
            update = update.neg_().add_(targets[0] if len(params) == 1 else torch.stack(targets))
            write_stochastic(targets, update, self.keys(matrices), (self.rows.start + rows.start) * self.shape[1])
        else:
            torch._foreach_sub_(targets, list(update.unbind()))

    @property
    def rounds_stochastically(self) -> bool:
        """Return whether the parameters are written with stochastic rounding."""
        return rounds_stochastically(self.params[0], self.groups[0])

    def keys(self, matrices: slice) -> Tensor:
        """Return each matrix's key of this step for the generator of stochastic rounding: int64 [n]."""
        named = [(member.group["seed"], member.position) for member in self.members[matrices]]
        return random_keys(tuple(named), self.read("step")[matrices])


def usable(norms: Any) -> Any:
    """Return whether gradients of these norms exist (norm not −1), are finite and have squares within float32."""
    return (norms >= 0) & (norms <= MAX_NORM)  # NaN fails both comparisons.


def gradient_scale(norms: Tensor, bound: Tensor | None, maximize: Tensor | None) -> Tensor | None:
    """Return the factors [n] on gradients of these norms, which clip and, negated, maximize, or None if all are 1."""
    if bound is None and maximize is None:
        return None
    scale = torch.ones_like(norms) if bound is None else torch.where(norms > bound, bound / norms, 1.0)
    return scale if maximize is None else scale * (1 - 2 * maximize)


def rounds_stochastically(param: Tensor, group: dict[str, Any]) -> bool:
    """Return whether this parameter is written with stochastic rounding."""
    return param.dtype == torch.bfloat16 and group["bf16_rounding"] == "stochastic"
