"""The SFT recipe on one's own JSONL, in each form that TRL prepares: the tokens trained on are those of TRL's trainer
itself.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from recipes import arguments, sft
from recipes.data import DataArguments, load_data, write_manifest

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt "
    "%}<s>assistant: {% endif %}"
)
COUNT = 12


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


FORMS = {
    "prompt and completion": lambda n: {"prompt": f"{n} + 1 = ", "completion": f"{n + 1}."},
    "prompt and completion, messages": lambda n: {
        "prompt": [said("user", f"{n} + 1?")],
        "completion": [said("assistant", f"{n + 1}.")],
    },
    "messages": lambda n: {"messages": [said("user", f"{n} + 1?"), said("assistant", f"{n + 1}.")]},
    "conversations": lambda n: {
        "conversations": [{"from": "user", "value": f"{n} + 1?"}, {"from": "assistant", "value": f"{n + 1}."}]
    },
    "text": lambda n: {"text": f"{n} + 1 = {n + 1}."},
    "other columns beside it": lambda n: {"id": f"row-{n}", "text": f"{n} + 1 = {n + 1}.", "row": -n, "source": None},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(form, count=12): a file of so many rows of that form."""

    def write(form, count=COUNT) -> Path:
        path = tmp_path / "my.jsonl"
        path.write_text("".join(json.dumps(form(n)) + "\n" for n in range(count)))
        return path

    return write


@pytest.fixture
def model(llama_path, tmp_path) -> Path:
    """The tiny model, with a chat template."""
    folder = shutil.copytree(llama_path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def trainer_for(model: Path, data: Path, folder: Path, *options: str) -> SFTTrainer:
    path = arguments.CONFIGS / "llama2_7b_lora_adamw.yaml"
    own = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(folder), "--use_cpu"]
    sizes = [] if "--train_size" in options else ["--train_size", "8", "--eval_size", "4"]
    recipe = sft.parse(["--config", str(path), *own, *sizes, *options])[0]
    return sft.build_trainer(recipe, recipe.load_data())


@forms
def test_tokens_are_those_of_trls_own_trainer(form, jsonl, model, tmp_path):
    path = jsonl(form)
    got = trainer_for(model, path, tmp_path / "out")
    rows = load_dataset("json", data_files=str(path), split="train")
    args = SFTConfig(output_dir=str(tmp_path / "trl"), max_length=1024, use_cpu=True, bf16=False, report_to=[])
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model)
    want = SFTTrainer(plain, args, train_dataset=rows, processing_class=tokenizer).train_dataset
    seen = [*got.train_dataset, *got.eval_dataset]
    assert len(seen) == len(want) == COUNT
    for name in ("input_ids", "labels"):
        assert [row[name] for row in seen] == [row[name] for row in want]
    assert all(set(row["labels"]) - {-100} for row in seen)


def test_only_the_completion_of_a_conversation_is_trained_on(jsonl, model, tmp_path):
    trainer = trainer_for(model, jsonl(FORMS["prompt and completion, messages"]), tmp_path / "out")
    row = trainer.train_dataset[0]
    assert trainer.processing_class.decode([token for token in row["labels"] if token != -100]) == "1.</s>"
    assert trainer.processing_class.decode(row["input_ids"]) == "<s>user: 0 + 1?</s><s>assistant: 1.</s>"


def test_a_column_of_text_of_any_name(jsonl, model, tmp_path):
    path = jsonl(lambda n: {"content": f"{n} is a number"})
    trainer = trainer_for(model, path, tmp_path / "out", "--dataset_text_field", "content")
    assert trainer.processing_class.decode(trainer.train_dataset[3]["input_ids"]).startswith("3 is a number")


def test_blank_lines_of_a_text_file_are_no_rows(tmp_path, capsys):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\ntwo\n \nthree\n")
    data = load_data(str(path), {"train": None, "eval": 1})
    assert [data[split]["text"][:] for split in ("train", "eval")] == [["one", "two"], ["three"]]
    assert data["train"]["row"][:] == [0, 2]  # their numbers in the file, by which a manifest finds them
    assert f"{path}: 2 blank rows are left out" in capsys.readouterr().out
    write_manifest(data, str(path), tmp_path / "manifest.json")
    again = load_data(str(path), {"train": None, "eval": None}, manifest=tmp_path / "manifest.json")
    assert again["eval"]["text"][:] == ["three"]
    with pytest.raises(ValueError, match="has 3 rows with text, expected 4"):
        load_data(str(path), {"train": 4})


def test_tools_reach_the_template(jsonl, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ tools[0]['name'] }}: " + CHAT
    tokenizer.save_pretrained(model)
    path = jsonl(lambda n: FORMS["messages"](n) | {"tools": json.dumps([{"name": f"tool{n}"}])})
    trainer = trainer_for(model, path, tmp_path / "out")
    assert trainer.processing_class.decode(trainer.train_dataset[2]["input_ids"]).startswith("tool2: <s>user")


@forms
def test_rows_are_the_first_ones_and_keep_their_numbers(form, jsonl):
    data = load_data(str(jsonl(form)), {"train": 7, "eval": 3})
    assert data["train"]["row"][:] == list(range(7))
    assert data["eval"]["row"][:] == [7, 8, 9]


