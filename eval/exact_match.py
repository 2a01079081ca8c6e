"""This module generates answers with a model in memory, and judges them by an `evaluate` metric."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eval.answers import JUDGES


class ExactMatch(evaluate.Metric):
    """Computes the shares of completions that are right, and that give an answer where it was asked for.

    The configuration names the judge, as in ``ExactMatch("number")``: ``"number"``, ``"expression"`` or ``"paper"``
    (`eval.answers`). ``compute(predictions=completions, references=solutions_or_answers)`` returns ``exact_match`` and
    ``answered``, each from 0 to 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in JUDGES:
            raise ValueError(f"no judge {self.config_name!r}: expected one of {', '.join(JUDGES)}")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        verdicts = [
            JUDGES[self.config_name](completion, reference) for completion, reference in zip(predictions, references)
        ]
        return {
            "exact_match": sum(verdict.correct for verdict in verdicts) / len(verdicts),
            "answered": sum(verdict.answered for verdict in verdicts) / len(verdicts),
        }


def without_own_decoding(config: GenerationConfig) -> GenerationConfig:
    """Return the special tokens of a model's generation config alone.

    What else a model is saved with, such as beams, a repetition penalty or a number of tokens, would decode otherwise
    than the caller says.
    """
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: str,
    progress: str = "generating",
) -> list[str]:
    """Return greedy completions in the order of the prompts, without special tokens.

    Args:
        model, tokenizer: causal language model and its tokenizer.
        prompts: prompts, in any order.
        max_new_tokens: largest number of tokens of a completion.
        batch_size: number of prompts at a time.
        stop: text at which a completion is cut off, such as the beginning of the next problem.
        progress: text of the progress bar.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # Similar lengths need less padding.
    completions = [""] * len(prompts)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training, decoding = model.training, base.generation_config
    base.generation_config = without_own_decoding(decoding)
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
            completions[i] = text.partition(stop)[0]
    model.train(was_training)
    base.generation_config = decoding
    return completions
