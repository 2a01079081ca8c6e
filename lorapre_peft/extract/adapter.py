"""This module writes an extracted adapter so that plain PEFT opens it as it was meant, and checks that it does."""

from __future__ import annotations

import copy
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..integrations.config import CONFIG_NAME
from ..integrations.targets import expert_parameters
from .selection import read_past

Factors = Mapping[str, tuple[Tensor, Tensor]]  # It maps a module's name to B [out, r] and A [r, in].

# This is the largest accepted ‖found − meant‖ / ‖meant‖ of a module's change. Rounding to bfloat16, the coarsest dtype
# of weights, costs 2⁻⁹. A change that is transposed or scaled twice is off by the order of 1.
TOLERANCE = 1e-2


def adapter_config(
    model: PreTrainedModel,
    ranks: Mapping[str, int],
    by_parameter: Collection[str],
    base: str,
    stacks: Collection[str] = (),
) -> LoraConfig:
    """Return the config by which PEFT adapts exactly these modules, at these ranks and with a scaling of 1.

    ranks: the rank of each module. by_parameter: the modules among them that are addressed by their weight, in
    ``target_parameters``. stacks: the names in ``ranks`` that are themselves parameters, which stack experts.
    """
    modules = {name for name in ranks if name not in by_parameter and name not in stacks}
    # Short names are used if they mean just these modules, else whole names, else (if one name ends like another) a
    # regular expression of whole names.
    selections: tuple[list[str] | str, ...] = (
        [*{name.rpartition(".")[2] for name in modules}],
        list(modules),
        "|".join(map(re.escape, sorted(modules))),
    )
    for targets in selections:
        config = LoraConfig(target_modules=targets)
        if {name for name, _ in model.named_modules() if check_target_module_exists(config, name)} == modules:
            break
    largest = max(ranks.values())
    pattern = {
        f"^{name}.weight" if name in by_parameter else f"^{name}": r for name, r in ranks.items() if r != largest
    }
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=targets,
        target_parameters=sorted(
            name if name in stacks else f"{name}.weight" for name in ranks if name in by_parameter or name in stacks
        )
        or None,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in modules),
        task_type="CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    if not isinstance(targets, str):
        config.target_modules = sorted(targets)  # PEFT makes a set of them, whose order differs between processes.
    return config


def addressable(model: PreTrainedModel, names: Collection[str]) -> tuple[set[str], dict[str, str]]:
    """Find out how PEFT can adapt these linear modules of a model, by letting it open adapters of rank 1.

    In some architectures PEFT takes a name in ``target_modules`` for another one. Since transformers 5 stacks the
    experts of mixtures, "gate_proj" there stands for them, even if dense layers and shared experts have modules of
    that name (PEFT's ``_convert_peft_config_moe``). PEFT refuses other names, such as Mamba's "out_proj", whose weight
    fused kernels read without calling the module. It takes further modules of that kind, which are refused here
    (`selection.read_past`).

    model: a skeleton on the meta device, which is not changed.

    Returns the modules that have to be addressed by their weight, in ``target_parameters``, and a dict of the modules
    that PEFT adapts in neither way, with the reason for each.
    """

    def adapted(tried: set[str], by_parameter: bool) -> tuple[set[str], str]:
        factors = {name: _ones(model, name, value=1 + i) for i, name in enumerate(tried)}
        config = adapter_config(model, dict.fromkeys(tried, 1), tried if by_parameter else (), base="")
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), config, factors, model)
            try:
                wrong = misread(Path(folder), model, factors)
            except Exception as error:  # PEFT raises various errors for what it cannot adapt.
                return set(), f": {_first_sentence(error)}"
        return (tried - wrong if wrong <= tried else set()), ""  # If PEFT adapted others too, these names will not do.

    past = read_past(model, names)
    refused = dict.fromkeys(past, "its weight is read past the module, where an adapter has no effect")
    names = set(names) - past
    if not names or adapted(names, by_parameter=False)[0] == names:
        return set(), refused
    by_parameter: set[str] = set()
    groups: dict[str, set[str]] = {}  # PEFT decides by the last part of a name.
    for name in sorted(names):
        groups.setdefault(name.rpartition(".")[2], set()).add(name)
    for group in groups.values():
        found, why = adapted(group, by_parameter=False)
        if found != group:
            found, _ = adapted(group, by_parameter=True)
            by_parameter |= found
            refused |= dict.fromkeys(
                group - found, f"refused by PEFT{why}" if why else "not found by PEFT in the adapter"
            )
    return by_parameter, refused


