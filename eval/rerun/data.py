"""Load the data of suites: rows to train on and to measure losses by, in TRL's prompt/completion form, and
problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets

from eval.answers import JUDGES
from recipes.data import ALPACA_PROMPT, ALPACA_STOP, load_data
from recipes.problems import STOP, problems
from recipes.sources import read_split

# Of the held-out sets, the same ones for every run; runs' own seeds are small numbers.
_VALIDATION_SEED, _TEST_SEED = 1_000_001, 1_000_002


@dataclass(frozen=True)
class Problems:
    """Rows with ``prompt`` and ``answer``, how long answers may be, where they stop, and how each metric judges them
    (`eval.answers.JUDGES`)."""

    rows: Dataset
    max_new_tokens: int
    stop: str
    judges: dict[str, str]

    def verdicts(self, completions: Sequence[str], answers: Sequence[str]) -> dict[str, list[bool]]:
        """Return by metric which completions are right."""
        pairs = list(zip(completions, answers, strict=True))
        return {metric: [JUDGES[judge](*pair).correct for pair in pairs] for metric, judge in self.judges.items()}


@dataclass(frozen=True)
class Splits:
    """The data of one run: its training rows, rows for the validation and test losses, and sets of problems to answer,
    by name.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    problems: dict[str, Problems]


def load_splits(data: dict[str, Any], rows: int, seed: int) -> Splits:
    """Return the data that a suite names, with ``rows`` training rows.

    Raises ValueError for a source that is not in `SOURCES`.
    """
    options = dict(data)
    source = options.pop("source")
    if source not in SOURCES:
        raise ValueError(f"data source {source!r}: expected one of {', '.join(SOURCES)}")
    return SOURCES[source](rows, seed, **options)


def _generated(rows: int, seed: int, validation: int, test: int) -> Splits:
    """Return different problems by reasoning-gym: held-out sets that every run shares, and training rows by the run's
    seed.
    """
    held_out = problems(validation, _VALIDATION_SEED)
    tested = problems(test, _TEST_SEED, exclude=held_out)
    train = problems(rows, seed, exclude=concatenate_datasets([held_out, tested]))
    return Splits(train, held_out, tested, {"generated": Problems(tested, 160, STOP, {"accuracy": "number"})})


def _metamath(
    rows: int,
    seed: int,
    validation: int,
    test: int,
    metamath: str = "meta-math/MetaMathQA",
    gsm8k: str = "openai/gsm8k",
    math500: str = "HuggingFaceH4/MATH-500",
    **options: Any,
) -> Splits:
    """Return the paper's fine-tuning data: the same rows for every seed, which shuffles them.

    metamath, gsm8k, math500: hub ids, files or folders. options: ``length_tokenizer`` and ``manifest`` of `load_data`.
    """

    def asked(source: str, question: str, config: str | None, judges: dict[str, str]) -> Problems:
        dataset = read_split(
            source, "test", config=config, offline="give its test set as a JSONL file in the suite's data"
        )
        prompts = [ALPACA_PROMPT.format(instruction=text) for text in dataset[question]]
        kept = Dataset.from_dict({"prompt": prompts, "answer": dataset["answer"]})
        return Problems(kept, 512, ALPACA_STOP, judges)

    data = load_data(metamath, {"train": rows, "validation": validation, "test": test}, **options)
    return Splits(
        data["train"],
        data["validation"],
        data["test"],
        {
            "gsm8k": asked(gsm8k, "question", "main", {"gsm8k": "number", "gsm8k_paper": "paper"}),
            "math500": asked(math500, "problem", None, {"math500": "expression"}),
        },
    )


SOURCES = {"generated": _generated, "metamath": _metamath}
