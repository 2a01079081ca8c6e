"""The report of a rerun: intervals and differences against scipy, and what its Markdown says."""

import json
import math

import numpy
import pytest
from scipy import stats
from suites import finish, record, write_suite

from eval.rerun.comparisons import averages, paired
from eval.rerun.intervals import Interval, interval, ranks
from eval.rerun.plan import cells
from eval.rerun.report import write_report


def test_intervals_are_student_t():
    values = [0.61, 0.58, 0.66, 0.6]
    found = interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert interval([1.0]) == Interval(1.0, math.inf, 1)


def test_order_is_claimed_only_between_intervals_that_do_not_touch():
    found = [Interval(1.0, 0.1, 3), Interval(1.15, 0.1, 3), Interval(2.0, 0.1, 3)]
    assert ranks(found, higher_is_better=False) == [(1, 2), (1, 2), (3, 3)]
    assert ranks(found, higher_is_better=True) == [(2, 3), (2, 3), (1, 1)]
    assert ranks([*found, Interval(1.5, math.inf, 1)], higher_is_better=False)[2] == (3, 4)


def test_report_says_what_is_published_what_is_at_an_edge_and_what_is_missing(tmp_path):
    protocols = {"paper": {"lr": 1e-3, "seeds": [0]}}
    protocols["tuned"] = {
        "rates": {"adapter": [1e-3, 2e-3, 5e-3]},
        "tuning_seeds": [0],
        "seeds": [0, 1, 2],
        "extend": 2,
    }
    published = {"random": {"LoRA": {"test_loss": 44.62}}}
    suite = write_suite(tmp_path, protocols=protocols, published=published, published_source="Table 2")
    paper, _, first, second = cells(suite)
    records, _ = finish(first, lambda lr: lr)
    text = write_report(suite, [paper, first, second], records, {}, tmp_path)
    of_paper, row = (line for line in text.splitlines() if line.startswith("| LoRA |"))
    assert "| 44.62 |" in of_paper
    assert "0.0002 (edge)" in row
    assert "44.62" not in row  # a number of the paper's protocol
    assert "0.5002 ± 0.0000 (n=3)" in row
    assert "| LoRA-Pre Adam | adapter | pending |" in text
    assert "**Not complete**: at least 3 runs" in text
    assert "Table 2" in text


