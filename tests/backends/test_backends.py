"""Every backend against the oracle and against the eager one.

Where there is a CUDA device the tests run there; else Triton's kernels run in its interpreter (see conftest.py).
"""

import numpy as np
import oracle
import pytest
import torch
from backend_runs import (
    BACKENDS,
    DEVICE,
    assert_like_eager,
    assert_like_rounded,
    cpp_,
    eager_and_cpp,
    parameters,
    peak_of_a_step,
    run,
)
from roundoff import assert_same_steps, oracle_room, undisturbed
from stepping import LR, both_optimizers, both_rules, flat, stream, take_steps, truth_of, weights
from torch import nn
from versions import skip_before

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.lowrank.layout import TEMPORARIES

# No power of two divides these, and the first two are the smallest that are compressed. Few ranks, for each below 5 is
# a graph of its own to compile.
SHAPES = [((2, 3), 1), ((3, 2), 1), ((12, 40), 1), ((33, 31), 7), ((48, 40), 17), ((10, 3, 1, 9), 7)]


@both_rules
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_equals_oracle_and_eager(backend, shape, k, rule):
    if backend == "compiled" and (shape == (3, 2) or (rule == "newton" and k == 1)):
        pytest.skip("one more graph to compile for nothing new")
    if backend == "triton" and DEVICE.type == "cpu" and shape in ((3, 2), (10, 3, 1, 9)):
        pytest.skip("its interpreter takes seconds, for kernels as (2, 3) and (33, 31) have them")
    grads = [stream(shape, 4, seed=i) for i in range(2)]
    options = {"update_rule": rule, "weight_decay": 0.1, "grads": grads}
    found = run(backend, shape, k, **options)
    assert_like_eager(found, shape, k, **options)
    start = parameters(shape)
    fresh = LoRAPreAdamW(start, momentum_rank=k, update_rule=rule)
    for i, (param, before, g) in enumerate(zip(found[0], start, grads)):
        truth, theta = truth_of(fresh, k, rule, i), before.detach().double().cpu().numpy().reshape(shape[0], -1)
        room, _ = oracle_room(truth, theta, flat(g), LR, 0.1)
        expected = oracle.train(truth, theta, flat(g), LR, 0.1)[-1]
        np.testing.assert_allclose(param.detach().cpu().reshape(shape[0], -1), expected, rtol=0, atol=room[-1])


