"""The rerun: suites and plans as functions, results on disk under kills, and the smoke suite as a user runs it."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from suites import finish, make_run, record, write_suite

from eval.methods import METHODS, Method
from eval.methods.method import build_adamw
from eval.rerun.dry_run import memory_estimate, plan_table
from eval.rerun.models import base_config
from eval.rerun.plan import cells
from eval.rerun.report import summary
from eval.rerun.store import Store, _place
from eval.rerun.suite import shifted
from eval.rerun.suite_files import SUITES, load_suite
from eval.rerun.training import Runner
from eval.rerun.work import train, visible_gpus
from lorapre_peft.integrations.summary import format_bytes

ROOT = Path(__file__).parents[2]


# ---- suites ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "places", "expected"),
    [(2e-4, 1, 5e-4), (5e-4, 1, 1e-3), (1e-3, -1, 5e-4), (5e-3, 6, 0.5), (1e-4, -4, 5e-6)],
)
def test_rates_move_along_1_2_5(rate, places, expected):
    assert shifted(rate, places) == expected


def test_rates_off_the_series_are_refused():
    with pytest.raises(ValueError, match="series 1, 2, 5"):
        shifted(3e-4, 1)


@pytest.mark.parametrize("name", [path.stem for path in SUITES.glob("*.yaml")])
def test_shipped_suites_load_and_name_each_run_once(name):
    suite = load_suite(name)
    names = [run.name for cell in cells(suite) for run in cell.pending({})]
    assert len(names) == len(set(names)) > 0


def test_issue_methods_are_in_the_table_suites():
    """Every method that the comparison promises, in both table suites."""
    promised = {"lora", "rslora", "dora", "pissa", "lora-ga", "lora+", "lora-fa", "galore", "fira", "mlorc", "apollo"}
    promised |= {"lora-pro", "shampoo", "soap", "sophia", "adamw", "muon"}
    ours = {
        (f"lorapre-{optimizer}{kind}", rule)
        for optimizer in ("adam", "muon")
        for kind in ("", "-weights")
        for rule in ("als", "newton")
    }
    for name in ("table2", "table2-small"):
        entries = load_suite(name).entries
        assert promised <= {entry.method for entry in entries}
        assert ours == {(e.method, e.options["update_rule"]) for e in entries if e.method.startswith("lorapre")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["adam"]}, "no method 'adam'"),
        ({"methods": [{"method": "lora", "momentum_rank": 2}]}, "LoRA has no option momentum_rank"),
        ({"methods": ["lora", "lora"]}, "two rows are called LoRA"),
        (
            {"methods": [{"method": "lora", "rates": [3e-4]}]},
            "learning rate 0.0003: expected one of the series 1, 2, 5",
        ),
        ({"speed": 1}, "unexpected keyword argument 'speed'"),
        ({"methods": ["adamw"]}, "AdamW trains weights: expected rates for that"),
        ({"primary": "accuracy"}, "primary 'accuracy': expected one of the metrics, test_loss"),
        ({"models": "random"}, "models: found 'random', expected list"),
        ({"methods": [{"method": "lora", "label": 3}]}, "label: found 3, expected str"),
        ({"methods": [{"method": "lora", "tuning_seeds": 3}]}, "tuning_seeds: found 3, expected list or nothing"),
        ({"protocols": {"paper": {"lr": 2e-5, "seeds": 3}}}, "seeds: found 3, expected list"),
        ({"training": {"steps": "1e1"}}, r"steps: found 10\.0, expected int"),
        ({"metrics": ["test_loss", "acuracy"]}, "metric 'acuracy': expected one of validation_loss, test_loss, acc"),
        ({"metrics": ["test_loss", "accuracy"], "answers": 0}, "metric 'accuracy': found no answers to judge"),
        ({"records_of": ["pretrain-tiny"]}, "no suite 'pretrain-tiny'"),
        ({"published": {"random": {"LORA": {"test_loss": 1.0}}}}, "published 'LORA': none of the rows is called so"),
        (
            {"training": {"steps": 2, "batch_size": 6, "micro_batch": 4}},
            "batch_size=6 is no multiple of micro_batch=4",
        ),
        ({"training": None, "pretraining": {"steps": 2, "rank": 4}}, "rank=4: found in pretraining"),
        ({"data": {"source": "elsewhere"}}, "source 'elsewhere', expected one of generated, calculations, code, meta"),
        ({"data": {"sauce": "generated"}}, "found the source None"),
        ({"data": {"source": "generated", "test": 2}}, "source generated: missing a required argument: 'validation'"),
        ({"base": "pretrain-small"}, "found 'training', but the suite it builds on has 'pretraining'"),
    ],
)
def test_suite_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_suite(tmp_path, **changes)


def test_a_suite_takes_over_the_keys_of_its_base(tmp_path):
    write_suite(tmp_path, description="the base")
    path = tmp_path / "derived.yaml"
    path.write_text(json.dumps({"base": str(tmp_path / "suite.yaml"), "training": {"rank": 64}, "methods": ["lora"]}))
    base, derived = load_suite(str(tmp_path / "suite.yaml")), load_suite(str(path))
    assert derived.training == dataclasses.replace(base.training, rank=64)
    assert [entry.method for entry in derived.entries] == ["lora"]
    assert (derived.name, derived.description, derived.data) == ("derived", "the base", base.data)


def test_suites_that_build_on_each_other_are_named(tmp_path):
    path = tmp_path / "circle.yaml"
    path.write_text(json.dumps({"base": str(path)}))
    with pytest.raises(ValueError, match=r"in a circle: .*circle\.yaml, .*circle\.yaml"):
        load_suite(str(path))


def test_run_names_depend_on_the_whole_declaration():
    runs = [make_run(), make_run(lr=2e-3), make_run(seed=1), make_run(answers=3), make_run("lorapre-adam")]
    runs += [make_run("lorapre-adam", momentum_rank=1), make_run("lorapre-adam", residual_weight=0.1)]
    assert len({run.name for run in runs}) == len(runs)
    assert make_run().name == make_run().name


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_best_rate_inside_the_grid_then_its_other_seeds(tmp_path):
    cell = cells(write_suite(tmp_path))[0]
    records, order = finish(cell, lambda lr: abs(lr - 2e-3))
    # Seed 0 at the best rate is a tuning run and is not repeated.
    assert order == [(1e-3, 0), (2e-3, 0), (5e-3, 0), (2e-3, 1), (2e-3, 2)]
    assert (cell.best_rate(records), cell.at_edge(records)) == (2e-3, False)
    assert cell.expected_runs(records) == cell.done(records) == cell.expected_runs({}) == 5


def test_a_method_that_no_rate_trains_is_complete_with_its_tuning_runs(tmp_path):
    cell = cells(write_suite(tmp_path))[0]
    records, order = finish(cell, lambda lr: math.inf)
    assert cell.best_rate(records) is None
    assert cell.expected_runs(records) == cell.done(records) == len(order) == 5
    # What fails otherwise than by its rate needs no other rates.
    broken = {run.name: {"status": "failed", "metrics": {}} for run in cell.tuning_runs({})}
    assert (cell.pending(broken), cell.expected_runs(broken)) == ([], 3)


def test_grid_is_extended_while_the_best_rate_is_at_its_edge(tmp_path):
    cell = cells(write_suite(tmp_path))[0]
    records, _ = finish(cell, lambda lr: abs(lr - 1e-2))
    assert cell.rates(records) == [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]
    assert (cell.best_rate(records), cell.at_edge(records)) == (1e-2, False)
    records, _ = finish(cell, lambda lr: lr)  # ever lower: two extensions do not reach it
    assert cell.rates(records) == [2e-4, 5e-4, 1e-3, 2e-3, 5e-3]
    assert (cell.best_rate(records), cell.at_edge(records)) == (2e-4, True)


def test_rates_that_diverge_are_not_chosen_and_a_method_that_never_trains_ends(tmp_path):
    cell = cells(write_suite(tmp_path))[0]
    records, _ = finish(cell, lambda lr: math.inf if lr > 1e-3 else 1 / lr)
    assert cell.best_rate(records) == 1e-3
    records, order = finish(cell, lambda lr: math.inf)
    assert cell.best_rate(records) is None
    assert order == [(lr, 0) for lr in (1e-3, 2e-3, 5e-3, 5e-4, 2e-4)]
    assert summary(cell, records, {})["failures"] == [
        f"lr {lr:g}, seed 0: diverged" for lr in (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    ]
    # The first rate that trains is at the edge, so that the grid goes on as far as it may.
    records, _ = finish(cell, lambda lr: math.inf if lr > 5e-4 else lr)
    assert (cell.rates(records), cell.best_rate(records)) == ([2e-4, 5e-4, 1e-3, 2e-3, 5e-3], 2e-4)


def test_paper_protocol_has_one_rate(tmp_path):
    suite = write_suite(tmp_path, protocols={"paper": {"lr": "2e-5", "seeds": [0, 1]}})
    _, order = finish(cells(suite)[0], lambda lr: 1.0)
    assert order == [(2e-5, 0), (2e-5, 1)]


def test_shards_are_disjoint_and_complete(tmp_path):
    suite = write_suite(tmp_path, methods=["lora", "dora", "rslora", "pissa", "lora+"])
    parts = [cells(suite, (i, 3)) for i in range(3)]
    labels = [cell.entry.label for part in parts for cell in part]
    assert sorted(labels) == sorted(entry.label for entry in suite.entries)


# ---- results on disk ------------------------------------------------------------------------------------------------


def test_a_claim_that_was_taken_over_stays_with_its_new_owner(tmp_path):
    store, run = Store(tmp_path), make_run()
    claim = tmp_path / "claims" / run.name
    with store.claim(run):
        claim.write_text("another host 7")
    assert claim.read_text() == "another host 7"


def test_claims_exclude_each_other_and_end_with_the_block(tmp_path):
    first, second, run = Store(tmp_path), Store(tmp_path), make_run()
    with first.claim(run) as mine, second.claim(run) as theirs:
        assert (mine, theirs) == (True, False)
    with second.claim(run) as mine:
        assert mine
    first.save(run, {"metrics": {}})
    with second.claim(run) as mine:
        assert not mine  # it is finished
    assert list((tmp_path / "claims").iterdir()) == []


def test_claims_of_finished_runs_go_at_the_next_start(tmp_path):
    """A process that is killed between its record and the end of its claim leaves both of these."""
    run = make_run()
    Store(tmp_path).save(run, {"metrics": {}})
    for name in (run.name, f".{run.name}.begun", "unfinished"):
        (tmp_path / "claims" / name).touch()
    Store(tmp_path)
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["unfinished"]


def test_records_of_other_suites_count_and_stay_where_they_are(tmp_path):
    run, other = make_run(), Store(tmp_path / "other")
    other.save(run, {"metrics": {}})
    store = Store(tmp_path / "own", [tmp_path / "other"])
    assert store.load() == other.load()
    assert store.done(run)
    assert list(store.records.iterdir()) == []


def test_a_record_that_was_not_copied_whole_is_named(tmp_path):
    store = Store(tmp_path)
    (store.records / "half.json").write_text('{"run": ')
    with pytest.raises(ValueError, match=r"half\.json is no whole record .*: copy it again, or delete it"):
        store.load()


@pytest.mark.parametrize("shares_memory", [False, True])
@pytest.mark.parametrize("on", ["gpu", "cpu"])
def test_memory_that_others_fill_is_not_the_methods_failure(on, shares_memory, monkeypatch):
    def out_of_memory(*args):
        if on == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.empty(2**60, dtype=torch.int8)

    monkeypatch.setattr(Runner, "_ready", lambda *args: None)
    monkeypatch.setattr(Runner, "_train", out_of_memory)
    runner = Runner({}, shares_memory)
    if shares_memory:
        with pytest.raises(RuntimeError, match="memory"):
            runner(make_run())
    else:
        assert runner(make_run())["status"] == "out of memory"


def test_claims_of_processes_that_are_gone_are_taken_over(tmp_path):
    store, run = Store(tmp_path), make_run()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    claim = tmp_path / "claims" / run.name
    for owner, age, expected in [
        (f"{_place()} {gone.pid}", 0, True),
        (f"{_place()} {os.getpid()}", 0, False),
        (f"{_place()} {os.getpid()}", 10_000, True),  # a new process with an old one's number
        ("another-machine 1", 0, False),
        ("another-machine 1", 10_000, True),
    ]:
        claim.write_text(owner)
        os.utime(claim, (time.time() - age,) * 2)
        with store.claim(run) as mine:
            assert mine == expected, owner
        claim.unlink(missing_ok=True)


def test_a_run_that_stops_its_process_stops_no_other(tmp_path, monkeypatch):
    """Started again, all others come first."""
    suite = write_suite(tmp_path, protocols={"paper": {"lr": 1e-3, "seeds": [0, 1]}})
    store, part = Store(tmp_path), cells(suite)
    poison = part[0].pending({})[0]

    class Poisoned:
        def __init__(self, surroundings, shares_memory):
            pass

        def __call__(self, run):
            if run == poison:
                raise OSError("No space left on device")
            return record(run)

    monkeypatch.setattr("eval.rerun.work.Runner", Poisoned)
    for finished in (0, 3, 3):
        with pytest.raises(OSError, match="No space left"):
            train(part, store, {})
        assert len(store.load()) == finished


@pytest.mark.slow
def test_processes_end_with_the_command_that_started_them():
    script = (
        "import multiprocessing; from eval.rerun.work import _end_with_parent\nif __name__ == '__main__':\n    child "
        "= multiprocessing.get_context('spawn').Process(target=_end_with_parent)\n    child.start(); print(child.pid, "
        "flush=True); child.join()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=60)


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    store, run = Store(tmp_path), make_run()
    with pytest.raises(ValueError, match="JSON"):
        store.save(run, {"loss": math.nan})
    assert list((tmp_path / "records").iterdir()) == []


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """SIGKILL in the middle of the smoke suite; the second start repeats nothing that was finished, and names a broken
    package.
    """
    broken = tmp_path / "packages" / "MLorc_optim"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken')")
    command = [sys.executable, "-m", "eval.rerun", "smoke", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(broken.parent)}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / "records"
    try:
        while len(list(records.glob("*.json"))) < 2:
            assert first.poll() is None, "ended before it was killed"
            time.sleep(0.05)
    finally:
        first.kill()
    assert first.wait() == -signal.SIGKILL
    before = {path: path.read_bytes() for path in records.glob("*.json")}
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-2000:]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert list((tmp_path / "claims").iterdir()) == []
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["pending"] for row in report["rows"]] == [0] * 4
    assert [len(row["metrics"].get("test_loss", {}).get("values", [])) for row in report["rows"]] == [2, 2, 2, 0]
    assert "mlorc-optim" in report["rows"][3]["not_run"]
    text = (tmp_path / "report.md").read_text()
    assert "Methods that do not run today" in text
    assert "`python -m eval.rerun smoke --out" in text
    for plot in ("order", "losses", "sensitivity", "memory", "time"):
        assert (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_dry_run_prints_memory_time_and_what_does_not_run(tmp_path):
    suite = write_suite(
        tmp_path,
        methods=["lora", "lorapre-adam", "sophia", "mlorc"],
        step_seconds={"adapter": 30},
        protocols={
            "tuned": {"rates": {"adapter": [1e-3], "weights": [1e-3]}, "tuning_seeds": [0], "seeds": [0], "extend": 0}
        },
    )
    text = plan_table(cells(suite), {}, {"mlorc": "broken"})
    lora, pre, sophia, mlorc, total, _, unestimated = text.splitlines()[1:]
    assert "0/1" in lora
    assert "1.0 min" in lora
    row = cells(suite)[1]
    assert format_bytes(memory_estimate(row, base_config(row.model), {}).total) in pre
    assert "not run: broken" in mlorc
    assert "3.0 min" in total
    assert "–" in sophia
    assert unestimated.startswith("no estimate of memory for Sophia-H: RuntimeError: ")


def test_the_plan_knows_the_rank_of_the_second_moment(tmp_path):
    """For each rank it is p + q float32 numbers a matrix, here of seven in each of two layers (`_RANDOM_CONFIG`)."""
    rows = [{"method": "lorapre-adam-weights", "second_momentum_rank": k, "label": f"k_v={k}"} for k in (1, 3)]
    protocols = {"tuned": {"rates": {"weights": [1e-3]}, "tuning_seeds": [0], "seeds": [0]}}
    one, three = cells(write_suite(tmp_path, methods=rows, protocols=protocols))
    low, high = (memory_estimate(cell, base_config(cell.model), {}).state for cell in (one, three))
    sides = 2 * (32 + 32) + 2 * (16 + 32) + 3 * (32 + 64)  # attention's four, of which two are narrower, and the MLP's
    assert high - low == 2 * 4 * 2 * sides


def test_a_package_that_does_not_import_is_named(monkeypatch):
    method = Method("Broken", "adapter", build_adamw, package="mlorc-optim", module="no_such_module")
    monkeypatch.setattr("eval.methods.method.version", lambda package: "9.9")
    assert "mlorc-optim 9.9 does not import" in method.unavailable()
    assert METHODS["lora"].unavailable() is None


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("-1", 0, []), ("1,-1", 1, ["1"])],
)
def test_gpus_are_those_that_cuda_sees(monkeypatch, named, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected
