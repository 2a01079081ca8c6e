"""This module holds what the tests of adapters share: models, a training loop, and functions that read its results."""

import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from torch import nn

from lorapre_peft import LoRAPreConfig


def adapted(model, config_class=LoRAPreConfig, **options) -> PeftModel:
    """Put a LoRA adapter of rank 8 on all linear layers into the model. ``options`` override its configuration."""
    return get_peft_model(model, config_class(**({"r": 8, "target_modules": "all-linear"} | options)))


def train(optimizer, loss_of, steps=6) -> list[float]:
    """Train for some steps on the loss that ``loss_of()`` returns, and return the loss of each step."""
    losses = []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model, batch) -> torch.Tensor:
    """Return the model's logits [sequences, tokens, vocabulary] on a batch, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


def ranks_by_name(optimizer) -> dict[str, int]:
    """Return by name the momentum rank that each parameter's state has, which is 0 on the AdamW path.

    The optimizer must have made a step.
    """
    names = {p: name for g in optimizer.param_groups for p, name in zip(g["params"], g["param_names"])}
    return {
        name: state["m_A"].shape[0] if "m_A" in state else 0
        for p, name in names.items()
        for state in [optimizer.state[p]]
    }


def trainable(model) -> dict[str, torch.Tensor]:
    """Return copies of the trainable parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class ConvNet(nn.Module):
    """Implements a small classifier of images with two convolutions, a norm and a linear head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 16, 3)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        """Return the scores [n, 5] of images [n, 3, height, width]."""
        return self.head(self.norm(self.second(self.first(x).relu()).relu().mean((-2, -1))))
