"""Runs of the rerun: every method trains, what a run depends on, what its record holds, and PEFT's format of it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from roundoff import gamma
from suites import TRAINING, make_run, record, write_suite

from eval.answers import JUDGES
from eval.methods import METHODS, Method
from eval.rerun.data import load_splits
from eval.rerun.dry_run import memory_estimate
from eval.rerun.models import load_base
from eval.rerun.peft_format import optimizer_kwargs, write_peft_results
from eval.rerun.plan import cells
from eval.rerun.report import write_report
from eval.rerun.store import Store
from eval.rerun.suite_files import load_suite
from eval.rerun.training import Runner
from eval.rerun.work import train
from lorapre_peft import LoRAPreConfig
from lorapre_peft.integrations.create import OPTIMIZERS
from lorapre_peft.lowrank.rules import RESIDUAL_WEIGHT
from recipes.data import ALPACA_PROMPT, write_manifest
from recipes.training import held_bytes, sft_config


@pytest.fixture(scope="module")
def runner():
    disable_progress_bars()
    return Runner({"command": "test", "versions": {}, "machine": "test", "device": "cpu"})


@pytest.fixture(scope="module")
def untrained(runner) -> float:
    """The random model's test loss: every method starts from its function."""
    return runner(make_run(lr=1e-9))["metrics"]["test_loss"]


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains(name, runner, untrained):
    """Three steps change the model, and the record has what the report reads. (At the first the rate is 0, at the
    second LoFT's B is.)
    """
    if reason := METHODS[name].unavailable():
        pytest.skip(reason)
    run = make_run(name, lr=1e-2)
    found = runner(dataclasses.replace(run, training=dataclasses.replace(run.training, steps=3)))
    assert found["status"] == "finished", found.get("error")
    assert abs(found["metrics"]["test_loss"] - untrained) > 1e-4
    assert (found["state_bytes"] > 0) == (METHODS[name].state != "0")
    assert len(found["log"]["loss"]) == 3
    json.dumps(found, allow_nan=False)


