"""This module implements the AdamW path: the step of `torch.optim.AdamW` for parameters that are not compressed.

The step works in pieces of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..lowrank.batch import gradient_scale, rounds_stochastically
from ..lowrank.layout import Member, slices, tile_entries
from ..lowrank.rounding import random_keys, write_stochastic
from ..lowrank.sharding import Placement, local


class AdamWOptions(NamedTuple):
    """Holds the hyperparameters of a group's AdamW path, at its current learning rate."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float


@dataclass(eq=False)
class Item:
    """Holds a parameter with its gradient; where it is sharded, this process's rows of both.

    norm: ‖g‖_F, [] float64. update: [] bool, false if the parameter keeps its value; None if the host already knows
        that it does not.
    """

    member: Member
    grad: Tensor
    state: dict[str, Tensor]
    norm: Tensor
    update: Tensor | None
    placement: Placement

    def __post_init__(self) -> None:
        self.param = local(self.member.param)
        self.state = {name: local(value) for name, value in self.state.items()}

    def first_entry(self, index: Any) -> int:
        """Return how many entries of the whole parameter come before the rows ``index`` of this process's part."""
        shape = self.param.shape
        if not shape:
            return 0
        return (self.placement.rows(self.member.param.shape[0]).start + index.start) * shape[1:].numel()


def adamw_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of the moments and of the arithmetic: float32, or float64 for float64 parameters."""
    return torch.promote_types(param.dtype, torch.float32)


def adamw_path(group: dict[str, Any], options: AdamWOptions, items: list[Item]) -> None:
    """Take one AdamW step with these parameters of one group, in place, through torch's functional AdamW."""
    limit = tile_entries(group, items[0].param.device)
    pieces: list[tuple[Item, Any]] = []
    size = 0
    for piece in _pieces(items, limit):
        count = piece[0].param[piece[1]].numel()
        if pieces and size + count > limit:
            _step(group, options, pieces)
            pieces, size = [], 0
        pieces.append(piece)
        size += count
    if pieces:  # A process may hold no row of any of them.
        _step(group, options, pieces)
    for item in items:
        item.state["step"] += 1 if item.update is None else item.update


def _pieces(items: list[Item], limit: int) -> Iterator[tuple[Item, Any]]:
    """Yield (item, index of a piece): blocks of rows of at most ``limit`` entries, and each scalar as a whole."""
    for item in items:
        shape = item.param.shape
        rows = limit // max(1, shape[1:].numel())
        yield from ((item, index) for index in slices(shape[0], rows)) if shape else [(item, ...)]


def _step(group: dict[str, Any], options: AdamWOptions, pieces: list[tuple[Item, Any]]) -> None:
    # Torch's fused AdamW skips either all tensors of a call or none. A parameter that is not contiguous may be the
    # transpose of another one, as in PEFT's tied adapters, and copies of both would lose one's update.
    together: list[tuple[Item, Any]] = []
    alone: list[tuple[Item, Any]] = []
    for piece in pieces:
        (together if piece[0].update is None and piece[0].param.is_contiguous() else alone).append(piece)
    if together:
        _adamw(group, options, together, None)
    for piece in alone:
        _adamw(group, options, [piece], piece[0].update)


def _adamw(
    group: dict[str, Any], options: AdamWOptions, pieces: list[tuple[Item, Any]], update: Tensor | None
) -> None:
    targets = [item.param[index] for item, index in pieces]
    # These are contiguous like the moments, as the fused kernel only takes tensors of equal strides.
    wide = [target.to(adamw_dtype(target)).contiguous() for target in targets]
    grads = [item.grad[index].to(adamw_dtype(item.param)).contiguous() for item, index in pieces]
    bound = group["max_param_grad_norm"]
    if bound is not None:
        norms = torch.stack([item.norm for item, _ in pieces])
        scales = cast(Tensor, gradient_scale(norms, torch.full_like(norms, bound), None)).float().to(wide[0].device)
        grads = [grad * scale for grad, scale in zip(grads, scales)]
    means, squares = ([item.state[name][index] for item, index in pieces] for name in ("exp_avg", "exp_avg_sq"))
    on_gpu = wide[0].device.type == "cuda"
    masked = [] if update is None or on_gpu else [*wide, *means, *squares]  # Unfused AdamW takes no found_inf.
    kept = [value.clone() for value in masked]
    adamw(
        wide,
        grads,
        means,
        squares,
        [],
        [item.state["step"].clone() for item, _ in pieces],  # adamw increments it, once for each piece.
        fused=on_gpu,
        found_inf=(~update).float() if update is not None and on_gpu else None,
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=options.lr if on_gpu else float(options.lr),
        weight_decay=group["weight_decay"],
        eps=options.eps,
        maximize=group["maximize"],
    )
    for value, before in zip(masked, kept):
        value.copy_(torch.where(cast(Tensor, update), value, before))
    for (item, index), target, value in zip(pieces, targets, wide):
        if rounds_stochastically(target, group):
            step = item.state["step"][None].to(target.device) + 1
            keys = random_keys(((group["seed"], item.member.position),), step)
            write_stochastic([target], value[None], keys, item.first_entry(index))
        elif value is not target:
            target.copy_(value)
