"""This module trains under Trainer, and kills itself with SIGKILL half-way through each file of a checkpoint in turn.

`python tests/helpers/killed_saves.py FOLDER` leaves FOLDER/<file>/checkpoint-2 and a broken checkpoint-4 for each
file. `test_broken_checkpoints.py` runs it. One process is forked for each file, so that only one has to import
transformers.
"""

import functools
import gc
import os
import shutil
import signal
import sys
from pathlib import Path

import peft.peft_model
import torch
from peft import get_peft_model
from tiny_llama import build_llama
from trainers import arguments, lorapre_trainer
from transformers import TrainerState

from lorapre_peft import LoRAPreConfig

# The files are in the order in which Trainer writes them. "rotation" stands for the deletion of checkpoint-2 once
# checkpoint-4 is there.
FILES = [
    "adapter_model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "rotation",
]


def killed_trainer(folder, **options):
    """Return the trainer of the run that is killed, which is also that of the run that resumes it."""
    ids = torch.randint(4, 64, (24, 12), generator=torch.Generator().manual_seed(1)).tolist()
    model = get_peft_model(build_llama(), LoRAPreConfig(r=8, target_modules="all-linear"))
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=2, **options)
    return lorapre_trainer(model, args, [{"input_ids": row, "labels": row} for row in ids])


def kill():
    """Kill this process with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def killing(write, name):
    """Return ``write``, changed to kill the process when half of checkpoint-4's file ``name`` is on the disk."""

    @functools.wraps(write)
    def wrapper(*args, **kwargs):
        result = write(*args, **kwargs)
        path = next(Path(arg) for arg in reversed(args) if isinstance(arg, (str, os.PathLike)))
        if path.name == name and path.parent.name == "checkpoint-4":
            os.truncate(path, path.stat().st_size // 2)
            kill()
        return result

    return wrapper


def killing_rmtree(path, **kwargs):
    """Delete only the optimizer's file of a checkpoint, and kill this process. This stands in for `shutil.rmtree`."""
    (Path(path) / "optimizer.pt").unlink()
    kill()


def run_and_die(folder, name):
    """Train until the process is killed in the middle of writing the file ``name``, or of the rotation."""
    if name == "rotation":
        shutil.rmtree = killing_rmtree
    torch.save = killing(torch.save, name)
    peft.peft_model.safe_save_file = killing(peft.peft_model.safe_save_file, name)
    TrainerState.save_to_json = killing(TrainerState.save_to_json, name)
    killed_trainer(folder / name, save_total_limit=1 if name == "rotation" else None).train()


if __name__ == "__main__":
    gc.freeze()  # Trainer collects garbage, and need not walk through what was imported.
    for name in FILES:
        child = os.fork()
        if child == 0:
            run_and_die(Path(sys.argv[1]), name)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{name}: ended by itself with {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL
