"""Stochastic rounding to bfloat16 from a counter-based generator: the same on every replica and after a resume."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _signed(value: int) -> int:
    """The int32 with the same 32 bits."""
    value &= _MASK
    return value - (1 << 32) if value >= 1 << 31 else value


# The two multipliers of "lowbias32", an integer hash whose output bits are nearly unbiased (C. Wellons, hash-prospector).
_M1, _M2 = _signed(0x7FEB352D), _signed(0x846CA68B)


def _mix(value: int) -> int:
    """lowbias32 of a Python integer's low 32 bits."""
    value &= _MASK
    value = ((value ^ value >> 16) * 0x7FEB352D) & _MASK
    value = ((value ^ value >> 15) * 0x846CA68B) & _MASK
    return value ^ value >> 16


def rounding_key(seed: int, step: int, position: int) -> int:
    """32 bits that name one parameter at one step of one run."""
    return _mix(_mix(_mix(seed) + step) + position)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift of int32 bits."""
    return (bits >> count).bitwise_and_((1 << 32 - count) - 1)


def random_bits(shape: torch.Size, key: int, offset: int, device: torch.device) -> Tensor:
    """Hash of (key, offset + i) for every entry i in row-major order: int32, all 32 bits random."""
    count = shape.numel()
    bits = torch.arange(offset, offset + count, dtype=torch.int64, device=device).to(torch.int32)
    # Two rounds: consecutive counters and related keys come out unrelated.
    for salt in (key, _mix(key + 0x9E3779B9)):
        bits.bitwise_xor_(_signed(salt))
        bits.bitwise_xor_(_shift_right(bits, 16)).mul_(_M1)
        bits.bitwise_xor_(_shift_right(bits, 15)).mul_(_M2)
        bits.bitwise_xor_(_shift_right(bits, 16))
    return bits.view(shape)


def write_stochastic(target: Tensor, value: Tensor, key: int, offset: int = 0) -> None:
    """target (bfloat16) ← value (float32), rounded up or down at random so that the expectation is the value.

    The 16 bits that bfloat16 drops are compared with 16 random bits: adding them carries into the kept half with just that
    probability. Entry i uses the random bits of counter offset + i, so that tiles of a matrix agree with the whole. NaN and
    infinity pass unchanged.
    """
    bits = value.contiguous().view(torch.int32)
    rounded = (
        random_bits(value.shape, key, offset, value.device).bitwise_and_(0xFFFF).add_(bits).bitwise_and_(-0x10000)
    )
    target.copy_(torch.where(value.isfinite(), rounded.view(torch.float32), value))
