"""This module holds what the step's kernels share: names of their tables, reads and writes, hashing, k×k matrices."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from ...lowrank import rounding
from ...lowrank.rules import MIN_FACTOR_NORM
from ..eager import COEFFICIENTS
from ..table import OPTIONS, POINTERS

# `_numbers` writes these numbers of each matrix for the kernels after it, as the rows of a table [len(NUMBERS), n]
# float32: the coefficients of the eager row part, and the limit to which the update is clamped.
NUMBERS = (*COEFFICIENTS, "limit")
# These are the rows of the three tables by name, as the kernels read them.
(
    BETA1, BETA2, LR, WEIGHT_DECAY, EPS, RESIDUAL_WEIGHT, UPDATE_SCALE, MAX_NORM, SIGN, BOUND, _, DAMPING, SEED, _,
    SKIPS_ZEROS,
) = map(tl.constexpr, range(len(OPTIONS)))  # fmt: skip
STEP, M_B, M_A, V_B, V_A, ENERGY, SCALE = map(tl.constexpr, range(len(POINTERS)))
(
    G_SCALE, M_KEEP, M_GAIN, V_KEEP, V_GAIN, C_B, C_X, RESIDUAL, V_SCALE, ROOT_EPS, STEP_SIZE, DECAY, UPDATES, LIMIT,
) = map(tl.constexpr, range(len(NUMBERS)))  # fmt: skip
# `_numbers` writes two norms of each matrix: ‖g‖ after clipping, which is −1 for an expert whose gradient is zero, and
# ‖g‖ as the step uses it, which is 0 where the gradient is not usable.
FOUND: tl.constexpr = tl.constexpr(2)
INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)
SALT: tl.constexpr = tl.constexpr(rounding.SALT)
SALTED: tl.constexpr = tl.constexpr(rounding.mix(rounding.SALT))  # This is the second round's key of key 0.
FLOAT32_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)
# Float32 does not hold the squares of small gradients. All gradients are therefore also squared after multiplication
# by RAISED, and the sum of these squares gives ‖g‖ where ‖g‖² is below SMALL_SQUARE.
RAISED: tl.constexpr = tl.constexpr(2.0**60)
SMALL_SQUARE: tl.constexpr = tl.constexpr(2.0**-100)
SMALLEST_NORM: tl.constexpr = tl.constexpr(MIN_FACTOR_NORM)
TINY32: tl.constexpr = tl.constexpr(2.0**-126)
TINY64: tl.constexpr = tl.constexpr(2.0**-1022)


# ---- reading and writing --------------------------------------------------------------------------------------------


@triton.jit
def own(addresses, matrix, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to the first entry of one matrix, from a table of addresses."""
    pointer = tl.load(addresses + matrix).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, [16]) if ALIGNED else pointer


@triton.jit
def state_of(states, name: tl.constexpr, stride, matrix):
    return tl.load(states + name * stride + matrix).to(tl.pointer_type(tl.float32))


@triton.jit
def option(settings, name: tl.constexpr, n_groups, group):
    return tl.load(settings + name * n_groups + group)


@triton.jit
def store_block(pointer, matrix, K: tl.constexpr):
    """Write a block [K, K]."""
    tl.store(pointer + tl.arange(0, K)[:, None] * K + tl.arange(0, K)[None, :], matrix)


@triton.jit
def load_block(pointer, K: tl.constexpr):
    """Return a block [K, K]."""
    return tl.load(pointer + tl.arange(0, K)[:, None] * K + tl.arange(0, K)[None, :])


@triton.jit
def sum_blocks(pointer, count, stride: tl.constexpr, K: tl.constexpr):
    """Return the sum of ``count`` blocks [K, K] float64, which are every ``stride``-th block."""
    result = tl.zeros((K, K), tl.float64)
    for i in range(count):
        result += load_block(pointer + i * stride * K * K, K)
    return result


