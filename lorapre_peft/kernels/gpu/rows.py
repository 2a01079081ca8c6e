"""This module computes Adam's row part in two Triton kernels, for all matrices of a batch together.

There is no p×q temporary. The first kernel reads the gradients once for g m_Aᵀ and |g| v_Aᵀ, and updates the rows of
both B factors. The second one reads the gradients once more, rebuilds m and √v block by block, writes the weights
(stochastic rounding included), and accumulates what the A factors need. Gradients and weights are read and written
where they lie, through a table of their addresses. The factors are stacked. Sums over blocks of rows are written
separately and added in a fixed order, so that every replica gets the same bits. The host reads nothing. Products run
as "tf32x3", which on tensor cores is float32 to within its round-off. Accumulation is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...lowrank.batch import Batch
from ...lowrank.constants import on_device
from ...lowrank.metrics import Metrics
from ...lowrank.moments import Moment
from ...lowrank.rounding import round_keys
from ..eager import Eager
from .blocks import (
    C_B,
    C_X,
    DECAY,
    G_SCALE,
    M_GAIN,
    M_KEEP,
    RESIDUAL,
    ROOT_EPS,
    STEP_SIZE,
    UPDATES,
    V_GAIN,
    V_KEEP,
    V_SCALE,
    own,
    rounded_stochastically,
    within,
)

# Above this rank a block of a factor does not fit into the registers of a program.
MAX_ROW_RANK = 128
# This many programs in flight fill a large GPU: four on each of 132 multiprocessors, with WARPS warps each.
PROGRAMS = 528
WARPS = 8
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


@triton.jit
def _block(pointer, rows, columns, n_rows, n_columns):
    """Return a block of a matrix, with zeros outside the matrix: [rows, columns] float32."""
    offsets = rows[:, None].to(tl.int64) * n_columns + columns[None, :]
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    return tl.load(pointer + offsets, mask=inside, other=0).to(tl.float32)


@triton.jit
def _stacked(pointer, matrix, rows, columns, n_rows, n_columns):
    """Return a `_block` of one matrix of a stack."""
    return _block(pointer + matrix.to(tl.int64) * n_rows * n_columns, rows, columns, n_rows, n_columns)


@triton.jit
def _store(pointer, matrix, rows, columns, n_rows, n_columns, values):
    """Write a block into one matrix of a stack."""
    offsets = (matrix.to(tl.int64) * n_rows + rows[:, None]) * n_columns + columns[None, :]
    tl.store(pointer + offsets, values, mask=(rows[:, None] < n_rows) & (columns[None, :] < n_columns))


@triton.jit
def _fit_rows(
    grads, m_B, m_A, m_R, m_B_new, v_B, v_A, v_R, v_B_new, C,
    scalars, n, p, q, k_m, k_v,
    K_M: tl.constexpr, K_V: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write B' = keep · B + gain · X of both moments, and C = c_B B + c_X X of m, for a block of rows. X = x Aᵀ R."""
    matrix = tl.program_id(0)
    rows = tl.program_id(1) * BP + tl.arange(0, BP)
    m_ranks, v_ranks = tl.arange(0, K_M), tl.arange(0, K_V)
    p, q = tl.cast(p, tl.int32), tl.cast(q, tl.int32)  # A 1 comes as a constant, which has no `.to`.
    k_m, k_v = tl.cast(k_m, tl.int32), tl.cast(k_v, tl.int32)
    g_scale = tl.load(scalars + G_SCALE * n + matrix)
    g_ptr = own(grads, matrix, GRAD, ALIGNED)
    m_fit = tl.zeros((BP, K_M), dtype=tl.float32)
    v_fit = tl.zeros((BP, K_V), dtype=tl.float32)
    for start in range(0, q, BQ):
        columns = start + tl.arange(0, BQ)
        g = _block(g_ptr, rows, columns, p, q) * g_scale
        m_columns = _stacked(m_A, matrix, m_ranks, columns, k_m, q)
        v_columns = _stacked(v_A, matrix, v_ranks, columns, k_v, q)
        m_fit = tl.dot(g, tl.trans(m_columns), m_fit, input_precision="tf32x3")
        v_fit = tl.dot(tl.abs(g), tl.trans(v_columns), v_fit, input_precision="tf32x3")
    m_fit = tl.dot(m_fit, _stacked(m_R, matrix, m_ranks, m_ranks, k_m, k_m), input_precision="tf32x3")
    v_fit = tl.dot(v_fit, _stacked(v_R, matrix, v_ranks, v_ranks, k_v, k_v), input_precision="tf32x3")
    m_rows = _stacked(m_B, matrix, rows, m_ranks, p, k_m)
    v_rows = _stacked(v_B, matrix, rows, v_ranks, p, k_v)
    m_new = tl.load(scalars + M_KEEP * n + matrix) * m_rows + tl.load(scalars + M_GAIN * n + matrix) * m_fit
    v_new = tl.load(scalars + V_KEEP * n + matrix) * v_rows + tl.load(scalars + V_GAIN * n + matrix) * v_fit
    coefficients = tl.load(scalars + C_B * n + matrix) * m_rows + tl.load(scalars + C_X * n + matrix) * m_fit
    _store(m_B_new, matrix, rows, m_ranks, p, k_m, m_new)
    _store(v_B_new, matrix, rows, v_ranks, p, k_v, v_new)
    _store(C, matrix, rows, m_ranks, p, k_m, coefficients)


