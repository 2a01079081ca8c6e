"""What torch.optim's users expect: parameters and groups, closures, schedulers, gradient scaling."""

import copy

import numpy as np
import oracle
import pytest
import torch
from roundoff import assert_same_steps, gamma, oracle_room, undisturbed
from stepping import LR, both_optimizers, both_rules, flat, stream, take_steps, truth_of, weights
from torch import nn
from versions import skip_before

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon

# ---- how parameters and options come in -----------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 10), nn.LayerNorm(10))


def train(model, optimizer, steps=5, scheduler=None, seed=1):
    data = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 12, generator=data)).sin().square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


@both_optimizers
@both_rules
def test_parameters_groups_and_names_are_equivalent(cls, rule):
    forms = {
        "parameters": lambda model: model.parameters(),
        "named": lambda model: model.named_parameters(),
        "group": lambda model: [{"params": list(model.parameters())}],
        "groups": lambda model: [{"params": [param]} for param in model.parameters()],
        "named groups": lambda model: [{"params": list(model.named_parameters())}],
    }

    def trained(form, prepare=undisturbed):
        model = small_model()
        train(model, prepare(cls(forms[form](model), lr=LR, momentum_rank=2, update_rule=rule)))
        return model

    found = {form: trained(form) for form in forms}
    for one, other in (("parameters", "named"), ("parameters", "group"), ("parameters", "named groups")):
        assert same_weights(found[one], found[other])
    assert_same_steps(found["groups"].parameters(), lambda prepare: trained("parameters", prepare).parameters())
    assert not same_weights(found["parameters"], small_model())


@both_optimizers
def test_options_of_each_group(cls):
    """Two groups behave as two optimizers of their own, all options read from the group."""
    a, b, grads = weights(20, 12), weights(20, 12, seed=1), stream((20, 12), 15)
    first = {"lr": 0.02, "momentum_rank": 2, "weight_decay": 0.1, "maximize": True}
    second = {"lr": 0.005, "momentum_rank": 5, "residual_weight": 0.4}
    if cls is LoRAPreAdamW:
        second |= {"betas": (0.8, 0.9), "eps": 1e-4}
    else:
        second |= {"momentum": 0.8, "nesterov": True, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}
    take_steps(cls([{"params": [a], **first}, {"params": [b], **second}]), [a, b], grads, grads)
    for param, start, options in ((a, weights(20, 12), first), (b, weights(20, 12, seed=1), second)):
        take_steps(cls([start], **options), [start], grads)
        assert torch.equal(param, start)


@both_optimizers
def test_groups_of_both_rules(cls):
    params, grads = [weights(20, 12), weights(20, 12)], stream((20, 12), 3)
    optimizer = cls(
        [{"params": [p], "update_rule": rule} for p, rule in zip(params, ("als", "newton"))], lr=LR, momentum_rank=2
    )
    take_steps(optimizer, params, grads, grads)
    assert ("v_energy" in optimizer.state[params[0]]) == (cls is LoRAPreAdamW)
    assert "v_energy" not in optimizer.state[params[1]]
    assert not torch.equal(*params)


@both_optimizers
def test_closure(cls):
    param = weights(20, 12)
    optimizer = cls([param], lr=LR)
    target = torch.zeros(20, 12)

    def closure():
        optimizer.zero_grad()
        loss = (param - target).square().sum()
        loss.backward()  # needs grad mode inside of step
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


@both_optimizers
@both_rules
def test_tensor_lr(cls, rule):
    models = [small_model(), small_model()]
    for model, lr in zip(models, (LR, torch.tensor(LR, dtype=torch.float64))):
        train(model, cls(model.parameters(), lr=lr, momentum_rank=2, update_rule=rule, weight_decay=0.1))
    assert same_weights(*models)


@both_optimizers
def test_add_param_group_later(cls):
    a, b, grads = weights(20, 12), weights(20, 12, seed=1), stream((20, 12), 6)
    optimizer = cls([a], lr=LR, momentum_rank=2)
    take_steps(optimizer, [a], grads[:3])
    optimizer.add_param_group({"params": [b], "momentum_rank": 4})
    take_steps(optimizer, [a, b], grads[3:], grads[3:])
    alone = weights(20, 12, seed=1)
    take_steps(cls([alone], lr=LR, momentum_rank=4), [alone], grads[3:])
    assert torch.equal(b, alone)
    assert optimizer.state[a]["step"].item() == 6


@both_optimizers
def test_zero_grad(cls):
    param = weights(20, 12)
    optimizer = cls([param], lr=LR)
    take_steps(optimizer, [param], stream((20, 12), 1))
    optimizer.zero_grad(set_to_none=False)
    assert not param.grad.any()
    optimizer.zero_grad()
    assert param.grad is None


# ---- schedules and gradient scaling ---------------------------------------------------------------------------------


@both_optimizers
def test_a_rate_just_below_zero_steps_and_is_saved(cls):
    """Schedules end there by round-off: the step moves nothing, and the checkpoint can be loaded."""
    param, grads = weights(20, 12), stream((20, 12), 2)
    optimizer = cls([param], lr=LR, momentum_rank=2)
    take_steps(optimizer, [param], grads[:1])
    before = param.detach().clone()
    optimizer.param_groups[0]["lr"] = -1e-19
    take_steps(optimizer, [param], grads[1:])
    assert torch.equal(param, before)
    fresh = cls([weights(20, 12)], lr=LR, momentum_rank=2)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == -1e-19


