"""This module builds, from a PEFT model or a plain one, an optimizer that knows what to compress."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from ..lowrank.rules import RULES
from ..lowrank.sharding import rank
from ..optim.adamw import LoRAPreAdamW
from ..optim.base import LoRAPreOptimizer
from ..optim.muon import LoRAPreMuon
from ..optim.options import check_momentum_rank, one_of
from .summary import state_table
from .targets import Targets, adapter_targets, freeze_others, has_adapter, thawed_after_an_error, weight_targets

OPTIMIZERS: dict[str, type[LoRAPreAdamW] | type[LoRAPreMuon]] = {"adamw": LoRAPreAdamW, "muon": LoRAPreMuon}
# This is Trainer's own list of names without weight decay (transformers.Trainer.get_decay_parameter_names).
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
# This is the paper's learning rate for fine-tuning the weights of 7B and 8B models (Table 2).
WEIGHT_LR = 2e-5


def create_lorapre_optimizer(
    model: nn.Module,
    optimizer: str = "adamw",
    *,
    lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    momentum_rank: int | None = None,
    second_momentum_rank: int | None = None,
    update_rule: str | None = None,
    residual_weight: float | None = None,
    target_modules: str | Iterable[str] | None = None,
    others: str | None = None,
    embeddings: str | None = None,
    verbose: bool = True,
    **kwargs: Any,
) -> LoRAPreOptimizer:
    """Build a LoRA-Pre optimizer over a model's trainable parameters, and print what it compresses.

    If the model has LoRA adapters, their matrices are compressed at the momentum rank of each adapter's config
    (`LoRAPreConfig`; a plain `LoraConfig` counts as one with defaults). Everything else that is trainable takes the
    AdamW path: biases, norms, DoRA magnitudes, the A of an embedding, ``modules_to_save``. Each expert of a stack
    (PEFT's ``target_parameters``, or weights such as Qwen3-MoE's) has factors of its own, at that momentum rank.

    Without adapters the **weights** are trained. Those of ``target_modules`` are compressed, at rank 8 unless another
    is given. By default the ``others`` (norms, biases) are trained by AdamW, and embeddings and head are not trained.
    What is not trained is frozen here (``requires_grad_(False)``), so that it takes no memory for gradients.

    Weight decay is split as `transformers.Trainer` does it. Tied weights count once.

    Args:
        model: a model with a LoRA adapter, or a plain one.
        optimizer: ``"adamw"`` (`LoRAPreAdamW`) or ``"muon"`` (`LoRAPreMuon`).
        lr: learning rate of all groups. It may be left out only for full weights, where the default is 2e-5, as in the
            paper's Table 2.
        weight_decay: decoupled weight decay of the parameters that Trainer would decay.
        momentum_rank: rank k of the momentum of all compressed matrices. None stands for what the adapters' configs
            say (r/4 unless they give another), and for 8 for weights.
        second_momentum_rank, update_rule, residual_weight: as in `LoRAPreAdamW`. They override the adapters' configs.
        target_modules: for full weights only: names, a regular expression or ``"all-linear"`` (the default), as in
            PEFT.
        others: for full weights only: ``"adamw"`` (the default) or ``"frozen"``, for parameters that are neither
            targets nor embeddings. The head of a classifier is trained in any case.
        embeddings: for full weights only: ``"frozen"`` (the default) or ``"adamw"``, for embeddings and head.
        verbose: whether the first process prints the table of what is compressed.
        kwargs: further options of the optimizer class.

    Raises:
        ValueError: nothing trainable, nothing to compress, adapters without LoRA's layers, a momentum rank that is too
            large for a module, an option of full weights with an adapter in the model, or an invalid option.
        TypeError: no model, no name of an optimizer, or an option that there is not for the optimizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"found a {type(model).__name__} where the model is expected: write create_lorapre_optimizer(model, "
            "lr=…), or LoRAPreAdamW(parameters, lr=…) for bare parameters"
        )
    named = dict(momentum_rank=momentum_rank, update_rule=update_rule, others=others, embeddings=embeddings)
    check_call(optimizer, named | kwargs, "create_lorapre_optimizer(model, 'adamw', lr=…)")
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError(
            "the model has no trainable parameter: wrap it with get_peft_model(model, LoRAPreConfig(r=8)), load the "
            "adapter with PeftModel.from_pretrained(model, path, is_trainable=True, "
            "config=LoRAPreConfig.from_pretrained(path)), or thaw the weights with model.requires_grad_(True)"
        )
    overrides = dict(
        update_rule=update_rule, second_momentum_rank=second_momentum_rank, residual_weight=residual_weight
    )
    if optimizer == "muon" and second_momentum_rank is not None:
        raise ValueError(
            f"second_momentum_rank={second_momentum_rank} is for optimizer='adamw': Muon has no second moment"
        )
    frozen_rows: dict[str, set[Tensor]] = {}
    adapted = has_adapter(model)
    if adapted:
        for name, given in (("target_modules", target_modules), ("others", others), ("embeddings", embeddings)):
            if given is not None:
                raise ValueError(
                    f"{name}={given!r} is for full weights; with an adapter in the model, its LoraConfig says what "
                    "is trained"
                )
    if lr is None:
        if adapted:
            raise ValueError("no learning rate: give lr=… (LoRA is usually tuned to 1e-4 or above)")
        lr = WEIGHT_LR
    with thawed_after_an_error(model):
        if adapted:
            targets = adapter_targets(model, momentum_rank, overrides)
            if not targets:
                raise ValueError(
                    "found adapters in the model and none of their matrices trainable: thaw an adapter "
                    "(model.set_adapter(name), or is_trainable=True where it is loaded), or take the adapters out "
                    "(model.merge_and_unload()) to train the weights"
                )
        else:
            chosen = "all-linear" if target_modules is None else target_modules
            targets = weight_targets(model, chosen, momentum_rank, overrides)
            frozen_rows = freeze_others(model, targets, others, embeddings)
        groups = _param_groups(model, targets, weight_decay)
        for name in ("second_momentum_rank", "residual_weight"):
            if overrides[name] is not None and all(
                group["update_rule"] != "als" for group in groups if group["momentum_rank"]
            ):
                raise ValueError(
                    f"{name}={overrides[name]} is an option of update_rule='als', and no parameter uses it"
                )
        if optimizer == "muon":
            for group in groups:
                del group["second_momentum_rank"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "momentum_rank=.* compresses none")  # An error says it below.
            built = OPTIMIZERS[optimizer](groups, lr=lr, **kwargs)
        if not any(built.ranks(p, g) for g in built.param_groups for p in g["params"]):
            shapes = sorted({tuple(p.shape) for g in built.param_groups for p in g["params"]})[:4]
            raise ValueError(
                f"nothing to compress among trainable parameters of shapes {shapes}…: LoRA-Pre needs matrices whose "
                "smaller side (the rank r, for an adapter) is at least 2 and above momentum_rank. Use a larger r or "
                "target_modules='all-linear', a smaller momentum_rank, or torch.optim.AdamW for this model"
            )
    if verbose and rank() == 0:
        frozen: set[Tensor] = {param for param in model.parameters() if not param.requires_grad}
        frozen_rows["frozen"] = frozen - set().union(*frozen_rows.values())
        print(state_table(built, {label: list(params) for label, params in frozen_rows.items() if params}))
    return built


