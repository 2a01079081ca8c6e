"""This module trains all attention and MLP weights in bfloat16, and updates each within the backward pass.

    python -m examples.full_weights

A weight is updated as soon as the backward pass has made its gradient, which is freed then. So the gradients of the
whole model never exist at once. bfloat16 weights are written with stochastic rounding, which is the default for full
weights.
"""

from __future__ import annotations

import torch

from examples.tiny import batches, build_model
from lorapre_peft import create_lorapre_optimizer


def main(steps: int = 60) -> list[float]:
    """Train for some steps, and return the loss of each step."""
    model = build_model().to(torch.bfloat16)
    optimizer = create_lorapre_optimizer(
        model,
        "adamw",
        lr=3e-3,
        embeddings="adamw",  # These are random here. Pretrained ones stay frozen by default.
        update_in_backward=True,
        max_param_grad_norm=1.0,  # Each matrix is clipped by its own norm, as that of all is never known.
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    losses = []
    for batch in batches(steps):
        loss = model(**batch).loss
        loss.backward()  # This updates the weights.
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()  # This ends the step.
        schedule.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main()