@both_optimizers
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lambda_lr(cls, tensor_lr):
    """A warmup from zero and a decay, against the same rates written by hand."""
    factors = [0.0, 0.5, 1.0, 0.7, 0.3, 0.1]
    models = [small_model(), small_model()]
    rate = torch.tensor(LR) if tensor_lr else LR
    optimizer = cls(models[0].parameters(), lr=copy.deepcopy(rate), momentum_rank=2)
    train(models[0], optimizer, 5, torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__))
    by_hand = cls(models[1].parameters(), lr=LR, momentum_rank=2)
    data = torch.Generator().manual_seed(1)
    for factor in factors[:5]:
        by_hand.param_groups[0]["lr"] = rate * factor
        by_hand.zero_grad()
        models[1](torch.randn(16, 12, generator=data)).sin().square().mean().backward()
        by_hand.step()
    assert same_weights(*models)


@both_optimizers
@both_rules
def test_decays_that_change_between_steps(cls, rule):
    """As a schedule changes them: each step follows the oracle at the decays of that step."""
    shape, k = (19, 17), 5
    param, grads = weights(*shape), stream(shape, 8)
    optimizer = cls([param], lr=LR, momentum_rank=k, update_rule=rule)
    truth, theta = truth_of(optimizer, k, rule), param.detach().double().numpy()
    name, changed = ("betas", (0.8, 0.9)) if cls is LoRAPreAdamW else ("momentum", 0.8)

    def before(truth, step):
        if step == 4:
            truth.redecay(changed)

    room, _ = oracle_room(truth, theta, flat(grads), LR, before=before)
    for step, (g, atol) in enumerate(zip(grads, room)):
        before(truth, step)
        if step == 4:
            optimizer.param_groups[0][name] = changed
        take_steps(optimizer, [param], [g])
        theta = oracle.train(truth, theta, [g.numpy()], LR)[-1]
        np.testing.assert_allclose(param.detach(), theta, rtol=0, atol=atol)


@both_optimizers
def test_one_cycle_lr(cls):
    """It cycles β1 (or μ) as well as the rate; 0.95 is within als's range."""
    model = small_model()
    optimizer = cls(model.parameters(), lr=LR, momentum_rank=2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12)
    name, seen, before = ("betas" if cls is LoRAPreAdamW else "momentum"), set(), copy.deepcopy(model)
    for i in range(11):
        value = optimizer.param_groups[0][name]
        seen.add(value[0] if cls is LoRAPreAdamW else value)
        train(model, optimizer, 1, scheduler, seed=i)
    assert min(seen) == pytest.approx(0.85, abs=1e-3)
    assert max(seen) == pytest.approx(0.95)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not same_weights(model, before)


@both_optimizers
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_adamw_path_follows_schedule(cls, tensor_lr):
    """Schedulers write `lr` alone; Muon's other rate keeps its proportion to it."""
    matrix, ours, theirs, steps = weights(20, 12), weights(12), weights(12), 10
    rate = 0.003 if cls is LoRAPreMuon else LR
    lr = torch.tensor(LR) if tensor_lr else LR
    optimizer = cls([matrix, ours], lr=lr, **({"adamw_lr": rate} if cls is LoRAPreMuon else {}))
    reference = torch.optim.AdamW([theirs], lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in (optimizer, reference)]
    for g in stream((20, 12), steps):
        take_steps(optimizer, [matrix, ours], [g], [g[0]])
        take_steps(reference, [theirs], [g[0]])
        for schedule in schedules:
            schedule.step()
    # A weight is rounded twice a step; a rate of float32, and what is computed with it, changes an update of at most
    # `rate` a little.
    room = gamma(2 * steps) * theirs.abs().max().item() + steps * rate * gamma(20)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=room)


@both_optimizers
def test_grad_scaler_skips_and_unscales(cls):
    """An overflown step is skipped by the scaler before the optimizer sees it; the others equal an unscaled run.

    The scale is a power of two and the loss quadratic, so that scaling costs no bit.
    """
    params = [weights(20, 12), weights(20, 12)]
    optimizers = [cls([param], lr=LR, momentum_rank=2) for param in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        overflow = step == 3
        loss = params[0].square().sum() * (float("inf") if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        if not overflow:
            params[1].square().sum().backward()
            optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert torch.equal(*params)
    assert scaler.get_scale() == 512.0
    assert optimizers[0].skipped_updates == 0
    assert optimizers[0].state[params[0]]["step"].item() == 5


@skip_before("torch", "2.8", "loses the self of a method that it is not to compile")
@both_optimizers
def test_a_compiled_step_is_the_step_and_traces_nothing(cls):
    """torch.compile(optimizer.step) is what some loops write; tracing what the step does took seconds."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    params, twins = ([weights(20, 12, seed=i) for i in range(2)] for _ in range(2))
    grads = [stream((20, 12), 3, seed=i) for i in range(2)]
    plain, compiled = (cls(own, lr=LR, momentum_rank=2) for own in (params, twins))
    take_steps(plain, params, *grads)
    step = torch.compile(compiled.step)
    for of_step in zip(*grads):
        for param, grad in zip(twins, of_step):
            param.grad = grad
        step()
    assert all(map(torch.equal, params, twins))
    assert not torch._dynamo.utils.counters["stats"].get("calls_captured")
