"""This module rounds stochastically to bfloat16.

Its random generator is based on counters, so that the bits are the same on every replica and after a resume.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from .constants import constants

Bits = TypeVar("Bits", int, Tensor)

_MASK = 0xFFFFFFFF
# These are the multipliers of "lowbias32", an integer hash with nearly unbiased output (C. Wellons, hash-prospector).
_M1, _M2 = 0x7FEB352D, 0x846CA68B
# This is added to a key for the second round of the hash. It is 2³² over the golden ratio.
SALT = 0x9E3779B9


def mix(value: Bits) -> Bits:
    """Return the hash lowbias32 of the low 32 bits of a Python integer or of int64 entries."""
    value = value & _MASK
    value = ((value ^ value >> 16) * _M1) & _MASK
    value = ((value ^ value >> 15) * _M2) & _MASK
    return value ^ value >> 16


def _signed(value: Bits) -> Bits:
    """Return the number that the low 32 bits stand for as an int32."""
    return ((value & _MASK) ^ 0x80000000) - 0x80000000


def random_keys(named: tuple[tuple[int, int], ...], steps: Tensor) -> Tensor:
    """Return a key of 32 bits for each parameter at its step of one run: int64 [n].

    named: seed of the run and position in the optimizer of each parameter.
    steps: [n], on any device; the host does not read them.
    """
    keys = tuple(mix(mix(seed) + position) for seed, position in named)
    return mix(constants(keys, steps.device, torch.int64) + steps.long())


def round_keys(keys: Tensor) -> Tensor:
    """Return the keys of the two rounds of the hash: int64 [2, n]."""
    return torch.stack([keys, mix(keys + SALT)])


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Return int32 bits shifted to the right and filled with zeros."""
    return (bits >> count).bitwise_and_((1 << 32 - count) - 1)


def random_bits(shape: torch.Size, keys: Tensor, offset: int) -> Tensor:
    """Return 32 random bits for every entry of n arrays, as int32. Entry i has the hash of (key, offset + i).

    shape: (n, ...). Entries are numbered in row-major order. keys: int64 [n].
    """
    count = shape[1:].numel()
    counters = torch.arange(offset, offset + count, dtype=torch.int64, device=keys.device).to(torch.int32)
    bits = counters.expand(shape[0], count).clone()
    # After two rounds, consecutive counters and related keys give unrelated bits.
    for salt in round_keys(keys):
        bits.bitwise_xor_(_signed(salt).to(torch.int32)[:, None])
        bits.bitwise_xor_(_shift_right(bits, 16)).mul_(_signed(_M1))
        bits.bitwise_xor_(_shift_right(bits, 15)).mul_(_signed(_M2))
        bits.bitwise_xor_(_shift_right(bits, 16))
    return bits.view(shape)


def write_stochastic(targets: list[Tensor], values: Tensor, keys: Tensor, offset: int = 0) -> None:
    """Write float32 values into bfloat16 targets, rounded up or down at random so that the expectation is the value.

    values: [n, ...], keys: int64 [n]. Sixteen random bits are added to the 16 bits that bfloat16 drops, and carry into
    the kept half with just the probability needed. Entry i of each target uses the random bits of counter offset + i,
    so that tiles of a matrix agree with the whole matrix. NaN and infinity pass unchanged.
    """
    bits = values.contiguous().view(torch.int32)
    rounded = random_bits(values.shape, keys, offset).bitwise_and_(0xFFFF).add_(bits).bitwise_and_(-0x10000)
    rounded = torch.where(values.isfinite(), rounded.view(torch.float32), values)
    torch._foreach_copy_(targets, list(rounded.unbind()))
