"""torch's own helpers for testing optimizers (`torch.testing._internal.common_optimizers`), over both optimizers and
both rules.

An `OptimizerInfo` of each says what it takes; the checks below are those that torch's test_optim.py makes of every
optimizer with such an info, where they apply. Not driven from here, and why:

* foreach, fused, capturable, differentiable and torch.compile: there are no such arguments;
* complex parameters and sparse gradients: refused, see test_errors.py;
* several devices, CUDA graphs and peak memory: need a GPU;
* loading a `step` that is a Python number, or groups that lack an option (checkpoints of old torch versions): refused,
  see test_errors.py; there are no such checkpoints of this package;
* torch's error messages for betas, weight decay and a `lr` of two elements: ours say what was expected, see
    test_errors.py.
"""

import copy
import io
import warnings

import pytest
import torch
from roundoff import gamma
from torch import nn
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    get_error_inputs_for_all_optims,
)
from torch.testing._internal.common_utils import TestCase

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon

assert_equal = TestCase().assertEqual  # of nested dicts with tensors

SHARED = [
    ({}, "default"),
    ({"lr": 0.01}, "non-default lr"),
    ({"lr": torch.tensor(0.001)}, "Tensor lr"),
    ({"weight_decay": 0.1}, "nonzero weight_decay"),
    ({"weight_decay": 0.1, "maximize": True}, "maximize"),
    ({"update_rule": "newton"}, "newton"),
    ({"momentum_rank": 0}, "AdamW path"),
    ({"momentum_rank": 1, "residual_weight": 0.1}, "rank 1"),
    ({"update_scale": 0.25, "max_param_grad_norm": 1.0}, "scaled and clipped"),
    ({"temporary_bytes": 200}, "tiles"),
]
OWN = {
    LoRAPreAdamW: [({"betas": (0.8, 0.9), "eps": 1e-6}, "betas and eps")],
    LoRAPreMuon: [
        ({"momentum": 0.8, "nesterov": True, "adjust_lr_fn": "original"}, "nesterov"),
        ({"adamw_lr": 0.01}, "adamw_lr"),
    ],
}  # fmt: skip


def info(cls) -> OptimizerInfo:
    return OptimizerInfo(
        cls,
        optim_inputs_func=lambda device, dtype=None: [
            OptimizerInput(params=None, kwargs=dict(kwargs), desc=desc) for kwargs, desc in SHARED + OWN[cls]
        ],
        optim_error_inputs_func=get_error_inputs_for_all_optims,
        supported_impls=(),
        not_og_supported_flags=(),
        supports_complex=False,
    )


INFOS = [info(LoRAPreAdamW), info(LoRAPreMuon)]
CASES = [
    pytest.param(one, case, id=f"{one.optim_cls.__name__}-{case.desc}")
    for one in INFOS
    for case in one.optim_inputs_func(device="cpu")
]
every_case = pytest.mark.parametrize(("one", "case"), CASES)
every_info = pytest.mark.parametrize("one", INFOS, ids=lambda one: one.optim_cls.__name__)


def problem(dtype=torch.float64, contiguous=True):
    """Weight, bias and closure of torch's own small problem: ‖W x + b‖²."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((10, 5, 2), (10, 2), (5,)))
    weight, bias = (t[..., 0] if not contiguous else t[..., 0].clone() for t in (weight, bias))
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)

    def closure(optimizer):
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return [weight, bias], closure


def run(optimizer, closure, steps):
    for _ in range(steps):
        optimizer.step(lambda: closure(optimizer))


@every_info
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors(one, dtype):
    """torch's invalid inputs raise what torch says; its message for a `lr` of two elements is replaced by ours."""
    for bad in one.optim_error_inputs_func("cpu", dtype):
        params, kwargs = bad.optimizer_error_input.params, bad.optimizer_error_input.kwargs
        params = [nn.Parameter(torch.randn(2, 3, dtype=dtype))] if params is None else params
        message = bad.error_regex.replace(
            "Tensor lr must be 1-element", "expected a number or a tensor with one element"
        )
        assert bad.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        if issubclass(bad.error_type, Warning):
            with pytest.warns(bad.error_type, match=message):
                one.optim_cls(params, **kwargs)
        else:
            with pytest.raises(bad.error_type, match=message):
                one.optim_cls(params, **kwargs)


@every_case
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", [[], [0], [0, 1]], ids=["no-schedule", "StepLR", "StepLR-ReduceLROnPlateau"])
def test_goes_in_the_right_direction(one, case, contiguous, schedulers):
    params, closure = problem(contiguous=contiguous)
    optimizer = one.optim_cls(params, **case.kwargs)
    made = [one.scheduler_inputs[0][i](optimizer) for i in schedulers]
    first = closure(optimizer).item()
    for _ in range(20):
        run(optimizer, closure, 1)
        for scheduler in made:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(closure(optimizer)) if plateau else scheduler.step()
    last = closure(optimizer).item()
    assert (last > first) if case.kwargs.get("maximize") else (last < first)


