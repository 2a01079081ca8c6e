"""Offline fixtures: a Llama of a few thousand weights and a character-level tokenizer."""

import os

# Before transformers and huggingface_hub are imported: nothing in these tests may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch

# Before triton is imported, which decides then: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import functools
import gc
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from adapting import adapted
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorapre_peft import LoRAPreConfig
from lorapre_peft.kernels import choose as backends

VOCAB_SIZE = 64
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def pytest_collection_finish():
    """Modules stay: Trainer and accelerate collect garbage several times a run, and would walk through all that was
    imported each time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Or Triton's bindings list at the end what they think has leaked."""
    gc.unfreeze()


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


@pytest.fixture(scope="module")
def tokens() -> list[dict[str, list[int]]]:
    """24 sequences of 12 tokens, each with its labels."""
    ids = torch.randint(4, 64, (24, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture(scope="module")
def texts() -> Dataset:
    return Dataset.from_dict({"text": [f"{a} + {b} = {a + b}." for a in range(6) for b in range(4)]})


@pytest.fixture
def peft_model(make_llama):
    """peft_model(**options of LoRAPreConfig): a fresh tiny Llama with a LoRA-Pre adapter."""

    def build(autocast_adapter_dtype=True, dtype=torch.float32, **options):
        config = LoRAPreConfig(**({"r": 8, "target_modules": "all-linear"} | options))
        model = get_peft_model(make_llama(dtype=dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
        # Trainer resumes with PEFT's default, which would turn a bf16 adapter into a float32 one.
        model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=autocast_adapter_dtype)
        return model

    return build


@pytest.fixture
def two_adapters(make_llama) -> PeftModel:
    """Adapter "default" with r=8 and k=2, adapter "second" with r=16 and k=5."""
    model = adapted(make_llama(), momentum_rank=2)
    model.add_adapter("second", LoRAPreConfig(r=16, target_modules=["q_proj", "v_proj"], momentum_rank=5))
    return model


@pytest.fixture
def checkpoint_pair(tmp_path, make_llama):
    """checkpoint_pair(change, **config): a tiny Llama in tmp_path/base, and in tmp_path/tuned with every change(name,
    parameter, generator).
    """

    def save(change, model=None, *, dtype=torch.float32, max_shard_size="5GB", **config) -> tuple[str, str]:
        model = model or make_llama(dtype=dtype, **config)
        model.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            delta = change(name, parameter, generator)
            if delta is not None:
                parameter.data = (parameter.data.float() + delta).to(dtype)
        model.save_pretrained(tmp_path / "tuned", max_shard_size=max_shard_size)
        return str(tmp_path / "base"), str(tmp_path / "tuned")

    return save


@pytest.fixture
def fresh_backends(monkeypatch):
    """Backends are made once in a process; not for this test."""
    for name in ("_made", "choose"):
        monkeypatch.setattr(backends, name, functools.cache(getattr(backends, name).__wrapped__))
