"""How answers are read and judged. The expected verdicts of every pair below were written by hand."""

import time
from decimal import Decimal

import pytest

from eval.answers import extract_expression, extract_number, judge_expression, judge_number, judge_paper
from eval.exact_match import ExactMatch

# completion, reference, right by value, right as the earlier work's extractor has it
NUMBERS = [
    ("so it is\n#### 42", "6 * 7 = 42\n#### 42", True, True),
    ("#### 42\nThe answer is: 42", "#### 42", True, True),
    ("The answer is: 42", "#### 42", True, False),
    ("THE ANSWER IS 42.", "42", True, True),  # a bare reference has no ####: both are 0 to the extractor
    ("The final answer is 42 apples", "#### 42", True, False),
    ("the answer is 41\nthe answer is 42", "#### 42", True, False),
    ("first #### 3 then #### 5", "#### 5", True, False),
    ("#### 5\nThe answer is: 6", "#### 5", False, True),
    ("no marker: 3 + 4 = 7 apples", "#### 7", True, False),
    ("it is 10-5", "#### -5", False, True),  # neither has digits behind ####: 0 = 0
    # thousands
    ("#### 1,000", "#### 1000", True, False),
    ("#### 1,000", "#### 1,999", False, True),  # both read as 1
    ("#### 1000", "#### 1,000", True, False),
    ("#### 1,234,567 people", "#### 1234567", True, False),
    ("#### 1{,}000", "#### 1000", True, False),
    (r"#### 1,\!000", "#### 1000", True, False),
    (r"#### 12\,000", "#### 12000", True, False),
    ("#### 12\u202f000~000", "#### 12000000", True, False),
    ("#### 5~km", "#### 5", True, True),
    ("#### 5~12", "#### 512", False, False),
    ("#### 12,34", "#### 1234", False, False),
    # signs
    ("#### -7", "#### -7", True, True),  # 0 = 0
    ("#### 7", "#### -7", False, False),
    ("#### -7", "#### -8", False, True),
    ("#### −7", "#### -7", True, True),
    ("#### - 7", "#### -7", True, True),
    ("#### +7", "#### 7", True, False),
    ("The answer is 8 - 3", "#### 8", True, False),
    ("The answer is 8 -3", "#### 8", True, False),
    ("The answer is about -3", "#### -3", True, True),
    ("The answer is: the sum is -5 degrees", "#### 5", False, False),
    # decimals and fractions
    ("#### 3.50", "#### 3.5", True, True),
    ("#### 3.4", "#### 3.5", False, True),
    ("#### 3.0", "#### 3", True, True),
    ("#### .5", "#### 0.5", True, True),
    ("#### 5.", "#### 5", True, True),
    ("#### 1/2", "#### 0.5", True, False),
    ("#### 0.333", "#### 1/3", False, False),
    ("#### 2/6", "#### 1/3", True, False),
    (r"The answer is $-\frac{1}{2}$", "#### -0.5", True, True),
    (r"#### \dfrac{3}{4}", "#### 3", False, False),
    (r"#### 5\frac{1}{2}", "#### 5.5", False, True),  # mixed numbers are not read
    (r"The answer is: $\frac12$", "#### 0.5", True, True),  # neither has digits behind ####: 0 = 0
    (r"#### \frac1{4}", "#### 0.25", True, True),
    (r"#### \frac{-1}{2}", "#### -0.5", True, True),
    # an equation of numbers stands for its result
    ("The answer is: 2 + 3 = 5", "#### 5", True, False),
    ("#### 3*4 = 12 apples", "#### 12", True, False),
    ("#### x = 5", "#### 5", True, False),
    ("The answer is 7, since 9 - 2 = 7 and 7 + 1 = 8", "#### 7", True, False),
    ("#### x=-5", "#### -5", True, True),
    ("#### 3 x 4 = 12", "#### 12", True, False),
    (r"The answer is: $3 \times 4 \cdot 2 = 24$", "#### 24", True, False),
    ("#### 12; 3*5=15", "#### 12", True, True),
    # units, currency, trailing text
    ("#### $18", "#### 18", True, False),
    ("#### -$18", "#### -18", True, True),
    ("#### $-18", "#### -18", True, True),
    (r"The answer is: \$18.50 per week, over 4 weeks.", "#### 18.5", True, False),
    ("#### €1,200", "#### 1200", True, False),
    ("The answer is Rs.500", "#### 500", True, False),
    ("#### 18 dollars and nothing else", "#### 18", True, True),
    ("#### 45%", "#### 45", True, True),
    ("#### **45**", "#### 45", True, False),
    ("#### x = 45", "#### 45", True, False),
    # unreadable and hostile
    ("", "#### 5", False, False),
    ("", "#### 0", False, True),  # what the extractor cannot read is 0
    ("#### none", "#### 5", False, False),
    ("five times 5 is 25. The answer is:", "#### 25", False, False),
    ("#### twelve", "#### 12", False, False),
    ("#### 5/0", "#### 5", False, True),
    ("#### 1e999999999999", "#### 1", False, True),
    ("#### 1e3", "#### 1000", True, False),
    ("#### nan", "#### 5", False, False),
    ("#### " + "9" * 100_000, "#### 9", False, False),
    ("####" * 20_000 + " 5", "#### 5", True, True),
    ("-" * 100_000 + "5", "#### 5", False, False),
    ("#### " + "1," * 50_000, "#### 1", True, True),
    ("#### ٥", "#### 5", True, True),
    ("#### 5\x00", "#### 5", True, True),
]

