"""This module decides which runs a suite still needs, by the two protocols and by what has finished."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval.methods import METHODS, Method

from .suite import Entry, Paper, Run, Suite, Tuned, shifted

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """Holds one model, one protocol and one method, which are a row of the table with all runs behind it."""

    suite: Suite
    model: str
    protocol: str
    entry: Entry

    @property
    def method(self) -> Method:
        """Return the method."""
        return METHODS[self.entry.method]

    @property
    def _rules(self) -> Paper | Tuned:
        return self.suite.protocols[self.protocol]

    @property
    def published(self) -> Mapping[str, float]:
        """Return the paper's numbers by metric. They belong to the protocol ``paper``."""
        rows = self.suite.published.get(self.model, {}) if isinstance(self._rules, Paper) else {}
        return rows.get(self.entry.label, {})

    def pending(self, records: Records) -> list[Run]:
        """Return the runs that can start now.

        More may follow once they are finished. The cell is complete if the list is empty.
        """
        tuning = [run for run in self.tuning_runs(records) if run.name not in records]
        return tuning or [run for run in self.final_runs(records) if run.name not in records]

    def tuning_runs(self, records: Records) -> list[Run]:
        """Return the runs that find the best rate, as far as the grid is known."""
        return [run for lr in self.rates(records) for run in self._tuning(lr)]

    def final_runs(self, records: Records) -> list[Run]:
        """Return the runs that the table's number comes from.

        There are none before the best rate is known, nor if the method trains at no rate.
        """
        lr = self.best_rate(records)
        if lr is None:
            return []
        return [self.suite.run(self.model, self.entry, lr, seed, self.suite.answers) for seed in self._rules.seeds]

    @property
    def tuning_seeds(self) -> list[int]:
        """Return the seeds at which rates are tried. Under the paper's protocol there are none."""
        return [] if isinstance(self._rules, Paper) else self.entry.tuning_seeds or self._rules.tuning_seeds

    def _tuning(self, lr: float) -> list[Run]:
        return [self.suite.run(self.model, self.entry, lr, seed) for seed in self.tuning_seeds]

    def finished(self, records: Records) -> list[Mapping[str, Any]]:
        """Return the records of the cell's runs that trained to the end."""
        return [records[name] for name in self._names(records) if records.get(name, {}).get("status") == "finished"]

    def done(self, records: Records) -> int:
        """Return how many of the cell's runs have a record."""
        return sum(name in records for name in self._names(records))

    def _names(self, records: Records) -> list[str]:
        """Return the names of all runs that are known so far. A run may belong to both stages."""
        return list(dict.fromkeys(run.name for run in (*self.tuning_runs(records), *self.final_runs(records))))

    def rates(self, records: Records) -> list[float]:
        """Return the grid, extended where its best rate lay at an edge, and downwards where every run diverged.

        Under the paper's protocol it is empty.
        """
        if isinstance(self._rules, Paper):
            return []
        rates = self.suite.grid(self.entry, self._rules)
        for _ in range(self._rules.extend):
            if self._diverged(rates, records):
                rates = [shifted(rates[0], -1), *rates]
                continue
            best = self._best(rates, records)
            if best is None or rates[0] < best < rates[-1]:
                break
            rates = sorted([*rates, shifted(best, 1 if best == rates[-1] else -1)])
        return rates

    def best_rate(self, records: Records) -> float | None:
        """Return the rate of the final runs, or None if it is not known yet or no rate trains."""
        if isinstance(self._rules, Paper):
            return self._rules.lr
        return self._best(self.rates(records), records)

    def at_edge(self, records: Records) -> bool:
        """Return whether the best rate lies at the edge of the grid even after its extensions."""
        rates, best = self.rates(records), self.best_rate(records)
        return bool(rates) and best in (rates[0], rates[-1])

    def validation_loss(self, lr: float, records: Records) -> float:
        """Return the mean loss over the tuning seeds. It is infinite if a run failed or is missing."""
        return statistics.fmean(self.validation_losses(lr, records).values())

    def validation_losses(self, lr: float, records: Records) -> dict[int, float]:
        """Return the loss at a rate by tuning seed. It is infinite if the run failed or is missing."""
        return {run.seed: loss_of(records.get(run.name)) for run in self._tuning(lr)}

    def _diverged(self, rates: list[float], records: Records) -> bool:
        """Return whether all runs at these rates are finished and all of them diverged."""
        return all(records.get(run.name, {}).get("status") == "diverged" for lr in rates for run in self._tuning(lr))

    def _best(self, rates: list[float], records: Records) -> float | None:
        """Return the rate with the lowest loss, or None before all runs are finished and if no rate trains."""
        if any(run.name not in records for lr in rates for run in self._tuning(lr)):
            return None
        best = min(rates, key=lambda lr: self.validation_loss(lr, records))
        return best if math.isfinite(self.validation_loss(best, records)) else None

    def expected_runs(self, records: Records) -> int:
        """Return how many runs the cell will have, as far as can be said now."""
        if isinstance(self._rules, Paper) or not self.pending(records) or self.best_rate(records) is not None:
            return len(self._names(records))
        # A grid of one or two rates has its best one at an edge, whichever that is.
        rates = max(len(self.suite.grid(self.entry, self._rules)), 3 if self._rules.extend else 0)
        reused = 0 if self.suite.answers else len(set(self._rules.seeds) & set(self.tuning_seeds))
        return rates * len(self.tuning_seeds) + len(self._rules.seeds) - reused


def loss_of(record: Mapping[str, Any] | None) -> float:
    """Return the validation loss of a finished run, or infinity if it failed or there is no record."""
    loss = record and record["metrics"].get("validation_loss")
    return math.inf if loss is None else loss


def cells(suite: Suite, shard: tuple[int, int] = (0, 1)) -> list[Cell]:
    """Return a suite's cells, or the i-th of n parts of them.

    Only whole cells are spread over parts, as a cell's runs depend on one another. shard: (i, n), where i counts from
    0.
    """
    made = [
        Cell(suite, model, protocol, entry)
        for model in suite.models
        for protocol in suite.protocols
        for entry in suite.entries
    ]
    index, count = shard
    return made[index::count]
