"""The pre-training recipe on tiny Llamas and a few sentences: its configs, what a run leaves, how it goes on."""

import copy
import json
import shutil
import sys

import numpy
import pytest
import torch
from documents import TEXTS, VOCABULARY
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.methods import METHODS, pretraining_optimizer
from recipes import pretrain
from recipes.arguments import CONFIGS
from recipes.stream_trainer import perplexity

pytestmark = pytest.mark.usefixtures("without_units")

FOLDER = CONFIGS / "pretrain"
SMALL = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"vocab_size": VOCABULARY, "max_length": 16, "shuffle_documents": 7, "eval_tokens": 100, "eval_share": 0.2},
    **{"max_steps": 6, "save_steps": 3, "eval_steps": 3, "logging_steps": 1},
    **{"per_device_train_batch_size": 2, "total_batch_size": 4, "learning_rate": 0.01},
}


@pytest.fixture
def run(monkeypatch, tmp_path, corpus_file):
    """run(**options): the recipe's command line on the tiny model and text; returns the run's folder."""

    def call(folder="out", **options):
        given = SMALL | {"dataset_name": corpus_file, "output_dir": tmp_path / folder} | options
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        config = ["--config", str(FOLDER / "llama_1m_local.yaml"), "--use_cpu"]
        monkeypatch.setattr(sys, "argv", ["pretrain", *config, *words])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", pretrain.__spec__)
        pretrain.main()
        return tmp_path / folder

    return call


# GaLore's configs/llama_*.json and scripts/benchmark_c4: width, MLP, layers, heads, steps; LoRA-Pre's ranks (Table 1).
# For 9m and 35m there is no script, and no rank in the paper.
PUBLISHED = {
    "9m": (128, 352, 4, 4, None, None),
    "35m": (384, 1024, 6, 8, None, None),
    "60m": (512, 1376, 8, 8, 10_000, 128),
    "130m": (768, 2048, 12, 12, 20_000, 256),
    "350m": (1024, 2736, 24, 16, 60_000, 256),
    "1b": (2048, 5461, 24, 32, 100_000, 512),
}


def recipe(path, *options):
    return pretrain.parse(["--config", str(path), "--use_cpu", *options])


def parameters(one, tokenizer):
    with torch.device("meta"):
        return pretrain.build_model(one, tokenizer).num_parameters()


def test_the_configs_are_all_there():
    local = {"llama_1m_local", "llama_4m_local", "llama_4m_adamw"}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {f"llama_{size}_c4" for size in PUBLISHED} | local


