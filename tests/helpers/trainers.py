"""This module holds what the tests of trainers share: arguments, trainers and a callback that records what it sees."""

import copy
from collections import Counter

import torch
from adapting import trainable
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorapre_peft import LoRAPreCallback, lorapre_optimizer
from lorapre_peft.optim.base import LoRAPreOptimizer

ALWAYS_LOGGED = {"lorapre/state_bytes", "lorapre/adamw_state_bytes", "lorapre/skipped_updates"}


ADAMW_LOGGED = ALWAYS_LOGGED | {"lorapre/captured_energy", "lorapre/largest_update", "lorapre/clamped_share"}


def arguments(tmp_path, config_class=TrainingArguments, **options) -> TrainingArguments:
    """Return arguments for four steps on the CPU. ``options`` override the defaults here."""
    defaults = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return config_class(**(defaults | options))


def lorapre_trainer(
    model,
    args,
    dataset,
    callbacks=(),
    kind="adamw",
    trainer_class=Trainer,
    eval_dataset=None,
    callback=None,
    **options,
):
    """Return a trainer with LoRA-Pre's optimizer, whose callback comes after ``callbacks``.

    Args:
        kind: ``"adamw"`` or ``"muon"``.
        callback: LoRA-Pre's callback. None stands for `LoRAPreCallback()`.
        options: options of the optimizer.
    """
    return trainer_class(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        optimizer_cls_and_kwargs=lorapre_optimizer(kind, args, **options),
        callbacks=[*callbacks, callback or LoRAPreCallback()],
    )


def inner(optimizer) -> LoRAPreOptimizer:
    """Return the optimizer inside accelerate's wrappers."""
    return optimizer if isinstance(optimizer, LoRAPreOptimizer) else inner(optimizer.optimizer)


def training_logs(trainer) -> list[dict]:
    """Return the log entries that hold a training loss."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_end(trainer, other) -> None:
    """Assert that two trainers have the same weights and optimizer states in every bit."""
    for ours, theirs in (
        (trainable(trainer.model), trainable(other.model)),
        *zip(*(inner(t.optimizer).state_dict()["state"].values() for t in (trainer, other))),
    ):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class Recorder(TrainerCallback):
    """Records each log as a reporter sees it, and model and optimizer just before and after each step.

    Attributes:
        events: number of calls at the beginning of training and at logs.
        logs: copies of all logs.
        recorded: whether the optimizer recorded metrics, by step.
        rates, gradient_norms: learning rate and norm of all gradients before each step.
        weights: trainable parameters at the beginning of training and after each step.
    """

    def __init__(self):
        self.events = Counter()
        self.logs, self.recorded, self.rates, self.gradient_norms, self.weights = [], [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Record the weights."""
        self.events["train_begin"] += 1
        self.weights.append(trainable(model))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Record the learning rate and the norm of all gradients."""
        self.rates.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.gradient_norms.append(torch.cat(gradients).norm().item())

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Record the weights, and whether the optimizer recorded metrics."""
        self.recorded.append(inner(optimizer).record_metrics)
        self.weights.append(trainable(model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Record the log."""
        self.events["log"] += 1
        self.logs.append(copy.deepcopy(logs))
