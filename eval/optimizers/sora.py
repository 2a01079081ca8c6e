"""SoRA: a gate for each of LoRA's ranks, driven to zero by a proximal step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .pairs import lora_layers


class RankGate(nn.Module):
    """B diag(g) in the place of B (p×r): B (g ∘ A x) as a parametrization, so that merging and saving see the product.

    The gate starts from N(0, 1), as the authors' does.
    """

    def __init__(self, rank: int):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(rank))

    def forward(self, B: Tensor) -> Tensor:
        return B * self.gate.to(B)


def add_gates(model: nn.Module) -> None:
    """Put a `RankGate` into every LoRA layer."""
    for _, _, B in lora_layers(model):
        parametrize.register_parametrization(B, "weight", RankGate(B.in_features).to(B.weight.device))


def gates(model: nn.Module) -> list[Tensor]:
    """The gates of `add_gates`."""
    return [module.gate for module in model.modules() if isinstance(module, RankGate)]


class ProximalAdamW(torch.optim.AdamW):
    """AdamW, then the proximal step of an L1 norm: groups with a ``threshold`` ξ move ξ towards zero and stop there.

    The sparsifying optimizer of SoRA (Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv
    2311.11696), for its gates; the weight of a rank whose gate is zero has no gradient, and stays pruned as long as
    Adam's step of the gate is below ξ. The authors' runs add the L1 norm to the loss besides, with a weight that
    differs by task; this row has the proximal step alone.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"] if "threshold" in group else ():
                param.copy_(nn.functional.softshrink(param, group["threshold"]))
        return loss
