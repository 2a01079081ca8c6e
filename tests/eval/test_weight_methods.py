"""Every rival that trains weights takes the steps that its paper's equations say, and holds the state it claims."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import rivals
import torch
from torch import nn
from transformers import TrainingArguments

from eval.methods import METHODS, WITHOUT_ROW
from eval.methods.__main__ import tables
from eval.optimizers.racs import RACS, _switched
from recipes.training import held_bytes

LR, RANK = 1e-2, 3
ADAM = dict(betas=(0.9, 0.95), eps=1e-8)


def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), learning_rate=LR, adam_beta2=0.95, use_cpu=True)


def built(name, matrix, tmp_path, options=None):
    """The optimizer of a method's row for a model that holds this matrix."""
    method = METHODS[name]
    if reason := method.unavailable():
        pytest.skip(reason)
    model = nn.ModuleDict({"mlp": nn.Linear(*reversed(matrix.shape), bias=False, dtype=matrix.dtype)})
    model["mlp"].weight = matrix
    model.config = SimpleNamespace(hidden_size=64, num_attention_heads=4)
    return method.build(model, arguments(tmp_path), method.merged(options or {}))


def problem(shape, seed=0):
    """A start and gradients whose singular values are apart, so that singular vectors are well defined.

    Their sizes rise and fall, so that limiters of a norm's growth have something to do.
    """
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((side, min(shape))))[0] for side in shape)
    spectrum = np.linspace(1, 0.2, min(shape))
    signal = left @ np.diag(spectrum) @ right.T
    sizes = (1.0, 1.3, 0.6, 4.0, 1.0, 6.0)
    grads = [size * (signal + 0.01 * rng.standard_normal(shape)) for size in sizes]
    return rng.standard_normal(shape), grads


def steps(optimizer, matrix, grads):
    for g in grads:
        matrix.grad = torch.tensor(g, dtype=matrix.dtype)
        optimizer.step()
    return matrix.detach().double().numpy()


