"""This module does one run: it prepares the model, trains it by TRL's SFTTrainer, and measures it."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from trl import SFTTrainer

from eval.exact_match import generate
from eval.methods import METHODS
from eval.optimizers.chained import ChainedOptimizer
from lorapre_peft.memory.peak import measure
from recipes.training import OptimizerTimer, Progress, describe, free_memory, from_model, held_bytes, sft_config

from .data import Splits, load_splits
from .models import load_base
from .suite import Run

# Starts that need the gradient of the base weights take it over a batch, and over at least so many rows, as the
# authors of LoRA-GA and LoRA-One do.
START_ROWS = 8


class Runner:
    """Trains runs one after another, and keeps the base models and the data, which they share.

    Args:
        surroundings: what `recipes.training.environment` returns. It is written into every record.
        shares_memory: whether other processes train on the same GPU or machine. A lack of memory is then not the
            method's fault.
    """

    def __init__(self, surroundings: dict[str, Any], shares_memory: bool = False) -> None:
        self._surroundings = surroundings
        self._shares_memory = shares_memory
        self._bases: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        self._splits: dict[str, Splits] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        """Do the run, and return its record.

        If the method fails, the record says so. What is not the method's fault is raised: a model or data that cannot
        be read, a judge of answers that does not work, a full disk or another OSError, a GPU that CUDA has given up,
        and a GPU whose memory other processes fill.
        """
        self._ready(run)
        start = time.perf_counter()
        try:
            measured = self._train(run)
            diverged = not math.isfinite(measured["metrics"]["validation_loss"])
            status = {"status": "diverged" if diverged else "finished"}
        except Exception as error:  # A method's package may raise anything.
            if self._is_of_the_process(error):
                raise
            status = {"status": "failed", "error": describe(error)}
            if _ran_out_of_memory(error):
                status["status"] = "out of memory"
            measured = {"metrics": {}}
        free_memory()
        record = {
            "run": run.declaration,
            "package": METHODS[run.method].installed,
            **status,
            **measured,
            "total_seconds": time.perf_counter() - start,
        }
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return _finite({**record, "created_at": created, "environment": self._surroundings})

    def _is_of_the_process(self, error: Exception) -> bool:
        """Return whether the method is not to blame for an error.

        It is not to blame for a full disk and its like, for CUDA's own errors, which stay, and if other processes fill
        the memory.
        """
        of_others = self._shares_memory and _ran_out_of_memory(error)
        return of_others or isinstance(error, OSError) or "CUDA error" in str(error)

    def _ready(self, run: Run) -> None:
        """Read data and model, and try the judge, before hours of training."""
        splits = self._data(run)
        if run.answers:
            for problems in splits.problems.values():
                problems.verdicts(["#### 1/2"], ["0.5"])
        self.base(run.model)

    def base(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the untrained model and its tokenizer, which are kept in the main memory. A run copies the model."""
        if name not in self._bases:
            self._bases = {name: load_base(name)}  # One is kept at a time.
        return self._bases[name]

    def _data(self, run: Run) -> Splits:
        rows = run.training.steps * run.training.batch_size
        key = f"{run.data} {run.seed} {rows}"
        if key not in self._splits:
            self._splits[key] = load_splits(run.data, rows, run.seed)
        return self._splits[key]

    def _train(self, run: Run) -> dict[str, Any]:
        method, training = METHODS[run.method], run.training
        splits = self._data(run)
        base, tokenizer = self.base(run.model)
        dtype = getattr(torch, training.adapter_dtype if method.trains == "adapter" else training.weights_dtype)
        set_seed(run.seed)
        on_gpu = torch.cuda.is_available()
        model = copy.deepcopy(base).to("cuda" if on_gpu else "cpu")
        for param in model.parameters():  # `model.to(dtype)` would round RoPE's frequencies too.
            param.data = param.data.to(dtype)
        first_rows = splits.train.select(range(min(len(splits.train), max(START_ROWS, training.batch_size))))
        accumulate_gradients = functools.partial(
            _accumulate_gradients, model, tokenizer, first_rows, training.max_length
        )
        start = time.perf_counter()
        with measure() as preparing:
            model = method.prepare(model, training.rank, run.options, accumulate_gradients)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            args = sft_config(
                Path(folder),
                lr=run.lr,
                steps=training.steps,
                batch_size=training.micro_batch,
                gradient_accumulation_steps=training.batch_size // training.micro_batch,
                gradient_checkpointing=training.gradient_checkpointing,
                max_length=training.max_length,
                warmup_steps=training.warmup,
                seed=run.seed,
                bf16=training.bf16,
                save_strategy="no",
                include_num_input_tokens_seen="non_padding",
            )
            timer, memory_log = OptimizerTimer(), MemoryLog()
            trainer = (SecondOrderTrainer if method.second_order else SFTTrainer)(
                model,
                args,
                train_dataset=splits.train,
                eval_dataset={"validation": splits.validation, "test": splits.test},
                processing_class=tokenizer,
                optimizer_cls_and_kwargs=(from_model(method.build), {"args": args, "options": run.options}),
                callbacks=[timer, memory_log],
            )
            Progress.replace(trainer)
            start = time.perf_counter()
            # On a CPU a step takes a seventh longer with the fused kernels.
            kernels = contextlib.nullcontext() if on_gpu else sdpa_kernel(SDPBackend.MATH)
            with kernels:
                with measure() as memory:
                    trainer.train()
                seconds += time.perf_counter() - start
                losses = trainer.evaluate()
        measured = measurements(trainer, trainer.optimizer.optimizer, losses, timer, memory_log, seconds)
        measured |= {"peak_bytes": max(preparing.peak_bytes, memory.peak_bytes), "peak_of": memory.what}
        trainer.accelerator.free_memory()
        del trainer  # Optimizer state and gradients would take the answers' room.
        model.zero_grad()
        free_memory()
        try:
            for found in self._answers(run, model, tokenizer, splits):  # This is last, as it merges the adapter.
                measured["metrics"] |= {metric: statistics.fmean(right) for metric, right in found.items()}
                measured["verdicts"] |= {metric: "".join("01"[i] for i in right) for metric, right in found.items()}
        except Exception as error:  # The training still counts.
            if self._is_of_the_process(error):
                raise
            measured["answers_error"] = describe(error)
        return measured

    def _answers(
        self, run: Run, model: nn.Module, tokenizer: PreTrainedTokenizerBase, splits: Splits
    ) -> Iterator[dict[str, list[bool]]]:
        """Yield for each set of problems by metric which of the first ``run.answers`` ones were answered right."""
        if not run.answers:
            return
        if model.device.type == "cpu":  # Merged and in float32 it is several times faster.
            model = model.float()
            model = model.merge_and_unload() if isinstance(model, PeftModel) else model
        for name, problems in splits.problems.items():
            asked = problems.rows.select(range(min(run.answers, len(problems.rows))))
            completions = generate(
                model,
                tokenizer,
                asked["prompt"],
                max_new_tokens=problems.max_new_tokens,
                batch_size=64,
                stop=problems.stop,
                progress=f"answers, {name}",
            )
            yield problems.verdicts(completions, asked["answer"])


