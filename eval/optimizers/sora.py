"""This module implements SoRA: each of LoRA's ranks has a gate, which a proximal step drives to zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .pairs import lora_layers


class RankGate(nn.Module):
    """Replaces B [p, r] of a LoRA layer by B diag(g), so that the layer computes B (g ∘ A x).

    It is a parametrization, so that merging and saving see the product. The gate g [r] is float32 and is drawn from
    N(0, 1), as in the authors' code.
    """

    def __init__(self, rank: int):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(rank))

    def forward(self, B: Tensor) -> Tensor:
        """Return B diag(g) [p, r] in the dtype of B."""
        return B * self.gate.to(B)


def add_gates(model: nn.Module) -> None:
    """Put a `RankGate` on the matrix B of every LoRA layer of a model."""
    for _, _, B in lora_layers(model):
        parametrize.register_parametrization(B, "weight", RankGate(B.in_features).to(B.weight.device))


def gates(model: nn.Module) -> list[Tensor]:
    """Return the gates [r] that `add_gates` has put into a model."""
    return [module.gate for module in model.modules() if isinstance(module, RankGate)]


class ProximalAdamW(torch.optim.AdamW):
    """Implements AdamW followed by the proximal step of an L1 norm, which is SoRA's sparsifying optimizer.

    In groups with a ``threshold`` ξ, every entry moves by ξ towards zero and stops there. These groups are for the
    gates of SoRA (Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv 2311.11696). A rank
    whose gate is zero has no gradient in A and B, and stays pruned as long as Adam's step of the gate is below ξ. The
    authors' runs also add the L1 norm to the loss, with a weight that differs by task. Here the proximal step is
    alone.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make AdamW's step and then the proximal step, and return the closure's loss, or None without a closure."""
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"] if "threshold" in group else ():
                param.copy_(nn.functional.softshrink(param, group["threshold"]))
        return loss
