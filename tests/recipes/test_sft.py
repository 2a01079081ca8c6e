"""The SFT entry point on a tiny model: which rows it takes, what it trains on, and what a run leaves behind."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from trainers import inner

from lorapre_peft import LoRAPreConfig
from lorapre_peft.integrations.create import OPTIMIZERS
from recipes import sft
from recipes.arguments import CONFIGS as CONFIG_FOLDER
from recipes.arguments import with_bases
from recipes.data import ALPACA_PROMPT, load_data, write_manifest
from recipes.models import load_model
from recipes.precision import Precision
from recipes.training import commit, start_run

PROMPT_LENGTH = len(ALPACA_PROMPT.format(instruction=""))  # of tokens too: the tests' tokenizer has one per character
CONFIGS = sorted(CONFIG_FOLDER.glob("*.yaml"))
PRECISION = Precision("float32", False, "for the test")
PAPER = [path for path in CONFIGS if path.stem.startswith("llama")]


def question(kind: str, query: str, response: str) -> dict[str, str]:
    return {"type": kind, "query": query, "response": response, "original_question": "not used"}


@pytest.fixture(scope="module")
def metamath(tmp_path_factory) -> Path:
    """MetaMathQA's columns: of 14 rows, 0 to 13, those of MATH (1 and 6) and the one of 512 tokens (3) are not to be
    taken.
    """
    rows = [
        question("GSM_Rephrased", f"what is {n} + 1?", f"{n} + 1 = {n + 1}\nthe answer is: {n + 1}") for n in range(14)
    ]
    rows[1]["type"], rows[6]["type"] = "MATH_AnsAug", "MATH_Rephrased"
    rows[2] = question("GSM_AnsAug", "q" * 100, "r" * (511 - PROMPT_LENGTH - 100 - 1))
    rows[3] = question("GSM_AnsAug", "q" * 100, "r" * (512 - PROMPT_LENGTH - 100 - 1))
    path = tmp_path_factory.mktemp("data") / "metamath.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def load(metamath, llama_path):
    """load(sizes, **options): `load_data` of the file above, its limit counted by the tests' tokenizer."""
    return lambda sizes, **options: load_data(
        str(metamath), sizes, **({"length_tokenizer": str(llama_path)} | options)
    )


@pytest.fixture
def run(monkeypatch, tmp_path, metamath, llama_path):
    """run(config, *options): the recipe's command line on the tiny model and data; returns the run's folder."""

    def call(config, *options, folder="out"):
        local = ["--model_name_or_path", str(llama_path), "--dataset_name", str(metamath), "--report_to", "none"]
        local += ["--train_size", "8", "--eval_size", "2", "--length_tokenizer", str(llama_path), "--use_cpu"]
        quick = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
        place = ["--output_dir", str(tmp_path / folder)]
        monkeypatch.setattr(sys, "argv", ["sft", "--config", str(config), *local, *quick, *place, *options])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", sft.__spec__)
        sft.main()
        return tmp_path / folder

    return call


def recipe(path: Path, *options: str) -> sft.Recipe:
    return sft.parse(["--config", str(path), *options])[0]


def config(name: str) -> Path:
    return CONFIG_FOLDER / f"{name}.yaml"


# Data


def test_rows_are_the_papers(load):
    data = load({"train": 7, "eval": 3})
    assert data["train"]["row"][:] == [0, 2, 4, 5, 7, 8, 9]
    assert data["eval"]["row"][:] == [10, 11, 12]
    assert data["train"][0] == {
        "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nwhat is 0 + 1?\n\n### Response:\n",
        "completion": " 0 + 1 = 1\nthe answer is: 1",
        "row": 0,
    }


def test_too_few_rows_are_counted(load):
    with pytest.raises(ValueError, match=r"has 11 rows of a type with 'GSM' and under 512 tokens, expected 12"):
        load({"train": 10, "eval": 2})