@pytest.mark.parametrize("name", ["m_A", "v_A"])
@pytest.mark.parametrize("shape", [(33, 31), (6, 200)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_the_state_shows_in_the_weights(backend, shape, name):
    """A clamp that takes it for its bound would go on with steps of ±lr that no loss explains."""
    param = parameters(shape, 1)[0]
    optimizer = LoRAPreAdamW([param], lr=LR, momentum_rank=3, backend=backend)
    grads = stream(shape, 2)
    take_steps(optimizer, [param], grads[:1])
    optimizer.state[param][name][0, 0] = float("nan")
    take_steps(optimizer, [param], grads[1:])
    assert param[:, 0].isnan().all()


@both_rules
@pytest.mark.parametrize("backend", BACKENDS[1:2])
def test_compiled_muon_equals_eager(backend, rule):
    """The eager one is held against the oracle in test_steps.py."""
    options = {"cls": LoRAPreMuon, "update_rule": rule, "nesterov": True}
    for shape, k in ((19, 17), 5), ((48, 40), 17):
        assert_like_eager(run(backend, shape, k, **options), shape, k, **options)


OPTIONS = {
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "clipped": {"max_param_grad_norm": 3.0, "update_scale": 0.25},
    "tensor lr": {"lr": torch.tensor(LR)},
    "betas, eps, rho": {"betas": (0.8, 0.99), "eps": 1e-2, "residual_weight": 0.3},
    "tiles": {"temporary_bytes": 2 * 4 * TEMPORARIES * 17 * 10},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_options(backend, options):
    """Each backend reads them in places of their own."""
    if backend == "compiled" and options is OPTIONS["tiles"]:
        pytest.skip("half a minute of graphs for tiles, which are the eager backend's own")
    shape, k = (19, 17), 5
    assert_like_eager(run(backend, shape, k, **options), shape, k, **options)


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"tensor lr", "tiles"}))  # These two change no step.
def test_options_change_the_step(name):
    found, plain = (run("eager", (19, 17), 5, 2, **options)[0][0] for options in (OPTIONS[name], {}))
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_half_precision(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds to nearest")
    (found, _), (expected, _) = (run(name, (19, 17), 5, dtype=dtype) for name in (backend, "eager"))
    assert {param.dtype for param in found} == {dtype}
    assert_like_rounded(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_weights_keep_their_digits(backend):
    """θ(1 − 2⁻¹⁰) to 1e-9, where rounding a weight of 2 to float32 would cost 6e-8; and the ordinary update
    beside it.
    """
    found, optimizer = run(backend, (19, 17), 5, dtype=torch.float64)
    for a in found:
        assert a.dtype == torch.float64
        assert {value.dtype for value in optimizer.state[a].values()} == {torch.float32}
    assert_same_steps([a.float() for a in found], lambda prepare: run("eager", (19, 17), 5, prepare=prepare)[0])
    decaying = {"lr": 2.0**-5, "weight_decay": 2.0**-5, "update_scale": 1e-30}
    for a, start in zip(
        run(backend, (19, 17), 5, 2, dtype=torch.float64, **decaying)[0], parameters((19, 17), dtype=torch.float64)
    ):
        torch.testing.assert_close(a, start * (1 - 2.0**-10) ** 2, rtol=0, atol=1e-9)


@both_optimizers
@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_the_step(cls, backend):
    """A second backward pass through the weights of before would be wrong, and is an error as with torch's own."""
    if cls is LoRAPreMuon and backend == "triton":
        pytest.skip("Muon has no kernels")
    ours, other = (nn.Parameter(weights(20, 12).detach().to(DEVICE)) for _ in range(2))
    optimizer = cls([ours], lr=LR, momentum_rank=2, backend=backend)
    loss = (other @ ours.mT).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_show(backend, n):
    """Transposed storage and channels_last, of parameters and gradients; one matrix alone is read through a view."""
    if backend == "compiled" and n == 1:
        pytest.skip("one more graph to compile, and no strides of a parameter in it")
    for shape, turn in (
        ((19, 17), lambda x: x.mT.contiguous().mT),
        ((10, 3, 2, 9), lambda x: x.contiguous(memory_format=torch.channels_last)),
    ):
        grads = [stream(shape, 3, seed=i) for i in range(n)]
        turned = [nn.Parameter(turn(param.detach())) for param in parameters(shape, n)]
        optimizer = LoRAPreAdamW(turned, lr=LR, momentum_rank=5, backend=backend)
        take_steps(optimizer, turned, *([turn(g) for g in gs] for gs in grads))
        assert not any(a.is_contiguous() for a in turned)
        assert_like_eager((turned, optimizer), shape, 5, n=n, grads=grads)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_stochastic_rounding_bit_for_bit(backend):
    """The same random bits fall on the same entries. θ(1 − 2⁻¹⁰) needs no rounding in float32, the update adds
    nothing.
    """
    options = {"lr": 2.0**-5, "weight_decay": 2.0**-5, "update_scale": 1e-30, "bf16_rounding": "stochastic", "seed": 3}
    options |= {"dtype": torch.bfloat16, "n": 3}
    for shape in ((19, 17), (10, 3, 2, 9)):
        (found, _), (expected, _) = (run(name, shape, 5, **options) for name in (backend, "eager"))
        for a, b, start in zip(found, expected, parameters(shape, 3, torch.bfloat16)):
            assert torch.equal(a, b)
            assert 0 < (a != start).float().mean() < 1


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_stochastic_rounding_of_real_updates(backend):
    """Where updates differ by round-off, a random number between them falls the other way: rarely."""
    options = {"bf16_rounding": "stochastic", "dtype": torch.bfloat16}
    (found, _), (expected, _) = (run(name, (19, 17), 5, **options) for name in (backend, "eager"))
    assert_like_rounded(found, expected)


def batches(optimizer):
    """The indices of the matrices that the last step took together."""
    (layout,) = optimizer._layouts.values()
    (part,) = layout.parts
    return part.batches


@both_rules
@both_optimizers
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=cpp_)])
def test_many_small_matrices_stay_within_the_bound(backend, cls, rule):
    """Their factors are most of what a step holds; the bound is of several batches."""
    bound, shapes = 200_000, [(8, 300), (300, 8)] * 12
    params = [nn.Parameter(0.02 * torch.randn(shape, device=DEVICE)) for shape in shapes]
    optimizer = cls(params, lr=LR, momentum_rank=2, update_rule=rule, backend=backend, temporary_bytes=bound)
    assert peak_of_a_step(optimizer, params) <= bound
    one_by_one = backend == "cpp" and cls is LoRAPreAdamW
    assert one_by_one or len(batches(optimizer)) > 2


