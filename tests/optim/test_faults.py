"""What goes wrong in long runs: overflows, gradient spikes, and models that change under way."""

import warnings
from functools import partial

import pytest
import torch
from adapting import adapted, train
from roundoff import assert_same_steps, undisturbed
from stepping import LR, both_optimizers, both_rules, weights
from torch import nn
from trainers import arguments, lorapre_trainer
from transformers import TrainerCallback

from lorapre_peft import LoRAPreAdamW, LoRAPreConfig, create_lorapre_optimizer


def regression(cls, steps, spike=(), dtype=None, scaler=None, lr=0.02, freeze=(), prepare=undisturbed, **options):
    """A small net taught x → sin x: its losses, net and optimizer. ``spike``: steps whose gradient is a million times
    as large.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    optimizer = prepare(cls(model.parameters(), lr=lr, momentum_rank=2, **options))
    losses = []
    for step in range(steps):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step % 20))
        for i, layer in enumerate(model):
            layer.requires_grad_(not (i == 2 and step in freeze))
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = (model(x).float() - x.sin()).square().mean()
        factor = 1e6 if step in spike else 1.0
        (loss * factor if scaler is None else scaler.scale(loss * factor)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model, optimizer


@both_optimizers
def test_fp16_with_a_grad_scaler_that_settles(cls):
    """The first steps overflow at a scale of 2**30: the scaler halves it and skips them, and the optimizer never sees
    them.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=25)
    losses, model, optimizer = regression(cls, 120, dtype=torch.float16, scaler=scaler)
    taken = {int(optimizer.state[param]["step"]) for param in model.parameters()}
    assert len(taken) == 1
    assert 80 <= taken.pop() < 120
    assert optimizer.skipped_updates == 0
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert scaler.get_scale() < 2.0**30


