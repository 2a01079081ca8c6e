"""Offline fixtures: a Llama of a few thousand weights and a character-level tokenizer."""

import os

# Before transformers and huggingface_hub are imported: nothing in these tests may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 64
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def build_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**(sizes | tokens | {"num_hidden_layers": 2, "max_position_embeddings": 64} | config))
    )
    return model.to(dtype)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """make_llama(seed=0, dtype=torch.float32, **config): a tiny random Llama; equal arguments give equal weights."""
    return build_llama


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, so that no vocabulary has to be trained or downloaded."""
    characters = [*string.ascii_lowercase, *string.digits, *" .,:;!?'\n-+=()"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    assert len(vocab) <= VOCAB_SIZE
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory, tokenizer) -> Path:
    """Folder of a saved tiny Llama and its tokenizer, for what loads models by path (SFTTrainer, plain PEFT)."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    """Four sequences of 16 tokens with their labels."""
    ids = torch.randint(len(SPECIAL), VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}
