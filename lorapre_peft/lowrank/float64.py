"""Where float64 work is done, and how tensors get there and back.

Apple's MPS has no float64, and lacks some of the factorisations (Cholesky, QR, SVD) in some versions of torch: what
needs either is done on the CPU for it. Float32 would not do: the damping of `als` is 1e-6/k of a Gram matrix's trace,
and float32's round-off in it is up to 6e-8·k of that trace, which is more from k = 5 on, so that a Cholesky
factorisation may fail. Pairs of float32 numbers have the digits, but need products without round-off, which no matrix
product of MPS gives. On the CPU the results are those of every other device, and what travels is small: the factors of
a batch, k(p+q) numbers for each matrix and moment there and kq back, in memory that an Apple GPU shares with its CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 work and factorisations of tensors on ``device`` are done: there, or for MPS on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def wide(x: Tensor) -> Tensor:
    """Return x in float64 on its `float64_device`; the dtype changes there, as MPS cannot even copy to float64."""
    return x.to(float64_device(x.device)).double()


def narrow(x: Tensor, device: torch.device) -> Tensor:
    """Return x in float32 on ``device``."""
    return x.float().to(device)


def reads_are_free(device: torch.device) -> bool:
    """Return whether the host reads a tensor on this device without waiting for anything."""
    return device.type == "cpu"
