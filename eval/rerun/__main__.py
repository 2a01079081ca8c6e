"""`python -m eval.rerun SUITE`: plan, train what is missing, report."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm

from eval.methods import METHODS
from recipes.training import environment

from .dry_run import plan_table
from .peft_format import write_peft_results
from .plan import Cell, cells
from .report import write_report
from .store import Store
from .suite import SUITES, load_suite
from .training import Runner

WAIT_SECONDS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """argv: the command line, None for the process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.rerun", description="Train and compare the methods of a suite."
    )
    parser.add_argument("suite", help="name of a file in eval/suites, or a path")
    parser.add_argument("--out", type=Path, help="folder of runs and report; default: eval/results/SUITE")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="do the I-th of N parts, I from 0")
    parser.add_argument("--jobs", type=int, default=1, help="processes on this machine; one GPU each, in turn")
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
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    store = Store(args.out or SUITES.parent / "results" / suite.name)
    reasons = {entry.method: METHODS[entry.method].unavailable() for entry in suite.entries}
    skipped = {method: reason for method, reason in reasons.items() if reason}
    if args.dry_run:
        print(plan_table(cells(suite, args.shard), store.load(), skipped))
        return
    disable_progress_bars()  # of each run's tokenization
    part = [cell for cell in cells(suite, args.shard) if cell.entry.method not in skipped]
    surroundings = environment()
    surroundings["command"] = surroundings["command"].replace(".__main__", "", 1)
    lost = _spread(part, store.folder, args.jobs, surroundings) if args.jobs > 1 else train(part, store, surroundings)
    records = store.load()
    print(write_report(suite, cells(suite), records, skipped, store.folder))
    if args.peft_results:
        count = write_peft_results(cells(suite), records, store.folder / "peft")
        print(f"{count} experiments in PEFT's format: {store.folder / 'peft'}")
    print(f"report: {store.folder / 'report.md'}")
    if lost:
        parser.exit(1, f"{lost} of {args.jobs} processes were ended from outside: start again to go on\n")


def train(part: list[Cell], store: Store, surroundings: dict[str, Any]) -> None:
    """Do the runs of these cells that nobody has done or is doing, and wait for those that others do, until none is left."""
    runner = Runner(surroundings)
    with tqdm(desc="runs", unit="run") as progress:
        while True:
            records = store.load()
            progress.total = sum(cell.expected_runs(records) for cell in part)
            progress.n = sum(cell.done(records) for cell in part)
            progress.refresh()
            pending = [run for cell in part for run in cell.pending(records)]
            if not pending:
                return
            for run in pending:
                with store.claim(run) as mine:
                    if mine:
                        progress.set_postfix_str(f"{run.method}, lr {run.lr:g}, seed {run.seed}")
                        store.save(run, runner(run))
                        break  # what is pending depends on what it found
            else:
                time.sleep(WAIT_SECONDS)


def _spread(part: list[Cell], folder: Path, jobs: int, surroundings: dict[str, Any]) -> int:
    """`train` in several processes, which share the runs by their claims; returns how many did not end by themselves."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_job, args=(i, jobs, part, folder, surroundings)) for i in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(process.exitcode != 0 for process in processes)


def _job(index: int, jobs: int, part: list[Cell], folder: Path, surroundings: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    train(part, Store(folder), surroundings)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with 0 <= I < N, such as 0/4")
    return int(index), int(count)


if __name__ == "__main__":
    main()
