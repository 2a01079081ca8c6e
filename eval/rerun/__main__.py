"""This module is the command `python -m eval.rerun SUITE`, which plans, trains what is missing, and reports."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval.methods import METHODS
from recipes.training import environment

from .dry_run import plan_table
from .models import make_base
from .peft_format import write_peft_results
from .plan import cells
from .report import write_report
from .store import Store
from .suite_files import RESULTS, load_suite
from .work import train, train_in_processes, visible_gpus


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. argv: its arguments. None stands for the process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.rerun", description="Train and compare the methods of a suite."
    )
    parser.add_argument("suite", help="name of a file in eval/suites, or a path")
    parser.add_argument("--out", type=Path, help="folder of runs and report; default: eval/results/SUITE")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="do the I-th of N parts, I from 0")
    parser.add_argument("--jobs", type=int, default=1, help="processes on this machine; they share its GPUs")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the plan with estimated memory and time, train nothing"
    )
    parser.add_argument(
        "--peft_results",
        action="store_true",
        help="also write finished adapters in the format of PEFT's method_comparison",
    )
    args = parser.parse_args(argv)
    try:
        suite = load_suite(args.suite)
        others = [] if args.out else [RESULTS / name for name in suite.records_of]
        store = Store(args.out or RESULTS / suite.name, others)
        records = store.load()
        suite, precision = suite.settled(records)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"adapters' base model, and products: {precision}")
    reasons = {entry.method: METHODS[entry.method].unavailable() for entry in suite.entries}
    skipped = {method: reason for method, reason in reasons.items() if reason}
    if args.dry_run:
        print(plan_table(cells(suite, args.shard), records, skipped))
        return
    part = [cell for cell in cells(suite, args.shard) if cell.entry.method not in skipped]
    surroundings = environment(precision)
    if not suite.pretrains:
        for model in dict.fromkeys(cell.model for cell in part if cell.pending(records)):
            try:
                surroundings["versions"] |= make_base(model)
            except (ValueError, FileNotFoundError) as error:
                parser.exit(2, f"{parser.prog}: error: {error}\n")
    lost = 0
    if args.jobs > 1 or len(visible_gpus()) > 1:  # Trainer would split batches over all GPUs it sees.
        lost = train_in_processes(part, store, args.jobs, surroundings)
    else:
        train(part, store, surroundings)
    records = store.load()
    print(write_report(suite, cells(suite), records, skipped, store.folder))
    if args.peft_results:
        count = write_peft_results(cells(suite), records, store.folder / "peft")
        print(f"{count} experiments in PEFT's format: {store.folder / 'peft'}")
    print(f"report: {store.folder / 'report.md'}")
    if lost:
        parser.exit(1, f"{lost} of {args.jobs} processes failed or were killed: start again to go on\n")


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with 0 <= I < N, such as 0/4")
    return int(index), int(count)


if __name__ == "__main__":
    main()
