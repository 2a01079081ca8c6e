"""This module recognizes embeddings and heads among bare parameters, of which an optimizer is told nothing else.

`create_lorapre_optimizer` knows the model. Tools that are configured with a class path pass ``model.parameters()`` and
tell the optimizer nothing about the modules.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A vocabulary has at least about 30,000 tokens (BERT 30,522; T5 32,128; Llama 32,000), and the hidden size is at least
# a few hundred and at most a fifth of it. Most other matrices differ: an MLP of a 70B model, 28,672 × 8,192, is only
# 3.5 times as long as wide; that of Gemma-7B, 24,576 × 3,072, is 8 times as long as wide, but shorter than a
# vocabulary; and the rank of most adapters is below these hidden sizes. Those that do not, such as the MLP of
# Gemma-2-27B, 36,864 × 4,608, are in every layer, whereas a model has one embedding and one head.
VOCABULARY = 30_000
HIDDEN = 300
RATIO = 5
MOST_ALIKE = 2
# Models of transformers, timm, torchtune, litgpt and nanoGPT name their embeddings and heads like this. What has the
# number of a layer before its name is neither, such as the output of an attention.
_NAMES = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|embed_out|output_layer|output|shared)\.(weight|bias)$")


def is_embedding(name: str | None, shape: torch.Size, alike: int = 1) -> bool:
    """Return whether a parameter is plainly an embedding or an output head, by its name, if known, or by its shape.

    By its shape it is one if its longer side is at least `VOCABULARY`, its shorter side is at least `HIDDEN` and at
    most a `RATIO`-th of the longer one, and at most `MOST_ALIKE` parameters have that shape.

    alike: number of parameters of this shape in the group.
    """
    if len(shape) != 2:
        return False
    if name is not None and ".lora_" in name:
        return ".lora_embedding_A" in name
    if name is not None and _NAMES.search(name) and not re.search(r"\.\d+\.", name):
        return True
    short, long = sorted(shape)
    return long >= VOCABULARY and short >= HIDDEN and RATIO * short <= long and alike <= MOST_ALIKE


def warn_of_choice(
    groups: list[dict[str, Any]], ranks: Callable[[Tensor, dict[str, Any]], tuple[int, ...]], stacklevel: int
) -> None:
    """Warn if nobody said which matrices are compressed, and at which rank, or if none of them is.

    groups: groups of an optimizer. ranks: its method of that name.
    """
    given = [(param, group) for group in groups for param in group["params"]]
    chosen = {rank for param, group in given if group["momentum_rank"] is None for rank in ranks(param, group)[:1]}
    compressing = [group for group in groups if group["momentum_rank"] != 0]
    spared = [tuple(group["params"][i].shape) for group in compressing for i in group["uncompressed"]]
    if chosen or spared:
        warnings.warn(_describe_choice(chosen, spared), stacklevel=stacklevel)
    asked = {group["momentum_rank"] for group in compressing} - {None}
    matrices = [tuple(param.shape) for param, _ in given if param.ndim >= 2]
    if asked and matrices and not spared and not any(ranks(param, group) for param, group in given):
        warnings.warn(_describe_nothing(min(asked), matrices), stacklevel=stacklevel)


def _describe_choice(ranks: set[int], spared: list[tuple[int, ...]]) -> str:
    """Return a message with the momentum ranks that were chosen as none was given, and with how to choose others.

    ranks: the chosen ranks. spared: the shapes of the matrices that look like embeddings or heads.
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


def _describe_nothing(momentum_rank: int, matrices: list[tuple[int, ...]]) -> str:
    """Return a message that no matrix is compressed. momentum_rank: the one that was given. matrices: their shapes."""
    return (
        f"momentum_rank={momentum_rank} compresses none of {len(matrices)} matrices, such as {matrices[0]}: all take "
        "the AdamW path, since factors of that rank are not smaller. Give a momentum_rank below their smaller sides"
    )