# completion, reference, right
EXPRESSIONS = [
    (r"The answer is: \frac{1}{2}", r"\frac12", True),
    ("The answer is: $0.5$.", r"\frac12", True),
    (r"so $\boxed{\dfrac{2}{4}}$ it is", r"\frac12", True),
    (r"\boxed{3} at first. The answer is: $4$. I hope it is correct.", "4", True),
    (r"\boxed{3}, no, \boxed{4}", "4", True),
    (r"Therefore $x = \frac{3}{4}$", "0.75", True),
    ("The answer is: 1,000", "1000", True),
    (r"The answer is: \$18.90", "18.90", True),
    (r"The answer is: $\$18.90$", "18.90", True),
    ("The answer is: 10%", r"10\%", True),
    ("The answer is: 11%", r"10\%", False),
    ("The answer is: 90 degrees", r"90^\circ", True),
    ("The answer is: 90°", r"90^\circ", True),
    ("The answer is: 5 dollars", "5", False),  # math-verify does not know all units: known to be wrong
    ("The answer is: x=5", "5", True),
    ("The answer is: -5", "5", False),
    ("The answer is: 2x + x^3", "x^3+2x", True),
    ("The answer is: x(x^2+2)", "x^3+2x", True),
    ("The answer is: x(x^2-2)", "x^3+2x", False),
    (r"The answer is: (3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)", True),
    (r"The answer is: (\pi/2, 3)", r"\left( 3, \frac{\pi}{2} \right)", False),
    ("The answer is: -2, 1", "1,-2", True),
    ("The answer is: 5, 6", "6", False),
    (r"The answer is: 1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}", True),
    ("The answer is: [-2, 7]", "[-2,7]", True),
    ("The answer is: (-2, 7]", "[-2,7]", False),
    (r"The answer is: $(-\infty,2)\cup(3,\infty)$", r"(-\infty, 2) \cup (3, \infty)", True),
    (
        "The answer is: \\begin{pmatrix} 1 & 2 \\\\\n 3 & 4 \\end{pmatrix}.",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        True,
    ),
    ("The answer is Evelyn.", r"\text{Evelyn}", True),
    ("The answer is Eve.", r"\text{Evelyn}", False),
    ("The answer is (C)", r"\text{(C)}", True),
    ("The answer is: y = 3 - 2x", "y = 2x + 3", False),
    ("The answer is: 1.41421356", r"\sqrt{2}", True),
    (r"The answer is: \(7\).", "7", True),
    # several formulas
    ("The answer is $2$ and $3$.", "2", False),
    ("The answer is: $3$ or $5$", "3,5", True),
    ("The answer is $2$, which is less than $3$.", "2", True),
    # what spaces and capitals mean
    ("The answer is: 1 1/2", "11/2", False),
    ("The answer is: 1 000", "1000", True),
    ("The answer is: P-Q", "p-q", True),  # math-verify does not tell capitals: known to be wrong
    ("The answer is evelyn.", r"\text{Evelyn}", True),
    ("The answer is: 2516_9", "2516_8", True),  # math-verify does not read the base: known to be wrong
    # unreadable and hostile
    ("", "5", False),
    ("I do not know.", "5", False),
    ("The answer is:", "5", False),
    (r"\boxed{}", "5", False),
    (r"\boxed{" * 3000, "5", False),
    (r"The answer is \frac{", "5", False),
    ("The answer is " + "(" * 200, "5", False),
    ("The answer is " + r"\frac{" * 3000 + "1" + "}{2}" * 3000, "5", False),
    ("The answer is " + "9" * 100_000, "9", False),
    ("The answer is 1/0", "5", False),
    (r"The answer is \left\langle __import__('os') \right\rangle", "5", False),
    ("$" * 10_000, "5", False),
]


