"""This module makes the tables and plots of `eval.speed` from the dictionaries that it writes as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lorapre_peft.integrations.summary import format_bytes

HEAD = (
    "| optimizer | time, ms (quartiles) | × fused AdamW | state | temporaries | bandwidth |\n|---|---|---|---|---|---|"
)


def markdown(case: dict[str, Any], copy_bytes_per_second: float) -> str:
    """Return a case's table as Markdown.

    Its column of bandwidths has the least bytes that a step must move over its time, and the share of a device copy's
    bandwidth that this is.
    """
    lines = [f"### {title(case)}", "", HEAD]
    notes = []
    for result in case["results"]:
        if result["note"]:
            notes.append(f"{result['name']}: {result['note']}.")
        if result["reason"]:
            lines.append(f"| {result['name']} | {_cell(result['reason'])} | – | – | – | – |")
            continue
        low, high = result["quartiles"]
        bandwidth = "–"
        if result["traffic_bytes"]:
            speed = result["traffic_bytes"] / result["median"]
            bandwidth = f"{format_bytes(speed)}/s, {speed / copy_bytes_per_second:.0%}"
        sizes = " | ".join(format_bytes(result[key]) for key in ("state_bytes", "temporary_bytes"))
        lines.append(
            f"| {result['name']} | {1e3 * result['median']:.3g} ({1e3 * low:.3g}–{1e3 * high:.3g}, "
            f"n={len(result['seconds'])}) | {result['ratio']:.2f} | {sizes} | {bandwidth} |"
        )
    if case["not_applicable"]:
        notes.append(f"Not for {case['kind']}: {', '.join(case['not_applicable'])}.")
    return "\n".join([*lines, "", *notes, ""])


def title(case: dict[str, Any]) -> str:
    """Return a line that says what a case steps through."""
    return (
        f"{case['name']}: {case['extent']}, {case['matrices']:,} matrices, {case['parameters'] / 1e6:.3g} M "
        f"parameters, k = {case['momentum_rank']}"
    )


def sweep_markdown(cases: Sequence[dict[str, Any]]) -> str:
    """Return a table of median milliseconds and ratios, with a row for each value and a column for each method."""
    names = [result["name"] for result in cases[0]["results"]]
    lines = [f"### By {cases[0]['sweep']}", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for case in cases:
        cells = [
            f"{1e3 * result['median']:.3g} ms, {result['ratio']:.2f}"
            if not result["reason"]
            else _cell(result["reason"])
            for result in case["results"]
        ]
        lines.append(f"| {case['value']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def sweeps(cases: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the cases of each sweep together, in the order of the values."""
    for what in dict.fromkeys(case["sweep"] for case in cases if case["sweep"]):
        yield sorted((case for case in cases if case["sweep"] == what), key=lambda case: case["value"])


def plot_cases(cases: Sequence[dict[str, Any]], path: Path, machine: str) -> None:
    """Plot bars of each case's ratios to fused AdamW, with quartiles, on a logarithmic axis, into a file.

    machine: text of the title.
    """
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    tallest = max(len(case["results"]) for case in cases)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.6 * columns, rows * (1.1 + 0.27 * tallest)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases):
        _bars(axis, case)
    figure.suptitle(f"Optimizer step: time over torch.optim.AdamW(fused=True)\n{machine}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: plt.Axes, case: dict[str, Any]) -> None:
    results = case["results"]
    widest = max((result["ratio"] for result in results if not result["reason"]), default=1)
    for row, result in enumerate(results):
        if result["reason"]:
            axis.text(1.03, row, result["reason"].partition(":")[0], va="center", fontsize=7, color="grey")
            continue
        reference = result["median"] / result["ratio"]
        low, high = (value / reference for value in result["quartiles"])
        ours = result["package"] == "lorapre-peft"
        axis.barh(row, result["ratio"] - 1, left=1, color="tab:orange" if ours else "tab:blue", alpha=0.8)
        axis.plot([low, high], [row, row], color="black", linewidth=1.2)
        axis.text(max(high, 1) * 1.05, row, f"{result['ratio']:.2f}", va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", subs=(2, 5))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params("x", which="both", labelsize=8)
    smallest = min(result["ratio"] or 1 for result in results)
    axis.set_xlim(min(0.5, 0.8 * smallest), 2 * max(widest, 1.5) ** 1.15)  # The number of the longest bar needs room.
    axis.set_yticks(range(len(results)), [result["name"] for result in results], fontsize=8)
    axis.set_ylim(len(results) - 0.4, -0.6)  # The first row is on top. Rows without a bar have room too.
    axis.set_title(
        f"{case['name']}, k = {case['momentum_rank']}\n{case['extent']}, {case['parameters'] / 1e6:.3g} M parameters",
        fontsize=9,
    )


def plot_sweeps(cases: Sequence[dict[str, Any]], path: Path, machine: str) -> None:
    """Plot a panel for each sweep into a file: median time by value, with quartiles as a band, on logarithmic axes.

    machine: text of the title.
    """
    groups = list(sweeps(cases))
    figure, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4.2), squeeze=False, layout="constrained")
    for axis, group in zip(axes.flat, groups):
        for index, name in enumerate(result["name"] for result in group[0]["results"]):
            points = [
                (case["value"], case["results"][index]) for case in group if not case["results"][index]["reason"]
            ]
            if points:
                at, results = zip(*points)
                (line,) = axis.plot(at, [1e3 * r["median"] for r in results], marker="o", markersize=4, label=name)
                low, high = zip(*(r["quartiles"] for r in results))
                axis.fill_between(
                    at, [1e3 * t for t in low], [1e3 * t for t in high], color=line.get_color(), alpha=0.2
                )
        axis.set_xscale("log", base=2)
        values = [case["value"] for case in group]
        axis.set_xticks(values, values)
        axis.set_yscale("log")
        axis.set_xlabel(group[0]["sweep"])
        axis.set_ylabel("ms per step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"Optimizer step: median and quartiles\n{machine}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
