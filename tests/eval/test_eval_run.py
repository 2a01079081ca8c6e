"""`python -m eval.run` and the task files, on a tiny model with a word-sized vocabulary, offline."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import run
from recipes.problems import problems

ROOT = Path(__file__).parents[2]
GSM8K = [
    {"question": "What is 500 + 500?", "answer": "500 + 500 = 1000\n#### 1,000"},
    {"question": "What is 3 - 5?", "answer": "3 - 5 = -2\n#### -2"},
]
MATH500 = [{"problem": "Find $x$ if $2x = 1$.", "solution": r"so $x = \boxed{\frac12}$", "answer": r"\frac12"}]
COMPLETIONS = {
    "gsm8k_metamath": ["So it is 1000.\n#### 1000\nThe answer is: 1000", "no idea"],
    "math500_metamath": ["$0.5$"],
}


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(rows): the path of a JSONL file that holds them."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(*arguments): run the command line; returns its results.json."""

    def call(*arguments, folder=tmp_path / "out"):
        monkeypatch.setattr(sys, "argv", ["eval.run", *map(str, arguments), "--output_dir", str(folder)])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", run.__spec__)
        run.main()
        return json.loads((folder / "results.json").read_text())

    return call


def samples(tmp_path, task):
    return [json.loads(line) for line in (tmp_path / "out" / f"samples_{task}.jsonl").read_text().splitlines()]


def own():
    return run.task_manager(run.own_tasks())


def few_tokens(monkeypatch):
    """A tiny random model never stops by itself."""
    generate = HFLM._model_generate
    monkeypatch.setattr(
        HFLM,
        "_model_generate",
        lambda self, context, max_length, **rest: generate(self, context, context.shape[1] + 4, **rest),
    )


def say(monkeypatch, completions):
    """The model answers each prompt with what ``completions`` has for it; returns the prompts it was asked."""
    asked = []

    def generate_until(self, requests, **options):
        asked.extend(request.args for request in requests)
        return [completions[request.task_name][request.doc_id] for request in requests]

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    return asked


def test_table_json_and_samples_of_local_data(command, model, jsonl, tmp_path, monkeypatch, capsys):
    asked = say(monkeypatch, COMPLETIONS)
    files = [f"gsm8k_metamath={jsonl(GSM8K)}", f"math500_metamath={jsonl(MATH500, 'math.jsonl')}"]
    found = command(model, "--tasks", "gsm8k_metamath", "math500_metamath", "--data", *files)
    gsm8k = found["tasks"]["gsm8k_metamath"]
    assert gsm8k["problems"] == 2
    assert gsm8k["exact_match"] == {"value": 0.5, "stderr": pytest.approx(0.5)}  # of (1, 0): sqrt(0.5 / 2)
    assert gsm8k["answered"]["value"] == 0.5
    assert gsm8k["exact_match_paper"]["value"] == 0.5  # wrong on the first, 1000 for 1; right on the second, 0 for 0
    assert found["tasks"]["math500_metamath"]["exact_match"]["value"] == 1
    assert found["options"]["model"] == str(model)
    assert {"lm-eval", "math-verify", "torch"} <= found["environment"]["versions"].keys()

    prompt, generation = asked[0]
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is 500 + 500?\n\n### Response:\n"
    )
    assert generation["do_sample"] is False
    assert generation["max_gen_toks"] == 512
    first, second = samples(tmp_path, "gsm8k_metamath")
    assert first["completion"] == COMPLETIONS["gsm8k_metamath"][0]
    assert (first["exact_match"], first["exact_match_paper"], second["exact_match"]) == (1, 0, 0)
    printed = capsys.readouterr().out
    assert "|gsm8k_metamath" in printed
    assert "Stderr" in printed
    assert re.search(r"exact_match +\|↑ +\| *0\.5\d*\|± +\| *0\.5", printed)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--batch_size", "many"], "--batch_size many: expected a whole number of at least 1, or auto"),
        (["--batch_size", "0"], "--batch_size 0: expected"),
        (["--limit", "0"], "--limit 0: expected a whole number of at least 1"),
        (["--device", "gpu"], "--device gpu is not here: expected cpu, or cuda"),
        (["--dtype", "float33"], "--dtype float33: expected one of auto, saved, float32"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(command, option, message):
    with pytest.raises(SystemExit, match=message):
        command("nowhere", "--tasks", "generated_problems", *option)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "gsm8k_metamath",
            [GSM8K[0], {"question": "?", "answer": "five"}],
            "row 2 of .*: reference 'five' has no",
        ),
        ("gsm8k_metamath", [{"question": "?"}], "cannot be had .*a row has question; expected"),
        ("math500_metamath", [{"problem": "?", "answer": ""}], "row 1 of .*: reference '' is empty"),
        ("gsm8k_metamath", [], "the data of task gsm8k_metamath cannot be had"),
    ],
)
def test_references_are_looked_at_before_the_model_answers(command, model, jsonl, monkeypatch, task, rows, message):
    asked = say(monkeypatch, {})
    with pytest.raises(SystemExit, match=message):
        command(model, "--tasks", task, "--data", f"{task}={jsonl(rows)}")
    assert not asked


