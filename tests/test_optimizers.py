"""Both optimizers: against the oracle, against torch's own, and under everything that a run does to them."""

import copy
import warnings

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.adamw import update_bound
from lorapre_peft.bucket import TEMPORARIES, Bucket
from lorapre_peft.muon import orthogonalize
from lorapre_peft.optimizer import compressed_rank

both_optimizers = pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon], ids=["adamw", "muon"])
both_rules = pytest.mark.parametrize("rule", ["als", "newton"])
needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in torch 2.9")
LR = 0.01
# Float32 state against a float64 oracle: about 1e-6 after 50 steps of 0.01, measured; ten times that.
CLOSE = {"rtol": 0, "atol": 1e-5}


def weights(*shape, seed=0, dtype=torch.float32):
    return nn.Parameter(torch.as_tensor(np.random.default_rng(seed).normal(size=shape), dtype=dtype))


def stream(shape, steps, **options):
    """Gradients in float32, so that the oracle sees the very numbers that the optimizer does."""
    return [torch.from_numpy(g) for g in oracle.gradients(shape, steps, dtype=np.float32, **options)]


def take_steps(optimizer, params, *streams):
    for grads in zip(*streams):
        for param, grad in zip(params, grads):
            param.grad = None if grad is None else grad.to(param.dtype)
        optimizer.step()


def newton_starts(optimizer):
    """The random factors of each parameter: a skipped update makes the state and leaves it as it starts."""
    twin = copy.deepcopy(optimizer)
    params = [param for group in twin.param_groups for param in group["params"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take_steps(twin, params, *([torch.full_like(param, float("nan"))] for param in params))
    return [tuple(twin.state[param][f"{moment}_A"].numpy() for moment in twin.moments) for param in params]


def truth_of(optimizer, k, rule, **options):
    """The oracle of an optimizer's only parameter."""
    starts = newton_starts(optimizer)[0] if rule == "newton" else (None, None)
    if isinstance(optimizer, LoRAPreAdamW):
        return oracle.Adam(rule, k, starts=starts, **options)
    return oracle.Muon(rule, k, start=starts[0], **options)


def flat(grads):
    return [g.reshape(len(g), -1).numpy() for g in grads]


# ---- compressed matrices against the oracle -------------------------------------------------------------------------

SHAPES = [((20, 12), 3), ((12, 40), 1), ((40, 6), 2), ((9, 9), 4), ((10, 4, 3), 2), ((8, 4, 3, 3), 3)]


@both_optimizers
@both_rules
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
def test_equals_oracle(cls, rule, shape, k):
    param, grads = weights(*shape), stream(shape, 50)
    optimizer = cls([param], lr=LR, weight_decay=0.1, momentum_rank=k, update_rule=rule)
    start = param.detach().double().reshape(shape[0], -1).numpy()
    path = oracle.train(truth_of(optimizer, k, rule), start, flat(grads), LR, weight_decay=0.1)
    for g, expected in zip(grads, path):
        take_steps(optimizer, [param], [g])
        np.testing.assert_allclose(param.detach().reshape(shape[0], -1), expected, **CLOSE)
    assert "m_B" in optimizer.state[param]


@both_optimizers
@both_rules
def test_options_reach_the_maths(cls, rule):
    """betas, eps, momentum, nesterov and ρ away from their defaults, all at once."""
    param, grads, k = weights(20, 12), stream((20, 12), 50), 3
    options = {"betas": (0.8, 0.99), "eps": 1e-3} if cls is LoRAPreAdamW else {"momentum": 0.9, "nesterov": True}
    rho = {"residual_weight": 0.3} if rule == "als" else {}
    optimizer = cls([param], lr=LR, momentum_rank=k, update_rule=rule, **options, **rho)
    truth = truth_of(optimizer, k, rule, **options, rho=rho.get("residual_weight"))
    path = oracle.train(truth, param.detach().double().numpy(), flat(grads), LR)
    take_steps(optimizer, [param], grads)
    np.testing.assert_allclose(param.detach(), path[-1], **CLOSE)


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
@both_rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(20, 12), (12,)], ids=["compressed", "adamw path"])
def test_half_precision_rounds_once(cls, rule, dtype, shape):
    """State stays float32, the new weight is rounded once: bit for bit the rounded float32 step."""
    param, wide, grads = weights(*shape, dtype=dtype), weights(*shape), stream((20, 12), 20)
    optimizers = [cls([p], lr=LR, weight_decay=0.1, momentum_rank=2, update_rule=rule) for p in (param, wide)]
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
    path = oracle.train(truth_of(twin, 3, rule), param.detach().numpy(), flat(grads), LR)
    take_steps(optimizer, [param, bias], grads, [g[0] for g in grads])
    np.testing.assert_allclose(param.detach(), path[-1], **CLOSE)
    assert param.dtype == torch.float64
    assert {value.dtype for value in optimizer.state[param].values()} == {torch.float32}
    assert optimizer.state[bias]["exp_avg"].dtype == torch.float64