def measurements(
    trainer: Trainer,
    optimizer: Optimizer,
    losses: dict[str, float],
    timer: OptimizerTimer,
    memory_log: MemoryLog,
    seconds: float,
) -> dict[str, Any]:
    """Return what a record says of a training that has ended, except for its peak of memory.

    Args:
        trainer: the trainer.
        optimizer: optimizer of what the run compares.
        losses: what the trainer's evaluation of both held-out sets returned.
        timer, memory_log: callbacks that measured time and memory.
        seconds: time of the training.
    """
    model = trainer.model
    params = [param for param in model.parameters() if param.requires_grad]
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "metrics": {"validation_loss": losses["eval_validation_loss"], "test_loss": losses["eval_test_loss"]},
        "verdicts": {},
        "optimizer": type(optimizer).__name__,
        "weights_bytes": sum(param.nbytes for param in model.parameters()),
        "gradient_bytes": sum(param.nbytes for param in params),
        "adapter_bytes": sum(param.nbytes for name, param in model.named_parameters() if "lora_" in name),
        "state_bytes": held_bytes(optimizer),
        "memory": memory_log.summary(),
        "trained_parameters": sum(param.numel() for param in params),
        "parameters": sum(param.numel() for param in model.parameters()),
        "tokens": trainer.state.num_input_tokens_seen,
        "train_seconds": seconds,
        "optimizer_seconds_per_step": timer.per_step(),
        "log": {"step": [row["step"] for row in log], "loss": [row["loss"] for row in log]},
    }


def _accumulate_gradients(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int
) -> None:
    """Run a backward pass of the completion's loss for each row, cut to ``max_length`` tokens as in training."""
    for row in rows:
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text, return_tensors="pt", max_length=max_length, truncation=True).input_ids.to(model.device)
        labels = ids.clone()
        labels[:, : len(tokenizer(row["prompt"]).input_ids)] = -100
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()


class MemoryLog(TrainerCallback):
    """Records the memory in bytes after each step.

    It is what PyTorch has reserved on the GPU, or without a GPU the process's resident memory.
    """

    def __init__(self) -> None:
        self._bytes: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the memory."""
        cuda = torch.cuda.is_available()
        self._bytes.append(torch.cuda.memory_reserved() if cuda else psutil.Process().memory_info().rss)

    def summary(self) -> dict[str, int]:
        """Return mean, maximum and 99th percentile in bytes."""
        found = {
            "mean": numpy.mean(self._bytes),
            "max": max(self._bytes),
            "percentile_99": numpy.percentile(self._bytes, 99),
        }
        return {name: int(value) for name, value in found.items()}


class SecondOrder(Trainer):
    """Keeps the graph of the gradients, for optimizers that differentiate them.

    It does so at every ``update_period``-th step, and there for the last micro-batch alone, as the graphs of all would
    not fit into memory.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does, with the graphs and without fused attention."""
        backward = self.accelerator.backward

        def with_graph(loss: Tensor, **options: Any) -> None:
            optimizer = self.optimizer.optimizer
            optimizer = optimizer.optimizers[0] if isinstance(optimizer, ChainedOptimizer) else optimizer
            due = self.state.global_step % optimizer.update_period == 0
            backward(loss, create_graph=due and self.accelerator.sync_gradients, **options)

        self.accelerator.backward = with_graph
        with sdpa_kernel(SDPBackend.MATH):  # The fused kernels have no second derivative.
            return super().train(*args, **kwargs)


class SecondOrderTrainer(SecondOrder, SFTTrainer):
    """Extends `SFTTrainer` to optimizers that differentiate gradients.

    TRL's own loss has no graph of gradients. Here the same number is not computed in chunks.
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of `Trainer`."""
        return Trainer.compute_loss(self, *args, **kwargs)


def _ran_out_of_memory(error: Exception) -> bool:
    """Return whether there was too little memory. On a CPU torch says so in a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _finite(value: Any) -> Any:
    """Return a value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
