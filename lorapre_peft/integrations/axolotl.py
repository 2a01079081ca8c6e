"""This module is a plugin that brings LoRA-Pre to axolotl. It is named in axolotl's config:

    plugins:
      - lorapre_peft.integrations.axolotl.LoRAPrePlugin
    lorapre:
      momentum_rank: 2

The keys under ``lorapre`` are those of `lorapre_optimizer`. This module imports axolotl.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, field_validator
from torch import nn
from transformers import Trainer

from ..optim.base import LoRAPreOptimizer
from .callback import LoRAPreCallback
from .create import OPTIMIZERS, option_names
from .trainer import lorapre_optimizer

# These keys of axolotl's config choose another optimizer or its rates. A LoRA-Pre optimizer would not read them.
IGNORED_KEYS = ("optim_args", "lr_groups", "embedding_lr", "embedding_lr_scale", "loraplus_lr_ratio")


class LoRAPreArgs(BaseModel):
    """Describes the key that the plugin adds to axolotl's config. axolotl merges this model into its own."""

    model_config = ConfigDict(extra="ignore")
    lorapre: dict[str, Any] = {}

    @field_validator("lorapre")
    @classmethod
    def check_names(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Refuse an unknown option before any model is loaded. Values are checked when the optimizer is built."""
        optimizer = options.get("optimizer", "adamw")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r}: expected one of {', '.join(map(repr, OPTIMIZERS))}")
        known = option_names(optimizer) | {"optimizer"}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
        return options


class LoRAPrePlugin(BasePlugin):
    """Trains with LoRA-Pre what the config trains: the adapter's matrices or, without an adapter, the weights.

    Learning rate, weight decay, epsilon and betas are read from axolotl's own keys, as `lorapre_optimizer` reads them
    from any trainer's arguments. A key under ``lorapre`` takes precedence over them.

    axolotl declares a plugin hook that creates the optimizer, but never calls it (as of version 0.19.0). The optimizer
    is therefore set on the trainer once that exists.
    """

    def get_input_args(self) -> str:
        """Return the dotted path of the config model, from which axolotl imports it."""
        return f"{__name__}.{LoRAPreArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Make the trainer build a LoRA-Pre optimizer and log its figures.

        Raises ValueError if the config asks for another optimizer, or for an option that only other optimizers read.
        """
        given = [name for name in IGNORED_KEYS if cfg.get(name) is not None]
        if given:
            raise ValueError(
                f"the config sets {', '.join(given)}, which LoRAPrePlugin does not read: remove them, and give the "
                "optimizer's options under lorapre"
            )
        optimizer = cfg.get("optimizer") or "adamw"
        optimizer = getattr(optimizer, "value", optimizer)  # axolotl keeps some names as members of an Enum.
        if trainer.optimizer_cls_and_kwargs is not None or not optimizer.startswith("adamw"):
            raise ValueError(
                f"optimizer: {optimizer} beside LoRAPrePlugin: only one of them can train. Remove the key (and write "
                "lorapre: {optimizer: muon} for LoRA-Pre's Muon), or remove the plugin"
            )
        factory, options = lorapre_optimizer(args=trainer.args, **_plain(cfg.get("lorapre") or {}))
        made: Any = (_with_arguments(factory), options)
        trainer.optimizer_cls_and_kwargs = made
        LoRAPreCallback.attach(trainer)


def _with_arguments(factory: Callable[[], Callable[..., LoRAPreOptimizer]]) -> Callable[[], Callable[..., Any]]:
    """Return a factory whose product can be called as by Trainer, or as by axolotl, with arguments after the model."""

    def product(model: nn.Module, _: Any = None, /, **options: Any) -> LoRAPreOptimizer:
        return factory()(model, **options)

    return lambda: product


def _plain(value: Any) -> Any:
    """Return axolotl's nested config objects as plain dictionaries and lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