# ---- stacking and tiles ---------------------------------------------------------------------------------------------


@both_optimizers
@both_rules
@pytest.mark.parametrize(("shape", "k"), [((12, 10), 2), ((40, 24), 6), ((140, 132), 5), ((12, 40), 1)], ids=str)
def test_stacked_equal_alone(cls, rule, shape, k):
    """What is beside a matrix must not show in its step. k = 1: the BLAS sums a batch of vectors in another order."""
    n, grads = 5, [stream(shape, 8, seed=i) for i in range(5)]
    together, alone = ([weights(*shape, seed=i) for i in range(n)] for _ in range(2))
    options = {"lr": LR, "momentum_rank": k, "update_rule": rule}
    stacked = cls(together, **options)
    starts = [{"params": [param]} for param in alone]  # a group each: never stacked, and the positions stay
    single = cls(starts, **options)
    take_steps(stacked, together, *grads)
    take_steps(single, alone, *grads)
    for a, b in zip(together, alone):
        if k > 1:
            assert torch.equal(a, b)
            assert all(torch.equal(stacked.state[a][name], single.state[b][name]) for name in stacked.state[a])
        else:
            torch.testing.assert_close(a, b, **CLOSE)


@both_rules
@pytest.mark.parametrize("shape", [(40, 10), (10, 2, 20)], ids=str)
@pytest.mark.parametrize("rows", [3, 7, 39])
def test_tiles_equal_whole(monkeypatch, rule, shape, rows):
    """Row tiles, the last one smaller, give the whole's step up to the order of float32 sums.

    k + 8 ≥ min(p, q), so that the subspace iteration by which a tiled start replaces the SVD is exact.
    """
    q = int(np.prod(shape[1:]))
    seen, gradients = set(), Bucket.gradients

    def spy(bucket, tile):
        seen.add((tile.start, tile.stop))
        return gradients(bucket, tile)

    monkeypatch.setattr(Bucket, "gradients", spy)
    grads, results = [stream(shape, 15, seed=i) for i in range(2)], []
    for temporary_bytes in (64_000_000, 4 * TEMPORARIES * q * rows):
        params = [weights(*shape, seed=i) for i in range(2)]
        optimizer = LoRAPreAdamW(params, lr=LR, momentum_rank=2, update_rule=rule, temporary_bytes=temporary_bytes)
        take_steps(optimizer, params, *grads)
        results.append(params)
    for whole, tiled in zip(*results):
        torch.testing.assert_close(tiled, whole, **CLOSE)
    p, step = shape[0], min(rows, shape[0])
    assert seen == {(0, p)} | {(i, min(i + step, p)) for i in range(0, p, step)}


def test_chunks_equal_whole():
    """A bucket too large for the bound is stepped in parts, each of whole matrices: bit for bit the same."""
    shape, results = (12, 10), []
    grads = [stream(shape, 10, seed=i) for i in range(5)]
    for temporary_bytes in (64_000_000, 4 * TEMPORARIES * 120 * 2):
        params = [weights(*shape, seed=i) for i in range(5)]
        take_steps(LoRAPreAdamW(params, lr=LR, momentum_rank=2, temporary_bytes=temporary_bytes), params, *grads)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@both_optimizers
