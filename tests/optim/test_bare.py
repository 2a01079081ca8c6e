"""Bare parameters, as tools that take a class path pass them: nothing that a user would call a bug."""

import warnings

import pytest
import torch
from stepping import LR, both_optimizers, stream, take_steps, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW, create_lorapre_optimizer
from lorapre_peft.optim.bare import is_embedding

EMBEDDINGS = {
    "GPT-2": (50257, 768),
    "BERT": (30522, 768),
    "MiniLM": (30522, 384),
    "T5": (32128, 512),
    "SmolLM2-135M": (49152, 576),
    "Llama-2-7B": (32000, 4096),
    "Llama-3.1-8B": (128256, 4096),
    "Llama-3.1-70B": (128256, 8192),
    "Qwen2.5-0.5B": (151936, 896),
    "Gemma-2B": (256000, 2048),
}
OTHERS = {
    "Llama-2-70B's MLP": (28672, 8192),
    "Llama-3.1-405B's MLP": (53248, 16384),
    "Falcon-180B's MLP": (59392, 14848),
    "GPT-3's MLP": (49152, 12288),
    "Gemma-7B's MLP": (24576, 3072),
    "Gemma-2B's MLP": (16384, 2048),
    "attention": (4096, 4096),
    "LoRA on Llama-3.1's head, r = 8": (128256, 8),
    "LoRA on Llama-3.1's head, r = 256": (128256, 256),
    "LoRA on the 405B's MLP, r = 256": (53248, 256),
    "a convolution": (512, 256, 3, 3),
    "a vector": (50257,),
}


def test_the_second_moments_rank_is_at_most_the_firsts():
    param = weights(20, 12)
    optimizer = LoRAPreAdamW([param], lr=LR, second_momentum_rank=5)
    assert optimizer.ranks(param, optimizer.param_groups[0]) == (3, 3)
    take_steps(optimizer, [param], stream((20, 12), 1))
    assert optimizer.state[param]["v_A"].shape == (3, 12)


def test_embeddings_are_known_by_their_shape():
    for shape in EMBEDDINGS.values():
        assert is_embedding(None, torch.Size(shape))
        assert is_embedding(None, torch.Size(shape[::-1]))  # a head of Conv1D
    for name, shape in OTHERS.items():
        assert not is_embedding(None, torch.Size(shape)), name
        assert not is_embedding(None, torch.Size(shape[::-1])), name


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "transformer.wte.weight",
        "bert.embeddings.word_embeddings.weight",
        "tok_embeddings.weight",
        "output.weight",
        "shared.weight",
    ],
)
def test_embeddings_are_known_by_their_name(name):
    assert is_embedding(name, torch.Size((512, 64)))


def test_what_every_layer_has_is_no_embedding():
    """The MLP of Gemma-2-27B is as long and as narrow as an embedding."""
    shape = torch.Size((36864, 4608))
    assert is_embedding(None, shape, 2)  # an embedding and a head
    assert not is_embedding(None, shape, 3)
    model = nn.ModuleList(nn.Linear(300, 30_000, bias=False, device="meta") for _ in range(3))
    with pytest.warns(UserWarning, match="are compressed at the momentum ranks"):
        optimizer = LoRAPreAdamW(model.parameters(), lr=LR)
    assert optimizer.param_groups[0]["uncompressed"] == []


