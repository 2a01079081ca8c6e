"""Apple GPUs, which have no float64: on a pretended one (`pretend_mps`), as the tests' machines have none."""

import contextlib

import numpy as np
import oracle
import pytest
import torch
from pretend_mps import MPS, pretended
from roundoff import oracle_room
from stepping import LR, both_optimizers, both_rules, flat, stream, truth_of, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW
from lorapre_peft.extract.lora import _factors, _norm
from lorapre_peft.extract.svd import EXACT_SVD_SIZE
from lorapre_peft.kernels import choose as backends
from lorapre_peft.lowrank import float64 as precision

# Factored by elimination and by Cholesky; a convolution, and a vector.
PARAMETERS = [((20, 12), 3), ((20, 12), 3), ((12, 40), 7), ((8, 4, 3, 3), 3), ((140, 132), 5), ((12,), 0)]
OPTIONS = {
    "clipped": {"max_param_grad_norm": 3.0, "maximize": True, "weight_decay": 0.1, "update_scale": 0.25},
    "tensor lr": {"lr": torch.tensor(LR)},
    "bfloat16": {"bf16_rounding": "stochastic"},
    "in backward": {"update_in_backward": True},
    "tiles": {"temporary_bytes": 100_000},
}


def pretending(device):
    return pretended() if device == MPS else contextlib.nullcontext()


def run(device, cls, parameters=PARAMETERS, steps=4, broken=None, **options):
    """Parameters, states, metrics and skips after some steps on a device, on the CPU. broken: the step with a NaN in a
    gradient.
    """
    dtype = torch.bfloat16 if "bf16_rounding" in options else torch.float32
    values = [weights(*shape, seed=i, dtype=dtype).detach() for i, (shape, _) in enumerate(parameters)]
    streams = [stream((*shape, 1), steps, seed=i) for i, (shape, _) in enumerate(parameters)]
    with pretending(device):
        params = [nn.Parameter(value.to(device)) for value in values]
        groups = [{"params": [param], "momentum_rank": k} for param, (_, k) in zip(params, parameters)]
        optimizer = cls(groups, **{"lr": LR, "backend": "auto" if device == MPS else "eager"} | options)
        for t, grads in enumerate(zip(*streams)):
            optimizer.record_metrics = t == steps - 1
            for i, (param, grad) in enumerate(zip(params, grads)):
                grad = grad * float("nan") if (t, i) == (broken, 1) else grad
                param.grad = grad.view(param.shape).to(dtype).to(device)
                if optimizer.defaults["update_in_backward"]:
                    optimizer._update_in_backward(param)
            optimizer.step()
        states = [{name: value.cpu() for name, value in optimizer.state[param].items()} for param in params]
        return [param.detach().cpu() for param in params], states, optimizer.metrics(), optimizer.skipped_updates


def assert_same_steps(cls, **options):
    """In every bit: below the pretended GPU run the CPU's kernels on the same shapes, and float64 has to stay
    float64.
    """
    params, states, metrics, skipped = run(MPS, cls, **options)
    on_cpu, cpu_states, *rest = run(torch.device("cpu"), cls, **options)
    assert all(map(torch.equal, params, on_cpu))
    for state, expected in zip(states, cpu_states):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert [metrics, skipped] == rest
    assert metrics["captured_energy"] > 0


@both_optimizers
@both_rules
def test_steps_equal_the_cpus(cls, rule):
    assert_same_steps(cls, update_rule=rule)


@both_optimizers
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_are_the_cpus(cls, options):
    assert_same_steps(cls, **options)


@both_optimizers
@pytest.mark.filterwarnings("ignore:a gradient has the norm nan")
def test_skips_are_the_cpus(cls):
    assert_same_steps(cls, broken=3)  # the one that records metrics
    assert run(MPS, cls, broken=3)[3] == 1


@both_optimizers
@both_rules
def test_equals_oracle(cls, rule):
    """As the other backends: float32 state, whose k×k part is float64."""
    shape, k, steps = (20, 12), 3, 20
    (param,), *_ = run(MPS, cls, [(shape, k)], steps, update_rule=rule)
    start = weights(*shape)
    truth = truth_of(cls([start], lr=LR, momentum_rank=k, update_rule=rule), k, rule)
    theta, grads = start.detach().double().numpy(), flat(stream((*shape, 1), steps))
    room, _ = oracle_room(truth, theta, grads, LR)
    path = oracle.train(truth, theta, grads, LR)
    np.testing.assert_allclose(param, path[-1], rtol=0, atol=2 * room[-1])


def test_a_forgotten_float64_would_show(monkeypatch):
    """The pretended GPU refuses what MPS refuses."""
    with pretended():
        x = torch.ones(6, 4).to(MPS)
        for forgotten in (
            lambda: x.double(),
            lambda: x.to("cpu", torch.float64),
            lambda: torch.full((2,), 1.0, dtype=torch.float64, device=MPS),
        ):
            with pytest.raises(TypeError, match=r"no float64|float64 of torch\.float32"):
                forgotten()
        with pytest.raises(RuntimeError, match="operands on MPS and on the CPU"):
            x * torch.ones(6, 4)
        with pytest.raises(NotImplementedError, match=r"no MPS kernel of aten\.linalg_eig"):
            torch.linalg.eig(x[:4])
    monkeypatch.setattr(precision, "float64_device", lambda device: device)
    with pytest.raises(TypeError, match="no float64"):
        run(MPS, LoRAPreAdamW)


@pytest.mark.parametrize("options", [(4, None, None), (None, 0.9, None)], ids=["rank", "energy"])
def test_extraction_equals_the_cpus(options):
    side = EXACT_SVD_SIZE + 4  # by subspace iteration, where the rank is given
    delta = stream((side, side), 1)[0]
    with pretended():
        found = [factor.cpu() for factor in _factors(delta.to(MPS), *options)]
        assert _norm(delta.to(MPS)) == _norm(delta)
    assert all(map(torch.equal, found, _factors(delta, *options)))


def test_auto_is_eager_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backends.available(MPS) == ["eager"]
    assert backends.choose("auto", MPS) is backends.choose("eager", MPS)
    with pytest.raises(ValueError, match=r"backend='compiled' needs float64 inside.*Use backend='auto'.*\['eager'\]"):
        backends.choose("compiled", MPS)
