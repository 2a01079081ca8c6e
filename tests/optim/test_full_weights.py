"""Training the weights themselves: which of them are compressed, and which are frozen."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaConfig, LlamaForSequenceClassification

from lorapre_peft import create_lorapre_optimizer
from lorapre_peft.lowrank.layout import compressed_rank


def named(model, optimizer):
    """Momentum rank of every parameter that the optimizer holds, by name; 0 on the AdamW path."""
    return {
        name: compressed_rank(param.shape, group["momentum_rank"])
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"])
    }


def test_defaults_of_a_plain_model(make_llama, capsys):
    model = make_llama()
    optimizer = create_lorapre_optimizer(model)
    ranks = named(model, optimizer)
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head.weight"}
    assert {name for name, k in ranks.items() if k} == linear
    assert set(ranks.values()) == {0, 8}
    assert all("norm" in name for name, k in ranks.items() if not k)
    assert not model.model.embed_tokens.weight.requires_grad
    assert not model.lm_head.weight.requires_grad
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["bf16_rounding"]) == (2e-5, (0.9, 0.95), "stochastic")
    table = capsys.readouterr().out
    assert "embeddings and head, frozen" in table
    assert "compressed, k=8,1, als" in table


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (r".*layers\.0\.mlp\..*_proj", ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj")),
    ],
)
def test_target_modules_as_in_peft(make_llama, target_modules, expected):
    model = make_llama()
    ranks = named(model, create_lorapre_optimizer(model, target_modules=target_modules, others="frozen"))
    assert ranks
    assert all(any(part in name for part in expected) for name in ranks)
    assert all(any(part in name for name in ranks) for part in expected)


def test_matrices_of_other_names_are_selected_by_them():
    """PyTorch's own attention and recurrent layers hold matrices that are not called weight."""
    layer = nn.TransformerEncoderLayer(32, 4, 64)
    by_name = create_lorapre_optimizer(layer, lr=0.1, target_modules=["in_proj_weight", "linear1"])
    assert {name for name, k in named(layer, by_name).items() if k} == {"self_attn.in_proj_weight", "linear1.weight"}
    lstm = nn.ModuleDict({"lstm": nn.LSTM(32, 16)})
    by_module = create_lorapre_optimizer(lstm, lr=0.1, target_modules=["lstm"])
    assert {name for name, k in named(lstm, by_module).items() if k} == {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}


def checkpointed(model):
    layer = model.model.layers[0]
    layer.self_attn = checkpoint_wrapper(layer.self_attn)
    return model


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (torch.compile, "_orig_mod.model.layers.0.self_attn.q_proj.weight"),
        (nn.DataParallel, "module.model.layers.0.self_attn.q_proj.weight"),
        (checkpointed, "model.layers.0.self_attn._checkpoint_wrapped_module.q_proj.weight"),
    ],
)
def test_names_are_those_of_the_model_inside_its_wrappers(make_llama, wrap, name):
    model = wrap(make_llama())
    pattern = r"model\.layers\.0\.self_attn\.q_proj"
    ranks = named(model, create_lorapre_optimizer(model, lr=0.1, target_modules=pattern))
    assert [found for found, k in ranks.items() if k] == [name]


def test_others_and_embeddings_as_chosen(make_llama):
    model = make_llama()
    ranks = named(model, create_lorapre_optimizer(model, others="frozen", embeddings="adamw"))
    assert {name for name, k in ranks.items() if not k} == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_head_and_embeddings_of_a_wrapped_model_stay_frozen(make_llama, tie):
    """A module that holds the model does not name its head."""
    model = make_llama(tie_word_embeddings=tie)
    ranks = named(nn.Sequential(model), create_lorapre_optimizer(nn.Sequential(model)))
    assert not any("embed_tokens" in name or "lm_head" in name for name in ranks)


def test_freezing_what_ddp_waits_for_is_refused(make_llama):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(make_llama())
        with pytest.raises(
            ValueError, match="embeddings and head, frozen: found a model that DistributedDataParallel has"
        ):
            create_lorapre_optimizer(wrapped)
        create_lorapre_optimizer(wrapped, embeddings="adamw")
    finally:
        torch.distributed.destroy_process_group()


def test_a_classification_head_is_not_compressed():
    """As in PEFT's all-linear, which leaves it to modules_to_save."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=20
    )
    model = LlamaForSequenceClassification(config)
    assert named(model, create_lorapre_optimizer(model))["score.weight"] == 0
    create_lorapre_optimizer(model, others="frozen")
    assert model.score.weight.requires_grad  # It is new. Nothing else would train it.
    assert not model.model.norm.weight.requires_grad


def test_tied_weights_count_once(make_llama):
    model = make_llama(tie_word_embeddings=True)
    optimizer = create_lorapre_optimizer(model, embeddings="adamw")
    held = [id(param) for group in optimizer.param_groups for param in group["params"]]
    assert len(held) == len(set(held))
    assert id(model.lm_head.weight) in held


def test_a_model_without_linear_layers_is_said_to_be_one():
    with pytest.raises(ValueError, match="this model has no linear layers: name modules of other kinds, or give its"):
        create_lorapre_optimizer(nn.LSTM(32, 16))
    assert create_lorapre_optimizer(nn.Sequential(nn.Linear(32, 32)), target_modules="All-Linear")


def test_a_name_that_selects_nothing_is_said(make_llama):
    with pytest.warns(UserWarning, match=r"target_modules: 'vproj' names no module with a matrix") as said:
        create_lorapre_optimizer(make_llama(), target_modules=["q_proj", "vproj", "layers.0.mlp.up_proj"])
    assert len(said) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["nope"]},
            r"matches no module with a trainable matrix; this model's linear layers are called",
        ),
        ({"target_modules": "q_proj"}, r"in a list, such as \['q_proj'\], .* A string is a regular expression"),
        ({"target_modules": []}, r"target_modules=\[\] matches no module"),
        ({"target_modules": "["}, r"target_modules='\[' is no regular expression \(unterminated"),
        ({"others": "sgd"}, r"others='sgd': expected one of 'adamw', 'frozen'"),
        ({"embeddings": True}, r"embeddings=True: expected one of 'adamw', 'frozen'"),
    ],
)
def test_errors(make_llama, options, message):
    with pytest.raises(ValueError, match=message):
        create_lorapre_optimizer(make_llama(), **options)
