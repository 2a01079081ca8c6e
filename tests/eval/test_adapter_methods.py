"""The rivals on adapters whose steps are their own (of this project, PEFT, LoRA-RITE) follow their papers' equations.

The oracles hold moments of the product B A as dense p×q and q×q matrices, where the optimizers hold them in the
coordinates of a factor.
"""

import copy
import math
from functools import partial

import numpy as np
import pytest
import rivals
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from eval.methods import METHODS
from eval.optimizers.flatlora import FilterNoise
from eval.optimizers.loft import LoFTAdamW
from eval.optimizers.oplora import LEAST_DAMPING, OPLoRA, nearest
from eval.optimizers.pairs import lora_layers, lora_pairs
from eval.optimizers.riemannion import Riemannion
from eval.optimizers.sora import ProximalAdamW, add_gates, gates

LR, P, Q, R = 1e-2, 9, 14, 3
BETAS, EPS = (0.9, 0.95), 1e-8


def pair(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((R, Q)), rng.standard_normal((P, R)), rng.standard_normal((P, Q))


def descend(optimizer_of, A, B, target, steps=6):
    """Products B A along a run on ‖B A − target‖²/2, whose gradient with respect to B A is their difference."""
    A, B = (nn.Parameter(torch.tensor(x)) for x in (A, B))
    optimizer, target = optimizer_of([A, B]), torch.tensor(target)
    for _ in range(steps):
        G = (B @ A - target).detach()
        A.grad, B.grad = B.detach().T @ G, G @ A.detach().T
        optimizer.step()
        yield (B @ A).detach().numpy()


def lora_rite(params):
    if reason := METHODS["lora-rite"].unavailable():
        pytest.skip(reason)
    from pytorch_optimizer import LoRARite

    return LoRARite(params, lr=LR, betas=BETAS, clip_unmagnified_grad=0.0, update_skipping=0.0)


loft = partial(LoFTAdamW, lr=LR, betas=BETAS, eps=EPS, damping=1e-14)


class DenseLoFT:
    """arXiv 2505.21289 for one factor X of X Y: projections onto the rows of Y in the place of recalibrations."""

    def __init__(self, n, d):
        self.t, self.m, self.S = 0, np.zeros((n, d)), np.zeros((n, d, d))

    def step(self, G, Y):
        self.t += 1
        projector = np.linalg.pinv(Y) @ Y
        g = G @ projector
        self.m = 0.9 * self.m @ projector + 0.1 * g
        self.S = 0.95 * projector @ self.S @ projector + 0.05 * g[:, :, None] * g[:, None, :]
        v = np.diagonal(self.S, axis1=1, axis2=2) / (1 - 0.95**self.t)
        return self.m / (1 - 0.9**self.t) / (np.sqrt(v) + EPS) @ np.linalg.pinv(Y)


class DenseRite:
    """arXiv 2410.20625, Algorithm 1, for one factor X of X Y, with the bias correction within the decays."""

    def __init__(self, n, d):
        self.t, self.m, self.V = 0, np.zeros((n, d)), np.zeros((d, d))

    def step(self, G, Y):
        self.t += 1
        projector = np.linalg.pinv(Y) @ Y
        one, two = (beta * (1 - beta ** (self.t - 1)) / (1 - beta**self.t) for beta in BETAS)
        g = G @ projector
        self.V = two * projector @ self.V @ projector + (1 - two) * g.T @ g / len(g)
        values, vectors = np.linalg.eigh(self.V)
        values, vectors = values[-R:], vectors[:, -R:]
        scaled = g @ vectors @ np.diag(1 / (np.sqrt(values + 1e-12) + 1e-6)) @ vectors.T
        self.m = one * self.m @ projector + (1 - one) * scaled
        return self.m @ np.linalg.pinv(Y)


def dense_run(rule, A, B, target, *, alternating, steps=6):
    of_B, of_A = rule(P, Q), rule(Q, P)
    for step in range(steps):
        G = B @ A - target
        step_B, step_A = of_B.step(G, A), of_A.step(G.T, B.T).T
        if not alternating or step % 2 == 0:
            B = B - LR * step_B
        if not alternating or step % 2 == 1:
            A = A - LR * step_A
        yield B @ A


# A factor's condition number is below 10, and its Gram matrix's inverse comes in twice: 1e4 times the sums' rounding.
ROOM = 1e4 * rivals.gamma(4 * (P + Q) + 20, torch.float64)


@pytest.mark.parametrize(
    ("optimizer", "rule", "alternating"), [(loft, DenseLoFT, True), (lora_rite, DenseRite, False)]
)
def test_moments_of_a_factor_are_those_of_the_product(optimizer, rule, alternating):
    A, B, target = pair()
    assert max(map(np.linalg.cond, (A, B))) < 10
    found, expected = (
        list(run) for run in (descend(optimizer, A, B, target), dense_run(rule, A, B, target, alternating=alternating))
    )
    assert np.abs(expected[-1] - B @ A).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROOM)