def test_other_columns_are_named(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"question": "?", "answer": "!"}\n')
    with pytest.raises(
        ValueError, match="has the columns question, answer; expected MetaMathQA's query, response and type"
    ):
        load_data(str(path), {"train": 1})


def test_a_folder_holds_data_as_a_file_does(metamath, llama_path):
    data = load_data(str(metamath.parent), {"train": 3}, length_tokenizer=str(llama_path))
    assert data["train"]["row"][:] == [0, 2, 4]


def test_a_manifest_gives_the_same_rows_without_a_tokenizer(load, metamath, tmp_path):
    sizes = {"train": 7, "eval": 3}
    write_manifest(load(sizes), "metamath", tmp_path / "manifest.json")
    again = load(sizes, manifest=tmp_path / "manifest.json", length_tokenizer="not/read")
    assert again["train"].to_list() == load(sizes)["train"].to_list()
    with pytest.raises(ValueError, match=r"has \{'train': 7, 'eval': 3\} rows, expected \{'train': 6, 'eval': 3\}"):
        load({"train": 6, "eval": 3}, manifest=tmp_path / "manifest.json")
    changed = tmp_path / "changed.jsonl"
    changed.write_text(metamath.read_text().replace("what is 12 + 1?", "what is 12 + one?"))
    with pytest.raises(ValueError, match=r"the eval rows of .*changed\.jsonl are not those of .*SHA-256"):
        load_data(str(changed), sizes, manifest=tmp_path / "manifest.json")


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"dataset_name": "sotu", "train": {"sha256": "of pre-training"}}'])
def test_another_file_than_a_manifest_is_named(load, tmp_path, text):
    path = tmp_path / "manifest.json"
    with pytest.raises(FileNotFoundError, match=r"no manifest '.*manifest\.json'"):
        load({"train": 7}, manifest=path)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json does not hold the rows of a fine-tuning run; expected the"):
        load({"train": 7}, manifest=path)


def test_a_run_that_goes_on_must_find_the_rows_that_it_began_with(load, tmp_path):
    path = tmp_path / "manifest.json"
    write_manifest(load({"train": 7}), "metamath", path)
    written = path.read_text()
    write_manifest(load({"train": 7}), "metamath", path)
    with pytest.raises(ValueError, match=r"the train rows of metamath are not those of .*manifest.json"):
        write_manifest(load({"train": 6}), "metamath", path)
    assert path.read_text() == written


def test_no_run_trains_on_the_held_out_problems_of_another():
    held_out = load_data("gsm_symbolic", {"train": 3, "eval": 3}, seed=0)["eval"]["prompt"]
    for sizes in {"train": 3}, {"train": 3, "eval": 3}:
        trained = load_data("gsm_symbolic", dict.fromkeys(sizes, 3), seed=1)["train"]["prompt"]
        assert not set(held_out) & set(trained)


def test_generated_problems_come_by_the_same_loader(tmp_path):
    sizes = {"train": 12, "validation": 5, "test": 5}
    data = load_data("gsm_symbolic", sizes, seed=1)
    prompts = [prompt for split in sizes for prompt in data[split]["prompt"]]
    assert len(set(prompts)) == 22
    write_manifest(data, "gsm_symbolic", tmp_path / "manifest.json")
    load_data("gsm_symbolic", sizes, seed=1, manifest=tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="another seed"):
        load_data("gsm_symbolic", sizes, seed=2, manifest=tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("load", "choice"),
    [
        (lambda: load_model("meta-llama/Llama-2-7b-hf"), "give a folder that holds the model, or 'smollm2'"),
        (lambda: load_data("meta-math/MetaMathQA", {"train": 1}), "give a file or folder with MetaMathQA's columns"),
    ],
)
def test_offline_errors_name_the_offline_choice(load, choice):
    with pytest.raises(FileNotFoundError, match=f"the Hugging Face hub did not give it .*To work offline, {choice}"):
        load()


