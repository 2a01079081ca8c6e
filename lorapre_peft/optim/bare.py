"""Which parameters are plainly embeddings or heads, for optimizers that are given parameters without a word about
them.

`create_lorapre_optimizer` knows the model; tools that are told a class path pass ``model.parameters()`` and know
nothing.
"""

from __future__ import annotations

import re

import torch

# A vocabulary has at least about 30,000 tokens (BERT 30,522; T5 32,128; Llama 32,000), and the hidden size is at least
# a few hundred and at most a fifth of it. An MLP of a 70B model, 28,672 × 8,192, is no more than 3.5 times as long as
# wide, Gemma-7B's, 24,576 × 3,072, is 8 times but shorter, and the rank of an adapter's matrix is lower.
VOCABULARY = 30_000
HIDDEN = 300
RATIO = 5
# Parts of names of embeddings and heads, as models of transformers, timm, torchtune, litgpt and nanoGPT have them.
_NAMES = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|embed_out|output_layer|output|shared)\.(weight|bias)$")


def is_embedding(name: str | None, shape: torch.Size) -> bool:
    """Whether a parameter is plainly an embedding or an output head, by its name if that is known, and by its shape.

    By its shape it is one if its longer side is at least `VOCABULARY`, its shorter one at least `HIDDEN` and at most a
    `RATIO`-th of it.
    """
    if len(shape) != 2:
        return False
    if name is not None and ".lora_" in name:
        return False
    if name is not None and _NAMES.search(name):
        return True
    short, long = sorted(shape)
    return long >= VOCABULARY and short >= HIDDEN and RATIO * short <= long


def describe_choice(ranks: set[int], spared: list[tuple[int, ...]]) -> str:
    """Say at which momentum ranks matrices are compressed, if none was given, which shapes are spared, and how to
    choose.
    """
    at = f"are compressed at the momentum ranks {sorted(ranks)}, as none was given" if ranks else "are compressed"
    but = (
        f"; {len(spared)} that look like embeddings or heads, such as {spared[0]}, take the AdamW path"
        if spared
        else ""
    )
    return (
        f"matrices {at}{but}. To choose, give momentum_rank (in a group: its matrices whatever they look like; 0: the "
        "AdamW path), or build the optimizer with create_lorapre_optimizer(model, …), which knows the modules"
    )
