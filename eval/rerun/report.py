"""This module reports what a suite found, as rows with intervals, in JSON and in Markdown."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorapre_peft.integrations.summary import format_bytes
from recipes.training import write_atomically

from .comparisons import add_differences, against_best, averages, by_seed
from .intervals import interval, ranks
from .plan import Cell, Records
from .plots import PLOTS, machines, peaks_compare
from .suite import Suite, higher_is_better


def write_report(suite: Suite, cells: list[Cell], records: Records, skipped: Mapping[str, str], folder: Path) -> str:
    """Write ``report.json``, ``report.md`` and the plots into the suite's folder, and return the Markdown.

    skipped: by method, why it does not run here.
    """
    rows = [summary(cell, records, skipped) for cell in cells]
    found = []
    for group in _groups(rows):
        _rank(group, suite.primary)
        add_differences(group, suite.primary)
        where = {name: group[0][name] for name in ("model", "protocol")}
        found += [where | table for table in averages(group, suite.factors, suite.primary)]
    for name in PLOTS:
        (folder / name).unlink(missing_ok=True)  # An earlier report may have had another plot.
    plots = [name for name, plot in PLOTS.items() if plot(suite, rows, folder / name)]
    text = markdown(suite, rows, found, _surroundings(cells, records), plots)
    report = {"suite": asdict(suite), "rows": rows, "averages": found}
    write_atomically(folder / "report.json", json.dumps(report, indent=1))
    write_atomically(folder / "report.md", text)
    return text


def summary(cell: Cell, records: Records, skipped: Mapping[str, str]) -> dict[str, Any]:
    """Return a row: what the final runs measured, at which rate, what failed, and what is missing.

    The row also says how the rate was found. skipped: as in `write_report`.
    """
    final = [records[run.name] for run in cell.final_runs(records) if run.name in records]
    runs = {run.name for run in (*cell.tuning_runs(records), *cell.final_runs(records)) if run.name in records}
    good = [record for record in final if record["status"] == "finished"]
    rates = {f"{lr:g}": cell.validation_loss(lr, records) for lr in cell.rates(records)}
    lr = cell.best_rate(records)
    losses = {rate: cell.validation_losses(rate, records) for rate in cell.rates(records)}
    by_rate = {} if lr is None else against_best(losses, lr)
    row: dict[str, Any] = {
        "model": cell.model,
        "protocol": cell.protocol,
        "label": cell.entry.label,
        "method": cell.entry.method,
        "options": cell.entry.options,
        "trains": cell.method.trains,
        "lr": lr,
        "at_edge": cell.at_edge(records),
        "rates": {rate: loss if math.isfinite(loss) else None for rate, loss in rates.items()},
        "rate_differences": {f"{rate:g}": found.as_dict() for rate, found in by_rate.items()},
        "pending": 0 if cell.entry.method in skipped and not runs else len(cell.pending(records)),
        "failures": _failures(records[name] for name in sorted(runs)),
        "failed_seeds": len(final) - sum(record["metrics"].get(cell.suite.primary) is not None for record in good),
        "not_run": skipped.get(cell.entry.method) if not runs else None,
        "published": cell.published,
        "metrics": {},
    }
    for metric in cell.suite.metrics:
        measured = {r["run"]["seed"]: r["metrics"][metric] for r in good if r["metrics"].get(metric) is not None}
        if measured:
            seeds, values = list(measured), list(measured.values())
            row["metrics"][metric] = interval(values).as_dict() | {"values": values, "seeds": seeds}
    if good:
        row |= {
            name: good[0][name] for name in ("optimizer", "weights_bytes", "gradient_bytes", "state_bytes", "peak_of")
        }
        row["package"] = ", ".join(sorted({r["package"] for r in good if r["package"]})) or None
        row |= {
            name: statistics.median(r[name] for r in good)
            for name in ("peak_bytes", "train_seconds", "optimizer_seconds_per_step")
        }
        logged = zip(*(r["log"]["loss"] for r in good))  # A loss that was not finite is None.
        means = [None if None in column else statistics.fmean(column) for column in logged]
        # This is the state of all optimizers. In fine-tuning there is only one, and records lack this key.
        state = good[0].get("all_state_bytes", good[0]["state_bytes"])
        row["held_bytes"] = good[0]["weights_bytes"] + good[0]["gradient_bytes"] + state
        row["machines"] = sorted({f"{r['environment']['machine']}, {r['environment']['device']}" for r in good})
        row["curve"] = {"step": good[0]["log"]["step"], "loss": means}
    return row


def _failures(records: Any) -> list[str]:
    lines = []
    for record in records:
        which = f"lr {record['run']['lr']:g}, seed {record['run']['seed']}"
        if record["status"] != "finished":
            lines.append(f"{which}: {record['status']}" + (f" ({record['error']})" if "error" in record else ""))
        elif "answers_error" in record:
            lines.append(f"{which}: trained, but answered no problems ({record['answers_error']})")
    return lines


def _groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the rows that each table compares: those of one model under one protocol."""
    keys = dict.fromkeys((row["model"], row["protocol"]) for row in rows)
    return [[row for row in rows if (row["model"], row["protocol"]) == key] for key in keys]


