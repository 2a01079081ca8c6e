"""This module holds the kernels that read and write the factors: all of a step but the passes and the numbers.

`_row_squares` and `_start` look at the old A factors, `_rows` updates the B factors, `_solve` and `_columns` update
the A factors, and `_balance` writes both. Each kernel treats both moments. k×k matrices are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    BETA1,
    BETA2,
    C_B,
    C_X,
    DAMPING,
    ENERGY,
    FLOAT32_MAX,
    FOUND,
    G_SCALE,
    M_A,
    M_B,
    M_GAIN,
    M_KEEP,
    SALTED,
    SCALE,
    SMALLEST_NORM,
    TINY32,
    TINY64,
    UPDATES,
    V_A,
    V_B,
    V_GAIN,
    V_KEEP,
    damped,
    hash_round,
    inverse_of,
    inverse_root,
    load_block,
    number,
    option,
    product,
    state_of,
    store_block,
    sum_blocks,
    trace,
    within,
)


@triton.jit
def _row_squares(
    states, m_squares, v_squares, stride, q, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ‖row‖² of each row of the old A factors, in float64."""
    matrix = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _row_squares_of(state_of(states, M_A, stride, matrix), m_squares + matrix * k_m, k_m, q, K_M, COLUMNS)
    else:
        _row_squares_of(state_of(states, V_A, stride, matrix), v_squares + matrix * k_v, k_v, q, K_V, COLUMNS)


