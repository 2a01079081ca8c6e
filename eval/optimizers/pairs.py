"""What optimizers of LoRA's pairs share: which matrices belong together, and the step loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer


def lora_layers(model: nn.Module) -> Iterator[tuple[LoraLayer, nn.Linear, nn.Linear]]:
    """The model's LoRA layers with their A and B, one adapter each; those of linear layers only."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_A:
                yield module, module.lora_A[name], module.lora_B[name]


def lora_pairs(model: nn.Module) -> list[Tensor]:
    """A (r×q) and B (p×r) of every LoRA layer, in turns: A, B, A, B, …"""
    return [linear.weight for _, *pair in lora_layers(model) for linear in pair]


class PairOptimizer(Optimizer, ABC):
    """An optimizer of LoRA's pairs: the parameters of a group are A (r×q) and B (p×r) of one layer after another.

    Raises ValueError for a group whose parameters are not such pairs.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
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
        """One step of a pair, in place."""


def damped_gram(x: Tensor, damping: float) -> Tensor:
    """x xᵀ + damping · I"""
    return x @ x.T + damping * torch.eye(len(x), dtype=x.dtype, device=x.device)
