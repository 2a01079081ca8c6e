"""AdamW's whole step in six Triton kernels for equal matrices together, without any p×q temporary.

`_begin` looks at the old A factors, `_fit` reads the gradients once for X = g Aᵀ and ‖g‖, `_numbers` computes what
belongs to a matrix, `_rows` moves the B factors on, `_update` reads the gradients once more and writes the weights, and
`_columns` finishes both factors. Gradients, weights and state are read and written where they lie, through tables of
their addresses. The host reads nothing. Sums are added in a fixed order, so that every replica gets the same bits. What
is k×k, and every number of a matrix, is float64; products with gradients are float32, written out for small ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..lowrank import rounding
from ..lowrank.rules import MIN_FACTOR_NORM
from .table import OPTIONS, POINTERS

# What `_numbers` writes of each matrix for the kernels after it, the rows of a table [len(NUMBERS), n] float32. Bias
# corrections and v's energy are inside: m/(√v + ε) becomes u = ((c_B B_m + c_X X_m) A_m + residual · g) /
# (√((v_scale v_B v_A)² + g²) + eps), and the weight θ ← θ − (step · clamped(u) + decay · θ) where ``updates`` is 1.
NUMBERS = (
    *("g_scale", "m_keep", "m_gain", "v_keep", "v_gain", "c_B", "c_X"),
    *("residual", "v_scale", "eps", "step", "decay", "updates", "limit"),
)
# The rows of the three tables by name, as the kernels read them.
(
    BETA1, BETA2, LR, WEIGHT_DECAY, EPS, RESIDUAL_WEIGHT, UPDATE_SCALE, MAX_NORM, SIGN, BOUND, _, DAMPING, SEED, _,
    SKIPS_ZEROS,
) = map(tl.constexpr, range(len(OPTIONS)))  # fmt: skip
STEP, M_B, M_A, V_B, V_A, ENERGY, SCALE = map(tl.constexpr, range(len(POINTERS)))
(
    G_SCALE, M_KEEP, M_GAIN, V_KEEP, V_GAIN, C_B, C_X, RESIDUAL, V_SCALE, ROOT_EPS, LENGTH, DECAY, UPDATES, LIMIT,
) = map(tl.constexpr, range(len(NUMBERS)))  # fmt: skip
FOUND: tl.constexpr = tl.constexpr(2)  # of `_numbers`: ‖g‖ after clipping, −1 without a gradient; and as it is used
SALT: tl.constexpr = tl.constexpr(rounding.SALT)
SALTED: tl.constexpr = tl.constexpr(rounding.mix(rounding.SALT))  # of key 0
LARGEST_SQUARE: tl.constexpr = tl.constexpr(3.4028234663852886e38)
# Squares of gradients below 2⁻⁶⁰ are added again 2¹²⁰ times as large, as float32 does not hold them.
RAISED: tl.constexpr = tl.constexpr(2.0**60)
SMALL_SQUARE: tl.constexpr = tl.constexpr(2.0**-100)
SMALLEST_NORM: tl.constexpr = tl.constexpr(MIN_FACTOR_NORM)
TINY32: tl.constexpr = tl.constexpr(2.0**-126)
TINY64: tl.constexpr = tl.constexpr(2.0**-1022)


# ---- reading and writing --------------------------------------------------------------------------------------------


@triton.jit
def _own(addresses, matrix, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to the first entry of one matrix, from a table of addresses."""
    pointer = tl.load(addresses + matrix).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, [16]) if ALIGNED else pointer


@triton.jit
def _state(states, name: tl.constexpr, stride, matrix):
    return tl.load(states + name * stride + matrix).to(tl.pointer_type(tl.float32))


@triton.jit
def _option(settings, name: tl.constexpr, n_groups, group):
    return tl.load(settings + name * n_groups + group)


@triton.jit
def _put_square(pointer, matrix, K: tl.constexpr):
    """Write a block [K, K]."""
    tl.store(pointer + tl.arange(0, K)[:, None] * K + tl.arange(0, K)[None, :], matrix)


