"""The steps of compressed matrices, by both optimizers, against the float64 oracle."""

import numpy as np
import oracle
import pytest
import torch
from backend_runs import BACKENDS, DEVICE, eager_and_cpp
from roundoff import assert_same_steps, gamma, oracle_room
from stepping import LR, both_optimizers, both_rules, flat, stream, take_steps, truth_of, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW

SHAPES = [((20, 12), 3), ((12, 40), 1), ((40, 6), 2), ((9, 9), 4), ((10, 4, 3), 2), ((8, 4, 3, 3), 3)]


@both_optimizers
@both_rules
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
def test_equals_oracle(cls, rule, shape, k):
    param, grads = weights(*shape), stream(shape, 50)
    optimizer = cls([param], lr=LR, weight_decay=0.1, momentum_rank=k, update_rule=rule)
    start, truth = param.detach().double().reshape(shape[0], -1).numpy(), truth_of(optimizer, k, rule)
    room, _ = oracle_room(truth, start, flat(grads), LR, weight_decay=0.1)
    path = oracle.train(truth, start, flat(grads), LR, weight_decay=0.1)
    for g, expected, atol in zip(grads, path, room):
        take_steps(optimizer, [param], [g])
        np.testing.assert_allclose(param.detach().reshape(shape[0], -1), expected, rtol=0, atol=atol)
    assert "m_B" in optimizer.state[param]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "second"), [(5, 2), (5, 5)])
def test_second_moments_of_other_ranks(backend, k, second):
    """v has a rank of its own, at most that of m."""
    param, grads = nn.Parameter(weights(20, 12).detach().to(DEVICE)), stream((20, 12), 4)
    optimizer = LoRAPreAdamW([param], lr=LR, momentum_rank=k, second_momentum_rank=second, backend=backend)
    truth, start = truth_of(optimizer, k, "als", second=second), param.detach().cpu().double().numpy()
    room, _ = oracle_room(truth, start, flat(grads), LR)
    path = oracle.train(truth, start, flat(grads), LR)
    take_steps(optimizer, [param], grads)
    np.testing.assert_allclose(param.detach().cpu(), path[-1], rtol=0, atol=room[-1])
    assert optimizer.state[param]["v_A"].shape == (second, 12)


@both_optimizers
@both_rules
def test_options_reach_the_maths(cls, rule):
    """betas, eps, momentum, nesterov and ρ away from their defaults, all at once."""
    param, grads, k = weights(20, 12), stream((20, 12), 50), 3
    options = {"betas": (0.8, 0.99), "eps": 1e-3} if cls is LoRAPreAdamW else {"momentum": 0.9, "nesterov": True}
    rho = {"residual_weight": 0.3} if rule == "als" else {}
    optimizer = cls([param], lr=LR, momentum_rank=k, update_rule=rule, **options, **rho)
    truth = truth_of(optimizer, k, rule, **options, rho=rho.get("residual_weight"))
    room, _ = oracle_room(truth, param.detach().double().numpy(), flat(grads), LR)
    path = oracle.train(truth, param.detach().double().numpy(), flat(grads), LR)
    take_steps(optimizer, [param], grads)
    np.testing.assert_allclose(param.detach(), path[-1], rtol=0, atol=room[-1])


@both_optimizers
@both_rules
def test_maximize_is_minimize_of_negative(cls, rule):
    up, down, grads = weights(20, 12), weights(20, 12), stream((20, 12), 20)
    bias_up, bias_down = weights(12), weights(12)
    take_steps(cls([up, bias_up], lr=LR, update_rule=rule, maximize=True), [up, bias_up], grads, [g[0] for g in grads])
    take_steps(
        cls([down, bias_down], lr=LR, update_rule=rule), [down, bias_down], [-g for g in grads], [-g[0] for g in grads]
    )
    assert torch.equal(up, down)
    assert torch.equal(bias_up, bias_down)


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


