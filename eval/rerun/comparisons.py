"""This module compares rows seed by seed.

Runs of one seed share their training rows, and with these much of the spread between seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .intervals import Interval, interval
from .suite import higher_is_better

Row = dict[str, Any]
BySeed = Mapping[int, float]


def paired(a: BySeed, b: BySeed) -> Interval | None:
    """Return the interval of the differences a − b over the seeds that both have, or None for fewer than two."""
    seeds = a.keys() & b.keys()
    return interval([a[seed] - b[seed] for seed in sorted(seeds)]) if len(seeds) > 1 else None


def by_seed(row: Row, metric: str) -> dict[int, float]:
    """Return a metric by seed. It is empty for a row of which a seed failed, because the others would speak for it."""
    found = row["metrics"].get(metric)
    return {} if found is None or row["failed_seeds"] else dict(zip(found["seeds"], found["values"]))


def add_differences(rows: Sequence[Row], metric: str) -> None:
    """Add each row's difference to the baseline of its kind, which is the first row that trains the same."""
    baselines: dict[str, Row] = {}
    for row in rows:
        baseline = baselines.setdefault(row["trains"], row)
        if row is not baseline:
            found = paired(by_seed(row, metric), by_seed(baseline, metric))
            row["difference"] = found and {"to": baseline["label"]} | found.as_dict()


def against_best(losses: Mapping[float, BySeed], best: float) -> dict[float, Interval]:
    """Return by learning rate the interval of the differences of its losses to those at the best rate.

    Rates with fewer than two seeds, and those at which a run failed, are left out.
    """
    found = {
        lr: paired(values, losses[best])
        for lr, values in losses.items()
        if lr != best and all(map(math.isfinite, values.values()))
    }
    return {lr: differences for lr, differences in found.items() if differences is not None}


def averages(rows: Sequence[Row], factors: Sequence[Sequence[str]], metric: str) -> list[dict[str, Any]]:
    """Return what each factor does, averaged over the others: a table for each kind and factor.

    The levels of a table are in order from best to worst. A factor is one or more options that change together, and a
    level is a combination of their values that occurs. Only those settings of the other factors count for which every
    level is measured, and only seeds that all of these have. So each level is averaged over the same settings and
    seeds. Seeds are independent, and settings are not. So the average over settings is taken first, and the interval
    is over seeds.

    Args:
        rows: rows of one model and protocol.
        factors: options of each factor.
        metric: name of the metric.
    """
    tables = []
    for kind in dict.fromkeys(row["trains"] for row in rows):
        for factor in factors:
            others = [option for other in factors if other != factor for option in other]
            chosen = [row for row in rows if row["trains"] == kind and {*factor, *others} <= row["options"].keys()]
            levels, settings = _by_level(chosen, factor, others, metric)
            if len(levels) > 1 and all(levels.values()):
                shown = {"trains": kind, "factor": list(factor), "settings": settings}
                tables.append(shown | {"levels": _ordered(levels, higher_is_better(metric))})
    return tables


def _by_level(
    rows: Sequence[Row], factor: Sequence[str], others: Sequence[str], metric: str
) -> tuple[dict[str, dict[int, float]], int]:
    """Return by level and seed the mean over the settings in which every level is measured, and their number."""
    measured: dict[tuple, dict[str, dict[int, float]]] = {}
    for row in rows:
        level = ", ".join(str(row["options"][name]) for name in factor if row["options"][name] is not None)
        measured.setdefault(tuple(row["options"][name] for name in others), {})[level] = by_seed(row, metric)
    levels = dict.fromkeys(level for setting in measured.values() for level in setting)
    complete = [setting for setting in measured.values() if all(setting.get(level) for level in levels)]
    measurements = [set(setting[level]) for setting in complete for level in levels]
    seeds = sorted(set.intersection(*measurements)) if measurements else []
    means = {
        level: {seed: statistics.fmean(setting[level][seed] for setting in complete) for seed in seeds}
        for level in levels
    }
    return means, len(complete)


def _ordered(levels: Mapping[str, BySeed], higher_is_better: bool) -> list[dict[str, Any]]:
    """Return the levels with the best first, each with its difference to the best."""
    means = {level: statistics.fmean(values.values()) for level, values in levels.items()}
    best, *rest = sorted(means, key=means.__getitem__, reverse=higher_is_better)
    ordered = [{"level": best, "mean": means[best], "difference": None}]
    for level in rest:
        found = paired(levels[level], levels[best])
        ordered.append({"level": level, "mean": means[level], "difference": found and found.as_dict()})
    return ordered
