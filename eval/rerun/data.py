"""Data of suites: training, validation and test rows in TRL's prompt/completion form, and problems to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset

from eval.exact_match import ExactMatch
from recipes.data import ALPACA_PROMPT, load_data
from recipes.problems import problems

# Of the held-out sets, the same ones for every run; runs' own seeds are small numbers.
_VALIDATION_SEED, _TEST_SEED = 1_000_001, 1_000_002


@dataclass(frozen=True)
class Problems:
    """Rows with ``prompt`` and ``answer``, how answers are judged (`eval.answers.JUDGES`), and how long they may be."""

    rows: Dataset
    judge: str
    max_new_tokens: int

    def score(self, completions: Sequence[str], answers: Sequence[str]) -> float:
        """The share that is right."""
        found = ExactMatch(self.judge).compute(predictions=list(completions), references=list(answers))
        return found["exact_match"]


@dataclass(frozen=True)
class Splits:
    """train: the rows of one run. validation, test: for losses. problems: sets to answer, by the name of their metric."""

    train: Dataset
    validation: Dataset
    test: Dataset
    problems: dict[str, Problems]


def load_splits(data: dict[str, Any], rows: int, seed: int) -> Splits:
    """The data that a suite names, with ``rows`` training rows. Raises ValueError for a source that is not in `SOURCES`."""
    options = dict(data)
    source = options.pop("source")
    if source not in SOURCES:
        raise ValueError(f"data source {source!r}: expected one of {', '.join(SOURCES)}")
    return SOURCES[source](rows, seed, **options)


def _generated(rows: int, seed: int, validation: int, test: int) -> Splits:
    """Problems by reasoning-gym, all different: held-out sets that every run shares, training rows by the run's seed."""
    held_out = problems(validation, _VALIDATION_SEED)
    tested = problems(test, _TEST_SEED, exclude=held_out)
    train = problems(rows, seed, exclude=concatenate_datasets([held_out, tested]))
    return Splits(train, held_out, tested, {"accuracy": Problems(tested, "number", max_new_tokens=160)})


def _metamath(
    rows: int,
    seed: int,
    validation: int,
    test: int,
    metamath: str = "meta-math/MetaMathQA",
    gsm8k: str = "openai/gsm8k",
    math500: str = "HuggingFaceH4/MATH-500",
) -> Splits:
    """The paper's fine-tuning data: the same rows for every seed, which shuffles them; hub ids or local folders."""

    def asked(dataset: Dataset, question: str, judge: str) -> Problems:
        prompts = [ALPACA_PROMPT.format(instruction=text) for text in dataset[question]]
        kept = Dataset.from_dict({"prompt": prompts, "answer": dataset["answer"]})
        return Problems(kept, judge, max_new_tokens=512)

    data = load_data(metamath, {"train": rows, "validation": validation, "test": test})
    return Splits(
        data["train"],
        data["validation"],
        data["test"],
        {
            "gsm8k": asked(load_dataset(gsm8k, "main", split="test"), "question", "number"),
            "math500": asked(load_dataset(math500, split="test"), "problem", "expression"),
        },
    )


SOURCES = {"generated": _generated, "metamath": _metamath}
