"""How a step walks through matrices: equal ones are stacked into buckets, large ones are cut into tiles of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .rounding import rounding_key, write_stochastic
from .rules import EXACT_SVD_SIZE, START_FLOOR, Als, Average, Newton, best_factors, gram_rows, top_factors

# A step holds at most this many float32 temporaries of a tile at once; a test counts them.
TEMPORARIES = 8


def tile_entries(group: dict[str, Any]) -> int:
    """Entries of one float32 temporary: all of them together stay within the group's ``temporary_bytes``."""
    return max(1, group["temporary_bytes"] // (4 * TEMPORARIES))


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
    norms: list[float] = field(default_factory=list)  # ‖g‖_F, after clipping
    scales: list[float] = field(default_factory=list)  # what each gradient is multiplied by: clipping, −1 to maximize
    positions: list[int] = field(default_factory=list)  # of the parameters in the optimizer

    def add(self, param: Tensor, state: dict[str, Tensor], norm: float, position: int) -> None:
        clip = clip_factor(norm, self.group["max_param_grad_norm"])
        self.params.append(param)
        self.states.append(state)
        self.norms.append(norm * clip)
        self.scales.append(-clip if self.group["maximize"] else clip)
        self.positions.append(position)

    def chunks(self) -> Iterator[Bucket]:
        """Buckets of at most `tile_entries` entries, or of a single matrix."""
        size = max(1, tile_entries(self.group) // (self.shape[0] * self.shape[1]))
        for i in range(0, len(self.params), size):
            chunk = Bucket(self.group, self.rule, self.k, self.shape, self.fresh)
            for name in ("params", "states", "norms", "scales", "positions"):
                setattr(chunk, name, getattr(self, name)[i : i + size])
            yield chunk

    def tiles(self) -> Iterator[slice]:
        """Row slices of at most `tile_entries` entries over the stacked matrices."""
        p, q = self.shape
        rows = max(1, tile_entries(self.group) // (len(self.params) * q))
        return (slice(i, min(i + rows, p)) for i in range(0, p, rows))

    def gradients(self, rows: slice) -> Tensor:
        """Those rows of the gradients, clipped, and negated to maximize: [n, rows, q] float32, not to be written to."""
        parts = [param.grad[rows].reshape(-1, self.shape[1]).float() for param in self.params]
        stacked = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        return stacked if all(scale == 1 for scale in self.scales) else stacked * self.column(self.scales)

    def stack(self, name: str) -> Tensor:
        """One state tensor of every matrix, stacked along a new first dimension (a copy)."""
        return torch.stack([state[name] for state in self.states])

    def store(self, name: str, values: Tensor) -> None:
        """Write stacked values back into every matrix's state."""
        for state, value in zip(self.states, values):
            state[name].copy_(value)

    def advance(self) -> list[float]:
        """Count one step for every matrix; the new counts t."""
        for state in self.states:
            state["step"] += 1
        return [float(state["step"]) for state in self.states]

    def column(self, values: list[float]) -> Tensor:
        """One number per matrix as [n, 1, 1] float32 on the parameters' device."""
        return torch.tensor(values, dtype=torch.float32, device=self.params[0].device)[:, None, None]

    def write(self, rows: slice, update: Tensor) -> None:
        """θ ← θ − lr (scale · update + λ θ) for those rows, rounded once to the parameter's dtype; ``update`` is used up."""
        group = self.group
        lr, decay = float(group["lr"]), group["weight_decay"]
        if group["update_scale"] != 1:
            update.mul_(group["update_scale"])
        for param, state, position, u in zip(self.params, self.states, self.positions, update):
            target = param[rows]
            u = u.view(target.shape)
            if decay:
                u.add_(target, alpha=decay)
            if rounds_stochastically(param, group):
                key = rounding_key(group["seed"], int(state["step"]), position)
                write_stochastic(target, u.mul_(-lr).add_(target), key, rows.start * self.shape[1])
            else:
                target.add_(u, alpha=-lr)

    def start(self, moment: str, scale: float, *, absolute: bool = False) -> None:
        """Set a moment's factors to the best rank-k approximation of scale · g, or of scale · |g|."""
        p, q = self.shape

        def x(rows: slice) -> Tensor:
            g = self.gradients(rows)
            return g.abs() if absolute else g

        tiles = list(self.tiles())
        if min(p, q) <= EXACT_SVD_SIZE and len(tiles) == 1:
            B, A = best_factors(x(tiles[0]), self.k, START_FLOOR)
        else:
            B, A = top_factors(
                lambda Q: torch.cat([x(rows) @ Q for rows in tiles], dim=-2),
                lambda Y: sum(x(rows).mT @ Y[..., rows, :] for rows in tiles),
                self.shape,
                self.k,
                like=self.stack(f"{moment}_B"),
                floor=START_FLOOR,
            )
        self.store(f"{moment}_B", B * scale**0.5)
        self.store(f"{moment}_A", A * scale**0.5)


def clip_factor(norm: float, max_norm: float | None) -> float:
    """What brings a gradient of that norm down to ``max_norm``; 1 if it is below, or there is no bound."""
    return 1.0 if max_norm is None or norm <= max_norm else max_norm / norm


def rounds_stochastically(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether this parameter is written with stochastic rounding."""
    return param.dtype == torch.bfloat16 and group["bf16_rounding"] == "stochastic"


class Moment:
    """One factored moment of a bucket during one step: read tile by tile from the old factors, then moved on."""

    def __init__(self, bucket: Bucket, name: str, average: Average):
        self.bucket, self.name, self.average, self.rule = bucket, name, average, bucket.rule
        self.B, self.A = bucket.stack(f"{name}_B"), bucket.stack(f"{name}_A")
        self.pinv = self.rule.pinv(self.A)
        self.B_new = torch.empty_like(self.B)
        self.sums: tuple[Tensor, ...] | None = None

    def feed(self, rows: slice, x: Tensor) -> Tensor:
        """Take in rows of x; returns their least-squares fit X [n, rows, k], so that X A is x inside the row space of A."""
        fit = x @ self.pinv.mT
        B = self.B[:, rows]
        self.B_new[:, rows] = B_new = self.rule.rows(B, fit, self.average)
        sums = self.rule.sums(B, B_new, x)
        self.sums = sums if self.sums is None else tuple(a + b for a, b in zip(self.sums, sums))
        return fit

    def product(self, rows: slice) -> Tensor:
        """Those rows of the old B A: [n, rows, q]."""
        return self.B[:, rows] @ self.A

    def squared_norm(self) -> Tensor:
        """‖B A‖²_F of the old factors from their Gram matrices: [n] float64."""
        return (gram_rows(self.B.mT) * gram_rows(self.A)).sum((-2, -1))

    def finish(self) -> None:
        """Store the new factors, once every row has been fed."""
        B, A = self.rule.columns(self.A, self.B_new, self.sums, self.average)
        self.bucket.store(f"{self.name}_B", B)
        self.bucket.store(f"{self.name}_A", A)


def momentum_tile(
    moment: Moment, rows: slice, g: Tensor, residual_weight: float | None, metrics: Metrics | None
) -> Tensor:
    """Those rows of the momentum for this step's update, and g fed to its factors: [n, rows, q], the caller's to change."""
    fit = moment.feed(rows, g)
    if metrics is not None:
        metrics.add_captured((fit @ moment.A).square().sum())
    residual = moment.rule.residual(moment.average, residual_weight)
    coefficients = moment.rule.coefficients(moment.B[:, rows], fit, moment.average, residual)
    return (coefficients @ moment.A).add_(g, alpha=residual)


class Metrics:
    """Sums kept on the device over one recorded step; nothing is read before `read`."""

    def __init__(self) -> None:
        self.energy = 0.0
        self.captured: list[Tensor] = []
        self.largest: list[Tensor] = []
        self.clamped: list[Tensor] = []
        self.entries = 0

    def add_captured(self, energy: Tensor) -> None:
        self.captured.append(energy)

    def add_update(self, update: Tensor, bound: float | None) -> None:
        """update: the normalised update before any clamp to ±bound."""
        size = update.abs()
        self.largest.append(size.amax())
        self.entries += size.numel()
        if bound is not None:
            self.clamped.append((size > bound).sum())

    def read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        if self.captured and self.energy:
            values["captured_energy"] = sum(t.item() for t in self.captured) / self.energy
        if self.largest:
            values["largest_update"] = max(t.item() for t in self.largest)
            values["clamped_share"] = sum(t.item() for t in self.clamped) / self.entries
        return values
