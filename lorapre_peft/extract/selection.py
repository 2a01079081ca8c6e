"""This module decides which tensors of a model may go into an adapter, and gives the reasons why others may not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from ..integrations.targets import LINEAR, expert_parameters, output_heads, warn_of_unmatched


def selected_linears(
    model: PreTrainedModel, target_modules: str | Sequence[str], required: bool
) -> dict[str, nn.Module]:
    """Return the linear modules that PEFT would adapt, except those that share their weight with another module.

    An adapter on one of these would not reach the others while it is not merged.

    Raises ValueError if there are none although they are ``required``.
    """
    selection = _maybe_include_all_linear_layers(_config(target_modules), model)
    linear: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, LINEAR)
    }
    tied, experts = _tied(model), expert_parameters(model)
    selected = {
        name: module
        for name, module in linear.items()
        if check_target_module_exists(selection, name) and f"{name}.weight" not in tied
    }
    if required and not selected:
        known = {name.rpartition(".")[2] for name in linear}
        known |= {".".join(name.split(".")[-2:]) for name in experts}
        raise ValueError(
            f"target_modules={target_modules!r} selects no linear module: the model has {', '.join(sorted(known))}"
        )
    warn_of_unmatched(target_modules, [*linear, *experts, *(name.rpartition(".")[0] for name in experts)])
    return selected


def selected_experts(model: PreTrainedModel, target_modules: str | Sequence[str]) -> set[str]:
    """Return the names of the stacked expert weights that ``target_modules`` selects in `create_lorapre_optimizer`."""
    names = expert_parameters(model).keys()
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":  # in any case, as in PEFT
        return set(names)
    config = _config(target_modules)
    return {
        name
        for name in names
        if any(check_target_module_exists(config, part) for part in (name, name.rpartition(".")[0]))
    }


def read_past(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Return those of some linear modules whose weight the model itself reads, as Mamba's ``dt_proj`` and attention's
    projections in `torch.nn.MultiheadAttention`.

    An adapter on such a module runs only where the module is called. The source code of the module's owner tells: it
    has ``self.NAME.weight`` as a value. To read its dtype or device does not count, nor does to slice it (Bloom, for
    another order of its sums) or to initialise it.
    """
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    values = {kind: _values(kind) for kind in set(map(type, owners.values()))}
    return {name for name, owner in owners.items() if name.rpartition(".")[2] in values[type(owner)]}


def _values(owner: type[nn.Module]) -> set[str]:
    """Return the names of the modules whose weights the code of a class uses as values."""
    try:
        code = inspect.getsource(owner)
    except (OSError, TypeError):  # The class has been defined in a shell.
        return set()
    return set(
        re.findall(
            r"(?<!isinstance\()(?<!getattr\()(?<!_\()"
            r"\bself\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape|data|_?is_\w+)\b|\s*=[^=])",
            code,
        )
    )


def reason(model: PreTrainedModel, owner: str, attribute: str) -> str:
    """Return the reason why the tensor ``owner.attribute`` is not in the adapter."""
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        # This is, for example, an expert's matrix, which the model fuses with others.
        return f"not a module of {type(model).__name__}"
    if f"{owner}.{attribute}" in expert_parameters(model):
        return "not in target_modules"
    if isinstance(module, LINEAR) and attribute == "weight":
        if module in output_heads(model):
            return "output head"
        return "shared by several modules" if f"{owner}.weight" in _tied(model) else "not in target_modules"
    return "bias" if attribute == "bias" else type(module).__name__


def _config(target_modules: str | Sequence[str]) -> LoraConfig:
    return LoraConfig(target_modules=target_modules if isinstance(target_modules, str) else list(target_modules))


def _tied(model: PreTrainedModel) -> set[str]:
    """Return the names of all tensors that share their values with another."""
    return {name for pair in model.all_tied_weights_keys.items() for name in pair}
