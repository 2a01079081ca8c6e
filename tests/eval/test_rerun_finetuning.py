"""Fine-tuning suites: their data, and the model that is pre-trained where it is missing."""

import json
import sys
from collections import Counter

import pytest
import yaml

from eval.rerun import models
from eval.rerun.__main__ import main
from eval.rerun.data import load_splits
from eval.rerun.plan import cells
from eval.rerun.suite_files import load_suite

CODE = {"source": "code", "package": "networkx", "characters": 400, "validation": 20, "test": 30}
CALCULATIONS = {"source": "calculations", "validation": 200, "test": 800}


@pytest.mark.parametrize("data", [CODE, CALCULATIONS])
def test_held_out_rows_are_the_same_for_every_run_and_trained_on_by_none(data):
    first, second = load_splits(data, 400, seed=0), load_splits(data, 400, seed=1)
    assert first.test[:] == second.test[:]
    assert first.validation[:] == second.validation[:]
    assert (len(first.train), len(first.validation), len(first.test)) == (400, data["validation"], data["test"])
    assert first.train[:] != second.train[:]
    assert first.train[:] == load_splits(data, 400, seed=0).train[:]

    def texts(rows):
        return {row["prompt"] + row["completion"] for row in rows}

    held_out = texts(first.validation) | texts(first.test)
    assert len(held_out) == data["validation"] + data["test"]
    assert not held_out & (texts(first.train) | texts(second.train))


def test_calculations_are_right_and_as_many_of_one_operation_as_of_two():
    splits = load_splits(CALCULATIONS, 400, seed=0)
    for row in [*splits.train, *splits.test]:
        expression = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        assert eval(expression) == int(row["answer"])
        assert row["completion"] == f" {row['answer']}"
    assert sum(prompt.count(" ") == 3 for prompt in splits.train["prompt"]) == 200
    ((most, count),) = Counter(splits.test["answer"]).most_common(1)
    assert (most, count) == ("6", 41)  # what docs/quality.md says of always answering this
    (problems,) = splits.problems.values()
    assert problems.verdicts([" 3", " -3"], ["3", "3"]) == {"accuracy": [True, False]}


def test_too_few_pieces_of_code_are_named():
    with pytest.raises(ValueError, match=r"networkx has \d+ held-out pieces of 400 characters, expected 1000030"):
        load_splits(CODE | {"validation": 10**6}, 4, seed=0)
    with pytest.raises(FileNotFoundError, match="pip install no_such_package"):
        load_splits(CODE | {"package": "no_such_package"}, 4, seed=0)


def test_generated_problems_have_no_more_operations_than_asked():
    splits = load_splits({"source": "generated", "validation": 4, "test": 8, "max_operations": 2}, 20, seed=0)
    assert all(row["completion"].count("=") <= 2 for row in [*splits.train, *splits.test])


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The suite's model in a folder of its own, made of a tiny Llama by two steps on one text."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} ashes and {i * i} birches " * 40}) + "\n" for i in range(60)))
    options = {
        "dataset_name": str(text),
        "max_steps": 2,
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
    }
    options |= {"num_hidden_layers": 1, "num_attention_heads": 2, "eval_tokens": 200, "per_device_train_batch_size": 2}
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump({"base": "pretrain/llama_4m_adamw.yaml", "use_cpu": True} | options)
    )
    calls, pretrain = [], models.pretrain.main

    def counted(argv):
        calls.append(argv)
        pretrain(argv)

    monkeypatch.setattr(models.pretrain, "main", counted)
    monkeypatch.setitem(models.CHECKPOINTS, "llama-4m", str(tmp_path / "tiny"))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", models.pretrain.__spec__)
    return calls


def test_the_model_is_made_once_and_its_tokenizer_leaves_prompts_open(small, monkeypatch):
    made = models.make_base("llama-4m")
    assert made == models.make_base("llama-4m")
    assert len(small) == 1
    model, tokenizer = models.load_base("llama-4m")
    assert model.config.hidden_size == 32
    assert tokenizer.eos_token_id not in tokenizer("12 birches").input_ids
    assert models.make_base("random") == {}
    with monkeypatch.context() as other:
        other.setitem(models.HELD_OUT_LOSSES, models.CHECKPOINTS["llama-4m"], 1.0)
        with pytest.raises(ValueError, match=r"held-out loss \d\.\d{4}, expected 1.0 ± 0.005: runs from it cannot"):
            models.make_base("llama-4m")
    config = models.CONFIGS / "pretrain" / f"{models.CHECKPOINTS['llama-4m']}.yaml"
    config.write_text(config.read_text().replace("num_attention_heads: 2", "num_attention_heads: 4"))
    with pytest.raises(ValueError, match=r"num_attention_heads=4 \(was 2\). Delete it to make it anew"):
        models.make_base("llama-4m")
    assert len(small) == 1


@pytest.mark.slow
def test_a_fine_tuning_suite_runs_from_pre_training_to_report(small, tmp_path):
    suite = {
        "base": "finetune-arithmetic",
        "training": {"steps": 2, "batch_size": 4, "micro_batch": 4},
        "data": {"source": "calculations", "validation": 4, "test": 8},
        "answers": 4,
        "protocols": {
            "paper": {"lr": 2e-5, "seeds": [0]},
            "tuned": {"rates": {"adapter": [1e-3], "weights": [1e-3]}, "tuning_seeds": [0], "seeds": [0], "extend": 0},
        },
        "methods": ["lora", {"method": "lorapre-adam-weights", "label": "LoRA-Pre"}],
    }
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    main([str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## llama-4m, protocol `paper`" in text
    assert "## llama-4m, protocol `tuned`" in text
    assert "Runs that failed" not in text
    assert f"llama-4m {models.make_base('llama-4m')['llama-4m']}" in text  # which of its makings

    missing, *others = sorted((tmp_path / "out" / "records").iterdir())
    missing.unlink()
    for path in others:
        record = json.loads(path.read_text())
        record["environment"]["versions"]["llama-4m"] = "0123456789ab"  # as another machine makes it
        path.write_text(json.dumps(record))
    main([str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")])
    assert missing.exists()
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"llama-4m {made}" in report for made in ("0123456789ab", models.make_base("llama-4m")["llama-4m"]))


def test_suites_of_the_study_have_the_same_methods():
    """Every adapter and weight method, but no ablation, at r = 8 on both kinds of data; all adapters at r = 64."""
    from eval.methods import METHODS

    adapters = {name for name, method in METHODS.items() if method.trains == "adapter"}
    for name in ("finetune-small", "finetune-arithmetic"):
        suite = load_suite(name)
        assert {entry.method for entry in suite.entries} == METHODS.keys() - {"ablation"}
        assert suite.training.rank == 8
        r64 = load_suite(f"{name}-r64")
        assert {entry.method for entry in r64.entries} == adapters
        assert r64.training.rank == 64
        assert (r64.data, r64.training.steps) == (suite.data, suite.training.steps)
    assert len(cells(load_suite("finetune-smollm2"))) == 6