@triton.jit
def _update_block(
    grads, thetas, C, v_B, m_A, v_A, m_P_B, v_P_B, m_P, v_P,
    scalars, bounds, keys, largest, clamped, n, p, q, k_m, k_v, rows_per_split, first_row,
    K_M: tl.constexpr, K_V: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
    GRAD: tl.constexpr, THETA: tl.constexpr, ALIGNED: tl.constexpr,
    CLAMP: tl.constexpr, STOCHASTIC: tl.constexpr, FLOAT64: tl.constexpr, METRICS: tl.constexpr,
):  # fmt: skip
    """Write θ ← θ − step · u − decay · θ for some rows of a block of columns, and their part of Bᵀx for both moments.

    u is (C m_A + residual · g) / (√((v_scale v_B v_A)² + g²) + eps), clamped to ±bound. For `als`, Bᵀx is B'ᵀx.
    """
    matrix, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = block * BQ + tl.arange(0, BQ)
    m_ranks, v_ranks = tl.arange(0, K_M), tl.arange(0, K_V)
    p, q = tl.cast(p, tl.int32), tl.cast(q, tl.int32)  # A 1 comes as a constant, which has no `.to`.
    k_m, k_v = tl.cast(k_m, tl.int32), tl.cast(k_v, tl.int32)
    g_ptr = own(grads, matrix, GRAD, ALIGNED)
    theta_ptr = own(thetas, matrix, THETA, ALIGNED)
    g_scale = tl.load(scalars + G_SCALE * n + matrix)
    residual = tl.load(scalars + RESIDUAL * n + matrix)
    v_scale = tl.load(scalars + V_SCALE * n + matrix)
    eps = tl.load(scalars + ROOT_EPS * n + matrix)
    step = tl.load(scalars + STEP_SIZE * n + matrix)
    decay = tl.load(scalars + DECAY * n + matrix)
    updates = tl.load(scalars + UPDATES * n + matrix + 0 * columns)[None, :] > 0
    bound = tl.load(bounds + matrix)
    m_columns = _stacked(m_A, matrix, m_ranks, columns, k_m, q)
    v_columns = _stacked(v_A, matrix, v_ranks, columns, k_v, q)
    m_sum = tl.zeros((K_M, BQ), dtype=tl.float32)
    v_sum = tl.zeros((K_V, BQ), dtype=tl.float32)
    most = tl.zeros((BQ,), dtype=tl.float32)
    count = tl.zeros((BQ,), dtype=tl.int32)
    first = split * rows_per_split
    for start in range(first, min(first + rows_per_split, p), BP):
        rows = start + tl.arange(0, BP)
        g = _block(g_ptr, rows, columns, p, q) * g_scale
        m = tl.dot(_stacked(C, matrix, rows, m_ranks, p, k_m), m_columns, input_precision="tf32x3") + residual * g
        root = tl.dot(_stacked(v_B, matrix, rows, v_ranks, p, k_v) * v_scale, v_columns, input_precision="tf32x3")
        u = m / (tl.sqrt(root * root + g * g) + eps)
        inside = (rows[:, None] < p) & (columns[None, :] < q)
        if METRICS:
            size = tl.where(inside & updates, tl.abs(u), 0.0)
            most = tl.maximum(most, tl.max(size, axis=0))
            count += tl.sum((size > bound).to(tl.int32), axis=0)
        if CLAMP:
            u = within(u, bound)
        at = rows[:, None].to(tl.int64) * q + columns[None, :]
        theta = tl.load(theta_ptr + at, mask=inside, other=0)
        if FLOAT64:
            new = theta.to(tl.float64) - (step * u + decay * theta.to(tl.float64))
        else:
            new = theta.to(tl.float32) - (step * u + decay * theta.to(tl.float32))
        if STOCHASTIC:
            place = ((first_row + rows[:, None]) * q + columns[None, :]).to(tl.uint32)
            key, salted = tl.load(keys + matrix).to(tl.uint32), tl.load(keys + n + matrix).to(tl.uint32)
            new = rounded_stochastically(new, place, key, salted)
        tl.store(theta_ptr + at, new.to(theta.dtype), mask=inside & updates)
        m_rows = _stacked(m_P_B, matrix, rows, m_ranks, p, k_m)
        v_rows = _stacked(v_P_B, matrix, rows, v_ranks, p, k_v)
        m_sum = tl.dot(tl.trans(m_rows), g, m_sum, input_precision="tf32x3")
        v_sum = tl.dot(tl.trans(v_rows), tl.abs(g), v_sum, input_precision="tf32x3")
    _store(m_P, split * n + matrix, m_ranks, columns, k_m, q, m_sum)
    _store(v_P, split * n + matrix, v_ranks, columns, k_v, q, v_sum)
    if METRICS:
        program = (split * n + matrix) * tl.num_programs(1) + block
        tl.store(largest + program, tl.max(most, axis=0))
        tl.store(clamped + program, tl.sum(count, axis=0))


