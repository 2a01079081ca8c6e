"""This module makes the table that `create_lorapre_optimizer` prints: what is compressed, and what that saves."""

from __future__ import annotations

import math

from torch import Tensor

from ..optim.base import LoRAPreOptimizer


def state_table(optimizer: LoRAPreOptimizer, frozen: dict[str, list[Tensor]]) -> str:
    """Return the table as text: what is compressed, what is not, and the state's size beside AdamW's in float32.

    frozen: parameters that are not trained, by the label of their row in the table.
    """
    rows: dict[str, list[int]] = {}  # tensors, parameters, state bytes, AdamW's state bytes
    for group in optimizer.param_groups:
        for param in group["params"]:
            ranks = optimizer.ranks(param, group)
            kind = "compressed" if group["experts"] is None else f"{group['experts']} experts each"
            label = f"{kind}, k={','.join(map(str, ranks))}, {group['update_rule']}" if ranks else "AdamW path"
            row = rows.setdefault(label, [0, 0, 0, 0])
            counts = (1, param.numel(), optimizer.param_state_bytes(param, group), adamw_state_bytes(param))
            row[:] = [total + count for total, count in zip(row, counts)]
    order = sorted(rows, key=lambda name: (name == "AdamW path", name))
    if len(order) > 1:
        rows["trained"] = [sum(column) for column in zip(*rows.values())]
        order.append("trained")
    lines = [f"{type(optimizer).__name__:28}{'tensors':>9}{'parameters':>16}{'state':>12}{'AdamW, fp32':>14}"]
    for name in order:
        tensors, parameters, state, adamw = rows[name]
        lines.append(f"{name:28}{tensors:>9,}{parameters:>16,}{format_bytes(state):>12}{format_bytes(adamw):>14}")
    for name, params in frozen.items():
        lines.append(f"{name:28}{len(params):>9,}{sum(p.numel() for p in params):>16,}{'–':>12}{'–':>14}")
    return "\n".join(lines)


def adamw_state_bytes(param: Tensor) -> int:
    """Return the bytes of AdamW's two float32 moments and of its step count for a parameter."""
    return 2 * 4 * math.prod(param.shape) + 4


def format_bytes(count: float) -> str:
    """Return a number of bytes as text in decimal units, as memory figures of models are given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