@every_case
def test_groups_with_their_own_lr_and_weight_decay(one, case):
    """A group at lr 0 and without decay stays where it is; the other goes its way."""
    (weight, bias), closure = problem()
    kwargs = {key: value for key, value in case.kwargs.items() if key != "adamw_lr"}
    optimizer = one.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.0, "weight_decay": 0.0}], **kwargs)
    before = weight.detach().clone(), bias.detach().clone()
    run(optimizer, closure, 5)
    assert not torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])


@every_case
def test_implementations_agree(one, case):
    """torch compares for-loop and foreach with this tracker; here both of ours: matrices stacked in one bucket, and
    each alone.
    """
    tracker = TensorTracker()
    for together in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(12, 8, generator=generator)) for _ in range(3)]
        groups = [{"params": params}] if together else [{"params": [param]} for param in params]
        optimizer = one.optim_cls(groups, **case.kwargs)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
            for param in params:
                for value in (param, *optimizer.state[param].values()):
                    tracker.add(value) if together else tracker.pop_check_set(value, TestCase())
    assert tracker.all_popped()


@every_case
def test_state_dict_is_deterministic_and_untouched(one, case):
    params, closure = problem()
    optimizer = one.optim_cls(params, **case.kwargs)
    run(optimizer, closure, 3)
    twins, twin_closure = problem()
    for twin, param in zip(twins, params):
        twin.data.copy_(param)
    other = one.optim_cls(twins, **case.kwargs)
    saved = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(saved)
    other.load_state_dict(given)
    for _ in range(3):
        run(optimizer, closure, 1)
        run(other, twin_closure, 1)
        assert all(torch.equal(a, b) for a, b in zip(params, twins))
    assert_equal(given, saved)
    assert_equal(optimizer.state_dict(), other.state_dict())
    other.param_groups.extend(other.param_groups)  # a group that is there twice has the same ids twice
    assert other.state_dict()["param_groups"][-1] == optimizer.state_dict()["param_groups"][-1]


@every_case
def test_weights_only_load_of_named_parameters(one, case):
    params, closure = problem()
    optimizer = one.optim_cls(list(zip(("weight", "bias"), params)), **case.kwargs)
    run(optimizer, closure, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_equal(loaded, optimizer.state_dict())
    assert loaded["param_groups"][0]["param_names"] == ["weight", "bias"]
    unnamed = one.optim_cls(params, **case.kwargs)
    unnamed.load_state_dict(loaded)
    assert unnamed.param_groups[0]["param_names"] == ["weight", "bias"]  # torch takes them from the file


@every_case
def test_deepcopy_has_all_public_attributes(one, case):
    optimizer = one.optim_cls(problem()[0], **case.kwargs)
    public = [
        {name for name in vars(each) if not name.startswith("_")} for each in (optimizer, copy.deepcopy(optimizer))
    ]
    assert public[0] == public[1]


@every_case
def test_step_without_gradients_is_no_step(one, case):
    params, closure = problem()
    optimizer = one.optim_cls(params, **case.kwargs)
    optimizer.step()
    assert not optimizer.state
    run(optimizer, closure, 1)
    optimizer.zero_grad()
    before, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step()
    assert_equal(optimizer.state_dict()["state"], state)
    assert all(torch.equal(a, b) for a, b in zip(params, before))


@every_case
def test_first_step_of_zero_gradients_is_no_step_but_for_weight_decay(one, case):
    (weight, bias), _ = problem()
    optimizer = one.optim_cls([weight, bias], **case.kwargs)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    decay = float(case.kwargs.get("lr", 1e-3)) * case.kwargs.get("weight_decay", 0.0)
    before = weight.detach() * (1 - decay), bias.detach() * (1 - decay)
    optimizer.step()
    # An update is float32, of float64 parameters too: its part here is lr · λ of the weight.
    torch.testing.assert_close((weight, bias), before, rtol=gamma(3) * decay + gamma(3, torch.float64), atol=0)


@every_info
def test_hooks_are_called_around_step_and_state_dict(one):
    params, closure = problem()
    optimizer, calls = one.optim_cls(params), []
    register = {
        "step_pre": lambda *args: calls.append("step_pre"),
        "step_post": lambda *args: calls.append("step_post"),
        "state_dict_pre": lambda *args: calls.append("state_dict_pre"),
        "state_dict_post": lambda *args: calls.append("state_dict_post"),
        "load_state_dict_pre": lambda *args: calls.append("load_state_dict_pre"),
        "load_state_dict_post": lambda *args: calls.append("load_state_dict_post"),
    }
    for name, hook in register.items():
        getattr(optimizer, f"register_{name}_hook")(hook)
    run(optimizer, closure, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == list(register)


@every_case
def test_can_be_printed(one, case):
    text = repr(one.optim_cls(problem()[0], **case.kwargs))
    assert text.startswith(one.optim_cls.__name__)
    assert "momentum_rank" in text


@every_info
def test_no_warning_in_a_plain_run(one):
    params, closure = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(one.optim_cls(params, momentum_rank=2), closure, 3)
