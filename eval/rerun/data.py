"""Data of suites: training, validation and test rows in TRL's prompt/completion form, and problems to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from recipes.problems import problems

# Of the held-out sets, the same ones for every run; runs' own seeds are small numbers.
_VALIDATION_SEED, _TEST_SEED = 1_000_001, 1_000_002


@dataclass(frozen=True)
class Splits:
    """train: the rows of one run. validation, test: for losses. problems: sets to answer, by the name of their metric."""

    train: Dataset
    validation: Dataset
    test: Dataset
    problems: dict[str, Dataset]


def load_splits(data: dict[str, Any], rows: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """The data that a suite names; ``rows`` training rows drawn by ``seed``."""
    options = dict(data)
    source = options.pop("source")
    if source not in SOURCES:
        raise ValueError(f"data source {source!r}: expected one of {', '.join(SOURCES)}")
    return SOURCES[source](rows, seed, tokenizer, **options)


def _generated(rows: int, seed: int, tokenizer: PreTrainedTokenizerBase, validation: int, test: int) -> Splits:
    """Problems by reasoning-gym, all different: held-out sets that every run shares, training rows by the run's seed."""
    held_out = problems(validation, _VALIDATION_SEED)
    tested = problems(test, _TEST_SEED, exclude=held_out)
    train = problems(rows, seed, exclude=concatenate_datasets([held_out, tested]))
    return Splits(train, held_out, tested, {"accuracy": tested})


SOURCES = {"generated": _generated}