RULES = {
    "adamw": partial(rivals.Adam, **ADAM),
    "adamw-no-momentum": partial(rivals.Adam, betas=(0.0, 0.95), eps=1e-8),
    "adafactor": partial(rivals.Adafactor, cap=True),
    "adalomo": partial(rivals.Adafactor, cap=False),
    "galore": partial(rivals.GaLore, rank=RANK, scale=0.25, **ADAM),
    "fira": partial(rivals.Fira, rank=RANK, alpha=0.25, **ADAM),
    "conda": partial(rivals.Conda, gap=3, scale=0.25, **ADAM),
    "alice": partial(rivals.Alice, rank=RANK),
    "mofasgd": partial(rivals.MoFaSGD, rank=RANK, beta=0.9),
    "shampoo-weights": partial(rivals.Shampoo, gap=2, damping=1e-2, **ADAM),
    "racs": rivals.RACS,
    "sinkgd": rivals.SinkGD,
    "scale": partial(rivals.Scale, momentum=0.0),
}
OPTIONS = {
    "conda": {"update_proj_gap": 3},
    "alice": {"leading": 2},
    # The roots divide a covariance's rounding by the damping.
    "shampoo-weights": {"gap": 2, "damping": 1e-2},
}
SPECTRAL = ("galore", "fira", "conda", "alice", "mofasgd", "shampoo-weights")


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_steps_are_the_papers(name, dtype, shape, tmp_path):
    """In float32 and, where the method computes in it, in float64, where a wrong constant cannot hide in rounding."""
    if dtype == torch.float64 and METHODS[name].package:
        pytest.skip("the package computes parts in float32, or adds constants of its own to norms")
    theta, grads = problem(shape)
    matrix = nn.Parameter(torch.tensor(theta, dtype=dtype))
    options = {"rank": RANK} if "rank" in METHODS[name].options else {}
    optimizer = built(name, matrix, tmp_path, options | OPTIONS.get(name, {}))
    found, rule = steps(optimizer, matrix, grads), RULES[name](lr=LR)
    if name in SPECTRAL and shape[0] > shape[1]:  # the papers have p ≤ q
        found, theta, grads = found.T, theta.T, [g.T for g in grads]
    allowed = rivals.room(rule, theta, grads, dtype, spectral=name in SPECTRAL)
    expected = theta
    for g in grads:
        expected = rule.step(g, expected)
    assert np.abs(expected - theta).max() > 1e-3  # it has moved by far more than is allowed
    assert allowed < 1e-4
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize(("layer", "rows"), [("q_proj", 4), ("k_proj", 4), ("v_proj", 1), ("o_proj", 1), ("mlp", 1)])
def test_adam_mini_shares_by_head_and_by_row(layer, rows, tmp_path, make_llama):
    """arXiv 2406.16793, Algorithm 3 and its version 1.1.1: queries and keys by head, everything else by output."""
    if reason := METHODS["adam-mini"].unavailable():
        pytest.skip(reason)
    model = make_llama(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)  # heads of 4
    layers = model.model.layers[0]
    matrix = layers.mlp.up_proj.weight if layer == "mlp" else getattr(layers.self_attn, layer).weight
    start = matrix.detach().double().numpy().copy()
    for param in model.parameters():
        param.requires_grad_(param is matrix)
    optimizer = METHODS["adam-mini"].build(model, arguments(tmp_path), {})
    _, grads = problem(start.shape)
    rule, expected = rivals.AdamMini(lr=LR, rows=rows, **ADAM), start
    allowed = rivals.room(rule, start, grads, torch.float32)
    for g in grads:
        expected = rule.step(g, expected)
    np.testing.assert_allclose(steps(optimizer, matrix, grads), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize(("name", "rank", "scale"), [("apollo", RANK, 1.0), ("apollo-mini", 1, 128.0)])
def test_apollo_scales_the_gradient_by_what_adam_does_to_its_projection(name, rank, scale, shape, tmp_path):
    theta, grads = problem(shape)
    matrix = nn.Parameter(torch.tensor(theta, dtype=torch.float32))
    optimizer = built(name, matrix, tmp_path, {"rank": rank})
    found = steps(optimizer, matrix, grads)
    projection = optimizer.state[matrix]["projector"].ortho_matrix.double().numpy()
    if shape[0] > shape[1]:
        found, theta, grads = found.T, theta.T, [g.T for g in grads]
    else:
        projection = projection.T
    # Entries of variance 1/r: the mean of n squares lies within five standard errors, √(2/n) of it each.
    assert abs(rank * np.mean(projection**2) - 1) < 5 * math.sqrt(2 / projection.size)
    rule = rivals.Apollo(lr=LR, projection=projection, scale=scale, by_column=name == "apollo", **ADAM)
    allowed, expected = rivals.room(rule, theta, grads, torch.float32), theta
    for g in grads:
        expected = rule.step(g, expected)
    # The package adds 1e-8 to norms that are above 0.1.
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed + 1e-7 * np.abs(expected - theta).max())


def test_muon_is_five_quintic_iterations_of_the_nesterov_momentum(tmp_path):
    """torch computes them in bfloat16.

    A product of an iteration is off by bfloat16's unit, which the polynomial's cancellation of a = 3.4 against b and c
    amplifies to (|a|+|b|+|c|) of the result, at least |a+b+c|; what an iteration receives it passes on about as it is,
    for the polynomial's relative slope σp'(σ)/p(σ) is 1 for small σ and about −1 at σ = 1.
    """
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((16, 24))
    left, right = (np.linalg.qr(rng.standard_normal((side, 16)))[0] for side in theta.shape)
    grads = [left @ np.diag(np.linspace(1, 2, 16)) @ right.T * (1 + t) for t in range(3)]
    matrix = nn.Parameter(torch.tensor(theta, dtype=torch.float32))
    optimizer = built("muon", matrix, tmp_path)
    before, after = theta, steps(optimizer, matrix, grads[:1])
    update = rivals.Muon(lr=LR).u(grads[0], theta)
    coefficients = np.abs(rivals.Muon.coefficients).sum() / abs(sum(rivals.Muon.coefficients))
    allowed = 5 * coefficients * torch.finfo(torch.bfloat16).eps / 2
    assert np.linalg.norm((before - after) / LR - update, 2) < allowed * np.linalg.norm(update, 2)
    rule, expected = rivals.Muon(lr=LR), theta
    for g in grads:
        expected = rule.step(g, expected)
    moved = np.linalg.norm(expected - theta, 2)
    assert np.linalg.norm(steps(optimizer, matrix, grads[1:]) - expected, 2) < allowed * moved


