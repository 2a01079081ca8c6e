"""Training the weights themselves: targets, updates in the backward pass, stochastic rounding, clipping one by one."""

import copy
import gc
from functools import partial

import pytest
import torch
from roundoff import assert_same_steps, gamma, undisturbed
from stepping import both_optimizers, both_rules, stream, take_steps, weights
from torch import nn
from trainers import arguments
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
)

from lorapre_peft import LoRAPreAdamW, LoRAPreCallback, create_lorapre_optimizer, lorapre_optimizer
from lorapre_peft.integrations.create import WEIGHT_LR
from lorapre_peft.lowrank.layout import compressed_rank
from lorapre_peft.lowrank.rounding import random_bits, random_keys, write_stochastic

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def train(model, optimizer, batch, steps):
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def named(model, optimizer):
    """Momentum rank of every parameter that the optimizer holds, by name; 0 on the AdamW path."""
    return {
        name: compressed_rank(param.shape, group["momentum_rank"])
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"])
    }


# ---- what is trained ------------------------------------------------------------------------------------------------


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
    assert (group["lr"], group["betas"], group["bf16_rounding"]) == (WEIGHT_LR, (0.9, 0.95), "stochastic")
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


def test_tied_weights_count_once(make_llama):
    model = make_llama(tie_word_embeddings=True)
    optimizer = create_lorapre_optimizer(model, embeddings="adamw")
    held = [id(param) for group in optimizer.param_groups for param in group["params"]]
    assert len(held) == len(set(held))
    assert id(model.lm_head.weight) in held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["nope"]},
            r"matches no module with a trainable matrix; this model's linear layers are called",
        ),
        ({"others": "sgd"}, r"others='sgd': expected 'adamw' or 'frozen'"),
        ({"embeddings": True}, r"embeddings=True: expected 'adamw' or 'frozen'"),
    ],
)
def test_errors(make_llama, options, message):
    with pytest.raises(ValueError, match=message):
        create_lorapre_optimizer(make_llama(), **options)


# ---- the update in the backward pass --------------------------------------------------------------------------------


@both_rules
@both_optimizers
@dtypes
def test_in_backward_equals_the_ordinary_step(make_llama, batch, cls, rule, dtype):
    """Nothing in a matrix's update may depend on which other matrices are stepped with it, but for the order
    of sums.
    """
    kind = "adamw" if cls is LoRAPreAdamW else "muon"
    options = {"lr": 1e-2, "weight_decay": 0.1, "update_rule": rule, "momentum_rank": 4}

    def trained(in_backward, prepare=undisturbed):
        model = make_llama(dtype=dtype)
        optimizer = create_lorapre_optimizer(model, kind, update_in_backward=in_backward, **options)
        train(model, prepare(optimizer), batch, 6)
        return list(model.parameters())

    found = trained(True)
    assert_same_steps(found, partial(trained, False))
    assert any(not torch.equal(a, b) for a, b in zip(found, make_llama(dtype=dtype).parameters()))


def test_in_backward_never_holds_all_gradients(make_llama, batch):
    model = make_llama()
    optimizer = create_lorapre_optimizer(model, lr=1e-2, update_in_backward=True)
    params = [param for param in model.parameters() if param.requires_grad]
    most = 0

    def count(_):
        nonlocal most
        most = max(most, sum(param.grad is not None for param in params))

    for param in params:
        param.register_post_accumulate_grad_hook(count)  # after the optimizer's own hook has freed this one
    model(**batch).loss.backward()
    assert most == 0
    optimizer.step()


def test_in_backward_refuses_accumulation(make_llama, batch):
    model = make_llama()
    optimizer = create_lorapre_optimizer(model, lr=1e-2, update_in_backward=True)
    model(**batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"second backward pass reached .* before optimizer\.step\(\)"):
        model(**batch).loss.backward()
    optimizer.zero_grad()  # as after a pass that broke off, for want of memory say
    model(**batch).loss.backward()


def test_in_backward_ends_with_a_later_optimizer_of_the_ordinary_kind(make_llama, batch):
    model = make_llama()
    earlier = create_lorapre_optimizer(model, update_in_backward=True)
    before = copy.deepcopy(model.state_dict())
    later = create_lorapre_optimizer(model)
    for _ in range(2):  # gradients are accumulated, and nothing moves
        model(**batch).loss.backward()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    later.step()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not earlier.state