@both_rules
def test_non_contiguous_gradients_and_parameters(cls, rule):
    """Transposed storage and channels_last are what autograd may hand over; the step must see shapes, not strides."""
    grads, conv = stream((20, 12), 10), stream((8, 4, 3, 3), 10)
    plain = [weights(20, 12), weights(8, 4, 3, 3)]
    strided = [
        nn.Parameter(plain[0].detach().clone().mT.contiguous().mT),
        nn.Parameter(plain[1].detach().clone(memory_format=torch.channels_last)),
    ]
    options = {"lr": LR, "momentum_rank": 2, "update_rule": rule}
    take_steps(cls(plain, **options), plain, grads, conv)
    turned = [g.mT.contiguous().mT for g in grads], [g.contiguous(memory_format=torch.channels_last) for g in conv]
    take_steps(cls(strided, **options), strided, *turned)
    for a, b in zip(plain, strided):
        torch.testing.assert_close(a, b, **CLOSE)


# ---- the AdamW path against torch.optim.AdamW -----------------------------------------------------------------------

PLAIN = {"vector": ((12,), None), "scalar": ((), None), "tiny matrix": ((2, 2), None), "rank 0": ((20, 12), 0)}
PLAIN |= {
    "rank not below the smaller side": ((12, 8), 8),
    "factors not smaller": ((6, 6), 3),
    "one row": ((1, 40), None),
}


@both_optimizers
@pytest.mark.parametrize(("shape", "k"), PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_path_is_torch_adamw(cls, shape, k, dtype):
    """The same function on the same numbers: equal in every bit."""
    ours, theirs = weights(*shape, dtype=dtype), weights(*shape, dtype=dtype)
    betas, eps = (0.9, 0.95), 1e-6
    options = {"betas": betas, "eps": eps} if cls is LoRAPreAdamW else {"adamw_betas": betas, "adamw_eps": eps}
    optimizer = cls([ours], lr=LR, weight_decay=0.1, momentum_rank=k, **options)
    reference = torch.optim.AdamW([theirs], lr=LR, betas=betas, eps=eps, weight_decay=0.1)
    grads = [
        torch.as_tensor(g, dtype=dtype).reshape(shape) for g in np.random.default_rng(1).normal(size=(30, *shape))
    ]
    take_steps(optimizer, [ours], grads)
    take_steps(reference, [theirs], grads)
    assert torch.equal(ours, theirs)
    assert set(optimizer.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("shape", "momentum_rank", "expected"),
    [
        ((8,), None, 0),
        ((0, 4), 2, 0),
        ((3, 300), None, 1),
        ((32, 24), None, 6),
        ((32, 24), 5, 5),
        ((32, 24), 24, 0),
        ((8, 8), 4, 0),  # 4·16 numbers for 64
        ((8, 8), 3, 3),
        ((16, 4, 3, 3), 2, 2),
        ((16, 1, 3), 3, 0),  # 16×3 once flattened
        ((32, 24), 0, 0),
    ],
    ids=str,
)
def test_compressed_rank(shape, momentum_rank, expected):
    assert compressed_rank(torch.Size(shape), momentum_rank) == expected


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
    models = []
    for form in forms.values():
        models.append(small_model())
        train(models[-1], cls(form(models[-1]), lr=LR, momentum_rank=2, update_rule=rule))
    assert all(same_weights(models[0], model) for model in models[1:])
    assert not same_weights(models[0], small_model())


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
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lambda_lr(cls, tensor_lr):
    """A warmup from zero and a decay, against the same rates written by hand."""
    factors = [0.0, 0.5, 1.0, 0.7, 0.3, 0.1]
    models = [small_model(), small_model()]
    optimizer = cls(models[0].parameters(), lr=torch.tensor(LR) if tensor_lr else LR, momentum_rank=2)
    train(models[0], optimizer, 5, torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__))
    by_hand = cls(models[1].parameters(), lr=LR, momentum_rank=2)
    data = torch.Generator().manual_seed(1)
    for factor in factors[:5]:
        by_hand.param_groups[0]["lr"] = LR * factor
        by_hand.zero_grad()
        models[1](torch.randn(16, 12, generator=data)).sin().square().mean().backward()
        by_hand.step()
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)  # a float32 rate differs in its last place


