"""This module draws the plots of a report. Each function of `PLOTS` returns whether there was anything to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .suite import Suite, higher_is_better

KINDS = {"adapter": "adapters", "weights": "weights"}
_MARKERS = "os^Dvp*X"
_BAR = {"linestyle": "none", "capsize": 2, "elinewidth": 0.8}


def order(suite: Suite, rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot the primary metric by method, the best on top."""
    higher = higher_is_better(suite.primary)
    shown = sorted(_measured(suite, rows), key=lambda row: row["metrics"][suite.primary]["mean"], reverse=not higher)

    def draw(axis: Axes, row: dict[str, Any], style: dict[str, Any]) -> None:
        bar = _half_width(row)
        axis.errorbar(row["metrics"][suite.primary]["mean"], row["label"], xerr=bar, **(style | _BAR))
        axis.margins(y=0.1)

    return _panels(shown, path, draw, xlabel=_primary(suite), ylabel="", legend=False)


def losses(suite: Suite, rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot the training loss over the steps at each method's rate, mean over seeds."""

    def draw(axis: Axes, row: dict[str, Any], style: dict[str, Any]) -> None:
        axis.plot(row["curve"]["step"], row["curve"]["loss"], label=row["label"], **(style | {"marker": None}))

    shown = [row for row in rows if "curve" in row]
    return _panels(shown, path, draw, xlabel="step", ylabel="training loss (nats per token)")


def sensitivity(suite: Suite, rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot the validation loss over the learning rate, up to twice the panel's best.

    Rates at which a run failed are left out. There is nothing to plot if every row has one rate.
    """

    def draw(axis: Axes, row: dict[str, Any], style: dict[str, Any]) -> None:
        points = [(float(rate), loss) for rate, loss in row["rates"].items() if loss is not None]
        axis.plot(*zip(*points), label=row["label"], **style)
        axis.set_xscale("log")
        rates = sorted({float(rate) for line in axis.lines for rate in line.get_xdata()})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        losses = [loss for line in axis.lines for loss in line.get_ydata()]
        axis.set_ylim(0.97 * min(losses), min(1.03 * max(losses), 2 * min(losses)))

    shown = [row for row in rows if any(loss is not None for loss in row["rates"].values())]
    if all(len(row["rates"]) == 1 for row in shown):
        return False
    return _panels(shown, path, draw, xlabel="learning rate", ylabel="validation loss")


def memory(suite: Suite, rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot the primary metric over memory.

    It is the peak if all runs are from one kind of GPU, and otherwise weights, gradients and optimizer state together.
    """
    shown = _measured(suite, rows)
    size = "peak_bytes" if peaks_compare(shown) else "held_bytes"
    label = "peak memory (GB)" if size == "peak_bytes" else "weights + gradients + optimizer state (GB)"
    return _tradeoff(suite, shown, path, lambda row: row[size] / 1e9, label)


def state(suite: Suite, rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot the primary metric over the bytes of the optimizer's state, zero included.

    A line connects the rows of a method that differ only in their ranks.
    """
    shown = sorted(_measured(suite, rows), key=lambda row: _megabytes(row) or 0)
    sizes = list(filter(None, map(_megabytes, shown)))
    if not sizes:
        return False
    last: dict[Any, tuple[float, float]] = {}

    def line(axis: Axes, row: dict[str, Any], style: dict[str, Any]) -> None:
        axis.set_xscale("symlog", linthresh=min(sizes))
        point = _megabytes(row), row["metrics"][suite.primary]["mean"]
        if (axis, _family(row)) in last:
            axis.plot(*zip(last[axis, _family(row)], point), color=style["color"], linewidth=0.8)
        last[axis, _family(row)] = point

    return _tradeoff(suite, shown, path, _megabytes, f"{suite.state_title} (MB)", line)


def duration(suite: Suite, rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Plot the primary metric over the time of training, if all runs are from one kind of machine."""
    shown = _measured(suite, rows)
    if len(machines(shown)) > 1:
        return False
    return _tradeoff(suite, shown, path, lambda row: row["train_seconds"], "training time (s)")


def _tradeoff(
    suite: Suite, rows: Sequence[dict[str, Any]], path: Path, x: Any, xlabel: str, beside: Any = None
) -> bool:
    """Plot the primary metric over ``x(row)``.

    beside: function that draws what a row has beside its point.
    """

    def draw(axis: Axes, row: dict[str, Any], style: dict[str, Any]) -> None:
        if beside:
            beside(axis, row, style)
        y, bar = row["metrics"][suite.primary]["mean"], _half_width(row)
        axis.errorbar(x(row), y, yerr=bar, label=row["label"], **(style | _BAR))

    return _panels(rows, path, draw, xlabel=xlabel, ylabel=_primary(suite))


def _half_width(row: dict[str, Any]) -> float | None:
    """Return half of the interval of a row's difference, seed by seed, to the first row that trains the same.

    The row's own interval is not used. Most of it is what the rows of a seed do to all methods alike.
    """
    return row["difference"]["half_width"] if row.get("difference") else None


def _primary(suite: Suite) -> str:
    """Return the label of the axis of the primary metric."""
    better = "higher" if higher_is_better(suite.primary) else "lower"
    metric = suite.primary.replace("_", " ")
    return f"{metric} ({better} is better)\nbars: 95 % of the difference to the first, seed by seed"


def _panels(
    rows: Sequence[dict[str, Any]], path: Path, draw: Any, *, xlabel: str, ylabel: str, legend: bool = True
) -> bool:
    """Draw the panels into a file: a column for adapters and one for weights, a line for each model and protocol.

    Rows that differ only in their ranks have one color. Each row has its own marker. Without a legend rows are named
    on the axis, and the panels are as high as they need. draw: function of an axis, a row and its style. Returns
    whether there are rows.
    """
    if not rows:
        return False
    panels: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["model"], row["protocol"], row["trains"]), []).append(row)
    groups = list(dict.fromkeys((model, protocol) for model, protocol, _ in panels))
    kinds = [kind for kind in KINDS if any(kind == trains for *_, trains in panels)]
    height = 4.8 if legend else 1.2 + 0.2 * max(map(len, panels.values()))
    figure, axes = plt.subplots(
        len(groups), len(kinds), figsize=(7.5 * len(kinds), height * len(groups)), layout="constrained", squeeze=False
    )
    for line, (model, protocol) in zip(axes, groups):
        for axis, kind in zip(line, kinds):
            shown = panels.get((model, protocol, kind), [])
            families = list(dict.fromkeys(_family(row) for row in shown))
            for i, row in enumerate(shown):
                color = families.index(_family(row))
                style = dict(
                    color=f"C{color % 10}",
                    marker=_MARKERS[i % len(_MARKERS)],
                    linestyle=("-", "--", ":")[color // 10 % 3],
                )
                draw(axis, row, style | {"markersize": 5})
            axis.set(xlabel=xlabel, ylabel=ylabel, title=f"{model}, {protocol}: {KINDS[kind]}")
            axis.grid(alpha=0.3)
            if shown and legend:
                axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _measured(suite: Suite, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that have the primary metric."""
    return [row for row in rows if suite.primary in row["metrics"]]


def machines(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Return the kinds of machines that the rows' runs are from: processor, cores, threads and device."""
    return {machine for row in rows for machine in row.get("machines", ())}


def peaks_compare(rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether the rows' peaks of memory are comparable: those of tensors on one kind of GPU are.

    A process's resident memory also has what earlier runs of the process left.
    """
    measured = [row for row in rows if "peak_of" in row]
    return len(machines(measured)) == 1 and all(row["peak_of"].startswith("tensors on") for row in measured)


def _megabytes(row: dict[str, Any]) -> float:
    """Return the size of the optimizer's state in MB."""
    return row["state_bytes"] / 1e6


def _family(row: dict[str, Any]) -> tuple[str, str]:
    """Return the method and its options except for ranks, which rows share that differ only in their ranks."""
    return row["method"], str({name: value for name, value in row["options"].items() if "rank" not in name})


PLOTS = {
    "order.png": order,
    "losses.png": losses,
    "sensitivity.png": sensitivity,
    "state.png": state,
    "memory.png": memory,
    "time.png": duration,
}