def _rank(rows: list[dict[str, Any]], metric: str) -> None:
    """Add each row's possible places, among the rows with at least two runs and none that failed."""
    measured = [row for row in rows if len(by_seed(row, metric)) > 1]
    intervals = [interval(row["metrics"][metric]["values"]) for row in measured]
    for row, places in zip(measured, ranks(intervals, higher_is_better=higher_is_better(metric))):
        row["places"] = places


def _surroundings(cells: list[Cell], records: Records) -> list[dict[str, Any]]:
    """Return the different machines, versions and commands behind the runs."""
    used = [record["environment"] for cell in cells for record in cell.finished(records)]
    return [json.loads(text) for text in dict.fromkeys(json.dumps(found, sort_keys=True) for found in used)]


def markdown(
    suite: Suite,
    rows: Sequence[dict[str, Any]],
    averaged: Sequence[dict[str, Any]],
    surroundings: Sequence[dict[str, Any]],
    plots: Sequence[str],
) -> str:
    """Return the report as Markdown.

    Args:
        suite: the suite.
        rows: rows of all cells, as `summary` returns them.
        averaged: tables of `averages`, each with its model and protocol.
        surroundings: machines, versions and commands behind the runs.
        plots: names of the plots' files.
    """
    training = suite.training
    lines = [
        f"# {suite.name}",
        "",
        f"{suite.description}. {training.described()}.",
        "",
        "Cells: mean over seeds ± half the width of the 95 % t interval. *Place*: among the rows of a table, by "
        f"{_title(suite.primary)}; a range, because one row counts as before another only where their intervals do "
        "not touch, and none for a row of which a seed failed. *Difference*: to the first row of the suite that "
        "trains the same, seed by seed, because runs of one seed share their training rows. Each interval holds for "
        "itself: of twenty, one may miss. They are over seeds, on these test rows: what other test rows would give "
        "is not in them.",
    ]
    for group in _groups(rows):
        lines += ["", f"## {group[0]['model']}, protocol `{group[0]['protocol']}`", "", *_table(suite, group)]
        lines += _claims(suite, group) + _rate_differences(group)
        for table in averaged:
            if (table["model"], table["protocol"]) == (group[0]["model"], group[0]["protocol"]):
                lines += _averages(suite, table)
    pending = sum(row["pending"] for row in rows)
    if pending:
        lines += ["", f"**Not complete**: at least {pending} runs are missing."]
    missing = [row for row in rows if row["not_run"]]
    if missing:
        reasons = dict.fromkeys(f"* {row['label']}: {row['not_run']}" for row in missing)
        lines += ["", "Methods that do not run today:", "", *reasons]
    failed = [f"* {row['label']}, {row['protocol']}, {failure}" for row in rows for failure in row["failures"]]
    if failed:
        lines += ["", "Runs that failed:", "", *failed]
    for name in plots:
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    lines += ["", "Made by:", ""]
    commits: dict[tuple[str, str], list[str]] = {}
    for found in surroundings:
        versions = ", ".join(f"{name} {number}" for name, number in found.get("versions", {}).items())
        same = (f"`{found.get('command')}`", f"{found.get('machine')}, {found.get('device')}; {versions}")
        commits.setdefault(same, []).append(f"{found.get('commit')}")
    lines += [f"* {command} at {', '.join(at)}; {where}" for (command, where), at in commits.items()]
    packages = sorted({row["package"] for row in rows if row.get("package")})
    if packages:
        lines.append(f"* Packages of methods: {', '.join(packages)}")
    return "\n".join(lines) + "\n"


