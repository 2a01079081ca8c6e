"""This module builds a byte-level Llama of one million weights, and batches of text to train it on.

They stand in for a pretrained model and your data. With them the examples run offline on a CPU in less than a minute.
For a real run write ``AutoModelForCausalLM.from_pretrained(…)`` and your own batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 64


def build_model() -> LlamaForCausalLM:
    """Return a float32 Llama with random weights, whose tokens are bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, tie_word_embeddings=False, **sizes)
    )


def text() -> Tensor:
    """Return the bytes of Python's language reference, which is part of Python's own help: int64 [about 700,000]."""
    return torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()


def batches(steps: int, batch_size: int = 16) -> Iterator[dict[str, Tensor]]:
    """Yield ``steps`` batches of random passages, as transformers' models take them.

    Each has input_ids and labels, int64 [batch_size, LENGTH].
    """
    data, generator = text(), torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(data) - LENGTH, (batch_size,), generator=generator)
        ids = torch.stack([data[start : start + LENGTH] for start in starts])
        yield {"input_ids": ids, "labels": ids}
