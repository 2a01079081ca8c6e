"""The gradients of a step before any update: which parameters take part, their norms, and the count of those that
cannot be used.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..kernels.eager import Eager
from ..lowrank.sharding import WHOLE, Placement, local, placement_of
from .adamw_path import adamw_dtype


def takes_part(param: Tensor) -> bool:
    """Whether a step updates the parameter. Sharded ones all take part, with zeros, so that no collective waits for
    them.
    """
    taken = param.grad is not None or (param.requires_grad and placement_of(param) is not WHOLE)
    return taken and param.numel() > 0


def kind_of_gradient(param: Tensor) -> tuple | None:
    """Return what a step has to know of a gradient beside its values: dtype and layout; None if there is none."""
    grad = param.grad
    return None if grad is None else (grad.dtype, grad.layout)


def local_gradient(param: Tensor) -> Tensor:
    """Return this process's part of a parameter's gradient; zeros where it has none."""
    return torch.zeros_like(local(param)) if param.grad is None else local(param.grad)


def gradient_norms(grads: list[Tensor], absent: list[bool], placement: Placement, backend: Eager) -> Tensor:
    """Return ‖g‖_F of gradients on one device, not read: [N] float64 on the `float64_device`, −1 where no process has
    a gradient.
    """
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
    """Counts the updates of single parameters that were skipped, as the host or, unread, a device sees them; it warns
    once.
    """

    def __init__(self) -> None:
        self._by_host = 0
        self._by_device: dict[torch.device, Tensor] = {}
        self._warned = False

    def add(self, norm: float) -> None:
        """Count one that the host has seen."""
        self._by_host += 1
        self._warn(str(norm))

    def add_unread(self, usable: Tensor, norms: Tensor) -> None:
        """Count, of gradients' norms [N], those that are not usable, without those that do not exist (−1)."""
        skipped = (~usable & ~(norms < 0)).sum()
        self._by_device.setdefault(norms.device, torch.zeros_like(skipped)).add_(skipped)

    def count(self) -> int:
        """Return the count; this reads the devices."""
        by_device = sum(int(count) for count in self._by_device.values())
        if by_device:
            self._warn("nan or inf, or one whose square float32 cannot hold")
        return self._by_host + by_device

    def _warn(self, found: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a gradient has the norm {found}: the update of that parameter is skipped and its state kept. This "
                "is said once; `optimizer.skipped_updates` counts on. Skips that keep coming mean that training has "
                "diverged (lower the learning rate) or that the loss scale of fp16 is still settling.",
                stacklevel=5,
            )
