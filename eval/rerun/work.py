"""This module does the runs of a suite one after another, or in several processes that share them."""

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
    """Do the runs of these cells until none is left.

    A run that another process does is waited for. shares_memory: whether other processes train on this one's GPU, or
    without a GPU on this one's machine.
    """
    disable_progress_bars()  # Otherwise each run shows its tokenization.
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
            for run in sorted(pending, key=store.begun):  # A run that may have killed its process is last.
                with store.claim(run) as mine:
                    if mine:
                        progress.set_postfix_str(f"{run.method}, lr {run.lr:g}, seed {run.seed}")
                        store.save(run, runner(run))
                        break  # What is pending depends on what it found.
            else:
                time.sleep(WAIT_SECONDS)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. CUDA stops at a −1."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def train_in_processes(part: list[Cell], store: Store, jobs: int, surroundings: dict[str, Any]) -> int:
    """Run `train` in several processes, and return how many did not end by themselves.

    They share the runs by their claims. Each sees one GPU, in turn.
    """
    devices = visible_gpus()
    context = multiprocessing.get_context("spawn")
    processes = []
    shares_memory = max(1, len(devices)) < jobs
    for i in range(jobs):
        if devices:  # It is set before the start, as libraries look for GPUs while they are imported.
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
        processes.append(context.Process(target=_job, args=(jobs, part, store, surroundings, shares_memory)))
        processes[-1].start()
    running = {process.sentinel: process for process in processes}
    while running:  # A process that was killed seems alive until it is joined, and its claim valid.
        for sentinel in connection.wait(running):
            running.pop(sentinel).join()
    return sum(process.exitcode != 0 for process in processes)


def _job(jobs: int, part: list[Cell], store: Store, surroundings: dict[str, Any], shares_memory: bool) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    surroundings = surroundings | {"machine": f"{machine()} in each of {jobs} processes"}
    train(part, store, surroundings, shares_memory)


def _end_with_parent() -> None:
    """End this process with the command that started it.

    That command, started again, would otherwise share its GPUs with what is left.
    """
    multiprocessing.parent_process().join()
    os._exit(1)
