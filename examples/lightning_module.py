r"""LoRA-Pre in Lightning: from a module's own `configure_optimizers`, or by its class path in LightningCLI.

    python -m examples.lightning_module fit --trainer.max_epochs 1
    python -m examples.lightning_module fit --trainer.max_epochs 1 --optimizer lorapre_peft.LoRAPreAdamW \
        --optimizer.momentum_rank 2

Needs ``pip install lightning 'jsonargparse[signatures]'``. The second way hands the optimizer bare parameters, and
replaces the first.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI
from peft import get_peft_model
from torch import Tensor

from examples.tiny import batches, build_model
from lorapre_peft import LoRAPreConfig, create_lorapre_optimizer


class Adapter(LightningModule):
    """A LoRA adapter on a small Llama.

    Args:
        lr: the learning rate of `configure_optimizers`.
        steps: batches in an epoch.
    """

    def __init__(self, lr: float = 5e-3, steps: int = 60):
        super().__init__()
        self.lr, self.steps = lr, steps
        config = LoRAPreConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
        self.model = get_peft_model(build_model(), config)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = create_lorapre_optimizer(self.model, "adamw", lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(list(batches(self.steps)), batch_size=None)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss


if __name__ == "__main__":
    LightningCLI(Adapter, save_config_callback=None)
