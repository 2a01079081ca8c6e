"""This module runs a test's work in several processes on the CPU, which communicate by gloo."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One server imports what every process needs, and forks them all. An import of transformers and PEFT takes longer than
# a test.
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "lorapre_peft"])


def _enter(rank: int, world: int, folder: Path, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    # This is less than a test may take, so that the error is that of the process which waits, and says where.
    limit = timedelta(minutes=4)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=limit
    )
    torch.save(work(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def run(world: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``work(*args)`` in each of ``world`` processes of one group, and return a list of what each returned.

    work: function of a test module. folder: folder where the processes meet and leave their results. It must not
    exist, and is made here.
    """
    folder.mkdir(parents=True)
    # These processes are daemons, which a test that is stopped does not leave behind.
    mp.start_processes(_enter, (world, folder, work, args), nprocs=world, daemon=True, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