@both_optimizers
def test_one_cycle_lr(cls):
    """It cycles β1 (or μ) as well as the rate: the step must read them anew; 0.95 is within als's range."""
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
    matrix, ours, theirs = weights(20, 12), weights(12), weights(12)
    rate = 0.003 if cls is LoRAPreMuon else LR
    lr = torch.tensor(LR) if tensor_lr else LR
    optimizer = cls([matrix, ours], lr=lr, **({"adamw_lr": rate} if cls is LoRAPreMuon else {}))
    reference = torch.optim.AdamW([theirs], lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in (optimizer, reference)]
    for g in stream((20, 12), 10):
        take_steps(optimizer, [matrix, ours], [g], [g[0]])
        take_steps(reference, [theirs], [g[0]])
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


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


# ---- Muon's conventions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 9), (20, 12), (12, 40), (1, 5)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-15, 1e15])
def test_orthogonalize_is_the_quintic_of_singular_values(shape, scale):
    """torch floors the norm at 1e-7; here gradients may be smaller, and the step must not depend on their scale."""
    m = torch.from_numpy(np.random.default_rng(0).normal(size=shape))
    np.testing.assert_allclose(orthogonalize(m * scale), oracle.newton_schulz(m.numpy()), rtol=1e-9, atol=1e-9)
    found = orthogonalize((m * scale).float())
    np.testing.assert_allclose(found, oracle.newton_schulz(m.numpy()), rtol=1e-3, atol=1e-4)


def test_orthogonalize_batches_and_keeps_zero():
    m = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 12, 7)))
    torch.testing.assert_close(orthogonalize(m), torch.stack([orthogonalize(x) for x in m]), rtol=1e-12, atol=1e-12)
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


def test_muon_without_scale_is_algorithm_2():
    """None means no scale here, where torch's None means "original"."""
    tall, grads = (40, 6), stream((40, 6), 3)
    paths = {}
    for name in (None, "original", "match_rms_adamw"):
        param = weights(*tall)
        take_steps(LoRAPreMuon([param], lr=LR, momentum_rank=2, adjust_lr_fn=name), [param], grads)
        paths[name] = param.detach() - weights(*tall).detach()
    torch.testing.assert_close(paths["original"], paths[None] * (40 / 6) ** 0.5, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(paths["match_rms_adamw"], paths[None] * 0.2 * 40**0.5, rtol=1e-3, atol=1e-6)


# ---- gradients of every kind ----------------------------------------------------------------------------------------


@both_optimizers
@both_rules
def test_zero_gradients_equal_oracle(cls, rule):
    """LoRA's A starts with gradient zero, and later steps may bring zeros too."""
    grads = stream((20, 12), 30)
    for t in (0, 1, 10, 11, 12):
        grads[t] = torch.zeros(20, 12)
    param = weights(20, 12)
    optimizer = cls([param], lr=LR, weight_decay=0.1, momentum_rank=3, update_rule=rule)
    path = oracle.train(truth_of(optimizer, 3, rule), param.detach().double().numpy(), flat(grads), LR, 0.1)
    for g, expected in zip(grads, path):
        take_steps(optimizer, [param], [g])
        np.testing.assert_allclose(param.detach(), expected, **CLOSE)
    assert optimizer.state[param]["step"].item() == (28 if rule == "als" else 30)


@both_optimizers
@both_rules
def test_recovers_from_2000_zero_gradients(cls, rule):
    """The factors decay towards zero all that time; if they reached it, no gradient could bring them back.

    That `newton` finds the momentum again is not asked: it overshoots by g²/m, as published.
    """
    grads = stream((12, 8), 60, rank=2, noise=0.0)
    param = weights(12, 8)
    optimizer = cls([param], lr=LR, momentum_rank=2, update_rule=rule)
    take_steps(optimizer, [param], [*grads[:5], *[torch.zeros(12, 8)] * 2000])
    assert param.isfinite().all()
    take_steps(optimizer, [param], grads)
    assert param.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[param].values())
    if rule == "als":
        assert momentum_error(optimizer, param, grads) < 0.1


