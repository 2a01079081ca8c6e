"""This module computes means with confidence intervals over seeds, and what they say about order."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Holds the mean of n runs and half the width of its two-sided t interval, which is infinite for a single run."""

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """Return the lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Return the upper end."""
        return self.mean + self.half_width

    def as_dict(self) -> dict[str, float | None]:
        """Return mean and half width for JSON. It has no infinity, so ``half_width`` is None for a single run."""
        return {"mean": self.mean, "half_width": self.half_width if self.n > 1 else None}


def interval(values: Sequence[float]) -> Interval:
    """Return the interval of independent runs, taken as normally distributed: t(n−1) at 95 % times s/√n."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, math.inf, n)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(n), n)


def ranks(intervals: Sequence[Interval], *, higher_is_better: bool) -> list[tuple[int, int]]:
    """Return the best and the worst place that each interval may have.

    One is before another only if their intervals do not touch.
    """

    def before(a: Interval, b: Interval) -> bool:
        return a.low > b.high if higher_is_better else a.high < b.low

    return [
        (1 + sum(before(b, a) for b in intervals), len(intervals) - sum(before(a, b) for b in intervals))
        for a in intervals
    ]
