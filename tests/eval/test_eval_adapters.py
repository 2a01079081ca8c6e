"""`eval.run` with adapters whose vocabulary or tokenizer is not the base model's, and with chat templates; offline, on
tiny models.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import run
from eval.adapters import AdaptedLM, own_tokenizer, vocabulary_size

ROWS = 64  # of the tiny model
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}<s>assistant: "
QUESTIONS = [{"question": "what is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}]


@pytest.fixture
def adapter(model, tmp_path):
    """adapter(rows=None, tokens=(), **options of LoraConfig): the folder of a random adapter, trained after the
    vocabulary was resized.
    """

    def save(rows=None, tokens=(), tokenizer=False, **options) -> Path:
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(model)
        if rows is not None:
            base.resize_token_embeddings(rows)
        lora = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        adapted = get_peft_model(base, LoraConfig(**(lora | options)))
        for name, param in adapted.named_parameters():
            if "modules_to_save" in name:
                param.data += 0.1 * torch.randn_like(param)
        adapted.save_pretrained(tmp_path / "adapter")
        if tokens or tokenizer:
            own = AutoTokenizer.from_pretrained(model)
            own.add_tokens(list(tokens))
            own.save_pretrained(tmp_path / "adapter")
        return adapted.eval(), tmp_path / "adapter"

    return save


def loaded(model: Path, adapter: Path) -> HFLM:
    tokenizer = own_tokenizer(str(adapter))
    return AdaptedLM(
        pretrained=str(model), peft=str(adapter), device="cpu", **({"tokenizer": tokenizer} if tokenizer else {})
    )


CHANGED = {
    "a head of its own on a padded vocabulary": dict(modules_to_save=["lm_head"]),
    "embeddings of its own": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA on embeddings and head": dict(target_modules=["embed_tokens", "lm_head"]),
    "added tokens": dict(
        rows=ROWS + 8, tokens=[f"<t{i}>" for i in range(8)], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "added tokens, LoRA on embeddings": dict(
        rows=ROWS + 8, tokens=["<t>"], target_modules=["embed_tokens", "lm_head"]
    ),
    "a vocabulary padded to more rows": dict(rows=128, tokens=["<t>"], modules_to_save=["lm_head"]),
    "a vocabulary cut to the tokenizer's": dict(rows=60, tokenizer=True, modules_to_save=["lm_head"]),
    "nothing of the vocabulary": dict(),
}


def test_an_adapter_of_a_deeper_model_is_refused(model, adapter, tmp_path):
    _, folder = adapter()
    weights = load_file(folder / "adapter_model.safetensors")
    deeper = {name.replace("layers.0.", "layers.7."): tensor.clone() for name, tensor in weights.items()}
    save_file(weights | deeper, folder / "adapter_model.safetensors")
    with pytest.raises(SystemExit, match=r"does not fit the model .*: 4 of its tensors are missing or have no place"):
        loaded(model, folder)


def test_a_model_that_answers_nan_is_refused(model, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(model)
    broken.lm_head.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "nan")
    with pytest.raises(SystemExit, match="answers with NaN: its training has diverged, or its dtype overflows"):
        AdaptedLM(pretrained=str(tmp_path / "nan"), device="cpu")


@pytest.mark.parametrize("options", CHANGED.values(), ids=CHANGED)
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_an_adapter_runs_with_the_vocabulary_it_was_trained_with(model, adapter, options):
    trained, folder = adapter(**options)
    lm = loaded(model, folder)
    assert isinstance(lm.model, PeftModel)
    rows = len(trained.get_input_embeddings().weight)
    assert len(lm.model.get_input_embeddings().weight) == rows
    with torch.no_grad():
        ids = torch.tensor([[1, 5, 9, rows - 1]])
        torch.testing.assert_close(lm.model(ids).logits, trained(ids).logits)
    own = bool(options.get("tokens") or options.get("tokenizer"))
    assert len(lm.tokenizer) == len(AutoTokenizer.from_pretrained(folder if own else model))


def test_tokens_that_the_adapter_has_no_rows_for_enlarge_the_base(model, adapter, capsys):
    """Trained without saving embeddings: the rows that the base has are left as they are, and the run says that it
    adds some.
    """
    _, folder = adapter(tokens=[f"<t{i}>" for i in range(20)])
    tokens = len(AutoTokenizer.from_pretrained(folder))
    assert tokens > ROWS
    lm = loaded(model, folder)
    embedding = lm.model.get_input_embeddings().weight
    assert len(embedding) == tokens
    assert torch.equal(embedding[:ROWS], AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight)
    assert f"resized from {ROWS} to {tokens}, for the adapter {folder}" in capsys.readouterr().out


def test_the_size_comes_from_any_of_the_adapters_tensors(make_llama):
    model = make_llama()
    A, B, whole = torch.zeros(4, 70), torch.zeros(71, 4), torch.zeros(72, 32)
    prefix = "base_model.model."
    assert vocabulary_size(model, {f"{prefix}model.embed_tokens.lora_embedding_A": A}) == 70
    assert vocabulary_size(model, {f"{prefix}lm_head.lora_B.weight": B, f"{prefix}lm_head.lora_A.weight": A}) == 71
    assert vocabulary_size(model, {f"{prefix}model.embed_tokens.base_layer.weight": whole}) == 72
    assert vocabulary_size(model, {f"{prefix}lm_head.weight": whole}) == 72
    assert vocabulary_size(model, {f"{prefix}model.layers.0.mlp.up_proj.lora_B.weight": B}) is None


def test_an_adapter_of_another_model_is_a_clear_error(model, adapter, make_llama, tmp_path):
    _, folder = adapter()
    make_llama(hidden_size=64).save_pretrained(tmp_path / "other")
    shutil.copy(model / "tokenizer.json", tmp_path / "other")
    shutil.copy(model / "tokenizer_config.json", tmp_path / "other")
    with pytest.raises(
        SystemExit, match=r"the adapter '.*adapter' does not fit the model '.*other', give the one that"
    ):
        run.evaluate(str(tmp_path / "other"), str(folder), tasks=["generated_problems"], output_dir=tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_a_vocabulary_smaller_than_the_tokenizer_is_a_clear_error(model, adapter, tmp_path):
    """The adapter's tokenizer was not saved beside it, and the base model's has more tokens."""
    _, folder = adapter(rows=40, modules_to_save=["lm_head"])
    with pytest.raises(
        SystemExit, match=r"has a vocabulary of 40, and the tokenizer '.*model' has \d+ tokens: save the"
    ):
        run.evaluate(str(model), str(folder), tasks=["generated_problems"], output_dir=tmp_path / "out")


# Chat templates


@pytest.fixture
def asked(model, tmp_path, monkeypatch):
    """asked(*options): the prompts that the command line puts to the model."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def call(*options, folder="out"):
        prompts = []

        def generate_until(self, requests, **rest):
            prompts.extend(request.args[0] for request in requests)
            return ["#### 2"] * len(requests)

        monkeypatch.setattr(HFLM, "generate_until", generate_until)
        place = [
            "--output_dir",
            str(tmp_path / folder),
            "--data",
            f"gsm8k_metamath={data}",
            "--tasks",
            "gsm8k_metamath",
        ]
        monkeypatch.setattr(sys, "argv", ["eval.run", str(model), *map(str, options), *place])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", run.__spec__)
        run.main()
        return prompts

    return call