def momentum_error(optimizer, param, grads):
    """‖m_B m_A − m‖/‖m‖ with the exact average m of these gradients."""
    decay, weight = (0.9, 0.1) if isinstance(optimizer, LoRAPreAdamW) else (0.95, 1.0)
    exact = sum(weight * decay**age * g for age, g in enumerate(reversed(grads)))
    found = optimizer.state[param]["m_B"] @ optimizer.state[param]["m_A"]
    return (torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact)).item()


def test_zero_gradients_stop_the_update_without_eps():
    """m decays faster than √v, so Adam's update goes to zero; the end of float32's range must not turn that round.

    Small betas bring m and v to the end of float32's range in 400 steps; the default ones take 1,900.
    """
    param = weights(12, 8)
    optimizer = LoRAPreAdamW([param], lr=1.0, betas=(0.6, 0.7), eps=0.0, momentum_rank=2)
    take_steps(optimizer, [param], [*stream((12, 8), 5), *[torch.zeros(12, 8)] * 400])
    before = param.detach().clone()
    take_steps(optimizer, [param], [torch.zeros(12, 8)])
    assert (param - before).abs().max() < 1e-3


@both_optimizers
@both_rules
def test_rank_deficient_gradients(cls, rule):
    """Gradients of rank 1 leave k−1 directions of the factors to round-off."""
    param, grads = weights(20, 12), stream((20, 12), 60, rank=1, noise=0.0)
    optimizer = cls([param], lr=LR, momentum_rank=4, update_rule=rule)
    take_steps(optimizer, [param], grads)
    assert param.isfinite().all()
    assert momentum_error(optimizer, param, grads) < (0.01 if rule == "als" else 0.5)


@both_optimizers
@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_extreme_gradients(cls, scale):
    """Sixty orders of magnitude lie between the squares of these; `als` takes the steps of gradients around 1."""
    grads, params = stream((20, 12), 30), [weights(20, 12), weights(20, 12)]
    options = {"eps": 0.0} if cls is LoRAPreAdamW else {}
    for param, factor in zip(params, (1.0, scale)):
        take_steps(cls([param], lr=LR, momentum_rank=3, **options), [param], [g * factor for g in grads])
    torch.testing.assert_close(*params, rtol=0, atol=1e-4)  # 30 steps of 0.01, each to 3e-4


@both_optimizers
@both_rules
@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_jumps_of_scale_stay_finite(cls, rule, scale):
    grads = stream((20, 12), 30)
    mixed = [g * (scale if 10 <= t < 20 else 1.0) for t, g in enumerate(grads)]
    param = weights(20, 12)
    optimizer = cls([param], lr=LR, momentum_rank=3, update_rule=rule)
    take_steps(optimizer, [param], mixed)
    assert param.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[param].values())


@both_optimizers
@both_rules
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_non_finite_gradients_are_skipped(cls, rule, bad, steps_before):
    """One bad gradient costs one parameter one update: state kept in every bit, its bucket goes on, one warning."""
    shapes = [(20, 12), (20, 12), (20, 12), (12,)]
    params, control = ([weights(*shape, seed=i) for i, shape in enumerate(shapes)] for _ in range(2))
    grads = [stream((20, 12), 6, seed=i) for i in range(3)] + [[g[0] for g in stream((20, 12), 6)]]
    optimizer, clean = (cls(p, lr=LR, weight_decay=0.1, momentum_rank=2, update_rule=rule) for p in (params, control))
    take_steps(optimizer, params, *(g[:steps_before] for g in grads))
    take_steps(clean, control, *(g[:steps_before] for g in grads))
    weights_before = [param.detach().clone() for param in params]
    before = copy.deepcopy([dict(optimizer.state[param]) for param in params])

    now = [g[steps_before].clone() for g in grads]
    now[1][2, 3] = bad
    now[3][5] = bad
    with pytest.warns(
        UserWarning, match=r"a gradient has the norm (nan|inf): the update of that parameter is skipped"
    ) as said:
        take_steps(optimizer, params, *([g] for g in now))
    assert len(said) == 1
    assert optimizer.skipped_updates == 2
    take_steps(clean, control, *([None if i in (1, 3) else g] for i, g in enumerate(now)))
    for i, param in enumerate(params):
        if i in (1, 3):
            assert torch.equal(param, weights_before[i])
            assert all(torch.equal(optimizer.state[param][name], value) for name, value in before[i].items())
            assert optimizer.state[param]["step"].item() == steps_before
        else:
            assert torch.equal(param, control[i])
            assert not torch.equal(param, weights_before[i])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(optimizer, params, *([g] for g in now))
        take_steps(optimizer, params, *(g[-2:] for g in grads))
    assert optimizer.skipped_updates == 4
    assert all(param.isfinite().all() for param in params)