def test_runs_leave_the_shared_model_as_it_was(runner):
    """PiSSA and LoRA-GA write into the base weights; the next run must not see it."""
    base, _ = runner.base("random")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = runner(make_run())["metrics"]
    for name in ("pissa", "lora-ga", "adamw"):
        runner(make_run(name, lr=1e-2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert runner(make_run())["metrics"] == plain


def test_the_base_is_cast_but_not_its_frequencies(runner, monkeypatch):
    """`from_pretrained` in bfloat16 keeps RoPE's frequencies in float32; rounded, they turn far positions by a
    radian.
    """
    seen = []

    def keep(model, args, options):
        seen.append(model)
        return METHODS["lora"].build(model, args, options)

    monkeypatch.setitem(METHODS, "kept", Method("Kept", "adapter", keep))
    runner(dataclasses.replace(make_run("kept"), training=dataclasses.replace(TRAINING, adapter_dtype="bfloat16")))
    base, _ = runner.base("random")
    rotary, expected = (model.get_decoder().rotary_emb.inv_freq for model in (seen[0].get_base_model(), base))
    assert torch.equal(rotary, expected)
    assert seen[0].get_decoder().layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16


def test_paper_data_from_local_files(tmp_path):
    """Without the hub: the manifest replaces the tokenizer; GSM8K is judged both ways."""

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    rows = [{"type": "GSM", "query": f"{n}?", "response": f"#### {n}"} for n in range(6)]
    metamath, manifest = write("metamath.jsonl", rows), tmp_path / "manifest.json"
    (tmp_path / "gsm8k").mkdir()
    write("gsm8k/test.jsonl", [{"question": "1000?", "answer": "#### 1,000"}])
    prepared = DatasetDict()
    for split, taken in {"train": [0, 1], "validation": [2], "test": [4, 5]}.items():
        prompts = [ALPACA_PROMPT.format(instruction=rows[row]["query"]) for row in taken]
        completions = [f" {rows[row]['response']}" for row in taken]
        prepared[split] = Dataset.from_dict({"prompt": prompts, "completion": completions, "row": taken})
    write_manifest(prepared, metamath, manifest)
    data = {
        "source": "metamath",
        **{"metamath": metamath, "manifest": str(manifest), "validation": 1, "test": 2},
        "gsm8k": str(tmp_path / "gsm8k"),
        "math500": write("math.jsonl", [{"problem": "half?", "answer": r"\frac12"}]),
    }
    splits = load_splits(data, 2, seed=0)
    assert splits.test["completion"] == [" #### 4", " #### 5"]
    gsm8k = splits.problems["gsm8k"]
    assert gsm8k.rows["prompt"] == [ALPACA_PROMPT.format(instruction="1000?")]
    assert gsm8k.verdicts(["#### 1000"], gsm8k.rows["answer"]) == {"gsm8k": [True], "gsm8k_paper": [False]}
    assert splits.problems["math500"].rows["answer"] == [r"\frac12"]


def test_failures_are_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, runner):
    def explode(model, args, options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(METHODS, "exploding", Method("Exploding", "adapter", explode))
    suite = write_suite(
        tmp_path,
        methods=["exploding", "lora"],
        protocols={"paper": {"lr": 1e-3, "seeds": [0]}},
        answers=2,
        metrics=["test_loss", "accuracy"],
    )
    store = Store(tmp_path)
    train(cells(suite), store, {"command": "test", "versions": {}, "machine": "test", "device": "cpu"})
    text = write_report(suite, cells(suite), store.load(), {}, tmp_path)
    assert "Exploding, paper, lr 0.001, seed 0: out of memory (OutOfMemoryError: no room)" in text
    (good,) = [r for r in store.load().values() if r["status"] == "finished"]
    assert good["metrics"]["accuracy"] == good["verdicts"]["accuracy"].count("1") / 2
    assert len(good["verdicts"]["accuracy"]) == 2


def test_data_that_cannot_be_read_stops_the_suite_instead_of_failing_every_run(runner):
    data = {"source": "code", "package": "no_such_package", "characters": 40, "validation": 1, "test": 1}
    with pytest.raises(FileNotFoundError, match="no_such_package, which is not installed"):
        runner(dataclasses.replace(make_run(), data=data))


def test_divergence_is_recorded(runner):
    found = runner(make_run("adamw", lr=1e30))
    assert found["status"] == "diverged"
    assert found["metrics"]["validation_loss"] is None


def test_held_bytes_finds_state_wherever_it_is():
    """GaLore's projectors are objects in its state: r·(min + 2 max) numbers per p×q matrix, by its source."""
    pytest.importorskip("galore_torch")
    model, _ = load_base("random")
    method = METHODS["galore"]
    model = method.attach(model, None)
    args = sft_config(Path("unused"), lr=1e-3, steps=1, batch_size=1, seed=0, bf16=False)
    optimizer = method.build(model, args, method.merged({"rank": 4}))
    params = [param for param in model.parameters() if param.requires_grad]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    expected = sum(4 * 4 * (min(p.shape) + 2 * max(p.shape)) for p in params)
    assert held_bytes(optimizer) == expected


@pytest.mark.parametrize("name", ["lora", "adamw", "galore", "lorapre-adam-weights"])
def test_estimated_state_is_what_a_run_holds(name, tmp_path, runner):
    suite = write_suite(tmp_path, methods=[name], protocols={"paper": {"lr": 1e-3, "seeds": [0]}})
    (cell,) = cells(suite)
    found = memory_estimate(cell, load_base("random")[0].config, {})
    measured = runner(cell.pending({})[0])
    assert found.gradients == measured["gradient_bytes"]
    assert found.state == pytest.approx(measured["state_bytes"], rel=0.02)


# What `suites.record` leaves out, since only PEFT's format reads it.
RECORDED = {
    **{"created_at": "now", "adapter_bytes": 4, "trained_parameters": 1, "parameters": 2, "tokens": 3},
    "memory": {"mean": 1, "max": 2, "percentile_99": 2},
}


def test_peft_format(tmp_path, runner):
    """PEFT's own reader (method_comparison/processing.py) takes these fields; the adapter's configuration opens in
    PEFT.
    """
    suite = write_suite(tmp_path, methods=["lorapre-adam"], protocols={"paper": {"lr": 1e-3, "seeds": [0]}}, answers=2)
    (cell,) = cells(suite)
    (run,) = cell.pending({})
    assert write_peft_results([cell], {run.name: runner(run)}, tmp_path) == 1
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "results").glob("lora--*.json"))
    info, measured = result["run_info"], result["train_info"]
    assert info["peft_config"]["peft_type"] == "LORA"
    assert set(measured["metrics"][-1]) >= {"test accuracy", "train loss", "train samples", "train total tokens"}
    assert measured["metrics"][-1]["train total tokens"] > 0
    for name in (
        "accelerator_memory_reserved_avg",
        "accelerator_memory_max",
        "accelerator_memory_reserved_99th",
        "file_size",
    ):
        assert isinstance(measured[name], int)
    for package in ("peft", "transformers", "datasets", "torch", "bitsandbytes"):
        assert result["meta_info"]["package_info"][f"{package}-version"]
    experiment = tmp_path / "experiments" / info["experiment_name"]
    assert type(LoraConfig.from_pretrained(experiment)) is LoraConfig
    assert LoRAPreConfig.from_pretrained(experiment).momentum_rank == 2
    params = json.loads((experiment / "training_params.json").read_text())
    assert (params["optimizer_type"], params["optimizer_kwargs"]["update_rule"]) == ("LoRAPreAdamW", "als")