def set_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def test_prompts_are_conversations(model, asked, tmp_path):
    set_template(model)
    (plain,) = asked(folder="plain")
    assert "<s>" not in plain
    (chat,) = asked("--apply_chat_template", "--system_instruction", "be brief", folder="chat")
    assert chat == f"<s>system: be brief</s><s>user: {plain}</s><s>assistant: "
    options = json.loads((tmp_path / "chat" / "results.json").read_text())["options"]
    assert (options["apply_chat_template"], options["system_instruction"]) == (True, "be brief")


def test_the_template_beside_the_adapter_counts(model, adapter, asked):
    _, folder = adapter(tokenizer=True)
    set_template(folder)
    assert asked(folder, "--apply_chat_template")[0].startswith("<s>user: Below is an instruction")


def test_a_system_instruction_without_a_template_comes_before_the_prompt(asked):
    (plain,) = asked(folder="plain")
    (told,) = asked("--system_instruction", "be brief", folder="told")
    assert told.startswith("be brief")
    assert told.endswith(plain)


def test_a_tokenizer_without_a_template_is_named(asked, tmp_path):
    with pytest.raises(
        SystemExit, match=r"the tokenizer '.*model' has no chat template: leave out --apply_chat_template"
    ):
        asked("--apply_chat_template")
    assert not (tmp_path / "out").exists()


def test_other_prompts_need_another_folder(model, asked):
    set_template(model)
    asked()
    with pytest.raises(SystemExit, match="holds the results of apply_chat_template=None: give another --output_dir"):
        asked("--apply_chat_template")
