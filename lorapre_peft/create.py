"""`create_lorapre_optimizer`: from a PEFT model to an optimizer whose groups know what to compress."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from .adamw import LoRAPreAdamW
from .config import LoRAPreConfig, default_momentum_rank
from .muon import LoRAPreMuon
from .optimizer import LoRAPreOptimizer, compressed_rank

OPTIMIZERS: dict[str, type[LoRAPreOptimizer]] = {"adamw": LoRAPreAdamW, "muon": LoRAPreMuon}
# Trainer's own list of names without weight decay (transformers.Trainer.get_decay_parameter_names).
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
# LoRA's two matrices. An embedding's A (r × vocabulary) is missing on purpose: it holds one vector per token, nearly all of
# them without a gradient at any one step, which no low-rank factor of |g| can say; it takes the AdamW path.
COMPRESSIBLE = ("lora_A", "lora_B", "lora_embedding_B")


def create_lorapre_optimizer(
    model: nn.Module,
    optimizer: str = "adamw",
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    momentum_rank: int | None = None,
    update_rule: str | None = None,
    **kwargs: Any,
) -> LoRAPreOptimizer:
    """Build a LoRA-Pre optimizer over the trainable parameters of a PEFT model, and print what it compresses.

    Each adapter's LoRA matrices are compressed at the momentum rank that its config gives (`LoRAPreConfig`; a plain
    `LoraConfig` counts as one with defaults). Everything else that is trainable takes the AdamW path: biases, norms, DoRA
    magnitudes, the A of an embedding, ``modules_to_save``. Weight decay is split as `transformers.Trainer` does it.

    Args:
        model: a PEFT model with a LoRA adapter, or a model that holds one.
        optimizer: ``"adamw"`` (`LoRAPreAdamW`) or ``"muon"`` (`LoRAPreMuon`).
        lr: learning rate of all groups.
        weight_decay: decoupled, of the parameters that Trainer would decay.
        momentum_rank, update_rule: override what the adapters' configs say.
        kwargs: further options of the optimizer class.

    Raises:
        ValueError: nothing trainable, nothing to compress, a momentum rank that is too large for a module, or an invalid option.
        TypeError: an option that the optimizer does not have.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r}: expected one of {', '.join(map(repr, OPTIMIZERS))}")
    lora = {id(param): ranks for param, *ranks in _lora_matrices(model, momentum_rank, update_rule)}
    decayed = set(get_parameter_names(model, ALL_LAYERNORM_LAYERS, NO_DECAY))
    groups: dict[tuple, dict[str, Any]] = {}
    frozen: list[Tensor] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            frozen.append(param)
            continue
        k, rule = lora.get(id(param), (0, "als"))
        decay = weight_decay if name in decayed else 0.0
        options = {"weight_decay": decay, "momentum_rank": k, "update_rule": rule}
        group = groups.setdefault((decay, k, rule), {"params": [], **options})
        group["params"].append((name, param))
    if not groups:
        raise ValueError(
            "the model has no trainable parameter: wrap it with get_peft_model(model, LoRAPreConfig(r=8)), or load the adapter with "
            "is_trainable=True"
        )
    # residual_weight belongs to `als`: groups under `newton` do without it.
    rho = kwargs.pop("residual_weight", None)
    for group in groups.values():
        group["residual_weight"] = rho if group["update_rule"] == "als" else None
    if rho is not None and all(group["update_rule"] != "als" for group in groups.values()):
        raise ValueError(f"residual_weight={rho} is an option of update_rule='als', and no adapter uses it")
    built = OPTIMIZERS[optimizer](list(groups.values()), lr=lr, **kwargs)
    if not any(compressed_rank(p.shape, g["momentum_rank"]) for g in built.param_groups for p in g["params"]):
        shapes = sorted({tuple(p.shape) for g in built.param_groups for p in g["params"]})[:4]
        raise ValueError(
            f"nothing to compress among trainable parameters of shapes {shapes}…: LoRA-Pre needs LoRA matrices of rank r ≥ 2 with "
            "momentum_rank < r. Use a larger r or target_modules='all-linear', or torch.optim.AdamW for this model"
        )
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        print(state_table(built, frozen))
    return built


def _lora_matrices(
    model: nn.Module, momentum_rank: int | None, update_rule: str | None
) -> Iterator[tuple[Tensor, int, str]]:
    """(parameter, k, rule) of every LoRA matrix of every adapter, from the adapters' configs and the overrides."""
    configs = next((m.peft_config for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)), {})
    for module_name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, r in module.r.items():
            config = configs.get(adapter)
            rule = update_rule or getattr(config, "update_rule", "als")
            k = momentum_rank
            if k is None and isinstance(config, LoRAPreConfig):
                k = config.module_momentum_rank(module_name, r)
            elif k is None:
                k = default_momentum_rank(r)
            for attribute in COMPRESSIBLE:
                held = getattr(module, attribute)
                if adapter in held:
                    matrices = held[adapter].parameters() if isinstance(held[adapter], nn.Module) else [held[adapter]]
                    yield from ((param, k, rule) for param in matrices if param.ndim >= 2)


def state_table(optimizer: LoRAPreOptimizer, frozen: list[Tensor]) -> str:
    """What is compressed, what takes the AdamW path and what is frozen, with the state's size beside AdamW's, as text."""
    rows: dict[str, list[int]] = {}  # tensors, parameters, state bytes, AdamW's state bytes
    for group in optimizer.param_groups:
        for param in group["params"]:
            k = compressed_rank(param.shape, group["momentum_rank"])
            row = rows.setdefault(f"compressed, k={k}, {group['update_rule']}" if k else "AdamW path", [0, 0, 0, 0])
            for i, value in enumerate(
                (1, param.numel(), optimizer.param_state_bytes(param, group), adamw_state_bytes(param))
            ):
                row[i] += value
    lines = [f"{type(optimizer).__name__:28}{'tensors':>9}{'parameters':>16}{'state':>12}{'AdamW, fp32':>14}"]
    order = sorted(rows, key=lambda name: (name == "AdamW path", name))
    for name in order:
        tensors, parameters, state, adamw = rows[name]
        lines.append(f"{name:28}{tensors:>9,}{parameters:>16,}{format_bytes(state):>12}{format_bytes(adamw):>14}")
    if len(order) > 1:
        total = [sum(row[i] for row in rows.values()) for i in range(4)]
        lines.append(
            f"{'trained':28}{total[0]:>9,}{total[1]:>16,}{format_bytes(total[2]):>12}{format_bytes(total[3]):>14}"
        )
    lines.append(f"{'frozen':28}{len(frozen):>9,}{sum(p.numel() for p in frozen):>16,}{'–':>12}{'–':>14}")
    return "\n".join(lines)


def adamw_state_bytes(param: Tensor) -> int:
    """Bytes of AdamW's two float32 moments and its step for a parameter."""
    return 2 * 4 * math.prod(param.shape) + 4


def format_bytes(count: int) -> str:
    """Decimal units, as memory figures of models are given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