def test_differences_are_paired_by_seed():
    """Much narrower than the intervals of either, where the seeds move both; a seed that one lacks does not count."""
    a, b = {0: 0.60, 1: 0.40, 2: 0.50, 7: 9.0}, {2: 0.47, 1: 0.38, 0: 0.56}
    found = paired(a, b)
    low, high = stats.ttest_rel([0.60, 0.40, 0.50], [0.56, 0.38, 0.47]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert paired(a, {7: 1.0}) is None


def test_rates_are_compared_seed_by_seed_where_several_seeds_tried_them(tmp_path):
    methods = [{"method": "lora", "tuning_seeds": [0, 1, 2]}, "lorapre-adam"]
    suite = write_suite(tmp_path, methods=methods)
    several, one = cells(suite)
    spread = {0: 0.0, 1: 0.3, 2: 0.1}  # of the seeds, the same at all rates
    worse = {1e-3: [0.02, 0.03, 0.04], 2e-3: [0.0, 0.0, 0.0], 5e-3: [0.01, -0.01, 0.0]}
    records = {}
    for cell in (several, one):
        while pending := cell.pending(records):
            for run in pending:
                records[run.name] = record(run, 1 + spread[run.seed] + worse[run.lr][run.seed])
    assert {run.seed for run in one.tuning_runs(records)} == {0}
    low, high = stats.ttest_1samp(worse[1e-3], 0).confidence_interval(0.95)
    text = write_report(suite, [several, one], records, {}, tmp_path)
    row, other = json.loads((tmp_path / "report.json").read_text())["rows"]
    found = row["rate_differences"]["0.001"]
    assert (found["mean"] - found["half_width"], found["mean"] + found["half_width"]) == pytest.approx((low, high))
    assert (
        "against that at 0.002, which these same losses chose and so favour: +0.0300 ± 0.0248 at 0.001, +0.0000 ±"
        in text
    )
    assert other["rate_differences"] == {}


def factorial(losses, **more):
    """Rows of a grid of two options over three seeds, by loss[rule, rank, seed]."""
    return [
        {
            "trains": "adapter",
            "label": f"{rule}, {rank}",
            "options": {"rule": rule, "rank": rank},
            "metrics": {"test_loss": {"values": list(losses[i, j]), "seeds": [0, 1, 2]}},
            "failed_seeds": 0,
        }
        | more
        for i, rule in enumerate(("newton", "als"))
        for j, rank in enumerate((1, 2, 4))
    ]


def test_averages_take_seeds_as_what_is_independent():
    losses = numpy.random.default_rng(0).normal(size=(2, 3, 3))
    losses[1] -= 5  # als is before newton
    rule, rank = averages(factorial(losses), [["rule"], ["rank"]], "test_loss")
    assert [level["level"] for level in rule["levels"]] == ["als", "newton"]
    assert [level["mean"] for level in rule["levels"]] == pytest.approx([losses[1].mean(), losses[0].mean()])
    by_seed = losses.mean(axis=1)
    low, high = stats.ttest_rel(by_seed[0], by_seed[1]).confidence_interval(0.95)
    found = rule["levels"][1]["difference"]
    assert (found["mean"] - found["half_width"], found["mean"] + found["half_width"]) == pytest.approx((low, high))
    assert rule["levels"][0]["difference"] is None
    assert (rule["settings"], rank["settings"]) == (3, 2)
    assert [level["mean"] for level in rank["levels"]] == pytest.approx(sorted(losses.mean(axis=(0, 2))))


def test_averages_leave_out_settings_that_lack_a_level_and_rows_without_the_options():
    losses = numpy.random.default_rng(0).normal(size=(2, 3, 3))
    rows = factorial(losses)
    rows[0]["metrics"] = {}  # newton at rank 1 has not run
    rows.append({"trains": "adapter", "label": "AdamW", "options": {}, "metrics": {}, "failed_seeds": 0})
    (rule, rank) = averages(rows, [["rule"], ["rank"]], "test_loss")
    assert rule["settings"] == 2
    assert {level["level"]: level["mean"] for level in rule["levels"]} == pytest.approx(
        {"newton": losses[0, 1:].mean(), "als": losses[1, 1:].mean()}
    )
    assert rank["settings"] == 1


def test_report_of_differences_and_averages(tmp_path):
    """Two ranks, the second 0.3 worse at every seed, beside a baseline whose seeds spread far more than that."""
    suite = write_suite(
        tmp_path,
        methods=["lora", *({"method": "lorapre-adam", "momentum_rank": k, "label": f"k={k}"} for k in (1, 2))],
        protocols={"paper": {"lr": 1e-3, "seeds": [0, 1, 2]}},
        factors=[["momentum_rank"]],
    )
    records = {}
    for cell, worse in zip(cells(suite), (0.0, 0.2, 0.5)):
        for run in cell.pending({}):
            records[run.name] = record(run, 5.0 * run.seed + worse + 0.01 * (run.seed == 1))
    text = write_report(suite, cells(suite), records, {}, tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| k=1 |"))
    assert "| +0.2000 ± 0.0000 | 1–3 |" in row
    assert "Seed by seed worse than LoRA: k=1; k=2." in text
    assert "Trains adapter: the intervals of all rows do not tell which is first." in text
    assert "| 2 | 6.0033 | +0.3000 ± 0.0000 |" in text
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["averages"][0]["levels"][1]["difference"]["mean"] == pytest.approx(0.3)
    assert said["rows"][1]["metrics"]["test_loss"]["seeds"] == [0, 1, 2]


def test_times_and_peaks_of_several_machines_are_not_compared(tmp_path):
    suite = write_suite(tmp_path, methods=["lora", "rslora"], protocols={"paper": {"lr": 1e-3, "seeds": [0]}})
    records = {}
    for cell, device in zip(cells(suite), ("cpu", "NVIDIA H200")):
        (run,) = cell.pending({})
        machine = {"machine": "x86_64", "device": device}
        records[run.name] = record(run, 1.0, environment={"command": "python -m eval.rerun x"} | machine)
    text = write_report(suite, cells(suite), records, {}, tmp_path)
    assert "runs are from several machines or numbers of threads" in text
    assert all(
        line.endswith("| – | – | – |") for line in text.splitlines() if line.startswith(("| LoRA ", "| rsLoRA "))
    )
    assert "time.png" not in text
    assert "sensitivity.png" not in text  # of one learning rate
    assert "state.png" in text


@pytest.mark.parametrize(
    ("peak_of", "cell", "note"),
    [
        ("tensors on NVIDIA H200", "5.00 GB", "peak: tensors on NVIDIA H200."),
        ("resident memory of the process", "–", "peak: not compared"),
    ],
)
def test_only_peaks_of_tensors_are_shown(tmp_path, peak_of, cell, note):
    suite = write_suite(tmp_path, methods=["lora"], protocols={"paper": {"lr": 1e-3, "seeds": [0]}})
    (only,) = cells(suite)
    (run,) = only.pending({})
    found = {run.name: record(run, 1.0, peak_bytes=5_000_000_000, peak_of=peak_of)}
    text = write_report(suite, [only], found, {}, tmp_path)
    (row,) = (line for line in text.splitlines() if line.startswith("| LoRA "))
    assert row.endswith(f"| {cell} | 100 | 1 |")
    assert note in text


def test_factors_that_no_method_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match="factor 'momentum_rang': none of the methods has that option"):
        write_suite(tmp_path, factors=[["momentum_rang"]])


def test_averages_are_over_the_seeds_that_all_have():
    losses = numpy.random.default_rng(1).normal(size=(2, 3, 3))
    rows = factorial(losses)
    rows[4]["metrics"]["test_loss"] = {"values": list(losses[1, 1, 1:]), "seeds": [1, 2]}
    rule, _ = averages(rows, [["rule"], ["rank"]], "test_loss")
    found = {level["level"]: level["mean"] for level in rule["levels"]}
    assert found == pytest.approx({"newton": losses[0, :, 1:].mean(), "als": losses[1, :, 1:].mean()})


def test_a_row_of_which_a_seed_has_no_answers_has_no_place(tmp_path):
    suite = write_suite(tmp_path, primary="accuracy", metrics=["accuracy"], answers=2)
    row_cells = cells(suite)
    records = {}
    for cell in row_cells:
        while pending := cell.pending(records):
            for run in pending:
                records[run.name] = record(run) | {"metrics": {"validation_loss": run.lr, "accuracy": 0.5}}
    lost = row_cells[1].final_runs(records)[-1]
    del records[lost.name]["metrics"]["accuracy"]
    write_report(suite, row_cells, records, {}, tmp_path)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert ("places" in rows[0], rows[0]["failed_seeds"]) == (True, 0)
    assert ("places" in rows[1], rows[1]["failed_seeds"]) == (False, 1)


def test_a_row_of_which_a_seed_failed_has_no_place(tmp_path):
    """The seeds that trained would speak for it; and a training loss that was not finite is a gap in the curve."""
    suite = write_suite(tmp_path)
    first, second = cells(suite)
    records = finish(first, lambda lr: lr)[0] | finish(second, lambda lr: lr / 2)[0]
    last = second.final_runs(records)[-1]
    records[last.name] = record(last, math.inf)
    records[first.final_runs(records)[-1].name]["log"]["loss"][0] = None
    text = write_report(suite, [first, second], records, {}, tmp_path)
    row = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert "places" not in row[1]
    assert row[1]["difference"] is None
    assert "(n=2, 1 failed)" in next(line for line in text.splitlines() if line.startswith("| LoRA-Pre Adam |"))
    assert "Seed by seed better" not in text
    assert row[0]["curve"]["loss"][0] is None
