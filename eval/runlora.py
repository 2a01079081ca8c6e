"""This module implements RunLoRA (Cherniuk et al., arXiv 2312.03415), which orders LoRA's products by their cost.

The numbers of the forward and backward pass are those of PEFT's layer up to rounding. The time differs, and x Aᵀ is
not kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


@dataclass(frozen=True)
class Order:
    """Holds an order of the products of y = x Wᵀ + s x Aᵀ Bᵀ and of its gradients, for frozen W.

    The paper's other forward and backward passes differ from these 16 only in the sequence of their products.

    Attributes:
        merge: whether x is multiplied by W + s B A, instead of by W, A and B.
        merge_input: the same for the gradient of x.
        outer_A, outer_B: whether the gradients of A and B are computed from the outer product dyᵀ x, which has W's
            shape, instead of from the projections dy B and x Aᵀ.
    """

    merge: bool
    merge_input: bool
    outer_A: bool
    outer_B: bool

    def flops(self, tokens: int, out_features: int, in_features: int, rank: int) -> int:
        """Return the floating-point operations of both passes, where a product of a×b by b×c counts as 2abc."""
        p, q = out_features, in_features
        weight, forward, merged = tokens * p * q, tokens * rank * (p + q), rank * p * q
        total = 2 * weight  # These are x and dy by W, or by what W is merged into.
        total += merged if self.merge else forward
        total += merged if self.merge_input else tokens * rank * q
        total += tokens * rank * p if self.projects_gradient else 0
        total += weight if self.outer_A or self.outer_B else 0
        total += merged if self.outer_A else tokens * rank * q
        total += merged if self.outer_B else forward
        return 2 * total

    @property
    def projects_gradient(self) -> bool:
        """Return whether dy B is needed."""
        return not (self.merge_input and self.outer_A)


ORDERS = [Order(*choice) for choice in product((False, True), repeat=4)]


def cheapest(tokens: int, out_features: int, in_features: int, rank: int) -> Order:
    """Return the order with the fewest operations, for the sizes that `Order.flops` takes."""
    return min(ORDERS, key=lambda order: order.flops(tokens, out_features, in_features, rank))


class LoRAProduct(torch.autograd.Function):
    """Computes y = x Wᵀ + s x Aᵀ Bᵀ and its gradients by a given order.

    x is [tokens, q], W [p, q] and frozen, A [r, q] and B [p, r].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, scaling: float, order: Order) -> Tensor:
        """Return y [tokens, p]. scaling: s."""
        ctx.save_for_backward(x, W, A, B)
        ctx.scaling, ctx.order = scaling, order
        if order.merge:
            return x @ W.addmm(B, A, alpha=scaling).T
        return (x @ W.T).addmm_(x @ A.T, B.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B from dy [tokens, p], and None for the other arguments."""
        x, W, A, B = ctx.saved_tensors
        scaling, order = ctx.scaling, ctx.order
        projected = dy @ B if order.projects_gradient else None
        outer = dy.T @ x if order.outer_A or order.outer_B else None
        dA = B.T @ outer if order.outer_A else projected.T @ x
        dB = outer @ A.T if order.outer_B else dy.T @ (x @ A.T)
        weight = W.addmm(B, A, alpha=scaling) if order.merge_input else W
        dx = dy @ weight
        if not order.merge_input:
            dx.addmm_(projected, A, alpha=scaling)
        return dx, None, dA.mul_(scaling), dB.mul_(scaling), None, None


class RunLoRALinear(nn.Module):
    """Computes PEFT's LoRA layer with the cheapest order for each input, and shares the layer's parameters.

    Raises:
        ValueError: the layer or its adapter has a bias, or it has dropout or another adapter than a single plain one.
    """

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        (name, *others) = layer.lora_A
        plain = not others and isinstance(layer.lora_dropout[name], nn.Identity) and not layer.lora_variant
        if not plain or layer.get_base_layer().bias is not None or layer.lora_B[name].bias is not None:
            raise ValueError(
                f"found {layer}; expected a layer without bias, under one plain adapter without bias or dropout"
            )
        self.weight, self.A, self.B = (
            layer.get_base_layer().weight,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
        )
        self.scaling = layer.scaling[name]

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., p] of an input x [..., q]."""
        rows = x.flatten(0, -2)
        order = cheapest(len(rows), *self.weight.shape, len(self.A))
        y = LoRAProduct.apply(rows, self.weight, self.A, self.B, self.scaling, order)
        return y.view(*x.shape[:-1], -1)
