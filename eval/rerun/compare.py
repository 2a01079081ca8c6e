"""This module prints by how much two rows of the suites' reports differ, seed by seed.

    python -m eval.rerun.compare pretrain-rivals "Muon" "LoRA-Pre Muon, als, k=8"

It prints the first row minus the second one, with the 95 % t interval over the seeds that both have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from .comparisons import Row, by_seed, paired
from .report import format_difference
from .suite_files import RESULTS


def named_rows(suite: str, label: str) -> tuple[dict[tuple[str, str], Row], str]:
    """Return the rows of a label in a suite's report, by model and protocol, and the suite's metric.

    label: label in the report, or ``SUITE:LABEL`` for a row of another suite. Raises ValueError if there is no such
    row, and OSError if there is no report.
    """
    suite, _, label = label.rpartition(":") if ":" in label else (suite, "", label)
    report = json.loads((RESULTS / suite / "report.json").read_text(encoding="utf-8"))
    found = {(row["model"], row["protocol"]): row for row in report["rows"] if row["label"] == label}
    if not found:
        labels = dict.fromkeys(row["label"] for row in report["rows"])
        raise ValueError(f"{suite} has no row {label!r}; it has {'; '.join(labels)}")
    return found, report["suite"]["primary"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each table that has both rows. argv: arguments of the command line, or None for its own."""
    parser = argparse.ArgumentParser(prog="python -m eval.rerun.compare", description=__doc__.splitlines()[0])
    parser.add_argument("suite", help="name of a folder in eval/results with a report")
    parser.add_argument("rows", nargs=2, metavar="ROW", help="label in the report, or SUITE:LABEL for another suite's")
    args = parser.parse_args(argv)
    try:
        (first, metric), (second, _) = (named_rows(args.suite, label) for label in args.rows)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for table in first.keys() & second.keys():
        found = paired(*(by_seed(rows[table], metric) for rows in (first, second)))
        print(f"{', '.join(table)}, {metric}: {format_difference(found and found.as_dict(), metric)}")


if __name__ == "__main__":
    main()
