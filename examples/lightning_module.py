r"""This module uses LoRA-Pre in Lightning, from `configure_optimizers` or by a class path in LightningCLI.

    python -m examples.lightning_module fit --trainer.max_epochs 1
    python -m examples.lightning_module fit --trainer.max_epochs 1 --optimizer lorapre_peft.LoRAPreAdamW \
        --optimizer.momentum_rank 2

It needs ``pip install lightning 'jsonargparse[signatures]'``. The second command gives the optimizer bare parameters,
and does not use the module's own `configure_optimizers`.
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
    """Trains a LoRA adapter on a small Llama.

    Args:
        lr: learning rate of `configure_optimizers`.
        steps: number of batches in an epoch.
    """

    def __init__(self, lr: float = 5e-3, steps: int = 60):
        super().__init__()
        self.lr, self.steps = lr, steps
        config = LoRAPreConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
        self.model = get_peft_model(build_model(), config)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return LoRA-Pre's AdamW and a cosine schedule over one epoch, for Lightning."""
        optimizer = create_lorapre_optimizer(self.model, "adamw", lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return the batches of an epoch."""
        return torch.utils.data.DataLoader(list(batches(self.steps)), batch_size=None)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Return the loss of a batch, and log it."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss


if __name__ == "__main__":
    LightningCLI(Adapter, save_config_callback=None)
