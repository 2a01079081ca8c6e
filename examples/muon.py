"""This module trains all attention and MLP weights with LoRA-Pre Muon, and embeddings, head and norms with AdamW.

    python -m examples.muon

One optimizer does both. AdamW is its path for what is not compressed.
"""

from __future__ import annotations

import torch

from examples.tiny import batches, build_model
from lorapre_peft import create_lorapre_optimizer


def main(steps: int = 60) -> list[float]:
    """Train for some steps, and return the loss of each step."""
    model = build_model()
    # With this scale a step of Muon is as long as one of Adam, and its best rates are 2.5 to 10 times Adam's. adamw_lr
    # is the rate of all that is not compressed.
    optimizer = create_lorapre_optimizer(
        model, "muon", lr=1e-2, adjust_lr_fn="match_rms_adamw", adamw_lr=3e-3, embeddings="adamw"
    )
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
    return losses


if __name__ == "__main__":
    main()