@both_optimizers
@eager_and_cpp
def test_temporaries_of_interleaved_experts_stay_below_the_bound(cls, backend):
    """Kernels take copies of them: of a few parameters at a time, and for norms of one matrix at a time."""
    bound, params = 400_000, [nn.Parameter(0.02 * torch.randn(64, 6 * 48)) for _ in range(24)]
    optimizer = cls(
        [{"params": params, "experts": 6, "experts_dim": -1}],
        lr=LR, momentum_rank=2, backend=backend, temporary_bytes=bound,
    )  # fmt: skip
    assert 2 * sum(param.nbytes for param in params) > 5 * bound
    assert peak_of_a_step(optimizer, params) <= bound


@both_rules
def test_muon_takes_whole_matrices_a_few_at_a_time(rule):
    bound, params = 200_000, [nn.Parameter(0.02 * torch.randn(40, 40, device=DEVICE)) for _ in range(24)]
    optimizer = LoRAPreMuon(params, lr=LR, momentum_rank=1, update_rule=rule, temporary_bytes=bound)
    assert peak_of_a_step(optimizer, params) <= bound
    assert len(batches(optimizer)) == 1  # all of them in one, with 12 kB for each temporary


@both_rules
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_metrics(backend, rule):
    def recorded(name, prepare=undisturbed):
        optimizer = run(name, (19, 17), 5, 3, update_rule=rule, prepare=prepare, max_param_grad_norm=1e3)[1]
        optimizer.record_metrics = True
        params = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["max_param_grad_norm"] = 300.0  # which these gradients exceed
        take_steps(optimizer, params, *([20 * g for g in stream((19, 17), 1, seed=9 + i)] for i in range(2)))
        return optimizer.metrics()

    found, names = recorded(backend), ("captured_energy", "largest_update", "clamped_share")
    assert set(found) == set(names)
    assert_same_steps(
        (torch.tensor(found[name]) for name in names),
        lambda prepare: map(torch.tensor, map(recorded("eager", prepare).get, names)),
    )
    assert found["largest_update"] > 1
    assert (found["clamped_share"] > 0) == (rule == "als")


@pytest.mark.parametrize("backend", [BACKENDS[0], *BACKENDS[2:]])
def test_metrics_leave_out_a_gradient_that_is_not_used(backend):
    """Its entries are finite, and its square is not."""
    captured = []
    for size in (1e25, float("nan")):
        params, optimizer = run(backend, (19, 17), 2, 2)
        optimizer.record_metrics = True
        used, skipped = (stream((19, 17), 1, seed=9 + i) for i in range(2))
        take_steps(optimizer, params, used, [size * g for g in skipped])
        captured.append(optimizer.metrics()["captured_energy"])
    assert 0 < captured[0] < 1
    assert captured[0] == captured[1]