@triton.jit
def _sum_squares(pointer, count, K: tl.constexpr):
    """The sum of so many blocks [K, K] float64, one after the other."""
    at = pointer + tl.arange(0, K)[:, None] * K + tl.arange(0, K)[None, :]
    result = tl.zeros((K, K), tl.float64)
    for i in range(count):
        result += tl.load(at + i * K * K)
    return result


@triton.jit
def _hash(bits, key):
    """One round of lowbias32 (see `rounding`), uint32."""
    bits = bits ^ key
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _power(base, exponent):
    """base ** exponent for a whole exponent, float64."""
    result = tl.full((), 1, tl.float64)
    while exponent > 0:
        result = tl.where(exponent & 1 != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


# ---- k×k ------------------------------------------------------------------------------------------------------------


@triton.jit
def _trace(matrix, K: tl.constexpr):
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    return tl.sum(tl.sum(tl.where(i == j, matrix, 0), 1), 0)


@triton.jit
def _product(a, b):
    """a b of blocks [K, K]."""
    return tl.sum(a[:, :, None] * b[None, :, :], 1)


@triton.jit
def _damped(gram, ridge, K: tl.constexpr):
    """gram + ridge · I with a ridge that float64 resolves beside the trace; the part outside k×k is ridge · I."""
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    ridge = tl.maximum(ridge, 1e-15 * _trace(gram, K) + TINY64)
    return tl.where(i == j, gram + ridge, gram)


@triton.jit
def _inverse(matrix, K: tl.constexpr):
    """The inverse of a positive matrix, as `linalg.damped_inverse`; of the diagonal alone where a pivot is not."""
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
def _inverse_root(matrix, K: tl.constexpr):
    """L⁻¹ of the Cholesky factor of a positive matrix, as `linalg.inverse_root`."""
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


# ---- the kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def _lengths(
    states, m_lengths, v_lengths, stride, q, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """‖row‖² of the old A factors, float64."""
    matrix = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _row_squares(_state(states, M_A, stride, matrix), m_lengths + matrix * k_m, k_m, q, K_M, COLUMNS)
    else:
        _row_squares(_state(states, V_A, stride, matrix), v_lengths + matrix * k_v, k_v, q, K_V, COLUMNS)


@triton.jit
def _row_squares(A, lengths, k, q, K: tl.constexpr, COLUMNS: tl.constexpr):
    ranks = tl.arange(0, K)
    squares = tl.zeros((K, COLUMNS), tl.float64)
    for start in range(0, q, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (ranks[:, None] < k) & (columns[None, :] < q)
        a = tl.load(A + ranks[:, None] * q + columns[None, :], mask=inside, other=0).to(tl.float64)
        squares += a * a
    tl.store(lengths + ranks, tl.sum(squares, 1), mask=ranks < k)


@triton.jit
def _start(
    states, m_lengths, v_lengths, m_A, v_A, m_grams, v_grams, stride, q, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, M_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    TRACKED: tl.constexpr,
):  # fmt: skip
    """Copies of the old A factors with dead directions restarted (`Als.restart`), and their A Aᵀ, block by block."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = matrix * tl.num_programs(0) + block
    if tl.program_id(2) == 0:
        _start_moment(
            _state(states, M_A, stride, matrix), m_lengths + matrix * k_m, m_A + matrix * k_m * q,
            m_grams + at * K_M * K_M, block, k_m, q, K_M, M_BLOCK, REPEATS * V_BLOCK // M_BLOCK, TRACKED,
        )  # fmt: skip
    else:
        _start_moment(
            _state(states, V_A, stride, matrix), v_lengths + matrix * k_v, v_A + matrix * k_v * q,
            v_grams + at * K_V * K_V, block, k_v, q, K_V, V_BLOCK, REPEATS, TRACKED,
        )  # fmt: skip


@triton.jit
def _start_moment(
    A, lengths, A_used, grams, block, k, q, K: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    TRACKED: tl.constexpr,
):  # fmt: skip
    ranks = tl.arange(0, K)
    squares = tl.load(lengths + ranks, mask=ranks < k, other=1)
    dead = squares == 0
    living = k - tl.sum(dead.to(tl.int32), 0)
    whole = tl.sum(tl.where(ranks < k, squares, 0), 0)
    level = tl.where(living > 0, whole / tl.maximum(living, 1), 1.0)
    length = tl.sqrt(3.0 / q * level).to(tl.float32)  # a test row's mean square is 1/3
    gram = tl.zeros((K, K), tl.float64)
    for repeat in range(REPEATS):
        columns = (block * REPEATS + repeat) * BLOCK + tl.arange(0, BLOCK)
        inside = (ranks[:, None] < k) & (columns[None, :] < q)
        at = ranks[:, None] * q + columns[None, :]
        a = tl.load(A + at, mask=inside, other=0)
        if TRACKED:
            bits = _hash(_hash(at.to(tl.uint32), tl.full((), 0, tl.uint32)), tl.full((), SALTED, tl.uint32))
            a = tl.where(dead[:, None] & inside, (bits >> 8).to(tl.float32) * (length * 5.9604644775390625e-8), a)
        tl.store(A_used + at, a, mask=inside)
        a = a.to(tl.float64)
        gram += tl.sum(a[:, None, :] * a[None, :, :], 2)
    _put_square(grams, gram, K)


@triton.jit
def _fit(
    grads, m_A, v_A, m_X, v_X, squares, p, q, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANE: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """g A_mᵀ and |g| v_Aᵀ of some rows, and the sum of their squares, of gradients as they are."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g_ptr = _own(grads, matrix, GRAD, ALIGNED)
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
    """Three bfloat16 numbers whose sum is x, but for less than float32's last place."""
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
    """`_fit` on tensor cores: products of bfloat16 gradients with three bfloat16 parts of a factor are exact."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g_ptr = _own(grads, matrix, tl.bfloat16, ALIGNED)
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
        # As [columns, ranks], the shape that a product takes.
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
def _numbers(
    states, squares, m_lengths, v_lengths, m_grams, v_grams, m_R, v_R, settings, groups, positions, table, keys, found,
    stride, n, n_groups, k_m, k_v, row_blocks, column_blocks,
    K_M: tl.constexpr, K_V: tl.constexpr, BLOCKS: tl.constexpr, TRACKED: tl.constexpr,
):  # fmt: skip
    """(A Aᵀ + damping)⁻¹ of both moments, and everything that is a number of one matrix, float64: the rule's
    (`rules`), Adam's (`eager.adam_scalars`) and the group's; and the count of steps.
    """
    matrix = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + matrix)
    damping = _option(settings, DAMPING, n_groups, group)
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
    beta1, beta2 = _option(settings, BETA1, n_groups, group), _option(settings, BETA2, n_groups, group)
    index = tl.arange(0, BLOCKS)
    at, inside = squares + (matrix * row_blocks + index) * 2, index < row_blocks
    square = tl.sum(tl.load(at, mask=inside, other=0).to(tl.float64), 0)
    raised = tl.sum(tl.load(at + 1, mask=inside, other=0).to(tl.float64), 0)
    small = square < SMALL_SQUARE
    norm = tl.where(small, tl.sqrt(raised) / RAISED, tl.sqrt(square))
    idle = (_option(settings, SKIPS_ZEROS, n_groups, group) != 0) & (norm == 0)
    usable = (norm * norm <= LARGEST_SQUARE) & (idle == 0)  # NaN is not
    limit = _option(settings, MAX_NORM, n_groups, group)
    clip = tl.where(usable & (norm > limit), limit / norm, 1.0)
    tl.store(found + matrix * FOUND, tl.where(idle, -1.0, norm * tl.where(usable, clip, 1.0)))
    norm = tl.where(usable, norm * clip, 0.0)
    tl.store(found + matrix * FOUND + 1, norm)

    step_ptr = _state(states, STEP, stride, matrix)
    steps = tl.load(step_ptr) + 1
    c = tl.full((), 1, tl.float64)
    if TRACKED:
        steps = tl.where(tl.load(_state(states, ENERGY, stride, matrix)) > 0, steps, (norm > 0).to(tl.float32))
        c = tl.load(_state(states, SCALE, stride, matrix)).to(tl.float64)
    held = tl.where(usable, steps, tl.load(step_ptr))
    t = tl.maximum(steps, 1).to(tl.int32)
    corrected1, corrected2 = 1 - _power(beta1, t), 1 - _power(beta2, t)
    v_decay = tl.sqrt(beta2)
    if TRACKED:
        m_old, v_old = _norm(m_lengths + matrix * k_m, k_m, K_M), _norm(v_lengths + matrix * k_v, k_v, K_V)
        m_length, v_length = tl.sqrt(m_trace), tl.sqrt(v_trace)
        m_keep, m_gain, v_keep, v_gain = beta1, 1 - beta1, v_decay, 1 - v_decay
        m_size = tl.maximum(m_keep * m_old * m_length, m_gain * norm)
        v_size = tl.maximum(v_keep * v_old * v_length, v_gain * norm)
        m_unit = m_length / tl.maximum(m_size, SMALLEST_NORM * SMALLEST_NORM)
        v_unit = v_length / tl.maximum(v_size, SMALLEST_NORM * SMALLEST_NORM)
        residual = tl.minimum(corrected1, _option(settings, RESIDUAL_WEIGHT, n_groups, group))
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
    lr = _option(settings, LR, n_groups, group)
    g_scale = clip * _option(settings, SIGN, n_groups, group)
    _put(table, G_SCALE, n, matrix, g_scale)
    _put(table, M_KEEP, n, matrix, m_keep * m_unit)
    _put(table, M_GAIN, n, matrix, m_gain * m_unit)
    _put(table, V_KEEP, n, matrix, v_keep * v_unit)
    _put(table, V_GAIN, n, matrix, v_gain * v_unit)
    _put(table, C_B, n, matrix, beta1 * size)
    _put(table, C_X, n, matrix, x_part * size)
    _put(table, RESIDUAL, n, matrix, residual * size)
    _put(table, V_SCALE, n, matrix, tl.sqrt(c * (beta2 / (1 - beta2))))
    _put(table, ROOT_EPS, n, matrix, _option(settings, EPS, n_groups, group) / root)
    _put(table, LENGTH, n, matrix, lr * _option(settings, UPDATE_SCALE, n_groups, group))
    _put(table, DECAY, n, matrix, lr * _option(settings, WEIGHT_DECAY, n_groups, group))
    _put(table, UPDATES, n, matrix, usable.to(tl.float32))
    _put(table, LIMIT, n, matrix, _option(settings, BOUND, n_groups, group))
    tl.store(step_ptr, held)
    none = tl.full((), 0, tl.uint32)
    seed = _option(settings, SEED, n_groups, group).to(tl.int64).to(tl.uint32)
    key = _hash(_hash(seed + tl.load(positions + matrix).to(tl.uint32), none) + held.to(tl.int64).to(tl.uint32), none)
    tl.store(keys + matrix, key.to(tl.int64))
    tl.store(keys + n + matrix, _hash(key + tl.full((), SALT, tl.uint32), none).to(tl.int64))


@triton.jit
def _invert(grams, inverse, blocks, damping, k, K: tl.constexpr, TRACKED: tl.constexpr):
    """Write (A Aᵀ + damping)⁻¹, from the sums over blocks; returns ‖A‖²."""
    gram = _sum_squares(grams, blocks, K)
    trace = _trace(gram, K)
    _put_square(inverse, _inverse(_damped(gram, damping * trace / k if TRACKED else damping, K), K).to(tl.float32), K)
    return trace


@triton.jit
def _norm(lengths, k, K: tl.constexpr):
    return tl.sqrt(tl.sum(tl.load(lengths + tl.arange(0, K), mask=tl.arange(0, K) < k, other=0), 0))


@triton.jit
def _put(table, name: tl.constexpr, n, matrix, value):
    tl.store(table + name * n + matrix, value.to(tl.float32))


@triton.jit
def _number(table, name: tl.constexpr, n, matrix):
    return tl.load(table + name * n + matrix)


@triton.jit
def _rows(
    states, m_X, v_X, m_R, v_R, m_lengths, v_lengths, m_B, v_B, C, m_grams, v_grams, table, stride, n, p, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, M_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    TRACKED: tl.constexpr,
):  # fmt: skip
    """B' of both moments, C with m's part of the update C A_m, and the Gram matrices of B' and B, block by block."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = matrix * tl.num_programs(0) + block
    g_scale = _number(table, G_SCALE, n, matrix)
    if tl.program_id(2) == 0:
        m_at = matrix * p * k_m
        _move_rows(
            m_X + m_at, m_R + matrix * K_M * K_M, _state(states, M_B, stride, matrix), m_lengths + matrix * k_m,
            m_B + m_at, C + m_at, m_grams + at * 2 * K_M * K_M, g_scale, _number(table, M_KEEP, n, matrix),
            _number(table, M_GAIN, n, matrix), _number(table, C_B, n, matrix), _number(table, C_X, n, matrix),
            block, p, k_m, K_M, M_BLOCK, REPEATS * V_BLOCK // M_BLOCK, True, TRACKED,
        )  # fmt: skip
    else:
        v_at = matrix * p * k_v
        _move_rows(
            v_X + v_at, v_R + matrix * K_V * K_V, _state(states, V_B, stride, matrix), v_lengths + matrix * k_v,
            v_B + v_at, C, v_grams + at * 2 * K_V * K_V, tl.abs(g_scale), _number(table, V_KEEP, n, matrix),
            _number(table, V_GAIN, n, matrix), 0.0, 0.0, block, p, k_v, K_V, V_BLOCK, REPEATS, False, TRACKED,
        )  # fmt: skip


@triton.jit
def _move_rows(
    X, R, B, lengths, B_new, coefficients, grams, scale, keep, gain, c_B, c_X, block, p, k,
    K: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr, MIXES: tl.constexpr, TRACKED: tl.constexpr,
):  # fmt: skip
    """X ← scale · X R; write B' = keep · B + gain · X, of m also c_B B + c_X X, and the sums B'ᵀB' and B'ᵀB, or for
    `newton` BᵀB, of these rows. B of dead directions is zero.
    """
    ranks = tl.arange(0, K)[:, None]
    alive = tl.load(lengths + ranks, mask=ranks < k, other=0) > 0
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
    _put_square(grams, gram, K)
    _put_square(grams + K * K, cross, K)


@triton.jit
def _update(
    grads, thetas, states, C, m_B, v_B, m_A, v_A, v_lengths, m_P, v_P, table, keys, largest, clamped,
    stride, n, p, q, k_m, k_v, rows_per_split,
    K_M: tl.constexpr, K_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr,
    GRAD: tl.constexpr, PARAM: tl.constexpr, ALIGNED: tl.constexpr,
    TRACKED: tl.constexpr, STOCHASTIC: tl.constexpr, METRICS: tl.constexpr,
):  # fmt: skip
    """θ ← θ − step · u − decay · θ for some rows of a block of columns, and Bᵀg of those rows for both moments.

    u = (C A_m + residual · g) / (√((s v_B v_A)² + g²) + eps), clamped to ±limit.
    """
    block, split, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g_ptr = _own(grads, matrix, GRAD, ALIGNED)
    theta_ptr = _own(thetas, matrix, PARAM, ALIGNED)
    g_scale, residual = _number(table, G_SCALE, n, matrix), _number(table, RESIDUAL, n, matrix)
    v_scale, eps = _number(table, V_SCALE, n, matrix), _number(table, ROOT_EPS, n, matrix)
    step, decay = _number(table, LENGTH, n, matrix), _number(table, DECAY, n, matrix)
    limit = _number(table, LIMIT, n, matrix)
    here = tl.where(_number(table, UPDATES, n, matrix) > 0, p, 0)  # rows that are read and written
    key, salted = tl.load(keys + matrix).to(tl.uint32), tl.load(keys + n + matrix).to(tl.uint32)
    # Four side by side, which are 16 bytes of a factor: gradients of 2 bytes then lie in the same threads.
    columns = block * COLUMNS + tl.max_contiguous(tl.arange(0, COLUMNS), 4)[None, None, :]
    m_ranks, v_ranks = tl.arange(0, K_M)[:, None, None], tl.arange(0, K_V)[:, None, None]
    m_columns = tl.load(m_A + matrix * k_m * q + m_ranks * q + columns, mask=(m_ranks < k_m) & (columns < q), other=0)
    v_columns = tl.load(v_A + matrix * k_v * q + v_ranks * q + columns, mask=(v_ranks < k_v) & (columns < q), other=0)
    if TRACKED:  # B of dead directions is zero
        alive = tl.load(v_lengths + matrix * k_v + v_ranks, mask=v_ranks < k_v, other=0) > 0
        v_columns = tl.where(alive, v_columns, 0)
    v_columns = v_columns * v_scale
    C += matrix * p * k_m
    v_old = _state(states, V_B, stride, matrix)
    if TRACKED:
        m_rows, v_rows = m_B + matrix * p * k_m, v_B + matrix * p * k_v
    else:
        m_rows, v_rows = _state(states, M_B, stride, matrix), v_old
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
        u = m / (tl.sqrt(root * root + g * g) + eps)
        if METRICS:
            size = tl.where(inside, tl.abs(u), 0.0)
            most = tl.maximum(most, size)
            count += (size > limit).to(tl.int32)
        if TRACKED:
            u = tl.minimum(tl.maximum(u, -limit), limit)
        new = theta - (step * u + decay * theta)
        if STOCHASTIC:
            bits = _hash(_hash(at.to(tl.uint32), key), salted) & 0xFFFF
            rounded = ((new.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
            new = tl.where(tl.abs(new) < float("inf"), rounded, new)
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
def _solve(
    m_grams, v_grams, m_turn, v_turn, m_by, v_by, settings, groups, n_groups, k_m, k_v, blocks,
    K_M: tl.constexpr, K_V: tl.constexpr, TRACKED: tl.constexpr,
):  # fmt: skip
    """The rule's column part (`rules.columns`) for m or v: the sums of the Gram matrices and what B', A and P are
    multiplied by.
    """
    matrix = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + matrix)
    damping = _option(settings, DAMPING, n_groups, group)
    if tl.program_id(1) == 0:
        _solve_moment(
            m_grams + matrix * blocks * 2 * K_M * K_M, m_turn + matrix * 2 * K_M * K_M, m_by + matrix * 2 * K_M * K_M,
            _option(settings, BETA1, n_groups, group), damping, k_m, blocks, K_M, TRACKED,
        )  # fmt: skip
    else:
        _solve_moment(
            v_grams + matrix * blocks * 2 * K_V * K_V, v_turn + matrix * 2 * K_V * K_V, v_by + matrix * 2 * K_V * K_V,
            tl.sqrt(_option(settings, BETA2, n_groups, group)), damping, k_v, blocks, K_V, TRACKED,
        )  # fmt: skip


@triton.jit
def _solve_moment(grams, turned, by, decay, damping, k, blocks, K: tl.constexpr, TRACKED: tl.constexpr):
    """Write turn and turn B'ᵀB' turnᵀ; and by_A and by_P, of which A' = by_A A + by_P P."""
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    turn = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    at = grams + i * K + j
    gram, cross = tl.zeros((K, K), tl.float64), tl.zeros((K, K), tl.float64)
    for block in range(blocks):
        gram += tl.load(at + block * 2 * K * K)
        cross += tl.load(at + (block * 2 + 1) * K * K)
    if TRACKED:
        turn = _inverse_root(_damped(gram, damping * _trace(gram, K) / k, K), K)
        by_A, by_P = decay * _product(turn, cross), (1 - decay) * turn
    else:
        root = tl.sqrt(decay)
        by_A, by_P = root * turn, (1 - root) * _inverse(_damped(gram, damping, K), K)
    _put_square(turned, turn, K)
    _put_square(turned + K * K, _product(_product(turn, gram), tl.trans(turn)), K)
    _put_square(by, by_A, K)
    _put_square(by + K * K, by_P, K)


@triton.jit
def _columns(
    m_A, v_A, m_by, v_by, m_A_new, v_A_new, m_P, v_P, m_grams, v_grams, n, q, k_m, k_v, splits,
    K_M: tl.constexpr, K_V: tl.constexpr, M_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """A' = by_A A + by_P P of m or v, and A' A'ᵀ, block by block."""
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
    i, j, ranks = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :], tl.arange(0, K)[:, None]
    by_A, by_P = tl.load(by + i * K + j), tl.load(by + K * K + i * K + j)
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
    _put_square(grams, gram, K)


@triton.jit
def _balance(
    states, m_turn, v_turn, m_B, v_B, m_A_new, v_A_new, m_grams, v_grams, table, found, settings, groups,
    stride, n, n_groups, p, q, k_m, k_v, blocks,
    K_M: tl.constexpr, K_V: tl.constexpr, M_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, REPEATS: tl.constexpr,
    TRACKED: tl.constexpr,
):  # fmt: skip
    """Write a part of both factors of m or of v with equal norms (`rules.balance`), and with v its energy."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    updates = _number(table, UPDATES, n, matrix)
    if tl.program_id(2) == 0:
        _balance_moment(
            _state(states, M_A, stride, matrix), _state(states, M_B, stride, matrix), m_turn + matrix * 2 * K_M * K_M,
            m_B + matrix * p * k_m, m_A_new + matrix * k_m * q, m_grams + matrix * blocks * K_M * K_M, updates,
            block, p, q, k_m, blocks, K_M, M_BLOCK, REPEATS * V_BLOCK // M_BLOCK, TRACKED,
        )  # fmt: skip
    else:
        squared = _balance_moment(
            _state(states, V_A, stride, matrix), _state(states, V_B, stride, matrix), v_turn + matrix * 2 * K_V * K_V,
            v_B + matrix * p * k_v, v_A_new + matrix * k_v * q, v_grams + matrix * blocks * K_V * K_V, updates,
            block, p, q, k_v, blocks, K_V, V_BLOCK, REPEATS, TRACKED,
        )  # fmt: skip
        if TRACKED and block == 0:
            # E ← β2 E + (1−β2)‖g‖²: the sum of Adam's own v. c = E/‖v_B v_A‖² waits for the next step.
            beta2 = _option(settings, BETA2, n_groups, tl.load(groups + matrix))
            energy_ptr, scale_ptr = _state(states, ENERGY, stride, matrix), _state(states, SCALE, stride, matrix)
            norm = tl.load(found + matrix * FOUND + 1)
            energy = beta2 * tl.load(energy_ptr).to(tl.float64) + (1 - beta2) * norm * norm
            scale = tl.minimum(energy / tl.maximum(squared, TINY64), LARGEST_SQUARE)
            tl.store(energy_ptr, energy.to(tl.float32), mask=updates > 0)
            tl.store(scale_ptr, scale.to(tl.float32), mask=updates > 0)


@triton.jit
def _balance_moment(
    A, B, turned, B_new, A_new, grams, updates, block, p, q, k, blocks,
    K: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr, TRACKED: tl.constexpr,
):  # fmt: skip
    """Write some columns of A and some rows of B; returns ‖B'A'‖²."""
    i, j, ranks = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :], tl.arange(0, K)[:, None]
    gram_A, gram_B = _sum_squares(grams, blocks, K), tl.load(turned + K * K + i * K + j)
    scale_A = tl.full((), 1, tl.float64)
    scale_B = tl.full((), 1, tl.float64)
    if TRACKED:
        norm_B, norm_A = tl.sqrt(_trace(gram_B, K)), tl.sqrt(_trace(gram_A, K))
        common = tl.maximum(tl.sqrt(norm_B) * tl.sqrt(norm_A), SMALLEST_NORM)
        scale_B, scale_A = common / tl.maximum(norm_B, TINY32), common / tl.maximum(norm_A, TINY32)
    written = tl.where(updates > 0, k, 0)
    by_A = scale_A.to(tl.float32)
    most = 3.4028234663852886e38
    by_B = tl.minimum(tl.maximum(scale_B * tl.load(turned + i * K + j), -most), most).to(tl.float32)  # of B' = 0
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