@pytest.mark.parametrize("size", PUBLISHED)
def test_c4_configs_are_the_published_set_up(size, bpe):
    one = recipe(FOLDER / f"llama_{size}_c4.yaml")
    width, mlp, layers, heads, steps, rank = PUBLISHED[size]
    shape = (
        one.llama.hidden_size,
        one.llama.intermediate_size,
        one.llama.num_hidden_layers,
        one.llama.num_attention_heads,
    )
    assert shape == (width, mlp, layers, heads)
    assert one.training.max_steps == (steps or 10_000)
    assert one.method.method_options["momentum_rank"] == (rank or width // 4)
    assert one.training.train_batch_size * one.training.gradient_accumulation_steps == 512
    assert one.training.get_warmup_steps(one.training.max_steps) == one.training.max_steps // 10
    assert (one.corpus.max_length, one.corpus.packing, one.corpus.eval_tokens) == (256, False, 10_000_000)
    assert (one.training.weight_decay, one.training.max_grad_norm, one.data_seed) == (0, 0, 42)
    matrices = layers * (4 * width**2 + 3 * width * mlp)
    assert parameters(one, bpe) == 2 * 32_000 * width + matrices + (2 * layers + 1) * width


def test_the_learning_rate_falls_to_a_tenth(run):
    log = json.loads((run(warmup_steps=2) / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates[:3] == pytest.approx([0, 0.005, 0.01])
    assert rates[3:] == pytest.approx([0.01 * (0.1 + 0.9 * (1 + numpy.cos(numpy.pi * n / 4)) / 2) for n in (1, 2, 3)])


def test_the_local_configs_are_for_models_of_their_names_and_text_of_a_package(bpe):
    for name, size in {"llama_1m_local": 1.3e6, "llama_4m_local": 4.2e6, "llama_4m_adamw": 4.2e6}.items():
        one = recipe(FOLDER / f"{name}.yaml")
        assert parameters(one, bpe) == pytest.approx(size, rel=0.02)
        assert len(next(iter(one.corpus.documents(0)))["text"]) > 1000


def test_keys_win_over_the_config():
    one = recipe(
        FOLDER / "llama_60m_c4.yaml", "--packing", "true", "--method", "galore", "--method_options", "{rank: 4}"
    )
    assert (one.corpus.packing, one.method.method_options["rank"], one.method.method_options["scale"]) == (
        True,
        4,
        0.25,
    )


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_tokenizer_that_pads_with_its_end_token_has_that_trained_and_counted(run, tmp_path, bpe, packing):
    bpe = copy.deepcopy(bpe)
    bpe.pad_token = None
    bpe.save_pretrained(tmp_path / "given")
    folder = run(tokenizer_name=tmp_path / "given", packing=packing, max_length=15)
    tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert (model.get_input_embeddings().weight[tokenizer.eos_token_id] != 0).all()
    seen = json.loads((folder / "trainer_state.json").read_text())["num_input_tokens_seen"]
    assert seen == 6 * 4 * 15  # no document is shorter than a row


def test_a_run_leaves_a_model_that_transformers_opens_and_all_it_takes_to_repeat_it(run):
    folder = run(method="adamw")
    metrics = json.loads((folder / "all_results.json").read_text())
    assert metrics["eval_perplexity"] == pytest.approx(numpy.exp(metrics["eval_loss"]))
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    training = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in training] == [1, 2, 3, 4, 5, 6]
    assert all(entry["perplexity"] == pytest.approx(numpy.exp(entry["loss"])) for entry in training)
    assert all(entry["train_tokens_per_second"] > 0 for entry in training)
    assert [entry["step"] for entry in log if "eval_perplexity" in entry] == [3, 6]
    assert training[-1]["num_input_tokens_seen"] == 6 * 4 * 16  # packed rows have no padding
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    (environment,) = json.loads((folder / "environment.json").read_text())
    assert environment["command"].startswith("python -m recipes.pretrain --config")
    assert json.loads((folder / "manifest.json").read_text())["eval"]["tokens"] >= 100
    # Two float32 moments and a count of steps for each of four matrices of 16×16 and three of 16×24.
    assert metrics["optimizer_matrix_state_bytes"] == 8 * (4 * 16 * 16 + 3 * 16 * 24) + 7 * 4
    assert metrics["optimizer_state_bytes"] - metrics["optimizer_matrix_state_bytes"] > 2 * 4 * 2 * VOCABULARY * 16

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (folder / "model.safetensors").exists()
    assert model.dtype == torch.float32
    assert model.generation_config.use_cache
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    assert model(input_ids=ids, labels=ids).loss < numpy.log(VOCABULARY)  # of weights that know nothing


@pytest.mark.parametrize(
    "options",
    [
        {"packing": "false", "method_options": "{momentum_rank: 2}"},
        pytest.param(
            {"dataloader_num_workers": 1, "method": "adamw"}, marks=pytest.mark.slow
        ),  # it imports everything anew
        {
            "dtype": "bfloat16",
            "bf16": "true",
            "method": "lorapre-muon-weights",
            "method_options": "{momentum_rank: 2}",
        },
        {"method": "galore", "method_options": "{rank: 2, update_proj_gap: 2}", "others_learning_rate": 0.003},
    ],
    ids=["lorapre padded", "adamw worker", "muon bfloat16", "galore"],
)
def test_a_stopped_run_goes_on_bit_for_bit(run, options):
    folder = run(**options)
    finished = (folder / "model.safetensors").read_bytes()
    state = torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=False)
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    (folder / "model.safetensors").unlink()  # as if stopped behind the checkpoint of step 3
    shutil.rmtree(folder / "checkpoint-6")
    run(**options, resume="true")
    assert (folder / "model.safetensors").read_bytes() == finished
    assert_equal(torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=False), state)
    again = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "flos", "train_loss")
    for entries in (log, again):
        for entry in entries:
            for name in [name for name in entry if name.endswith(timed)]:
                del entry[name]
    assert again == log