def _table(suite: Suite, rows: Sequence[dict[str, Any]]) -> list[str]:
    published = [m for m in suite.metrics if any(m in row["published"] for row in rows)]
    heads = ["method", "trains", "lr"]
    for metric in suite.metrics:
        heads += [_title(metric)] + ([f"{_title(metric)}, paper"] if metric in published else [])
    heads += [
        "difference",
        "place",
        suite.state_title,
        "weights + gradients + all state" if suite.pretrains else "weights + gradients + state",
        "peak",
        "optimizer, ms/step",
        "training, s",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    one_machine = len(machines(rows)) == 1
    compared = peaks_compare(rows)
    for row in sorted(rows, key=lambda row: _order(row, suite.primary)):
        cells = [row["label"], row["trains"], _rate(row)]
        for metric in suite.metrics:
            cells.append(_cell(row, metric))
            if metric in published:
                published_unit = _scale(metric)[2]
                cells.append(f"{row['published'][metric]:.2f}{published_unit}" if metric in row["published"] else "–")
        cells.append(format_difference(row.get("difference"), suite.primary))
        places = row.get("places")
        cells.append(
            "–" if places is None else f"{places[0]}" if places[0] == places[1] else f"{places[0]}–{places[1]}"
        )
        if "state_bytes" in row:
            cells += [format_bytes(row["state_bytes"]), format_bytes(row["held_bytes"])]
            times = [f"{1000 * row['optimizer_seconds_per_step']:.3g}", f"{row['train_seconds']:.0f}"]
            cells.append(format_bytes(row["peak_bytes"]) if compared else "–")
            cells += times if one_machine else ["–"] * 2
        else:
            cells += ["–"] * 5
        lines.append(f"| {' | '.join(cells)} |")
    peaks = sorted({row["peak_of"] for row in rows if "peak_of" in row})
    notes = []
    if peaks and not one_machine:
        notes.append("runs are from several machines or numbers of threads: their peaks and times are not comparable")
    elif peaks:
        notes += [
            f"peak: {peaks[0]}" if compared else "peak: not compared, as earlier runs leave memory in the process",
            "times: with whatever else ran on the machine; `python -m eval.speed` measures optimizers' steps alone",
        ]
    if published:
        notes.append(f"paper: {suite.published_source}")
    if any(row["at_edge"] for row in rows):
        notes.append("(edge): the best rate lies at the edge of its grid; a better one may lie beyond")
    return [*lines, "", *(f"{note}." for note in notes)]


def _claims(suite: Suite, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines that say which rows are before all others of their kind, and which may be the first."""
    lines = []
    sign = -1 if higher_is_better(suite.primary) else 1
    for kind in ("adapter", "weights"):
        ranked = [row for row in rows if row["trains"] == kind and "places" in row]
        if len(ranked) < 2:
            continue
        ranked.sort(key=lambda row: _order(row, suite.primary))
        intervals = [interval(row["metrics"][suite.primary]["values"]) for row in ranked]
        own = ranks(intervals, higher_is_better=higher_is_better(suite.primary))
        tied = [row["label"] for row, places in zip(ranked, own) if places[0] == 1]
        behind = len(ranked) - len(tied)
        so_far = " so far" if any(row["pending"] for row in rows if row["trains"] == kind) else ""
        lines += [
            "",
            f"Trains {kind}{so_far}: "
            + (
                f"{tied[0]} is first."
                if len(tied) == 1
                else f"the intervals of {'; '.join(tied) if behind else 'all rows'} do not tell which is first."
            )
            + (f" {behind} of {len(ranked)} are behind at least one of the others." if behind else ""),
        ]
        differing = [row for row in ranked if row.get("difference")]
        differing = [row for row in differing if abs(row["difference"]["mean"]) > row["difference"]["half_width"]]
        for side, word in ((-1, "better"), (1, "worse")):
            named = [row["label"] for row in differing if side * sign * row["difference"]["mean"] > 0]
            if named:
                lines[-1] += f" Seed by seed {word} than {differing[0]['difference']['to']}: {'; '.join(named)}."
    return lines


def _rate_differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines that say how much worse other rates are than the best one, for rows that tried several seeds."""
    lines = []
    for row in (row for row in rows if row["rate_differences"]):
        shown = (f"{format_difference(found, 'loss')} at {rate}" for rate, found in row["rate_differences"].items())
        what = (
            f"{row['label']}, validation loss seed by seed against that at {row['lr']:g}, which these same losses "
            "chose and so favour"
        )
        lines += ["", f"{what}: {', '.join(shown)}."]
    return lines


def _averages(suite: Suite, table: dict[str, Any]) -> list[str]:
    """Return lines that say what one factor does on average."""
    scale, digits, unit = _scale(suite.primary)
    lines = [
        "",
        f"Trains {table['trains']}, averaged over {table['settings']} settings of the other options:",
        "",
        f"| {', '.join(table['factor'])} | {_title(suite.primary)} | difference to the best |",
        "|---|---|---|",
    ]
    for level in table["levels"]:
        difference = format_difference(level["difference"], suite.primary)
        lines.append(f"| {level['level']} | {scale * level['mean']:.{digits}f}{unit} | {difference} |")
    return lines


def _order(row: dict[str, Any], metric: str) -> float:
    found = row["metrics"].get(metric)
    if not found:
        return math.inf
    return -found["mean"] if higher_is_better(metric) else found["mean"]


def _rate(row: dict[str, Any]) -> str:
    if row["lr"] is None:
        return "not run" if row["not_run"] else "pending" if row["pending"] else "none trains"
    return f"{row['lr']:g}" + (" (edge)" if row["at_edge"] else "")


def _scale(metric: str) -> tuple[int, int, str]:
    """Return the factor, the number of digits and the unit with which a metric is shown."""
    return (100, 2, " %") if higher_is_better(metric) else (1, 4, "")


def format_difference(found: dict[str, float] | None, metric: str) -> str:
    """Return a difference and its half width as a report shows them. found: `Interval.as_dict`, or None."""
    if found is None:
        return "–"
    scale, digits, unit = _scale(metric)
    return f"{scale * found['mean']:+.{digits}f} ± {scale * found['half_width']:.{digits}f}{unit}"


def _cell(row: dict[str, Any], metric: str) -> str:
    found = row["metrics"].get(metric)
    failed = f"{row['failed_seeds']} failed" if row["failed_seeds"] else ""
    if found is None:
        return failed or "–"
    scale, digits, unit = _scale(metric)
    spread = "?" if found["half_width"] is None else f"{scale * found['half_width']:.{digits}f}"
    seeds = ", ".join(filter(None, (f"n={len(found['values'])}", failed)))
    return f"{scale * found['mean']:.{digits}f} ± {spread}{unit} ({seeds})"


def _title(metric: str) -> str:
    names = {"gsm8k": "GSM8K", "gsm8k_paper": "GSM8K by the paper's extractor", "math500": "MATH-500"}
    return names.get(metric, metric.replace("_", " "))
