"""This module judges by meaning whether an answer is right, for numbers (GSM8K, generated problems) and for MATH.

The answers of MATH are expressions. The answer stands in a completion after the last marker, which is ``####``, "The
answer is" or "The final answer is", even if nothing readable follows. Without a marker, an expression is taken from
the last ``\\boxed{}``, or else from wherever math-verify finds one. A number is the last one of the text.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import re
from concurrent.futures import TimeoutError
from decimal import Decimal
from functools import cache
from typing import NamedTuple

import psutil
from pebble import ProcessExpired, ProcessPool

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+")
_MARKER = re.compile(r"####|\bthe (?:final )?answer is\b:?", re.IGNORECASE)
# A minus counts as a sign unless something that it could be subtracted from stands before it. This is a number or a
# bracket, and if a space follows the minus, also a word.
_SIGNED = re.compile(
    r"(?:(?<![\w.)])(?<![\d.)]\s)(?P<sign>[-+])(?:(?!\s)|(?<![\w.)]\s[-+])\s))?(?:[$€£¥₹]\s?(?P<inner_sign>[-+])?)?"
    rf"(?P<number>{NUMBER.pattern})(?:e(?P<exponent>[-+]?\d+))?(?:\s?/\s?(?P<denominator>{NUMBER.pattern}))?",
    re.IGNORECASE,
)
_BRACED = rf"\s*(?:\{{\s*(-?{NUMBER.pattern})\s*\}}|(\d))"
_FRACTION = re.compile(rf"(\d?)\\[dt]?frac{_BRACED}{_BRACED}")
# This matches what stands before the result of an equation of numbers, as in 2 + 3 = 5. A match begins at the start of
# the text, or behind a letter, an equals sign, a semicolon or a line break. If it could begin anywhere, the search
# would take quadratic time.
_SUM = re.compile(r"(?<![^A-Za-z=;\n])(?:[^A-Za-z=;\n]*=)+")
_MATH = re.compile(r"\$\$?(.+?)(?<!\\)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BETWEEN = re.compile(r"\s*(?:,|;)?\s*(?:and|or)?\s*")
# These are the typographers' minus, escaped currency, LaTeX's comma and negative space, and signs of multiplication.
_SPELLINGS = [("−", "-"), (r"\$", "$"), ("{,}", ","), (r"\!", ""), (r"\times", "*"), (r"\cdot", "*")]
_TIMES = re.compile(r"(?<=\d)\s*x\s*(?=\d)", re.IGNORECASE)
_SPACE = r"(?:\\[,:; ]|[~\u00a0\u2009\u202f])"  # All but the plain one, which may separate two numbers.
_GROUPED = re.compile(rf"(?<=\d){_SPACE}(?=\d{{3}}(?!\d))")

# LoRA-Pro's released evaluation reads answers and references with this pattern. What it cannot read is 0.
_PAPER = re.compile(r"####\s*(\d+)")

# The longest answer of MATH-500 has 53 characters. A longer text than this is no answer, and would cost the parser
# exponential time.
_MAX_LENGTH = 500
_SECONDS = 5
_WORKER_BYTES = 2 << 30


class Verdict(NamedTuple):
    """Says whether an answer is right, and whether it stands where it was asked for: behind a marker or in a box."""

    correct: bool
    answered: bool


def extract_number(text: str) -> Decimal | None:
    """Return the first number after the last marker, or without a marker the text's last number, or None without any.

    If an equation of numbers follows the marker, as in 2 + 3 = 5, its right-hand side is read. Signs, decimals,
    thousands separators (1,000), exponents (1e3) and fractions (3/4, \\frac{3}{4}) are read. Units, currency and text
    around the number are ignored. Number words, mixed numbers (5 1/2 is 5) and decimal commas (1.000,50 is 1) are not
    read.
    """
    tail = _after_marker(text)
    if tail is not None:
        found = _SIGNED.search(_SUM.sub(" ", _spelled(tail.strip()), count=1))
    else:
        *_, found = [None, *_SIGNED.finditer(_spelled(text))]
    if found is None:
        return None
    exponent = found["exponent"] or "0"
    if len(exponent) > 4:
        return None  # The arithmetic below cannot hold it, and it is nobody's answer.
    value = Decimal(f"{found['number'].replace(',', '')}e{exponent}")
    if found["denominator"]:
        denominator = Decimal(found["denominator"].replace(",", ""))
        if not denominator:
            return None
        value /= denominator
    return -value if "-" in (found["sign"], found["inner_sign"]) else value


def judge_number(completion: str, reference: str) -> Verdict:
    """Return the verdict on the number of a completion, by that of a reference.

    The reference is a worked solution or the bare answer. Raises ValueError if it has no number.
    """
    expected = extract_number(reference)
    if expected is None:
        raise ValueError(
            f"reference {reference!r} has no number to compare with: expected '... #### number' or a number"
        )
    found = extract_number(completion)
    return Verdict(found == expected, found is not None and _after_marker(completion) is not None)


def judge_paper(completion: str, reference: str) -> Verdict:
    """Return the verdict of LoRA-Pro's released evaluation on a problem of GSM8K, faults included.

    It is only for comparison with published figures. The digits right after the first ``####`` of the completion and
    of the reference are compared. So "1,000" is 1, and "3.5" is 3. A negative number, one with a currency, and a
    missing one are 0.
    """
    found, expected = (_PAPER.search(text) for text in (completion, reference))
    correct = Decimal(found[1] if found else 0) == Decimal(expected[1] if expected else 0)
    return Verdict(correct, found is not None)


def extract_expression(text: str) -> str | None:
    """Return the bare LaTeX after the last marker, or else that of the last box, or None."""
    tail = _after_marker(text)
    if tail is None:
        return _boxed(text)
    tail = tail.strip().removeprefix("**").strip()
    if (boxed := _boxed(tail)) is not None:
        return boxed
    if math := _math(tail):
        return ", ".join(math)
    if re.match(r"\\begin\{", tail) and r"\end{" in tail:
        return tail[: tail.index("}", tail.rindex(r"\end{")) + 1]
    line = tail.partition("\n")[0]
    line = re.split(r"\.\s+(?=[A-Z])", line)[0]  # What follows is another sentence.
    return line.strip().rstrip(".*").strip() or None


def judge_expression(completion: str, reference: str) -> Verdict:
    """Return math-verify's verdict on the expression of a completion, by that of a reference.

    The reference is LaTeX of the bare answer. An answer counts as wrong if it takes over 5 seconds to compare, with a
    warning in the log, or over 2 GB. Raises ValueError if the reference is empty.
    """
    if not reference.strip():
        raise ValueError(f"reference {reference!r} is empty: expected the LaTeX of an answer")
    answer = extract_expression(completion)
    if answer is None:
        # Without marker and box math-verify looks for the expression itself, from the end.
        return Verdict(_compare(_box(reference), completion[-_MAX_LENGTH:]), False)
    if len(answer) > _MAX_LENGTH:
        return Verdict(False, False)
    if _plain(answer) == _plain(reference):
        return Verdict(True, True)
    return Verdict(_compare(_box(reference), _box(answer)), True)


JUDGES = {"number": judge_number, "paper": judge_paper, "expression": judge_expression}


def _math(text: str) -> list[str]:
    """Return the formulas that a text begins with, if nothing but commas, "and" and "or" stands between them."""
    found, position = [], 0
    while math := _MATH.match(text, position):
        found.append(math[math.lastindex].strip())
        position = _BETWEEN.match(text, math.end()).end()
    return list(filter(None, found))


def _spelled(text: str) -> str:
    """Return the text with its numbers and fractions in plain characters."""
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    text = re.sub(_SPACE, " ", _GROUPED.sub("", _TIMES.sub("*", text)))
    # A mixed number such as 5 1/2 stays one.
    return _FRACTION.sub(
        lambda found: f"{found[1]}{' ' if found[1] else ''}{found[2] or found[3]}/{found[4] or found[5]}", text
    )


def _after_marker(text: str) -> str | None:
    *_, last = [None, *_MARKER.finditer(text)]
    return None if last is None else text[last.end() :]


def _boxed(text: str) -> str | None:
    """Return what the last ``\\boxed{}`` holds, up to its own closing brace."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip() or None
    return None


