"""What a step works on: equal matrices stacked into buckets, and the state of their factored moments during one step."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .placement import WHOLE, Placement, local
from .rounding import random_keys, write_stochastic
from .rules import EXACT_SVD_SIZE, START_FLOOR, Als, Average, Newton, Rows, best_factors, gram_rows, top_factors

if TYPE_CHECKING:
    from .backends import Eager

# A step holds at most this many float32 temporaries of a tile at once, and of the factors of a chunk; a test counts them.
TEMPORARIES = 8
# The largest gradient norm whose square float32 holds; second moments beyond it would be infinite.
MAX_NORM = torch.finfo(torch.float32).max ** 0.5
# Entries of a tile on a CPU at most: smaller ones would stay in a core's cache, but on 2 cores the fixed cost of each parallel
# operation weighs more (four layers of SmolLM2: 139 ms with 2^17 entries, 100 ms with 2^20).
CPU_TILE_ENTRIES = 1 << 20


def tile_entries(group: dict[str, Any]) -> int:
    """Entries of one float32 temporary: all of them together stay within half of the group's ``temporary_bytes``."""
    return max(1, group["temporary_bytes"] // (2 * 4 * TEMPORARIES))


@dataclass
class Bucket:
    """Matrices of one shape p×q, rank k and group, stepped together. Stacked tensors are [n, rows, columns], float32.

    Of matrices that are sharded over processes, parameters, gradients and B factors are this process's rows.
    """

    group: dict[str, Any]
    rule: Als | Newton
    k: int
    shape: tuple[int, int]
    placement: Placement
    fresh: bool  # `als` before its first gradient: the step starts the factors instead of following them
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of the parameters in the optimizer
    indices: list[int] = field(default_factory=list)  # of the parameters among those of this step
    norms: Tensor | None = None  # [n] float64, ‖g‖_F after clipping
    scale: Tensor | None = None  # [n] what each gradient is multiplied by: clipping, −1 to maximize; None: 1
    finite: Tensor | None = (
        None  # [n] bool, false where the update is skipped; None: the host has seen that all are true
    )
    _stacks: dict[str, Tensor] = field(default_factory=dict)
    _copies: set[str] = field(default_factory=set)  # of those, the ones that are no views

    @property
    def rows(self) -> slice:
        """The rows of the p×q matrices that are here."""
        return self.placement.rows(self.shape[0])

    def add(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], position: int, index: int) -> None:
        self.params.append(param)
        self.grads.append(grad)
        self.states.append(state)
        self.positions.append(position)
        self.indices.append(index)

    def set_norms(self, norms: list[Tensor], masked: bool) -> None:
        """Of all gradients of this step: ‖g‖_F, each [] float64; ``masked``: the host has not read them."""
        # No indexing by a list, which would be a copy from the host.
        self.norms = torch.stack([norms[i] for i in self.indices])
        self.finite = usable(self.norms) if masked else None
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
            chunk = Bucket(self.group, self.rule, self.k, self.shape, self.placement, self.fresh)
            for name in ("params", "grads", "states", "positions", "indices", "norms", "scale", "finite"):
                value = getattr(self, name)
                setattr(chunk, name, value if value is None else value[part])
            yield chunk

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """(matrices, rows) for a step: tiles of at most `tile_entries` entries, on a CPU also of `CPU_TILE_ENTRIES`."""
        limit = tile_entries(self.group)
        return self._blocks(min(limit, CPU_TILE_ENTRIES) if self.params[0].device.type == "cpu" else limit)

    def _blocks(self, limit: int) -> Iterator[tuple[slice, slice]]:
        """(matrices, rows) of at most ``limit`` entries: whole matrices together, or rows of one."""
        here, q = self.rows.stop - self.rows.start, self.shape[1]
        matrices = max(1, limit // max(1, here * q))
        rows = max(1, min(here, limit // q))
        for i in range(0, len(self.params), matrices):
            for j in range(0, here, rows):
                yield slice(i, min(i + matrices, len(self.params))), slice(j, min(j + rows, here))

    def gradients(self, matrices: slice, rows: slice) -> Tensor:
        """A tile of the gradients, clipped, and negated to maximize: [n, rows, q] float32, not to be written to."""
        grads = self.grads[matrices]
        parts = grads if rows == slice(0, len(grads[0])) else [grad[rows] for grad in grads]
        stacked = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        stacked = stacked.reshape(len(parts), rows.stop - rows.start, self.shape[1]).float()
        return stacked if self.scale is None else stacked * self.scale[matrices, None, None]

    def stack(self, name: str) -> Tensor:
        """One state tensor of every matrix, [n, ...]: a view of the state if the matrices' tensors lie side by side.

        They do from the first step on, unless the matrices that take part change.
        """
        if name not in self._stacks:
            tensors = [local(state[name]) for state in self.states]
            view = _side_by_side(tensors)
            if view is None:
                view = torch.stack(tensors)
                if self.placement is WHOLE and all(t.untyped_storage().nbytes() == t.nbytes for t in tensors):
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
            torch._foreach_copy_([local(state[name]) for state in self.states], list(stack.unbind()))

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
        targets = params if rows == slice(0, len(params[0])) else [param[rows] for param in params]
        update = update.view(len(params), *targets[0].shape)
        if group["update_scale"] != 1:
            update.mul_(group["update_scale"])
        if decay:
            update.add_(targets[0] if len(params) == 1 else torch.stack(targets), alpha=decay)
        self.mask(matrices, update)
        if rounds_stochastically(params[0], group):
            update = update.mul_(-lr).add_(targets[0] if len(params) == 1 else torch.stack(targets))
            keys = random_keys(group["seed"], self.positions[matrices], self.stack("step")[matrices])
            write_stochastic(targets, update, keys, (self.rows.start + rows.start) * self.shape[1])
        elif isinstance(lr, Tensor):
            torch._foreach_add_(targets, list(update.mul_(-lr).unbind()))
        else:
            torch._foreach_add_(targets, list(update.unbind()), alpha=-lr)

    def start(self, moment: str, scale: float, *, absolute: bool = False) -> Tensor:
        """Set a moment's factors to the best rank-k approximation of scale · g, or of scale · |g|; their ‖B A‖²_F, [n] float64."""
        size = max(1, tile_entries(self.group) // (self.shape[0] * self.shape[1]))
        n = len(self.params)
        parts = [self._start_factors(slice(i, min(i + size, n)), absolute) for i in range(0, n, size)]
        B, A = (torch.cat(factors) * scale**0.5 for factors in zip(*parts))
        self.store(f"{moment}_B", B[:, self.rows])
        self.store(f"{moment}_A", A)
        return (gram_rows(B.mT) * gram_rows(A)).sum((-2, -1))

    def _start_factors(self, matrices: slice, absolute: bool) -> tuple[Tensor, Tensor]:
        """The best rank-k approximation of some matrices' g or |g|: B of all rows, and A, the same on every process."""
        (p, q), here = self.shape, self.rows

        def x(rows: slice) -> Tensor:
            g = self.gradients(matrices, rows)
            return g.abs() if absolute else g

        limit = tile_entries(self.group)
        if min(p, q) <= EXACT_SVD_SIZE and p * q <= limit:
            whole = x(slice(0, here.stop - here.start))
            return best_factors(self.placement.gather(whole, p), self.k, START_FLOOR)
        step = max(1, limit // q)
        tiles = [slice(i, min(i + step, here.stop)) for i in range(here.start, here.stop, step)]
        own = [slice(tile.start - here.start, tile.stop - here.start) for tile in tiles]
        like = self.stack("m_A")[matrices]

        def times(Q: Tensor) -> Tensor:
            products = [x(rows) @ Q for rows in own] or [Q.new_empty(len(like), 0, Q.shape[-1])]
            return self.placement.gather(torch.cat(products, dim=-2), p)

        def transposed_times(Y: Tensor) -> Tensor:
            total = Y.new_zeros(len(like), q, Y.shape[-1])
            for rows, tile in zip(own, tiles):
                total += x(rows).mT @ Y[..., tile, :]
            self.placement.sum([total])()
            return total

        return top_factors(times, transposed_times, self.shape, self.k, like=like, floor=START_FLOOR)


def _side_by_side(tensors: list[Tensor]) -> Tensor | None:
    """Equal tensors that follow each other in one storage, as one stacked view of it."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    size = first.nbytes
    if size == 0:
        return None
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


def usable(norms: Tensor) -> Tensor:
    """Of gradients' norms: whether there is a gradient, all of it finite and its squares within float32."""
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


def prepare_moment(rule: Als | Newton, rows: Rows, A: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of A [n, k, q] and ‖x‖_F [n]: A Aᵀ float64, R = (A Aᵀ + damping)⁻¹ [n, k, k], and keep and gain of B' [n, 1, 1]."""
    gram = gram_rows(A)
    unit = rule.unit(gram, norms, rows).float()[:, None, None]
    return gram, rule.inverse(gram).float(), rows.keep * unit, rows.gain * unit


def finish_moment(
    rule: Als | Newton, average: Average, A: Tensor, B_new: Tensor, grams: Tensor, projected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The new B and A, given the sums over all rows, and the rule's ‖B A‖²_F of them: [n] float64."""
    A_new, scale, squared_norm = rule.columns(A, grams, projected, average)
    return B_new * scale, A_new, squared_norm


class Moment:
    """One factored moment of a bucket during one step: read from the old factors, then moved on.

    B [n, p, k] and A [n, k, q] are the old factors, R = (A Aᵀ + damping)⁻¹ [n, k, k]; B' = keep · B + gain · X with
    keep and gain [n, 1, 1]. A backend fills B_new [n, p, k] and projected = Bᵀx [n, k, q].
    """

    def __init__(
        self, backend: Eager, bucket: Bucket, name: str, average: Average, residual_weight: float | None = None
    ):
        self.backend, self.bucket, self.name, self.average = backend, bucket, name, average
        self.rule = bucket.rule
        self.rows = self.rule.rows(average, residual_weight)
        self.B, self.A = bucket.stack(f"{name}_B"), bucket.stack(f"{name}_A")
        self.gram, self.R, self.keep, self.gain = backend.run(
            prepare_moment, self.rule, self.rows, self.A, bucket.norms
        )
        self.B_new = torch.empty_like(self.B)
        self.projected = torch.zeros_like(self.A)

    def sums(self) -> Tensor:
        """The Gram matrices of the rows that are here, for `finish`: [n, k, k] or [n, k, 2k] float64."""
        return self.rule.grams(self.B, self.B_new)

    def finish(self, grams: Tensor) -> Tensor:
        """Store the new factors, given `sums` over all rows, `projected` likewise; ‖B'A'‖²_F, [n] float64."""
        B, A, squared_norm = self.backend.run(
            finish_moment, self.rule, self.average, self.A, self.B_new, grams, self.projected
        )
        self.bucket.store(f"{self.name}_B", B)
        self.bucket.store(f"{self.name}_A", A)
        return squared_norm

    def captured(self) -> Tensor:
        """‖X A‖²_F of the rows that are here, over all matrices: what x has inside the row space of the old A. Before `finish`."""
        X = (self.B_new.double() - self.keep * self.B) / self.gain
        self.bucket.mask(slice(None), X)
        return (gram_rows(X.mT) * self.gram).sum()


def finish_moments(bucket: Bucket, moments: list[Moment]) -> Generator[None, None, list[Tensor]]:
    """Add up what the moments' column parts need over the processes that share the rows, then `finish` each.

    Stops once, while the sums are on their way; without such processes not at all. Two collectives: the projections are float32,
    the Gram matrices float64, so that a Cholesky factorisation sees what a single process's would.
    """
    grams = [moment.sums() for moment in moments]
    waits = [bucket.placement.sum([moment.projected for moment in moments]), bucket.placement.sum(grams)]
    if bucket.placement is not WHOLE:
        yield
    for wait in waits:
        wait()
    return [moment.finish(gram) for moment, gram in zip(moments, grams)]


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

    def reduce(self, placement: Placement) -> None:
        """Add what the other processes saw of the rows that they share with this one; every process has to call it."""
        if placement is WHOLE or not self.captured:
            return
        entries = torch.tensor(float(self.entries), dtype=torch.float64, device=self.captured[0].device)
        sums = [torch.stack(self.captured).double().sum(), entries]
        sums += [torch.stack([t.double() for t in self.clamped]).sum()] if self.clamped else [entries.new_zeros(())]
        placement.sum(sums)()
        self.captured, self.clamped, self.entries = [sums[0]], [sums[2]], int(sums[1])
        largest = torch.stack(self.largest).amax() if self.largest else entries.new_zeros((), dtype=torch.float32)
        self.largest = [placement.largest(largest)] if self.entries else []

    def merge(self, other: Metrics) -> None:
        """Add what another one holds."""
        for name in ("energy", "captured", "largest", "clamped", "entries"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        energy = sum(t.item() for t in self.energy)
        if energy:
            values["captured_energy"] = sum(t.item() for t in self.captured) / energy
        if self.largest:
            values["largest_update"] = max(t.item() for t in self.largest)
            values["clamped_share"] = sum(t.item() for t in self.clamped) / self.entries
        return values