@pytest.mark.parametrize("k", [2, 17])
@pytest.mark.parametrize("backend", [BACKENDS[0], *BACKENDS[2:]])
def test_a_state_replaced_by_one_of_other_strides(backend, k):
    """As a conversion may leave it. Above rank 16 Triton has the row part alone."""
    expected = []
    for replaced in (False, True):
        params, optimizer = run(backend, (40, 40), k, 1, n=1)
        state = optimizer.state[params[0]]
        if replaced:
            for name in ("m_B", "m_A", "v_B", "v_A"):
                state[name] = state[name].mT.contiguous().mT
        take_steps(optimizer, params, stream((40, 40), 1, seed=7))
        expected.append([*params, *(state[name].contiguous() for name in sorted(state))])
    assert all(torch.equal(a, b) for a, b in zip(*expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_with_different_counts_share_a_bucket(monkeypatch, backend):
    """Bias corrections are each matrix's own."""
    grads = [stream((19, 17), 5, seed=i) for i in range(3)]
    late = [[g if t >= wait else None for t, g in enumerate(gs)] for wait, gs in zip((0, 1, 2), grads)]
    params, optimizer = run(backend, (19, 17), 5, n=3, grads=late)
    for i, (param, wait) in enumerate(zip(params, (0, 1, 2))):

        def alone(prepare, i=i, wait=wait):
            param = parameters((19, 17), 3)[i]
            take_steps(
                prepare(LoRAPreAdamW([param], lr=LR, momentum_rank=5, backend="eager")), [param], grads[i][wait:]
            )
            return [param]

        assert_same_steps([param], alone)
        assert optimizer.state[param]["step"] == 5 - wait


@both_optimizers
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(cls, backend):
    """Empty groups, empty parameters, steps without a gradient."""
    if cls is LoRAPreMuon and backend == "triton":
        pytest.skip("Muon has no kernels")
    empty, (param,) = nn.Parameter(torch.zeros(0, 4, device=DEVICE)), parameters((19, 17), 1)
    optimizer = cls([{"params": []}, {"params": [empty, param]}], lr=LR, momentum_rank=5, backend=backend)
    optimizer.step()
    empty.grad = torch.zeros_like(empty)
    optimizer.step()
    assert not optimizer.state
    assert torch.equal(param, parameters((19, 17), 1)[0])


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon], ids=["adamw", "muon"])
@eager_and_cpp
def test_torchs_default_dtype_changes_nothing(cls, backend):
    """Large enough that the C++ kernels split a matrix's rows, whose partial sums have tensors of their own."""

    def trained():
        param = nn.Parameter(torch.zeros(1024, 520, dtype=torch.float32))
        optimizer = cls([param], lr=0.1, momentum_rank=2, backend=backend)
        for step in range(3):
            param.grad = torch.randn(1024, 520, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
            optimizer.step()
        return param

    expected = trained()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = trained()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@skip_before("torch", "2.8", "refuses a gradient of another dtype than the parameter's")
@eager_and_cpp
def test_gradients_of_two_dtypes_in_one_bucket(backend):
    """torch lets one of two equal float32 matrices have a bfloat16 gradient (`grad_dtype`)."""

    def trained(dtypes, prepare=undisturbed):
        params = [nn.Parameter(torch.zeros(24, 16)) for _ in dtypes]
        optimizer = prepare(LoRAPreAdamW(params, lr=0.1, momentum_rank=2, backend=backend))
        for step in range(3):
            for i, (param, dtype) in enumerate(zip(params, dtypes)):
                param.grad_dtype = dtype
                grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(10 * step + i))
                param.grad = grad.bfloat16().to(dtype)
            optimizer.step()
        return params

    assert_same_steps(trained([torch.float32, torch.bfloat16]), lambda prepare: trained([torch.float32] * 2, prepare))
