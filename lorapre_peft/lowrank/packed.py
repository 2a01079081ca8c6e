"""State tensors of many matrices as one, without a copy of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .float64 import narrow
from .sharding import WHOLE, Placement, local


class StateStack:
    """Equal state tensors of several matrices, name after name, as one tensor ``values`` [len(names) · n, ...].

    A view of them if they lie side by side in one storage. Others are replaced by views of a common one if ``keeps``, or if each
    owns its storage; else, as for a step in which only some of those take part that share a storage, they are copied, and written back.
    """

    def __init__(self, states: list[dict[str, Tensor]], names: list[str], placement: Placement, keeps: bool):
        self._states, self._names, self._placement, self._keeps = states, names, placement, keeps
        self._tensors: list[Tensor] = []
        self._copied: list[Tensor] = []
        self._address = 0
        self.values = torch.empty(0)

    def refresh(self) -> None:
        """Before each step: look whether the state's tensors are still those that this is a view of."""
        found = [state[name] for name in self._names for state in self._states]
        same = len(self._tensors) == len(found) and all(map(operator.is_, found, self._tensors))
        # An engine that moves state to another device and back may leave the tensors and exchange their storages, all at once.
        if same and self._placement is WHOLE and found[0].data_ptr() == self._address:
            return
        tensors = found if self._placement is WHOLE else list(map(local, found))
        values = _side_by_side(tensors)
        if values is None:
            values = torch.stack(tensors)
            if self._placement is WHOLE and (self._keeps or fill_their_storages(tensors)):
                found = list(values.unbind())
                pairs = [(state, name) for name in self._names for state in self._states]
                for (state, name), value in zip(pairs, found):
                    state[name] = value
            else:
                self._copied = tensors
        self.values, self._tensors, self._address = values, found, values.data_ptr()

    def release(self) -> None:
        """After each step: a copy is not kept."""
        if self._copied:
            self.values, self._tensors, self._copied = torch.empty(0), [], []

    def write(self, values: Tensor, finite: Tensor | None, part: slice = slice(None), scale: Any = 1.0) -> None:
        """Write values · scale into the state, or into a part of the stack; where finite [n] is false, it stays as it is.

        values: [..., n, ...] of the part's size, of any dtype, and like scale on the state's device or its `float64_device`.
        """
        target = self.values[part]
        if values.device != target.device:
            values, scale = narrow(values * scale, target.device), 1.0
        if finite is not None:
            kept = finite.view(1, -1, *[1] * (target.ndim - 1))
            target = target.unflatten(0, (-1, len(self._states)))
            values = torch.where(kept, (values * scale).view_as(target).to(target.dtype), target)
            target.copy_(values)
        else:
            torch.mul(values, scale, out=target.view(values.shape))
        if self._copied:
            torch._foreach_copy_(self._copied[part], list(self.values[part].unbind()))


def fill_their_storages(tensors: Iterable[Tensor]) -> bool:
    """Whether the storages of these tensors, none of which overlap, hold nothing else: letting go of them all frees the memory."""
    left: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        left[storage._cdata] = left.get(storage._cdata, storage.nbytes()) - tensor.nbytes
    return not any(left.values())


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
