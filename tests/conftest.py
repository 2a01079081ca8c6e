"""This module holds the fixtures of all tests: tiny Llamas, a tokenizer and tokens. No fixture needs the network."""

import os

# This comes before transformers and huggingface_hub are imported. No test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch

# This comes before triton is imported, which reads the variable only then. Without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import functools
import gc
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from adapting import adapted
from peft import PeftModel, get_peft_model
from tiny_llama import SPECIAL, VOCAB_SIZE, build_llama
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lorapre_peft import LoRAPreConfig


def pytest_collection_finish():
    """Exclude all that was imported from garbage collection.

    Trainer and accelerate collect garbage several times a run, and would walk through all imported modules each time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Undo the exclusion. Otherwise Triton's bindings list at exit what they take for leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Return make_llama(seed=0, dtype=torch.float32, **config), which builds a tiny random Llama (`build_llama`)."""
    return build_llama


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, so that no vocabulary has to be trained or downloaded."""
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
    """Return the folder of a saved tiny Llama and its tokenizer.

    It is for what loads models by path, such as SFTTrainer and plain PEFT.
    """
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    """Return four sequences of 16 tokens with their labels: int64 [4, 16] each."""
    ids = torch.randint(len(SPECIAL), VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def tokens() -> list[dict[str, list[int]]]:
    """Return a dataset of 24 sequences of 12 tokens, each with its labels."""
    ids = torch.randint(4, 64, (24, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def peft_model(make_llama):
    """Return peft_model(**options), which builds a tiny Llama with a LoRA-Pre adapter.

    The options are those of LoRAPreConfig, and autocast_adapter_dtype and the model's dtype.
    """

    def build(autocast_adapter_dtype=True, dtype=torch.float32, **options):
        config = LoRAPreConfig(**({"r": 8, "target_modules": "all-linear"} | options))
        model = get_peft_model(make_llama(dtype=dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
        # Trainer resumes with PEFT's default, which would turn a bfloat16 adapter into a float32 one.
        model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=autocast_adapter_dtype)
        return model

    return build


@pytest.fixture
def two_adapters(make_llama) -> PeftModel:
    """Return a model with adapter "default" of r=8 and k=2, and adapter "second" of r=16 and k=5."""
    model = adapted(make_llama(), momentum_rank=2)
    model.add_adapter("second", LoRAPreConfig(r=16, target_modules=["q_proj", "v_proj"], momentum_rank=5))
    return model