@both_optimizers
def test_gradients_beyond_float32_are_skipped(cls):
    """Finite in float64, but their squares would be infinite in the float32 state for good."""
    param, g = weights(20, 12, dtype=torch.float64), torch.ones(20, 12, dtype=torch.float64)
    optimizer = cls([param], lr=LR, momentum_rank=2)
    take_steps(optimizer, [param], [g])
    before, state = param.detach().clone(), copy.deepcopy(dict(optimizer.state[param]))
    with pytest.warns(UserWarning, match="a gradient has the norm"):
        take_steps(optimizer, [param], [g * 1e25])
    assert torch.equal(param, before)
    assert all(torch.equal(optimizer.state[param][name], value) for name, value in state.items())
    assert optimizer.skipped_updates == 1


@both_optimizers
@both_rules
def test_unused_parameters_are_left_alone(cls, rule):
    params = [weights(20, 12), weights(20, 12, seed=1), weights(12)]
    optimizer = cls(params, lr=LR, weight_decay=0.1, momentum_rank=2, update_rule=rule)
    take_steps(optimizer, params, stream((20, 12), 3), [None] * 3, [None] * 3)
    assert torch.equal(params[1], weights(20, 12, seed=1))
    assert torch.equal(params[2], weights(12))
    assert set(optimizer.state) == {params[0]}


@both_optimizers
@both_rules
def test_gradients_that_come_and_go(cls, rule):
    """Steps without a gradient do not exist for that parameter, whatever its neighbour does."""
    params, grads = [weights(20, 12), weights(20, 12, seed=1)], stream((20, 12), 8)
    gaps = [g if t not in (0, 3, 4) else None for t, g in enumerate(grads)]
    optimizer = cls(params, lr=LR, weight_decay=0.1, momentum_rank=2, update_rule=rule)
    take_steps(optimizer, params, gaps, grads)
    alone = weights(20, 12)
    take_steps(
        cls([alone], lr=LR, weight_decay=0.1, momentum_rank=2, update_rule=rule),
        [alone],
        [g for g in gaps if g is not None],
    )
    assert torch.equal(params[0], alone)
    assert [optimizer.state[param]["step"].item() for param in params] == [5, 8]


@both_optimizers
def test_empty_parameters_and_empty_steps(cls):
    empty, param = nn.Parameter(torch.zeros(0, 4)), weights(20, 12)
    optimizer = cls([empty, param], lr=LR)
    optimizer.step()
    empty.grad, param.grad = torch.zeros(0, 4), stream((20, 12), 1)[0]
    optimizer.step()
    assert set(optimizer.state) == {param}


# ---- randomness -----------------------------------------------------------------------------------------------------


@both_optimizers
@both_rules
def test_global_rng_is_neither_read_nor_changed(cls, rule):
    """Ranks of a distributed run have different global seeds, and dropout must not depend on the optimizer."""
    shapes = [(20, 12), (140, 136), (12,)]
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        params = [weights(*shape) for shape in shapes]
        grads = [stream(shape, 3) for shape in shapes[:2]] + [[torch.ones(12)] * 3]
        take_steps(cls(params, lr=LR, momentum_rank=2, update_rule=rule), params, *grads)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@both_optimizers
