"""What the task files of this folder call: prompts, the generated problems, and judging."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `lm_eval --include_path eval/tasks` does not have this repository's modules on its path.
sys.path.append(str(Path(__file__).parents[2]))

from datasets import DatasetDict

from eval.answers import Verdict, judge_expression, judge_number, judge_paper
from recipes.data import ALPACA_PROMPT
from recipes.problems import problems


def alpaca_prompt(doc: dict[str, Any]) -> str:
    """Return GSM8K's ``question`` or MATH's ``problem`` in the prompt that MetaMathQA models are trained on."""
    instruction = doc.get("question", doc.get("problem"))
    if instruction is None or "answer" not in doc:
        raise KeyError(f"a row has {', '.join(doc)}; expected question (GSM8K) or problem (MATH), and answer")
    return ALPACA_PROMPT.format(instruction=instruction)


def generated(size: int, seed: int, train_size: int, train_seed: int, **metadata: Any) -> DatasetDict:
    """Return ``size`` problems of the quickstart's kind, none of which it trains on."""
    return DatasetDict(test=problems(size, seed=seed, exclude=problems(train_size, seed=train_seed)))


def _verdict(judge: Callable[[str, str], Verdict], doc: dict[str, Any], results: list[str]) -> Verdict:
    """Return what a judge says of the completion. The answer of a JSON row may be a number."""
    if doc.get("answer") is None:
        raise ValueError(f"a row has {', '.join(doc)} and no answer; expected the reference in answer")
    return judge(results[0], str(doc["answer"]))


def judge_gsm8k(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Judge by the number's value, and as earlier work's extractor would have it."""
    return judge_generated(doc, results) | {"exact_match_paper": _verdict(judge_paper, doc, results).correct}


def judge_generated(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    correct, answered = _verdict(judge_number, doc, results)
    return {"exact_match": correct, "answered": answered}


def judge_math(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    correct, answered = _verdict(judge_expression, doc, results)
    return {"exact_match": correct, "answered": answered}
