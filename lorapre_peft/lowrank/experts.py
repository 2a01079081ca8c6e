"""This module handles stacks of experts: parameters that hold a matrix for each expert of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Stack(NamedTuple):
    """Describes how one parameter holds the p×q matrices of several experts.

    With dim = 0 the experts lie one after the other, as [experts, p, q] (transformers' mixtures) or [experts · p, q]
    (PEFT's ``lora_A`` of ``target_parameters``). With dim = −1 they are interleaved along the last dimension, as
    [p, q · experts], where column j · experts + e is column j of expert e (PEFT's ``lora_B``).
    """

    experts: int
    dim: int

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the shape (p, q) of one expert, from the shape of the whole parameter."""
        if self.dim == 0:
            return (shape[1], shape[2]) if len(shape) == 3 else (shape[0] // self.experts, shape[1])
        return shape[0], shape[1] // self.experts

    def matrices(self, tensor: Tensor, p: int) -> Tensor:
        """Return the experts' matrices in a parameter, a gradient or a part of either: a view [experts, p, q]."""
        if self.dim == 0:
            return tensor if tensor.ndim == 3 else tensor.unflatten(0, (len(tensor) // p, p))
        return tensor.unflatten(1, (tensor.shape[1] // self.experts, self.experts)).movedim(-1, 0)

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether a parameter of this shape holds such a stack."""
        if self.dim == 0 and len(shape) == 3:
            return shape[0] == self.experts
        return len(shape) == 2 and shape[self.dim] % self.experts == 0


def stack_of(group: dict[str, Any]) -> Stack | None:
    """Return how the parameters of a group hold experts, or None if each parameter is one matrix."""
    experts = group.get("experts")
    return None if experts is None else Stack(experts, group["experts_dim"])