def _first_sentence(error: Exception) -> str:
    return re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0]


def _ones(model: PreTrainedModel, name: str, value: int) -> tuple[Tensor, Tensor]:
    """Return factors of rank 1 whose product is ``value`` everywhere."""
    module: Any = model.get_submodule(name)
    p, q = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    return torch.full((p, 1), float(value)), torch.ones(1, q)


def _wrapped(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Return the names of PEFT's layers for these modules and stacks of experts.

    PEFT wraps a module once for each of its parameters, in their order, and the first wrapper is the innermost.
    """
    stacks: dict[str, list[str]] = {}
    for name in expert_parameters(model):
        if name in names:
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
    wrapped = {
        name: owner + ".base_layer" * (len(stacked) - 1 - i)
        for owner, stacked in stacks.items()
        for i, name in enumerate(stacked)
    }
    return [wrapped.get(name, name) for name in names]


def write(folder: Path, config: LoraConfig, factors: Factors, model: PreTrainedModel) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does."""
    config.save_pretrained(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, (B, A) in zip(_wrapped(model, factors), factors.values()):
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def misread(folder: Path, model: PreTrainedModel, factors: Factors) -> set[str]:
    """Return the modules whose weight plain PEFT would not change by B A, or would change although it should not.

    The factors and their scaling are compared in every module. The change that PEFT makes of them, a matrix of the
    weight's size, is compared in the first of the modules that share the last part of their names.

    model: a skeleton on the meta device, which is not changed. PEFT gets a copy whose weights take no memory.
    """
    wrong = set(factors)
    spot_checked: set[str] = set()
    for name, layer in _opened(folder, model):
        if name not in factors:
            wrong.add(name)
            continue
        B, A = (factor.float() for factor in factors[name])
        found = [layer.lora_B["default"].weight, layer.lora_A["default"].weight]
        if any(factor.is_meta for factor in found) or not all(map(torch.equal, found, (B, A))):
            continue  # Factors on the meta device were not found in the file.
        if layer.scaling["default"] != 1:
            continue
        kind = name.rpartition(".")[2]
        if kind not in spot_checked:
            spot_checked.add(kind)
            if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
                each = B.unflatten(1, (-1, layer.num_experts)).movedim(-1, 0) @ A.unflatten(0, (layer.num_experts, -1))
                meant = each.mT if getattr(layer.get_base_layer(), "is_transposed", False) else each
            else:
                meant = A.mT @ B.mT if isinstance(model.get_submodule(name), Conv1D) else B @ A
            change = layer.get_delta_weight("default")
            if change.shape != meant.shape or (change - meant).norm() > TOLERANCE * meant.norm():
                continue
        wrong.discard(name)
    return wrong


def _opened(folder: Path, model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's layers of an opened adapter, by their names in the base model.

    Layers that PEFT has found no factors for have them on the meta device.
    """
    # A single zero stands for all of a weight. PEFT only reads shapes, dtypes and devices, and moves factors to the
    # weight's device.
    hollow = copy.deepcopy(model)._apply(lambda tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = PeftModel.from_pretrained(hollow, str(folder), torch_device="cpu", low_cpu_mem_usage=True)
    for name, layer in opened.named_modules():
        if isinstance(layer, LoraLayer):
            name = name.removeprefix("base_model.model.")
            if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
                name = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            yield name, layer


def write_checked(folder: Path, config: LoraConfig, factors: Factors, model: PreTrainedModel) -> None:
    """Write an adapter into a folder, whose parent exists, after plain PEFT has opened it and found what was meant.

    Raises RuntimeError if PEFT finds anything else. The folder is then left as it was.
    """
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        write(Path(place), config, factors, model)
        if wrong := sorted(misread(Path(place), model, factors)):
            raise RuntimeError(
                f"PEFT {peft.__version__} opens the adapter otherwise than it was meant in {len(wrong)} modules such "
                f"as {', '.join(wrong[:3])}, and nothing was written: leave these out of target_modules, or deliver "
                "the tuned weights themselves"
            )
        folder.mkdir(exist_ok=True)
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # It would give this adapter the options of an earlier one.
        for path in Path(place).iterdir():
            os.replace(path, folder / path.name)
