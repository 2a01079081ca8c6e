"""This module finds the parameters to compress, and their ranks: matrices of LoRA adapters, or weights of a model."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from ..lowrank.layout import MOMENTUM_RANK
from ..lowrank.rules import RULES
from ..optim.options import RULE_OPTIONS
from .config import LoRAPreConfig, default_momentum_rank

# These are LoRA's two matrices. An embedding's A (r × vocabulary) is missing on purpose. It holds one vector for each
# token, of which nearly all have no gradient at any one step. No low-rank factor of |g| can express that, so it takes
# the AdamW path.
COMPRESSIBLE = ("lora_A", "lora_B", "lora_embedding_B")

LINEAR = (nn.Linear, Conv1D)

# It maps a parameter to momentum_rank, `RULE_OPTIONS` and, for a stack of experts, also experts and experts_dim.
Targets = dict[Tensor, dict[str, Any]]


def output_heads(model: nn.Module) -> list[nn.Module]:
    """Return the modules that turn hidden states into logits over a vocabulary.

    These are the heads that transformers' models name themselves, and the linear layers that share an embedding's
    weight. Outside of transformers' models, linear layers with the shape of a head are among them (`_heads_by_shape`).
    """
    named = [head for inner in _models(model) if (head := inner.get_output_embeddings()) is not None]
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    linear = [module for module in model.modules() if isinstance(module, LINEAR)]
    covered = {module for inner in _models(model) for module in inner.modules()}
    return [
        *(part for head in named for part in (head if isinstance(head, nn.ModuleList) else [head])),
        *(module for module in linear if any(module.weight is table for table in tables)),
        *(module for module in _heads_by_shape(linear, [len(table) for table in tables]) if module not in covered),
    ]


def _heads_by_shape(linear: Sequence[nn.Module], table_sizes: list[int]) -> list[nn.Module]:
    """Return the linear layers of a model that have as many outputs as one of its embeddings has rows.

    If layers also take inputs of that length, a hidden layer may have this shape too, such as in a byte-level model of
    width 256, or in a model with 1024 positions and width 1024. A layer then only counts if it is the model's last
    one, and only for the model's first embedding. Embeddings of up to `MOMENTUM_RANK` rows are not vocabularies (token
    types, segments), and a head for one has no rank to compress.
    """
    widths = {_features(module)[0] for module in linear}
    heads = []
    for module in linear:
        outputs = _features(module)[1]
        last_for_first = module is linear[-1] and [outputs] == table_sizes[:1]
        if outputs in table_sizes and outputs > MOMENTUM_RANK and (outputs not in widths or last_for_first):
            heads.append(module)
    return heads


def _features(module: Any) -> tuple[int, int]:
    """Return the lengths of a linear layer's input and output."""
    inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else (module.in_features, module.out_features)
    return inputs, outputs


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the heads that PEFT's "all-linear" leaves out as well."""
    named = (getattr(inner, name, None) for inner in _models(model) for name in SEQ_CLS_HEAD_NAMES)
    return [head for head in named if isinstance(head, nn.Module)]


def _models(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "get_output_embeddings")]


def has_adapter(model: nn.Module) -> bool:
    """Return whether the model holds LoRA layers.

    Raises ValueError for a model of PEFT's whose adapters are all of other kinds.
    """
    modules = list(model.modules())
    if any(isinstance(module, LoraLayer) for module in modules):
        return True
    others = [module for module in modules if isinstance(module, (PeftModel, PeftMixedModel, BaseTunerLayer))]
    if others:
        configs = [getattr(module, "peft_config", None) or {} for module in others]
        kinds = {
            str(getattr(config.peft_type, "value", config.peft_type)) for held in configs for config in held.values()
        }
        raise ValueError(
            "found a model of PEFT's without a LoRA layer (its adapters: "
            f"{', '.join(sorted(kinds)) or type(others[0]).__name__}); expected a LoRA adapter, LoRAPreConfig(...), "
            "or a plain model. Use torch.optim.AdamW for this one"
        )
    return False


