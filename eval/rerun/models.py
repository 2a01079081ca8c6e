"""This module loads the base models of suites.

These are the models of the recipes, Llamas that a recipe pre-trains if they are missing, and a tiny random one that
tests the machinery.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path

import torch
import yaml
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lorapre_peft.memory.models import find_config
from recipes import pretrain
from recipes.arguments import CONFIGS, with_bases
from recipes.models import load_model
from recipes.sources import SMOLLM2
from recipes.training import changed_options

RANDOM = "random"
_RANDOM_CONFIG = LlamaConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=256,
    eos_token_id=257,
    bos_token_id=None,
)


# The configs in `recipes/configs/pretrain` say the shape of these models.
SHAPES = {
    **{name: f"{name.replace('-', '_')}_local" for name in ("llama-1m", "llama-4m")},
    **{name: f"{name.replace('-', '_')}_c4" for name in ("llama-60m", "llama-130m", "llama-350m", "llama-1b")},
}
# Suites fine-tune these models. Each has the name of its config in `recipes/configs/pretrain` and of its folder in
# `runs`.
CHECKPOINTS = {"llama-4m": "llama_4m_adamw"}
# These are their held-out losses. Each machine rounds otherwise, which is of no account: with the models that an Intel
# Xeon and an AMD EPYC had made, the test losses of eight LoRA runs of `finetune-small` differed by 0.0002 at most.
# Another text, or packages that compute otherwise, would make a model that this tells from these.
HELD_OUT_LOSSES = {"llama_4m_adamw": 3.575}
_LOSS_TOLERANCE = 0.005
_RUNS = Path(__file__).parents[2] / "runs"


def make_base(name: str) -> dict[str, str]:
    """Pre-train a model of `CHECKPOINTS` if its folder does not hold it, or go on with a run that was stopped.

    Returns the first digits of the SHA-256 of its weights by its name, for the report. For other models, which have
    only to be read, the result is empty. Raises ValueError if the folder holds a model that was made with other
    options, or whose held-out loss is not that of `HELD_OUT_LOSSES`.
    """
    if name not in CHECKPOINTS:
        return {}
    folder, config = _folder(name), CONFIGS / "pretrain" / f"{CHECKPOINTS[name]}.yaml"
    argv = ["--config", str(config), "--output_dir", str(folder), "--resume"]
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # Of several commands the first one makes it.
        if not (folder / "all_results.json").exists():  # It is written after the model.
            print(f"{name} is missing: python -m recipes.pretrain {' '.join(argv)}")
            pretrain.main(argv)
        elif changed := changed_options(folder, pretrain.parse(argv).config):
            raise ValueError(f"{folder} was made with other options: {', '.join(changed)}. Delete it to make it anew")
    loss = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))["eval_loss"]
    expected = HELD_OUT_LOSSES.get(CHECKPOINTS[name], loss)
    if abs(loss - expected) > _LOSS_TOLERANCE:
        raise ValueError(
            f"{folder} has the held-out loss {loss:.4f}, expected {expected} ± {_LOSS_TOLERANCE}: runs from it cannot "
            "be compared with recorded ones. Install the versions of constraints.txt, and delete it to make it anew"
        )
    return {name: hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]}


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base model and its tokenizer.

    name: ``"random"``, a model that `make_base` has made, or one that `recipes.models.load_model` knows. A folder or a
    model of the hub is in the dtype in which it was saved, and all others are in float32.
    """
    if name == RANDOM:
        return _random_model()
    if name in CHECKPOINTS:
        model, tokenizer = load_model(str(_folder(name)))
        tokenizer.backend_tokenizer.post_processor = None  # It closes every text, but a prompt goes on.
        return model, tokenizer
    return load_model(name, torch.float32 if name == SMOLLM2 else None)


def _folder(name: str) -> Path:
    return _RUNS / CHECKPOINTS[name]


def base_config(name: str) -> PretrainedConfig:
    """Return the config of a suite's model. Its weights are read only if nothing else has the config."""
    if name == RANDOM:
        return copy.deepcopy(_RANDOM_CONFIG)  # Whoever trains it sets its vocabulary.
    if name in SHAPES:
        path = CONFIGS / "pretrain" / f"{SHAPES[name]}.yaml"
        said = with_bases(yaml.safe_load(path.read_text(encoding="utf-8")))
        shape = {f.name: said[f.name] for f in dataclasses.fields(pretrain.LlamaArguments) if f.name in said}
        return pretrain.LlamaArguments(**shape).config(vocab_size=said["vocab_size"])
    return load_model(name)[0].config if name == SMOLLM2 else find_config(name)[0]


def _random_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a Llama of 30,000 weights, always the same ones, and a tokenizer of one token for each byte."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(base_config(RANDOM))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<pad>", "</s>"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return model, PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
