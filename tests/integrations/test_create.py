"""create_lorapre_optimizer: groups, ranks, the table, errors."""

import re

import pytest
import torch
from adapting import ConvNet, adapted, ranks_by_name, train, trainable
from peft import IA3Config, PromptEncoderConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import Trainer

from lorapre_peft import LoRAPreAdamW, LoRAPreConfig, create_lorapre_optimizer

LORA_MATRICES = ("lora_A", "lora_B", "lora_embedding_B")


# ---- create_lorapre_optimizer -------------------------------------------------------------------------------------


def test_weight_decay_is_split_as_trainer_does(make_llama):
    model = adapted(
        nn.ModuleDict({"llama": make_llama(attention_bias=True), "conv": ConvNet()}),
        target_modules=["q_proj", "v_proj", "embed_tokens", "second"],
        modules_to_save=["lm_head", "norm", "head", "input_layernorm"],
        bias="all",
    )
    optimizer = create_lorapre_optimizer(model, lr=1e-2, weight_decay=0.1)
    decayed = {name for g in optimizer.param_groups if g["weight_decay"] == 0.1 for name in g["param_names"]}
    others = {name for g in optimizer.param_groups if g["weight_decay"] == 0.0 for name in g["param_names"]}
    expected = set(Trainer.get_decay_parameter_names(None, model)) & trainable(model).keys()
    assert decayed == expected
    assert others == trainable(model).keys() - expected
    assert len(others) > 5


def test_every_trainable_parameter_is_held_once(make_llama):
    model = adapted(make_llama(tie_word_embeddings=True), modules_to_save=["norm"], use_dora=True)
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})


def kilobytes(count: int) -> str:
    return f"{count / 1e3:.2f} kB"


