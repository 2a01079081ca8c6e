"""The best low-rank approximation of a matrix, by SVD and by subspace iteration."""

import numpy as np
import pytest
import torch
from roundoff import gamma

from lorapre_peft.extract.svd import best_factors, top_factors


def decaying(p, q, ratio=0.6, seed=0):
    """A p×q matrix of singular values 1, ratio, ratio², …"""
    left = np.linalg.qr(np.random.default_rng(seed).normal(size=(p, p)))[0]
    right = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(q, q)))[0]
    n = min(p, q)
    return torch.from_numpy((left[:, :n] * ratio ** np.arange(n)) @ right[:n])


@pytest.mark.parametrize("shape", [(60, 50), (40, 90)])
def test_best_factors_are_the_best(shape):
    x = decaying(*shape)
    B, A = best_factors(x, 4)
    u, s, vh = np.linalg.svd(x.numpy())
    # An SVD is that of a matrix γ(p + q) away, whose directions turn by the inverse of the gap between singular
    # values: 0.6³ − 0.6⁴.
    room = gamma(sum(shape), torch.float64)
    np.testing.assert_allclose(B @ A, (u[:, :4] * s[:4]) @ vh[:4], rtol=0, atol=2 * room / (0.6**3 - 0.6**4))
    assert B.norm().item() == pytest.approx(A.norm().item(), rel=2 * room)


@pytest.mark.parametrize("shape", [(60, 50), (40, 90), (9, 60)])
def test_top_factors_equal_exact_svd(shape):
    """Three power steps with 8 extra directions: the error of the best approximation, to one part in a million."""
    k = 4
    x = decaying(*shape)
    B, A = top_factors(x, k)
    best = torch.linalg.svdvals(x)[k:].norm()
    assert (x - B @ A).norm() <= best * (1 + 1e-6)
    room = 2 * gamma(sum(shape), torch.float64)
    torch.testing.assert_close(torch.linalg.matrix_norm(B), torch.linalg.matrix_norm(A), rtol=room, atol=0)


def test_top_factors_of_a_slow_spectrum_need_their_power_steps():
    """At a ratio of 0.97 the error is 0.0007 above the best one's. With two power steps it would be 0.002."""
    x = decaying(300, 400, ratio=0.97)
    B, A = top_factors(x, 4)
    assert (x - B @ A).norm() <= torch.linalg.svdvals(x)[4:].norm() * (1 + 1e-3)


def test_top_factors_leave_global_rng_alone():
    """`torch.svd_lowrank` draws from the global generator."""
    x, results = decaying(30, 20), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(top_factors(x, 3))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
