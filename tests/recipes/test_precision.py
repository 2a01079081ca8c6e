"""Which dtype a machine gets, who may name another one, and what is recorded of it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from suites import TRAINING, make_run, record, write_suite

from eval.rerun.__main__ import main as rerun
from eval.rerun.plan import cells
from eval.rerun.store import Store
from eval.rerun.suite_files import SUITES, load_suite
from recipes import OTHERS_LOGS, OTHERS_WARNINGS, precision, sft
from recipes.arguments import CONFIGS
from recipes.precision import Precision, choose, fast_dtype
from recipes.training import start_run

SMOLLM2 = ["--config", str(CONFIGS / "smollm2.yaml"), "--use_cpu"]


@pytest.fixture
def machine(monkeypatch):
    """machine(dtype): one that multiplies this dtype fast."""
    return lambda dtype: monkeypatch.setattr(precision, "fast_dtype", lambda device: (dtype, f"{device} of the test"))


@pytest.fixture
def fresh():
    """Nothing remembered of this machine, nor of those of the tests."""
    fast_dtype.cache_clear()
    yield
    fast_dtype.cache_clear()


# The choice


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_cuda_is_asked_for_its_compute_capability(monkeypatch, fresh, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert fast_dtype("cuda") == (
        name,
        f"compute capability {capability[0]}.{capability[1]}, and bfloat16 units come with 8.0",
    )


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize(("gain", "name"), [(0.2, "float32"), (1.4, "float32"), (6.0, "bfloat16")])
def test_others_are_timed(monkeypatch, fresh, device, gain, name):
    """On both sides of the least gain; where bfloat16 gains little, float32 rounds less."""
    monkeypatch.setattr(precision, "_seconds", lambda _: {torch.float32: 6e-3, torch.bfloat16: 6e-3 / gain})
    found, reason = fast_dtype(device)
    assert found == name
    assert f"takes this {device.upper()} 6.0 ms in float32, {6 / gain:.1f} ms in bfloat16" in reason


def test_a_device_that_refuses_bfloat16_gets_float32(monkeypatch, fresh):
    def refuse(device):
        raise TypeError("BFloat16 is not supported on MPS\nmore")

    monkeypatch.setattr(precision, "_seconds", refuse)
    assert fast_dtype("mps") == (
        "float32",
        "bfloat16 does not run on mps (BFloat16 is not supported on MPS)",
    )


def test_this_cpu_is_timed_once_and_keeps_its_threads(fresh, monkeypatch):
    threads = torch.get_num_threads()
    first = fast_dtype("cpu")
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(precision, "_seconds", None)
    assert fast_dtype("cpu") == first


def test_units_that_are_switched_off_are_not_counted_on():
    """The processor still names its units then; with oneDNN held to AVX2 no kernel uses them."""
    lowered = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    code = "from recipes.precision import fast_dtype; print(fast_dtype('cpu')[0])"
    printed = subprocess.run([sys.executable, "-c", code], env=os.environ | lowered, capture_output=True, text=True)
    assert printed.stdout == "float32\n", printed.stderr


def test_what_is_named_wins(machine):
    machine("bfloat16")
    assert choose("cpu") == Precision("bfloat16", True, "cpu of the test")
    assert choose("cpu", "float32") == Precision("float32", True, "cpu of the test")
    assert choose("cpu", bf16=False) == Precision("bfloat16", False, "cpu of the test")
    assert choose("cpu", "float16", False) == Precision("float16", False, "as given")
    assert str(choose("cpu", "float32", True)) == "dtype float32, bf16 true: as given"


# Recipes


@pytest.mark.parametrize(
    ("options", "dtype", "bf16"),
    [
        ([], "float32", False),
        (["--dtype", "auto"], "float32", False),
        (["--dtype", "bfloat16", "--bf16", "true"], "bfloat16", True),
        (["--bf16", "true"], "float32", True),
    ],
)
def test_a_recipe_takes_the_choice_where_nothing_is_named(machine, options, dtype, bf16):
    machine("float32")
    (one,) = sft.parse([*SMOLLM2, *options])
    assert (one.model.dtype, one.sft.bf16) == (dtype, bf16) == (one.precision.dtype, one.precision.bf16)
    named = {name.removeprefix("--") for name in options[::2]} - {"auto"}
    assert {"dtype", "bf16"} & one.config.keys() == (set() if options == ["--dtype", "auto"] else named)


def test_a_config_that_names_dtypes_wins(machine):
    machine("float32")
    (one,) = sft.parse(["--config", str(CONFIGS / "llama2_7b_lora_adamw.yaml"), "--use_cpu"])
    assert (one.model.dtype, one.sft.bf16, one.precision.reason) == ("bfloat16", True, "as given")
    machine("bfloat16")
    (one,) = sft.parse(["--config", str(CONFIGS / "smollm2_full.yaml"), "--use_cpu"])
    assert (one.model.dtype, one.sft.bf16) == ("float32", True)


def test_fp16_excludes_bf16_and_takes_float32_weights(machine):
    machine("bfloat16")
    (one,) = sft.parse([*SMOLLM2, "--fp16", "true"])
    assert (one.sft.fp16, one.sft.bf16, one.model.dtype) == (True, False, "float32")
    (one,) = sft.parse([*SMOLLM2, "--fp16", "true", "--dtype", "float16"])
    assert (one.sft.fp16, one.sft.bf16, one.model.dtype) == (True, False, "float16")


def test_a_run_says_and_records_its_dtypes_and_goes_on_with_them(machine, tmp_path, capsys):
    machine("bfloat16")
    command = [*SMOLLM2, "--output_dir", str(tmp_path)]
    (one,) = sft.parse(command)
    start_run(tmp_path, one.config, one.precision, resume=False)
    assert capsys.readouterr().out == "dtype bfloat16, bf16 true: cpu of the test\n"
    (start,) = json.loads((tmp_path / "environment.json").read_text())
    assert start["precision"] == {"dtype": "bfloat16", "bf16": True, "reason": "cpu of the test"}
    machine("float32")  # another machine
    assert sft.parse([*command, "--resume"])[0].precision.dtype == "float32"  # nothing was trained yet
    (tmp_path / "checkpoint-1").mkdir()
    assert sft.parse(command)[0].precision.dtype == "float32"
    assert sft.parse([*command, "--resume", "--dtype", "float32"])[0].model.dtype == "float32"
    (again,) = sft.parse([*command, "--resume"])
    assert (again.model.dtype, again.sft.bf16, again.precision) == ("bfloat16", True, one.precision)


# Suites


def test_a_suite_takes_the_choice_and_a_suite_that_names_dtypes_wins(machine, tmp_path):
    machine("bfloat16")
    suite, found = write_suite(tmp_path, training={"steps": 2, "batch_size": 2, "micro_batch": 1}).settled({})
    assert (suite.training.adapter_dtype, suite.training.bf16) == ("bfloat16", True)
    assert found == Precision("bfloat16", True, "cpu of the test")
    suite, found = write_suite(tmp_path).settled({})
    assert (suite.training.adapter_dtype, suite.training.bf16, found.reason) == ("float32", False, "as given")


def test_a_suite_goes_on_in_the_dtypes_of_its_finished_runs(machine, tmp_path):
    suite = write_suite(tmp_path, training={"steps": 2, "batch_size": 2, "micro_batch": 1})
    machine("bfloat16")
    run = make_run()  # in float32, from a machine without units
    records = {run.name: record(run)}
    settled, found = suite.settled(records)
    assert settled.training == TRAINING
    assert found == Precision("float32", False, "as in the finished runs")
    other = suite.settled({})[0].run("random", suite.entries[0], 1e-3, 0)
    with pytest.raises(
        ValueError, match="of adapter_dtype bfloat16, bf16 true and of adapter_dtype float32, bf16 false: name"
    ):
        suite.settled({**records, other.name: record(other)})


@pytest.mark.parametrize("name", ["rules", "table2-small"])
@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_runs_in_git_are_found_on_every_machine(machine, name, fast):
    """All but LoRA-Pre's with Adam, whose second moment has a rank of its own since they were trained."""
    machine(fast)
    records = Store(SUITES.parent / "results" / name).load()
    suite, _ = load_suite(name).settled(records)
    others = [cell for cell in cells(suite) if "second_momentum_rank" not in cell.method.options]
    assert others
    assert all(not cell.pending(records) for cell in others)


def test_a_record_holds_its_dtypes(machine, tmp_path, capsys):
    machine("float32")
    write_suite(
        tmp_path,
        training={"steps": 1, "batch_size": 1, "micro_batch": 1},
        methods=["lora"],
        protocols={"paper": {"lr": 1e-3, "seeds": [0]}},
    )
    rerun([str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")])
    (found,) = Store(tmp_path / "out").load().values()
    assert (found["run"]["training"]["adapter_dtype"], found["run"]["training"]["bf16"]) == ("float32", False)
    assert found["environment"]["precision"]["reason"] == "cpu of the test"
    assert "dtype float32, bf16 false: cpu of the test" in capsys.readouterr().out


# What other packages say


def test_their_messages_are_silenced_and_no_others():
    code = """
import recipes, warnings, logging
for category, text in recipes.OTHERS_WARNINGS:
    warnings.warn(text + " and more", category)
    warnings.warn("Not: " + text, category)
for name, text in recipes.OTHERS_LOGS:
    logging.getLogger(name).warning(text + " and more")
    logging.getLogger(name).warning("Not: " + text)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert said.count("Not: ") == len(OTHERS_WARNINGS) + len(OTHERS_LOGS)
    assert "and more" not in said
