"""This module looks at the gradients of a step before any update.

It finds which parameters take part, computes the norms, and counts the gradients that cannot be used.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..kernels.eager import Eager
from ..lowrank.sharding import WHOLE, Placement, local, placement_of
from .adamw_path import adamw_dtype


def takes_part(param: Tensor) -> bool:
    """Return whether a step updates the parameter.

    A sharded parameter takes part even without a gradient, with zeros for it, so that no collective waits for it.
    """
    taken = param.grad is not None or (param.requires_grad and placement_of(param) is not WHOLE)
    return taken and param.numel() > 0


def kind_of_gradient(param: Tensor) -> tuple | bool:
    """Return a gradient's shape, dtype and layout, or, if there is none, whether the parameter requires one."""
    grad = param.grad
    return param.requires_grad if grad is None else (grad.shape, grad.dtype, grad.layout)


def local_gradient(param: Tensor) -> Tensor:
    """Return this process's part of a parameter's gradient, or zeros if the parameter has none.

    A gradient that is placed otherwise than its parameter, as the products of DTensors may leave it, is redistributed.
    """
    grad = param.grad
    if grad is None:
        return torch.zeros_like(local(param))
    if isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def gradient_norms(grads: list[Tensor], absent: list[bool], placement: Placement, backend: Eager) -> Tensor:
    """Return ‖g‖_F of gradients on one device: [N] float64 on the `float64_device`, which the host does not read.

    The norm is −1 where no process has a gradient.
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
    """Counts the updates of single parameters that were skipped, and warns once.

    The host counts some of them. Devices count the others, which the host does not read before `count`.
    """

    def __init__(self) -> None:
        self._by_host = 0
        self._by_device: dict[torch.device, Tensor] = {}
        self._warned = False

    def add(self, norm: float) -> None:
        """Count one skipped update, of whose gradient the host has read the norm."""
        self._by_host += 1
        self._warn(str(norm))

    def add_unread(self, usable: Tensor, norms: Tensor) -> None:
        """Count the gradients that exist (norm not −1) and are not usable. usable, norms: [N], on a device."""
        skipped = (~usable & ~(norms < 0)).sum()
        self._by_device.setdefault(norms.device, torch.zeros_like(skipped)).add_(skipped)

    def count(self) -> int:
        """Return the count, for which the host reads the devices."""
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
