"""The steps of both optimizers: against the oracle, stacked and tiled, and on the AdamW path; Muon's conventions."""

from functools import partial

import numpy as np
import oracle
import pytest
import torch
from backend_runs import BACKENDS, DEVICE
from roundoff import assert_same_steps, chain, disturbed, gamma, oracle_room, undisturbed
from stepping import LR, both_optimizers, both_rules, flat, products, stream, take_steps, truth_of, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.lowrank.batch import Batch
from lorapre_peft.lowrank.layout import TEMPORARIES, compressed_rank
from lorapre_peft.optim.muon import NEWTON_SCHULZ, orthogonalize

needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in torch 2.9")


# ---- compressed matrices against the oracle -------------------------------------------------------------------------

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
@pytest.mark.parametrize(("k", "second", "held"), [(5, 2, 2), (5, 5, 5), (5, 9, 5)])
def test_second_moments_of_other_ranks(backend, k, second, held):
    """v has a rank of its own, at most that of m."""
    param, grads = nn.Parameter(weights(20, 12).detach().to(DEVICE)), stream((20, 12), 30)
    optimizer = LoRAPreAdamW([param], lr=LR, momentum_rank=k, second_momentum_rank=second, backend=backend)
    truth, start = truth_of(optimizer, k, "als", second=held), param.detach().cpu().double().numpy()
    room, _ = oracle_room(truth, start, flat(grads), LR)
    path = oracle.train(truth, start, flat(grads), LR)
    take_steps(optimizer, [param], grads)
    np.testing.assert_allclose(param.detach().cpu(), path[-1], rtol=0, atol=room[-1])
    assert optimizer.state[param]["v_A"].shape == (held, 12)


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


# ---- stacking and tiles ---------------------------------------------------------------------------------------------


@both_optimizers
@both_rules
@pytest.mark.parametrize(("shape", "k"), [((12, 10), 2), ((40, 24), 6), ((140, 132), 5), ((12, 40), 1)], ids=str)
def test_stacked_equal_alone(cls, rule, shape, k):
    """What is beside a matrix must not show in its step, but for the order in which a BLAS sums a batch and a single
    product.
    """
    n, grads = 5, [stream(shape, 8, seed=i) for i in range(5)]

    def trained(groups, prepare=undisturbed):
        params = [weights(*shape, seed=i) for i in range(n)]
        optimizer = prepare(cls(groups(params), lr=LR, momentum_rank=k, update_rule=rule))
        take_steps(optimizer, params, *grads)
        return [*params, *(product for param in params for product in products(optimizer.state[param]))]

    # A group each: never stacked, and the positions stay.
    assert_same_steps(trained(list), partial(trained, lambda params: [{"params": [param]} for param in params]))


def bytes_for_tiles_of(entries):
    """``temporary_bytes`` of which half holds all temporaries of a tile of so many entries."""
    return 2 * 4 * TEMPORARIES * entries


def watch_tiles(monkeypatch):
    """{((matrices), (rows)), …}: the tiles of gradients that are read from now on."""
    seen, gradients = set(), Batch.gradients

    def spy(batch, matrices, rows):
        seen.add(((matrices.start, matrices.stop), (rows.start, rows.stop)))
        return gradients(batch, matrices, rows)

    monkeypatch.setattr(Batch, "gradients", spy)
    return seen


@both_rules
@pytest.mark.parametrize("shape", [(40, 10), (10, 2, 20)], ids=str)
@pytest.mark.parametrize("rows", [3, 7, 39])
def test_tiles_equal_whole(monkeypatch, rule, shape, rows):
    """Row tiles, the last one smaller, give the whole's step up to the order of float32 sums.

    k + 8 ≥ min(p, q), so that the subspace iteration by which a tiled start replaces the SVD is exact.
    """
    q = int(np.prod(shape[1:]))
    seen = watch_tiles(monkeypatch)
    grads = [stream(shape, 15, seed=i) for i in range(2)]

    def trained(temporary_bytes, prepare=undisturbed):
        params = [weights(*shape, seed=i) for i in range(2)]
        options = dict(momentum_rank=2, update_rule=rule, temporary_bytes=temporary_bytes)
        take_steps(prepare(LoRAPreAdamW(params, lr=LR, backend="eager", **options)), params, *grads)
        return params

    assert_same_steps(trained(bytes_for_tiles_of(q * rows)), partial(trained, 64_000_000))
    p, step = shape[0], min(rows, shape[0])
    assert {tile for _, tile in seen} == {(0, p)} | {(i, min(i + step, p)) for i in range(0, p, step)}


def watch_batches(monkeypatch):
    """[n, …]: how many matrices each batch has that is stepped from now on."""
    sizes, update = [], LoRAPreAdamW._update

    def spy(optimizer, batch):
        sizes.append(len(batch))
        return update(optimizer, batch)

    monkeypatch.setattr(LoRAPreAdamW, "_update", spy)
    return sizes