def test_damaged_results_are_said(command, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{")
    with pytest.raises(SystemExit, match=r"results\.json is damaged, or of another tool: delete it"):
        command(model, "--tasks", "generated_problems")


def test_decoding_is_the_tasks_and_not_the_models(command, model, tmp_path, monkeypatch):
    few_tokens(monkeypatch)
    shared = ["--tasks", "generated_problems", "--limit", "2"]
    command(model, *shared)
    before = [sample["completion"] for sample in samples(tmp_path, "generated_problems")]
    own = shutil.copytree(model, tmp_path / "own")
    (own / "generation_config.json").write_text(json.dumps({"num_beams": 3, "repetition_penalty": 3.0}))
    command(own, *shared, folder=tmp_path / "again")
    lines = (tmp_path / "again" / "samples_generated_problems.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion"] for line in lines] == before


def test_an_adapter_is_loaded_and_changes_the_answers(command, model, tmp_path, monkeypatch):
    few_tokens(monkeypatch)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_alpha=64, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    shared = ["--tasks", "generated_problems", "--limit", "3"]
    command(model, *shared)
    with pytest.raises(SystemExit, match="out holds the results of adapter=None: give another --output_dir"):
        command(model, tmp_path / "adapter", *shared)
    before = [sample["completion"] for sample in samples(tmp_path, "generated_problems")]
    shutil.rmtree(tmp_path / "out")
    found = command(model, tmp_path / "adapter", *shared)
    after = [sample["completion"] for sample in samples(tmp_path, "generated_problems")]
    assert found["tasks"]["generated_problems"]["problems"] == 3
    assert found["options"]["adapter"] == str(tmp_path / "adapter")
    assert before != after
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer(samples(tmp_path, "generated_problems")[0]["prompt"], return_tensors="pt")["input_ids"]
    new = adapted.eval().generate(input_ids=prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
    assert after[0] == tokenizer.decode(new, skip_special_tokens=True)


def test_started_again_it_repeats_no_completion_unless_the_model_changed(command, model, monkeypatch, jsonl):
    asked = say(monkeypatch, COMPLETIONS)
    arguments = [model, "--tasks", "gsm8k_metamath", "--data", f"gsm8k_metamath={jsonl(GSM8K)}"]
    command(*arguments, "--limit", "1")
    assert len(asked) == 1
    command(*arguments)
    assert len(asked) == 2
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model)
    command(*arguments)
    assert len(asked) == 4


def test_another_task_into_the_same_folder_adds_to_its_results(command, model, monkeypatch, jsonl):
    say(monkeypatch, COMPLETIONS)
    numbers = [{"question": "What is 500 + 500?", "answer": 1000}]  # JSON's own number, not a text of one
    gsm8k = [model, "--tasks", "gsm8k_metamath", "--data", f"gsm8k_metamath={jsonl(numbers)}", "--limit", "1"]
    first = command(*gsm8k)["tasks"]
    assert first["gsm8k_metamath"]["exact_match"]["value"] == 1
    assert first["gsm8k_metamath"]["limit"] == 1
    maths = [model, "--tasks", "math500_metamath", "--data", f"math500_metamath={jsonl(MATH500, 'math.jsonl')}"]
    both = command(*maths)["tasks"]
    assert both["gsm8k_metamath"] == first["gsm8k_metamath"]
    assert both["math500_metamath"]["exact_match"]["value"] == 1
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model)
    assert command(*maths)["tasks"].keys() == {"math500_metamath"}


