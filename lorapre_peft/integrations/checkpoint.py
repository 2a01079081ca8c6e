"""This module reads a model's safetensors, one tensor at a time, under the names that the model itself uses."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .architecture import architecture
from .targets import expert_parameters


class Checkpoint:
    """Reads the weights of a folder or of a cached hub model, in one file or in shards, each tensor when asked for.

    Raises ValueError if there is no such folder or cached model, or its safetensors are not there or not whole.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path, self.folder = str(path), Path(path)
        if not self.folder.is_dir():
            try:
                self.folder = Path(snapshot_download(self.path, local_files_only=True))
            except (LocalEntryNotFoundError, HFValidationError) as error:
                raise ValueError(
                    f"{self.path} is neither a folder nor a model in the local hub cache, and nothing is downloaded "
                    "here: pass a folder, or fetch the model first with `hf download`"
                ) from error
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        if (self.folder / SAFE_WEIGHTS_NAME).is_file():  # from_pretrained prefers it to an index, which may be older.
            names = {SAFE_WEIGHTS_NAME}
        elif index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            advice = "write the model again with save_pretrained"
            if (self.folder / ADAPTER_CONFIG_NAME).is_file():
                advice = "it holds an adapter; give the folder of a whole model"
            elif inside := [path.name for path in self.folder.glob("checkpoint-*")]:
                advice = f"give a checkpoint in it, such as {inside[0]}"
            raise ValueError(f"{self.path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: {advice}")
        absent = sorted(name for name in names if not (self.folder / name).is_file())
        if absent:
            raise ValueError(
                f"{self.path} lacks {', '.join(absent)}, which its index names: copy or download all of it"
            )
        self.files = {key: name for name in sorted(names) for key in self._keys(name)}

    def _keys(self, name: str) -> list[str]:
        """Return the names of the tensors of a file. Raises ValueError if it is not whole."""
        try:
            with safe_open(self.folder / name, "pt") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.folder / name} cannot be read ({error}): copy or download it again") from error

    def skeleton(self) -> transformers.PreTrainedModel:
        """Return the model on the meta device, which shows the names of its tensors and which are of linear modules.

        Raises ValueError if there is no configuration, or if it is of a quantised model or not of one of transformers.
        """
        if not (self.folder / CONFIG_NAME).is_file():
            raise ValueError(f"{self.path} has no {CONFIG_NAME}, which says what its tensors are: copy the model's")
        config = transformers.AutoConfig.from_pretrained(self.folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{self.path} is quantised, and its codes cannot be compared: dequantise it first")
        try:
            model_class = architecture(config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        with torch.device("meta"):
            return model_class(config)

    def rename(self, model: transformers.PreTrainedModel) -> None:
        """Fill in ``keys``, {name in the model: name in the file}, by the rules of from_pretrained.

        Files hold stacked experts matrix by matrix. In ``keys`` a stack's name in the model maps to the name of its
        first matrix. ``fused`` holds the converter that assembles each stack, and its parts' names and patterns.
        """
        self.model = model
        conversions = get_model_conversion_mapping(model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        known, prefix = model.state_dict(), model.base_model_prefix
        # These are, for example, buffers that older versions saved. from_pretrained ignores them too.
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
        self.keys: dict[str, str] = {}
        self.fused: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        stacks = expert_parameters(model)
        for key in sorted(self.files, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if pattern is not None and name in stacks and len(by_pattern[pattern].target_patterns) == 1:
                self.fused.setdefault(name, (by_pattern[pattern], []))[1].append((key, pattern))
                self.keys.setdefault(name, key)
                continue
            if pattern is not None:  # The model fuses several such tensors. Each keeps its stored name here.
                name = key
            if name in known or not any(re.search(pattern, name) for pattern in ignored):
                self.keys[name] = key
        self.tied = model.all_tied_weights_keys
        for name, source in self.tied.items():
            if name in self.keys and source not in self.keys:  # It is stored once, under the other name.
                self.keys[source] = self.keys.pop(name)

    def key(self, name: str) -> str | None:
        """Return the stored name of a tensor, or of the tensor to which it is tied, or None if neither is stored."""
        return self.keys.get(name) or self.keys.get(self.tied.get(name, ""))

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, under the model's name for it, from the disk."""
        if name in self.fused:
            converter, parts = self.fused[name]
            converter = copy.deepcopy(converter)
            for part, pattern in parts:
                # Besides the futures of its annotation, transformers takes a function, which it calls.
                read = cast(Future, functools.partial(self._stored, part))
                converter.add_tensor(name, part, pattern, read)
            return converter.convert(name, model=self.model, config=self.model.config)[name]
        key = self.key(name)
        assert key is not None, f"{name} is not stored: `common_names` has left it out"
        return self._stored(key)

    def _stored(self, key: str) -> Tensor:
        with safe_open(self.folder / self.files[key], "pt") as file:
            return file.get_tensor(key)


def common_names(before: Checkpoint, after: Checkpoint, model: transformers.PreTrainedModel) -> list[str]:
    """Return the names of the tensors of two checkpoints of a model, layer by layer.

    Raises ValueError if one of the checkpoints lacks any of them.
    """
    before.rename(model)
    after.rename(model)
    # A tied tensor counts once, under its source's name, unless the second checkpoint untied it.
    names = (before.keys.keys() - model.all_tied_weights_keys.keys()) | after.keys.keys()
    for checkpoint in (before, after):
        missing = sorted((name for name in names if checkpoint.key(name) is None), key=dot_natural_key)
        if missing:
            raise ValueError(
                f"{checkpoint.path} lacks {len(missing)} tensors of the other checkpoint, such as "
                f"{', '.join(missing[:3])}: both must be whole checkpoints of one {type(model).__name__}"
            )
    return sorted(names, key=dot_natural_key)
