"""This module makes problems without a download.

They are grade-school problems with worked solutions by reasoning-gym's ``gsm_symbolic``, and plain sums of one-digit
numbers.
"""

from __future__ import annotations

from decimal import Decimal
from itertools import product

import reasoning_gym
from datasets import Dataset

from eval.answers import NUMBER

# Problem and solution together have at most this many characters, or about 150 tokens. Longer ones would make a step
# on a CPU several times slower.
MAX_LENGTH = 500
# No number of a solution is larger, and none has decimals. The arithmetic of a 135M model ends about there.
MAX_NUMBER = 100
# So many problems are generated for each that is asked for. One in seven is within both limits, and one in fourteen
# also has at most two operations.
OVERSAMPLE = 24
# A completion ends where it goes on to the next problem.
STOP = "\nQuestion:"


def problems(size: int, seed: int, exclude: Dataset | None = None, max_operations: int | None = None) -> Dataset:
    """Return ``size`` different problems. The same arguments give the same rows.

    The columns are ``prompt``, ``completion``, ``answer`` as text, and ``row``, the problem's number in the generator.
    The completion is the worked solution, which ends in ``#### answer`` as in GSM8K.

    Args:
        size: number of problems.
        seed: seed of the generator.
        exclude: rows whose prompts are left out, so that a test set is disjoint from a training set.
        max_operations: largest number of equations in a solution. None means no limit.

    Raises:
        ValueError: the generator gave too few problems within the limits.
    """
    seen = set() if exclude is None else set(exclude["prompt"])
    rows = []
    # An item depends on (seed, index) alone, so asking for more than needed changes none of them.
    for row, item in enumerate(reasoning_gym.create_dataset("gsm_symbolic", size=OVERSAMPLE * size + 500, seed=seed)):
        prompt, completion = f"Question: {item['question']}\nAnswer:", f" {item['metadata']['answer_cot']}"
        numbers = [Decimal(number.replace(",", "")) for number in NUMBER.findall(completion)]
        simple = all(abs(number) <= MAX_NUMBER and number == int(number) for number in numbers)
        if max_operations is not None:
            simple = simple and completion.count("=") <= max_operations
        if prompt in seen or not simple or len(prompt) + len(completion) > MAX_LENGTH:
            continue
        seen.add(prompt)
        rows.append({"prompt": prompt, "completion": completion, "answer": item["answer"], "row": row})
        if len(rows) == size:
            return Dataset.from_list(rows)
    raise ValueError(
        f"gsm_symbolic gave only {len(rows)} different problems with seed {seed}, expected {size}: use fewer"
    )


def calculations(operations: int) -> list[dict[str, str]]:
    """Return all calculations of so many additions and subtractions of one-digit numbers.

    Each has ``prompt``, ``completion`` and ``answer`` as in `problems`. The completion is the answer alone.
    """
    rows = []
    for signs in product((1, -1), repeat=operations):
        for first, *rest in product(range(10), repeat=operations + 1):
            terms = "".join(f" {'+' if sign > 0 else '-'} {number}" for sign, number in zip(signs, rest))
            answer = str(first + sum(sign * number for sign, number in zip(signs, rest)))
            rows.append({"prompt": f"Question: {first}{terms}\nAnswer:", "completion": f" {answer}", "answer": answer})
    return rows
