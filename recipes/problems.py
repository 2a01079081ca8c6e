"""Make problems without a download: grade-school ones with worked solutions by reasoning-gym's ``gsm_symbolic``, and
plain sums of one-digit numbers.
"""

from __future__ import annotations

from decimal import Decimal
from itertools import product

import reasoning_gym
from datasets import Dataset

from eval.answers import NUMBER

# Problem and solution together, in characters, about 150 tokens: longer ones would make a CPU step several times
# slower.
MAX_LENGTH = 500
# No number of a solution is larger, nor has decimals: the arithmetic of a 135M model ends about there.
MAX_NUMBER = 100
# One generated problem in seven is within both, and one in fourteen has no more than two operations besides.
OVERSAMPLE = 24
# Where a completion goes on to the next problem.
STOP = "\nQuestion:"


def problems(size: int, seed: int, exclude: Dataset | None = None, max_operations: int | None = None) -> Dataset:
    """Return ``size`` different problems: prompt, completion, ``answer`` as text, and the generator's ``row``.

    The completion is the worked solution, which ends in ``#### answer`` as in GSM8K, with at most ``max_operations``
    equations where that is given. The same arguments give the same rows. Questions that stand in ``exclude`` are left
    out, so that a test set is disjoint from a training set.
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
    """Return all calculations of so many additions and subtractions of one-digit numbers, as `problems` does; the
    completion is the answer alone.
    """
    rows = []
    for signs in product((1, -1), repeat=operations):
        for first, *rest in product(range(10), repeat=operations + 1):
            terms = "".join(f" {'+' if sign > 0 else '-'} {number}" for sign, number in zip(signs, rest))
            answer = str(first + sum(sign * number for sign, number in zip(signs, rest)))
            rows.append({"prompt": f"Question: {first}{terms}\nAnswer:", "completion": f" {answer}", "answer": answer})
    return rows
