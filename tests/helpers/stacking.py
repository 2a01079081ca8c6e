"""This module makes stacks of experts, which hold the matrices of all experts in one tensor."""

import torch
from torch import Tensor, nn

# Each layout has a function that makes one tensor of the experts' matrices [p, q], and the option experts_dim.
LAYOUTS = {
    "3-D": (torch.stack, 0),
    "lora_A": (torch.cat, 0),
    "lora_B": (lambda matrices: torch.stack(matrices, -1).flatten(1), -1),
}


def stacked(layout: str, matrices: list[Tensor]) -> Tensor:
    """Return the matrices [p, q] of all experts in one tensor: [E, p, q], [E · p, q] or [p, q · E]."""
    return LAYOUTS[layout][0](matrices)


def unstacked(layout: str, tensor: Tensor, experts: int) -> list[Tensor]:
    """Return the matrix [p, q] of each expert, by indexing as transformers and PEFT do it."""
    if layout == "3-D":
        return [tensor[e] for e in range(experts)]
    if layout == "lora_A":
        return list(tensor.chunk(experts))
    return [tensor[:, e::experts] for e in range(experts)]


def group(layout: str, param: nn.Parameter, experts: int) -> dict:
    """Return the optimizer's group of one such parameter."""
    return {"params": [param], "experts": experts, "experts_dim": LAYOUTS[layout][1]}
