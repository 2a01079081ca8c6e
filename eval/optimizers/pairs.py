"""This module finds the pairs of LoRA's matrices A and B in a model, and holds the step loop of their optimizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer


def lora_layers(model: nn.Module) -> Iterator[tuple[LoraLayer, nn.Linear, nn.Linear]]:
    """Yield (layer, A, B) for each LoRA layer of a model and each adapter in it.

    The optimizers here expect one adapter, on linear layers. LoRA layers of embeddings are left out.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_A:
                yield module, module.lora_A[name], module.lora_B[name]


def lora_pairs(model: nn.Module) -> list[Tensor]:
    """Return the weights A [r, q] and B [p, r] of every LoRA layer in turns: A, B, A, B, …"""
    return [linear.weight for _, *pair in lora_layers(model) for linear in pair]


class PairOptimizer(Optimizer, ABC):
    """Takes steps of LoRA's pairs. A group's parameters are A [r, q] and B [p, r] of one layer after another.

    A subclass says what the step of a pair is (`step_pair`).

    Raises:
        ValueError: a group whose parameters are not such pairs.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of pairs. Raise ValueError if the shapes are not those of pairs."""
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        shapes = [tuple(param.shape) for param in params]
        if len(params) % 2 or any(
            len(A) != 2 or len(B) != 2 or A[0] != B[1] for A, B in zip(shapes[::2], shapes[1::2])
        ):
            raise ValueError(
                f"{type(self).__name__} got parameters of shapes {shapes[:4]}…; expected LoRA's A (r×q) and B (p×r) "
                "in turns, as lora_pairs(model) has them"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every pair that has both gradients, and return the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for A, B in zip(group["params"][::2], group["params"][1::2]):
                if A.grad is not None and B.grad is not None:
                    self.step_pair(A, B, group)
        return loss

    @abstractmethod
    def step_pair(self, A: Tensor, B: Tensor, group: dict[str, Any]) -> None:
        """Update A and B in place, by their gradients ``A.grad`` and ``B.grad``. group: options of the pair."""


def damped_gram(x: Tensor, damping: float) -> Tensor:
    """Return x xᵀ + damping · I of a matrix x [k, d]: [k, k]."""
    return x @ x.T + damping * torch.eye(len(x), dtype=x.dtype, device=x.device)
