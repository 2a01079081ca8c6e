"""This module trains a LoRA adapter with LoRA-Pre in a loop of accelerate.

    accelerate launch -m examples.accelerate_loop        # or: python -m examples.accelerate_loop

The loop has gradient accumulation, clipping and a schedule. Accelerate's launch options choose mixed precision.
`create_lorapre_optimizer` gets the model before `prepare` wraps it.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from peft import get_peft_model

from examples.tiny import batches, build_model
from lorapre_peft import LoRAPreConfig, create_lorapre_optimizer

ACCUMULATE = 2  # These many micro-batches make one optimizer step.


def main(steps: int = 60) -> list[float]:
    """Train, and return the loss of each micro-batch of this process.

    steps: number of micro-batches, which the processes share.
    """
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    config = LoRAPreConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(build_model(), config)
    optimizer = create_lorapre_optimizer(model, "adamw", lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps // ACCUMULATE)
    data = torch.utils.data.DataLoader(list(batches(steps, batch_size=8)), batch_size=None)
    model, optimizer, schedule, data = accelerator.prepare(model, optimizer, schedule, data)

    losses, taken = [], 0
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                taken += 1
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {taken} steps")
    return losses


if __name__ == "__main__":
    main()