@triton.jit
def _row_squares_of(A, row_squares, k, q, K: tl.constexpr, COLUMNS: tl.constexpr):
    ranks = tl.arange(0, K)
    squares = tl.zeros((K, COLUMNS), tl.float64)
    for start in range(0, q, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (ranks[:, None] < k) & (columns[None, :] < q)
        a = tl.load(A + ranks[:, None] * q + columns[None, :], mask=inside, other=0).to(tl.float64)
        squares += a * a
    tl.store(row_squares + ranks, tl.sum(squares, 1), mask=ranks < k)


@triton.jit
def _start(
    states, m_squares, v_squares, m_A, v_A, m_grams, v_grams, stride, q, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, M_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    TRACKED: tl.constexpr,
):  # fmt: skip
    """Write copies of the old A factors with zero directions restarted (`Als.restart`), and A Aᵀ block by block."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = matrix * tl.num_programs(0) + block
    if tl.program_id(2) == 0:
        _start_moment(
            state_of(states, M_A, stride, matrix), m_squares + matrix * k_m, m_A + matrix * k_m * q,
            m_grams + at * K_M * K_M, block, k_m, q, K_M, M_BLOCK, REPEATS * V_BLOCK // M_BLOCK, TRACKED,
        )  # fmt: skip
    else:
        _start_moment(
            state_of(states, V_A, stride, matrix), v_squares + matrix * k_v, v_A + matrix * k_v * q,
            v_grams + at * K_V * K_V, block, k_v, q, K_V, V_BLOCK, REPEATS, TRACKED,
        )  # fmt: skip


@triton.jit
def _start_moment(
    A, row_squares, A_used, grams, block, k, q, K: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    TRACKED: tl.constexpr,
):  # fmt: skip
    ranks = tl.arange(0, K)
    squares = tl.load(row_squares + ranks, mask=ranks < k, other=1)
    dead = squares == 0
    living = k - tl.sum(dead.to(tl.int32), 0)
    whole = tl.sum(tl.where(ranks < k, squares, 0), 0)
    level = tl.where(living > 0, whole / tl.maximum(living, 1), 1.0)
    start_norm = tl.sqrt(3.0 / q * level).to(tl.float32)  # A test row's mean square is 1/3.
    gram = tl.zeros((K, K), tl.float64)
    for repeat in range(REPEATS):
        columns = (block * REPEATS + repeat) * BLOCK + tl.arange(0, BLOCK)
        inside = (ranks[:, None] < k) & (columns[None, :] < q)
        at = ranks[:, None] * q + columns[None, :]
        a = tl.load(A + at, mask=inside, other=0)
        if TRACKED:
            bits = hash_round(hash_round(at.to(tl.uint32), tl.full((), 0, tl.uint32)), tl.full((), SALTED, tl.uint32))
            a = tl.where(dead[:, None] & inside, (bits >> 8).to(tl.float32) * (start_norm * 5.9604644775390625e-8), a)
        tl.store(A_used + at, a, mask=inside)
        a = a.to(tl.float64)
        gram += tl.sum(a[:, None, :] * a[None, :, :], 2)
    store_block(grams, gram, K)


@triton.jit
def _rows(
    states, m_X, v_X, m_R, v_R, m_squares, v_squares, m_B, v_B, C, m_grams, v_grams, table, stride, n, p, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, M_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    TRACKED: tl.constexpr,
):  # fmt: skip
    """Write B' of both moments, C of m's part C m_A of the update, and the Gram matrices of B' and B, by blocks."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = matrix * tl.num_programs(0) + block
    g_scale = number(table, G_SCALE, n, matrix)
    if tl.program_id(2) == 0:
        m_at = matrix * p * k_m
        _move_rows(
            m_X + m_at, m_R + matrix * K_M * K_M, state_of(states, M_B, stride, matrix), m_squares + matrix * k_m,
            m_B + m_at, C + m_at, m_grams + at * 2 * K_M * K_M, g_scale, number(table, M_KEEP, n, matrix),
            number(table, M_GAIN, n, matrix), number(table, C_B, n, matrix), number(table, C_X, n, matrix),
            block, p, k_m, K_M, M_BLOCK, REPEATS * V_BLOCK // M_BLOCK, True, TRACKED,
        )  # fmt: skip
    else:
        v_at = matrix * p * k_v
        _move_rows(
            v_X + v_at, v_R + matrix * K_V * K_V, state_of(states, V_B, stride, matrix), v_squares + matrix * k_v,
            v_B + v_at, C, v_grams + at * 2 * K_V * K_V, tl.abs(g_scale), number(table, V_KEEP, n, matrix),
            number(table, V_GAIN, n, matrix), 0.0, 0.0, block, p, k_v, K_V, V_BLOCK, REPEATS, False, TRACKED,
        )  # fmt: skip


@triton.jit
def _move_rows(
    X, R, B, row_squares, B_new, coefficients, grams, scale, keep, gain, c_B, c_X, block, p, k,
    K: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr, MIXES: tl.constexpr, TRACKED: tl.constexpr,
):  # fmt: skip
    """Write B' = keep · B + gain · X, for m also c_B B + c_X X, and B'ᵀB' and B'ᵀB, or BᵀB for `newton`, of some rows.

    X here is scale · X R with the X that was passed. Where a row of A is zero, that direction's B counts as zero.
    """
    ranks = tl.arange(0, K)[:, None]
    alive = tl.load(row_squares + ranks, mask=ranks < k, other=0) != 0
    gram, cross = tl.zeros((K, K), tl.float64), tl.zeros((K, K), tl.float64)
    for repeat in range(REPEATS):
        rows = (block * REPEATS + repeat) * BLOCK + tl.arange(0, BLOCK)[None, :]
        at, inside = rows * k + ranks, (rows < p) & (ranks < k)
        fitted = tl.zeros((K, BLOCK), tl.float32)
        for i in range(k):
            fitted += tl.load(R + i * K + ranks) * tl.load(X + rows * k + i, mask=rows < p, other=0)
        fitted *= scale
        b = tl.load(B + at, mask=inside & (alive | (TRACKED == 0)), other=0)
        new = keep * b + gain * fitted
        tl.store(B_new + at, new, mask=inside)
        if MIXES:
            tl.store(coefficients + at, c_B * b + c_X * fitted, mask=inside)
        old = b.to(tl.float64)
        new = tl.where(inside, new, 0).to(tl.float64)
        if TRACKED:
            gram += tl.sum(new[:, None, :] * new[None, :, :], 2)
            cross += tl.sum(new[:, None, :] * old[None, :, :], 2)
        else:
            gram += tl.sum(old[:, None, :] * old[None, :, :], 2)
    store_block(grams, gram, K)
    store_block(grams + K * K, cross, K)


@triton.jit
def _solve(
    m_grams, v_grams, m_roots, v_roots, m_by, v_by, settings, groups, n_groups, k_m, k_v, blocks,
    K_M: tl.constexpr, K_V: tl.constexpr, TRACKED: tl.constexpr,
):  # fmt: skip
    """Compute the rule's column part (`columns` in `rules`) for m or v.

    It sums the Gram matrices, and writes the factors on B', A and P.
    """
    matrix = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + matrix)
    damping = option(settings, DAMPING, n_groups, group)
    if tl.program_id(1) == 0:
        _solve_moment(
            m_grams + matrix * blocks * 2 * K_M * K_M, m_roots + matrix * 2 * K_M * K_M, m_by + matrix * 2 * K_M * K_M,
            option(settings, BETA1, n_groups, group), damping, k_m, blocks, K_M, TRACKED,
        )  # fmt: skip
    else:
        _solve_moment(
            v_grams + matrix * blocks * 2 * K_V * K_V, v_roots + matrix * 2 * K_V * K_V, v_by + matrix * 2 * K_V * K_V,
            tl.sqrt(option(settings, BETA2, n_groups, group)), damping, k_v, blocks, K_V, TRACKED,
        )  # fmt: skip


