"""The AdamW path: what is not compressed takes `torch.optim.AdamW`'s own step, in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..lowrank.batch import gradient_scale, rounds_stochastically, slices, tile_entries
from ..lowrank.rounding import random_keys, write_stochastic
from ..lowrank.sharding import Placement, local


class AdamWOptions(NamedTuple):
    """The AdamW path's hyperparameters of a group at this step."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float


class Item(NamedTuple):
    """A parameter with a gradient, of a sharded one this process's part, and its position in the optimizer."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    norm: Tensor  # [], ‖g‖_F
    finite: Tensor | None  # [] bool, false if the update is to be skipped; None: the host knows that it is not
    position: int
    offset: int  # entries of the whole parameter before this part


def make_item(
    param: Tensor,
    position: int,
    state: dict[str, Tensor],
    grad: Tensor,
    norm: Tensor,
    finite: Tensor | None,
    placement: Placement,
) -> Item:
    """Of a parameter that may be sharded, and this process's part of its gradient."""
    offset = placement.rows(param.shape[0]).start * param.shape[1:].numel() if param.ndim else 0
    here = {name: local(value) for name, value in state.items()}
    return Item(local(param), grad, here, norm, finite, position, offset)


def adamw_dtype(param: Tensor) -> torch.dtype:
    """Of the moments and the arithmetic: float32, or float64 for float64 parameters."""
    return torch.promote_types(param.dtype, torch.float32)


def adamw_path(group: dict[str, Any], options: AdamWOptions, items: list[Item]) -> None:
    """One AdamW step of these parameters of one group, in place, through torch's functional AdamW."""
    limit = tile_entries(group)
    batch: list[tuple[Item, Any]] = []
    size = 0
    for piece in _pieces(items, limit):
        count = piece[0].param[piece[1]].numel()
        if batch and size + count > limit:
            _step(group, options, batch)
            batch, size = [], 0
        batch.append(piece)
        size += count
    if batch:  # a process may hold no row of any of them
        _step(group, options, batch)
    for item in items:
        item.state["step"] += 1 if item.finite is None else item.finite


def _pieces(items: list[Item], limit: int) -> Iterator[tuple[Item, Any]]:
    """(item, index of a piece) in blocks of rows of at most ``limit`` entries; scalars whole."""
    for item in items:
        shape = item.param.shape
        rows = max(1, limit // max(1, shape[1:].numel())) if shape else 1
        yield from ((item, index) for index in slices(shape[0], rows)) if shape else [(item, ...)]


def _step(group: dict[str, Any], options: AdamWOptions, batch: list[tuple[Item, Any]]) -> None:
    if batch[0][0].finite is None:
        _adamw(group, options, batch, None)
    else:
        for piece in batch:  # torch's fused AdamW skips all of a call or nothing
            _adamw(group, options, [piece], piece[0].finite)


def _adamw(group: dict[str, Any], options: AdamWOptions, batch: list[tuple[Item, Any]], finite: Tensor | None) -> None:
    targets = [item.param[index] for item, index in batch]
    # Contiguous like the moments: the fused kernel takes tensors of equal strides only.
    wide = [target.to(adamw_dtype(target)).contiguous() for target in targets]
    grads = [item.grad[index].to(adamw_dtype(item.param)).contiguous() for item, index in batch]
    if group["max_param_grad_norm"] is not None:
        norms = torch.stack([item.norm for item, _ in batch])
        scales = gradient_scale(norms, {**group, "maximize": False}).to(wide[0].device)
        grads = [grad * scale for grad, scale in zip(grads, scales)]
    moments = [[item.state[name][index] for item, index in batch] for name in ("exp_avg", "exp_avg_sq")]
    on_gpu = wide[0].device.type == "cuda"
    masked = [] if finite is None or on_gpu else [*wide, *moments[0], *moments[1]]  # unfused, AdamW knows no found_inf
    kept = [value.clone() for value in masked]
    adamw(
        wide,
        grads,
        *moments,
        [],
        [item.state["step"].clone() for item, _ in batch],  # adamw counts it up, once per piece
        fused=on_gpu,
        found_inf=(~finite).float() if finite is not None and on_gpu else None,
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=options.lr if on_gpu else float(options.lr),
        weight_decay=group["weight_decay"],
        eps=options.eps,
        maximize=group["maximize"],
    )
    for value, before in zip(masked, kept):
        value.copy_(torch.where(finite, value, before))
    for (item, index), target, value in zip(batch, targets, wide):
        if rounds_stochastically(target, group):
            start = item.offset + (index.start * item.param.shape[1:].numel() if isinstance(index, slice) else 0)
            keys = random_keys(group["seed"], [item.position], item.state["step"][None].to(target.device) + 1)
            write_stochastic([target], value[None], keys, start)
        elif value is not target:
            target.copy_(value)
