"""Train all attention and MLP weights in bfloat16, each updated as soon as the backward pass has made its gradient.

    python -m examples.full_weights

No gradient outlives its own update, so the gradients of the whole model never exist at once. bfloat16 weights are
written with stochastic rounding, which is the default for full weights.
"""

from __future__ import annotations

import torch

from examples.tiny import batches, build_model
from lorapre_peft import create_lorapre_optimizer


def main(steps: int = 60) -> list[float]:
    """Train and return the loss of each step."""
    model = build_model().to(torch.bfloat16)
    optimizer = create_lorapre_optimizer(
        model,
        "adamw",
        lr=3e-3,
        embeddings="adamw",  # of a random base; a pretrained model's stay frozen, which is the default
        update_in_backward=True,
        max_param_grad_norm=1.0,  # the norm of all gradients is never known here: each matrix is clipped by its own
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    losses = []
    for batch in batches(steps):
        loss = model(**batch).loss
        loss.backward()  # the weights are updated in here
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()  # closes the step
        schedule.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main()