def rule_options(
    k: int, config: LoraConfig | None, momentum_rank: int | None, given: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the options of matrices of momentum rank k: that, and `RULE_OPTIONS` as given or as the config says.

    Options that the rule does not have are None. The second moment's rank is at most k, unless a caller gave both
    ranks, which the optimizer checks.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    found = {name: given.get(name, getattr(config, name, None)) for name in RULE_OPTIONS}
    second = found["second_momentum_rank"]
    if second is not None and not (momentum_rank and "second_momentum_rank" in given):
        found["second_momentum_rank"] = min(k, second)
    rule = RULES.get(found["update_rule"] or "als")
    if rule is not None:  # For another one the optimizer raises an error that lists the rules.
        found |= {"update_rule": rule.name}
        found |= {name: None for name in ("second_momentum_rank", "residual_weight") if getattr(rule, name) is None}
    return {"momentum_rank": k, **found}


def adapter_targets(model: nn.Module, momentum_rank: int | None, given: dict[str, Any] | None) -> Targets:
    """Return the LoRA matrices of every adapter with their options, from the adapters' configs and the overrides.

    Warns of patterns that match no module, and of adapters whose configs are not in the model.
    """
    holders: list[tuple[str, dict[str, LoraConfig]]] = []  # the models around a module, by the beginning of its name
    targets: Targets = {}
    unused: dict[str, set[str]] = {}
    bare = ""  # the first layer without a config
    for module_name, module in model.named_modules():
        while holders and not f"{module_name}.".startswith(holders[-1][0]):
            holders.pop()
        if isinstance(getattr(module, "peft_config", None), dict):
            holders.append((f"{module_name}." if module_name else "", module.peft_config))
        if not isinstance(module, LoraLayer):
            continue
        own_name = _unwrapped(model, module_name).rpartition("base_model.model.")[2]  # It omits PEFT's wrapper.
        stacked = isinstance(module, ParamWrapper) and module.num_experts > 1
        if isinstance(module, ParamWrapper):  # The wrappers of one module's parameters are nested.
            own_name = f"{own_name.replace('.base_layer', '')}.{module.parameter_name}"
        for adapter, r in module.r.items():
            matrices = [param for name in COMPRESSIBLE for param in _held(getattr(module, name), adapter)]
            if not any(param.requires_grad for param in matrices):
                continue  # What is not trained has no momenta.
            config = next((configs[adapter] for _, configs in reversed(holders) if adapter in configs), None)
            k = default_momentum_rank(r) if momentum_rank is None else momentum_rank
            if momentum_rank is None and isinstance(config, LoRAPreConfig):
                k = config.module_momentum_rank(own_name, r)
                unused.setdefault(adapter, {*config.momentum_rank_pattern}).discard(config.pattern_key(own_name))
            if k >= r > 1:
                fitting = "1" if r == 2 else f"1 to {r - 1}"
                where = "leave the argument momentum_rank out, and give this module one of its own in the config's"
                raise ValueError(
                    f"momentum_rank={k} is not below r={r} of {module_name}: nothing would be compressed there; use "
                    f"{fitting}, or {'a smaller one for this module in' if momentum_rank is None else where} "
                    "momentum_rank_pattern"
                )
            if config is None and not bare:
                bare = module_name
            options = rule_options(k, config, momentum_rank, given)
            targets |= {param: options for param in matrices if param.ndim >= 2}
            # In lora_A [E · r, in] the experts' rows lie one after the other. In lora_B [out, r · E] their columns are
            # interleaved.
            if isinstance(module, ParamWrapper) and stacked:
                for held, dim in ((module.lora_A, 0), (module.lora_B, -1)):
                    (weight,) = _held(held, adapter)
                    targets[weight] = options | {"experts": module.num_experts, "experts_dim": dim}
    if bare:
        warnings.warn(
            f"found no config for the adapter of {bare}, a layer of a part of a PEFT model: the options of LoRA-Pre "
            "that are not given take their defaults. Give the whole model",
            stacklevel=3,
        )
    for adapter, keys in unused.items():
        if keys:
            warnings.warn(
                f"momentum_rank_pattern of adapter {adapter!r}: {', '.join(map(repr, sorted(keys)))} names no module "
                "with an adapter",
                stacklevel=3,
            )
    return targets


def _unwrapped(model: nn.Module, name: str) -> str:
    """Return the name that a module has without what torch's wrappers of modules put into it."""
    own = name.removeprefix("module.") if isinstance(model, (DistributedDataParallel, nn.DataParallel)) else name
    return own.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _held(held: nn.ModuleDict | nn.ParameterDict, adapter: str) -> list[Tensor]:
    """Return the parameters of one adapter among those of a LoRA layer."""
    if adapter not in held:
        return []
    part: Any = held[adapter]
    return list(part.parameters()) if isinstance(part, nn.Module) else [part]


def weight_targets(
    model: nn.Module, target_modules: str | Iterable[str], momentum_rank: int | None, given: dict[str, Any] | None
) -> Targets:
    """Return the weights of the modules that ``target_modules`` selects: names, a regular expression or "all-linear".

    The stacked weights of a mixture's experts are among "all-linear". Otherwise they, and matrices that are not called
    ``weight``, are selected by their own names ("experts.gate_up_proj", "in_proj_weight") or by that of their module
    ("experts"). Raises ValueError if no module with a matrix is selected, or only modules that are frozen or
    quantised.
    """
    k = MOMENTUM_RANK if momentum_rank is None else momentum_rank
    names = target_modules if isinstance(target_modules, str) else list(target_modules)
    all_linear = isinstance(names, str) and names.lower() == "all-linear"  # In any case of letters, as in PEFT.
    config = LoraConfig(target_modules=names)
    check_expression(names)
    seen: set[str] = set()
    heads = {*output_heads(model), *_classifiers(model)}
    options = rule_options(k, None, momentum_rank, given)
    targets: Targets = {}
    frozen: list[str] = []
    experts = expert_parameters(model)
    for module_name, module in model.named_modules():
        for name, param in module.named_parameters(module_name, recurse=False):
            stacked, plain = name in experts, name == f"{module_name}.weight".removeprefix(".")
            if param.ndim < 2:
                continue
            if all_linear:
                matched = stacked or (plain and isinstance(module, LINEAR) and module not in heads)
            else:
                selecting = (module_name,) if plain else (name, module_name)
                own = [_unwrapped(model, n) for n in selecting]
                matched = any(check_target_module_exists(config, n) for n in own)
                seen.update(own)
            if matched and param.requires_grad:
                stack = {"experts": len(param), "experts_dim": 0} if stacked else {}
                targets[param] = options | stack
            elif matched:
                frozen.append(name if stacked else module_name)
    if not targets:
        raise ValueError(_no_target(model, target_modules, frozen))
    warn_of_unmatched(names, seen)
    return targets


def warn_of_unmatched(target_modules: str | Sequence[str], names: Iterable[str]) -> None:
    """Warn of those among a list of names that are not the end of any module's or parameter's name."""
    ends = {name.split(".", i)[-1] for name in names for i in range(name.count(".") + 1)}
    unmatched = set() if isinstance(target_modules, str) else set(target_modules) - ends
    if unmatched:
        warnings.warn(
            f"target_modules: {', '.join(map(repr, sorted(unmatched)))} names no module with a matrix, and has no "
            "effect",
            stacklevel=4,
        )


def check_expression(target_modules: str | Sequence[str]) -> None:
    """Raise ValueError for a string that is no regular expression."""
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules={target_modules!r} is no regular expression ({error}): give names as a list, an "
                "expression or 'all-linear'"
            ) from error