@pytest.mark.parametrize("name", ["lora", "lora+", "lora-fa"])
def test_peft_format_gives_what_pefts_builders_need(name, tmp_path, runner):
    """As PEFT's ``get_optimizer_and_scheduler`` calls them: torch's classes by name, and its two own factories."""
    suite = write_suite(tmp_path, methods=[name], protocols={"paper": {"lr": 1e-3, "seeds": [0]}}, answers=2)
    (cell,) = cells(suite)
    (run,) = cell.pending({})
    write_peft_results([cell], {run.name: record(run, metrics={"accuracy": 1.0}, **RECORDED)}, tmp_path)
    (path,) = tmp_path.glob("experiments/lora/*/training_params.json")
    params = json.loads(path.read_text())
    kind, options = params["optimizer_type"], params["optimizer_kwargs"]
    model = get_peft_model(load_base("random")[0], METHODS[name].adapter_config(8, {}))
    if kind == "lora+":
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
    elif kind == "lora-fa":
        optimizer = create_lorafa_optimizer(model, **options)
    else:
        optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    if name != "lora-fa":
        assert [(tuple(g["betas"]), g["weight_decay"]) for g in optimizer.param_groups[:1]] == [((0.9, 0.95), 0.0)]


@pytest.mark.parametrize("suite", ["rules", "table2-small"])
def test_options_of_a_suite_reach_the_optimizer(suite, make_llama):
    """Of LoRA-Pre's rows, whose rule, rank and ρ the suites compare."""
    suite = load_suite(suite)
    rows = [entry for entry in suite.entries if entry.method.startswith("lorapre")]
    assert rows
    for entry in rows:
        method = METHODS[entry.method]
        model = make_llama(num_hidden_layers=1, hidden_size=128)  # no matrix too small for k = 32
        model = method.prepare(model, 8, entry.options, lambda: None)
        args = sft_config(Path("unused"), lr=1e-3, steps=1, batch_size=1, seed=0, bf16=False)
        optimizer = method.build(model, args, entry.options)
        assert type(optimizer) is OPTIMIZERS[entry.options["optimizer"]]
        (group,) = optimizer.param_groups
        for name in ("momentum_rank", "update_rule"):
            assert group[name] == entry.options[name]
        default = RESIDUAL_WEIGHT if group["update_rule"] == "als" else None
        given = entry.options["residual_weight"]
        assert group["residual_weight"] == (default if given is None else given)
        assert group.get("betas", group.get("adamw_betas")) == (0.9, 0.95)
        assert group["weight_decay"] == 0
        assert group.get("adjust_lr_fn") == entry.options.get("adjust_lr_fn")


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def lost_gpu(*args, **kwargs):
    raise RuntimeError("CUDA error: unspecified launch failure")