def test_in_backward_a_later_optimizer_takes_over(make_llama, batch):
    """Of two on the same parameters the later one updates them; and one that is gone leaves gradients to others."""
    model = make_llama()
    earlier = create_lorapre_optimizer(model, lr=1e-2, update_in_backward=True)
    later = create_lorapre_optimizer(model, lr=1e-2, update_in_backward=True)
    model(**batch).loss.backward()
    assert later.state
    assert not earlier.state
    later.step()
    del later
    gc.collect()
    model(**batch).loss.backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)


@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "copied"])
@dtypes
def test_in_backward_resumes_bit_for_bit(make_llama, batch, dtype, copied):
    """Loaded into a fresh optimizer, and in a deep copy, whose hooks must be its own."""
    options = {"lr": 1e-2, "update_in_backward": True, "momentum_rank": 4}
    whole = make_llama(dtype=dtype)
    train(whole, create_lorapre_optimizer(whole, **options), batch, 6)

    model = make_llama(dtype=dtype)
    optimizer = create_lorapre_optimizer(model, **options)
    train(model, optimizer, batch, 3)
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    else:
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model = make_llama(dtype=dtype)
        optimizer = create_lorapre_optimizer(model, **options)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    train(model, optimizer, batch, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters()))


def test_in_backward_under_trainer_applies_the_scheduled_rate(tmp_path, make_llama, tokens):
    """With lr falling to zero linearly, the logged rates and the applied ones are the same numbers."""
    applied = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            applied.append(optimizer.param_groups[0]["lr"])

    model = make_llama()
    args = arguments(tmp_path, max_grad_norm=0.0, lr_scheduler_type="linear", max_steps=4)
    trainer = Trainer(
        model,
        args,
        train_dataset=tokens,
        optimizer_cls_and_kwargs=lorapre_optimizer("adamw", args, update_in_backward=True),
        callbacks=[Rates(), LoRAPreCallback()],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(applied)
    assert applied == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    assert 0 < logs[-1]["lorapre/captured_energy"] <= 1.0001


# ---- stochastic rounding --------------------------------------------------------------------------------------------


def key(seed=0, step=1, position=0):
    return random_keys(((seed, position),), torch.tensor([float(step)]))


def rounded(value, keys, offset=0):
    """bfloat16 of float32 values [n, ...], by keys [n]."""
    targets = [torch.empty(value.shape[1:], dtype=torch.bfloat16) for _ in value]
    write_stochastic(targets, value, keys, offset)
    return torch.stack(targets)


def test_rounding_is_unbiased():
    """For a value at 30 % of the way between two bf16 numbers: three in ten go up. 4 standard errors, n = 200,000."""
    value = torch.full((200_000,), 1 + 0.3 * 2**-7)
    target = rounded(value[None], key())[0]
    assert set(target.tolist()) == {1.0, 1 + 2**-7}
    assert (target > 1).float().mean() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 200_000) ** 0.5)


def test_rounding_keeps_what_bf16_holds_and_what_is_not_finite():
    value = torch.tensor([1.0, -2.5, 0.0, -0.0, 1e-40, float("inf"), -float("inf"), float("nan")])
    target = rounded(value[None], key())[0]
    assert torch.equal(target[:4].float(), value[:4])
    assert target[4].abs() <= 1e-40 * 2
    assert torch.equal(target[5:7].float(), value[5:7])
    assert target[7].isnan()


def test_random_bits_are_even_and_independent():
    """Every bit is set half of the time, and neighbours, next steps and next parameters are uncorrelated (5 sigma)."""
    count = 200_000
    keys = torch.cat([key(), key(step=2), key(position=1), key(seed=1)])
    draws = random_bits(torch.Size([4, count]), keys, 0)
    for i in range(32):
        assert (draws[0] >> i & 1).float().mean() == pytest.approx(0.5, abs=5 * 0.5 / count**0.5)
    low = [(bits & 0xFFFF).double() - 32767.5 for bits in draws]
    for other in [*low[1:], low[0].roll(1)]:
        assert abs((low[0] * other).mean() / low[0].var()) < 5 / count**0.5