class TorchAdamW(torch.optim.AdamW):
    def __init__(self, params, lr, momentum_rank):
        super().__init__(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


@both_optimizers
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_without_any_gradient_is_said_once(cls, in_backward):
    """So it is after fully_shard, which has put new parameters into the model."""
    param = weights(20, 12)
    optimizer = cls([param], momentum_rank=2, lr=LR, update_in_backward=in_backward)
    with pytest.warns(UserWarning, match=r"found no gradient on any of its parameters: .* after fully_shard"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert torch.equal(param, weights(20, 12))


def test_a_gradient_spike_of_a_million_costs_no_more_than_in_adamw():
    """Adam's m points along the spike for some 20 steps, and its v keeps later steps small for some 500: a factor of 2
    for the rest.
    """
    ours, theirs = (regression(cls, 120, spike=[60])[0] for cls in (LoRAPreAdamW, TorchAdamW))
    assert max(ours[60:]) < 2 * max(theirs[60:])


@both_optimizers
def test_max_param_grad_norm_takes_a_gradient_spike_away(cls):
    spiked, plain = (regression(cls, 120, spike=spike, max_param_grad_norm=1.0)[0] for spike in ([60], []))
    assert max(spiked[60:]) < 2 * max(plain[50:])
    assert sum(spiked[-10:]) < 1.5 * sum(plain[-10:])


# ---- models that change under way -----------------------------------------------------------------------------------


@both_optimizers
@both_rules
@pytest.mark.parametrize("update_in_backward", [False, True])
def test_a_parameter_frozen_and_thawed_takes_up_where_it_stopped(cls, rule, update_in_backward):
    """Frozen, neither it nor its state moves, and its own count of steps stands; the others do not notice."""
    options = {"update_rule": rule, "update_in_backward": update_in_backward, "weight_decay": 0.1}
    _, model, optimizer = regression(cls, 20, freeze=range(8, 15), **options)
    frozen = list(model[2].parameters())
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {13, 20}
    assert {int(optimizer.state[p]["step"]) for p in frozen} == {13}
    before, during = (regression(cls, steps, freeze=range(8, 15), **options)[1] for steps in (8, 15))
    assert all(torch.equal(a, b) for a, b in zip(before[2].parameters(), during[2].parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(frozen, before[2].parameters()))


@both_optimizers
def test_a_parameter_frozen_from_the_start_and_thawed_is_updated_in_the_backward_pass_too(cls):
    def trained(in_backward, prepare=undisturbed):
        return regression(cls, 20, freeze=range(6), prepare=prepare, update_in_backward=in_backward)[1].parameters()

    assert_same_steps(trained(True), partial(trained, False))


def adapter_parameters(model, adapter) -> list[nn.Parameter]:
    return [param for name, param in model.named_parameters() if f".{adapter}." in name]


@both_optimizers
def test_an_adapter_added_and_switched_to_while_the_optimizer_lives(make_llama, batch, cls):
    """As in torch, a parameter that was not given is not trained; `add_param_group` gives it. The first adapter takes
    up in every bit.
    """

    def run(switch):
        model = adapted(make_llama(), momentum_rank=2)
        kind = "adamw" if cls is LoRAPreAdamW else "muon"
        optimizer = create_lorapre_optimizer(model, kind, lr=1e-2)
        train(optimizer, lambda: model(**batch).loss, 3)
        if switch:
            torch.manual_seed(1)
            model.add_adapter("second", LoRAPreConfig(r=16, target_modules=["q_proj"]))
            model.set_adapter("second")
            second = adapter_parameters(model, "second")
            before = [p.detach().clone() for p in second]
            train(optimizer, lambda: model(**batch).loss, 2)
            assert all(torch.equal(a, b) for a, b in zip(second, before))
            names = [(name, param) for name, param in model.named_parameters() if ".second." in name]
            optimizer.add_param_group({"params": names, "momentum_rank": 4})
            train(optimizer, lambda: model(**batch).loss, 3)
            assert not any(torch.equal(a, b) for a, b in zip(second, before))
            assert {optimizer.state[p]["m_A"].shape[0] for p in second} == {4}
            model.set_adapter("default")
        train(optimizer, lambda: model(**batch).loss, 3)
        return adapter_parameters(model, "default")

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True)))


def test_an_adapter_deleted_while_the_optimizer_lives(two_adapters, batch):
    """Its parameters stay in the groups, without gradients: nothing happens to them. Its state fits no optimizer of
    the smaller model.
    """
    model = two_adapters
    model.base_model.set_adapter(["default", "second"])
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    train(optimizer, lambda: model(**batch).loss, 2)
    gone = adapter_parameters(model, "second")
    before = [p.detach().clone() for p in gone]
    model.delete_adapter("second")
    model.set_adapter("default")
    losses = train(optimizer, lambda: model(**batch).loss, 5)
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(gone, before))
    optimizer.load_state_dict(optimizer.state_dict())
    smaller = create_lorapre_optimizer(model, lr=1e-2)
    with pytest.raises(ValueError, match=r"groups of \[28, 8\] parameters; this LoRAPreAdamW has groups of \[28\]"):
        smaller.load_state_dict(optimizer.state_dict())
    assert not smaller.state


class ReplaceAdapter(TrainerCallback):
    """Deletes the adapter after the second step and adds another one of the same name."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            config = model.peft_config["default"]
            model.delete_adapter("default")
            model.add_adapter("default", config)
            model.set_adapter("default")


def test_an_adapter_replaced_under_the_trainer_is_an_error_at_the_next_log(tmp_path, peft_model, tokens):
    """Otherwise the run would go on to its end and train nothing."""
    trainer = lorapre_trainer(peft_model(), arguments(tmp_path, logging_steps=2), tokens, [ReplaceAdapter()])
    with pytest.raises(RuntimeError, match=r"does not hold 28 of the model's 28 .* or loaded anew since"):
        trainer.train()
    assert trainer.state.global_step == 3
