"""This module holds numbers of the host on a device, from step to step."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# `constants` keeps this many tensors, and those that a CUDA graph reads as long as the process lives.
KEPT = 1024
_kept: dict[tuple, Tensor] = {}
_of_graphs: dict[tuple, Tensor] = {}
_lock = threading.Lock()  # Autograd calls the hooks of each device's parameters in a thread of its own.


def constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the values as a tensor [n]. It is filled entry by entry, as CUDA graphs cannot capture a host's copy.

    The tensor is kept for the next call, unless a graph is being captured, as another graph could read it before the
    captured one has filled it.
    """
    key = values, device, dtype
    with _lock:
        found = _of_graphs.get(key, _kept.get(key))
        if found is not None:
            if capturing(device):
                _of_graphs[key] = found
            return found
        made = torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
        if not capturing(device):
            if len(_kept) == KEPT:
                del _kept[next(iter(_kept))]
            _kept[key] = made
        return made


def on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the values as a tensor [n]. The host does not wait for the device, and a CUDA graph can capture this."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    if capturing(device):
        return constants(tuple(values), device, dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph of the device is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