def assert_equal(found, expected):
    """Tensors bit for bit, wherever they are in an optimizer's state."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_equal(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_equal(*pair)
    elif hasattr(expected, "__dict__"):  # GaLore's projector
        assert_equal(vars(found), vars(expected))
    else:
        assert found == expected


def test_fsdp2_finds_and_returns_the_state_of_all_parts(llama_path, tmp_path):
    """It makes a step with an optimizer that seems to have none, and numbers parameters by their names."""
    one = recipe(FOLDER / "llama_1m_local.yaml", "--output_dir", str(tmp_path))
    models, optimizers = [], []
    for _ in range(2):
        models.append(AutoModelForCausalLM.from_pretrained(llama_path))
        options = METHODS["lorapre-adam-weights"].merged({"momentum_rank": 2})
        optimizers.append(
            pretraining_optimizer(METHODS["lorapre-adam-weights"], models[-1], one.training, options, 0.01)
        )
    ids = torch.arange(8).reshape(1, 8)
    models[0](input_ids=ids, labels=ids).loss.backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
    weights = copy.deepcopy(models[0].state_dict())
    state = copy.deepcopy(optimizers[0].state_dict())
    saved = get_optimizer_state_dict(models[0], optimizers[0])
    assert_equal(models[0].state_dict(), weights)
    assert_equal(optimizers[0].state_dict(), state)
    set_optimizer_state_dict(models[1], optimizers[1], saved)
    assert_equal(optimizers[1].state_dict()["state"], state["state"])


def test_lorapre_logs_its_figures_beside_another_optimizer(run):
    log = json.loads((run() / "trainer_state.json").read_text())["log_history"]
    shares = [entry["lorapre/captured_energy"] for entry in log if "loss" in entry]
    assert len(shares) == 6
    assert 0 < shares[-1] < 1


def test_a_finished_run_is_not_trained_further(run):
    folder = run()
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "train_results.json")}
    run(resume="true")
    assert files == {name: (folder / name).read_bytes() for name in files}


def test_a_text_that_is_all_held_out(run):
    with pytest.raises(ValueError, match=r"leaves no document to train on: .*eval_share=1"):
        run(eval_share="1")


def test_a_run_goes_on_with_its_own_data_and_number_of_processes_only(run, tmp_path, corpus_file):
    with pytest.raises(SystemExit, match="holds an earlier run: add --resume"):
        run(folder=run().name)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus_file.read_text())
    folder = run(folder="other", dataset_name=changed)
    changed.write_text(corpus_file.read_text().replace("says", "claims"))
    with pytest.raises(ValueError, match=r"the data is not that of .*manifest\.json any more \(train, eval\)"):
        run(folder="other", dataset_name=changed, resume="true")
    changed.write_text(corpus_file.read_text())
    shutil.copy(folder / "checkpoint-6" / "stream_state_0.json", folder / "checkpoint-6" / "stream_state_1.json")
    with pytest.raises(FileNotFoundError, match=r"holds the place in the data of 2 process\(es\), expected 1"):
        run(folder="other", dataset_name=changed, resume="true")


def test_a_start_that_failed_leaves_no_tokenizer(run):
    with pytest.raises(ValueError, match="no held-out document"):
        run(eval_share=0)
    folder = run(eval_tokens=0, eval_strategy="no", vocab_size=280)
    assert len(AutoTokenizer.from_pretrained(folder)) == 280
    assert "eval_loss" not in json.loads((folder / "all_results.json").read_text())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"total_batch_size": 3}, "total_batch_size=3 is no positive multiple of the 2 rows that 1 process"),
        ({"total_batch_size": 0}, "total_batch_size=0 is no positive multiple of the 2 rows that 1 process"),
        ({"max_length": 129}, "max_length=129 and max_position_embeddings=128: .* give max_position_embeddings=129"),
        (
            {"gradient_accumulation_steps": 3},
            "total_batch_size=4 takes 2 times 2 rows, and gradient_accumulation_steps=3: give",
        ),
        ({"max_steps": -1}, "max_steps=-1: a stream has no end"),
        (
            {"method_options": "{momentum_rnk: 2}"},
            r"LoRA-Pre Adam has no option momentum_rnk; .*'\{\}' are its defaults",
        ),
        ({"method_options": "8"}, "method_options='8': expected options as in"),
        (
            {"dataloader_num_workers": 2},
            r"dataloader_num_workers=2: a stream is read by this process \(0\) or one worker",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(run, options, said):
    with pytest.raises(ValueError, match=said):
        run(**options)


def test_perplexity_has_no_end():
    assert perplexity(0.0) == 1
    assert perplexity(1000.0) == float("inf")
    assert numpy.isnan(perplexity(float("nan")))
