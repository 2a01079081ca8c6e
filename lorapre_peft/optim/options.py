"""This module checks options, parameters and gradients. Each of its errors says what to do."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..lowrank.experts import stack_of
from ..lowrank.rules import RULES
from ..lowrank.sharding import is_supported, local, placement_of


def above_zero(name: str, value: Any, otherwise: str = "") -> None:
    """Raise ValueError unless value is a finite number above 0. otherwise: text for what else the option may be."""
    if not 0 < _number(value) < float("inf"):
        raise ValueError(f"{name}={value!r}: expected a number above 0{otherwise}")


def in_range(name: str, value: Any, low: float, high: float | None = None, *, closed: bool = False) -> None:
    """Raise ValueError unless low ≤ value < high (≤ high if ``closed``). There is no upper bound if high is None."""
    expected = f"a number of at least {low}" if high is None else f"a number in [{low}, {high}{']' if closed else ')'}"
    number = _number(value)
    below = high is None or number < high or (closed and number == high)
    if not (low <= number and below and number != float("inf")):  # NaN fails the first comparison.
        raise ValueError(f"{name}={value!r}: expected {expected}")


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in (expected := tuple(choices)):
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, expected))}")


def is_whole(value: Any, low: int) -> bool:
    """Return whether a value is a whole number of at least ``low``; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(value: Any) -> float:
    """Return the value as a float, or NaN, which fails every comparison, if it is not a number.

    A string is not a number here. YAML, for example, reads 2e-4 as a string.
    """
    try:
        return float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return float("nan")


def check_betas(name: str, betas: Any) -> None:
    """Raise ValueError unless ``betas`` is a pair of numbers in [0, 1)."""
    if isinstance(betas, str) or not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"{name}={betas!r}: expected a pair of numbers in [0, 1), such as (0.9, 0.95)")
    for i, beta in enumerate(betas):
        in_range(f"{name}[{i}]", beta, 0, 1)


