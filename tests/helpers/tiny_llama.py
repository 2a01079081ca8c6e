"""This module builds a Llama of a few thousand weights, whose vocabulary is that of a tokenizer of characters."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 64
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def build_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> LlamaForCausalLM:
    """Return a tiny random Llama. Equal arguments give equal weights. ``config`` overrides its configuration."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**(sizes | tokens | {"num_hidden_layers": 2, "max_position_embeddings": 64} | config))
    )
    return model.to(dtype)