def test_a_full_disk_is_not_the_methods_failure(runner, monkeypatch):
    monkeypatch.setattr("eval.rerun.training.tempfile.TemporaryDirectory", full_disk)
    with pytest.raises(OSError, match="No space left"):
        runner(make_run())


def test_a_training_whose_answers_cannot_be_judged_keeps_its_losses(tmp_path, runner, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no judge")

    monkeypatch.setattr("eval.rerun.training.generate", broken)
    suite = write_suite(tmp_path, methods=["lora"], protocols={"paper": {"lr": 1e-3, "seeds": [0]}}, answers=2)
    (cell,) = cells(suite)
    (run,) = cell.pending({})
    found = runner(run)
    assert found["status"] == "finished"
    assert found["metrics"]["test_loss"] > 0
    text = write_report(suite, [cell], {run.name: found}, {}, tmp_path)
    assert "seed 0: trained, but answered no problems (RuntimeError: no judge)" in text
    monkeypatch.setattr("eval.rerun.training.generate", full_disk)
    with pytest.raises(OSError, match="No space left"):
        runner(run)
    monkeypatch.setattr("eval.rerun.training.generate", lost_gpu)
    with pytest.raises(RuntimeError, match="CUDA error"):
        runner(run)


def test_answers_of_one_set_are_kept_when_the_next_cannot_be_judged(runner, monkeypatch):
    def broken(*args, **kwargs):
        yield {"gsm8k": [True, False]}
        raise RuntimeError("no judge")

    monkeypatch.setattr(Runner, "_answers", broken)
    found = runner(make_run(answers=2))
    assert (found["metrics"]["gsm8k"], found["answers_error"]) == (0.5, "RuntimeError: no judge")
    assert found["verdicts"] == {"gsm8k": "10"}


def test_a_judge_that_does_not_work_is_found_before_training(runner, monkeypatch):
    def broken(*args):
        raise RuntimeError("no judge")

    monkeypatch.setitem(JUDGES, "number", broken)
    with pytest.raises(RuntimeError, match="no judge"):
        runner(make_run(answers=2))


def test_second_order_graphs_are_kept_only_where_they_are_needed(runner, monkeypatch):
    """At every tenth step, of the last micro-batch: the whole batch's would not fit a 7B model's GPU."""
    kept, backward = [], torch.Tensor.backward

    def noted(self, *args, **kwargs):
        kept.append(bool(kwargs.get("create_graph")))
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    training = dataclasses.replace(make_run().training, steps=11)
    found = runner(dataclasses.replace(make_run("sophia", lr=1e-2), training=training))
    assert found["status"] == "finished"
    assert [i for i, graph in enumerate(kept) if graph] == [1, 21]
    assert len(kept) == 22


@pytest.mark.parametrize(
    "name",
    ["lora-pro", "shampoo", "soap", "sophia", "loft", "lora-rite", "riemannion", "lorapre-adam", "lorapre-muon"],
)
def test_peft_format_names_every_argument_of_other_optimizers(name):
    run = make_run(name).declaration
    found = optimizer_kwargs(run)
    assert (found["lr"], found["weight_decay"]) == (1e-3, 0)
    assert found.get("betas", (0.9, 0.95)) == (0.9, 0.95)
    assert ("betas" in found) == (name not in ("sophia", "riemannion", "lorapre-muon"))


def test_mlorc_compresses_matrices_as_they_are():
    MLorcAdamW = pytest.importorskip("eval.optimizers.mlorc").MLorcAdamW  # the package by itself does not import
    matrix = torch.nn.Parameter(torch.zeros(9, 16))  # 144 entries: the package alone makes it 12×12
    optimizer = MLorcAdamW([matrix], lr=1.0, betas=(0.9, 0.9), rank=1, use_bias_correction=True)
    matrix.grad = torch.outer(torch.arange(1.0, 10), torch.arange(1.0, 17))
    optimizer.step()
    state = optimizer.state[matrix]
    expected = 0.1 * matrix.grad
    room = 2 * gamma(9 + 16) * expected.norm().item()  # an SVD's error is relative to the largest singular value
    torch.testing.assert_close(state["mu_m"] @ torch.diag(state["ms_m"]) @ state["mv_m"], expected, rtol=0, atol=room)
