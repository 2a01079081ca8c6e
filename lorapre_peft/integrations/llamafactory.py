"""This module connects LoRA-Pre to version 1 of LLaMA-Factory. Importing it registers the optimizer ``lorapre``.

Run as a program, it registers the optimizer and hands over to LLaMA-Factory, in one process or under torchrun:

    python -m lorapre_peft.integrations.llamafactory sft config.yaml

The config then has ``optim_config: {name: lorapre, lr: 2.0e-4, momentum_rank: 2}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..optim.base import LoRAPreOptimizer
from .create import create_lorapre_optimizer

try:
    from llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer import OptimizerPlugin
except ModuleNotFoundError:  # Up to release 0.9.5 the module is here.
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin


@OptimizerPlugin("lorapre").register()
def create_optimizer(model: nn.Module, optim_config: Mapping[str, Any]) -> LoRAPreOptimizer:
    """Build the optimizer of LLaMA-Factory's trainers.

    optim_config: ``name``, ``lr`` and further options of `create_lorapre_optimizer`. After release 0.9.5 LLaMA-Factory
    replaces ``lr`` by its ``learning_rate``. Raises ValueError if ``lr`` is missing.
    """
    options = {name: value for name, value in optim_config.items() if name != "name"}
    if "lr" not in options:
        raise ValueError(
            "optim_config has no lr, and LLaMA-Factory 0.9.5 does not hand its learning_rate to optimizers: "
            "write optim_config: {name: lorapre, lr: …}"
        )
    return create_lorapre_optimizer(model, **options)


if __name__ == "__main__":
    from llamafactory.v1.launcher import main

    main()
