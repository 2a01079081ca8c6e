"""Runs of a pre-training suite: Llamas from random weights, on the same rows for every method."""

import dataclasses
import json
import random

import pytest
from suites import record

from eval.rerun.dry_run import memory_estimate
from eval.rerun.models import base_config
from eval.rerun.plan import cells
from eval.rerun.pretraining import PretrainingRunner
from eval.rerun.report import write_report
from eval.rerun.suite import Pretraining, Run
from eval.rerun.suite_files import load_suite

TRAINING = Pretraining(
    steps=4, batch_size=8, micro_batch=8, max_length=16, warmup=0.25, adapter_dtype="float32", bf16=False
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """make(method, **options): a run on a file of random words."""
    words, draw = ["ash", "birch", "elm", "fir", "larch", "oak", "pine", "yew"], random.Random(0)
    path = tmp_path_factory.mktemp("text") / "trees.jsonl"
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"source": str(path), "vocab_size": 300, "packing": True, "shuffle_documents": 8, "eval_tokens": 400}

    def make(method, seed=0, lr=1e-2, training=TRAINING, **options):
        from eval.methods import METHODS

        return Run("llama-1m", data, training, method, METHODS[method].merged(options), lr, seed)

    return make


@pytest.fixture(scope="module")
def runner():
    return PretrainingRunner({"command": "test", "versions": {}, "machine": "test", "device": "cpu"})


def test_a_run_trains_and_is_repeatable(runner, run):
    first, again = runner(run("lorapre-adam-weights")), runner(run("lorapre-adam-weights"))
    assert first["status"] == "finished", first.get("error")
    assert first["metrics"] == again["metrics"]
    assert first["log"]["loss"][-1] < first["log"]["loss"][0] - 0.1  # from the logarithm of 300 pieces
    assert first["metrics"] != runner(run("lorapre-adam-weights", seed=1))["metrics"]
    json.dumps(first, allow_nan=False)


def test_methods_differ_in_the_matrices_alone(runner, run):
    """At a matrices' rate of nothing all methods train the same embeddings, norms and head, at ``others_lr``."""
    still = [runner(run(method, lr=1e-30))["metrics"] for method in ("adamw", "scale", "lorapre-adam-weights")]
    assert still[0] == still[1] == still[2]
    frozen = dataclasses.replace(TRAINING, others_lr=1e-30)
    assert runner(run("adamw", lr=1e-30, training=frozen))["metrics"]["test_loss"] > still[0]["test_loss"] + 0.1


def test_second_order_methods_have_their_graph(runner, run):
    found = runner(run("sophia-weights", lr=1.0))
    assert found["status"] == "finished", found.get("error")
    assert found["optimizer"] == "SophiaH"


def test_state_of_the_matrices_is_counted_apart(runner, run):
    found = {method: runner(run(method)) for method in ("adamw", "scale", "lorapre-adam-weights")}
    config = base_config("llama-1m")
    width, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    entries = layers * (4 * width * width + 3 * width * mlp)
    sides = layers * (4 * 2 * width + 3 * (width + mlp))
    assert found["adamw"]["state_bytes"] == pytest.approx(8 * entries, rel=1e-3)  # and counters
    assert found["scale"]["state_bytes"] == 0
    assert found["lorapre-adam-weights"]["state_bytes"] == pytest.approx(4 * (8 + 1) * sides, rel=0.01)


@pytest.mark.parametrize("place", [0, 1])
def test_the_plan_counts_what_a_run_holds(runner, run, place):
    cell = cells(load_suite("pretrain-small"))[place]
    config = base_config("llama-1m")
    config.vocab_size = 300
    planned, found = memory_estimate(cell, config, {}), runner(run(cell.entry.method, **cell.entry.options))
    assert planned.state == pytest.approx(found["all_state_bytes"], rel=1e-3)  # and counters
    assert planned.gradients == found["gradient_bytes"]


def test_the_suite_is_read_and_reported(tmp_path):
    suite = load_suite("pretrain-small")
    assert isinstance(suite.training, Pretraining)
    assert suite.training.others_lr == 3e-3
    part = cells(suite)
    runs = [run for cell in part[:2] for run in (*cell.tuning_runs({}), *cell.final_runs({}))]
    records = {run.name: record(run, 0.5) for run in runs}
    assert "AdamW" in write_report(suite, cells(suite), records, {}, tmp_path)