def _no_target(model: nn.Module, target_modules: str | Iterable[str], frozen: list[str]) -> str:
    """Return a message why there is no weight to train. frozen: the selected modules whose weights are frozen."""
    if any(getattr(inner, "is_quantized", False) for inner in _models(model)):
        return (
            "the model is quantised, and its weights cannot be trained themselves: train an adapter on it, "
            "get_peft_model(model, LoRAPreConfig(r=8, target_modules='all-linear')), or load the model without "
            "quantization_config"
        )
    if frozen:
        return (
            f"target_modules={target_modules!r} names {len(frozen)} modules such as {', '.join(frozen[:3])}, and all "
            "their weights are frozen (requires_grad=False): thaw those to be trained with requires_grad_(True) "
            "before the optimizer is built, or name others"
        )
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LINEAR)})
    found = f"target_modules={target_modules!r} matches no module with a trainable matrix"
    if not linear:
        return (
            f"{found}, and this model has no linear layers: name modules of other kinds, or give its parameters to "
            "LoRAPreAdamW or LoRAPreMuon, which compress every matrix"
        )
    example = [target_modules] if target_modules in linear else linear[:1]
    return (
        f"{found}; this model's linear layers are called {', '.join(linear)}. Name some of them in a list, such as "
        f"{example}, or use 'all-linear'. A string is a regular expression for the whole name of a module"
    )