def test_mlorc_is_adam_where_both_moments_have_rank_one(tmp_path):
    """Then nothing is lost when they are compressed, and arXiv 2506.01897's rule is Adam's."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((9, 16))
    one = np.outer(rng.uniform(0.5, 1, 9), rng.uniform(0.5, 1, 16))
    grads = [one * factor for factor in (1.0, -0.5, 0.8, 0.3)]
    matrix = nn.Parameter(torch.tensor(theta, dtype=torch.float32))
    found = steps(built("mlorc", matrix, tmp_path, {"rank": 2}), matrix, grads)
    rule, expected = rivals.Adam(lr=LR, **ADAM), theta
    allowed = rivals.room(rule, theta, grads, torch.float32, spectral=True)
    for g in grads:
        expected = rule.step(g, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


def test_mlorc_compresses_both_moments_by_randomised_svd(tmp_path):
    """Gradients of full rank, so that the compression loses a part, and v has negative entries to repair."""
    theta, grads = problem((12, 20))
    rng = np.random.default_rng(1)
    grads = [g + 0.1 * rng.standard_normal(g.shape) for g in grads]
    matrix = nn.Parameter(torch.tensor(theta, dtype=torch.float32))
    optimizer = built("mlorc", matrix, tmp_path, {"rank": RANK})
    torch.manual_seed(0)
    found = steps(optimizer, matrix, grads)
    torch.manual_seed(0)
    sketches = [torch.randn(12, RANK).double().numpy() for _ in range(2 * len(grads))]
    rule, expected = rivals.MLorc(lr=LR, sketches=sketches, **ADAM), theta
    allowed = rivals.room(rule, theta, grads, torch.float32)
    repaired = 0
    for g in grads:
        expected = rule.step(g, expected)
        repaired += (rule.compressed(rule.v, 2 * rule.t - 1) < 0).any()
    assert repaired == len(grads)
    assert allowed < 1e-2 * np.abs(expected - theta).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


def test_eight_bit_adamw_is_adamw_on_moments_of_256_values(tmp_path):
    """Each stored moment is within half a gap of its table, times the block's largest entry, of the exact one.

    And within a hundredth more, since the package's search misses the nearest value where another is nearly as near.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = np.random.default_rng(0)
    theta, grads = rng.standard_normal((64, 128)), [rng.standard_normal((64, 128)) for _ in range(2)]
    matrix = nn.Parameter(torch.tensor(theta, dtype=torch.float32))
    optimizer = built("adamw-8bit", matrix, tmp_path)
    rule = rivals.Adam(lr=LR, **ADAM)
    allowed = rivals.room(rule, theta, grads[:1], torch.float32)
    found = steps(optimizer, matrix, grads[:1])
    np.testing.assert_allclose(found, rule.step(grads[0], theta), rtol=0, atol=allowed)  # nothing is quantised before
    state = optimizer.state[matrix]
    for number, exact in ((1, rule.m), (2, rule.v)):
        table, largest = state[f"qmap{number}"].double(), state[f"absmax{number}"].double()
        held = functional.dequantize_blockwise(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
        gap = 1.01 * table.sort().values.diff().max() / 2 * largest.repeat_interleave(256).reshape(matrix.shape)
        assert ((held.double() - torch.tensor(exact)).abs() <= gap + allowed).all()


def test_eight_bit_adamw_holds_the_moments_of_embeddings_alone_in_32_bits(tmp_path):
    """Not those of a matrix in the place of an earlier model's embedding: one process may train many models."""
    pytest.importorskip("bitsandbytes")
    for model in (nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 128)), nn.Sequential(nn.Linear(64, 128))):
        optimizer = METHODS["adamw-8bit"].build(model, arguments(tmp_path), {})
        for module in model:
            module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
        for module in model:
            expected = torch.float32 if isinstance(module, nn.Embedding) else torch.uint8
            assert {optimizer.state[module.weight][f"state{number}"].dtype for number in (1, 2)} == {expected}


