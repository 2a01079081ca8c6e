"""This module loads the data of suites: rows in TRL's form of prompt and completion, and problems to answer.

Some rows are trained on, and the losses are measured by others.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from datasets import Dataset, concatenate_datasets

from eval.answers import JUDGES
from recipes.data import ALPACA_PROMPT, ALPACA_STOP, load_data
from recipes.problems import STOP, calculations, problems
from recipes.sources import read_split

# These are the seeds of the held-out sets, which every run shares. The runs' own seeds are small numbers.
_VALIDATION_SEED, _TEST_SEED = 1_000_001, 1_000_002
_HELD_OUT = 0.2  # This share of a package's files is held out.


@dataclass(frozen=True)
class Problems:
    """Holds a set of problems to answer.

    Attributes:
        rows: rows with ``prompt`` and ``answer``.
        max_new_tokens: largest number of tokens of an answer.
        stop: text at which an answer stops.
        judges: by metric, the name of its judge (`eval.answers.JUDGES`).
    """

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
    """Holds the data of one run.

    Attributes:
        train: rows to train on.
        validation, test: rows for the two held-out losses.
        problems: sets of problems to answer, by name.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    problems: dict[str, Problems]


def load_splits(data: dict[str, Any], rows: int, seed: int) -> Splits:
    """Return the data that a suite names by a source of `SOURCES` and its options.

    data: the source and its options. rows: number of training rows. seed: the run's seed.
    """
    options = dict(data)
    source = options.pop("source")
    return SOURCES[source](rows, seed, **options)


def _generated(rows: int, seed: int, validation: int, test: int, max_operations: int | None = None) -> Splits:
    """Return different problems by reasoning-gym.

    Every run shares the held-out sets, and the training rows are drawn by the run's seed. max_operations: largest
    number of equations in a solution.
    """
    held_out = problems(validation, _VALIDATION_SEED, max_operations=max_operations)
    tested = problems(test, _TEST_SEED, held_out, max_operations)
    train = problems(rows, seed, concatenate_datasets([held_out, tested]), max_operations)
    return Splits(train, held_out, tested, {"generated": Problems(tested, 160, STOP, {"accuracy": "number"})})


def _calculations(rows: int, seed: int, validation: int, test: int) -> Splits:
    """Return sums and differences of two or three one-digit numbers.

    There are 4,200 of them, and the same ones are held out for every run. The training rows are drawn from the others
    by the run's seed, with repetitions, as many of one operation as of two.
    """
    rng = numpy.random.default_rng(_TEST_SEED)
    held_out = Dataset.from_list(rng.permutation([*calculations(1), *calculations(2)])[: validation + test].tolist())
    tested = held_out.select(range(validation, validation + test))
    out = set(held_out["prompt"])
    left = [[row for row in calculations(count) if row["prompt"] not in out] for count in (1, 2)]
    rng = numpy.random.default_rng(seed)
    drawn = [of_length[i] for of_length in left for i in rng.integers(len(of_length), size=-(-rows // 2))]
    train = Dataset.from_list(rng.permutation(drawn)[:rows].tolist())
    asked = Problems(tested, 8, STOP, {"accuracy": "number"})
    return Splits(train, held_out.select(range(validation)), tested, {"calculations": asked})


def _code(rows: int, seed: int, validation: int, test: int, package: str, characters: int) -> Splits:
    """Return pieces of the Python files of an installed package, each of so many characters.

    A fifth of the files is held out, chosen by a checksum of their text. Every run shares the held-out pieces, and the
    training rows are drawn by the run's seed.

    Raises FileNotFoundError if the package is missing, and ValueError if its files are too few.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise FileNotFoundError(f"data of the package {package}, which is not installed: pip install {package}")
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(spec.origin).parent.rglob("*.py"))]
    pieces: dict[bool, list[str]] = {True: [], False: []}
    for text in dict.fromkeys(texts):
        kept = [text[start : start + characters] for start in range(0, len(text) - characters + 1, characters)]
        pieces[zlib.crc32(text.encode()) < _HELD_OUT * 2**32] += kept
    for side, wanted in ((True, validation + test), (False, rows)):
        if len(pieces[side]) < wanted:
            kind = "held-out" if side else "training"
            raise ValueError(
                f"{package} has {len(pieces[side])} {kind} pieces of {characters} characters, expected {wanted}"
            )

    def drawn(side: bool, count: int, seed: int) -> Dataset:
        order = numpy.random.default_rng(seed).permutation(len(pieces[side]))[:count]
        return Dataset.from_list([{"prompt": "", "completion": pieces[side][i]} for i in order])

    held_out = drawn(True, validation + test, _TEST_SEED)
    split = held_out.select(range(validation)), held_out.select(range(validation, validation + test))
    return Splits(drawn(False, rows, seed), *split, {})


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
    """Return the paper's fine-tuning data. Its rows are the same for every seed, which only shuffles them.

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


SOURCES = {"generated": _generated, "calculations": _calculations, "code": _code, "metamath": _metamath}
