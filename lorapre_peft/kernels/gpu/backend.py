"""This module launches AdamW's step in Triton for all matrices of a table, one kind of matrices after another."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import triton
from torch import Tensor

from ...lowrank.batch import Batch, rounds_stochastically
from ...lowrank.constants import capturing, on_device
from ...lowrank.layout import Member, slices, temporary_bytes
from ...lowrank.linalg import gram_rows
from ...lowrank.metrics import Metrics
from ...lowrank.moments import Moment
from ..table import OPTIONS, Table, WholeStep
from . import blocks, factors, numbers, passes
from .rows import TYPES, RowKernels

# Above this rank the products of a step are matrix products, and only the row part runs in Triton (`rows`).
MAX_RANK = 16
# A thread reads this many columns at once, which are 16 bytes of a factor.
LANE = 4
# With more columns than WIDE, all threads of a program lie side by side in a row. A program takes at most WIDEST
# columns. In `_fit` a thread holds at most SUMS sums.
WIDE, WIDEST, SUMS = 64, 512, 64
# This many programs in flight fill a large GPU: eight on each of 132 multiprocessors.
PROGRAMS = 1056
# The rows are divided into at most this many parts, whose sums one program adds up. A part has at least this many rows
# for each direction of both momenta, so that its sums are written and read in a small share of the step's time.
MAX_SPLITS, SPLIT_ROWS = 32, 16
# The loads of STAGES blocks are under way at once. A block of `_fit_bfloat16` has FIT_ROWS rows.
STAGES, FIT_ROWS = 3, 128
# This is a block of `_update_bfloat16`. Before compute capability 9.0, where a thread needs more registers for a
# product, it has half of the columns.
UPDATE_ROWS, UPDATE_COLUMNS = 16, 128
# A program of the smaller kernels works through this many columns or rows of a factor.
PART = 512
# `_numbers` adds up the squares of this many blocks of rows at once.
MAX_BLOCKS = 1024


class Kind(NamedTuple):
    """Describes what the matrices that share launches have in common."""

    shape: tuple[int, int]
    ranks: tuple[int, int]
    grad: torch.dtype
    param: torch.dtype
    stochastic: bool
    temporary_bytes: int


class DeviceTable(Table):
    """Holds a table whose addresses lie on its device, with equal matrices side by side.

    Attributes:
        places: number in the table of each matrix, in the order in which the matrices lie on the device.
        classes: kinds of matrices, each with the slice where they lie.
        group_numbers, positions: number of each matrix's group, [N] int32, and each matrix's position, [N] int64.
    """

    def __init__(self, members: list[Member]):
        super().__init__(members)
        kinds: dict[Kind, list[int]] = {}
        for i, matrix in enumerate(self.matrices):
            param, ranks = matrix.param, cast(tuple[int, int], matrix.ranks)
            types = cast(Tensor, param.grad).dtype, param.dtype, rounds_stochastically(param, matrix.group)
            kind = Kind(matrix.shape, ranks, *types, temporary_bytes(matrix.group))
            kinds.setdefault(kind, []).append(i)
        ends = list(itertools.accumulate(map(len, kinds.values())))
        self.classes = [(kind, slice(end - len(kinds[kind]), end)) for kind, end in zip(kinds, ends)]
        self.places = [i for indices in kinds.values() for i in indices]
        positions = [self.matrices[i].position & 0xFFFFFFFF for i in self.places]
        self.group_numbers = on_device([self.of_group[i] for i in self.places], self.device, torch.int32)
        self.positions = on_device(positions, self.device, torch.int64)
        self._kept: dict[str, tuple[Sequence[int], Tensor, bool]] = {}
        self._of_graphs: list[Tensor] = []  # These stay while CUDA graphs read them.

    def addresses(self, name: str, found: Sequence[int]) -> tuple[Tensor, bool]:
        """Return the addresses of all matrices, [kinds of tensors, N] int64 on the device.

        found: what `pointers` returns. The second result says whether all of them are multiples of 16. Addresses that
        have not changed since the last step are not copied again.
        """
        if name not in self._kept or self._kept[name][0] != found:
            n = len(self.places)
            ordered = [found[kind * n + i] for kind in range(len(found) // n) for i in self.places]
            table = on_device(ordered, self.device, torch.int64).view(-1, n)
            kept = found, table, not any(address % 16 for address in found)
            if capturing(self.device):  # Another graph could read the table before this one has filled it.
                return kept[1:]
            self._kept[name] = kept
        elif capturing(self.device):
            self._of_graphs.append(self._kept[name][1])
        return self._kept[name][1:]


class Triton(RowKernels, WholeStep):
    """Takes the whole step up to rank `MAX_RANK`, and says once where a rank is above it.

    The host reads nothing of what is computed.
    """

    table = DeviceTable

    def __init__(self) -> None:
        self._told = False

    @staticmethod
    def takes(member: Member) -> bool:
        return max(member.ranks) <= MAX_RANK and WholeStep.takes(member)

    def adam(
        self, batch: Batch, m: Moment, v: Moment, table: Tensor, bound: Tensor | None, metrics: Metrics | None
    ) -> None:
        if max(batch.ranks) > MAX_RANK and not self._told:
            self._told = True
            warnings.warn(
                f"momentum rank {max(batch.ranks)} is above {MAX_RANK}, up to which the kernels take the whole step: "
                f"it takes many times as long. momentum_rank={MAX_RANK} or less is fast",
                stacklevel=2,
            )
        super().adam(batch, m, v, table, bound, metrics)

    def step(self, table: DeviceTable, options: list[tuple], metrics: Metrics | None) -> Tensor:
        if not table.places:  # A process may hold no expert of any stack.
            return torch.empty(0, dtype=torch.float64, device=table.device)
        grads = table.gradients()
        settings = _options(options, table.device)
        found = torch.empty(len(table.places), 2, dtype=torch.float64, device=table.device)
        on_gpu = torch.cuda.device(table.device) if table.device.type == "cuda" else contextlib.nullcontext()
        with table.weights() as written, on_gpu:
            g_table, g_aligned = table.addresses("grads", list(table.pointers(grads)))
            p_table, p_aligned = table.addresses("params", list(table.pointers(written)))
            s_table, _ = table.addresses("state", table.state_addresses)
            for kind, all_of_kind in table.classes:
                for part in slices(all_of_kind.stop - all_of_kind.start, _matrices_at_once(kind)):
                    at = slice(all_of_kind.start + part.start, all_of_kind.start + part.stop)
                    tables = g_table[0, at], p_table[0, at], s_table[:, at]
                    _launch(kind, table, tables, g_aligned and p_aligned, settings, found[at], at, metrics)
        return found[:, 0]


def _options(options: list[tuple], device: torch.device) -> Tensor:
    """Return the options of all groups, [len(OPTIONS), groups] float64. A number on a GPU stays there."""
    columns = [[0.0 if _on_gpu(value) else float(value) for value in group] for group in options]
    settings = on_device([group[i] for i in range(len(OPTIONS)) for group in columns], device, torch.float64)
    settings = settings.view(len(OPTIONS), -1)
    held = [(i, g) for g, group in enumerate(options) for i, value in enumerate(group) if _on_gpu(value)]
    if held:
        settings = settings.clone()
        for i, g in held:
            settings[i, g].copy_(options[g][i].detach().reshape(()))
    return settings


def _on_gpu(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _most_splits(kind: Kind) -> int:
    """Return the largest number of parts of the rows. It does not depend on the matrices that share a launch."""
    return max(1, min(MAX_SPLITS, kind.shape[0] // (SPLIT_ROWS * sum(kind.ranks))))


def _matrices_at_once(kind: Kind) -> int:
    """Return for how many matrices the temporaries of a launch fit into ``temporary_bytes``, or 0."""
    (p, q), k = kind.shape, sum(kind.ranks)
    factors_bytes = 4 * (k * (2 * p + 2 * q) + p * kind.ranks[0] + _most_splits(kind) * k * q)
    # There are products of factors with themselves, of each part of the rows or columns, and what is solved with them.
    squares = sum(triton.next_power_of_2(k) ** 2 for k in kind.ranks)
    return kind.temporary_bytes // (factors_bytes + squares * (72 + (p + q) // 32) + 1024)


def _launch(
    kind: Kind,
    table: DeviceTable,
    tables: tuple[Tensor, Tensor, Tensor],
    aligned: bool,
    settings: Tensor,
    found: Tensor,
    at: slice,
    metrics: Metrics | None,
) -> None:
    """Launch the kernels for some equal matrices.

    tables: addresses of gradients and weights, [n] each, and of the state, [names, n]. settings: what `_options`
    returns. found: [n, 2], which is filled in.
    """
    grads, params, states = tables
    n, (p, q), (k_m, k_v), tracked = len(grads), kind.shape, kind.ranks, "v_energy" in table.names
    groups, positions = table.group_numbers[at], table.positions[at]
    K_M, K_V = triton.next_power_of_2(k_m), triton.next_power_of_2(k_v)
    tile = Tile.of(p, q, max(K_M, K_V))
    ranks = dict(K_M=K_M, K_V=K_V)
    # A moment of a larger rank works through the same number of columns or rows, in more and smaller blocks.
    longest = triton.next_power_of_2(max(p, q))
    M_BLOCK, V_BLOCK = _block(K_M, longest), _block(K_V, longest)
    part = max(min(PART, longest), V_BLOCK)
    parts = ranks | dict(M_BLOCK=M_BLOCK, V_BLOCK=V_BLOCK, REPEATS=part // V_BLOCK, num_warps=4)
    row_parts, column_parts = triton.cdiv(p, part), triton.cdiv(q, part)
    types = dict(GRAD=TYPES[kind.grad], ALIGNED=aligned)
    new = functools.partial(torch.empty, device=grads.device)
    wide = functools.partial(new, dtype=torch.float64)
    m_A, v_A, m_A_new, v_A_new = (new(n, k, q) for k in (*kind.ranks, *kind.ranks))
    m_X, v_X, m_B, v_B = (new(n, p, k) for k in (*kind.ranks, *kind.ranks))
    m_squares, v_squares = (wide(n, k) for k in kind.ranks)
    m_R, v_R = (new(n, K, K) for K in (K_M, K_V))
    held, keys, C = new(len(blocks.NUMBERS), n), new(2, n, dtype=torch.int64), new(n, p, k_m)
    stride, n_groups = states.stride(0), settings.shape[1]

    factors._row_squares[(n, 2)](states, m_squares, v_squares, stride, q, k_m, k_v, **ranks, COLUMNS=256)
    m_grams, v_grams = (wide(n, column_parts, K, K) for K in (K_M, K_V))
    factors._start[(column_parts, n, 2)](
        states, m_squares, v_squares, m_A, v_A, m_grams, v_grams, stride, q, k_m, k_v, **parts, TRACKED=tracked
    )
    on_tensor_cores = kind.grad == torch.bfloat16 and min(p, q) >= WIDE
    row_blocks = triton.cdiv(p, FIT_ROWS if on_tensor_cores else tile.fit_rows)
    squares = new(n, row_blocks, 2)
    fitted = grads, m_A, v_A, m_X, v_X, squares, p, q, k_m, k_v
    if on_tensor_cores:
        passes._fit_bfloat16[(row_blocks, n)](
            *fitted, **ranks, ROWS=FIT_ROWS, COLUMNS=WIDE, STAGES=STAGES, ALIGNED=aligned, num_warps=8
        )
    else:
        passes._fit[(row_blocks, n)](
            *fitted, **ranks, **types, ROWS=tile.fit_rows, COLUMNS=tile.fit_columns, LANE=tile.lane,
            num_warps=tile.fit_warps,
        )  # fmt: skip
    numbers._numbers[(n,)](
        states, squares, m_squares, v_squares, m_grams, v_grams, m_R, v_R, settings, groups, positions, held, keys,
        found, stride, n, n_groups, k_m, k_v, row_blocks, column_parts,
        **ranks, BLOCKS=min(MAX_BLOCKS, triton.next_power_of_2(row_blocks)), TRACKED=tracked, num_warps=1,
    )  # fmt: skip
    m_grams, v_grams = (wide(n, row_parts, 2, K, K) for K in (K_M, K_V))
    factors._rows[(row_parts, n, 2)](
        states, m_X, v_X, m_R, v_R, m_squares, v_squares, m_B, v_B, C, m_grams, v_grams, held, stride, n, p, k_m,
        k_v, **parts, TRACKED=tracked,
    )  # fmt: skip
    on_tensor_cores = on_tensor_cores and kind.param == torch.bfloat16
    block_rows, block_columns = tile.rows, tile.columns
    if on_tensor_cores:
        halves = 1 if _capability(grads.device) >= (9, 0) else 2
        block_rows, block_columns = UPDATE_ROWS, UPDATE_COLUMNS // halves
    column_blocks, row_blocks = triton.cdiv(q, block_columns), triton.cdiv(p, block_rows)
    splits = min(row_blocks, _most_splits(kind), max(1, PROGRAMS // column_blocks))
    rows_per_split = triton.cdiv(row_blocks, splits) * block_rows
    splits = triton.cdiv(p, rows_per_split)
    m_P, v_P = (new(splits, n, k, q) for k in kind.ranks)
    programs = splits * n * column_blocks if metrics is not None else 1
    largest, clamped = new(programs), new(programs, dtype=torch.int32)
    updated = (
        grads, params, states, C, m_B, v_B, m_A, v_A, v_squares, m_P, v_P, held, keys, largest, clamped,
        stride, n, p, q, k_m, k_v, rows_per_split,
    )  # fmt: skip
    how = dict(ROWS=block_rows, COLUMNS=block_columns, ALIGNED=aligned, TRACKED=tracked, STOCHASTIC=kind.stochastic)
    how |= dict(METRICS=metrics is not None)
    if on_tensor_cores:
        passes._update_bfloat16[(column_blocks, splits, n)](
            *updated, **how, K_M=max(16, K_M), K_V=1 if K_V == 1 else max(16, K_V), STAGES=STAGES, num_warps=4,
        )  # fmt: skip
    else:
        passes._update[(column_blocks, splits, n)](
            *updated, **how, **ranks, GRAD=types["GRAD"], PARAM=TYPES[kind.param],
            SUMS=1 if q > WIDE else tile.rows, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    if metrics is not None:
        metrics.add_sizes(largest.amax(), clamped.sum(), n * p * q)
        scale = held[blocks.NUMBERS.index("g_scale")] * held[blocks.NUMBERS.index("updates")]
        X = (scale[:, None, None] * m_X @ m_R[:, :k_m, :k_m]).double().nan_to_num(0, 0, 0)
        metrics.add_captured(((X.mT @ X) * gram_rows(m_A)).sum())
        metrics.add_energy(found[:, 1])
    roots, by = ([wide(n, 2, K, K) for K in (K_M, K_V)] for _ in range(2))
    factors._solve[(n, 2)](
        m_grams, v_grams, *roots, *by, settings, groups, n_groups, k_m, k_v, row_parts, **ranks, TRACKED=tracked
    )
    m_grams, v_grams = (wide(n, column_parts, K, K) for K in (K_M, K_V))
    factors._columns[(column_parts, n, 2)](
        m_A, v_A, *by, m_A_new, v_A_new, m_P, v_P, m_grams, v_grams, n, q, k_m, k_v, splits, **parts
    )
    factors._balance[(max(row_parts, column_parts), n, 2)](
        states, *roots, m_B, v_B, m_A_new, v_A_new, m_grams, v_grams, held, found, settings, groups,
        stride, n, n_groups, p, q, k_m, k_v, column_parts, **parts, TRACKED=tracked,
    )  # fmt: skip


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability, and (0, 0) for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@dataclass(frozen=True)
class Tile:
    """Describes the blocks that a program works through, and its number of warps.

    A block of `_update` is rows × columns. A block of `_fit` is fit_rows × fit_columns, of which a thread holds
    ``lane`` columns side by side.
    """

    rows: int
    columns: int
    fit_rows: int
    fit_columns: int
    lane: int
    warps: int
    fit_warps: int
    stages: int = 1

    @staticmethod
    @functools.cache
    def of(p: int, q: int, K: int) -> Tile:
        """Return the blocks for p×q matrices. K: the larger of the two padded ranks."""
        rows_up, columns_up = triton.next_power_of_2(p), triton.next_power_of_2(q)
        lane = min(LANE, columns_up)
        if q <= WIDE:
            rows = min(rows_up, max(1, SUMS * 128 * lane // (K * columns_up)), 128)
            return Tile(min(rows_up, max(1, 1024 // columns_up)), columns_up, rows, columns_up, lane, 4, 4)
        # All threads lie side by side. A block is as wide as possible with little of the last one outside the matrix.
        width, fit_width = (
            min(widths, key=lambda width: (round(triton.cdiv(q, width) * width / q, 1), -width))
            for widths in ((128, 256, WIDEST), (128, 256))
        )
        fit_rows = min(rows_up, max(1, SUMS // K), 8)
        rows, stages = (1, STAGES) if K <= 8 else (min(rows_up, 2), 1)
        return Tile(rows, width, fit_rows, fit_width, lane, width // (32 * lane), fit_width // (32 * lane), stages)


def _block(K: int, longest: int) -> int:
    """Return the number of columns of a block of K rows whose products [K, K, columns] lie in registers."""
    return min(512, 4096 // K**2, longest)