@pytest.mark.parametrize(("completion", "reference", "by_value", "as_in_paper"), NUMBERS)
def test_numbers(completion, reference, by_value, as_in_paper):
    assert judge_number(completion, reference).correct is by_value
    assert judge_paper(completion, reference).correct is as_in_paper


@pytest.fixture(scope="module")
def started():
    """Start the process that compares, which may take a minute, before a test looks at the time."""
    assert judge_expression("The answer is: $5$", "5.0").correct


@pytest.mark.parametrize(("completion", "reference", "right"), EXPRESSIONS)
def test_expressions(completion, reference, right, started):
    start = time.perf_counter()
    assert judge_expression(completion, reference).correct is right
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("bomb", ["10^{10^{10}}", "3^{300000000}"])
def test_a_comparison_without_end_is_stopped_counted_as_wrong_and_named(bomb, monkeypatch, caplog, started):
    with monkeypatch.context() as impatient:
        impatient.setattr("eval.answers._SECONDS", 1)
        start = time.perf_counter()
        assert not judge_expression(f"The answer is: {bomb}", "5").correct
        assert time.perf_counter() - start < 30
    assert "counted as wrong, its comparison was stopped (TimeoutError): \\boxed{" + bomb in caplog.text
    assert judge_expression("The answer is: $5$", "5.0").correct  # the next one finds a new process


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 1,234.50 dollars", "1234.50"), ("#### none", None), ("", None), ("#### 1e3", "1000"), ("(-2)", "-2")],
)
def test_extract_number(text, number):
    assert extract_number(text) == (None if number is None else Decimal(number))


def test_extract_expression_prefers_the_last_marker_to_a_box_and_ends_at_the_sentence():
    assert extract_expression(r"\boxed{1}. The answer is: $x^2$. I hope it is correct.") == "x^2"
    assert extract_expression("The answer is 5. Thus 6.") == "5"
    assert extract_expression(r"so \boxed{\frac{1}{2}} done") == r"\frac{1}{2}"
    assert extract_expression("nothing") is None


def test_answered_needs_a_marker_or_a_box():
    assert judge_number("it is 5", "5") == (True, False)
    assert judge_number("#### 5", "5") == (True, True)
    assert judge_expression("it is $5$", "5") == (True, False)
    assert judge_expression(r"it is \boxed{5}", "5") == (True, True)


def test_a_reference_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="reference 'no idea' has no number to compare with"):
        judge_number("#### 5", "no idea")


def test_the_metric_gives_shares():
    completions, references = ["#### 5", "it is 5", "#### 6", "nothing"], ["5"] * 4
    found = ExactMatch("number").compute(predictions=completions, references=references)
    assert found == {"exact_match": 0.5, "answered": 0.5}
    assert ExactMatch("expression").compute(predictions=["$x$"], references=["x"]) == {"exact_match": 1, "answered": 0}
    with pytest.raises(ValueError, match="no judge 'words': expected one of number, paper, expression"):
        ExactMatch("words")