def expert_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return by name the parameters that hold a matrix for each expert of a mixture, [experts, p, q].

    They are three-dimensional, and their module has their number of experts in an attribute whose name ends with
    "experts" (transformers: num_experts, total_experts, num_routed_experts). Convolutions and position embeddings are
    therefore not among them.
    """
    found = {}
    for module_name, module in model.named_modules():
        counts = {count for name, count in vars(module).items() if name.endswith("experts") and type(count) is int}
        for name, param in module.named_parameters(module_name, recurse=False):
            if param.ndim == 3 and len(param) in counts:
                found[name] = param
    return found


def freeze_others(
    model: nn.Module, targets: Targets, others: str | None, embeddings: str | None
) -> dict[str, set[Tensor]]:
    """Freeze what full-weight training leaves out, which by default are embeddings and head.

    The head of a classifier, which mostly is new, is trained in any case. Returns the frozen parameters, by a label
    for the table.
    """
    embedded = embedding_parameters(model) - targets.keys()
    everything: set[Tensor] = set(model.parameters())
    classifying = {param for head in _classifiers(model) for param in head.parameters()}
    rest = everything - targets.keys() - embedded
    frozen: dict[str, set[Tensor]] = {}
    for option, label, given, default, params in (
        ("embeddings", "embeddings and head, frozen", embeddings, "frozen", embedded),
        ("others", "others, frozen", others, "adamw", rest - classifying if others == "frozen" else rest),
    ):
        if given == "adamw" and params and not any(param.requires_grad for param in params):
            raise ValueError(
                f"{option}='adamw': found {len(params)} parameters that are all frozen, perhaps by an earlier "
                f"optimizer with {option}='frozen'. Thaw those that are to be trained: model.requires_grad_(True)"
            )
        if (given or default) == "frozen" and params:
            if isinstance(model, DistributedDataParallel) and any(param.requires_grad for param in params):
                raise ValueError(
                    f"{label}: found a model that DistributedDataParallel has wrapped already, which waits for their "
                    "gradients; build the optimizer from the model inside, before it is wrapped"
                )
            frozen[label] = params
            for param in params:
                param.requires_grad_(False)
    return frozen


@contextlib.contextmanager
def thawed_after_an_error(model: nn.Module) -> Iterator[None]:
    """Thaw what a block has frozen if it raises, so that the call can be mended and made again."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    try:
        yield
    except BaseException:
        for param in trainable:
            param.requires_grad_(True)
        raise


def embedding_parameters(model: nn.Module) -> set[Tensor]:
    """Return the parameters of embeddings and of the output head."""
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)] + output_heads(model)
    return {param for module in modules for param in module.parameters()}