def test_batches_equal_whole(monkeypatch):
    """Matrices too many for the bound are stepped in several batches: the same steps."""
    shapes, sizes = [(12, 10)] * 3 + [(8, 14)] * 2, watch_batches(monkeypatch)
    grads = [stream(shape, 10, seed=i) for i, shape in enumerate(shapes)]
    factors = (2 + 1) * 22  # entries: moments of k(p+q) and of p+q, the same for both shapes

    def trained(temporary_bytes, prepare=undisturbed):
        sizes.clear()
        params = [weights(*shape, seed=i) for i, shape in enumerate(shapes)]
        options = dict(momentum_rank=2, temporary_bytes=temporary_bytes, backend="eager")
        take_steps(prepare(LoRAPreAdamW(params, lr=LR, **options)), params, *grads)
        return params

    found = trained(bytes_for_tiles_of(2 * factors))
    assert sizes == [2, 1, 2] * 10
    assert_same_steps(found, partial(trained, 64_000_000))
    assert sizes == [3, 2] * 10


@both_rules
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_groups_share_batches(monkeypatch, rule, backend):
    """Matrices of groups that differ in every number are stepped together, each by its own group's."""
    sizes = watch_batches(monkeypatch)
    own = [
        dict(lr=LR),
        dict(lr=3 * LR, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, update_scale=0.5),
        dict(lr=LR, max_param_grad_norm=1.0, maximize=True, **({"residual_weight": 0.3} if rule == "als" else {})),
    ]
    grads = [stream((20, 12), 10, seed=i) for i in range(3)]

    def trained(groups, prepare=undisturbed):
        params = [group["params"][0] for group in groups]
        take_steps(prepare(LoRAPreAdamW(groups, momentum_rank=2, update_rule=rule, backend=backend)), params, *grads)
        return params

    def alone(prepare):
        found = []
        for i, options in enumerate(own):
            params = [weights(20, 12, seed=j) for j in range(3)]  # the positions, which `newton` starts from, stay
            optimizer = LoRAPreAdamW(params, momentum_rank=2, update_rule=rule, backend="eager", **options)
            take_steps(prepare(optimizer), params, *grads)
            found.append(params[i])
        return found

    found = trained([{"params": [weights(20, 12, seed=i)], **options} for i, options in enumerate(own)])
    assert sizes == ([3] * 10 if backend == "eager" else [])
    assert_same_steps(found, alone)


@both_optimizers
@both_rules
def test_non_contiguous_gradients_and_parameters(cls, rule):
    """Transposed storage and channels_last are what autograd may hand over; the step must see shapes, not strides."""
    grads, conv = stream((20, 12), 10), stream((8, 4, 3, 3), 10)
    turned = [g.mT.contiguous().mT for g in grads], [g.contiguous(memory_format=torch.channels_last) for g in conv]
    strided = [
        nn.Parameter(weights(20, 12).detach().mT.contiguous().mT),
        nn.Parameter(weights(8, 4, 3, 3).detach().clone(memory_format=torch.channels_last)),
    ]

    def trained(params, streams, prepare=undisturbed):
        take_steps(prepare(cls(params, lr=LR, momentum_rank=2, update_rule=rule)), params, *streams)
        return params

    assert_same_steps(
        trained(strided, turned),
        lambda prepare: trained([weights(20, 12), weights(8, 4, 3, 3)], (grads, conv), prepare),
    )


@both_optimizers
@both_rules
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_convolution_as_large_as_a_matrix(cls, rule, backend):
    """A linear layer and convolutions that flatten to its shape are stepped as three linear layers would be."""
    shapes = [(20, 12), (20, 12, 1), (20, 3, 2, 2)]
    grads = [stream((20, 12), 10, seed=i) for i in range(3)]

    def trained(shapes, prepare=undisturbed):
        params = [nn.Parameter(weights(20, 12, seed=i).detach().reshape(shape)) for i, shape in enumerate(shapes)]
        streams = [[g.reshape(shape) for g in own] for own, shape in zip(grads, shapes)]
        options = dict(momentum_rank=2, update_rule=rule, weight_decay=0.1, backend=backend)
        take_steps(prepare(cls(params, lr=LR, **options)), params, *streams)
        return [param.view(20, 12) for param in params]

    assert_same_steps(trained(shapes), partial(trained, [(20, 12)] * 3))


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


# ---- Muon's conventions ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("change", ["momentum_rank", "shape"])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_what_no_longer_fits_the_state_is_an_error_before_the_step(change, backend):
    param = weights(30, 20)
    optimizer = LoRAPreAdamW([param], lr=LR, momentum_rank=2, backend=backend)
    take_steps(optimizer, [param], stream((30, 20), 3))
    if change == "shape":
        param.data, param.grad = torch.zeros(30, 30), None
    else:
        optimizer.param_groups[0]["momentum_rank"] = 4
    with pytest.raises(ValueError, match=r"has the state .*, expected .*: its shape or these options have changed"):
        take_steps(optimizer, [param], stream(tuple(param.shape), 1))


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