def dense_riemannion(A, B, target, steps=6):
    """arXiv 2507.12142 with dense matrices: momentum, its 2r singular vectors, and the retraction."""
    X, M = B @ A, 0.0
    for _ in range(steps):
        U, _, Vt = np.linalg.svd(X)
        outside_B, outside_A = (np.eye(len(Z)) - Z[:, :R] @ Z[:, :R].T for Z in (U, Vt.T))
        tangent = lambda Z: Z - outside_B @ Z @ outside_A  # noqa: B023, E731
        M = tangent(0.9 * M + X - target)
        U, _, Vt = np.linalg.svd(M)
        U, sigma, Vt = np.linalg.svd(X - LR * tangent(U[:, : 2 * R] @ Vt[: 2 * R]))
        X = U[:, :R] @ np.diag(sigma[:R]) @ Vt[:R]
        yield X


def test_riemannion_is_muon_in_the_tangent_space():
    A, B, target = pair()
    run = descend(partial(Riemannion, lr=LR), A, B, target)
    np.testing.assert_allclose(list(run), list(dense_riemannion(A, B, target)), rtol=0, atol=ROOM)


@pytest.mark.parametrize("optimizer", [loft, lora_rite, partial(Riemannion, lr=LR)])
def test_the_product_does_not_depend_on_how_it_is_factored(optimizer):
    """S A and B S⁻¹ take the same path as A and B, which LoRA under Adam does not."""
    A, B, target = pair()
    S = np.random.default_rng(1).standard_normal((R, R)) + 2 * np.eye(R)
    assert np.linalg.cond(S) < 20
    run = partial(descend, optimizer, target=target)
    plain, other = (list(run(*factors)) for factors in ((A, B), (S @ A, B @ np.linalg.inv(S))))
    # LoRA-RITE's ε of 1e-6 is relative to singular values of the gradient, above 0.1.
    atol = 20 * ROOM + (1e-4 if optimizer is lora_rite else 0)
    np.testing.assert_allclose(plain, other, rtol=0, atol=atol)
    adam = partial(torch.optim.AdamW, lr=LR, betas=BETAS)
    plain, other = (list(descend(adam, *factors, target)) for factors in ((A, B), (S @ A, B @ np.linalg.inv(S))))
    assert np.abs(plain[-1] - other[-1]).max() > 1e-2


# ---- methods of a model ---------------------------------------------------------------------------------------------


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(
        output_dir=str(tmp_path), learning_rate=LR, adam_beta2=0.95, use_cpu=True, max_steps=4, weight_decay=0.0
    )


class Net(nn.Module):
    """Two linear layers, without a model's surroundings."""

    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = (nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(r=4, width=8, seed=0, **lora):
    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["up", "down"], **lora)
    model = get_peft_model(Net(width), config, autocast_adapter_dtype=False)
    return model.double()