@pytest.mark.parametrize("source", ["./missing", "/missing/model", "data/meta/missing", "missing.jsonl"])
def test_a_missing_path_is_never_looked_up_on_the_hub(source):
    for load in (lambda: load_model(source), lambda: load_data(source, {"train": 1})):
        with pytest.raises(FileNotFoundError, match=f"no file or folder '{source}'"):
            load()


# Configs


def test_the_configs_are_all_there():
    wanted = {
        f"{model}_{kind}_{optimizer}"
        for model in ("llama2_7b", "llama31_8b")
        for kind in ("lora", "qlora", "full")
        for optimizer in ("adamw", "muon")
    }
    assert {path.stem for path in CONFIGS} == wanted | {"smollm2", "smollm2_full"}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_configs_say_what_their_names_say(path):
    _, kind, optimizer = path.stem.rsplit("_", 2)
    one = recipe(path, "--use_cpu")
    assert one.lorapre.optimizer == optimizer
    assert one.model.use_peft == (kind != "full")
    assert one.model.load_in_4bit == (kind == "qlora")
    assert (one.data.train_size, one.data.eval_size, one.sft.max_length) == (100_000, 10_000, 1024)
    assert one.sft.per_device_train_batch_size * one.sft.gradient_accumulation_steps == 32
    if kind == "full":
        assert (one.lorapre.momentum_rank, one.sft.learning_rate) == (8, 2e-5)
    else:
        assert (one.model.lora_r, one.model.lora_alpha, one.model.lora_dropout) == (8, 16, 0)


def test_the_command_line_wins_over_the_config():
    one = recipe(config("llama2_7b_full_adamw"), "--use_cpu", "--learning_rate", "1e-3", "--momentum_rank", "4")
    assert (one.sft.learning_rate, one.lorapre.momentum_rank) == (1e-3, 4)
    assert one.config["learning_rate"] == 1e-3
    assert one.config["lr_scheduler_type"] == "cosine"


@pytest.mark.parametrize("name", ["llama2_7b_full_adamw", "llama2_7b_lora_adamw"])
def test_options_of_the_rule_reach_the_optimizer_or_the_adapter(name):
    given = {"momentum_rank": 2, "second_momentum_rank": 2, "update_rule": "als", "residual_weight": 0.3}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    one = recipe(config(name), "--use_cpu", *words)
    options, adapter = sft._optimizer_options(one), sft._peft_config(one)
    if adapter is None:
        assert given.items() <= options.items()
    else:
        assert not given.keys() & options.keys()
        assert {key: getattr(adapter, key) for key in given} == given


def test_an_unknown_key_is_named(tmp_path):
    (tmp_path / "wrong.yaml").write_text("base: smollm2.yaml\nmomentum_rnk: 2\n")
    with pytest.raises(ValueError, match="momentum_rnk"):
        recipe(tmp_path / "wrong.yaml")


def test_an_empty_config_is_a_base_as_well(tmp_path):
    (tmp_path / "empty.yaml").touch()
    assert with_bases({"base": str(tmp_path / "empty.yaml"), "seed": 3}) == {"seed": 3}


@pytest.mark.parametrize(
    ("line", "found"),
    {
        "optimizer: adam": r"'adam' in the config: invalid choice: 'adam' \(choose from",
        "save_strategy: no": "False in the config: invalid choice: 'False'",
        "max_steps: 1.5": "1.5 in the config: invalid int value",
        "learning_rate: [1]": r"\[1\] in the config: invalid float value",
        "packing: 3": "3 in the config: Truthy value expected",
    }.items(),
)
def test_a_value_that_the_command_line_would_not_take_is_not_taken_from_a_config(tmp_path, capsys, line, found):
    path = tmp_path / "config.yaml"
    path.write_text(f"base: smollm2.yaml\n{line}\n")
    with pytest.raises(SystemExit):
        recipe(path)
    key = line.partition(":")[0]
    assert re.search(f"{key}: {found}", capsys.readouterr().err)


