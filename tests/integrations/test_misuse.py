"""What users are told when they pass the wrong thing: what was found, and what to write."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from trainers import arguments
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

from lorapre_peft import LoRAPreAdamW, LoRAPreCallback, create_lorapre_optimizer, lorapre_optimizer
from lorapre_peft.integrations.trainer import OptimizerFactory


def test_training_arguments_in_place_of_the_name(tmp_path):
    message = (
        r"found a TrainingArguments where the optimizer's name is expected: write lorapre_optimizer\('adamw', args\)"
    )
    with pytest.raises(TypeError, match=message):
        lorapre_optimizer(arguments(tmp_path))


@pytest.mark.parametrize("given", [1e-3, {"learning_rate": 1e-3}], ids=["number", "dict"])
def test_no_arguments_of_a_trainer(given):
    with pytest.raises(TypeError, match=rf"found a {type(given).__name__} where the trainer's arguments are expected"):
        lorapre_optimizer("adamw", given)


@pytest.mark.parametrize(("kind", "option"), [("adamw", "momentum_rnk"), ("muon", "betas"), ("adamw", "fused")])
def test_unknown_options_are_refused_before_training(tmp_path, kind, option):
    with pytest.raises(TypeError, match=rf"found {option} among the options of '{kind}'; expected some of .*lr.*seed"):
        lorapre_optimizer(kind, arguments(tmp_path), **{option: 2})


@pytest.mark.parametrize(
    ("kind", "option"), [("adamw", "momentum_rnk"), ("muon", "betas"), ("adamw", "learning_rate")]
)
def test_unknown_options_of_a_loop_are_named(make_llama, kind, option):
    with pytest.raises(TypeError, match=rf"found {option} among the options of '{kind}'; expected some of .*lr.*seed"):
        create_lorapre_optimizer(make_llama(), kind, **{option: 2})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"update_rule": "nwton"}, "update_rule='nwton': expected one of 'als', 'newton'"),
        ({"others": "sgd"}, "others='sgd': expected one of 'adamw', 'frozen'"),
        ({"momentum_rank": "4"}, "momentum_rank='4': expected a whole number of at least 1, None for the default"),
        ({"momentum_rank": 0}, "momentum_rank=0 compresses nothing: give at least 1"),
    ],
)
def test_values_are_refused_before_training(tmp_path, make_llama, option, message):
    for call in (
        lambda: lorapre_optimizer("adamw", arguments(tmp_path), **option),
        lambda: create_lorapre_optimizer(make_llama(), lr=1e-3, **option),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_options_where_trainer_does_not_pass_them_on(tmp_path):
    with pytest.warns(UserWarning, match=r"optim_args='momentum_rank=2' is not read, .*: give the options to"):
        lorapre_optimizer("adamw", arguments(tmp_path, optim_args="momentum_rank=2"))


@pytest.mark.parametrize("given", [{"optim": "adafactor"}, {"optim_target_modules": ["q_proj"]}], ids=str)
def test_what_trainer_does_not_use_beside_an_optimizer_of_its_own(tmp_path, given):
    with pytest.warns(UserWarning, match=f"{next(iter(given))}=.* has no effect beside lorapre_optimizer"):
        lorapre_optimizer("adamw", arguments(tmp_path, **given))


@pytest.mark.parametrize("given", [1e-3, {"lr": 1e-3}, torch.tensor(1e-3)], ids=["number", "dict", "tensor"])
def test_no_name_of_an_optimizer(make_llama, given):
    message = rf"found a {type(given).__name__} where the optimizer's name is expected: "
    message += r"write create_lorapre_optimizer\(model, 'adamw'"
    with pytest.raises(TypeError, match=message):
        create_lorapre_optimizer(make_llama(), given)


def test_parameters_in_place_of_the_model(make_llama):
    with pytest.raises(
        TypeError, match=r"found a generator where the model is expected: .* or LoRAPreAdamW\(parameters"
    ):
        create_lorapre_optimizer(make_llama().parameters(), lr=1e-3)


@pytest.mark.parametrize("with_callback", [False, True])
def test_given_to_trainer_as_a_finished_optimizer(tmp_path, make_llama, tokens, with_callback):
    args = arguments(tmp_path, max_steps=1)
    callbacks = [LoRAPreCallback()] if with_callback else []
    pair = lorapre_optimizer("adamw", args)
    trainer = Trainer(make_llama(), args, train_dataset=tokens, optimizers=pair, callbacks=callbacks)
    with pytest.raises(
        (AttributeError, RuntimeError), match=r"optimizer_cls_and_kwargs=lorapre_optimizer\('adamw', args\)"
    ):
        trainer.train()


def test_the_factory_can_be_copied_and_pickled(tmp_path, make_llama):
    factory, options = lorapre_optimizer("adamw", arguments(tmp_path))
    for same in (copy.deepcopy(factory), pickle.loads(pickle.dumps(factory))):
        assert isinstance(same, OptimizerFactory)
        assert isinstance(same()(make_llama(), **options), LoRAPreAdamW)


QUANTISED = {
    "4 bits": BitsAndBytesConfig(load_in_4bit=True),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "4 bits, stored as bfloat16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
}


@pytest.mark.parametrize("config", QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_base_without_an_adapter(llama_path, config):
    model = AutoModelForCausalLM.from_pretrained(llama_path, quantization_config=config)
    with pytest.raises(
        ValueError, match=r"the model is quantised, .*train an adapter on it, get_peft_model\(model, LoRAPreConfig"
    ):
        create_lorapre_optimizer(model)


def test_frozen_targets(make_llama):
    """As LISA leaves a model: everything that is named is frozen, and some other parameters are not."""
    model = make_llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"'all-linear' names 14 modules such as model.layers.0.* all their weights are frozen "
        r".*requires_grad_\(True\)",
    ):
        create_lorapre_optimizer(model)
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\] names 2 modules such as"):
        create_lorapre_optimizer(model, target_modules=["q_proj"])
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    optimizer = create_lorapre_optimizer(model)
    names = {name for g in optimizer.param_groups if g["momentum_rank"] for name in g["param_names"]}
    assert names == {"model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.parametrize("mistake", [{"lr": -1.0}, {"momentum_rank": 64}, {"residual_weight": 2.0}], ids=str)
def test_a_call_that_is_refused_freezes_nothing(make_llama, mistake):
    model = make_llama()
    with pytest.raises(ValueError, match=next(iter(mistake))):
        create_lorapre_optimizer(model, **mistake)
    assert all(param.requires_grad for param in model.parameters())
    create_lorapre_optimizer(model, embeddings="adamw", verbose=False)


@pytest.mark.parametrize("option", ["embeddings", "others"])
def test_what_is_to_be_trained_is_frozen(make_llama, option):
    """As an earlier call leaves a model whose defaults freeze embeddings and head."""
    model = make_llama()
    create_lorapre_optimizer(model, others="frozen")
    with pytest.raises(ValueError, match=rf"^{option}='adamw': found \d+ parameters that are all frozen"):
        create_lorapre_optimizer(model, **{option: "adamw"})
    model.requires_grad_(True)
    assert create_lorapre_optimizer(model, **{option: "adamw"})


def test_nothing_is_trainable(make_llama):
    with pytest.raises(
        ValueError, match=r"no trainable parameter: .*or thaw the weights with model.requires_grad_\(True\)"
    ):
        create_lorapre_optimizer(make_llama().requires_grad_(False))