def test_sophia_clips_the_momentum_over_hutchinsons_estimate(tmp_path):
    """arXiv 2305.14342, Algorithms 1 and 3, on a loss ½ Σ c θ², whose Hessian is diagonal: the estimate is c z².

    At steps 1 and 11, for it is measured every tenth; entries whose curvature is not positive move by the bound.
    """
    rng = np.random.default_rng(0)
    curvature = rng.standard_normal((9, 14))
    matrix = nn.Parameter(torch.tensor(rng.standard_normal((9, 14))))
    optimizer = built("sophia-weights", matrix, tmp_path)
    c, m, h, expected = torch.tensor(curvature), 0.0, 0.0, matrix.detach().numpy().copy()
    for step in range(1, 13):
        optimizer.zero_grad()
        (c * matrix.square() / 2).sum().backward(create_graph=True)
        torch.manual_seed(step)
        optimizer.step()
        torch.manual_seed(step)
        z = torch.randn_like(matrix).detach().numpy()
        m = 0.96 * m + 0.04 * curvature * expected
        h = 0.99 * h + 0.01 * curvature * z**2 if step in (1, 11) else h
        expected = expected - LR * np.clip(m / np.maximum(h, 1e-12), -0.01, 0.01)
    # float64, and quotients by at least 1e-12 are either exact to γ of some hundred operations or clipped.
    np.testing.assert_allclose(matrix.detach().numpy(), expected, rtol=0, atol=rivals.gamma(1000, torch.float64))


def test_racs_finds_the_best_rank_one_approximation_of_the_squares():
    """Proposition 3 of arXiv 2502.07752: the fixed point is the principal singular pair of g∘g."""
    theta, (g, *_) = problem((12, 20))
    matrix = nn.Parameter(torch.tensor(theta))
    optimizer = RACS([matrix], iterations=200, beta=0.0)
    matrix.grad = torch.tensor(g)
    optimizer.step()
    state = optimizer.state[matrix]
    U, sigma, Vt = np.linalg.svd(g**2)
    allowed = rivals.gamma(sum(g.shape), torch.float64) * 200
    found = torch.outer(state["q"], state["s"]).numpy()
    np.testing.assert_allclose(found, sigma[0] * np.outer(U[:, 0], Vt[0]), rtol=0, atol=allowed * sigma[0])