def _box(expression: str) -> str:
    """Return an answer in a box, for math-verify, which takes what is boxed as a whole.

    Percent signs are left out. math-verify would read "10%" as text, and MATH leaves the sign to the writer. Degrees
    are spelled as in LaTeX, since it knows no other sign for them.
    """
    for spelling, plain in ((r"\%", ""), ("%", ""), ("°", r"^\circ")):
        expression = expression.replace(spelling, plain)
    return rf"\boxed{{{expression}}}"


def _plain(expression: str) -> str:
    """Return the text without spaces and marks that change no meaning, for words and for a first, cheap comparison."""
    expression = re.sub(r"\\(?:text|textbf|mbox|mathrm)\{([^{}]*)\}", r"\1", expression)
    # A space before a fraction may make it a mixed number.
    expression = re.sub(r"\\left|\\right|\\[ ,;!%$]|\s(?!\d+\s?/)|[$%]|\.$", "", expression)
    return expression.replace(r"\dfrac", r"\frac").lower()


def _compare(reference: str, answer: str) -> bool:
    """Return math-verify's verdict, from a process that can be killed."""
    try:
        return _worker().schedule(_verify, (reference, answer), timeout=_SECONDS).result()
    except (TimeoutError, ProcessExpired) as error:
        logger.warning("counted as wrong, its comparison was stopped (%s): %.80s", type(error).__name__, answer)
        return False


@cache
def _worker() -> ProcessPool:
    # The process is spawned, not forked, as the parent may hold threads and a GPU.
    pool = ProcessPool(max_workers=1, initializer=_prepare_worker, context=multiprocessing.get_context("spawn"))
    atexit.register(pool.stop)
    try:
        works = pool.schedule(_verify, (r"\boxed{\frac12}", r"\boxed{0.5}"), timeout=60).result()
    except (TimeoutError, ProcessExpired) as error:
        raise RuntimeError(
            "the process that compares expressions did not start; a script that judges answers needs the guard "
            "`if __name__ == '__main__':`"
        ) from error
    if not works:
        raise RuntimeError(
            "math-verify does not find 1/2 equal to 0.5: check its version and antlr4-python3-runtime's"
        )
    return pool


def _prepare_worker() -> None:
    import resource  # Windows has no such module, and the recipes need only `NUMBER`.

    import math_verify  # noqa: F401 -- The import of sympy takes seconds, which would count as time to compare.

    # The limit is on top of what is mapped already, as the script of this process may have imported CUDA's libraries.
    limit = psutil.Process().memory_info().vms + _WORKER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # It warns that its own timeouts are off.


def _verify(reference: str, answer: str) -> bool:
    from math_verify import parse, verify

    # Its own timeouts are signals, which wait for C code to return. The pool's timeouts kill the process.
    expected, found = (parse(text, parsing_timeout=None) for text in (reference, answer))
    return verify(expected, found, timeout_seconds=None)
