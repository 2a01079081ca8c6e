"""LoRA-Pre's Adam taken apart: every combination of moments is Adam's formula with those moments."""

import numpy as np
import oracle
import pytest
import rivals
import torch
from roundoff import gamma
from torch import nn

from eval.optimizers.ablation import MOMENTS, AblationAdam

LR, BETAS, EPS, RANK, SECOND = 1e-2, (0.9, 0.95), 1e-8, 3, 2
SHAPE = (9, 14)


def gradients(count=6):
    draw = np.random.default_rng(0)
    return [draw.standard_normal(SHAPE) for _ in range(count)]


class Moments:
    """m̂ and v̂ of a stream in numpy, each of its kind: the equations of the method, sections 1, 2 and 4."""

    def __init__(self, first, second, keeps=None, damping=1e-6, std=None):
        self.kinds, self.t, self.energy, self.full = (first, second), 0, 0.0, [0.0, 0.0]
        decays = (BETAS[0], BETAS[1] ** 0.5)
        draw, self.factors = torch.Generator().manual_seed(0), []
        for kind, decay, k, keep in zip(self.kinds, decays, (RANK, SECOND), keeps or (None, None)):
            a = None
            if kind in ("als", "newton"):  # whose draws are used or not
                a = torch.randn(k, SHAPE[1], generator=draw, dtype=torch.float64).numpy()
                a = None if kind == "als" and std is None else (0.02 if std is None else std) * a
            decay = decay if keep is None else keep**2  # each factor decays by the root of the product's decay
            rule = kind if kind in ("als", "newton") else "als"
            self.factors.append(oracle.Factors(rule, decay, 1 - decay, k, a, damping))

    def read(self, g):
        self.t += 1
        beta1, beta2 = BETAS
        self.full = [beta1 * self.full[0] + (1 - beta1) * g, beta2 * self.full[1] + (1 - beta2) * g**2]
        m, v = self.full
        (first, second), (of_m, of_v) = self.kinds, self.factors
        of_m.meet(g)
        of_v.meet(g)
        if first == "newton":
            m = beta1 * of_m.product + (1 - beta1) * g
        m_hat = m / (1 - beta1**self.t)
        if first == "als":
            inside = of_m.fit(g) @ of_m.a
            m_hat = (beta1 * of_m.product + (1 - beta1) * inside) / (1 - beta1**self.t) + g - inside
        if first == "none":
            m_hat = g
        if second == "newton":
            v = beta2 * of_v.product**2 + (1 - beta2) * g**2
        if second == "als":
            square = of_v.product**2
            v = (1 - beta2) * g**2 + (beta2 * self.energy * square / square.sum() if self.energy else 0)
        self.energy = beta2 * self.energy + (1 - beta2) * (g**2).sum()
        of_m.follow(g)
        of_v.follow(abs(g))
        return m_hat, v / (1 - beta2**self.t)

    def update(self, g):
        m_hat, v_hat = self.read(g)
        if self.kinds[1] == "none":
            return m_hat
        u = m_hat / (np.sqrt(v_hat) + EPS)
        bound = oracle.bound((0.0 if self.kinds[0] == "none" else BETAS[0], BETAS[1]))
        return np.clip(u, -bound, bound) if "als" in self.kinds else u


def moved(optimizer, matrix, g):
    """The update u of a step."""
    before = matrix.detach().clone()
    matrix.grad = torch.tensor(g)
    optimizer.step()
    return ((before - matrix.detach()) / LR).numpy()


def made(**options):
    matrix = nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    ranks = dict(momentum_rank=RANK, second_momentum_rank=SECOND)
    return AblationAdam([matrix], lr=LR, **ranks, **options), matrix


# float64 rounds each of some thousand operations that feed an entry; damped inverses of `newton`'s start amplify that
# by the Gram matrix over δ, about (0.02² · 14)/1e-6.
ALLOWED = gamma(10_000, torch.float64) * 1e4


@pytest.mark.parametrize("second", MOMENTS)
@pytest.mark.parametrize("first", MOMENTS)
def test_a_step_is_adams_with_these_moments(first, second):
    optimizer, matrix = made(first=first, second=second)
    expected = Moments(first, second)
    for g in gradients():
        np.testing.assert_allclose(moved(optimizer, matrix, g), expected.update(g), rtol=0, atol=ALLOWED)


def test_full_moments_are_adam():
    optimizer, matrix = made(first="full", second="full")
    adam, theta = rivals.Adam(lr=LR, betas=BETAS, eps=EPS), np.zeros(SHAPE)
    for g in gradients():
        moved(optimizer, matrix, g)
        theta = adam.step(g, theta)
    np.testing.assert_allclose(matrix.detach().numpy(), theta, rtol=0, atol=ALLOWED)


@pytest.mark.parametrize("rule", ["als", "newton"])
def test_low_rank_moments_are_the_packages(rule):
    optimizer, matrix = made(first=rule, second=rule)
    starts = [factors.a for factors in Moments(rule, rule).factors]
    whole = oracle.Adam(rule, RANK, second=SECOND, betas=BETAS, starts=starts)
    for g in gradients():
        np.testing.assert_allclose(moved(optimizer, matrix, g), whole.step(g), rtol=0, atol=ALLOWED)


@pytest.mark.parametrize(("first", "second"), [("als", "als"), ("none", "none"), ("full", "als")])
def test_matched_steps_have_adams_length_and_their_own_direction(first, second):
    matched, own = made(first=first, second=second, matched=True), made(first=first, second=second)
    adam = rivals.Adam(lr=1.0, betas=BETAS, eps=EPS)
    for g in gradients():
        found, plain = moved(*matched, g), moved(*own, g)
        length = np.linalg.norm(adam.step(g, np.zeros(SHAPE)))
        np.testing.assert_allclose(found, plain * (length / np.linalg.norm(plain)), rtol=0, atol=ALLOWED)


def test_newtons_coupling_damping_and_start_are_options():
    optimizer, matrix = made(first="newton", second="newton", gammas=(0.1, 0.05), damping=1e-3, init_std=0.2)
    expected = Moments("newton", "newton", keeps=(0.9, 0.95), damping=1e-3, std=0.2)
    for g in gradients():
        np.testing.assert_allclose(moved(optimizer, matrix, g), expected.update(g), rtol=0, atol=ALLOWED)


def test_als_has_a_damping_and_a_drawn_start():
    optimizer, matrix = made(first="als", second="als", damping=1e-3, init_std=0.2)
    expected = Moments("als", "als", damping=1e-3, std=0.2)
    for g in gradients():
        np.testing.assert_allclose(moved(optimizer, matrix, g), expected.update(g), rtol=0, atol=ALLOWED)


def test_zero_gradients_before_the_first_change_nothing():
    late, now = made(), made()
    assert not moved(*late, np.zeros(SHAPE)).any()
    for g in gradients():
        np.testing.assert_array_equal(moved(*late, g), moved(*now, g))


def test_unknown_moments_and_unbounded_betas_are_refused():
    with pytest.raises(ValueError, match="first='svd': expected one of full, als, newton, none"):
        made(first="svd")
    with pytest.raises(ValueError, match="als needs"):
        made(betas=(0.98, 0.95))
