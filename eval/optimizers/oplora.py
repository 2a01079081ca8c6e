"""This module implements OPLoRA, which brings the full gradient step back to rank r by alternating least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from .pairs import damped_gram, lora_layers, lora_pairs

# The authors' code adds this to each Gram matrix, which is singular where B = 0. Here it is the least damping.
LEAST_DAMPING = 1e-6


class FullGradient:
    """Sums the gradient G [p, q] of a LoRA layer's merged weight W + s B A over backward passes, until it is taken.

    Hooks on the layer watch its forward and backward passes in training. G is float32, or float64 for float64 layers.
    """

    def __init__(self, layer: LoraLayer):
        self._sum: Tensor | None = None
        layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if layer.training and output.requires_grad:
            inputs = args[0].detach()
            output.register_hook(lambda gradient: self._add(inputs, gradient))

    def _add(self, inputs: Tensor, gradient: Tensor) -> None:
        gradient, inputs = (
            x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32)) for x in (gradient, inputs)
        )
        found = gradient.T @ inputs
        self._sum = found if self._sum is None else self._sum + found

    def take(self) -> Tensor | None:
        """Return the sum [p, q] and start a new one. Return None if there was no backward pass."""
        found, self._sum = self._sum, None
        return found


def nearest(target: Tensor, A: Tensor, B: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return A and B after one round of alternating least squares on the target T [p, q].

    The new A [r, q] minimises ‖B A − T‖² + damping ‖its change‖². Then the new B [p, r] does so with the new A.
    """
    new_A = torch.linalg.solve(damped_gram(B.T, damping), damping * A + B.T @ target)
    new_B = torch.linalg.solve(damped_gram(new_A, damping), damping * B.T + new_A @ target.T).T
    return new_A, new_B


class OPLoRA(Optimizer):
    """Implements OPLoRA with momentum (Almansoori et al., "Faster Than SVD, Smarter Than SGD", September 2025).

    A step of gradient descent with momentum on the full weight would take the adapter's B A to
    T = B A − (lr/s) (G + β M), where s is the adapter's scaling. OPLoRA takes it to a matrix of rank r near T, by one
    round of alternating least squares from where it is (`nearest`; LoRSum in arXiv 2602.16456). Another such round
    holds the new momentum β M + G at rank r. G [p, q] comes from hooks on the layers. The state is r (p + q) numbers,
    and from the backward pass to the step also G. The authors hold the layers' inputs and output gradients in its
    place.

    The norm of all G together is clipped, as in the authors' code. `torch.nn.utils.clip_grad_norm_` does nothing here,
    because it sees the gradients of A and B only.

    Args:
        model: model with one LoRA adapter, of linear layers.
        lr: learning rate, as of gradient descent on the weights.
        momentum: decay β of the momentum.
        damping: δ of the damping lr · δ in `nearest`, as in the authors' code. The damping is at least
            `LEAST_DAMPING`.
        max_grad_norm: largest norm of all G together. 0 stands for no clipping, as in Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-2,
        max_grad_norm: float = 0.0,
    ):
        layers = [layer for layer, _, _ in lora_layers(model)]
        self.gradients = [FullGradient(layer) for layer in layers]
        self.scalings = [scaling for layer in layers for scaling in layer.scaling.values()]
        defaults = dict(lr=lr, momentum=momentum, damping=damping, max_grad_norm=max_grad_norm)
        super().__init__(lora_pairs(model), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update A and B of every layer that had a backward pass, and return the closure's loss or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        damping, beta = max(group["lr"] * group["damping"], LEAST_DAMPING), group["momentum"]
        gradients = [watched.take() for watched in self.gradients]
        if group["max_grad_norm"]:
            known = [gradient for gradient in gradients if gradient is not None]
            share = (group["max_grad_norm"] / (get_total_norm(known) + 1e-6)).clamp(max=1.0)
            for gradient in known:
                gradient *= share
        for gradient, scaling, A, B in zip(gradients, self.scalings, group["params"][::2], group["params"][1::2]):
            if gradient is None:
                continue
            state = self.state[A]
            if not state:  # A first gradient can be fitted from this start.
                generator = torch.Generator().manual_seed(0)
                state["A"] = torch.randn(A.shape, generator=generator).to(gradient)
                state["B"] = torch.zeros_like(B, dtype=gradient.dtype)
            momentum = beta * state["B"] @ state["A"]
            full = B.to(gradient) @ A.to(gradient) - group["lr"] / scaling * (gradient + momentum)
            for factor, found in zip((A, B), nearest(full, A.to(gradient), B.to(gradient), damping)):
                factor.copy_(found)
            state["A"], state["B"] = nearest(momentum + gradient, state["A"], state["B"], damping)
        return loss
