"""This module holds the kernel for what belongs to a matrix: inverses, and numbers of the rule, Adam and its group."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    BETA1,
    BETA2,
    BOUND,
    C_B,
    C_X,
    DAMPING,
    DECAY,
    ENERGY,
    EPS,
    FLOAT32_MAX,
    FOUND,
    G_SCALE,
    LIMIT,
    LR,
    M_GAIN,
    M_KEEP,
    MAX_NORM,
    RAISED,
    RESIDUAL,
    RESIDUAL_WEIGHT,
    ROOT_EPS,
    SALT,
    SCALE,
    SEED,
    SIGN,
    SKIPS_ZEROS,
    SMALL_SQUARE,
    SMALLEST_NORM,
    STEP,
    STEP_SIZE,
    UPDATE_SCALE,
    UPDATES,
    V_GAIN,
    V_KEEP,
    V_SCALE,
    WEIGHT_DECAY,
    damped,
    hash_round,
    inverse_of,
    option,
    power,
    put,
    state_of,
    store_block,
    sum_blocks,
    trace,
)


@triton.jit
def _numbers(
    states, squares, m_squares, v_squares, m_grams, v_grams, m_R, v_R, settings, groups, positions, table, keys, found,
    stride, n, n_groups, k_m, k_v, row_blocks, column_blocks,
    K_M: tl.constexpr, K_V: tl.constexpr, BLOCKS: tl.constexpr, TRACKED: tl.constexpr,
):  # fmt: skip
    """Write (A Aᵀ + damping)⁻¹ of both moments, all numbers of a matrix, and its count of steps.

    The numbers are those of the rule (`rules`), of Adam (`eager.adam_scalars`) and of the group, computed in float64.
    """
    matrix = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + matrix)
    damping = option(settings, DAMPING, n_groups, group)
    m_trace = _invert(
        m_grams + matrix * column_blocks * K_M * K_M,
        m_R + matrix * K_M * K_M,
        column_blocks,
        damping,
        k_m,
        K_M,
        TRACKED,
    )
    v_trace = _invert(
        v_grams + matrix * column_blocks * K_V * K_V,
        v_R + matrix * K_V * K_V,
        column_blocks,
        damping,
        k_v,
        K_V,
        TRACKED,
    )
    beta1, beta2 = option(settings, BETA1, n_groups, group), option(settings, BETA2, n_groups, group)
    square = tl.full((), 0, tl.float64)
    raised = tl.full((), 0, tl.float64)
    for start in range(0, row_blocks, BLOCKS):
        index = start + tl.arange(0, BLOCKS)
        at, inside = squares + (matrix * row_blocks + index) * 2, index < row_blocks
        square += tl.sum(tl.load(at, mask=inside, other=0).to(tl.float64), 0)
        raised += tl.sum(tl.load(at + 1, mask=inside, other=0).to(tl.float64), 0)
    small = square < SMALL_SQUARE
    norm = tl.where(small, tl.sqrt(raised) / RAISED, tl.sqrt(square))
    idle = (option(settings, SKIPS_ZEROS, n_groups, group) != 0) & (norm == 0)
    usable = (norm * norm <= FLOAT32_MAX) & (idle == 0)  # NaN is not usable.
    limit = option(settings, MAX_NORM, n_groups, group)
    clip = tl.where(usable & (norm > limit), limit / norm, 1.0)
    tl.store(found + matrix * FOUND, tl.where(idle, -1.0, norm * tl.where(usable, clip, 1.0)))
    norm = tl.where(usable, norm * clip, 0.0)
    tl.store(found + matrix * FOUND + 1, norm)

    step_ptr = state_of(states, STEP, stride, matrix)
    steps = tl.load(step_ptr) + 1
    c = tl.full((), 1, tl.float64)
    if TRACKED:
        steps = tl.where(tl.load(state_of(states, ENERGY, stride, matrix)) > 0, steps, (norm > 0).to(tl.float32))
        c = tl.load(state_of(states, SCALE, stride, matrix)).to(tl.float64)
    held = tl.where(usable, steps, tl.load(step_ptr))
    t = tl.maximum(steps, 1).to(tl.int32)
    corrected1, corrected2 = 1 - power(beta1, t), 1 - power(beta2, t)
    v_decay = tl.sqrt(beta2)
    if TRACKED:
        m_old, v_old = _norm(m_squares + matrix * k_m, k_m, K_M), _norm(v_squares + matrix * k_v, k_v, K_V)
        m_norm, v_norm = tl.sqrt(m_trace), tl.sqrt(v_trace)
        m_keep, m_gain, v_keep, v_gain = beta1, 1 - beta1, v_decay, 1 - v_decay
        m_size = tl.maximum(m_keep * m_old * m_norm, m_gain * norm)
        v_size = tl.maximum(v_keep * v_old * v_norm, v_gain * norm)
        m_unit = m_norm / tl.maximum(m_size, SMALLEST_NORM * SMALLEST_NORM)
        v_unit = v_norm / tl.maximum(v_size, SMALLEST_NORM * SMALLEST_NORM)
        residual = tl.minimum(corrected1, option(settings, RESIDUAL_WEIGHT, n_groups, group))
        x_part = 1 - beta1 - residual
    else:
        m_keep, v_keep = tl.sqrt(beta1), tl.sqrt(v_decay)
        m_gain, v_gain = 1 - m_keep, 1 - v_keep
        m_unit = c
        v_unit = c
        residual = 1 - beta1
        x_part = 0 * beta1
    root = tl.sqrt((1 - beta2) / corrected2)
    size = 1 / (corrected1 * root)
    lr = option(settings, LR, n_groups, group)
    g_scale = clip * option(settings, SIGN, n_groups, group)
    put(table, G_SCALE, n, matrix, g_scale)
    put(table, M_KEEP, n, matrix, m_keep * m_unit)
    put(table, M_GAIN, n, matrix, m_gain * m_unit)
    put(table, V_KEEP, n, matrix, v_keep * v_unit)
    put(table, V_GAIN, n, matrix, v_gain * v_unit)
    put(table, C_B, n, matrix, beta1 * size)
    put(table, C_X, n, matrix, x_part * size)
    put(table, RESIDUAL, n, matrix, residual * size)
    put(table, V_SCALE, n, matrix, tl.sqrt(c * (beta2 / (1 - beta2))))
    put(table, ROOT_EPS, n, matrix, option(settings, EPS, n_groups, group) / root)
    put(table, STEP_SIZE, n, matrix, lr * option(settings, UPDATE_SCALE, n_groups, group))
    put(table, DECAY, n, matrix, lr * option(settings, WEIGHT_DECAY, n_groups, group))
    put(table, UPDATES, n, matrix, usable.to(tl.float32))
    put(table, LIMIT, n, matrix, option(settings, BOUND, n_groups, group))
    tl.store(step_ptr, held)
    none = tl.full((), 0, tl.uint32)
    seed = option(settings, SEED, n_groups, group).to(tl.int64).to(tl.uint32)
    key = hash_round(
        hash_round(seed + tl.load(positions + matrix).to(tl.uint32), none) + held.to(tl.int64).to(tl.uint32), none
    )
    tl.store(keys + matrix, key.to(tl.int64))
    tl.store(keys + n + matrix, hash_round(key + tl.full((), SALT, tl.uint32), none).to(tl.int64))


@triton.jit
def _invert(grams, inverse, blocks, damping, k, K: tl.constexpr, TRACKED: tl.constexpr):
    """Write (A Aᵀ + damping)⁻¹ from the sums over blocks, and return ‖A‖²."""
    gram = sum_blocks(grams, blocks, 1, K)
    whole = trace(gram, K)
    store_block(inverse, inverse_of(damped(gram, damping * whole / k if TRACKED else damping, K), K).to(tl.float32), K)
    return whole


@triton.jit
def _norm(row_squares, k, K: tl.constexpr):
    return tl.sqrt(tl.sum(tl.load(row_squares + tl.arange(0, K), mask=tl.arange(0, K) < k, other=0), 0))