@pytest.mark.parametrize("name", ["adafactor", "adalomo", "racs", "alice", "sinkgd", "scale", "mofasgd"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_rules_do_not_see_the_losss_scale(name, factor, tmp_path):
    """As Adam's does not: the updates of 1e6 g and 1e-6 g are those of g, from float32's rounding apart."""
    theta, grads = problem((12, 20))
    ends = []
    for by in (1.0, factor):
        matrix = nn.Parameter(torch.tensor(theta, dtype=torch.float32))
        ends.append(steps(built(name, matrix, tmp_path), matrix, [g * by for g in grads]))
    options = METHODS[name].options
    rule = RULES[name](lr=LR, **({"rank": options["rank"]} if "rank" in options else {}))
    allowed = 2 * rivals.room(rule, theta, grads, torch.float32, spectral=name in SPECTRAL)  # both are rounded
    np.testing.assert_allclose(*ends, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", ["racs", "alice", "sinkgd", "scale", "mofasgd"])
def test_rows_without_a_gradient_do_not_move(name, tmp_path):
    """Not at the first step, when nothing has a gradient, nor later, when a row and a column have none."""
    theta, grads = problem((12, 20))
    matrix = nn.Parameter(torch.tensor(theta, dtype=torch.float32))
    optimizer = built(name, matrix, tmp_path)
    for g in grads:
        g[3], g[:, 7] = 0, 0
    found = steps(optimizer, matrix, [np.zeros_like(theta), *grads])
    # Orthonormal bases of zero rows are zero there but for rounding, of which a step keeps its size.
    moved, allowed = np.abs(found - theta.astype(np.float32)), LR * len(grads) * rivals.gamma(1000)
    assert np.isfinite(found).all()
    assert moved.max() > 1e-3
    assert max(moved[3].max(), moved[:, 7].max()) <= allowed


def test_alice_switches_to_the_leading_directions_and_draws_the_rest_outside():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((10, 10))
    tracked = torch.tensor(root @ root.T)
    U = torch.linalg.qr(torch.tensor(rng.standard_normal((10, 4)))).Q
    new = _switched(tracked, U, leading=2, seed=5)
    room = rivals.gamma(100, torch.float64)
    torch.testing.assert_close(new.T @ new, torch.eye(4, dtype=torch.float64), rtol=0, atol=room)
    basis = np.linalg.qr((tracked @ U).numpy())[0]  # one step of subspace iteration, and Rayleigh–Ritz
    values, vectors = np.linalg.eigh(basis.T @ tracked.numpy() @ basis)
    best = basis @ vectors[:, -2:]
    assert np.all(np.diff(values) > 1e-3 * values[-1])  # so that the vectors are well defined
    allowed = room * 1e3
    np.testing.assert_allclose(new[:, :2] @ new[:, :2].T, best @ best.T, rtol=0, atol=allowed)
    np.testing.assert_allclose(basis.T @ new[:, 2:].numpy(), 0, rtol=0, atol=allowed)
    assert torch.equal(new, _switched(tracked, U, leading=2, seed=5))  # on every process
    assert not torch.allclose(new[:, 2:], _switched(tracked, U, leading=2, seed=6)[:, 2:])


def test_alice_keeps_its_subspace_between_switches(tmp_path):
    theta, grads = problem((12, 20))
    matrix = nn.Parameter(torch.tensor(theta, dtype=torch.float32))
    optimizer = built("alice", matrix, tmp_path, {"rank": 4, "leading": 2, "gap": 3})
    seen = []
    for g in grads:
        steps(optimizer, matrix, [g])
        seen.append(optimizer.state[matrix]["U"].clone())
    same = [torch.equal(one, other) for one, other in itertools.pairwise(seen)]
    assert same == [True, False, True, True, False]


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trains == "weights"])
def test_state_is_what_the_row_says(name, shape, tmp_path):
    """Within the counters of a step and one norm; for 8 bits, within the two tables of 256 numbers."""
    method, matrix = METHODS[name], nn.Parameter(torch.randn(shape))
    options = {"gap": 1} if "gap" in method.options else {}  # so that a first step has all of the state
    optimizer = built(name, matrix, tmp_path, options)
    (matrix.square() * torch.randn(shape)).sum().backward(create_graph=method.second_order)
    optimizer.step()
    p, q = shape
    expected = eval(method.state, {"p": p, "q": q, **method.merged({})})
    tables = 2 * 256 * 4 if name == "adamw-8bit" else 0
    assert 0 <= held_bytes(optimizer) - expected <= tables + 32


def test_every_row_is_in_the_table_with_its_paper():
    printed = tables()
    for name, method in METHODS.items():
        assert method.paper
        assert f"| `{name}` | {method.title} | {method.paper} |" in printed
    assert all(name in printed for name in WITHOUT_ROW)