def test_results_in_the_models_own_folder_are_no_change_of_the_model(command, model, monkeypatch, jsonl):
    asked = say(monkeypatch, COMPLETIONS)
    arguments = [model, "--tasks", "gsm8k_metamath", "--data", f"gsm8k_metamath={jsonl(GSM8K)}"]
    for _ in range(2):
        command(*arguments, folder=model / "eval")
    assert len(asked) == 2


def test_importing_the_command_is_light(tmp_path):
    """The process that judges expressions imports it too, under a limit on its memory."""
    heavy = "{'torch', 'transformers', 'datasets', 'lm_eval'}"
    code = f"import sys, eval.run, eval.answers; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "set()"


def test_the_generated_problems_are_the_quickstarts_held_out_ones():
    (task,) = run.load_tasks(["generated_problems"], {}, own())
    recipe = yaml.safe_load(Path(ROOT, "recipes/configs/smollm2.yaml").read_text())
    train, held_out = recipe["train_size"], recipe["eval_size"]
    docs = task.eval_docs
    assert docs["prompt"][:held_out] == problems(held_out, seed=1, exclude=problems(train, seed=0))["prompt"][:]
    assert len(docs) == 200
    assert not set(docs["prompt"]) & set(problems(240, seed=0)["prompt"])


def test_the_harness_own_tasks_take_local_data_too(jsonl, tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split in ("train", "test"):
        shutil.move(jsonl(GSM8K), folder / f"{split}.jsonl")
    data = {"gsm8k": str(folder), "minerva_math500": str(jsonl(MATH500, "math.jsonl"))}
    # Only their folders: indexing all of the harness's files takes half a minute.
    harness = Path(lm_eval.tasks.__file__).parent
    paths = [run.TASKS, harness / "gsm8k", harness / "minerva_math"]
    manager = TaskManager(include_path=[str(path) for path in paths], include_defaults=False)
    assert set(run.own_tasks()) < set(manager.all_tasks)
    tasks = run.load_tasks(["gsm8k", "minerva_math500"], data, manager)
    assert [task.config.task for task in tasks] == ["gsm8k", "minerva_math500"]
    assert [len(task.eval_docs) for task in tasks] == [2, 1]


@pytest.mark.parametrize(
    ("tasks", "data", "message"),
    [
        (["gsm9k"], {}, "no task gsm9k: expected generated_problems, gsm8k_metamath, math500_metamath, or one that"),
        (
            ["gsm8k_metamath"],
            {"gsm8k_metamath": "nowhere.jsonl"},
            "no file or folder nowhere.jsonl for task gsm8k_metamath",
        ),
        (
            ["generated_problems"],
            {"gsm8k": "x"},
            "data given for gsm8k, which is not among the tasks generated_problems",
        ),
        (
            ["gsm8k_metamath"],
            {},
            "cannot be had .*--data gsm8k_metamath=FILE.jsonl, or take the task generated_problems",
        ),
    ],
)
def test_what_cannot_be_had_is_named_with_a_way_out(tasks, data, message):
    with pytest.raises(SystemExit, match=message):
        run.load_tasks(tasks, data, own())


def test_rows_of_other_columns_are_named(jsonl):
    with pytest.raises(SystemExit, match=r"a row has prompt, text; expected question \(GSM8K\) or problem \(MATH\)"):
        run.load_tasks(["gsm8k_metamath"], {"gsm8k_metamath": str(jsonl([{"prompt": "a", "text": "b"}]))}, own())


def test_a_model_that_cannot_be_had_is_named(tmp_path):
    with pytest.raises(
        SystemExit, match=r"model 'nobody/nothing' cannot be had(.|\n)*give local folders, or the model 'smollm2'"
    ):
        run.evaluate("nobody/nothing", tasks=["generated_problems"], output_dir=Path(tmp_path))


def test_an_adapter_that_cannot_be_had_is_named(model, tmp_path):
    with pytest.raises(SystemExit, match=r"with adapter '.*/nowhere' cannot be had(.|\n)*give local folders"):
        run.evaluate(str(model), str(tmp_path / "nowhere"), tasks=["generated_problems"], output_dir=tmp_path / "out")
