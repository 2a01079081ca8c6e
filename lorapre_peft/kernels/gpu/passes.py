"""This module holds the kernels that read the gradients: `_fit` computes x Aᵀ and ‖g‖, `_update` writes the weights.

Products are float32. They are written out as sums for the small ranks that these kernels take, or exact on tensor
cores if gradients are bfloat16. There is no p×q temporary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    DECAY,
    G_SCALE,
    LIMIT,
    M_B,
    RAISED,
    RESIDUAL,
    ROOT_EPS,
    STEP_SIZE,
    UPDATES,
    V_B,
    V_SCALE,
    number,
    own,
    quotient,
    rounded_stochastically,
    state_of,
    within,
)


@triton.jit
def _fit(
    grads, m_A, v_A, m_X, v_X, squares, p, q, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANE: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write g m_Aᵀ and |g| v_Aᵀ of some rows, and the sums of these rows' squares, from unscaled gradients."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g_ptr = own(grads, matrix, GRAD, ALIGNED)
    m_A += matrix * k_m * q
    v_A += matrix * k_v * q
    THREADS: tl.constexpr = COLUMNS // LANE
    rows = block * ROWS + tl.arange(0, ROWS)[None, :, None, None]
    lanes = tl.arange(0, THREADS)[None, None, :, None] * LANE + tl.arange(0, LANE)[None, None, None, :]
    m_ranks, v_ranks = tl.arange(0, K_M)[:, None, None, None], tl.arange(0, K_V)[:, None, None, None]
    m_sum = tl.zeros((K_M, ROWS, THREADS), tl.float32)
    v_sum = tl.zeros((K_V, ROWS, THREADS), tl.float32)
    square = tl.zeros((1, ROWS, THREADS), tl.float32)
    raised = tl.zeros((1, ROWS, THREADS), tl.float32)
    for start in range(0, q, COLUMNS):
        columns = start + lanes
        g = tl.load(g_ptr + rows.to(tl.int64) * q + columns, mask=(rows < p) & (columns < q), other=0).to(tl.float32)
        m_columns = tl.load(m_A + m_ranks * q + columns, mask=(m_ranks < k_m) & (columns < q), other=0)
        v_columns = tl.load(v_A + v_ranks * q + columns, mask=(v_ranks < k_v) & (columns < q), other=0)
        m_sum += tl.sum(g * m_columns, 3)
        v_sum += tl.sum(tl.abs(g) * v_columns, 3)
        square += tl.sum(g * g, 3)
        raised += tl.sum((g * RAISED) * (g * RAISED), 3)
    row, m_rank, v_rank = (
        block * ROWS + tl.arange(0, ROWS)[None, :],
        tl.arange(0, K_M)[:, None],
        tl.arange(0, K_V)[:, None],
    )
    m_at = (matrix * p + row) * k_m + m_rank
    v_at = (matrix * p + row) * k_v + v_rank
    tl.store(m_X + m_at, tl.sum(m_sum, 2), mask=(row < p) & (m_rank < k_m))
    tl.store(v_X + v_at, tl.sum(v_sum, 2), mask=(row < p) & (v_rank < k_v))
    at = squares + (matrix * tl.num_programs(0) + block) * 2
    tl.store(at, tl.sum(tl.sum(tl.sum(square, 2), 1), 0))
    tl.store(at + 1, tl.sum(tl.sum(tl.sum(raised, 2), 1), 0))


@triton.jit
def _three(x):
    """Return three bfloat16 numbers whose sum differs from x by less than float32's last place."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _fit_bfloat16(
    grads, m_A, v_A, m_X, v_X, squares, p, q, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Do what `_fit` does on tensor cores. Products of bfloat16 gradients with a factor's bfloat16 parts are exact."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g_ptr = own(grads, matrix, tl.bfloat16, ALIGNED)
    m_A += matrix * k_m * q
    v_A += matrix * k_v * q
    rows = block * ROWS + tl.arange(0, ROWS)[:, None]
    m_ranks, v_ranks = tl.arange(0, K_M), tl.arange(0, K_V)
    m_sum = tl.zeros((ROWS, K_M), tl.float32)
    v_sum = tl.zeros((ROWS, K_V if K_V > 1 else COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    raised = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, q, COLUMNS, num_stages=STAGES):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < q
        g = tl.load(g_ptr + rows.to(tl.int64) * q + columns[None, :], mask=(rows < p) & inside[None, :], other=0)
        wide = g.to(tl.float32)
        square += wide * wide
        raised += (wide * RAISED) * (wide * RAISED)
        # The parts are [columns, ranks], which is the shape that a product takes.
        at = m_ranks[None, :] * q + columns[:, None]
        high, middle, low = _three(tl.load(m_A + at, mask=(m_ranks[None, :] < k_m) & inside[:, None], other=0))
        m_sum = tl.dot(g, high, tl.dot(g, middle, tl.dot(g, low, m_sum)))
        if K_V > 1:
            at = v_ranks[None, :] * q + columns[:, None]
            high, middle, low = _three(tl.load(v_A + at, mask=(v_ranks[None, :] < k_v) & inside[:, None], other=0))
            size = tl.abs(g)
            v_sum = tl.dot(size, high, tl.dot(size, middle, tl.dot(size, low, v_sum)))
        else:
            v_sum += tl.abs(wide) * tl.load(v_A + columns, mask=inside, other=0)[None, :]
    tl.store(m_X + (matrix * p + rows) * k_m + m_ranks[None, :], m_sum, mask=(rows < p) & (m_ranks[None, :] < k_m))
    if K_V > 1:
        tl.store(v_X + (matrix * p + rows) * k_v + v_ranks[None, :], v_sum, mask=(rows < p) & (v_ranks[None, :] < k_v))
    else:
        row = block * ROWS + tl.arange(0, ROWS)
        tl.store(v_X + matrix * p + row, tl.sum(v_sum, 1), mask=row < p)
    at = squares + (matrix * tl.num_programs(0) + block) * 2
    tl.store(at, tl.sum(tl.sum(square, 1), 0))
    tl.store(at + 1, tl.sum(tl.sum(raised, 1), 0))


@triton.jit
def _update(
    grads, thetas, states, C, m_B, v_B, m_A, v_A, v_squares, m_P, v_P, table, keys, largest, clamped,
    stride, n, p, q, k_m, k_v, rows_per_split,
    K_M: tl.constexpr, K_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr,
    STAGES: tl.constexpr,
    GRAD: tl.constexpr, PARAM: tl.constexpr, ALIGNED: tl.constexpr,
    TRACKED: tl.constexpr, STOCHASTIC: tl.constexpr, METRICS: tl.constexpr,
):  # fmt: skip
    """Write θ ← θ − step · u − decay · θ for some rows of a block of columns, and their part of Bᵀx for both moments.

    u is (C m_A + residual · g) / (√((v_scale v_B v_A)² + g²) + eps). For `als` it is clamped to ±limit, and Bᵀx is
    B'ᵀx with the new B.
    """
    block, split, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g_ptr = own(grads, matrix, GRAD, ALIGNED)
    theta_ptr = own(thetas, matrix, PARAM, ALIGNED)
    g_scale, residual = number(table, G_SCALE, n, matrix), number(table, RESIDUAL, n, matrix)
    v_scale, eps = number(table, V_SCALE, n, matrix), number(table, ROOT_EPS, n, matrix)
    step, decay = number(table, STEP_SIZE, n, matrix), number(table, DECAY, n, matrix)
    limit = number(table, LIMIT, n, matrix)
    here = tl.where(number(table, UPDATES, n, matrix) > 0, p, 0)  # Rows up to here are read and written.
    key, salted = tl.load(keys + matrix).to(tl.uint32), tl.load(keys + n + matrix).to(tl.uint32)
    # Four columns lie side by side, which are 16 bytes of a factor. Gradients of 2 bytes then lie in the same threads.
    columns = block * COLUMNS + tl.max_contiguous(tl.arange(0, COLUMNS), 4)[None, None, :]
    m_ranks, v_ranks = tl.arange(0, K_M)[:, None, None], tl.arange(0, K_V)[:, None, None]
    m_columns = tl.load(m_A + matrix * k_m * q + m_ranks * q + columns, mask=(m_ranks < k_m) & (columns < q), other=0)
    v_columns = tl.load(v_A + matrix * k_v * q + v_ranks * q + columns, mask=(v_ranks < k_v) & (columns < q), other=0)
    if TRACKED:  # B of dead directions counts as zero.
        alive = tl.load(v_squares + matrix * k_v + v_ranks, mask=v_ranks < k_v, other=0) != 0
        v_columns = tl.where(alive, v_columns, 0)
    v_columns = v_columns * v_scale
    C += matrix * p * k_m
    v_old = state_of(states, V_B, stride, matrix)
    if TRACKED:
        m_rows, v_rows = m_B + matrix * p * k_m, v_B + matrix * p * k_v
    else:
        m_rows, v_rows = state_of(states, M_B, stride, matrix), v_old
    m_sum = tl.zeros((K_M, SUMS, COLUMNS), tl.float32)
    v_sum = tl.zeros((K_V, SUMS, COLUMNS), tl.float32)
    most = tl.zeros((1, ROWS, COLUMNS), tl.float32)
    count = tl.zeros((1, ROWS, COLUMNS), tl.int32)
    first = split * rows_per_split
    for start in tl.range(first, min(first + rows_per_split, p), ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)[None, :, None]
        at = rows.to(tl.int64) * q + columns
        inside = (rows < here) & (columns < q)
        g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32) * g_scale
        theta = tl.load(theta_ptr + at, mask=inside, other=0).to(tl.float32)
        m_at, m_inside = rows * k_m + m_ranks, (rows < p) & (m_ranks < k_m)
        v_at, v_inside = rows * k_v + v_ranks, (rows < p) & (v_ranks < k_v)
        c = tl.load(C + m_at, mask=m_inside, other=0)
        m = tl.sum(c * m_columns, 0, keep_dims=True) + residual * g
        root = tl.sum(tl.load(v_old + v_at, mask=v_inside, other=0) * v_columns, 0, keep_dims=True)
        u = quotient(m, root * root + g * g, eps)
        if METRICS:
            size = tl.where(inside, tl.abs(u), 0.0)
            most = tl.maximum(most, size)
            count += (size > limit).to(tl.int32)
        if TRACKED:
            u = within(u, limit)
        new = theta - (step * u + decay * theta)
        if STOCHASTIC:
            new = rounded_stochastically(new, at.to(tl.uint32), key, salted)
        tl.store(theta_ptr + at, new.to(PARAM), mask=inside)
        m_part = tl.load(m_rows + m_at, mask=m_inside, other=0) * g
        v_part = tl.load(v_rows + v_at, mask=v_inside, other=0) * tl.abs(g)
        m_sum += m_part if SUMS == ROWS else tl.sum(m_part, 1, keep_dims=True)
        v_sum += v_part if SUMS == ROWS else tl.sum(v_part, 1, keep_dims=True)
    column, m_rank, v_rank = (
        block * COLUMNS + tl.arange(0, COLUMNS)[None, :],
        tl.arange(0, K_M)[:, None],
        tl.arange(0, K_V)[:, None],
    )
    at = split * n + matrix
    tl.store(m_P + (at * k_m + m_rank) * q + column, tl.sum(m_sum, 1), mask=(m_rank < k_m) & (column < q))
    tl.store(v_P + (at * k_v + v_rank) * q + column, tl.sum(v_sum, 1), mask=(v_rank < k_v) & (column < q))
    if METRICS:
        program = at * tl.num_programs(0) + block
        tl.store(largest + program, tl.max(tl.max(tl.max(most, 2), 1), 0))
        tl.store(clamped + program, tl.sum(tl.sum(tl.sum(count, 2), 1), 0))