@triton.jit
def hash_round(bits, key):
    """Return uint32 bits after one round of lowbias32 (see `rounding`)."""
    bits = bits ^ key
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def rounded_stochastically(x, at, key, salted):
    """Return float32 numbers rounded to bfloat16's, up or down at random: a number's bits depend on its place and key.

    at: places in the whole parameter, [...] uint32. key, salted: what `lowrank.rounding.round_keys` returns.
    """
    bits = hash_round(hash_round(at, key), salted) & 0xFFFF
    rounded = ((x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def quotient(a, square, eps):
    """Return a / (√square + eps) for eps ≥ 2⁻⁶³, to two units in the last place.

    Compiled kernels take a root and a reciprocal that count subnormal numbers, which are nothing beside eps, as zero:
    the code for those numbers would take a tenth of `_update`.
    """
    if INTERPRETED:
        return a / (tl.sqrt(square) + eps)
    root = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [square], tl.float32, True, 1)
    return a * tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [root + eps], tl.float32, True, 1)


@triton.jit
def within(x, limit):
    """Return x clamped to ±limit, and NaN where it is NaN."""
    low = tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power(base, exponent):
    """Return base ** exponent in float64, for a whole exponent ≥ 0."""
    result = tl.full((), 1, tl.float64)
    while exponent > 0:
        result = tl.where(exponent & 1 != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


# ---- k×k ------------------------------------------------------------------------------------------------------------


@triton.jit
def trace(matrix, K: tl.constexpr):
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    return tl.sum(tl.sum(tl.where(i == j, matrix, 0), 1), 0)


@triton.jit
def product(a, b):
    """Return the matrix product a b of blocks [K, K]."""
    return tl.sum(a[:, :, None] * b[None, :, :], 1)


@triton.jit
def damped(gram, ridge, K: tl.constexpr):
    """Return gram + ridge · I, with a ridge that float64 resolves beside the trace. Outside k×k it is ridge · I."""
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    ridge = tl.maximum(ridge, 1e-15 * trace(gram, K) + TINY64)
    return tl.where(i == j, gram + ridge, gram)


@triton.jit
def inverse_of(matrix, K: tl.constexpr):
    """Return the inverse of a positive matrix as `linalg.damped_inverse` does: if a pivot fails, of its diagonal."""
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    swept, failed = matrix, tl.full((), 0, tl.int32)
    for c in range(K):
        column = tl.sum(tl.where(j == c, swept, 0), 1)
        pivot = tl.sum(tl.where(tl.arange(0, K) == c, column, 0), 0)
        row = column / pivot
        failed = failed | (pivot > 0).to(tl.int32) - 1
        swept = swept - column[:, None] * row[None, :]
        swept = tl.where(j == c, row[:, None], swept)
        swept = tl.where(i == c, row[None, :], swept)
        swept = tl.where((i == c) & (j == c), -1 / pivot, swept)
    return tl.where(failed != 0, tl.where(i == j, 1 / matrix, 0), -swept)


@triton.jit
def inverse_root(matrix, K: tl.constexpr):
    """Return L⁻¹ of the Cholesky factor L of a positive matrix as `linalg.inverse_root` does."""
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    identity = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    swept, lower, failed = matrix, identity, tl.full((), 0, tl.int32)
    pivots = tl.full((K,), 0, tl.float64)
    for c in range(K):
        row = tl.sum(tl.where(i == c, swept, 0), 0)
        lower_row = tl.sum(tl.where(i == c, lower, 0), 0)
        column = tl.sum(tl.where(j == c, swept, 0), 1)
        pivot = tl.sum(tl.where(tl.arange(0, K) == c, row, 0), 0)
        failed = failed | (pivot > 0).to(tl.int32) - 1
        pivots = tl.where(tl.arange(0, K) == c, pivot, pivots)
        factor = tl.where(tl.arange(0, K) > c, column / pivot, 0)
        swept = swept - factor[:, None] * row[None, :]
        lower = lower - factor[:, None] * lower_row[None, :]
    root = lower / tl.sqrt(pivots)[:, None]
    return tl.where(failed != 0, tl.where(i == j, 1 / tl.sqrt(matrix), 0), root)


@triton.jit
def put(table, name: tl.constexpr, n, matrix, value):
    tl.store(table + name * n + matrix, value.to(tl.float32))


@triton.jit
def number(table, name: tl.constexpr, n, matrix):
    return tl.load(table + name * n + matrix)