def test_a_config_may_be_given_with_an_equals_sign():
    assert sft.parse([f"--config={config('smollm2')}", "--use_cpu"])[0].model.lora_r == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config"], "--config: expected a file; those of this project are in"),
        (["--config", str(CONFIG_FOLDER)], f"there is no config {CONFIG_FOLDER};"),
        (["--config", str(config("smollm2")), "--config", "other"], "unknown: --config other; .* one --config"),
        (["--config", str(config("smollm2")), "--lerning_rate", "1"], "unknown: --lerning_rate 1; --help lists"),
        (["--config", str(config("smollm2")), "--learning_r", "1"], "unknown: --learning_r 1; --help lists"),
        (
            ["--config", str(config("smollm2")), "--model_init_kwargs", '{"dtype": "float32"}'],
            "model_init_kwargs has dtype: give it as --dtype",
        ),
    ],
)
def test_a_command_line_that_cannot_be_read_says_why(capsys, words, said):
    with pytest.raises(SystemExit):
        sft.parse(["--use_cpu", *words])
    assert re.search(said, capsys.readouterr().err)


def test_a_config_that_is_no_yaml_is_named(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: [1\n")
    with pytest.raises(SystemExit):
        recipe(tmp_path / "bad.yaml")
    assert re.search(r"the config is no YAML: .*\s.*bad\.yaml", capsys.readouterr().err)


def test_a_command_without_a_model_says_what_to_give(capsys):
    with pytest.raises(SystemExit):
        sft.parse(["--use_cpu"])
    assert "no model: give --config recipes/configs/NAME.yaml" in capsys.readouterr().err


# Training


def test_only_the_completion_and_its_end_are_trained_on(metamath, llama_path, tmp_path):
    options = ["--model_name_or_path", str(llama_path), "--dataset_name", str(metamath), "--output_dir", str(tmp_path)]
    options += ["--length_tokenizer", str(llama_path), "--train_size", "2", "--eval_size", "1", "--use_cpu"]
    one = recipe(config("llama2_7b_lora_adamw"), *options)
    trainer = sft.build_trainer(one, one.data.load(0))
    row = trainer.train_dataset[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert trained == [label for label in row["labels"] if label != -100]
    assert trainer.processing_class.decode(trained) == " 0 + 1 = 1\nthe answer is: 1</s>"
    assert len(row["input_ids"]) - len(trained) == PROMPT_LENGTH + len("what is 0 + 1?")


def test_a_run_leaves_all_it_takes_to_repeat_it(run, metamath):
    folder = run(config("llama2_7b_lora_adamw"), "--learning_rate", "1e-2", "--logging_steps", "1")
    metrics = json.loads((folder / "all_results.json").read_text())
    assert {"train_loss", "eval_loss"} <= metrics.keys()
    (environment,) = json.loads((folder / "environment.json").read_text())
    assert environment["command"].startswith("python -m recipes.sft --config")
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["commit"]
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert any("lorapre/state_bytes" in entry for entry in log)
    assert AutoPeftModelForCausalLM.from_pretrained(folder).peft_config["default"].r == 8
    assert LoRAPreConfig.from_pretrained(str(folder)).update_rule == "als"

    again = run(folder / "config.yaml", "--manifest", str(folder / "manifest.json"), folder="again")
    repeated = json.loads((again / "all_results.json").read_text())
    assert repeated["eval_loss"] == metrics["eval_loss"]
    assert json.loads((again / "manifest.json").read_text()) == json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("kind", "saved"), [("lora_adamw", "adapter_model.safetensors"), ("full_muon", "model.safetensors")]
)
def test_a_stopped_run_goes_on_exactly(run, kind, saved):
    path, options = config(f"llama2_7b_{kind}"), ["--save_steps", "2", "--learning_rate", "1e-2"]
    folder = run(path, *options)
    finished = (folder / saved).read_bytes()
    (folder / saved).unlink()  # as if stopped after the checkpoint of step 2
    shutil.rmtree(folder / "checkpoint-4")
    with pytest.raises(SystemExit, match="holds an earlier run: add --resume"):
        run(path, *options)
    with pytest.raises(SystemExit, match=r"started with other options: seed=1 \(was 0\)"):
        run(path, *options, "--seed", "1", "--resume")
    run(path, *options, "--resume")
    assert (folder / saved).read_bytes() == finished
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4
    assert len(json.loads((folder / "environment.json").read_text())) == 2
    metrics = (folder / "train_results.json").read_text()
    run(path, *options, "--resume")  # there is nothing left to train, and no loss to write
    assert (folder / "train_results.json").read_text() == metrics


@pytest.mark.parametrize("length", [["--max_steps", "3"], ["--num_train_epochs", "0.6"]])
def test_a_finished_run_is_not_trained_further(run, length):
    """Nor where its last step is in the middle of an epoch."""
    path, options = config("llama2_7b_lora_adamw"), [*length, "--save_steps", "1"]
    folder = run(path, *options)
    finished = (folder / "adapter_model.safetensors").read_bytes()
    run(path, *options, "--resume")
    assert (folder / "adapter_model.safetensors").read_bytes() == finished
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    assert not (folder / "checkpoint-4").exists()


def test_a_checkpoint_to_go_on_from_is_named_by_its_folder(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint='True' holds no trainer_state\.json"):
        run(config("llama2_7b_lora_adamw"), "--resume_from_checkpoint", "True")


def test_a_start_that_failed_is_not_a_run(run, tmp_path):
    """A wrong name is corrected and the same command given again, without --resume."""
    path = config("llama2_7b_lora_adamw")
    with pytest.raises(FileNotFoundError, match=r"no file or folder '\./nowhere'"):
        run(path, "--model_name_or_path", "./nowhere")
    assert (tmp_path / "out" / "config.yaml").exists()
    assert (run(path, "--max_steps", "1") / "adapter_model.safetensors").exists()


def test_a_checkpoint_cut_off_by_a_crash_is_passed_over(run, capsys):
    path, options = config("llama2_7b_lora_adamw"), ["--save_steps", "2", "--learning_rate", "1e-2"]
    folder = run(path, *options)
    finished = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.warns(UserWarning, match="checkpoint-4 is not complete"):
        run(path, *options, "--resume")
    assert f"going on from {folder / 'checkpoint-2'}" in capsys.readouterr().out
    assert (folder / "adapter_model.safetensors").read_bytes() == finished


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_every_kind_trains_what_it_says(kind, optimizer, metamath, llama_path, tmp_path):
    options = ["--model_name_or_path", str(llama_path), "--dataset_name", str(metamath), "--output_dir", str(tmp_path)]
    options += ["--length_tokenizer", str(llama_path), "--train_size", "2", "--eval_size", "0", "--use_cpu"]
    options += ["--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "2", "--save_strategy", "no"]
    one = recipe(config(f"llama31_8b_{kind}_{optimizer}"), *options)
    trainer = sft.build_trainer(one, one.data.load(0))
    trainer.train()
    built = inner(trainer.optimizer)
    assert type(built) is OPTIMIZERS[optimizer]
    names = {param: name for name, param in trainer.model.named_parameters()}
    compressed = {names[p] for group in built.param_groups if group["momentum_rank"] for p in group["params"]}
    exact = {names[p] for group in built.param_groups if not group["momentum_rank"] for p in group["params"]}
    assert len(compressed) == 2 * 7 * (1 if kind == "full" else 2)
    assert {group["momentum_rank"] for group in built.param_groups} - {0} == {8 if kind == "full" else 2}
    if kind == "full":
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= exact
        assert trainer.model.dtype == torch.bfloat16
    else:
        assert not exact
        assert getattr(trainer.model, "is_loaded_in_4bit", False) == (kind == "qlora")
    assert built.param_groups[0]["bf16_rounding"] == "stochastic"


def test_options_of_full_weights_are_refused_for_an_adapter(llama_path, tmp_path):
    options = ["--model_name_or_path", str(llama_path), "--output_dir", str(tmp_path), "--embeddings", "adamw"]
    one = recipe(config("smollm2"), *options, "--train_size", "4", "--eval_size", "0", "--use_cpu")
    trainer = sft.build_trainer(one, one.data.load(0))
    with pytest.raises(ValueError, match="embeddings='adamw' is for full weights; with an adapter in the model"):
        trainer.create_optimizer()


def test_torchs_optimizer_trains_the_same_weights_and_names_the_keys_it_does_not_use(
    run, llama_path, tmp_path, capsys
):
    options = ["--model_name_or_path", str(llama_path), "--output_dir", str(tmp_path), "--optimizer", "trainer"]
    one = recipe(config("smollm2_full"), *options, "--train_size", "4", "--eval_size", "0", "--use_cpu")
    trainer = sft.build_trainer(one, one.data.load(0))
    trained = {name for name, param in trainer.model.named_parameters() if param.requires_grad}
    assert len(trained) == 2 * 7
    assert all("proj" in name for name in trained)
    run(config("llama2_7b_lora_adamw"), "--optimizer", "trainer", "--update_rule", "newton", "--max_steps", "1")
    assert "optimizer: trainer does not use update_rule\n" in capsys.readouterr().out


def test_keys_that_mean_nothing_in_a_run_are_named():
    assert recipe(config("smollm2"), "--use_cpu").unused() == []
    assert recipe(config("llama2_7b_full_adamw"), "--use_cpu", "--embeddings", "frozen").unused() == []
    adapter = recipe(config("smollm2"), "--use_cpu", "--optimizer", "trainer", "--embeddings", "adamw")
    assert adapter.unused() == ["optimizer: trainer does not use embeddings"]
    full = recipe(config("llama2_7b_full_adamw"), "--use_cpu", "--optimizer", "trainer", "--lora_r", "4")
    assert full.unused() == ["optimizer: trainer does not use momentum_rank", "use_peft: false does not use lora_r"]


def test_a_model_of_another_program_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "model.safetensors").touch()
    for resume in (False, True):
        with pytest.raises(SystemExit, match=r"holds model\.safetensors and no config\.yaml, so it is no run"):
            start_run(tmp_path, {"seed": 0}, PRECISION, resume=resume)
    assert not (tmp_path / "config.yaml").exists()
    with pytest.raises(SystemExit, match=r"notes\.txt is a file: give another --output_dir"):
        start_run(tmp_path / "notes.txt", {"seed": 0}, PRECISION, resume=False)
    (tmp_path / "model.safetensors").unlink()
    start_run(tmp_path, {"seed": 0}, PRECISION, resume=False)


def test_a_start_leaves_other_files_alone_and_writes_no_token(monkeypatch, tmp_path):
    words = ["--hub_token", "SECRET", "--push_to_hub_token=SECRET", "--hub-token", "SECRET", "--eos_token", "kept"]
    words += ["--model_init_kwargs", '{"token": "SECRET"}', "--dataset_name", "user:hf_SECRETSECRETSECRETSECRET@hub"]
    monkeypatch.setattr(sys, "argv", ["sft", *words])
    manifest = tmp_path / "manifest.json"
    manifest.write_text("given")
    inner = {"model_init_kwargs": {"token": "SECRET", "revisions": ["hf_SECRETSECRETSECRETSECRET"]}}
    for given in ({"seed": 0, "hub_token": "SECRET", **inner}, {"seed": 0, "manifest": str(manifest)}):
        start_run(tmp_path, given, PRECISION, resume=False)
        assert manifest.read_text() == "given"
    assert not any("SECRET" in path.read_text() for path in tmp_path.iterdir())
    command = json.loads((tmp_path / "environment.json").read_text())[0]["command"]
    assert "--eos_token kept --model_init_kwargs '{" in command  # can be given to a shell again
    start_run(tmp_path, {"seed": 0}, PRECISION, resume=False)
    assert not manifest.exists()  # of a start that failed
