"""Muon's conventions: orthogonalization, and what it shares with torch.optim.Muon."""

import numpy as np
import oracle
import pytest
import torch
from roundoff import chain, disturbed, gamma
from stepping import LR, stream, take_steps, weights
from torch import nn

from lorapre_peft import LoRAPreMuon
from lorapre_peft.optim.muon import NEWTON_SCHULZ, orthogonalize

needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in torch 2.9")


@pytest.mark.parametrize("shape", [(9, 9), (20, 12), (12, 40), (1, 5)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-15, 1e15])
def test_orthogonalize_is_the_quintic_of_singular_values(shape, scale):
    """torch floors the norm at 1e-7; here gradients may be smaller, and the step must not depend on their scale."""
    m = np.random.default_rng(0).normal(size=shape)
    for dtype in (torch.float64, torch.float32):
        found = orthogonalize((torch.from_numpy(m) * scale).to(dtype))
        np.testing.assert_allclose(found, oracle.newton_schulz(m), rtol=0, atol=orthogonal_room(m, dtype))


def orthogonal_room(m, dtype):
    """How far the iteration may be from that of the oracle: what the round-off of the first one grows to."""
    rough = disturbed(m, gamma(chain(m.shape, 0), dtype), np.random.default_rng(0))
    return np.abs(oracle.newton_schulz(rough) - oracle.newton_schulz(m)).max()


@needs_torch_muon
@pytest.mark.parametrize("shape", [(64, 64), (8, 300), (300, 8)], ids=str)
def test_orthogonalize_in_bfloat16_is_as_exact_as_torchs(shape):
    """Of the same iteration in the same dtype; round-off differs, so that one matrix's error may be twice the
    other's.
    """
    from torch.optim._muon import _zeropower_via_newtonschulz

    m = np.random.default_rng(0).normal(size=shape)
    theirs = _zeropower_via_newtonschulz(torch.as_tensor(m, dtype=torch.float32), NEWTON_SCHULZ, 5, 1e-7)
    ours = orthogonalize(torch.as_tensor(m, dtype=torch.float32), 5, torch.bfloat16)
    assert ours.dtype == torch.float32
    exact = torch.from_numpy(oracle.newton_schulz(m))
    error, allowed = ((x.double() - exact).norm().item() for x in (ours, theirs))
    assert 0 < error < 2 * allowed


def test_orthogonalize_batches_and_keeps_zero():
    m = np.random.default_rng(0).normal(size=(3, 12, 7))
    for found, x in zip(orthogonalize(torch.from_numpy(m)), m):
        expected = orthogonalize(torch.from_numpy(x))
        torch.testing.assert_close(found, expected, rtol=0, atol=2 * orthogonal_room(x, torch.float64))
    assert not orthogonalize(torch.zeros(4, 3)).any()


@needs_torch_muon
@pytest.mark.parametrize("shape", [(20, 12), (12, 40)], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_follows_torch_muon(monkeypatch, shape, nesterov, adjust_lr_fn):
    """Nesterov, the scale by shape and weight decay are torch.optim.Muon's, whose bfloat16 iteration is replaced here.

    Gradients share a row and a column space of dimension k, so that the factors lose nothing, and ρ = 1−μ makes
    Algorithm 2's m. torch averages where this sums, which the iteration normalises away. 1e-3 of an update: float32,
    amplified 500-fold by five quintics where a singular value is zero.
    """

    def exact(grad, ns_coefficients, ns_steps, eps):
        return torch.from_numpy(oracle.newton_schulz(grad.double().numpy(), ns_steps)).float()

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", exact)
    rng, (p, q) = np.random.default_rng(0), shape
    left, right = rng.normal(size=(p, 2)), rng.normal(size=(2, q))
    grads = [torch.as_tensor(left @ rng.normal(size=(2, 2)) @ right, dtype=torch.float32) for _ in range(20)]
    ours, theirs = weights(*shape), weights(*shape)
    common = {"lr": LR, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    take_steps(LoRAPreMuon([ours], momentum_rank=2, residual_weight=0.1, **common), [ours], grads)
    take_steps(torch.optim.Muon([theirs], **common), [theirs], grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=20 * LR * 1e-3)
    assert (ours - weights(*shape)).abs().max() > LR


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_step_orthogonalizes_in_the_given_dtype(backend):
    """At the first step the momentum is the gradient."""
    (g,), steps = stream((20, 12), 1), {}
    for dtype in ("float32", "bfloat16"):
        param = nn.Parameter(torch.zeros(20, 12))
        take_steps(LoRAPreMuon([param], lr=1.0, momentum_rank=2, ns_dtype=dtype, backend=backend), [param], [g])
        steps[dtype] = -param.detach()
        # The momentum is rounded in another order than the gradient, and in bfloat16 then by its places.
        room = orthogonal_room(g.double().numpy(), getattr(torch, dtype))
        torch.testing.assert_close(steps[dtype], orthogonalize(g, 5, getattr(torch, dtype)), rtol=0, atol=2 * room)
    assert (steps["float32"] - steps["bfloat16"]).abs().max() > 1e-3


def test_muon_without_scale_is_algorithm_2():
    """None means no scale here, where torch's None means "original"."""
    tall, steps = (40, 6), 3
    grads, paths = stream(tall, steps), {}
    for name in (None, "original", "match_rms_adamw"):
        param = weights(*tall)
        take_steps(LoRAPreMuon([param], lr=LR, momentum_rank=2, adjust_lr_fn=name), [param], grads)
        paths[name] = param.detach() - weights(*tall).detach()
    # The same updates; a weight is rounded twice a step, and the scale multiplies the round-off of the path without
    # one.
    rounding = gamma(2 * steps) * weights(*tall).abs().max().item()
    for name, scale in (("original", (40 / 6) ** 0.5), ("match_rms_adamw", 0.2 * 40**0.5)):
        torch.testing.assert_close(paths[name], paths[None] * scale, rtol=0, atol=(1 + scale) * rounding)


@pytest.mark.parametrize("adamw_lr", [None, 1e-3])
def test_the_adamw_rate_of_a_group_can_be_edited(adamw_lr):
    """It holds where ``lr`` is what it was at first, and follows it from there."""
    bias = nn.Parameter(torch.zeros(4))
    optimizer = LoRAPreMuon([nn.Parameter(torch.zeros(8, 8)), bias], lr=1e-2, adamw_lr=adamw_lr, momentum_rank=2)
    optimizer.param_groups[0] |= {"adamw_lr": 0.5, "lr": 5e-3}
    bias.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.full((4,), -0.25), rtol=1e-5, atol=0)


def test_channels_last_parameters_decay():
    """The decay reads the parameter, whose entries lie in another order than the matrix's."""
    start = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    params = [torch.nn.Parameter(x) for x in (start.clone(), start.contiguous(memory_format=torch.channels_last))]
    for param in params:
        param.grad = torch.ones_like(param)
        LoRAPreMuon([param], lr=0.1, momentum_rank=2, weight_decay=0.5).step()
    assert torch.equal(params[0], params[1])
