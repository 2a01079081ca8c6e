"""This module holds what the tests of `extract_lora` share.

It makes changes of a model's weights, and measures what an adapter holds of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorapre_peft.extract.lora import ExtractionReport

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_linear(name: str) -> bool:
    """Return whether a parameter belongs to one of the `LINEAR` layers, by its name."""
    return name.split(".")[-2] in LINEAR


def decaying(parameter, generator, factor=0.9):
    """Return a random change of full rank, whose i-th singular value is multiplied by ``factor`` to the power i."""
    U, S, Vh = torch.linalg.svd(torch.randn(parameter.shape, generator=generator), full_matrices=False)
    return 1e-2 * (U * S * factor ** torch.arange(len(S))) @ Vh


def full(name, parameter, generator):
    """Return a change of full rank for a linear layer, or None for other parameters."""
    return decaying(parameter, generator, 0.8 if "mlp" in name else 0.9) if is_linear(name) else None


def rank_4(name, parameter, generator):
    """Return a change of rank 4 for a linear layer, or None for other parameters."""
    if is_linear(name):
        p, q = parameter.shape
        return 1e-2 * torch.randn(p, 4, generator=generator) @ torch.randn(4, q, generator=generator)


def everything(name, parameter, generator):
    """Return a random change for any parameter."""
    return 1e-2 * torch.randn(parameter.shape, generator=generator)


def merged(base: str, adapter: Path, **options) -> dict[str, torch.Tensor]:
    """Return the weights of a model into which PEFT has merged an adapter. ``options`` load the model."""
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def weights(folder: str) -> dict[str, torch.Tensor]:
    """Return the weights of the model in a folder by name."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def true_errors(base: str, tuned: str, adapter: Path, report: ExtractionReport) -> dict[str, float]:
    """Return ‖merged − tuned‖ / ‖tuned − base‖ of each module by name, computed in float64 from whole models."""
    before, after, got = weights(base), weights(tuned), merged(base, adapter)
    return {
        m.name: float(
            torch.linalg.matrix_norm(got[f"{m.name}.weight"].double() - after[f"{m.name}.weight"].double())
            / torch.linalg.matrix_norm(after[f"{m.name}.weight"].double() - before[f"{m.name}.weight"].double())
        )
        for m in report.modules
    }


def damage(folder: str, edit) -> None:
    """Call ``edit`` with the tensors of a checkpoint in one file, and write what it has made of them."""
    path = Path(folder, "model.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
