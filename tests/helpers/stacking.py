"""Stacks of experts as the tests of all layers need them."""

import torch
from torch import Tensor, nn

# layout: (what makes one tensor of the experts' matrices [p, q], experts_dim)
LAYOUTS = {
    "3-D": (torch.stack, 0),
    "lora_A": (torch.cat, 0),
    "lora_B": (lambda matrices: torch.stack(matrices, -1).flatten(1), -1),
}


def stacked(layout: str, matrices: list[Tensor]) -> Tensor:
    """The matrices of all experts in one tensor."""
    return LAYOUTS[layout][0](matrices)


def unstacked(layout: str, tensor: Tensor, experts: int) -> list[Tensor]:
    """The matrix of each expert, by indexing as transformers and PEFT do it."""
    if layout == "3-D":
        return [tensor[e] for e in range(experts)]
    if layout == "lora_A":
        return list(tensor.chunk(experts))
    return [tensor[:, e::experts] for e in range(experts)]


def group(layout: str, param: nn.Parameter, experts: int) -> dict:
    """The optimizer's group of one such parameter."""
    return {"params": [param], "experts": experts, "experts_dim": LAYOUTS[layout][1]}