@both_optimizers
def test_what_is_chosen_in_a_later_group_is_said_too(cls):
    optimizer = cls([("up.weight", weights(60, 40))], lr=LR, momentum_rank=4)
    with pytest.warns(UserWarning, match=r"1 that look like embeddings or heads, such as \(70, 40\)") as said:
        optimizer.add_param_group({"params": [("wte.weight", weights(70, 40))]})
    assert [warning.filename for warning in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": [("wpe.weight", weights(70, 40))], "momentum_rank": 4})


@both_optimizers
def test_frozen_bytes_of_a_quantised_model_are_let_be(cls):
    """As torch's optimizers do, for `model.parameters()` of a QLoRA model."""
    codes = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    optimizer = cls([codes, weights(20, 12)], lr=LR, momentum_rank=2)
    take_steps(optimizer, optimizer.param_groups[0]["params"][1:], stream((20, 12), 2))
    assert codes not in optimizer.state


@both_optimizers
def test_a_rank_that_compresses_nothing_is_said(cls):
    with pytest.warns(UserWarning, match=r"momentum_rank=8 compresses none of 2 matrices, such as \(8, 40\)"):
        cls([weights(8, 40), weights(40, 8)], lr=LR, momentum_rank=8)


@pytest.mark.filterwarnings("ignore:matrices are compressed")
def test_a_group_that_was_shortened_is_refused():
    params = [weights(60, 40), weights(70, 40)]
    optimizer = LoRAPreAdamW([("up.weight", params[0]), ("wte.weight", params[1])], lr=LR)
    optimizer.param_groups[0]["params"] = params[1:]
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(RuntimeError, match=r"built with 2 parameters, of which those at the places \[1\] .* holds 1"):
        optimizer.step()
    optimizer.param_groups[0] |= {"uncompressed": [0], "num_params": 1}
    optimizer.step()
    assert set(optimizer.state[params[1]]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "blocks.3.attention.output.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "embed_tokens.lora_A.default.weight",
    ],
)
def test_others_are_not(name):
    assert not is_embedding(name, torch.Size((512, 64)))


def small_model():
    return nn.ModuleDict({"wte": nn.Embedding(70, 40), "up": nn.Linear(40, 60), "down": nn.Linear(60, 40)})


@both_optimizers
def test_one_warning_says_what_was_chosen(cls, monkeypatch):
    monkeypatch.setattr("lorapre_peft.optim.bare.VOCABULARY", 64)
    monkeypatch.setattr("lorapre_peft.optim.bare.HIDDEN", 8)
    monkeypatch.setattr("lorapre_peft.optim.bare.RATIO", 1.5)
    model = small_model()
    with pytest.warns(UserWarning, match="momentum rank") as said:
        optimizer = cls(model.parameters(), lr=LR)
    assert len(said) == 1
    message = str(said[0].message)
    assert "momentum ranks [8]" in message
    assert "1 that look like embeddings or heads, such as (70, 40)" in message
    assert "momentum_rank" in message
    assert "create_lorapre_optimizer" in message
    assert said[0].filename == __file__
    ranks = [optimizer.ranks(param, optimizer.param_groups[0])[:1] for param in model.parameters() if param.ndim == 2]
    assert ranks == [(), (8,), (8,)]


@both_optimizers
def test_names_and_groups_decide(cls):
    model = small_model()
    with pytest.warns(UserWarning, match=r"such as \(70, 40\)"):
        optimizer = cls(model.named_parameters(), lr=LR, momentum_rank=4)
    assert optimizer.ranks(model["wte"].weight, optimizer.param_groups[0]) == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = cls([{"params": model.named_parameters(), "momentum_rank": 4}], lr=LR)
        create_lorapre_optimizer(model, lr=LR, verbose=False)
    assert told.ranks(model["wte"].weight, told.param_groups[0])[0] == 4


@both_optimizers
@pytest.mark.filterwarnings("ignore:matrices are compressed")
def test_what_is_spared_stays_so_through_a_checkpoint(cls):
    shapes = [(70, 40), (60, 40)]

    def build():
        params = [weights(*shape, seed=i) for i, shape in enumerate(shapes)]
        return params, cls([("wte.weight", params[0]), ("up.weight", params[1])], lr=LR, momentum_rank=4)

    grads = [stream(shape, 4, seed=i) for i, shape in enumerate(shapes)]
    params, optimizer = build()
    take_steps(optimizer, params, *grads)
    resumed, other = build()
    take_steps(other, resumed, *(own[:2] for own in grads))
    again, third = build()
    third.load_state_dict(other.state_dict())
    for old, new in zip(resumed, again):
        new.data.copy_(old.data)
    take_steps(third, again, *(own[2:] for own in grads))
    assert all(map(torch.equal, again, params))
    assert set(third.state[again[0]]) == {"step", "exp_avg", "exp_avg_sq"}


@both_optimizers
def test_no_rank_at_all_is_no_choice_to_warn_about(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls([("embed_tokens.weight", nn.Parameter(torch.ones(40, 8)))], lr=LR, momentum_rank=0)
