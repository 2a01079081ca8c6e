"""What the recipes on generated problems share: training arguments, the optimizer's clock, and a record of the surroundings."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTConfig

PACKAGES = ("lorapre-peft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "reasoning-gym")


class OptimizerTimer(TrainerCallback):
    """Seconds spent in optimizer.step, which Trainer calls between these two events."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors that an optimizer holds now."""
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())


def sft_config(output_dir: Path, *, lr: float, steps: int, batch_size: int, seed: int, **overrides: Any) -> SFTConfig:
    """Arguments that the recipes on generated problems share; ``overrides`` win."""
    options: dict[str, Any] = dict(
        output_dir=str(output_dir),
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        adam_beta2=0.95,  # the paper's betas, for every method
        max_grad_norm=1.0,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=8,
        max_length=512,
        logging_steps=max(1, steps // 20),
        save_strategy="steps",
        save_steps=20,
        save_total_limit=1,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=seed,
    )
    return SFTConfig(**(options | overrides))


def environment() -> dict[str, Any]:
    """What it takes to repeat the run: command, versions, commit, machine."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "command": " ".join(["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),
        "commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
