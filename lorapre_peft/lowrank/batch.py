"""What a step works on: equal matrices stacked into buckets, and buckets gathered into waves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .packed import StateStack
from .rounding import filled, random_keys, write_stochastic
from .rules import Als, Newton
from .sharding import Placement, local

# The eager backend holds at most this many float32 temporaries of a tile at once, and of the factors of a wave; a test counts them.
TEMPORARIES = 8
# The largest gradient norm whose square float32 holds; second moments beyond it would be infinite.
MAX_NORM = torch.finfo(torch.float32).max ** 0.5


def tile_entries(group: dict[str, Any], temporaries: int = TEMPORARIES) -> int:
    """Entries of one float32 temporary: all of them together stay within half of the group's ``temporary_bytes``."""
    return max(1, int(group["temporary_bytes"]) // (2 * 4 * temporaries))


def slices(count: int, size: int) -> Iterator[slice]:
    """0 to ``count`` in order, at most ``size`` at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@dataclass
class Bucket:
    """Parameters of one shape, each a matrix p×q, in a `Wave`. Stacked tensors are [n, rows, columns], float32.

    Of matrices that are sharded over processes, parameters, gradients and B factors are this process's rows.
    """

    wave: Wave
    shape: tuple[int, int]
    first: int  # of its matrices among the wave's
    states: list[dict[str, Tensor]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of the parameters in the optimizer
    indices: list[int] = field(default_factory=list)  # of the parameters among those of this step
    params: list[Tensor] = field(default_factory=list)  # of this step, as are
    grads: list[Tensor] = field(default_factory=list)
    B: StateStack | None = None  # [s·n, p, k], moment after moment
    A: StateStack | None = None  # [s·n, k, q]

    @property
    def group(self) -> dict[str, Any]:
        return self.wave.group

    @property
    def part(self) -> slice:
        """Of the wave's matrices."""
        return slice(self.first, self.first + len(self.indices))

    @property
    def rows(self) -> slice:
        """The rows of the p×q matrices that are here."""
        return self.wave.placement.rows(self.shape[0])

    @property
    def scale(self) -> Tensor | None:
        """[n] float32, what each gradient is multiplied by; None: 1."""
        return None if self.wave.scale is None else self.wave.scale[self.part]

    @property
    def finite(self) -> Tensor | None:
        """[n] bool, false where the update is skipped; None: the host has seen that all are true."""
        return None if self.wave.finite is None else self.wave.finite[self.part]

    @property
    def all_rows(self) -> slice:
        """`rows`, counted from the first one that is here."""
        return slice(0, self.rows.stop - self.rows.start)

    def chunks(self) -> Iterator[slice]:
        """Matrices whose p×q entries are at most `tile_entries` together, or one; the same on every process."""
        return slices(len(self.params), max(1, tile_entries(self.group) // (self.shape[0] * self.shape[1])))

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """(matrices, rows) of at most `tile_entries` entries: whole matrices together, or rows of one."""
        limit = tile_entries(self.group)
        here, q = self.all_rows.stop, self.shape[1]
        for matrices in slices(len(self.params), max(1, limit // max(1, here * q))):
            for rows in slices(here, max(1, limit // q)):
                yield matrices, rows

    def gradients(self, matrices: slice, rows: slice) -> Tensor:
        """A tile of the gradients, clipped, and negated to maximize: [n, rows, q] float32, not to be written to."""
        grads = self.grads[matrices]
        parts = grads if rows == slice(0, len(grads[0])) else [grad[rows] for grad in grads]
        stacked = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        stacked = stacked.reshape(len(parts), rows.stop - rows.start, self.shape[1]).float()
        return stacked if self.scale is None else stacked * self.scale[matrices, None, None]

    def mask(self, matrices: slice, update: Tensor) -> None:
        """Zero what is to be skipped."""
        if self.finite is not None:
            skipped = ~self.finite[matrices].to(update.device)
            update.masked_fill_(skipped.view(-1, *[1] * (update.ndim - 1)), 0)

    def write(self, matrices: slice, rows: slice, update: Tensor) -> None:
        """θ ← θ − lr (scale · update + λ θ) for a tile, rounded once to the parameter's dtype; ``update`` is used up."""
        group, params = self.group, self.params[matrices]
        lr, decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = float(lr) if lr.device.type == "cpu" else lr.reshape(())
        targets = params if rows == slice(0, len(params[0])) else [param[rows] for param in params]
        update = update.view(len(params), *targets[0].shape)
        if group["update_scale"] != 1:
            update.mul_(group["update_scale"])
        if decay:
            update.add_(targets[0] if len(params) == 1 else torch.stack(targets), alpha=decay)
        self.mask(matrices, update)
        if rounds_stochastically(params[0], group):
            update = update.mul_(-lr).add_(targets[0] if len(params) == 1 else torch.stack(targets))
            write_stochastic(targets, update, self.keys(matrices), (self.rows.start + rows.start) * self.shape[1])
        elif isinstance(lr, Tensor):
            torch._foreach_add_(targets, list(update.mul_(-lr).unbind()))
        else:
            torch._foreach_add_(targets, list(update.unbind()), alpha=-lr)

    def keys(self, matrices: slice) -> Tensor:
        """What names each matrix and step to the generator of stochastic rounding: int64 [n]."""
        steps = self.wave.stacks["step"].values[self.part]
        return random_keys(self.group["seed"], self.positions[matrices], steps[matrices])


@dataclass
class Wave:
    """Buckets of one group, rank and rule whose k×k work is done together. Stacked tensors are [N, ...] over all their matrices."""

    group: dict[str, Any]
    rule: Als | Newton
    k: int
    placement: Placement
    buckets: list[Bucket] = field(default_factory=list)
    norms: Tensor | None = None  # of this step: [N] float64 on the `float64_device`, ‖g‖_F after clipping
    scale: Tensor | None = None  # [N] float32, what each gradient is multiplied by: clipping, −1 to maximize; None: 1
    finite: Tensor | None = (
        None  # [N] bool, false where the update is skipped; None: the host has seen that all are true
    )
    keeps: bool = False  # whether stacks of the state replace it, rather than being copies (`StateStack`)
    stacks: dict[str, StateStack] = field(default_factory=dict)  # of the state that is one number a matrix
    _order: Tensor | None = None

    def __len__(self) -> int:
        return self.buckets[-1].part.stop if self.buckets else 0

    @property
    def device(self) -> torch.device:
        """Of the parameters and of the state."""
        return self.buckets[0].params[0].device

    def begin(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        norms: Tensor,
        finite: Tensor | None,
        moments: tuple[str, ...],
    ) -> None:
        """A step: all parameters and gradients of it, ‖g‖_F [M] float64 and which are usable, as the buckets' ``indices`` name them."""
        if self._order is None:
            order = [i for bucket in self.buckets for i in bucket.indices]
            self._order = filled(order, norms.device)
        self.norms = norms.gather(0, self._order)
        self.finite = None if finite is None else finite.gather(0, self._order)
        if self.finite is not None:
            self.norms = self.norms.where(self.finite, 0)
        self.scale = gradient_scale(self.norms, self.group)
        if self.scale is not None:
            self.norms = self.norms * self.scale.abs()
        if not self.stacks:
            states = [state for bucket in self.buckets for state in bucket.states]
            numbers = [name for name, value in states[0].items() if value.ndim == 0]
            self.stacks = {name: StateStack(states, [name], self.placement, self.keeps) for name in numbers}
            for bucket in self.buckets:
                names = ([f"{moment}_{side}" for moment in moments] for side in ("B", "A"))
                bucket.B, bucket.A = (StateStack(bucket.states, both, self.placement, self.keeps) for both in names)
        for stack in self._all_stacks():
            stack.refresh()
        for bucket in self.buckets:
            bucket.grads = [grads[i] for i in bucket.indices]
            # What is local of a sharded parameter is another tensor once its module has been moved to the CPU and back.
            bucket.params = [local(params[i]) for i in bucket.indices]
        self.finite, self.scale = (None if x is None else x.to(self.device) for x in (self.finite, self.scale))

    def end(self) -> None:
        """Let go of what belongs to the step."""
        self.norms = self.scale = self.finite = None
        for bucket in self.buckets:
            bucket.params, bucket.grads = [], []
        for stack in self._all_stacks():
            stack.release()

    def _all_stacks(self) -> list[StateStack]:
        return [*self.stacks.values(), *(stack for bucket in self.buckets for stack in (bucket.B, bucket.A))]

    def read(self, name: str) -> Tensor:
        """A number of each matrix's state: [N] float32."""
        return self.stacks[name].values

    def write(self, name: str, values: Tensor) -> None:
        """What is to be skipped keeps its own."""
        self.stacks[name].write(values, self.finite)

    def advance(self, started: Tensor | None) -> Tensor:
        """Count one step for every matrix; what divides its bias corrections, t ≥ 1: [N] float32.

        started: [N] bool; where it is false, the count begins at the first gradient that is not zero. None: all have started.
        """
        step = self.read("step")
        counts = (
            step + 1
            if started is None
            else torch.where(started, step + 1, (self.norms > 0).to(step.device).to(step.dtype))
        )
        self.write("step", counts)
        return counts.clamp_min(1)


def usable(norms: Any) -> Any:
    """Of a gradient's norm, or a tensor of them: whether there is a gradient, all of it finite and its squares within float32."""
    return (norms >= 0) & (norms <= MAX_NORM)  # NaN is neither


def gradient_scale(norms: Tensor, group: dict[str, Any]) -> Tensor | None:
    """What gradients of these norms [n] are multiplied by: clipped each to its own norm, negated to maximize; None: nothing."""
    bound, maximize = group["max_param_grad_norm"], group["maximize"]
    if bound is None and not maximize:
        return None
    scale = torch.ones_like(norms) if bound is None else (bound / norms.clamp_min(bound))
    return (-scale if maximize else scale).float()


def rounds_stochastically(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether this parameter is written with stochastic rounding."""
    return param.dtype == torch.bfloat16 and group["bf16_rounding"] == "stochastic"
