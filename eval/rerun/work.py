"""Do the runs of a suite: one after another, and in several processes that share them."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing import connection
from typing import Any

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm

from recipes.training import machine

from .plan import Cell
from .pretraining import PretrainingRunner
from .store import Store
from .training import Runner

WAIT_SECONDS = 5


def train(part: list[Cell], store: Store, surroundings: dict[str, Any], shares_memory: bool = False) -> None:
    """Do the runs of these cells that nobody has done or is doing, and wait for those that others do, until none is
    left.

    shares_memory: whether other processes train on this one's GPU, or without one, on this one's machine.
    """
    disable_progress_bars()  # of each run's tokenization
    pretrains = any(cell.suite.pretrains for cell in part)
    runner = (PretrainingRunner if pretrains else Runner)(surroundings, shares_memory)
    with tqdm(desc="runs", unit="run") as progress:
        while True:
            records = store.load()
            progress.total = sum(cell.expected_runs(records) for cell in part)
            progress.n = sum(cell.done(records) for cell in part)
            progress.refresh()
            pending = [run for cell in part for run in cell.pending(records)]
            if not pending:
                return
            for run in sorted(pending, key=store.begun):  # last, what may have taken its process with it
                with store.claim(run) as mine:
                    if mine:
                        progress.set_postfix_str(f"{run.method}, lr {run.lr:g}, seed {run.seed}")
                        store.save(run, runner(run))
                        break  # what is pending depends on what it found
            else:
                time.sleep(WAIT_SECONDS)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. CUDA stops at a −1."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def train_in_processes(part: list[Cell], store: Store, jobs: int, surroundings: dict[str, Any]) -> int:
    """Run `train` in several processes, which share the runs by their claims; each sees one GPU, in turn.

    Returns how many did not end by themselves.
    """
    devices = visible_gpus()
    context = multiprocessing.get_context("spawn")
    processes = []
    shares_memory = max(1, len(devices)) < jobs
    for i in range(jobs):
        if devices:  # before the process starts: libraries look for GPUs while they are imported
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
        processes.append(context.Process(target=_job, args=(jobs, part, store, surroundings, shares_memory)))
        processes[-1].start()
    running = {process.sentinel: process for process in processes}
    while running:  # joined as they end: until then the claim of one that was killed looks like a living process's
        for sentinel in connection.wait(running):
            running.pop(sentinel).join()
    return sum(process.exitcode != 0 for process in processes)


def _job(jobs: int, part: list[Cell], store: Store, surroundings: dict[str, Any], shares_memory: bool) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    surroundings = surroundings | {"machine": f"{machine()} in each of {jobs} processes"}
    train(part, store, surroundings, shares_memory)


def _end_with_parent() -> None:
    """End this process with the command that started it, which, started again, would share its GPUs with what
    is left.
    """
    multiprocessing.parent_process().join()
    os._exit(1)
