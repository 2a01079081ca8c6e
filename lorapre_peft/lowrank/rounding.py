"""Stochastic rounding to bfloat16 from a counter-based generator: the same on every replica and after a resume."""

from __future__ import annotations

import functools
from typing import TypeVar

import torch
from torch import Tensor

Bits = TypeVar("Bits", int, Tensor)

_MASK = 0xFFFFFFFF
# The two multipliers of "lowbias32", an integer hash whose output bits are nearly unbiased (C. Wellons,
# hash-prospector).
_M1, _M2 = 0x7FEB352D, 0x846CA68B
# Added to a key for the second round of the hash; 2³² over the golden ratio.
SALT = 0x9E3779B9


def mix(value: Bits) -> Bits:
    """Return the hash lowbias32 of the low 32 bits of a Python integer or of int64 entries."""
    value = value & _MASK
    value = ((value ^ value >> 16) * _M1) & _MASK
    value = ((value ^ value >> 15) * _M2) & _MASK
    return value ^ value >> 16


def _signed(value: Bits) -> Bits:
    """Return the int32 with the same 32 bits."""
    return ((value & _MASK) ^ 0x80000000) - 0x80000000


def random_keys(named: tuple[tuple[int, int], ...], steps: Tensor) -> Tensor:
    """Return 32 bits that name each parameter at its step of one run: int64 [n].

    named: seed of the run and position in the optimizer of each parameter. steps: [n], on any device, not read by the
        host.
    """
    return mix(_parameter_keys(named, steps.device) + steps.long())


@functools.lru_cache(maxsize=1024)
def _parameter_keys(named: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the parameters' keys [n], filled entry by entry, as CUDA graphs cannot capture a copy from the host."""
    keys = [mix(mix(seed) + position) for seed, position in named]
    return torch.stack([torch.full((), key, dtype=torch.int64, device=device) for key in keys])


def round_keys(keys: Tensor) -> Tensor:
    """Return the keys of the two rounds of the hash: int64 [2, n]."""
    return torch.stack([keys, mix(keys + SALT)])


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift int32 bits to the right, and fill with zeros."""
    return (bits >> count).bitwise_and_((1 << 32 - count) - 1)


def random_bits(shape: torch.Size, keys: Tensor, offset: int) -> Tensor:
    """Return 32 random bits for every entry of n arrays, as int32: entry i has the hash of (key, offset + i).

    shape: (n, ...); entries are numbered in row-major order. keys: int64 [n].
    """
    count = shape[1:].numel()
    counters = torch.arange(offset, offset + count, dtype=torch.int64, device=keys.device).to(torch.int32)
    bits = counters.expand(shape[0], count).clone()
    # Two rounds: consecutive counters and related keys come out unrelated.
    for salt in round_keys(keys):
        bits.bitwise_xor_(_signed(salt).to(torch.int32)[:, None])
        bits.bitwise_xor_(_shift_right(bits, 16)).mul_(_signed(_M1))
        bits.bitwise_xor_(_shift_right(bits, 15)).mul_(_signed(_M2))
        bits.bitwise_xor_(_shift_right(bits, 16))
    return bits.view(shape)


def write_stochastic(targets: list[Tensor], values: Tensor, keys: Tensor, offset: int = 0) -> None:
    """Each target (bfloat16) ← its value (float32), rounded up or down at random so that the expectation is the value.

    values: [n, ...], keys: int64 [n]. The 16 bits that bfloat16 drops are compared with 16 random bits: adding them
    carries into the kept half with just that probability. Entry i of each uses the random bits of counter offset + i,
    so that tiles of a matrix agree with the whole. NaN and infinity pass unchanged.
    """
    bits = values.contiguous().view(torch.int32)
    rounded = random_bits(values.shape, keys, offset).bitwise_and_(0xFFFF).add_(bits).bitwise_and_(-0x10000)
    rounded = torch.where(values.isfinite(), rounded.view(torch.float32), values)
    torch._foreach_copy_(targets, list(rounded.unbind()))
