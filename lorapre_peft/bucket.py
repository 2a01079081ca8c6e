"""What a step works on: equal matrices stacked into buckets, and the state of their factored moments during one step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .rounding import random_keys, write_stochastic
from .rules import EXACT_SVD_SIZE, START_FLOOR, Als, Average, Newton, best_factors, gram_rows, top_factors

# A step holds at most this many float32 temporaries of a tile at once, and of the factors of a chunk; a test counts them.
TEMPORARIES = 8
# Entries of a tile on a CPU: more than a core's cache holds makes every pass over a tile a pass over memory.
CPU_TILE_ENTRIES = 1 << 17


def tile_entries(group: dict[str, Any]) -> int:
    """Entries of one float32 temporary: all of them together stay within half of the group's ``temporary_bytes``."""
    return max(1, group["temporary_bytes"] // (2 * 4 * TEMPORARIES))


@dataclass
class Bucket:
    """Matrices of one shape p×q, rank k and group, stepped together. Stacked tensors are [n, rows, columns], float32."""

    group: dict[str, Any]
    rule: Als | Newton
    k: int
    shape: tuple[int, int]
    fresh: bool  # `als` before its first gradient: the step starts the factors instead of following them
    params: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of the parameters in the optimizer
    indices: list[int] = field(default_factory=list)  # of the parameters among those of this step
    norms: Tensor | None = None  # [n] float64, ‖g‖_F after clipping
    scale: Tensor | None = None  # [n] what each gradient is multiplied by: clipping, −1 to maximize; None: 1
    _stacks: dict[str, Tensor] = field(default_factory=dict)
    _copies: set[str] = field(default_factory=set)  # of those, the ones that are no views
    finite: Tensor | None = (
        None  # [n] bool, false where the update is to be skipped; None: the host has seen that all are true
    )

    def add(self, param: Tensor, state: dict[str, Tensor], position: int, index: int) -> None:
        self.params.append(param)
        self.states.append(state)
        self.positions.append(position)
        self.indices.append(index)

    def set_norms(self, norms: Tensor, finite: Tensor | None) -> None:
        """Of all gradients of this step: ‖g‖_F [N] float64 and, where the host does not know it, whether it is finite."""
        index = slice(None) if len(self.indices) == len(norms) else self.indices
        self.norms = norms[index]
        self.finite = None if finite is None else finite[index]
        if self.finite is not None:
            self.norms = self.norms.where(self.finite, 0)
        self.scale = gradient_scale(self.norms, self.group)
        if self.scale is not None:
            self.norms = self.norms * self.scale.abs()

    def chunks(self) -> Iterator[Bucket]:
        """Buckets whose factors have at most `tile_entries` entries, or of a single matrix."""
        size = max(1, tile_entries(self.group) // (sum(self.shape) * self.k))
        for i in range(0, len(self.params), size):
            part = slice(i, i + size)
            chunk = Bucket(self.group, self.rule, self.k, self.shape, self.fresh)
            for name in ("params", "states", "positions", "indices", "norms", "scale", "finite"):
                value = getattr(self, name)
                setattr(chunk, name, value if value is None else value[part])
            yield chunk

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """(matrices, rows) for a step: tiles of at most `tile_entries` entries, on a CPU also of `CPU_TILE_ENTRIES`."""
        limit = tile_entries(self.group)
        return self._blocks(min(limit, CPU_TILE_ENTRIES) if self.params[0].device.type == "cpu" else limit)

    def _blocks(self, limit: int) -> Iterator[tuple[slice, slice]]:
        """(matrices, rows) of at most ``limit`` entries: whole matrices together, or rows of one."""
        p, q = self.shape
        matrices = max(1, limit // (p * q))
        rows = min(p, max(1, limit // q))
        for i in range(0, len(self.params), matrices):
            for j in range(0, p, rows):
                yield slice(i, min(i + matrices, len(self.params))), slice(j, min(j + rows, p))

    def gradients(self, matrices: slice, rows: slice) -> Tensor:
        """A tile of the gradients, clipped, and negated to maximize: [n, rows, q] float32, not to be written to."""
        p, q = self.shape
        whole = rows == slice(0, p)
        parts = [param.grad if whole else param.grad[rows] for param in self.params[matrices]]
        stacked = (parts[0][None] if len(parts) == 1 else torch.stack(parts)).reshape(len(parts), -1, q).float()
        return stacked if self.scale is None else stacked * self.scale[matrices, None, None]

    def stack(self, name: str) -> Tensor:
        """One state tensor of every matrix, [n, ...]: a view of the state if the matrices' tensors lie side by side.

        They do from the first step on, unless the matrices that take part change.
        """
        if name not in self._stacks:
            tensors = [state[name] for state in self.states]
            view = _side_by_side(tensors)
            if view is None:
                view = torch.stack(tensors)
                if all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors):
                    for state, value in zip(self.states, view.unbind()):
                        state[name] = value
                else:
                    self._copies.add(name)
            self._stacks[name] = view
        return self._stacks[name]

    def store(self, name: str, values: Tensor) -> None:
        """Write stacked values into every matrix's state; what is to be skipped keeps its own."""
        stack = self.stack(name)
        if self.finite is not None:
            values = torch.where(self.finite.view(-1, *[1] * (values.ndim - 1)), values.to(stack.dtype), stack)
        stack.copy_(values)
        if name in self._copies:
            torch._foreach_copy_([state[name] for state in self.states], list(stack.unbind()))

    def advance(self) -> Tensor:
        """Count one step for every matrix; the new counts t: [n] float32."""
        self.store("step", self.stack("step") + 1)
        return self.stack("step")

    def mask(self, matrices: slice, update: Tensor) -> None:
        """Zero what is to be skipped."""
        if self.finite is not None:
            update.masked_fill_(~self.finite[matrices].view(-1, *[1] * (update.ndim - 1)), 0)

    def write(self, matrices: slice, rows: slice, update: Tensor) -> None:
        """θ ← θ − lr (scale · update + λ θ) for a tile, rounded once to the parameter's dtype; ``update`` is used up."""
        group, params = self.group, self.params[matrices]
        lr, decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = float(lr) if lr.device.type == "cpu" else lr.reshape(())
        whole = rows == slice(0, self.shape[0])
        targets = [param if whole else param[rows] for param in params]
        update = update.view(len(params), *targets[0].shape)
        if group["update_scale"] != 1:
            update.mul_(group["update_scale"])
        if decay:
            update.add_(targets[0] if len(params) == 1 else torch.stack(targets), alpha=decay)
        self.mask(matrices, update)
        if rounds_stochastically(params[0], group):
            update = update.mul_(-lr).add_(targets[0] if len(params) == 1 else torch.stack(targets))
            keys = random_keys(group["seed"], self.positions[matrices], self.stack("step")[matrices])
            write_stochastic(targets, update, keys, rows.start * self.shape[1])
        elif isinstance(lr, Tensor):
            torch._foreach_add_(targets, list(update.mul_(-lr).unbind()))
        else:
            torch._foreach_add_(targets, list(update.unbind()), alpha=-lr)

    def start(self, moment: str, scale: float, *, absolute: bool = False) -> Tensor:
        """Set a moment's factors to the best rank-k approximation of scale · g, or of scale · |g|; their ‖B A‖²_F, [n] float64."""
        blocks = itertools.groupby(
            self._blocks(tile_entries(self.group)), key=lambda block: (block[0].start, block[0].stop)
        )
        parts = [
            self._start_factors(slice(*matrices), [rows for _, rows in tiles], absolute) for matrices, tiles in blocks
        ]
        B, A = (torch.cat(factors) * scale**0.5 for factors in zip(*parts))
        self.store(f"{moment}_B", B)
        self.store(f"{moment}_A", A)
        return (gram_rows(B.mT) * gram_rows(A)).sum((-2, -1))

    def _start_factors(self, matrices: slice, tiles: list[slice], absolute: bool) -> tuple[Tensor, Tensor]:
        """The best rank-k approximation of some matrices' g or |g|, read in these tiles of rows."""

        def x(rows: slice) -> Tensor:
            g = self.gradients(matrices, rows)
            return g.abs() if absolute else g

        if min(self.shape) <= EXACT_SVD_SIZE and len(tiles) == 1:
            return best_factors(x(tiles[0]), self.k, START_FLOOR)
        return top_factors(
            lambda Q: torch.cat([x(rows) @ Q for rows in tiles], dim=-2),
            lambda Y: sum(x(rows).mT @ Y[..., rows, :] for rows in tiles),
            self.shape,
            self.k,
            like=self.stack("m_B")[matrices],
            floor=START_FLOOR,
        )


def _side_by_side(tensors: list[Tensor]) -> Tensor | None:
    """Equal tensors that follow each other in one storage, as one stacked view of it."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]

    size = first.nbytes
    if first.is_meta:
        addresses = [tensor.storage_offset() * first.element_size() for tensor in tensors]
    else:
        addresses = list(map(Tensor.data_ptr, tensors))
    if addresses != list(range(addresses[0], addresses[0] + len(tensors) * size, size)):
        return None
    end = first.storage_offset() * first.element_size() + len(tensors) * size
    if first.untyped_storage().nbytes() < end:
        return None
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()), first.storage_offset())


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


class Moment:
    """One factored moment of a bucket during one step: read from the old factors, then moved on.

    B [n, p, k] and A [n, k, q] are the old factors, R = (A Aᵀ + damping)⁻¹ [n, k, k]; B' = keep · B + gain · X with
    keep and gain [n, 1, 1]. A backend fills B_new [n, p, k] and projected = Bᵀx [n, k, q].
    """

    def __init__(self, bucket: Bucket, name: str, average: Average, residual_weight: float | None = None):
        self.bucket, self.name, self.average, self.rule = bucket, name, average, bucket.rule
        self.rows = self.rule.rows(average, residual_weight)
        self.B, self.A = bucket.stack(f"{name}_B"), bucket.stack(f"{name}_A")
        self.gram = gram_rows(self.A)
        self.R = self.rule.inverse(self.gram).float()
        unit = self.rule.unit(self.gram, bucket.norms, self.rows).float()[:, None, None]
        self.keep, self.gain = self.rows.keep * unit, self.rows.gain * unit
        self.B_new = torch.empty_like(self.B)
        self.projected = torch.zeros_like(self.A)

    def finish(self) -> Tensor:
        """Store the new factors, once every row has been fed; ‖B'A'‖²_F of the new ones, [n] float64."""
        grams = self.rule.grams(self.B, self.B_new)
        A, scale, gram = self.rule.columns(self.A, grams, self.projected, self.average)
        self.bucket.store(f"{self.name}_B", self.B_new.mul_(scale))
        self.bucket.store(f"{self.name}_A", A)
        return (gram * gram_rows(A)).sum((-2, -1))

    def captured(self) -> Tensor:
        """‖X A‖²_F over all matrices, of what x has inside the row space of the old A; before `finish`."""
        X = (self.B_new.double() - self.keep * self.B) / self.gain
        self.bucket.mask(slice(None), X)
        return (gram_rows(X.mT) * self.gram).sum()


class Metrics:
    """Sums kept on the device over one recorded step; nothing is read before `read`."""

    def __init__(self) -> None:
        self.energy: list[Tensor] = []
        self.captured: list[Tensor] = []
        self.largest: list[Tensor] = []
        self.clamped: list[Tensor] = []
        self.entries = 0

    def add_energy(self, norms: Tensor, captured: Tensor) -> None:
        """norms: ‖g‖_F of each matrix; captured: the part of their squares inside the row space of m_A."""
        self.energy.append(norms.square().sum())
        self.captured.append(captured)

    def add_update(self, update: Tensor, bound: float | None) -> None:
        """update: the normalised update before any clamp to ±bound."""
        size = update.abs()
        self.add_sizes(size.amax(), size.new_zeros(()) if bound is None else (size > bound).sum(), size.numel())

    def add_sizes(self, largest: Tensor, clamped: Tensor, entries: int) -> None:
        """The largest size of an entry, how many were clamped, and of how many."""
        self.largest.append(largest)
        self.clamped.append(clamped)
        self.entries += entries

    def read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        energy = sum(t.item() for t in self.energy)
        if energy:
            values["captured_energy"] = sum(t.item() for t in self.captured) / energy
        if self.largest:
            values["largest_update"] = max(t.item() for t in self.largest)
            values["clamped_share"] = sum(t.item() for t in self.clamped) / self.entries
        return values