def _param_groups(model: nn.Module, targets: Targets, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups of named parameters with equal weight decay and options, in the model's order. Rank 0: AdamW."""
    decayed = set(get_parameter_names(model, ALL_LAYERNORM_LAYERS, NO_DECAY))
    plain = {"momentum_rank": 0, "update_rule": "als", "second_momentum_rank": None, "residual_weight": None}
    plain |= {"experts": None, "experts_dim": 0}
    groups: dict[tuple, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            options = {"weight_decay": weight_decay if name in decayed else 0.0, **plain, **targets.get(param, {})}
            group = groups.setdefault((name in decayed, *options.values()), {"params": [], **options})
            group["params"].append((name, param))
    return list(groups.values())


def check_call(optimizer: Any, options: dict[str, Any], example: str) -> None:
    """Raise TypeError or ValueError for a name and options of `create_lorapre_optimizer` that fit no model.

    example: a call that is right, for the message.
    """
    if not isinstance(optimizer, str):
        raise TypeError(f"found a {type(optimizer).__name__} where the optimizer's name is expected: write {example}")
    one_of("optimizer", optimizer, OPTIMIZERS)
    known = option_names(optimizer)
    if unknown := sorted(options.keys() - known):
        raise TypeError(
            f"found {', '.join(unknown)} among the options of {optimizer!r}; expected some of "
            f"{', '.join(sorted(known))}"
        )
    choices = {"others": ("adamw", "frozen"), "embeddings": ("adamw", "frozen"), "update_rule": tuple(RULES)}
    for name, expected in choices.items():
        if options.get(name) is not None:
            one_of(name, options[name], expected)
    check_momentum_rank(options.get("momentum_rank"))
    if options.get("momentum_rank") == 0:
        raise ValueError(
            "momentum_rank=0 compresses nothing: give at least 1, or leave it out for the default, or use "
            "torch.optim.AdamW"
        )


def option_names(optimizer: str) -> set[str]:
    """Return the names of the options that `create_lorapre_optimizer` takes for an optimizer of this name."""
    builders: tuple[Any, ...] = (create_lorapre_optimizer, OPTIMIZERS[optimizer])
    named = {name for builder in builders for name in inspect.signature(builder).parameters}
    return named - {"model", "optimizer", "params", "kwargs"}