@both_optimizers
@both_rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(20, 12), (12,)], ids=["compressed", "adamw path"])
def test_half_precision_rounds_once(cls, rule, dtype, shape):
    """State stays float32, the new weight is rounded once: bit for bit the rounded float32 step."""
    param, wide, grads = weights(*shape, dtype=dtype), weights(*shape), stream((20, 12), 20)
    # Eager: there both are the same float32 operations, where the C++ kernels are compiled for each dtype
    # (test_backends.py has them).
    options = dict(
        lr=LR, weight_decay=0.1, momentum_rank=2, bf16_rounding="nearest", update_rule=rule, backend="eager"
    )
    optimizers = [cls([p], **options) for p in (param, wide)]
    for g in grads:
        g = (g if len(shape) == 2 else g[0]).to(dtype)
        wide.data.copy_(param)
        take_steps(optimizers[0], [param], [g])
        take_steps(optimizers[1], [wide], [g])
        assert torch.equal(param, wide.to(dtype))
    states = [optimizer.state[p] for optimizer, p in zip(optimizers, (param, wide))]
    for name, value in states[0].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, states[1][name])


@both_optimizers
@both_rules
def test_float64_parameters(cls, rule):
    """The factors stay float32; the moments of a float64 vector on the AdamW path are float64, as torch has them."""
    param, bias, grads = weights(20, 12, dtype=torch.float64), weights(12, dtype=torch.float64), stream((20, 12), 30)
    optimizer = cls([param, bias], lr=LR, momentum_rank=3, update_rule=rule)
    twin = cls([param.detach().clone()], lr=LR, momentum_rank=3, update_rule=rule)
    truth = truth_of(twin, 3, rule)
    room, _ = oracle_room(truth, param.detach().numpy(), flat(grads), LR)
    path = oracle.train(truth, param.detach().numpy(), flat(grads), LR)
    take_steps(optimizer, [param, bias], grads, [g[0] for g in grads])
    np.testing.assert_allclose(param.detach(), path[-1], rtol=0, atol=room[-1])
    assert param.dtype == torch.float64
    assert {value.dtype for value in optimizer.state[param].values()} == {torch.float32}
    assert optimizer.state[bias]["exp_avg"].dtype == torch.float64


@both_optimizers
@both_rules
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_step_inside_autocast_is_as_exact_as_outside(cls, rule, backend):
    ours, theirs, grads = weights(30, 20), weights(30, 20), stream((30, 20), 4)
    options = {"lr": LR, "momentum_rank": 2, "update_rule": rule, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        take_steps(cls([ours], **options), [ours], grads)
    take_steps(cls([theirs], **options), [theirs], grads)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", ["momentum_rank", "shape", "uncompressed"])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_what_no_longer_fits_the_state_is_an_error_before_the_step(change, backend):
    """No parameter has moved then, of the same group or of another rule."""
    other, param = weights(30, 20, seed=1), weights(30, 20)
    groups = [{"params": [param], "update_rule": "newton"}, {"params": [other]}]
    optimizer = LoRAPreAdamW(groups, lr=LR, momentum_rank=2, backend=backend)
    take_steps(optimizer, [other, param], stream((30, 20), 3, seed=1), stream((30, 20), 3))
    if change == "shape":
        param.data, param.grad = torch.zeros(30, 30), None
    else:
        optimizer.param_groups[0][change] = 4 if change == "momentum_rank" else [0]
    before = other.detach().clone()
    with pytest.raises(ValueError, match=r"has the state .*, expected .*: its shape or these options have changed"):
        take_steps(optimizer, [other, param], stream((30, 20), 1), stream(tuple(param.shape), 1))
    assert torch.equal(other, before)
    assert optimizer.state[other]["step"] == 3


@both_optimizers
@eager_and_cpp
@pytest.mark.parametrize("replaced", ["gradient", "parameter"])
def test_a_gradient_of_another_shape_is_an_error_before_the_step(cls, backend, replaced):
    """Its data, or the parameter's, can be replaced unnoticed by torch; kernels would read past its end."""
    params = [weights(30, 20, seed=i) for i in range(2)]
    optimizer = cls(params, lr=LR, momentum_rank=2, backend=backend)
    take_steps(optimizer, params, *(stream((30, 20), 2, seed=i) for i in range(2)))
    before = params[0].detach().clone()
    if replaced == "gradient":
        params[1].grad.data = torch.ones(3, 4)
    else:
        params[1].data = torch.ones(40, 60)
    with pytest.raises(RuntimeError, match=r"found a gradient of shape .* on a parameter of shape .* has replaced"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_another_backend_takes_over():
    param, grads = weights(30, 20), stream((30, 20), 4)
    optimizer = LoRAPreAdamW([param], lr=LR, momentum_rank=2)
    take_steps(optimizer, [param], grads[:2])
    optimizer.backend = "eager"
    take_steps(optimizer, [param], grads[2:])
    assert optimizer.state[param]["step"] == 4
