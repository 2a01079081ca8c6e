"""This module decides where float64 work is done, and moves tensors there and back.

Apple's MPS has no float64, and in some versions of torch it lacks some factorisations (Cholesky, QR, SVD). Work that
needs either is done on the CPU for it. Float32 would not do. The damping of `als` is 1e-6/k of a Gram matrix's trace,
and float32's round-off in the matrix is up to 6e-8·k of that trace. From k = 5 on the round-off is the larger of the
two, so that a Cholesky factorisation may fail. Pairs of float32 numbers have enough digits, but need products without
round-off, which no matrix product of MPS gives. On the CPU the results are those of every other device, and the data
that travels is small. Of each matrix and moment of a batch, the factors with k(p+q) numbers go there, and kq numbers
come back. An Apple GPU shares its memory with the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 work and factorisations of tensors on ``device`` are done: there, or on the CPU for MPS."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(x: Tensor) -> Tensor:
    """Return x in float64 on its `float64_device`. The dtype changes there, as MPS cannot even copy to float64."""
    return x.to(float64_device(x.device)).double()


def to_float32(x: Tensor, device: torch.device) -> Tensor:
    """Return x in float32 on ``device``."""
    return x.float().to(device)


def reads_are_free(device: torch.device) -> bool:
    """Return whether the host reads a tensor on this device without waiting for anything."""
    return device.type == "cpu"
