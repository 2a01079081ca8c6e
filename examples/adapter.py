"""This module trains a LoRA adapter with LoRA-Pre in a plain loop, saves it, and opens it in plain PEFT.

`python -m examples.adapter` runs it.
"""

from __future__ import annotations

import tempfile

import torch
from peft import PeftModel, get_peft_model

from examples.tiny import batches, build_model
from lorapre_peft import LoRAPreConfig, create_lorapre_optimizer


def main(steps: int = 60) -> list[float]:
    """Train for some steps, and return the loss of each step."""
    # The base has random weights, so its embeddings and head are trained as well. A pretrained base needs no
    # modules_to_save.
    config = LoRAPreConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(build_model(), config)
    optimizer = create_lorapre_optimizer(model, "adamw", lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    losses = []
    for batch in batches(steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        opened = PeftModel.from_pretrained(build_model(), folder)  # Any PEFT opens it, without this package.
    batch = next(batches(1))
    torch.testing.assert_close(opened.eval()(**batch).logits, model.eval()(**batch).logits)
    return losses


if __name__ == "__main__":
    main()
