"""Which matrices are stepped together: worked out once, and kept as long as the same parameters take part."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .batch import Bucket, Wave, tile_entries
from .packed import fill_their_storages
from .rules import RULES
from .sharding import WHOLE, Placement

Located = tuple[dict[str, Any], Tensor, int]  # group, parameter, position of the parameter in the optimizer
# What of a group's options decides how its matrices are stepped together.
_OPTIONS = ("momentum_rank", "update_rule", "temporary_bytes")


@functools.lru_cache(maxsize=4096)
def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """The p×q under which a tensor of two or more dimensions is compressed: trailing dimensions are flattened."""
    return shape[0], math.prod(shape[1:])


@functools.lru_cache(maxsize=4096)
def compressed_rank(shape: torch.Size, momentum_rank: int | None) -> int:
    """The k at which a parameter of this shape is compressed; 0 if it takes the AdamW path.

    None stands for a quarter of the smaller side, at least 1. A matrix is compressed when k < min(p, q) and the factors,
    k(p+q) numbers, are smaller than the p·q that they replace.
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return 0
    p, q = matrix_shape(shape)
    k = max(1, min(p, q) // 4) if momentum_rank is None else momentum_rank
    return k if 0 < k < min(p, q) and k * (p + q) < p * q else 0


@dataclass
class Plan:
    """Of the parameters of a step that live in one place: the compressed ones in waves, and what takes the AdamW path.

    Numbers are indices of the step's parameters. It holds until `key` or a state changes.
    """

    key: tuple
    waves: list[Wave] = field(default_factory=list)
    plain: list[tuple[dict[str, Any], list[int]]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)  # the counters of the states that it was made with

    def holds(self, key: tuple, steps: list[Tensor]) -> bool:
        """Whether it is the plan of these parameters with these counters."""
        return self.key == key and all(map(operator.is_, self.steps, steps))


def plan_key(todo: list[Located]) -> tuple:
    """All that a plan depends on but the state."""
    groups = {id(group): group for group, _, _ in todo}
    options = tuple(tuple(map(group.__getitem__, _OPTIONS)) for group in groups.values())
    return options, [(id(group), id(param), param.shape, param.dtype) for group, param, _ in todo]


def make_plan(
    todo: list[Located],
    states: list[dict[str, Tensor]],
    placement: Placement,
    moments: int,
    temporaries: int,
) -> Plan:
    """The plan of a step's parameters and their states.

    moments: how many a matrix has. temporaries: the backend's `factor_temporaries`.
    """
    plan = Plan(plan_key(todo))
    plain: dict[int, tuple[dict[str, Any], list[int]]] = {}
    # By what one wave has in common, then by what one bucket has.
    alike: dict[tuple, dict[tuple, list[int]]] = {}
    for i, (group, param, _) in enumerate(todo):
        k = compressed_rank(param.shape, group["momentum_rank"])
        if k == 0:
            plain.setdefault(id(group), (group, []))[1].append(i)
            continue
        buckets = alike.setdefault((id(group), k), {})
        # By the whole shape: a step stacks gradients as they are, and a linear layer may be as large as a flattened convolution.
        buckets.setdefault((param.shape, param.dtype), []).append(i)
    plan.plain = list(plain.values())
    for (_, k), buckets in alike.items():
        group = todo[next(iter(buckets.values()))[0]][0]
        plan.waves += _waves(
            Wave(group, RULES[group["update_rule"]], k, placement),
            buckets,
            todo,
            states,
            moments,
            tile_entries(group, temporaries),
        )
    if placement is WHOLE:
        held = (
            value
            for wave in plan.waves
            for bucket in wave.buckets
            for state in bucket.states
            for value in state.values()
        )
        keeps = fill_their_storages(held)
        for wave in plan.waves:
            wave.keeps = keeps
    return plan


def _waves(
    empty: Wave,
    buckets: dict[tuple, list[int]],
    todo: list[Located],
    states: list[dict[str, Tensor]],
    moments: int,
    limit: int,
) -> Iterable[Wave]:
    """Waves whose factors have at most ``limit`` entries, or of a single matrix."""
    filled = 0
    wave: Wave | None = None
    for (whole, _), members in buckets.items():
        shape = matrix_shape(whole)
        size = moments * empty.k * sum(shape)
        bucket: Bucket | None = None
        for i in members:
            if wave is None or filled + size > limit:
                wave = Wave(empty.group, empty.rule, empty.k, empty.placement)
                bucket, filled = None, 0
                yield wave
            if bucket is None:
                bucket = Bucket(wave, shape, len(wave))
                wave.buckets.append(bucket)
            bucket.states.append(states[i])
            bucket.positions.append(todo[i][2])
            bucket.indices.append(i)
            filled += size
