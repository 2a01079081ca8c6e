"""This module keeps figures of a step, such as the share of clamped entries, on the device until they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from .sharding import WHOLE, Placement


class Metrics:
    """Sums figures on the device over one recorded step. The host reads nothing before `read`."""

    def __init__(self) -> None:
        self.energy: list[Tensor] = []
        self.captured: list[Tensor] = []
        self.largest: list[Tensor] = []
        self.clamped: list[Tensor] = []
        self.entries = 0

    def add_energy(self, norms: Tensor) -> None:
        """Add the squared norms of gradients. norms: ‖g‖_F of each matrix."""
        self.energy.append(norms.square().sum())

    def add_captured(self, energy: Tensor) -> None:
        """Add the part of ‖g‖² inside the row space of m_A, summed over matrices."""
        self.captured.append(energy)

    def add_update(self, update: Tensor, bound: Tensor | None) -> None:
        """Add the sizes of a normalised update's entries before any clamp to ±bound."""
        size = update.abs()
        self.add_sizes(size.amax(), size.new_zeros(()) if bound is None else (size > bound).sum(), size.numel())

    def add_sizes(self, largest: Tensor, clamped: Tensor, entries: int) -> None:
        """Add the largest size of an entry, the number of clamped entries, and the number of all entries."""
        self.largest.append(largest)
        self.clamped.append(clamped)
        self.entries += entries

    def add_steps(self, found: Tensor, entries: int) -> None:
        """Add what a kernel has found of n matrices.

        found: ‖g‖_F, the largest update, the number of clamped entries and the captured energy, [n, 4] float64.
        entries: the number of entries of all matrices together.
        """
        norms, largest, clamped, captured = found.unbind(1)
        self.add_energy(norms)
        self.add_captured(captured.sum())
        if len(found):
            self.add_sizes(largest.amax(), clamped.sum(), entries)

    def reduce(self, placement: Placement) -> None:
        """Add what other processes saw in their rows of the same matrices. Every process has to call this."""
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
        """Add what another `Metrics` holds."""
        for name in ("energy", "captured", "largest", "clamped", "entries"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def read(self) -> dict[str, float]:
        """Return the figures by name, as `LoRAPreOptimizer.metrics` documents them. The host reads the device here."""
        values: dict[str, float] = {}
        energy = sum(t.item() for t in self.energy)
        if energy:
            values["captured_energy"] = sum(t.item() for t in self.captured) / energy
        if self.largest:
            values["largest_update"] = max(t.item() for t in self.largest)
            values["clamped_share"] = sum(t.item() for t in self.clamped) / self.entries
        return values
