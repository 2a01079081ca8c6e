"""This module makes a model that takes no memory, from a module, a config, a folder, a built-in shape or a hub id."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from ..integrations.architecture import architecture

# These are public shapes of models, most of them gated, so that an estimate needs no account and no network. Those of
# Llama 2 are from params.json of Meta's release, with the MLP's width from the formula of transformers'
# convert_llama_weights_to_hf.py. Those of Llama 3.1 are from Table 3 of "The Llama 3 Herd of Models" (arXiv
# 2407.21783). That of SmolLM2 is from config.json of its release. A test compares their parameter counts with those on
# the models' hub pages.
_LLAMA_2: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
}


def _shape(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> dict[str, Any]:
    return dict(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7b-hf": _LLAMA_2 | _shape(4096, 11008, 32, 32),
    "Llama-2-13b-hf": _LLAMA_2 | _shape(5120, 13824, 40, 40),
    "Llama-2-70b-hf": _LLAMA_2 | _shape(8192, 28672, 80, 64) | {"num_key_value_heads": 8},
    "Llama-3.1-8B": _LLAMA_3 | _shape(4096, 14336, 32, 32),
    "Llama-3.1-70B": _LLAMA_3 | _shape(8192, 28672, 80, 64),
    "SmolLM2-135M": _shape(576, 1536, 30, 9)
    | {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True},
}


def find_config(name: str | os.PathLike[str]) -> tuple[PretrainedConfig, str]:
    """Return a model's config and the place where it was found: a folder or file, a built-in shape, or the hub.

    Raises ValueError if it is in none of these places.
    """
    name = os.fspath(name)
    if Path(name).exists():
        try:
            return AutoConfig.from_pretrained(name), "local config"
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name!r} exists but holds no config that transformers can read ({_first_line(error)}): give the "
                "folder of a saved model, or its config.json"
            ) from error
    short = name.removeprefix("meta-llama/").removeprefix("HuggingFaceTB/")
    if short in SHAPES:
        return LlamaConfig(**SHAPES[short]), "built-in shape, nothing downloaded"
    try:
        return AutoConfig.from_pretrained(name), "config from the hub or its cache"
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no local folder or config.json and no built-in shape, and the hub gave no config "
            f"({_first_line(error)}). Without a network, give the folder of a saved model, its config.json, or one of "
            f"{', '.join(SHAPES)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def meta_model(
    model: nn.Module | PretrainedConfig | str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Return a model of the same shapes on the meta device, where tensors have no data. The argument is not changed.

    The copy of a module keeps its dtypes, adapters, tied weights and frozen parameters. A model built from a config
    has ``dtype`` and the class that the config names (`architecture`). Raises ValueError as `find_config` and
    `architecture` raise it.
    """
    if isinstance(model, nn.Module):
        # Only the tensors are replaced. deepcopy finds them in the memo, and copies everything around them.
        memo: dict[int, object] = {}
        for param in model.parameters():
            empty = torch.empty_like(param.detach(), device="meta")
            memo[id(param)] = nn.Parameter(empty, requires_grad=param.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        return copy.deepcopy(model, memo)
    config = copy.deepcopy(model) if isinstance(model, PretrainedConfig) else find_config(model)[0]
    with torch.device("meta"):
        return architecture(config)._from_config(config, dtype=dtype)


def quantization_bytes(model: nn.Module) -> int:
    """Return the bytes of the scales and code books beside bitsandbytes' 4-bit weights, each storage once."""
    found: dict[int, int] = {}
    states = [getattr(param, "quant_state", None) for param in model.parameters()]
    while states:
        state = states.pop()
        for value in vars(state).values() if state is not None else ():
            if isinstance(value, Tensor):
                found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
            elif hasattr(value, "absmax"):  # These are the scales of scales that are quantized themselves.
                states.append(value)
    return sum(found.values())


def training_batch(model: Any, batch: int, seq_len: int) -> dict[str, Tensor]:
    """Return the arguments of one training step of a meta model: text without padding, images, or sound features.

    Images and sound features have the size in the model's config. A model for text and images gets only text. Labels
    are a class for each sequence or image, or a token for each position.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", "input_ids")
    tokens = torch.zeros(batch, seq_len, dtype=torch.long, device="meta")
    classes = type(model).__name__.endswith(("SequenceClassification", "ImageClassification"))
    inputs = {"labels": tokens[:, 0] if classes else tokens}
    # This is an expanded four-dimensional mask of one byte. Without a mask, transformers would look for padding and
    # packed sequences in the values, which meta tensors do not have.
    mask = torch.ones(1, dtype=torch.bool, device="meta").expand(batch, 1, seq_len, seq_len)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_attention_mask"] = mask
    if main == "pixel_values":
        sides = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        shape = (batch, config.num_channels, *sides)
    elif main == "input_features":
        shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)  # Whisper halves the frames.
    else:
        return {"input_ids": tokens, "attention_mask": mask, **inputs}
    return {main: torch.zeros(shape, dtype=model.dtype, device="meta"), **inputs}