class RowKernels(Eager):
    """Launches the kernels. Ranks above `MAX_ROW_RANK` take the eager path."""

    def adam(
        self, batch: Batch, m: Moment, v: Moment, table: Tensor, bound: Tensor | None, metrics: Metrics | None
    ) -> None:
        if max(batch.ranks) > MAX_ROW_RANK:
            return super().adam(batch, m, v, table, bound, metrics)
        if batch.all_rows.stop:  # An empty shard has no rows.
            self._step(batch, m, v, table, bound, metrics)
        self.finish_rows(m)
        self.finish_rows(v)

    def _step(
        self, batch: Batch, m: Moment, v: Moment, table: Tensor, bound: Tensor | None, metrics: Metrics | None
    ) -> None:
        device, n, p, q, (k_m, k_v) = batch.device, len(batch), batch.all_rows.stop, batch.shape[1], batch.ranks
        grads, thetas = ([x.contiguous() for x in tensors] for tensors in (batch.grads, batch.params))
        pointers = [tuple(map(Tensor.data_ptr, tensors)) for tensors in (grads, thetas)]
        aligned = not any(address % 16 for addresses in pointers for address in addresses)
        g_table, theta_table = (on_device(addresses, device, torch.int64) for addresses in pointers)
        C = torch.empty_like(m.B)
        bounds = torch.full_like(table[0], float("inf")) if bound is None else bound
        keys = round_keys(batch.keys(slice(None))) if batch.rounds_stochastically else table

        K_M, K_V, BP, BQ = block_sizes(p, q, k_m, k_v)
        row_blocks, column_blocks = triton.cdiv(p, BP), triton.cdiv(q, BQ)
        splits = min(row_blocks, max(1, PROGRAMS // (n * column_blocks)))
        rows_per_split = triton.cdiv(row_blocks, splits) * BP
        splits = triton.cdiv(p, rows_per_split)
        m_partial, v_partial = (torch.empty(splits, n, k, q, device=device) for k in (k_m, k_v))
        programs = splits * n * column_blocks if metrics is not None else 1
        largest = torch.empty(programs, dtype=torch.float32, device=device)
        clamped = torch.empty(programs, dtype=torch.int32, device=device)
        projecting = (m.B_new, v.B_new) if batch.rule.projects_new else (m.B, v.B)
        types = dict(GRAD=TYPES[grads[0].dtype], ALIGNED=aligned)
        with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
            _fit_rows[(n, row_blocks)](
                g_table, m.B, m.A, m.R, m.B_new, v.B, v.A, v.R, v.B_new, C,
                table, n, p, q, k_m, k_v, K_M=K_M, K_V=K_V, BP=BP, BQ=BQ, num_stages=1, num_warps=WARPS, **types,
            )  # fmt: skip
            _update_block[(n, column_blocks, splits)](
                g_table, theta_table, C, v.B, m.A, v.A, *projecting, m_partial, v_partial,
                table, bounds, keys, largest, clamped, n, p, q, k_m, k_v, rows_per_split, batch.rows.start,
                K_M=K_M, K_V=K_V, BP=BP, BQ=BQ, num_stages=1, num_warps=WARPS, **types, THETA=TYPES[thetas[0].dtype],
                CLAMP=bound is not None, STOCHASTIC=batch.rounds_stochastically,
                FLOAT64=thetas[0].dtype == torch.float64, METRICS=metrics is not None,
            )  # fmt: skip
        torch.sum(m_partial, 0, out=m.projected)
        torch.sum(v_partial, 0, out=v.projected)
        if metrics is not None:
            metrics.add_sizes(largest.amax(), clamped.sum(), n * p * q)
        for param, theta in zip(batch.params, thetas):
            if theta is not param and theta.data_ptr() != param.data_ptr():
                param.copy_(theta)
        torch.autograd.graph.increment_version(batch.params)  # Autograd does not see what kernels write.


def block_sizes(p: int, q: int, k_m: int, k_v: int) -> tuple[int, int, int, int]:
    """Return (K_M, K_V, BP, BQ): padded ranks, and the rows and columns of a block.

    All are powers of two, and at least the 16 that a product needs. A block fits into the 99 kB of shared memory of a
    consumer GPU, without a second stage of loads in flight. Up to rank 32 it also fits into the registers of compute
    capabilities 8.0 to 9.0 (`tests/helpers/compile_triton.py` lists both).
    """
    K_M, K_V = (max(16, triton.next_power_of_2(k)) for k in (k_m, k_v))
    K = max(K_M, K_V)
    rows, columns = (32, 64) if K <= 16 else (32, 32) if K <= 32 else (16, 32)
    return K_M, K_V, min(rows, max(16, triton.next_power_of_2(p))), min(columns, max(16, triton.next_power_of_2(q)))