@triton.jit
def _solve_moment(grams, roots, by, decay, damping, k, blocks, K: tl.constexpr, TRACKED: tl.constexpr):
    """Write L⁻¹ of B'ᵀB' = L Lᵀ and L⁻¹ B'ᵀB' L⁻ᵀ, and by_A and by_P of A' = by_A A + by_P P.

    For `newton` the first two are the identity and BᵀB.
    """
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    inverse = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    gram = sum_blocks(grams, blocks, 2, K)
    if TRACKED:
        cross = sum_blocks(grams + K * K, blocks, 2, K)
        inverse = inverse_root(damped(gram, damping * trace(gram, K) / k, K), K)
        by_A, by_P = decay * product(inverse, cross), (1 - decay) * inverse
    else:
        root = tl.sqrt(decay)
        by_A, by_P = root * inverse, (1 - root) * inverse_of(damped(gram, damping, K), K)
    store_block(roots, inverse, K)
    store_block(roots + K * K, product(product(inverse, gram), tl.trans(inverse)), K)
    store_block(by, by_A, K)
    store_block(by + K * K, by_P, K)


@triton.jit
def _columns(
    m_A, v_A, m_by, v_by, m_A_new, v_A_new, m_P, v_P, m_grams, v_grams, n, q, k_m, k_v, splits,
    K_M: tl.constexpr, K_V: tl.constexpr, M_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """Write A' = by_A A + by_P P of m or v, and A' A'ᵀ block by block."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = matrix * tl.num_programs(0) + block
    if tl.program_id(2) == 0:
        m_at = matrix * k_m * q
        _move_columns(
            m_A + m_at, m_by + matrix * 2 * K_M * K_M, m_A_new + m_at, m_P + m_at, m_grams + at * K_M * K_M, block,
            n * k_m * q, q, k_m, splits, K_M, M_BLOCK, REPEATS * V_BLOCK // M_BLOCK,
        )  # fmt: skip
    else:
        v_at = matrix * k_v * q
        _move_columns(
            v_A + v_at, v_by + matrix * 2 * K_V * K_V, v_A_new + v_at, v_P + v_at, v_grams + at * K_V * K_V, block,
            n * k_v * q, q, k_v, splits, K_V, V_BLOCK, REPEATS,
        )  # fmt: skip


@triton.jit
def _move_columns(
    A, by, A_new, P, grams, block, stride, q, k, splits, K: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr
):
    ranks = tl.arange(0, K)[:, None]
    by_A, by_P = load_block(by, K), load_block(by + K * K, K)
    gram = tl.zeros((K, K), tl.float64)
    for repeat in range(REPEATS):
        columns = (block * REPEATS + repeat) * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside, at = (ranks < k) & (columns < q), ranks * q + columns
        a = tl.load(A + at, mask=inside, other=0).to(tl.float64)
        projected = tl.zeros((K, BLOCK), tl.float32)
        for split in range(splits):
            projected += tl.load(P + split * stride.to(tl.int64) + at, mask=inside, other=0)
        new = tl.sum(by_A[:, :, None] * a[None, :, :] + by_P[:, :, None] * projected.to(tl.float64)[None, :, :], 1)
        tl.store(A_new + at, new.to(tl.float32), mask=inside)
        gram += tl.sum(new[:, None, :] * new[None, :, :], 2)
    store_block(grams, gram, K)


@triton.jit
def _balance(
    states, m_roots, v_roots, m_B, v_B, m_A_new, v_A_new, m_grams, v_grams, table, found, settings, groups,
    stride, n, n_groups, p, q, k_m, k_v, blocks,
    K_M: tl.constexpr, K_V: tl.constexpr, M_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    TRACKED: tl.constexpr,
):  # fmt: skip
    """Write a part of both factors of m or of v with equal norms (`balance` in `rules`), and for v also its energy."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    updates = number(table, UPDATES, n, matrix)
    if tl.program_id(2) == 0:
        _balance_moment(
            state_of(states, M_A, stride, matrix), state_of(states, M_B, stride, matrix),
            m_roots + matrix * 2 * K_M * K_M, m_B + matrix * p * k_m, m_A_new + matrix * k_m * q,
            m_grams + matrix * blocks * K_M * K_M, updates, block, p, q, k_m, blocks, K_M, M_BLOCK,
            REPEATS * V_BLOCK // M_BLOCK, TRACKED,
        )  # fmt: skip
    else:
        squared = _balance_moment(
            state_of(states, V_A, stride, matrix), state_of(states, V_B, stride, matrix),
            v_roots + matrix * 2 * K_V * K_V, v_B + matrix * p * k_v, v_A_new + matrix * k_v * q,
            v_grams + matrix * blocks * K_V * K_V, updates, block, p, q, k_v, blocks, K_V, V_BLOCK, REPEATS, TRACKED,
        )  # fmt: skip
        if TRACKED and block == 0:
            # E ← β2 E + (1−β2)‖g‖² is the sum of Adam's own v. The next step reads c = E/‖v_B v_A‖².
            beta2 = option(settings, BETA2, n_groups, tl.load(groups + matrix))
            energy_ptr, scale_ptr = state_of(states, ENERGY, stride, matrix), state_of(states, SCALE, stride, matrix)
            norm = tl.load(found + matrix * FOUND + 1)
            energy = beta2 * tl.load(energy_ptr).to(tl.float64) + (1 - beta2) * norm * norm
            scale = tl.minimum(energy / tl.maximum(squared, TINY64), FLOAT32_MAX)
            tl.store(energy_ptr, energy.to(tl.float32), mask=updates > 0)
            tl.store(scale_ptr, scale.to(tl.float32), mask=updates > 0)


@triton.jit
def _balance_moment(
    A, B, roots, B_new, A_new, grams, updates, block, p, q, k, blocks,
    K: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr, TRACKED: tl.constexpr,
):  # fmt: skip
    """Write some columns of A and some rows of B, and return ‖B'A'‖², which only `als` uses."""
    ranks = tl.arange(0, K)[:, None]
    gram_A, gram_B = sum_blocks(grams, blocks, 1, K), load_block(roots + K * K, K)
    scale_A = tl.full((), 1, tl.float64)
    scale_B = tl.full((), 1, tl.float64)
    if TRACKED:
        norm_B, norm_A = tl.sqrt(trace(gram_B, K)), tl.sqrt(trace(gram_A, K))
        common = tl.maximum(tl.sqrt(norm_B) * tl.sqrt(norm_A), SMALLEST_NORM)
        scale_B, scale_A = common / tl.maximum(norm_B, TINY32), common / tl.maximum(norm_A, TINY32)
    written = tl.where(updates > 0, k, 0)
    by_A = scale_A.to(tl.float32)
    by_B = within(scale_B * load_block(roots, K), FLOAT32_MAX).to(tl.float32)  # B' may be 0.
    for repeat in range(REPEATS):
        place = (block * REPEATS + repeat) * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside, at = (ranks < written) & (place < q), ranks * q + place
        tl.store(A + at, tl.load(A_new + at, mask=inside, other=0) * by_A, mask=inside)
        inside, at = (ranks < written) & (place < p), place * k + ranks
        b = tl.load(B_new + at, mask=inside, other=0)
        if TRACKED:
            b = tl.sum(by_B[:, :, None] * b[None, :, :], 1)
        tl.store(B + at, b, mask=inside)
    return tl.sum(tl.sum(gram_B * gram_A, 1), 0) * (scale_A * scale_B) * (scale_A * scale_B)
