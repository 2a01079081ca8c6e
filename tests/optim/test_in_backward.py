"""Updates in the backward pass: the steps of the ordinary kind, with one gradient in memory at a time."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from roundoff import assert_same_steps, undisturbed
from stepping import LR, both_optimizers, both_rules, weights
from trainers import arguments
from transformers import Trainer, TrainerCallback

from lorapre_peft import LoRAPreAdamW, LoRAPreCallback, create_lorapre_optimizer, lorapre_optimizer

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def train(model, optimizer, batch, steps):
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


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


def test_in_backward_holds_no_parameter_that_was_taken_out():
    kept, removed = weights(20, 12), weights(20, 12, seed=1)
    groups = [{"params": [kept]}, {"params": [removed]}]
    optimizer = LoRAPreAdamW(groups, lr=LR, momentum_rank=2, update_in_backward=True)
    (kept.sum() + removed.sum()).backward()
    optimizer.step()
    alive = weakref.ref(removed)
    del optimizer.state[removed], optimizer.param_groups[1], groups, removed
    kept.sum().backward()
    optimizer.step()
    gc.collect()
    assert alive() is None


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


def test_an_ordinary_runs_state_is_loaded_and_loaded_again(make_llama, batch):
    """The saved option does not take the place of the optimizer's own, and everything that is saved can be loaded."""
    model = make_llama()
    ordinary = create_lorapre_optimizer(model, lr=1e-2)
    train(model, ordinary, batch, 2)
    other = copy.deepcopy(model)
    optimizer = create_lorapre_optimizer(other, lr=1e-2, update_in_backward=True)
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(ordinary.state_dict()))
        assert all(group["update_in_backward"] for group in optimizer.param_groups)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, ordinary, batch, 2)
    train(other, optimizer, batch, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


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