def test_rounding_does_not_depend_on_tiles():
    value = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    here = key(3, 7, 1)
    tiles = [rounded(value[None, start : start + 7], here, start * 30) for start in range(0, 40, 7)]
    assert torch.equal(rounded(value[None], here), torch.cat(tiles, 1))


def test_rounding_of_a_stack_is_that_of_each():
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    keys = random_keys(((1, 4), (1, 0), (1, 9)), torch.tensor([3.0, 3.0, 8.0]))
    alone = [
        rounded(value[None], key(1, step, position)) for value, step, position in zip(values, (3, 3, 8), (4, 0, 9))
    ]
    assert torch.equal(rounded(values, keys), torch.cat(alone))


@pytest.mark.parametrize("k", [2, 0], ids=["compressed", "adamw path"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_small_updates_move_bf16_weights_on_average(rounding, k):
    """lr 2e-5 on weights of 1: nearest rounding loses every update, stochastic keeps their mean.

    A constant gradient moves each weight by lr a step: 100 steps make 2e-3, a quarter of bf16's spacing of 2^-7 above
    1 and half of that of 2^-8 below. 3,200 entries; the mean move is within 5 standard errors.
    """
    param = nn.Parameter(torch.ones(80, 40, dtype=torch.bfloat16))
    optimizer = LoRAPreAdamW([param], lr=2e-5, momentum_rank=k, bf16_rounding=rounding)
    before = torch.get_rng_state()
    take_steps(optimizer, [param], [torch.ones(80, 40)] * 100)
    assert torch.equal(before, torch.get_rng_state())
    moved = (1 - param.float()).mean().item()
    if rounding == "nearest":
        assert moved == 0
    else:
        spacing = 2**-8  # bf16 just below 1
        deviation = (2e-3 * (spacing - 2e-3) / 3200) ** 0.5
        assert moved == pytest.approx(2e-3, abs=5 * deviation)


def test_stochastic_rounding_follows_seed_step_and_position():
    def result(seed, position):
        params = [weights(16, 12, seed=1, dtype=torch.bfloat16) for _ in range(2)]
        optimizer = LoRAPreAdamW(params, lr=1e-3, momentum_rank=2, bf16_rounding="stochastic", seed=seed)
        take_steps(optimizer, params, *[stream((16, 12), 5)] * 2)
        return params[position]

    assert torch.equal(result(0, 0), result(0, 0))
    assert not torch.equal(result(0, 0), result(1, 0))
    assert not torch.equal(result(0, 0), result(0, 1))


# ---- clipping and scale ---------------------------------------------------------------------------------------------


@both_optimizers
@pytest.mark.parametrize("k", [2, 0], ids=["compressed", "adamw path"])
def test_each_parameter_is_clipped_by_its_own_norm(cls, k):
    grads = [g * scale for g, scale in zip(stream((16, 12), 6), (1, 50, 0.01, 1, 1000, 1))]
    clipped = weights(16, 12)
    take_steps(cls([clipped], momentum_rank=k, max_param_grad_norm=2.0), [clipped], grads)
    small = [g * min(1.0, 2.0 / g.norm().item()) for g in grads]
    assert any(g.norm() > 2 for g in grads)

    def by_hand(prepare):
        param = weights(16, 12)
        take_steps(prepare(cls([param], momentum_rank=k)), [param], small)
        return [param]

    assert_same_steps([clipped], by_hand)


@both_optimizers
def test_update_scale_scales_compressed_updates_alone(cls):
    """A quarter of the update, and the same weight decay; the AdamW path is left as it is."""
    full, quarter = [weights(16, 12), weights(5)], [weights(16, 12), weights(5)]
    streams = stream((16, 12), 1), stream((5,), 1)
    before = full[0].detach().clone()
    take_steps(cls(full, lr=0.01, weight_decay=0.1, momentum_rank=2), full, *streams)
    take_steps(cls(quarter, lr=0.01, weight_decay=0.1, momentum_rank=2, update_scale=0.25), quarter, *streams)
    decayed = before * (1 - 0.01 * 0.1)
    room = gamma(4) * before.abs().max().item()  # weights are rounded twice, in each of the two, and once here
    torch.testing.assert_close(quarter[0] - decayed, 0.25 * (full[0] - decayed), rtol=0, atol=2 * room)
    assert torch.equal(full[1], quarter[1])