def backward(model, seed=0, batches=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        x, y = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        (model(x) - y).square().sum().backward()


def test_riemannian_lora_is_adam_on_preconditioned_gradients(args):
    """arXiv 2402.02347: g_A by (Bᵀ B + δ I)⁻¹, g_B by (A Aᵀ + δ I)⁻¹."""
    model = adapted(init_lora_weights=False)
    A, B = (param.detach() for param in lora_pairs(model)[:2])
    optimizer = METHODS["riemannian"].build(model, args, {"reg": 1e-2})
    rules, expected = [rivals.Adam(lr=LR, betas=BETAS, eps=EPS) for _ in "AB"], [A.numpy().copy(), B.numpy().copy()]
    for step in range(4):
        backward(model, step)
        g_A, g_B = (param.grad.numpy().copy() for param in lora_pairs(model)[:2])
        now_A, now_B = expected
        damped = 1e-2 * np.eye(4)
        gradients = np.linalg.inv(now_B.T @ now_B + damped) @ g_A, g_B @ np.linalg.inv(now_A @ now_A.T + damped)
        expected = [rule.step(g, now) for rule, g, now in zip(rules, gradients, expected)]
        optimizer.step()
        optimizer.zero_grad()
    for found, value in zip((A, B), expected):
        np.testing.assert_allclose(found, value, rtol=0, atol=ROOM)


def test_oplora_sees_the_full_gradient():
    """Of W + s B A, over two backward passes, as autograd has it for the merged weight."""
    model = adapted(init_lora_weights=False)
    optimizer = OPLoRA(model)
    merged = copy.deepcopy(model).merge_and_unload().double()
    for param in merged.parameters():
        param.requires_grad_(True)
    backward(model, batches=2)
    backward(merged, batches=2)
    for found, layer in zip(optimizer.gradients, (merged.up, merged.down)):
        np.testing.assert_allclose(found.take(), layer.weight.grad, rtol=0, atol=ROOM)
        assert found.take() is None
    model.eval()
    model(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    assert optimizer.gradients[0].take() is None


def test_oplora_at_full_rank_is_gradient_descent_with_momentum():
    """Then the nearest matrix of rank r is the step itself: that of torch.optim.SGD on the merged weight."""
    model = adapted(r=8)
    twin = copy.deepcopy(model).merge_and_unload().double()
    for param in twin.parameters():
        param.requires_grad_(True)
    lr = 1e-3
    optimizer, expected = OPLoRA(model, lr=lr, damping=0.0), torch.optim.SGD(twin.parameters(), lr=lr, momentum=0.9)
    for step in range(4):
        backward(model, step)
        backward(twin, step)
        optimizer.step()
        expected.step()
        expected.zero_grad()
    start = adapted(r=8).get_base_model()
    # Each of the four steps' least squares is off by the damping over the least eigenvalue of the Gram matrix.
    least = min(torch.linalg.eigvalsh(A.weight @ A.weight.T)[0].item() for _, A, _ in lora_layers(start))
    allowed = 4 * LEAST_DAMPING / least
    assert allowed < 1e-2
    found = copy.deepcopy(model).merge_and_unload()
    for name in ("up", "down"):
        weight, first = getattr(twin, name).weight, getattr(start, name).get_base_layer().weight
        moved = (weight - first).norm()
        assert (getattr(found, name).weight - weight).norm() < allowed * moved


def test_oplora_clips_the_full_gradients_together():
    """A step on gradients ten times the bound is that of an unclipped one on a tenth of them."""
    model = adapted(init_lora_weights=False)
    twin, free = copy.deepcopy(model), OPLoRA(model)
    backward(model)
    full = [watched.take() for watched in free.gradients]
    norm = np.linalg.norm([np.linalg.norm(gradient) for gradient in full])
    for watched, gradient in zip(free.gradients, full):
        watched._sum = gradient / 10
    clipped = OPLoRA(twin, max_grad_norm=(norm + 1e-6) / 10)  # 1e-6 is added to the norm.
    backward(twin)
    free.step()
    clipped.step()
    for one, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=ROOM)


def test_nearest_solves_each_factors_least_squares():
    """The gradient of ‖B A − T‖² + δ ‖change‖² vanishes at each half of the round."""
    A, B, target = (torch.tensor(x) for x in pair())
    new_A, new_B = nearest(target, A, B, 0.1)
    for gradient in (
        B.T @ (B @ new_A - target) + 0.1 * (new_A - A),
        (new_B @ new_A - target) @ new_A.T + 0.1 * (new_B - B),
    ):
        np.testing.assert_allclose(gradient, 0, rtol=0, atol=ROOM)


def started(name, rank, model):
    """Each (layer, A, B) at a method's start, with the linear layer that it was made of, which has its gradient."""
    original = copy.deepcopy(model)
    ids = torch.randint(4, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    original(input_ids=ids, labels=ids).loss.backward()
    adapted_model = METHODS[name].prepare(model, rank, {}, lambda: model(input_ids=ids, labels=ids).loss.backward())
    linears = [m for m in original.model.layers.modules() if isinstance(m, nn.Linear)]
    return zip(lora_layers(adapted_model), linears, strict=True)


def test_lora_one_starts_at_the_best_approximation_of_a_gradient_step(make_llama):
    """arXiv 2502.01235: B A = −G_r/(γ σ₁), γ = 128, with balanced factors; the base weights stay."""
    for (layer, A, B), linear in started("lora-one", 4, make_llama(num_hidden_layers=1)):
        assert torch.equal(layer.get_base_layer().weight, linear.weight)
        U, sigma, Vt = np.linalg.svd(linear.weight.grad.double().numpy(), full_matrices=False)
        expected = -U[:, :4] @ np.diag(sigma[:4]) @ Vt[:4] / (128 * sigma[0])
        # 16 rounds of subspace iteration on 16 directions leave (σ_17/σ_4)^33 of the rest; float32 rounds the sums.
        rest = (sigma[16] / sigma[3]) ** 33 if len(sigma) > 16 else 0
        allowed = (rest + rivals.gamma(20 * sum(linear.weight.shape))) / 128 * sigma[3] / (sigma[3] - sigma[4])
        np.testing.assert_allclose((B.weight @ A.weight).detach(), expected, rtol=0, atol=allowed)
        torch.testing.assert_close(A.weight.norm(), B.weight.norm(), rtol=rivals.gamma(200), atol=0)


def test_lora_ga_starts_on_the_gradients_directions_and_leaves_the_function(make_llama):
    """arXiv 2407.05000: A and B at p^¼/√γ, γ = 64, from the first and the next r singular vectors; W − s B A."""
    for (layer, A, B), linear in started("lora-ga", 3, make_llama(num_hidden_layers=1)):
        change = (6 / 3**0.5 * B.weight @ A.weight).detach()
        room = rivals.gamma(20) * (linear.weight.abs().max() + change.abs().max()).item()
        torch.testing.assert_close(layer.get_base_layer().weight + change, linear.weight, rtol=0, atol=room)
        G = linear.weight.grad.double()
        size, sigma = len(G) ** 0.5 / 64, torch.linalg.svdvals(G)
        # 16 rounds of subspace iteration on 12 directions leave (σ_13/σ_6)^33 of the rest; float32 rounds the sums.
        rest = ((sigma[12] / sigma[5]) ** 33 + rivals.gamma(20 * sum(G.shape))).item()
        captured = (G @ A.weight.T.double()).square().sum(), (G.T @ B.weight.double()).square().sum()
        for found, values in zip(captured, (sigma[:3], sigma[3:6])):
            gap = (sigma[0] / sigma[5]).item() ** 2
            torch.testing.assert_close(found, size * values.square().sum(), rtol=2 * gap * rest, atol=0)
        for factor in (A.weight, B.weight.T):
            gram = (factor @ factor.T).double()
            torch.testing.assert_close(gram, size * torch.eye(3).double(), rtol=0, atol=size * rivals.gamma(200))


def test_riemannion_starts_where_the_tangent_space_holds_the_most_of_the_gradient(make_llama):
    """s B A = 0.01/√r U_{1..r} V_{r+1..2r}ᵀ: the gradient's projection has its 2r largest singular values.

    The function stays as it is.
    """
    for (layer, A, B), linear in started("riemannion", 3, make_llama(num_hidden_layers=1)):
        change = 2 * (B.weight @ A.weight).detach()
        allowed = rivals.gamma(4) * (linear.weight.abs().max() + change.abs().max()).item()
        torch.testing.assert_close(layer.get_base_layer().weight + change, linear.weight, rtol=0, atol=allowed)
        values = np.linalg.svd(change.double().numpy(), compute_uv=False)[:3]
        np.testing.assert_allclose(values, 0.01 / 3**0.5, rtol=rivals.gamma(200))
        G, (Q_B, Q_A) = linear.weight.grad.double(), (torch.linalg.qr(Z.double()).Q for Z in (B.weight, A.weight.T))
        projected = G - (G - Q_B @ (Q_B.T @ G)) @ (torch.eye(len(Q_A)) - Q_A @ Q_A.T)
        sigma = torch.linalg.svdvals(G)
        # 16 rounds of subspace iteration on 12 directions leave (σ_13/σ_6)^33 of the rest; float32 rounds the sums.
        rest = (sigma[12] / sigma[5]) ** 33 + rivals.gamma(20 * sum(G.shape))
        assert projected.norm() >= (1 - rest.item()) * sigma[:6].norm()


def test_flat_lora_disturbs_each_row_by_its_norm_and_restores_the_weight():
    """arXiv 2409.14396: σ_i = ρ (1 − cos(π t/T))/2 · ‖M_i‖/√q of the merged weight's rows."""
    torch.manual_seed(0)
    base = nn.Linear(4000, 3, bias=False)
    base.weight.data *= torch.tensor([[1.0], [10.0], [0.1]])
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    ((layer, _, _),) = lora_layers(model)
    weight = layer.get_base_layer().weight
    start, merged = weight.detach().clone(), weight.detach() + layer.get_delta_weight("default").detach()
    noise = FilterNoise(layer, rho=0.1, steps=4)
    x = torch.randn(2, 4000)
    for step in range(4):
        model.train()
        model(x)
        first = weight.detach().clone()
        model(x)  # the same noise for all backward passes of a step
        assert torch.equal(weight, first)
        found = (first - start).norm(dim=1) / 4000**0.5
        expected = 0.1 * (1 - math.cos(math.pi * step / 4)) / 2 * merged.norm(dim=1) / 4000**0.5
        # The mean square of n normal numbers has the relative standard error √(2/n), its root half of that.
        torch.testing.assert_close(found, expected, rtol=5 * math.sqrt(1 / 8000), atol=0)
        noise.remove(None, (), {})
        model.eval()
        model(x)
        assert torch.equal(weight, start)


def test_flat_lora_needs_to_know_the_length_of_the_run(args):
    args.max_steps = -1
    with pytest.raises(ValueError, match="expected max_steps, found a run of epochs"):
        METHODS["flat-lora"].build(adapted(), args, {"rho": 0.05})


def test_sora_gates_each_rank_and_merges_it():
    model = adapted(init_lora_weights=False)
    x = torch.randn(5, 8, dtype=torch.float64)
    layer, A, B = next(iter(lora_layers(model)))
    plain_A, plain_B = A.weight.detach().clone(), B.weight.detach().clone()
    add_gates(model)
    gate = gates(model)[0].detach().clone().double()
    expected = layer.get_base_layer()(x) + 2 * (x @ plain_A.T * gate) @ plain_B.T
    np.testing.assert_allclose(layer(x).detach(), expected.detach(), rtol=0, atol=ROOM)
    before = model(x).detach()
    np.testing.assert_allclose(copy.deepcopy(model).merge_and_unload()(x).detach(), before, rtol=0, atol=ROOM)


def test_soras_gates_take_adams_step_and_shrink():
    """A gate within ξ of zero after its step is zero."""
    start, gradient = torch.tensor([1.0, -1.0, 1.2e-2, -0.5], dtype=torch.float64), torch.tensor([1.0, 1.0, 1.0, 0.0])
    gate, weight = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = ProximalAdamW([{"params": [gate], "threshold": 5e-3}, {"params": [weight]}], lr=1e-2, weight_decay=0.0)
    gate.grad = weight.grad = gradient.double()
    optimizer.step()
    stepped = start - 1e-2 * gradient.double() / (gradient.double() + EPS)
    expected = torch.sign(stepped) * (stepped.abs() - 5e-3).clamp_min(0)
    assert expected[2] == 0 != stepped[2]
    np.testing.assert_allclose(weight.detach(), stepped, rtol=0, atol=1e-15)
    np.testing.assert_allclose(gate.detach(), expected, rtol=0, atol=1e-15)


def test_a_pruned_rank_stays_pruned(args):
    """Its matrices have no gradient any more; the gate's own is that of a weight that no longer moves."""
    model = adapted(init_lora_weights=False)
    add_gates(model)
    gate = gates(model)[0]
    gate.data[1] = 0
    backward(model)
    A, B = lora_layers(model).__next__()[1:]
    assert torch.all(A.weight.grad[1] == 0)
    assert torch.all(B.parametrizations.weight.original.grad[:, 1] == 0)
    optimizer = METHODS["sora"].build(model, args, {"threshold": 1.0})
    optimizer.step()
    assert gate[1] == 0
    (gated,) = (group for group in optimizer.param_groups if "threshold" in group)
    assert [id(param) for param in gated["params"]] == [id(gate) for gate in gates(model)]


def test_pairs_that_are_none_are_refused():
    with pytest.raises(ValueError, match="expected LoRA's A"):
        LoFTAdamW([nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(2, 8))])
