"""Exact match on problems whose answer is a number: generate, extract, compare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def extract_number(text: str) -> Decimal | None:
    """The first number after the last ``####``; without one, the last number of the text; None if there is none.

    Signs, decimals and thousands separators are read; units and currency around the number are ignored.
    """
    _, marker, tail = text.rpartition("####")
    numbers = NUMBER.findall(tail if marker else text)
    if not numbers:
        return None
    return Decimal((numbers[0] if marker else numbers[-1]).replace(",", ""))


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str = "generating",
) -> list[str]:
    """Greedy completions, without special tokens, in the order given."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: less padding
    completions = [""] * len(prompts)
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc=progress):
        batch = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True)):
            completions[i] = text
    model.train(was_training)
    return completions


def accuracy(completions: Sequence[str], answers: Sequence[str]) -> float:
    """Share of completions whose extracted number equals the answer's."""
    right = [extract_number(text) == Decimal(answer.replace(",", "")) for text, answer in zip(completions, answers)]
    return sum(right) / len(right)


def answered(completions: Sequence[str]) -> float:
    """Share of completions that end as a worked solution should: with ``####`` and a number."""
    return sum("####" in text and extract_number(text) is not None for text in completions) / len(completions)