@triton.jit
def _update_bfloat16(
    grads, thetas, states, C, m_B, v_B, m_A, v_A, v_squares, m_P, v_P, table, keys, largest, clamped,
    stride, n, p, q, k_m, k_v, rows_per_split,
    K_M: tl.constexpr, K_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, TRACKED: tl.constexpr, STOCHASTIC: tl.constexpr, METRICS: tl.constexpr,
):  # fmt: skip
    """Do what `_update` does on tensor cores, for bfloat16 gradients and weights.

    C m_A is a product of three TF32 parts of each factor, which differs from float32's in its last places. Those of
    bfloat16 gradients with B's bfloat16 parts are exact. K_M and, where it is not 1, K_V are at least 16.
    """
    block, split, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g_ptr = own(grads, matrix, tl.bfloat16, ALIGNED)
    theta_ptr = own(thetas, matrix, tl.bfloat16, ALIGNED)
    g_scale, residual = number(table, G_SCALE, n, matrix), number(table, RESIDUAL, n, matrix)
    v_scale, eps = number(table, V_SCALE, n, matrix), number(table, ROOT_EPS, n, matrix)
    step, decay = number(table, STEP_SIZE, n, matrix), number(table, DECAY, n, matrix)
    limit = number(table, LIMIT, n, matrix)
    here = tl.where(number(table, UPDATES, n, matrix) > 0, p, 0)  # Rows up to here are read and written.
    key, salted = tl.load(keys + matrix).to(tl.uint32), tl.load(keys + n + matrix).to(tl.uint32)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    m_ranks, v_ranks = tl.arange(0, K_M), tl.arange(0, K_V)
    m_columns = tl.load(
        m_A + matrix * k_m * q + m_ranks[:, None] * q + columns[None, :],
        mask=(m_ranks[:, None] < k_m) & (columns[None, :] < q), other=0,
    )  # fmt: skip
    v_columns = tl.load(
        v_A + matrix * k_v * q + v_ranks[:, None] * q + columns[None, :],
        mask=(v_ranks[:, None] < k_v) & (columns[None, :] < q), other=0,
    )  # fmt: skip
    if TRACKED:  # B of dead directions counts as zero.
        alive = tl.load(v_squares + matrix * k_v + v_ranks, mask=v_ranks < k_v, other=0) != 0
        v_columns = tl.where(alive[:, None], v_columns, 0)
    v_columns = v_columns * v_scale
    C += matrix * p * k_m
    v_old = state_of(states, V_B, stride, matrix)
    if TRACKED:
        m_rows, v_rows = m_B + matrix * p * k_m, v_B + matrix * p * k_v
    else:
        m_rows, v_rows = state_of(states, M_B, stride, matrix), v_old
    m_sum = tl.zeros((COLUMNS, K_M), tl.float32)
    v_sum = tl.zeros((COLUMNS, K_V), tl.float32) if K_V > 1 else tl.zeros((ROWS, COLUMNS), tl.float32)
    most = tl.zeros((ROWS, COLUMNS), tl.float32)
    count = tl.zeros((ROWS, COLUMNS), tl.int32)
    first = split * rows_per_split
    for start in tl.range(first, min(first + rows_per_split, p), ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        at = rows[:, None].to(tl.int64) * q + columns[None, :]
        inside = (rows[:, None] < here) & (columns[None, :] < q)
        raw = tl.load(g_ptr + at, mask=inside, other=0)
        theta = tl.load(theta_ptr + at, mask=inside, other=0).to(tl.float32)
        m_at, m_inside = rows[:, None] * k_m + m_ranks[None, :], (rows[:, None] < p) & (m_ranks[None, :] < k_m)
        v_at, v_inside = rows[:, None] * k_v + v_ranks[None, :], (rows[:, None] < p) & (v_ranks[None, :] < k_v)
        g = raw.to(tl.float32) * g_scale
        m = tl.dot(tl.load(C + m_at, mask=m_inside, other=0), m_columns, input_precision="tf32x3") + residual * g
        v = tl.load(v_old + v_at, mask=v_inside, other=0)
        root = tl.dot(v, v_columns, input_precision="tf32x3") if K_V > 1 else v * v_columns
        u = quotient(m, root * root + g * g, eps)
        if METRICS:
            size = tl.where(inside, tl.abs(u), 0.0)
            most = tl.maximum(most, size)
            count += (size > limit).to(tl.int32)
        if TRACKED:
            u = within(u, limit)
        new = theta - (step * u + decay * theta)
        if STOCHASTIC:
            new = rounded_stochastically(new, at.to(tl.uint32), key, salted)
        tl.store(theta_ptr + at, new.to(tl.bfloat16), mask=inside)
        turned = tl.trans(raw)
        high, middle, low = _three(tl.load(m_rows + m_at, mask=m_inside, other=0))
        m_sum = tl.dot(turned, high, tl.dot(turned, middle, tl.dot(turned, low, m_sum)))
        v = tl.load(v_rows + v_at, mask=v_inside, other=0)
        if K_V > 1:
            high, middle, low = _three(v)
            turned = tl.abs(turned)
            v_sum = tl.dot(turned, high, tl.dot(turned, middle, tl.dot(turned, low, v_sum)))
        else:
            v_sum += v * tl.abs(raw.to(tl.float32))
    at = split * n + matrix
    tl.store(
        m_P + (at * k_m + m_ranks[None, :]) * q + columns[:, None], m_sum * g_scale,
        mask=(m_ranks[None, :] < k_m) & (columns[:, None] < q),
    )  # fmt: skip
    if K_V > 1:
        tl.store(
            v_P + (at * k_v + v_ranks[None, :]) * q + columns[:, None], v_sum * tl.abs(g_scale),
            mask=(v_ranks[None, :] < k_v) & (columns[:, None] < q),
        )  # fmt: skip
    else:
        tl.store(v_P + at * q + columns, tl.sum(v_sum, 0) * tl.abs(g_scale), mask=columns < q)
    if METRICS:
        program = at * tl.num_programs(0) + block
        tl.store(largest + program, tl.max(tl.max(most, 1), 0))
        tl.store(clamped + program, tl.sum(tl.sum(count, 1), 0))
