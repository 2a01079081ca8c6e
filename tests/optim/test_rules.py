"""The maths: the reference against the oracle, the fast forms against the reference, and what each rule promises."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from backend_runs import eager_and_cpp
from roundoff import assert_same_steps, chain, gamma, oracle_room, undisturbed

from lorapre_peft import LoRAPreAdamW
from lorapre_peft.kernels.eager import gram_columns
from lorapre_peft.lowrank.linalg import gram_rows, new_columns
from lorapre_peft.lowrank.rules import RULES, Als, Average, Newton
from lorapre_peft.optim import reference as ref
from lorapre_peft.optim.adamw import update_bound

BETAS = (0.9, 0.95)
C = update_bound(*BETAS)


def average(decay, weight):
    return Average(torch.tensor(decay, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64))


ADAM_M, ADAM_V, MUON_M = average(0.9, 0.1), average(0.95**0.5, 1 - 0.95**0.5), average(0.95, 1.0)
# Shapes around square, tall, wide and k = 1, up to k just below the smaller side.
CASES = [((7, 5), 2), ((5, 9), 4), ((30, 20), 6), ((12, 40), 1), ((16, 16), 8)]


def random(*shape, seed=0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)


def newton_state(shape, k, moments):
    p, q = shape
    return {
        name: value
        for i, moment in enumerate(moments)
        for name, value in (
            (f"{moment}_B", torch.zeros(p, k, dtype=torch.float64)),
            (f"{moment}_A", random(k, q, seed=i + 1, scale=0.02)),
        )
    }


# ---- the reference against the oracle -------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "k"), CASES)
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize(("rule", "second"), [("newton", None), ("als", 1), ("als", 2)])
def test_reference_equals_oracle(rule, second, optimizer, shape, k):
    """Two statements of the method, written apart, both in float64. second: the rank of v."""
    theta = random(*shape, seed=3)
    stream = oracle.gradients(shape, 60)
    moments = {"adam": ("m", "v"), "muon": ("m",)}[optimizer]
    state = (
        newton_state(shape, k, moments)
        if rule == "newton"
        else ref.no_momentum(theta, **dict(zip(moments, (k, second))))
    )
    starts = tuple(state[f"{moment}_A"].numpy() if rule == "newton" else None for moment in moments)
    truth = (
        oracle.Adam(rule, k, second=second, starts=starts)
        if optimizer == "adam"
        else oracle.Muon(rule, k, start=starts[0])
    )
    room, product_room = oracle_room(truth, theta.numpy(), stream, 0.01, 0.1, dtype=torch.float64)
    path = oracle.train(truth, theta.numpy(), stream, lr=0.01, weight_decay=0.1)

    step = getattr(ref, f"{rule}_{optimizer}")
    for t, (g, expected, atol) in enumerate(zip(stream, path, room), start=1):
        count = (t,) if (rule, optimizer) == ("newton", "adam") else ()
        theta, state = step(theta, torch.from_numpy(g), state, *count, lr=0.01, weight_decay=0.1)
        np.testing.assert_allclose(theta.numpy(), expected, rtol=0, atol=2 * atol)
    np.testing.assert_allclose(state["m_B"] @ state["m_A"], truth.m.product, rtol=0, atol=2 * product_room)


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_residual_weight_equals_oracle(optimizer, rho):
    shape, k = (12, 9), 3
    theta, stream = random(*shape), oracle.gradients(shape, 20)
    state = ref.no_momentum(theta, m=k, **({"v": 1} if optimizer == "adam" else {}))
    truth = oracle.Adam("als", k, rho=rho) if optimizer == "adam" else oracle.Muon("als", k, rho=rho)
    room, _ = oracle_room(truth, theta.numpy(), stream, 0.01, dtype=torch.float64)
    path = oracle.train(truth, theta.numpy(), stream, lr=0.01)
    for g in stream:
        step = getattr(ref, f"als_{optimizer}")
        theta, state = step(theta, torch.from_numpy(g), state, lr=0.01, residual_weight=rho)
    np.testing.assert_allclose(theta.numpy(), path[-1], rtol=0, atol=2 * room[-1])


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_reference_restarts_from_zeroed_factors(optimizer):
    """A state reset to zeros in all but its count of steps takes the steps of a new one, count included."""
    step, theta = getattr(ref, f"als_{optimizer}"), random(12, 9)
    fresh = ref.no_momentum(theta, m=3, **({"v": 2} if optimizer == "adam" else {}))
    used = fresh
    for g in oracle.gradients((12, 9), 5):
        _, used = step(theta, torch.from_numpy(g), used, lr=0.01)
    g = random(12, 9, seed=7)
    (expected, new), (found, reset) = (step(theta, g, state, lr=0.01) for state in (fresh, {**fresh, "t": used["t"]}))
    assert used["t"] == 5
    assert reset["t"] == new["t"] == 1
    assert torch.equal(found, expected)


def test_bound_is_adams_supremum():
    """C is reached by the gradient stream that Cauchy–Schwarz singles out: a smaller clamp would cut Adam itself."""
    assert pytest.approx(1.165, abs=5e-4) == C
    assert pytest.approx(oracle.bound(BETAS), rel=1e-12) == C
    stream = [np.array([[(BETAS[0] / BETAS[1]) ** age]]) for age in reversed(range(400))]
    adam = oracle.ExactAdam(BETAS)
    for g in stream:
        u = adam.step(g)
    assert u.item() == pytest.approx(C, rel=1e-6)  # (β1²/β2)^400 of it is missing: 1e-28


# ---- batched and tiled forms against the reference ------------------------------------------------------------------


def sweep(rule, B, A, x, average, cuts, rho=0.25, t=1000):
    """Step t of a rule in row tiles that end at ``cuts``: (momentum, new B, new A), as a backend does it."""
    edges = [0, *cuts, x.shape[-2]]
    gram = gram_rows(A)
    old_square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if rule.tracked:
        A, B = rule.restart(A, B, gram)
        gram = gram_rows(A)
    rho, t = (torch.tensor(number, dtype=torch.float64) for number in (rho, t))
    part, mixture = rule.rows(average), rule.mixture(average, rho, t)
    inverse = rule.inverse(gram).to(x.dtype)
    unit = rule.unit(gram, old_square, torch.linalg.matrix_norm(x), part).to(x.dtype)[..., None, None]
    momentum, rows, grams, projected = [], [], 0.0, 0.0
    for tile in (slice(a, b) for a, b in itertools.pairwise(edges)):
        x_tile, B_tile = x[..., tile, :], B[..., tile, :]
        X = x_tile @ A.mT @ inverse
        momentum.append((mixture.c_B * B_tile + mixture.c_X * X) @ A + mixture.residual * x_tile)
        rows.append((part.keep * B_tile + part.gain * X) * unit)
        grams = grams + gram_columns(B_tile, rows[-1], rule.projects_new)
        projected = projected + (rows[-1] if rule.projects_new else B_tile).mT @ x_tile
    W, root_T = rule.columns(grams, average)
    A_new, gram_A = new_columns(W, A, projected)
    scale_B, scale_A, squared_norm = rule.balance(grams, root_T, gram_A)
    B_new = torch.cat(rows, -2) if root_T is None else torch.cat(rows, -2) @ root_T.to(x.dtype)
    B_new, A_new = (f * s[..., None, None] for f, s in ((B_new, scale_B), (A_new, scale_A)))
    if rule.projects_new:  # `newton` does not know it
        product = B_new.double() @ A_new.double()
        # A sum of Gram matrices' products, whose terms cancel: relative to ‖B'‖²‖A'‖².
        size = (torch.linalg.matrix_norm(B_new.double()) * torch.linalg.matrix_norm(A_new.double())).square()
        length, gram = chain(x.shape[-2:], B.shape[-1]), grams[..., : B.shape[-1]]
        room = gamma(length, x.dtype) + gamma(length, torch.float64) * torch.linalg.cond(gram).max().item()  # of L
        room *= size.max().item()
        torch.testing.assert_close(squared_norm, product.square().sum((-2, -1)), rtol=0, atol=room)
    return torch.cat(momentum, -2), B_new.to(x.dtype), A_new.to(x.dtype)


@pytest.mark.parametrize("cuts", [[], [5], [1, 2, 10]], ids=["whole", "uneven halves", "four tiles"])
@pytest.mark.parametrize("average", [ADAM_M, ADAM_V, MUON_M], ids=["adam m", "adam v", "muon"])
@pytest.mark.parametrize("name", ["newton", "als"])
@pytest.mark.parametrize(("shape", "k"), [((11, 8), 3), ((11, 30), 1), ((11, 4), 4)])
def test_batched_tiles_equal_reference(name, average, cuts, shape, k):
    """Batch and tiles must not show in the result; float64 throughout, so only the order of sums may.

    It is amplified by the squared condition of the factors whose Gram matrix is solved with.
    """
    rule, (p, q), n = RULES[name], shape, 3
    B, A, x = random(n, p, k, seed=1), random(n, k, q, seed=2), random(n, p, q, seed=3)
    momentum, B_new, A_new = sweep(rule, B, A, x, average, cuts)
    keep, weight = map(float, average)
    for i in range(n):
        if name == "newton":
            gain = weight * (1 - keep**0.5) / (1 - keep)
            expected = ref.newton_factors(B[i], A[i], x[i], 1 - keep**0.5, gain, 1e-6)
            expected_momentum = keep * B[i] @ A[i] + weight * x[i]
        else:
            expected = ref.als_factors(B[i], A[i], x[i], keep, weight, 1e-6)
            rho = 0.25 * weight / (1 - keep)
            X = oracle.right_fit(x[i].numpy(), A[i].numpy(), oracle.relative((A[i] @ A[i].T).numpy(), 1e-6))
            expected_momentum = (keep * B[i] + (weight - rho) * torch.from_numpy(X)) @ A[i] + rho * x[i]
        condition = max(torch.linalg.cond(factor).item() for factor in (A[i], B[i], expected[0])) ** 2
        for found, wanted in zip((B_new[i], A_new[i], momentum[i]), (*expected, expected_momentum)):
            room = gamma(chain(shape, k), torch.float64) * condition * wanted.abs().max().item()
            torch.testing.assert_close(found, wanted, rtol=0, atol=room)


def test_als_balances_factors():
    _, B, A = sweep(Als(), random(9, 2) * 1e3, random(2, 7, seed=1) * 1e-3, random(9, 7, seed=2), ADAM_M, [])
    assert B.norm().item() == pytest.approx(A.norm().item(), rel=2 * gamma(chain((9, 7), 2), torch.float64))


def test_als_factors_do_not_underflow():
    """From factors that are exactly zero no gradient could bring the momentum back: zero gradients stop at a floor."""
    B, A = random(9, 2).float(), random(2, 7, seed=1).float()
    for _ in range(3000):
        _, B, A = sweep(Als(), B, A, torch.zeros(9, 7), ADAM_M, [])
    assert B.norm() > 0
    assert A.norm() > 0
    x = random(9, 2, seed=5).float() @ random(2, 7, seed=6).float()
    for _ in range(60):
        _, B, A = sweep(Als(), B, A, x, ADAM_M, [])
    torch.testing.assert_close(B @ A, x, rtol=1e-2, atol=1e-2)  # 0.9^60 = 0.002 of it is still missing


# ---- what `als` promises: method, section 4 (a) to (e) --------------------------------------------------------------


def updates(stream, *, rule="als", k=2, scale=1.0, prepare=undisturbed, **options):
    """The normalised update of each step, through `LoRAPreAdamW` at lr 1 from θ = 0 each time."""
    param = torch.nn.Parameter(torch.zeros(stream[0].shape))
    optimizer = prepare(LoRAPreAdamW([param], lr=1.0, momentum_rank=k, update_rule=rule, **options))
    found = []
    for g in stream:
        param.data.zero_()
        param.grad = torch.as_tensor(g * scale, dtype=torch.float32)
        optimizer.step()
        found.append(-param.detach().clone())
    return found, optimizer.state[param]


@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (5, 9)])
def test_als_at_full_rank_is_adams_first_moment(shape):
    """(a) With k = min(p, q) nothing is compressed: what is left of an error is a wrong sweep, not a lack of rank.

    Through the reference and the rule in float64: an optimizer's state is float32 and its k stays below min(p, q).
    Each step adds the damping, 1e-14, and round-off, times the squared condition of what is solved with, A and the new
    B: up to 3e4 where p < q.
    """
    k, rule, theta, m, room = min(shape), Als(damping=1e-14), torch.zeros(shape).double(), 0.0, 0.0
    error, state = 1e-14 + gamma(chain(shape, k), torch.float64), ref.no_momentum(theta, m=k, v=1)
    B, A = state["m_B"], state["m_A"]
    for t, g in enumerate(map(torch.from_numpy, oracle.gradients(shape, 60)), start=1):
        before = ref.restarted(state["m_B"], state["m_A"])[1]
        theta, state = ref.als_adam(theta, g, state, lr=0.0, residual_weight=1 - BETAS[0], damping=1e-14)
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        condition = max(torch.linalg.cond(x).item() for x in (before, state["m_B"]))
        room = BETAS[0] * room + error * condition**2 * m.abs().max().item()
        momentum, B, A = sweep(rule, B, A, g, ADAM_M, [2], rho=1 - BETAS[0], t=t)
        torch.testing.assert_close(momentum, m, rtol=0, atol=room)
        torch.testing.assert_close(state["m_B"] @ state["m_A"], m, rtol=0, atol=room)
        torch.testing.assert_close(B @ A, m, rtol=0, atol=room)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_als_ignores_gradient_scale(scale):
    """(b) Adam's step does not change with the loss's scale; LoRA A's gradients are small. Equal but for float32's
    round-off.
    """
    stream = oracle.gradients((20, 12), 30)
    found, _ = updates(stream, eps=0.0, scale=scale)
    assert_same_steps(found, lambda prepare: updates(stream, eps=0.0, prepare=prepare)[0])


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_als_scale_is_exact_for_powers_of_two(scale):
    """(b) Without round-off in the scaling itself the updates are equal in every bit: no constant is hidden."""
    stream = oracle.gradients((20, 12), 30, dtype=np.float32)
    for found, expected in zip(updates(stream, eps=0.0, scale=np.float32(scale))[0], updates(stream, eps=0.0)[0]):
        assert torch.equal(found, expected)


def hard_stream(kind, shape=(20, 12), steps=60):
    rng = np.random.default_rng(0)
    stream = oracle.gradients(shape, steps)
    if kind == "sign flips":
        return [g * (-1) ** t for t, g in enumerate(stream)]
    if kind == "sparse":
        return [g * (rng.random(shape) < 0.05) for g in stream]
    if kind == "spikes":
        return [g * 1e6 ** (t % 7 == 3) for t, g in enumerate(stream)]
    if kind == "one row":
        return [g * (np.arange(shape[0])[:, None] == t % shape[0]) for t, g in enumerate(stream)]
    return [g * (t % 5 == 0) for t, g in enumerate(stream)]  # mostly zero


HARD = ["sign flips", "sparse", "spikes", "one row", "mostly zero"]


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@eager_and_cpp
def test_als_updates_stay_within_bound(kind, eps, backend):
    """(c) v_B v_A has sign changes where exact v has none: without the clamp single entries run to hundreds."""
    found, _ = updates(hard_stream(kind), eps=eps, backend=backend)
    assert max(u.abs().max().item() for u in found) <= C * (1 + gamma(1))  # C in float32
    assert all(u.isfinite().all() for u in found)


@pytest.mark.parametrize("zeros", [1, 3])
def test_als_zero_start_costs_nothing(zeros):
    """(d) LoRA's A has gradient zero until B has moved: the steps after it are a run's without it, bit for bit."""
    stream = oracle.gradients((20, 12), 10)
    late, state = updates([np.zeros((20, 12))] * zeros + stream)
    plain, plain_state = updates(stream)
    assert all((u == 0).all() for u in late[:zeros])
    assert all(torch.equal(u, v) for u, v in zip(late[zeros:], plain))
    assert all(torch.equal(state[name], plain_state[name]) for name in plain_state)


def test_als_start_depends_on_gradient_alone():
    """(e) Every process of a distributed run must start alike, whatever its seed and the weights beside it."""
    g, states = oracle.gradients((20, 12), 1)[0], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        states.append(updates([g], seed=seed)[1])
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("kind", ["one entry", "one row", "one column", "rank one"])
def test_als_regains_rank_after_a_start_of_low_rank(kind):
    """A factor row or column that starts at exactly zero stays there: (d) for single directions.

    A first gradient can have fewer directions than k (one active row, the others exactly zero). Gradients of rank 3
    follow; k = 4 factors must come to hold all three.
    """
    shape = (20, 12)
    first = np.zeros(shape)
    rng = np.random.default_rng(0)
    where = {"one entry": (3, 5), "one row": (3, slice(None)), "one column": (slice(None), 5), "rank one": ...}[kind]
    first[where] = np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1]))[where]
    _, state = updates([first, *oracle.gradients(shape, 60, noise=0.0)], k=4)
    singular = torch.linalg.svdvals(state["m_B"] @ state["m_A"])
    assert singular[2] > 1e-2 * singular[0]


# ---- what `newton` does, faults included: method, sections 2 and 3 --------------------------------------------------


def test_newton_counts_a_zero_first_gradient():
    """Fault 1: at LoRA's zero first gradient the start decays, t counts, and the first real step is 0.73 of Adam's."""
    g = oracle.gradients((20, 12), 1)[0]
    (idle, first), state = updates([np.zeros_like(g), g], rule="newton")
    assert (idle == 0).all()
    assert state["step"].item() == 2
    beta1, beta2 = BETAS
    short = (1 - beta1) / (1 - beta1**2) / ((1 - beta2) / (1 - beta2**2)) ** 0.5
    assert first.abs().mean().item() == pytest.approx(short, rel=1e-2)  # 1e-2: eps, and entries near zero


def test_newton_start_of_zeros_would_stay_zero():
    """Fault 1: both factors zero is a fixed point, which is why A starts at random and not from a gradient."""
    B, A = ref.newton_factors(torch.zeros(5, 2), torch.zeros(2, 4), torch.randn(5, 4), 0.1, 0.1, 1e-6)
    assert not B.any()
    assert not A.any()


def test_newton_depends_on_gradient_scale():
    """Fault 2: δ = 1e-6 is absolute, so of gradients around 1e-8 almost nothing is tracked; those of 1 are."""
    stream = oracle.gradients((20, 12), 60, noise=0.1)
    exact = oracle.ExactAdam(BETAS)
    for g in stream:
        exact.step(g)
    errors = []
    for scale in (1.0, 1e-8):
        _, state = updates(stream, rule="newton", k=3, scale=scale)
        m = (state["m_B"] @ state["m_A"]).double().numpy() / scale
        errors.append(np.linalg.norm(m - exact.m) / np.linalg.norm(exact.m))
    assert errors[0] < 0.05
    assert errors[1] > 0.9


def test_newton_blows_up_where_momentum_crosses_zero():
    """Fault 3: in one dimension m' = (1−γ)² m + 2γ(1−γ) g + γ² g²/m."""
    g, gamma = 1.0, 1 - BETAS[0] ** 0.5
    for b, a in ((2.0, 0.5), (-1e-2, 1e-1), (1e-3, 1e-3)):
        factors = [torch.tensor([[value]], dtype=torch.float64) for value in (b, a)]
        B, A = ref.newton_factors(*factors, torch.tensor([[g]], dtype=torch.float64), gamma, gamma, 1e-15)
        m = b * a
        expected = (1 - gamma) ** 2 * m + 2 * gamma * (1 - gamma) * g + gamma**2 * g**2 / m
        assert (B @ A).item() == pytest.approx(expected, rel=1e-6)  # δ = 1e-15 beside a² ≥ 1e-6
    assert expected > 1e3 * g


def test_newton_updates_exceed_bound():
    """Fault 4: v falls to (1−β2) g² alone where v_B v_A changes sign, and m does not: no bound as Adam has one."""
    found, _ = updates(oracle.gradients((20, 12), 60), rule="newton")
    assert max(u.abs().max().item() for u in found) > 2 * C


def test_newton_first_step_is_the_sign():
    """B = 0 at the start, so the first update is Adam's whatever A was drawn."""
    g = oracle.gradients((20, 12), 1)[0]
    (first,), _ = updates([g], rule="newton")
    expected = torch.as_tensor(g / (np.abs(g) + 1e-8), dtype=torch.float32)  # ε
    torch.testing.assert_close(first, expected, rtol=gamma(20), atol=0)


@pytest.mark.parametrize("shape", [(4, 30), (200, 300)])
def test_newton_start_distribution(shape):
    start = Newton().init_columns(shape, torch.Generator().manual_seed(0))
    assert start.dtype == torch.float32
    assert start.std().item() == pytest.approx(0.02, rel=4 / (2 * start.numel()) ** 0.5)  # four standard errors
    assert abs(start.mean().item()) < 4 * 0.02 / start.numel() ** 0.5
