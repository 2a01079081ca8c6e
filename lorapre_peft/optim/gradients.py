"""The gradients of a step before any update: whose turn it is, their norms, and the count of those that cannot be used."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..lowrank.sharding import WHOLE, Placement, local, placement_of
from .adamw_path import adamw_dtype

if TYPE_CHECKING:
    from ..kernels.eager import Eager


def takes_part(param: Tensor) -> bool:
    """Whether a step updates the parameter. Of sharded ones all take part, with zeros, so that no collective waits for them."""
    return param.grad is not None or (param.requires_grad and placement_of(param) is not WHOLE)


def local_gradient(param: Tensor) -> Tensor:
    """This process's part of a parameter's gradient; zeros where it has none."""
    return torch.zeros_like(local(param)) if param.grad is None else local(param.grad)


def reads_are_free(device: torch.device) -> bool:
    """Whether the host reads a tensor there without waiting for anything."""
    return device.type == "cpu"


def gradient_norms(grads: list[Tensor], absent: list[bool], placement: Placement, backend: Eager) -> Tensor:
    """‖g‖_F of gradients in one place, not read: [N] float64 on their `float64_device`, −1 where no process has a gradient."""
    alike: dict[torch.dtype, list[int]] = {}
    for i, grad in enumerate(grads):
        alike.setdefault(grad.dtype, []).append(i)
    found = {
        dtype: backend.norms([grads[i] for i in indices], adamw_dtype(grads[indices[0]]))
        for dtype, indices in alike.items()
    }
    if len(found) == 1:
        (result,) = found.values()
    else:
        parts = {i: norm for dtype, indices in alike.items() for i, norm in zip(indices, found[dtype].unbind())}
        result = torch.stack([parts[i] for i in range(len(grads))])
    if placement is WHOLE:
        return result
    squares = result.square()
    present = torch.tensor([not no_gradient for no_gradient in absent], dtype=torch.float64).to(result.device)
    placement.sum([squares, present])()
    return torch.where(present > 0, squares.sqrt(), -1)


class Skips:
    """How many updates of single parameters were skipped, on the host or, uncounted by it, on a device. It warns once."""

    def __init__(self) -> None:
        self._by_host = 0
        self._by_device: dict[torch.device, Tensor] = {}
        self._warned = False

    def add(self, norm: float) -> None:
        """One that the host has seen."""
        self._by_host += 1
        self._warn(str(norm))

    def add_unread(self, usable: Tensor, norms: Tensor) -> None:
        """Of gradients' norms [N]: those that are not usable, without those that do not exist (−1)."""
        skipped = (~usable & ~(norms < 0)).sum()
        self._by_device.setdefault(norms.device, torch.zeros_like(skipped)).add_(skipped)

    def count(self) -> int:
        """Reads the devices."""
        by_device = sum(int(count) for count in self._by_device.values())
        if by_device:
            self._warn("nan or inf, or one whose square float32 cannot hold")
        return self._by_host + by_device

    def _warn(self, found: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a gradient has the norm {found}: the update of that parameter is skipped and its state kept. This is said "
                "once; `optimizer.skipped_updates` counts on. Skips that keep coming mean that training has diverged "
                "(lower the learning rate) or that the loss scale of fp16 is still settling.",
                stacklevel=5,
            )