def test_newton_start_depends_on_seed_and_position_alone(cls):
    def starts(seed=0, shapes=((20, 12), (20, 12)), **options):
        optimizer = cls(
            [weights(*shape, seed=5) for shape in shapes], momentum_rank=2, update_rule="newton", seed=seed, **options
        )
        return [np.concatenate([a.ravel() for a in start]) for start in newton_starts(optimizer)]

    first, second = starts()
    assert not np.array_equal(first, second)  # by position
    torch.manual_seed(1)
    assert np.array_equal(second, starts(lr=0.5, shapes=((7, 9), (20, 12)))[1])
    assert not np.array_equal(first, starts(seed=1)[0])
    assert not np.array_equal(second, starts(seed=1)[0])
    if cls is LoRAPreAdamW:
        m_A, v_A = np.split(first, 2)
        assert not np.array_equal(m_A, v_A)


# ---- what a run can look at -----------------------------------------------------------------------------------------


@both_optimizers
@both_rules
def test_metrics(cls, rule):
    """captured_energy against its definition, from the factors before the step; the rest against the clamp's bound."""
    params, grads = [weights(20, 12), weights(20, 12, seed=1)], [stream((20, 12), 10, seed=i) for i in range(2)]
    optimizer = cls(params, lr=LR, momentum_rank=3, update_rule=rule)
    assert optimizer.metrics() == {}
    take_steps(optimizer, params, *(g[:9] for g in grads))
    assert optimizer.metrics() == {}
    captured = 0.0
    for param, g in zip(params, grads):
        rows = optimizer.state[param]["m_A"].double()
        captured += (g[9].double() @ rows.T @ torch.linalg.inv(rows @ rows.T) @ rows).square().sum().item()
    optimizer.record_metrics = True
    take_steps(optimizer, params, *(g[9:] for g in grads))
    found = optimizer.metrics()
    energy = sum(g[9].square().sum().item() for g in grads)
    assert found["captured_energy"] == pytest.approx(captured / energy, rel=1e-3)  # δ is left out here
    if cls is LoRAPreMuon:
        assert set(found) == {"captured_energy"}
    else:
        assert set(found) == {"captured_energy", "largest_update", "clamped_share"}
        assert 0 <= found["clamped_share"] < 0.5
        assert (found["clamped_share"] > 0) == (rule == "als" and found["largest_update"] > update_bound(0.9, 0.95))
    optimizer.record_metrics = False
    take_steps(optimizer, params, *(g[9:] for g in grads))
    assert optimizer.metrics() == {}


def test_metrics_change_nothing():
    params, grads = [weights(20, 12), weights(20, 12)], stream((20, 12), 10)
    for param, record in zip(params, (False, True)):
        optimizer = LoRAPreAdamW([param], lr=LR)
        optimizer.record_metrics = record
        take_steps(optimizer, [param], grads)
    assert torch.equal(*params)


@both_optimizers
@both_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_shapes_and_bytes_are_the_real_ones(cls, rule, dtype):
    """Both are asked before the first step, to plan memory; the state that a step makes must keep the promise."""
    shapes = [(20, 12), (8, 4, 3, 3), (12,), (), (2, 2)]
    params = [weights(*shape, dtype=dtype) for shape in shapes]
    optimizer = cls(params, momentum_rank=2, update_rule=rule)
    group = optimizer.param_groups[0]
    promised = [(optimizer.state_shapes(p, group), optimizer.param_state_bytes(p, group)) for p in params]
    take_steps(optimizer, params, *([torch.ones(shape)] for shape in shapes))
    for param, (names, size) in zip(params, promised):
        state = optimizer.state[param]
        assert {name: tuple(value.shape) for name, value in state.items()} == names
        assert sum(value.numel() * value.element_size() for value in state.values()) == size
    moments = 2 if cls is LoRAPreAdamW else 1
    scalars = 1 + (cls is LoRAPreAdamW and rule == "als")
    assert promised[0][1] == 4 * (moments * 2 * (20 + 12) + scalars)
