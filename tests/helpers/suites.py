"""This module makes suites, runs and records for the tests of `eval.rerun`, without training."""

import json
import math

from eval.methods import METHODS
from eval.rerun.suite import Run, Training
from eval.rerun.suite_files import load_suite

DATA = {"source": "generated", "validation": 4, "test": 4}
TRAINING = Training(steps=2, batch_size=2, micro_batch=1, bf16=False, adapter_dtype="float32")


def make_run(method="lora", lr=1e-3, seed=0, answers=0, **options) -> Run:
    """Return a run of a method. ``options`` are the method's."""
    return Run("random", DATA, TRAINING, method, METHODS[method].merged(options), lr, seed, answers)


def write_suite(folder, **changes):
    """Write a suite of two methods and a grid of three rates into a folder, and load it.

    ``changes`` override fields of the suite.
    """
    said = {
        "description": "a test",
        "models": ["random"],
        "data": DATA,
        "training": {"steps": 2, "batch_size": 2, "micro_batch": 1, "bf16": False, "adapter_dtype": "float32"},
        "protocols": {
            "tuned": {"rates": {"adapter": [1e-3, 2e-3, 5e-3]}, "tuning_seeds": [0], "seeds": [0, 1, 2], "extend": 2}
        },
        "methods": ["lora", "lorapre-adam"],
    }
    path = folder / "suite.yaml"
    path.write_text(json.dumps(said | changes))  # JSON is YAML too.
    return load_suite(str(path))


def record(run, loss=1.0, **more):
    """Return a record of a run with a given loss, as `Runner` writes it. ``more`` overrides its fields."""
    return {
        "run": run.declaration,
        "status": "finished" if math.isfinite(loss) else "diverged",
        "metrics": {"validation_loss": loss if math.isfinite(loss) else None, "test_loss": loss + 0.5},
        "package": None,
        "optimizer": "AdamW",
        "weights_bytes": 100,
        "gradient_bytes": 10,
        "state_bytes": 20,
        "peak_bytes": 1000,
        "peak_of": "resident memory of the process",
        "train_seconds": 1.0,
        "total_seconds": 2.0,
        "optimizer_seconds_per_step": 0.1,
        "log": {"step": [1, 2], "loss": [3.0, 2.0]},
        "environment": {"command": "python -m eval.rerun x", "machine": "2 CPU cores, 1 threads", "device": "cpu"},
    } | more


def finish(cell, loss_at):
    """Go through a cell's plan to its end, with the loss ``loss_at(lr)`` for each run.

    Returns all records by name, and (lr, seed) of the runs in their order.
    """
    records, order = {}, []
    while pending := cell.pending(records):
        run = pending[0]
        order.append((run.lr, run.seed))
        records[run.name] = record(run, loss_at(run.lr))
    return records, order