def test_printed_table_is_what_the_state_takes(make_llama, batch, capsys):
    model = adapted(make_llama(), use_dora=True, modules_to_save=["lm_head"], momentum_rank_pattern={"q_proj": 3})
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    train(optimizer, lambda: model(**batch).loss, steps=1)

    rows = {"compressed, k=2,1, als": [], "compressed, k=3,1, als": [], "AdamW path": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            k = 0 if not any(part in name for part in LORA_MATRICES) else 3 if "q_proj" in name else 2
            rows[f"compressed, k={k},1, als" if k else "AdamW path"].append(p)
    rows["trained"] = [p for row in rows.values() for p in row]

    def row_of(params):
        state = sum(t.numel() * t.element_size() for p in params for t in optimizer.state[p].values())
        adamw = sum(8 * p.numel() + 4 for p in params)
        return [f"{len(params):,}", f"{sum(p.numel() for p in params):,}", kilobytes(state), kilobytes(adamw)]

    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert lines == [
        ["LoRAPreAdamW", "tensors", "parameters", "state", "AdamW, fp32"],
        *([name, *row_of(params)] for name, params in rows.items()),
        ["frozen", str(len(frozen)), f"{sum(p.numel() for p in frozen):,}", "–", "–"],
    ]


def test_table_is_printed_by_the_first_process_only(make_llama, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, printed in ((0, True), (1, False)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        create_lorapre_optimizer(adapted(make_llama()), lr=1e-2)
        assert bool(capsys.readouterr().out) is printed


def test_overrides_win_over_the_config(make_llama, batch):
    model = adapted(make_llama(), momentum_rank=2, momentum_rank_pattern={"q_proj": 1})
    optimizer = create_lorapre_optimizer(model, lr=1e-2, momentum_rank=3, update_rule="newton", betas=(0.8, 0.9))
    train(optimizer, lambda: model(**batch).loss, steps=1)
    assert set(ranks_by_name(optimizer).values()) == {3}
    assert {(g["update_rule"], g["betas"]) for g in optimizer.param_groups} == {("newton", (0.8, 0.9))}


def test_config_is_found_inside_a_larger_module(make_llama, batch):
    model = nn.ModuleDict({"policy": adapted(make_llama(), momentum_rank=3), "value": nn.Linear(4, 4)})
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    assert {g["momentum_rank"] for g in optimizer.param_groups} == {3, 0}


def test_two_peft_models_keep_their_own_configs(make_llama):
    """Both adapters are called "default": each layer's config is that of the model it is in."""
    model = nn.ModuleDict(
        {"policy": adapted(make_llama(), momentum_rank=3), "value": adapted(make_llama(), momentum_rank=1)}
    )
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    found = {(name.split(".")[0], g["momentum_rank"]) for g in optimizer.param_groups for name in g["param_names"]}
    assert found == {("policy", 3), ("value", 1)}


def test_an_adapter_inside_an_adapted_model_keeps_its_own_config():
    """A vision tower with an adapter of its own comes first; the outer config is that of the layers after it."""
    model = nn.ModuleDict({"vision": nn.Sequential(nn.Linear(64, 64)), "text": nn.Sequential(nn.Linear(64, 64))})
    tower = LoRAPreConfig(r=16, target_modules=["0"], momentum_rank=1, update_rule="newton")
    inject_adapter_in_model(tower, model["vision"])
    model = get_peft_model(model, LoRAPreConfig(r=16, target_modules=["text.0"], momentum_rank=7))
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    found = {
        (name.split(".")[2], group["momentum_rank"], group["update_rule"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert found == {("vision", 1, "newton"), ("text", 7, "als")}


def test_a_part_of_a_peft_model_without_its_config_is_named(make_llama):
    model = adapted(make_llama(), momentum_rank=3)
    with pytest.warns(UserWarning, match=r"found no config for the adapter of layers\.0\.self_attn\.q_proj"):
        create_lorapre_optimizer(model.get_base_model().model, lr=1e-2)


@pytest.mark.parametrize(("given", "expected"), [({}, {(2, 2), (4, 3)}), ({"momentum_rank": 5}, {(5, 3)})])
def test_the_second_rank_is_no_larger_than_a_modules_first(make_llama, given, expected):
    model = adapted(make_llama(), momentum_rank=4, second_momentum_rank=3, momentum_rank_pattern={"q_proj": 2})
    optimizer = create_lorapre_optimizer(model, lr=1e-2, **given)
    assert {(g["momentum_rank"], g["second_momentum_rank"]) for g in optimizer.param_groups} == expected
    with pytest.raises(ValueError, match="second_momentum_rank=3 is above momentum_rank=2"):
        create_lorapre_optimizer(model, lr=1e-2, momentum_rank=2, second_momentum_rank=3)


@pytest.mark.parametrize(
    ("peft_options", "options", "message"),
    [
        ({}, {"optimizer": "sgd"}, "optimizer='sgd': expected one of 'adamw', 'muon'"),
        ({"inference_mode": True}, {}, "no trainable parameter: .*is_trainable=True"),
        ({"r": 1}, {}, r"nothing to compress among trainable parameters of shapes \[\(1, 32\).*torch.optim.AdamW"),
        ({}, {"momentum_rank": 8}, "nothing (to compress|would be compressed)"),
        ({}, {"momentum_rank": -1}, "momentum_rank=-1: expected a whole number"),
        ({}, {"momentum_rank": "4"}, "momentum_rank='4': expected a whole number"),
        ({}, {"update_rule": "adam"}, "update_rule='adam': expected one of 'als', 'newton'"),
        ({}, {"lr": -1.0}, "lr=-1.0: expected a number of at least 0"),
        ({}, {"betas": (0.99, 0.9)}, r"update_rule='als' needs betas\[0\]² < betas\[1\]"),
        ({}, {"residual_weight": 1.5}, r"residual_weight=1.5: expected a number in \[0, 1\]"),
        (
            {"rank_pattern": {"q_proj": 4}, "momentum_rank_pattern": {"q_proj": 4}},
            {},
            r"momentum_rank_pattern\['q_proj'\]=4 is not below r=4 of .*q_proj",
        ),
    ],
)
def test_create_rejects(make_llama, peft_options, options, message):
    model = adapted(make_llama(), **peft_options)
    with pytest.raises(ValueError, match=message):
        create_lorapre_optimizer(model, **({"lr": 1e-2} | options))


def test_frozen_adapters_of_a_thawed_model_are_named(make_llama):
    model = adapted(make_llama(), inference_mode=True)
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" not in name)
    with pytest.raises(ValueError, match=r"found adapters .* none of their matrices trainable: .*merge_and_unload"):
        create_lorapre_optimizer(model, lr=1e-2)


def test_momentum_rank_too_large_for_one_module_is_an_error(make_llama):
    """It would put that module on the AdamW path without a word."""
    model = adapted(make_llama(), rank_pattern={"q_proj": 2}, momentum_rank=4)
    with pytest.raises(ValueError, match=r"not below r=2 of .*q_proj.*; use 1, or a smaller one for this module"):
        create_lorapre_optimizer(model, lr=1e-2)
    model = adapted(make_llama(), rank_pattern={"q_proj": 3}, momentum_rank_pattern={"q_proj": 2})
    with pytest.raises(ValueError, match="use 1 to 2, or leave the argument momentum_rank out, and give this module"):
        create_lorapre_optimizer(model, lr=1e-2, momentum_rank=4)  # The argument goes before the pattern.


def test_option_of_the_other_optimizer_is_a_type_error(make_llama):
    with pytest.raises(TypeError, match="nesterov"):
        create_lorapre_optimizer(adapted(make_llama()), lr=1e-2, nesterov=True)


# ---- residual_weight: an option of `als` alone ---------------------------------------------------------------------


def test_residual_weight_reaches_the_als_groups_only(two_adapters):
    two_adapters.peft_config["second"].update_rule = "newton"
    two_adapters.base_model.set_adapter(["default", "second"])
    optimizer = create_lorapre_optimizer(two_adapters, lr=1e-2, residual_weight=0.25)
    assert {(g["update_rule"], g["residual_weight"]) for g in optimizer.param_groups} == {
        ("als", 0.25),
        ("newton", None),
    }


def test_residual_weight_changes_the_update(make_llama, batch):
    """Not only stored: two weights give two results."""
    results = []
    for residual_weight in (None, 0.0, 0.2):  # of four steps, where 1−β1ᵗ is up to 0.34
        model = adapted(make_llama())
        optimizer = create_lorapre_optimizer(model, lr=1e-2, residual_weight=residual_weight)
        results.append(train(optimizer, lambda model=model: model(**batch).loss, steps=4)[-1])
    assert len(set(results)) == 3


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_residual_weight_without_als_is_an_error(make_llama, use_dora):
    """With DoRA too, whose magnitudes make a group without momenta to compress."""
    model = adapted(make_llama(), update_rule="newton", use_dora=use_dora)
    with pytest.raises(ValueError, match=r"residual_weight=0.25 is an option of update_rule='als', and no "):
        create_lorapre_optimizer(model, lr=1e-2, residual_weight=0.25)


def test_adamw_is_the_default(make_llama):
    assert type(create_lorapre_optimizer(adapted(make_llama()), lr=1e-2)) is LoRAPreAdamW


@pytest.mark.parametrize(
    "option", [{"target_modules": "all-linear"}, {"others": "frozen"}, {"embeddings": "adamw"}], ids=str
)
def test_options_of_full_weights_are_refused_for_adapters(make_llama, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.* is for full weights; with an adapter in the model"):
        create_lorapre_optimizer(adapted(make_llama()), lr=1e-2, **option)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
        (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=32), "P_TUNING"),
    ],
    ids=["ia3", "prompt tuning", "p-tuning"],
)
def test_other_adapters_are_not_taken_for_full_weights(make_llama, config, kind):
    model = get_peft_model(make_llama(), config)
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"without a LoRA layer \(its adapters: {kind}\); expected a LoRA adapter"):
        create_lorapre_optimizer(model, lr=1e-2)
    assert {name: param.requires_grad for name, param in model.named_parameters()} == before


def test_the_weights_of_a_model_whose_adapter_was_merged(make_llama):
    """It is a plain model again, even though PEFT leaves traces on it."""
    model = adapted(make_llama()).merge_and_unload().requires_grad_(True)
    optimizer = create_lorapre_optimizer(model)
    assert {group["momentum_rank"] for group in optimizer.param_groups} == {0, 8}


def test_the_table_can_be_left_out(make_llama, capsys):
    create_lorapre_optimizer(adapted(make_llama()), lr=1e-2, verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("key", ["q_proj", "^model.layers.0.self_attn.q_proj", r"model\.layers\.0\..*q_proj"])
def test_momentum_rank_pattern_names_modules_as_rank_pattern_does(make_llama, key):
    model = adapted(make_llama(num_hidden_layers=1), rank_pattern={key: 16}, momentum_rank_pattern={key: 7})
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    found = {name: g["momentum_rank"] for g in optimizer.param_groups for name in g["param_names"]}
    assert {k for name, k in found.items() if "q_proj" in name} == {7}
    assert {k for name, k in found.items() if "q_proj" not in name} == {2}


def test_a_pattern_that_names_nothing_is_warned_about(make_llama):
    model = adapted(make_llama(), momentum_rank_pattern={"q_porj": 4, "v_proj": 3})
    with pytest.warns(UserWarning, match="momentum_rank_pattern of adapter 'default': 'q_porj' names no module"):
        create_lorapre_optimizer(model, lr=1e-2)


def test_the_ranks_of_an_adapter_that_is_not_trained_do_not_matter(make_llama):
    model = adapted(make_llama(), r=4)
    model.add_adapter("new", LoRAPreConfig(r=16, target_modules=["q_proj"]))
    model.set_adapter("new")
    optimizer = create_lorapre_optimizer(model, lr=1e-2, momentum_rank=4)
    assert {g["momentum_rank"] for g in optimizer.param_groups} == {4}


def test_the_default_residual_weight_is_saved(make_llama):
    """A checkpoint goes on as it was even if a later version has another default."""
    optimizer = create_lorapre_optimizer(adapted(make_llama()), lr=1e-2)
    assert {group["residual_weight"] for group in optimizer.state_dict()["param_groups"]} == {1.0}
