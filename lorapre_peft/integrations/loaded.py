"""This module restores what Trainer leaves out when it loads a checkpoint."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


def calls_of(kind: type) -> Iterator[dict[str, Any]]:
    """Yield the local variables of the callers that are methods of a class's objects, the nearest first."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            yield frame.f_locals
        frame = frame.f_back


def resumed_from() -> str | None:
    """Return the checkpoint that a trainer among the callers has loaded, or None."""
    from transformers import Trainer  # It is imported here because it brings in datasets.

    found = (variables.get("resume_from_checkpoint") for variables in calls_of(Trainer))
    return next((os.fspath(checkpoint) for checkpoint in found if isinstance(checkpoint, (str, os.PathLike))), None)


def complete_loaded(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Give a model that Trainer has loaded from a checkpoint what Trainer leaves out.

    Sharded parameters, which Trainer loads in another way, are left alone.
    """
    _load_renamed(model, Path(checkpoint))
    _restore_adapter_dtypes(model, Path(checkpoint))


def _load_renamed(model: nn.Module, checkpoint: Path) -> None:
    """Load what a file holds under other names than the model, such as each matrix of a mixture's stacked experts.

    Trainer looks for the model's own names in the file, and would leave these parameters as they were before.
    """
    whole = any((checkpoint / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if not (whole and isinstance(model, PreTrainedModel)):
        return
    from .checkpoint import Checkpoint  # It is imported here, as it brings in the rules of all architectures.

    saved = Checkpoint(checkpoint)
    left_out = {name: param for name, param in model.named_parameters() if name not in saved.files}
    if not left_out:
        return
    saved.rename(model)
    with torch.no_grad():
        for name, param in left_out.items():
            if isinstance(param, DTensor):
                continue
            if name in saved.fused or saved.key(name) is not None:
                param.copy_(saved.tensor(name))
            elif param.requires_grad:
                warnings.warn(
                    f"{checkpoint} holds {name} in a form that Trainer does not load: it stays as the model had it "
                    "before. Build the model by from_pretrained of that checkpoint, then resume",
                    stacklevel=2,
                )


def _restore_adapter_dtypes(model: nn.Module, checkpoint: Path) -> None:
    """Give the active adapter the half precision in which it was saved. PEFT makes float32 of it as it loads it."""
    adapter = getattr(model, "active_adapter", None)
    if not isinstance(adapter, str):
        return
    path = checkpoint / ("" if adapter == "default" else adapter) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    with safe_open(path, "pt") as file:
        saved = {key: HALF.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    for name, param in model.named_parameters():
        key = re.sub(rf"\.{re.escape(adapter)}(?=\.|$)", "", name)
        dtype = saved.get(key) or saved.get(key.removesuffix(".weight"))
        if dtype is not None and param.dtype == torch.float32 and not isinstance(param, DTensor):
            param.data = param.data.to(dtype)
