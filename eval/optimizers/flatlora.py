"""This module implements Flat-LoRA, which trains under random perturbations of the merged weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim import Optimizer

from .pairs import lora_layers


class FilterNoise:
    """Adds noise to the base weight of a LoRA layer during the forward and backward passes of a training step.

    As in Flat-LoRA (Li et al., "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape", arXiv 2409.14396), row i
    of the merged weight M = W + s B A (p×q) is disturbed by N(0, σ_i²) with σ_i = ρ_t ‖M_i‖/√q, and ρ_t rises from 0
    to ρ as ρ (1 − cos(π t/T))/2. All forward and backward passes of a step see the same noise. The weight itself is
    kept aside, so that afterwards it is the same in every bit. The authors make the noise twice from a seed instead,
    which saves the copy but rounds the weight.

    Args:
        layer: LoRA layer of a linear layer.
        rho: ρ, which is 0.05 to 0.1 in the paper.
        steps: number T of optimizer steps of the whole run.
    """

    def __init__(self, layer: LoraLayer, rho: float, steps: int):
        self._layer, self._rho, self._steps = layer, rho, steps
        self._step = 0
        self._kept: torch.Tensor | None = None
        layer.register_forward_pre_hook(self._add)

    @torch.no_grad()
    def _add(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if not layer.training or self._kept is not None:
            return
        weight = layer.get_base_layer().weight
        merged = weight + sum(layer.get_delta_weight(name) for name in layer.lora_A)
        size = self._rho * (1 - math.cos(math.pi * self._step / self._steps)) / 2
        deviation = size * merged.float().norm(dim=1, keepdim=True) / weight.shape[1] ** 0.5
        self._kept = weight.data
        weight.data = weight.data + (deviation * torch.randn(weight.shape, device=weight.device)).to(weight.dtype)

    def remove(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Restore the weight and count a step, if there is noise. This is a step pre-hook of ``optimizer``."""
        if self._kept is not None:
            self._layer.get_base_layer().weight.data = self._kept
            self._kept = None
            self._step += 1


def perturb(model: nn.Module, optimizer: Optimizer, rho: float, steps: int) -> Optimizer:
    """Put `FilterNoise` on every LoRA layer of the model, and return the optimizer, whose steps remove it first.

    rho, steps: as in `FilterNoise`.
    """
    for layer, _, _ in lora_layers(model):
        optimizer.register_step_pre_hook(FilterNoise(layer, rho, steps).remove)
    return optimizer