def test_without_a_size_all_rows_are_trained_on(jsonl):
    path = str(jsonl(FORMS["text"]))
    assert len(load_data(path, {"train": None})["train"]) == COUNT
    data = load_data(path, {"train": None, "eval": 5})
    assert (data["train"]["row"][:], data["eval"]["row"][:]) == (list(range(7)), list(range(7, 12)))
    with pytest.raises(
        ValueError, match=r"my.jsonl has 12 rows with text, expected more than 12 for \{'train': None, 'eval': 12\}"
    ):
        load_data(path, {"train": None, "eval": 12})
    with pytest.raises(
        ValueError, match=r"has 12 rows with text, expected 13 for .*: ask for fewer \(train_size, eval_size\)"
    ):
        load_data(path, {"train": 10, "eval": 3})
    with pytest.raises(ValueError, match=r"train_size=0: expected at least one row of the split 'train'"):
        load_data(path, {"train": 0})
    with pytest.raises(ValueError, match=r"eval_size=-3: expected at least one row of the split 'eval'"):
        load_data("gsm_symbolic", {"train": 8, "eval": -3})
    with pytest.raises(ValueError, match="gsm_symbolic makes as many rows as it is asked for: give train_size"):
        load_data("gsm_symbolic", {"train": None})


def test_parquet_and_text_files_are_read_by_their_endings(tmp_path):
    texts = [f"{n} + 1 = {n + 1}." for n in range(COUNT)]
    (tmp_path / "lines.txt").write_text("\n".join(texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "table.parquet")
    for name in ("lines.txt", "table.parquet"):
        assert load_data(str(tmp_path / name), {"train": None})["train"]["text"][:] == texts
    (tmp_path / "table.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match=r"table\.csv: found no data file that can be read; expected one format"):
        load_data(str(tmp_path / "table.csv"), {"train": None})
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl: found no byte in 1 file\(s\); expected rows"):
        load_data(str(tmp_path / "empty.jsonl"), {"train": None})


def test_columns_that_trl_does_not_take_are_named(jsonl):
    path = str(jsonl(lambda n: {"prompt": "a", "chosen": "b", "rejected": "c"}))
    with pytest.raises(
        ValueError,
        match=r"has the columns prompt, chosen, rejected; expected MetaMathQA's .*, or a form that TRL prepares: "
        r"prompt and completion, "
        "messages, conversations, or text",
    ):
        load_data(path, {"train": 1})


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda n: {"prompt": "a", "completion": "b" if n < 3 else None}, "row 3 has None as its completion"),
        (lambda n: {"messages": None}, "row 0 has None as its messages; expected text or messages"),
        (lambda n: {"text": n}, "row 0 has 0 as its text; expected text"),
        (lambda n: {"query": "a", "response": None, "type": "GSM_SV"}, "row 0 has None as its response; expected"),
    ],
)
def test_a_row_without_text_is_named(form, said, jsonl):
    with pytest.raises(ValueError, match=said):
        load_data(str(jsonl(form)), {"train": None})


def test_the_configuration_of_a_dataset_on_the_hub_is_asked_for(monkeypatch):
    asked = []

    def hub(*args, **options):
        asked.append((args, options))
        return Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr("datasets.load_dataset", hub)
    data = DataArguments(dataset_name="HuggingFaceTB/smoltalk", dataset_config="all").load(0)
    assert data["train"]["text"][:] == ["one"]
    assert asked == [(("HuggingFaceTB/smoltalk", "all"), {"split": "train"})]


@pytest.mark.parametrize("form", [FORMS["messages"], FORMS["conversations"]], ids=["messages", "conversations"])
def test_conversations_need_a_chat_template(form, jsonl, llama_path, tmp_path):
    path = jsonl(form)
    with pytest.raises(
        ValueError, match=r"my.jsonl are conversations, and the tokenizer of .* has no chat template: give chat_"
    ):
        trainer_for(llama_path, path, tmp_path / "out")
    (tmp_path / "chat.jinja").write_text(CHAT)
    trainer = trainer_for(llama_path, path, tmp_path / "out", "--chat_template_path", str(tmp_path / "chat.jinja"))
    assert trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"]).startswith("<s>user: 0 + 1?")


@pytest.mark.parametrize("name", ["messages", "text"])
def test_a_run_on_ones_own_file(name, jsonl, model, tmp_path, monkeypatch):
    """The whole command: trained, resumed without another row, repeated from its manifest, refused on a
    changed file.
    """
    path = jsonl(FORMS[name])

    def run(folder, *options):
        own = [
            "--model_name_or_path",
            str(model),
            "--dataset_name",
            "my.jsonl",
            "--output_dir",
            str(tmp_path / folder),
        ]
        quick = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--report_to", "none"]
        sizes = ["--train_size", "8", "--eval_size", "4", "--use_cpu", "--learning_rate", "1e-2"]
        config = ["--config", str(arguments.CONFIGS / "smollm2.yaml")]
        monkeypatch.setattr(sys, "argv", ["sft", *config, *own, *quick, *sizes, *options])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", sft.__spec__)
        monkeypatch.chdir(tmp_path)
        sft.main()
        return json.loads((tmp_path / folder / "all_results.json").read_text())

    first = run("out")
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").peft_config["default"].r == 8
    assert run("out", "--resume")["eval_loss"] == first["eval_loss"]
    manifest = ["--manifest", str(tmp_path / "out" / "manifest.json")]
    assert run("again", *manifest)["eval_loss"] == first["eval_loss"]
    path.write_text(path.read_text().replace("9 + 1", "9 + one"))
    with pytest.raises(ValueError, match=r"the eval rows of my.jsonl are not those of .*manifest.json"):
        run("changed", *manifest)
