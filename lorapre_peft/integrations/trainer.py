"""This module gives `transformers.Trainer` and TRL's trainers an optimizer, by one argument; the callback is in
``callback.py``.

TRL's SFTTrainer and RewardTrainer take the argument. The others, such as DPOTrainer, have Trainer's attribute of the
same name, which can be set before training.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..optim.base import LoRAPreOptimizer
from .create import OPTIMIZERS, check_call, create_lorapre_optimizer
from .loaded import complete_loaded, resumed_from


def lorapre_optimizer(
    optimizer: str = "adamw", args: TrainingArguments | None = None, **overrides: Any
) -> tuple[Callable[[], Callable[..., LoRAPreOptimizer]], dict[str, Any]]:
    """Return Trainer's ``optimizer_cls_and_kwargs``, which builds a LoRA-Pre optimizer once the model is wrapped.

    Trainer does not pass its learning rate to an optimizer given this way. Instead, learning rate, weight decay and
    epsilon are read from ``args`` whenever an optimizer is built, as a hyperparameter search changes them. So is each
    Adam beta that differs from the training arguments' default. Those defaults are 0.9 and 0.999, and LoRA-Pre's own
    are 0.9 and 0.95, so that 0.999 has to be given as ``betas``. ``"muon"`` uses betas and epsilon in its AdamW path.

    Args:
        optimizer: ``"adamw"`` or ``"muon"``.
        args: the trainer's own arguments (`TrainingArguments`, `SFTConfig`, …).
        overrides: options of `create_lorapre_optimizer`, which take precedence over ``args``.

    Raises TypeError if the first argument is not a name or the second has no learning rate, and for an unknown option.
    Raises ValueError if there is no learning rate in either, for an unknown optimizer, and for arguments that cannot
    work with it: an engine that flattens parameters, or, with ``update_in_backward=True``, gradient accumulation,
    global-norm clipping (``max_grad_norm`` above 0) or fp16.
    """
    check_call(optimizer, overrides, "lorapre_optimizer('adamw', args)")
    if args is not None and not hasattr(args, "learning_rate"):
        raise TypeError(
            f"found a {type(args).__name__} where the trainer's arguments are expected: write "
            "lorapre_optimizer('adamw', args), or lorapre_optimizer('adamw', lr=…)"
        )
    if (_read(optimizer, args) | overrides).get("lr") is None:
        raise ValueError(
            "no learning rate: Trainer does not pass its own on, so call lorapre_optimizer('adamw', args) with the "
            "trainer's arguments, or give lr=…"
        )
    if args is not None:
        check_arguments(args, bool(overrides.get("update_in_backward")))
    return OptimizerFactory(args), {"optimizer": optimizer, **overrides}


def _read(optimizer: str, args: TrainingArguments | None) -> dict[str, Any]:
    """Return the options of `create_lorapre_optimizer` from the training arguments as they are now."""
    options: dict[str, Any] = {"optimizer": optimizer}
    if args is None:
        return options
    prefix = "" if optimizer == "adamw" else "adamw_"
    options |= {"lr": args.learning_rate, "weight_decay": args.weight_decay, f"{prefix}eps": args.adam_epsilon}
    defaults = {name: type(args).__dataclass_fields__[name].default for name in ("adam_beta1", "adam_beta2")}
    if any(getattr(args, name) != default for name, default in defaults.items()):
        own = inspect.signature(OPTIMIZERS[optimizer]).parameters[f"{prefix}betas"].default
        betas = (
            getattr(args, name) if getattr(args, name) != defaults[name] else own[i] for i, name in enumerate(defaults)
        )
        options[f"{prefix}betas"] = tuple(betas)
    return options


def check_arguments(args: TrainingArguments, update_in_backward: bool) -> None:
    """Raise ValueError for training arguments under which the optimizer could not work as documented."""
    if args.deepspeed:
        raise ValueError(
            f"deepspeed={args.deepspeed!r}: LoRA-Pre needs rows and columns, and DeepSpeed hands the optimizer "
            "flattened shards. Use FSDP2, DDP or one process"
        )
    plugin = getattr(args, "fsdp_plugin_args", None) or {}  # Older versions of transformers lack it.
    if plugin.get("fsdp_version", 2) != 2:
        raise ValueError(
            f"fsdp_config version {plugin['fsdp_version']}: LoRA-Pre needs rows and columns, and FSDP1 hands the "
            "optimizer flattened shards. Use FSDP2 (fsdp_config={'version': 2}), DDP or one process"
        )
    if args.optim_args:
        warnings.warn(
            f"optim_args={args.optim_args!r} is not read, as Trainer does not pass it on: give the options to "
            "lorapre_optimizer",
            stacklevel=3,
        )
    optim = getattr(args.optim, "value", args.optim)
    if not str(optim).startswith("adamw_torch"):  # Trainer's default is one of these, and some tools' is another.
        warnings.warn(f"optim={optim!r} has no effect beside lorapre_optimizer", stacklevel=3)
    if args.optim_target_modules:
        warnings.warn(
            f"optim_target_modules={args.optim_target_modules!r} has no effect beside lorapre_optimizer: give it "
            "target_modules",
            stacklevel=3,
        )
    if not update_in_backward:
        return
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} with update_in_backward=True: the first "
            "gradients are used and freed before the next ones come. Use gradient_accumulation_steps=1 with a larger "
            "per_device_train_batch_size, or update_in_backward=False"
        )
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm} with update_in_backward=True: the norm of all gradients is not known "
            "while they are used one by one. Use max_grad_norm=0, and max_param_grad_norm=… in lorapre_optimizer to "
            "clip each matrix by its own norm"
        )
    if args.fp16:
        raise ValueError(
            "fp16=True with update_in_backward=True: gradients are still scaled when they are used. Use bf16=True"
        )


class OptimizerFactory:
    """Builds the optimizer. Trainer calls what is not an Optimizer class as factory()(model, **kwargs)."""

    def __init__(self, args: TrainingArguments | None) -> None:
        self.args = args

    def __call__(self) -> Callable[..., LoRAPreOptimizer]:
        return self.build

    def build(self, model: nn.Module, *, optimizer: str, **overrides: Any) -> LoRAPreOptimizer:
        """Build the optimizer for the model as it will be trained, which Trainer may just have loaded."""
        checkpoint = resumed_from()
        if checkpoint is not None:
            complete_loaded(model, checkpoint)
        return create_lorapre_optimizer(model, **(_read(optimizer, self.args) | overrides))

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError, also for what Trainer reads from a finished optimizer in ``optimizers``."""
        raise AttributeError(
            f"what lorapre_optimizer returns is no optimizer yet, and has no {name!r}: give it to the trainer as "
            "optimizer_cls_and_kwargs=lorapre_optimizer('adamw', args), not as optimizers"
        )