def without_round_off(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group with |lr| in place of lr, since schedules end just below 0 by round-off."""
    lr = group["lr"]
    return {**group, "lr": abs(lr) if isinstance(lr, (int, float, Tensor)) else lr}


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError for an option that both optimizers have and that is out of its range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; expected a number or a tensor with one element")
    in_range("lr", lr, 0)
    in_range("weight_decay", group["weight_decay"], 0)
    one_of("update_rule", group["update_rule"], RULES)
    check_momentum_rank(group["momentum_rank"])
    check_rule_options(group)
    experts, dim = group.get("experts"), group.get("experts_dim", 0)
    if (experts is not None and not is_whole(experts, 1)) or dim not in (0, -1):
        raise ValueError(
            f"experts={experts!r}, experts_dim={dim!r}: expected the number of experts that each parameter of the "
            "group holds, or None, and 0 (one after the other) or -1 (interleaved along the last dimension)"
        )
    if not is_whole(group["seed"], 0):
        raise ValueError(f"seed={group['seed']!r}: expected a whole number of at least 0")
    above_zero("update_scale", group["update_scale"])
    if group["max_param_grad_norm"] is not None:
        above_zero("max_param_grad_norm", group["max_param_grad_norm"], ", or None for no clipping")
    for name in ("maximize", "update_in_backward"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name}={group[name]!r}: expected True or False")
    if group["bf16_rounding"] not in ("nearest", "stochastic"):
        raise ValueError(f"bf16_rounding={group['bf16_rounding']!r}: expected 'nearest' or 'stochastic'")
    if group["temporary_bytes"] is not None:
        in_range("temporary_bytes", group["temporary_bytes"], 1)


# Schedulers leave these keys in a group.
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_lr", "max_momentum", "base_momentum"}


def warn_of_misspelt(keys: Iterable[str], known: Collection[str], stacklevel: int) -> None:
    """Warn of keys of a group that are no options and look like one. Any others are the user's own, as in torch."""
    for key in set(keys) - set(known) - _OF_SCHEDULERS:
        alike = [name for name in known if name.startswith(f"{key}_") or name.endswith(f"_{key}")]
        if alike := difflib.get_close_matches(key, known, n=1, cutoff=0.8) or alike:
            warnings.warn(
                f"found the key {key!r} in a group of parameters, which is no option and has no effect; alike is "
                f"{alike[0]!r}",
                stacklevel=stacklevel,
            )


def check_momentum_rank(k: Any) -> None:
    """Raise ValueError for a momentum rank that is neither None nor a whole number of at least 0."""
    if k is not None and not is_whole(k, 0):
        raise ValueError(
            f"momentum_rank={k!r}: expected a whole number of at least 1, None for the default, or 0, with which all "
            "of a group takes the AdamW path"
        )


# These options belong to an update rule.
RULE_OPTIONS = ("update_rule", "second_momentum_rank", "residual_weight")


def check_rule_options(options: dict[str, Any]) -> None:
    """Raise ValueError for an option of an update rule that is out of its range, or that the rule does not have."""
    rule, second, rho = RULES[options["update_rule"]], options.get("second_momentum_rank"), options["residual_weight"]
    for name, value in (("second_momentum_rank", second), ("residual_weight", rho)):
        if value is not None and getattr(rule, name) is None:
            raise ValueError(
                f"{name}={value} is an option of update_rule='als', found update_rule={rule.name!r}: leave it out, "
                "or use 'als'"
            )
    if second is not None and not is_whole(second, 1):
        raise ValueError(
            f"second_momentum_rank={second!r}: expected a whole number of at least 1, or None for the rule's default"
        )
    if second is not None and 0 < (options.get("momentum_rank") or 0) < second:
        raise ValueError(
            f"second_momentum_rank={second} is above momentum_rank={options['momentum_rank']}: expected at most that, "
            "or None for the rule's default"
        )
    if rho is not None:
        in_range("residual_weight", rho, 0, 1, closed=True)


def check_parameter(param: Tensor) -> None:
    """Raise TypeError or NotImplementedError for a parameter that requires a gradient and cannot be stepped."""
    where = f"found a parameter of shape {tuple(param.shape)}"
    if param.is_complex():
        raise TypeError(f"{where} and dtype {param.dtype}; LoRA-Pre trains real parameters: use torch.view_as_real")
    if param.dtype.itemsize == 1:
        raise TypeError(
            f"{where} and dtype {param.dtype}, which torch does not add or multiply; expected float16, bfloat16, "
            "float32 or float64: train a copy in one of these, or an adapter"
        )
    if is_traceable_wrapper_subclass(local(param)):
        raise TypeError(
            f"{where} and type {type(local(param)).__name__}, which holds other tensors and no memory of its own: "
            "LoRA-Pre cannot step it. Give it to an optimizer of torch, or train a plain tensor"
        )
    if hasattr(param, "_fsdp_flattened") or hasattr(param, "ds_id"):
        engine = "DeepSpeed ZeRO-3" if hasattr(param, "ds_id") else "FSDP1"
        raise NotImplementedError(
            f"{where} that {engine} has flattened: LoRA-Pre needs rows and columns. Use FSDP2, DDP or one process"
        )
    if isinstance(param, DTensor) and not is_supported(param):
        raise NotImplementedError(
            f"{where} that is a DTensor with placements {param.placements}: LoRA-Pre follows FSDP2 (fully_shard), "
            "which shards rows (Shard(0)) over one dimension of its mesh, and no tensor parallelism. Use FSDP2, DDP "
            "or one process"
        )


def check_stack(param: Tensor, group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that cannot hold the number of experts that its group gives.

    Raise NotImplementedError for one whose rows are sharded over processes in the middle of an expert.
    """
    stack = stack_of(group)
    if stack is None:
        return
    shape = tuple(param.shape)
    where = f"found a parameter of shape {shape} in a group of experts={stack.experts}, experts_dim={stack.dim}"
    if not stack.fits(param.shape):
        expected = "[experts, p, q] or [experts · p, q]" if stack.dim == 0 else "[p, q · experts]"
        raise ValueError(f"{where}; expected {expected}. Put other parameters into a group of their own")
    if isinstance(param, DTensor) and stack.dim == 0:
        size, rows = placement_of(param).size, param.shape[0] // stack.experts
        if param.ndim == 2 and -(-param.shape[0] // size) != rows * -(-stack.experts // size):
            raise NotImplementedError(
                f"{where}, whose rows are sharded over {size} processes in the middle of an expert: use a number of "
                f"processes that divides {stack.experts}, or DDP"
            )


def check_gradient(param: Tensor) -> None:
    """Raise RuntimeError for a gradient that the step cannot use."""
    if cast(Tensor, param.grad).shape != param.shape:
        raise RuntimeError(
            f"found a gradient of shape {tuple(cast(Tensor, param.grad).shape)} on a parameter of shape "
            f"{tuple(param.shape)}: a tool has replaced the data of one of them since the backward pass; do so before "
            "it, and build a new optimizer"
        )
    grad = local(cast(Tensor, param.grad))
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(
            f"found a sparse gradient of shape {tuple(grad.shape)}; LoRA-Pre needs dense ones: build the embedding "
            "with sparse=False"
        )
    if grad.is_complex():
        raise RuntimeError(f"found a complex gradient of shape {tuple(grad.shape)}; LoRA-Pre needs real ones")


def check_uncompressed(groups: Iterable[dict[str, Any]]) -> None:
    """Raise RuntimeError if the number of parameters has changed in a group that spares some by their places."""
    for group in groups:
        if group.get("uncompressed") and len(group["params"]) != group.get("num_params", len(group["params"])):
            raise RuntimeError(
                f"a parameter group was built with {group['num_params']} parameters, of which those at the places "
                f"{group['uncompressed']} take the AdamW path, and now holds {len(group['params'])}: say which of "
                "them do, by setting group['uncompressed'] and group['num_params'], or build a new optimizer"
            )


def check_flattened_shards(groups: Iterable[dict[str, Any]]) -> None:
    """Raise RuntimeError if a group of matrices now holds only 1-D tensors, as DeepSpeed ZeRO-1 and -2 make them."""
    for group in groups:
        if group.get("num_matrices") and group["params"] and all(param.ndim < 2 for param in group["params"]):
            raise RuntimeError(
                f"a parameter group was built with {group['num_matrices']} matrices and now holds only flat tensors "
                f"of shapes {[tuple(param.shape) for param in group['params'][:3]]}: DeepSpeed ZeRO and FSDP1 hand "
                "the optimizer flattened shards, which have no rows and columns to compress. Use FSDP2, DDP or one "
                "process"
            )
