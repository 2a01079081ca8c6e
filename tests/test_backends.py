"""Every backend against the oracle and against the eager one, and how one is chosen.

Where there is a CUDA device the tests run there; else Triton's kernels run in its interpreter (see conftest.py).
"""

import copy
import functools
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from stepping import CLOSE, LR, both_optimizers, both_rules, flat, newton_starts, stream, take_steps, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon, backends
from lorapre_peft.bucket import TEMPORARIES
from lorapre_peft.eager import UNROLLED
from lorapre_peft.memory import AllocationTracker

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [
    pytest.param(
        name, marks=pytest.mark.skipif(name not in backends.available(DEVICE), reason=f"{name} cannot run here")
    )
    for name in ("eager", "compiled", "triton", "cpp")
]
compiled_, triton_, cpp_ = (
    pytest.mark.skipif(*mark.args, **mark.kwargs) for mark in (b.marks[0] for b in BACKENDS[1:])
)
# Float32 sums in another order, on steps of 0.01: 2e-7 (als) and 5e-6 (newton, whose updates have no bound), measured.
LIKE_EAGER = {"als": {"rtol": 0, "atol": 1e-6}, "newton": {"rtol": 0, "atol": 2e-5}}
# No power of two divides these, and the first two are the smallest that are compressed. Few ranks, for each below 5 is a
# graph of its own to compile.
SHAPES = [((2, 3), 1), ((3, 2), 1), ((12, 40), 1), ((33, 31), 7), ((48, 40), 17), ((10, 3, 1, 9), 7)]


def parameters(shape, n=2, dtype=torch.float32):
    return [nn.Parameter(weights(*shape, seed=i, dtype=dtype).detach().to(DEVICE)) for i in range(n)]


def run(backend, shape, k, steps=4, n=2, cls=LoRAPreAdamW, dtype=torch.float32, grads=None, **options):
    """n matrices after some steps: (parameters, optimizer)."""
    params = parameters(shape, n, dtype)
    optimizer = cls(params, **{"lr": LR, "momentum_rank": k, "backend": backend} | options)
    take_steps(optimizer, params, *(grads or [stream(shape, steps, seed=i) for i in range(n)]))
    assert all(("m_B" in optimizer.state[param]) == (k > 0) for param in params)
    return params, optimizer


def assert_like_eager(found, expected, rule="als", state_rtol=1e-4):
    """Parameters within `LIKE_EAGER`; factors, by their products, to ``state_rtol`` of their largest entry."""
    for a, b in zip(found[0], expected[0]):
        torch.testing.assert_close(a, b, **LIKE_EAGER[rule])
        for moment in expected[1].moments:
            x, y = (
                o.state[p][f"{moment}_B"] @ o.state[p][f"{moment}_A"] for p, o in ((a, found[1]), (b, expected[1]))
            )
            torch.testing.assert_close(x, y, rtol=0, atol=state_rtol * y.abs().max().item())
        assert found[1].state[a]["step"] == expected[1].state[b]["step"]


def peak_of_a_step(optimizer, params):
    """Bytes of the temporaries of the third step."""
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        with AllocationTracker() as tracker:
            optimizer.step()
    return tracker.peak_bytes


@pytest.fixture
def fresh(monkeypatch):
    """Backends are made once in a process; not for this test."""
    for name in ("_made", "_automatic"):
        monkeypatch.setattr(backends, name, functools.cache(getattr(backends, name).__wrapped__))


# ---- numbers --------------------------------------------------------------------------------------------------------


@both_rules
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_equals_oracle_and_eager(backend, shape, k, rule):
    if backend == "compiled" and (shape == (3, 2) or (rule == "newton" and k == 1)):
        pytest.skip("one more graph to compile for nothing new")
    grads = [stream(shape, 4, seed=i) for i in range(2)]
    options = {"update_rule": rule, "weight_decay": 0.1, "grads": grads}
    found = run(backend, shape, k, **options)
    assert_like_eager(found, run("eager", shape, k, **options), rule)
    start = parameters(shape)
    starts = (
        newton_starts(LoRAPreAdamW(start, momentum_rank=k, update_rule=rule))
        if rule == "newton"
        else [(None,) * 2] * 2
    )
    for param, before, g, factors in zip(found[0], start, grads, starts):
        truth = oracle.Adam(rule, k, starts=factors)
        theta = before.detach().double().cpu().numpy().reshape(shape[0], -1)
        expected = oracle.train(truth, theta, flat(g), LR, 0.1)[-1]
        tolerance = CLOSE if rule == "als" else {"rtol": 0, "atol": 5e-5}  # 2.4e-5 at k = 17: updates without bound
        np.testing.assert_allclose(param.detach().cpu().reshape(shape[0], -1), expected, **tolerance)


@both_rules
@compiled_
def test_compiled_muon_equals_eager(rule):
    """The eager one is held against the oracle in test_steps.py."""
    options = {"cls": LoRAPreMuon, "update_rule": rule, "nesterov": True}
    for shape, k in ((19, 17), 5), ((48, 40), 17):
        assert_like_eager(run("compiled", shape, k, **options), run("eager", shape, k, **options), "newton")


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
    assert_like_eager(run(backend, shape, k, **options), run("eager", shape, k, **options))
    assert (
        not torch.equal(run(backend, shape, k, 2, **options)[0][0], run("eager", shape, k, 2)[0][0])
        or "tiles" in options
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_half_precision(backend, dtype):
    """The last bit may fall the other way where an update lies between two numbers: for one entry in a hundred at most."""
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds to nearest")
    (found, _), (expected, _) = (run(name, (19, 17), 5, dtype=dtype) for name in (backend, "eager"))
    for a, b in zip(found, expected):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
        assert (a != b).float().mean() < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_weights_keep_their_digits(backend):
    """θ(1 − 2⁻¹⁰) to 1e-9, where rounding a weight of 2 to float32 would cost 6e-8; and the ordinary update beside it."""
    (found, optimizer), (narrow, _) = (
        run(backend, (19, 17), 5, dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    for a, b in zip(found, narrow):
        assert a.dtype == torch.float64
        assert {value.dtype for value in optimizer.state[a].values()} == {torch.float32}
        torch.testing.assert_close(a, b.double(), rtol=0, atol=1e-6)
    decaying = {"lr": 2.0**-5, "weight_decay": 2.0**-5, "update_scale": 1e-30}
    for a, start in zip(
        run(backend, (19, 17), 5, 2, dtype=torch.float64, **decaying)[0], parameters((19, 17), dtype=torch.float64)
    ):
        torch.testing.assert_close(a, start * (1 - 2.0**-10) ** 2, rtol=0, atol=1e-9)


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
        plain, _ = run(backend, shape, 5, n=n, grads=grads)
        turned = [nn.Parameter(turn(param.detach())) for param in parameters(shape, n)]
        take_steps(
            LoRAPreAdamW(turned, lr=LR, momentum_rank=5, backend=backend),
            turned,
            *([turn(g) for g in gs] for gs in grads),
        )
        for a, b in zip(turned, plain):
            assert not a.is_contiguous()
            torch.testing.assert_close(a, b, **LIKE_EAGER["als"])


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_stochastic_rounding_bit_for_bit(backend):
    """The same random bits fall on the same entries. θ(1 − 2⁻¹⁰) needs no rounding in float32, the update adds nothing."""
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
    for a, b in zip(found, expected):
        assert (a != b).float().mean() < 0.01
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-3)


@both_rules
@both_optimizers
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=cpp_)])
def test_many_small_matrices_stay_within_the_bound(backend, cls, rule):
    """Their factors are most of what a step holds; the bound is of several waves."""
    bound, shapes = 200_000, [(8, 300), (300, 8)] * 12
    params = [nn.Parameter(0.02 * torch.randn(shape, device=DEVICE)) for shape in shapes]
    optimizer = cls(params, lr=LR, momentum_rank=2, update_rule=rule, backend=backend, temporary_bytes=bound)
    assert peak_of_a_step(optimizer, params) <= bound
    assert len(optimizer._plans[0].waves) > 1


@both_rules
def test_muon_takes_whole_matrices_a_few_at_a_time(rule):
    bound, params = 200_000, [nn.Parameter(0.02 * torch.randn(40, 40, device=DEVICE)) for _ in range(24)]
    optimizer = LoRAPreMuon(params, lr=LR, momentum_rank=1, update_rule=rule, temporary_bytes=bound)
    assert peak_of_a_step(optimizer, params) <= bound
    assert len(optimizer._plans[0].waves) == 1  # all of them in one bucket, with 154 kB for each temporary


@both_rules
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_metrics(backend, rule):
    def recorded(name):
        optimizer = run(name, (19, 17), 5, 3, update_rule=rule)[1]
        optimizer.record_metrics = True
        params = optimizer.param_groups[0]["params"]
        take_steps(optimizer, params, *([20 * g for g in stream((19, 17), 1, seed=9 + i)] for i in range(2)))
        return optimizer.metrics()

    found, expected = recorded(backend), recorded("eager")
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected["largest_update"] > 1
    assert (expected["clamped_share"] > 0) == (rule == "als")


@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_with_different_counts_share_a_bucket(monkeypatch, backend):
    """Bias corrections are each matrix's own."""
    grads = [stream((19, 17), 5, seed=i) for i in range(3)]
    late = [[g if t >= wait else None for t, g in enumerate(gs)] for wait, gs in zip((0, 1, 2), grads)]
    params, optimizer = run(backend, (19, 17), 5, n=3, grads=late)
    for i, (param, wait) in enumerate(zip(params, (0, 1, 2))):
        alone = parameters((19, 17), 3)[i]
        single = LoRAPreAdamW([alone], lr=LR, momentum_rank=5, backend="eager")
        take_steps(single, [alone], grads[i][wait:])
        torch.testing.assert_close(param, alone, **LIKE_EAGER["als"])
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


# ---- Triton ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "k"), [((70, 12), 2), ((9, 140), 3)], ids=["blocks of rows", "blocks of columns"])
@triton_
def test_blocks_equal_one_block(monkeypatch, shape, k):
    """Rows split among programs and walked through by one, both in more than one block."""
    from lorapre_peft import triton_backend

    K, BP, BQ = triton_backend.block_sizes(*shape, k)
    assert shape[0] > BP or shape[1] > BQ
    assert k <= K
    expected = run("eager", shape, k, 3)
    split = run("triton", shape, k, 3)
    monkeypatch.setattr(triton_backend, "PROGRAMS", 1)
    walked = run("triton", shape, k, 3)
    assert_like_eager(split, expected)
    assert_like_eager(walked, expected)


@triton_
def test_ranks_beyond_the_kernels_are_eager(monkeypatch, fresh):
    from lorapre_peft import triton_backend

    monkeypatch.setattr(triton_backend, "MAX_RANK", 4)
    with pytest.warns(UserWarning, match=r"momentum rank 5 is above the Triton kernels' 4: eager") as said:
        found, _ = run("triton", (19, 17), 5)
    assert len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, run("eager", (19, 17), 5)[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("triton", (19, 17), 5)


@triton_
def test_muon_has_no_kernels():
    with pytest.raises(ValueError, match="backend='triton'"):
        LoRAPreMuon(parameters((19, 17)), backend="triton")


# ---- C++ ------------------------------------------------------------------------------------------------------------


@cpp_
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "k"), [((11, 300), 7), ((300, 12), 7), ((530, 9), 1)], ids=str)
def test_matrices_longer_than_a_block(shape, k, dtype):
    for options in {}, {"bf16_rounding": "stochastic", "maximize": True}:
        found, expected = (run(name, shape, k, dtype=dtype, **options) for name in ("cpp", "eager"))
        if dtype == torch.float32:
            assert_like_eager(found, expected)
        for a, b in zip(found[0], expected[0]):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
            assert (a != b).float().mean() < 0.01 or dtype == torch.float32


@cpp_
@pytest.mark.parametrize(("shape", "k"), [((70, 40), 3), ((600, 12), 2)], ids=str)
def test_rows_split_among_threads(monkeypatch, shape, k):
    """The parts are cut by shape alone, so that the number of threads does not show in a single bit; LAPACK's may."""
    from lorapre_peft import cpp_backend

    options = {"n": 3, "update_rule": "newton"}  # no SVD at the start, and for k < 5 no Cholesky
    expected, whole = (run(name, shape, k, 3, **options) for name in ("eager", "cpp"))
    monkeypatch.setattr(cpp_backend, "SPLIT_ENTRIES", 500)
    # The sums of all matrices at once, and of fewer.
    for size in (64_000_000, 2 * 4 * 2 * shape[0] * shape[1]):
        parts = []
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            parts.append(run("cpp", shape, k, 3, temporary_bytes=size, **options))
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(parts[0][0], parts[1][0]))
        assert not all(torch.equal(a, b) for a, b in zip(parts[0][0], whole[0]))
        assert_like_eager(parts[0], expected, "newton")


@cpp_
def test_sums_of_split_rows_stay_within_the_bound(monkeypatch):
    from lorapre_peft import cpp_backend

    monkeypatch.setattr(cpp_backend, "SPLIT_ENTRIES", 500)  # as many parts as there may be: 270 kB of sums a matrix
    bound, params = 200_000, [nn.Parameter(0.02 * torch.randn(64, 512)) for _ in range(2)]
    optimizer = LoRAPreAdamW(params, lr=LR, momentum_rank=4, backend="cpp", temporary_bytes=bound)
    assert peak_of_a_step(optimizer, params) <= bound


@cpp_
def test_kernels_that_do_not_compile_are_named(monkeypatch, fresh, tmp_path):
    """A compiler that fails: an error where the backend was asked for, a warning and the eager one where it was not."""
    from lorapre_peft import cpp_backend

    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no such instruction >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_backend, "library", functools.cache(cpp_backend.library.__wrapped__))
    with pytest.raises(RuntimeError, match=r"could not be compiled to .* with .*g\+\+ .*no such instruction"):
        run("cpp", (19, 17), 5)
    with pytest.warns(
        UserWarning, match=r"backend 'cpp' does not start, so a slower one is used.*no such instruction"
    ):
        found, _ = run("auto", (19, 17), 5)
    assert all(torch.equal(a, b) for a, b in zip(found, run("eager", (19, 17), 5)[0]))


@cpp_
def test_kernels_that_do_not_load_are_named(monkeypatch, fresh):
    """A cache where nothing may be executed, a library that is missing: what the compiler does not see."""
    from lorapre_peft import cpp_backend

    def refuse(path):
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(cpp_backend.ctypes, "CDLL", refuse)
    monkeypatch.setattr(cpp_backend, "library", functools.cache(cpp_backend.library.__wrapped__))
    with pytest.warns(UserWarning, match=r"backend 'cpp' does not start.*failed to map segment"):
        run("auto", (19, 17), 5)


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon], ids=["adamw", "muon"])
@pytest.mark.parametrize("backend", ["cpp", "eager"])
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


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_gradients_of_two_dtypes_in_one_bucket(backend):
    """torch lets one of two equal float32 matrices have a bfloat16 gradient (`grad_dtype`)."""

    def trained(dtypes):
        params = [nn.Parameter(torch.zeros(24, 16)) for _ in dtypes]
        optimizer = LoRAPreAdamW(params, lr=0.1, momentum_rank=2, backend=backend)
        for step in range(3):
            for i, (param, dtype) in enumerate(zip(params, dtypes)):
                param.grad_dtype = dtype
                grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(10 * step + i))
                param.grad = grad.bfloat16().to(dtype)
            optimizer.step()
        return params

    for found, expected in zip(trained([torch.float32, torch.bfloat16]), trained([torch.float32] * 2)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_device_without_float64_is_refused():
    with pytest.raises(NotImplementedError, match=r"no backend runs on mps: eager needs float64.*Train on a CPU"):
        backends.choose("auto", torch.device("mps"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("k", [1, 100])
def test_triton_kernels_compile_for_a_gpu(k, tmp_path):
    """For compute capability 8.9, without one: in a process without the interpreter. k = 1 comes as a constant there."""
    code = Path(__file__).with_name("compile_triton.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    found = subprocess.run([sys.executable, code, str(k)], capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    sizes = json.loads(found.stdout.splitlines()[-1])
    assert len(sizes) == 2
    assert max(sizes) <= 99 * 1024


# ---- compilation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch, fresh):
    """The graphs that torch.compile traces from now on; they are run uncompiled. A graph break would raise (fullgraph)."""
    traced = []

    def keep(graph, _):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    torch._dynamo.reset()
    yield traced
    torch._dynamo.reset()


@both_optimizers
@both_rules
def test_no_recompile_as_numbers_change(graphs, cls, rule):
    """A schedule of lr, weight decay and betas, the step count, the clipping: none of them is in a graph."""
    params = parameters((19, 17))
    optimizer = cls(params, lr=LR, momentum_rank=5, update_rule=rule, backend="compiled")
    group, grads = optimizer.param_groups[0], [stream((19, 17), 8, seed=i) for i in range(2)]
    decay = "betas" if cls is LoRAPreAdamW else "momentum"
    changes = [{}, {}, {"lr": 0.5}, {"lr": torch.tensor(0.1)}, {"weight_decay": 0.3}, {"max_param_grad_norm": 1.0}]
    changes += [{decay: (0.5, 0.9) if decay == "betas" else 0.5}, {"update_scale": 0.1}]
    functions = 8 if cls is LoRAPreAdamW else 7  # of `moments` and `eager`; Adam's scalars are the eighth
    for t, change in enumerate(changes):
        group.update(change)
        take_steps(optimizer, params, *([g[t]] for g in grads))
        assert len(graphs) == (0 if t == 0 and rule == "als" else functions)


def test_few_graphs_for_many_shapes(graphs):
    """A set for all shapes, numbers of matrices and ranks above `UNROLLED`, one for a matrix alone, one for each lower rank."""
    # Not two matrices first: their number would be taken for that of the moments.
    for n, shape, k in (3, (33, 31), 7), (2, (19, 17), 5), (2, (48, 40), 17), (5, (20, 300), 5), (2, (10, 3, 3, 3), 5):
        run("compiled", shape, k, 2, n=n)
        assert len(graphs) == 8
    for n, k in (1, 5), (2, 1), (2, UNROLLED):
        before = len(graphs)
        run("compiled", (19, 17), k, n=n)
        first = len(graphs)
        assert before < first <= before + 8
        run("compiled", (48, 40), k, n=n)
        assert len(graphs) == first


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.fixture
def without_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "triton" else find(name, *args)
    )


@cpp_
def test_auto_is_the_fastest(monkeypatch, fresh):
    assert backends.choose("auto", torch.device("cpu")) is backends.choose("cpp", torch.device("cpu"))
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    backends._automatic.cache_clear()
    assert backends.choose("auto", torch.device("cpu")) is backends.choose("eager", torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    assert backends.available("cuda") == ["triton", "eager", "compiled"]


def test_cpp_needs_a_cpu():
    with pytest.raises(ValueError, match=r"backend='cpp' needs a CPU under Linux, found cuda"):
        backends.choose("cpp", torch.device("cuda"))


def test_without_triton_auto_is_eager(without_triton, fresh):
    """A missing package costs speed only."""
    assert backends.available("cuda:0") == ["eager"]
    assert type(backends.choose("auto", torch.device("cuda:0"))) is backends.Eager
    for name in ("triton", "compiled"):
        with pytest.raises(
            ValueError, match=rf"backend='{name}' needs the package triton.*Use backend='auto'.*\['eager'\]"
        ):
            backends.choose(name, torch.device("cuda:0"))


def test_triton_needs_a_cuda_device(monkeypatch, fresh):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' needs a CUDA device, found cpu"):
        backends.choose("triton", torch.device("cpu"))


def test_compiled_needs_a_compiler(monkeypatch, fresh):
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert "compiled" not in backends.available("cpu")
    with pytest.raises(ValueError, match=r"backend='compiled' needs a C\+\+ compiler"):
        backends.choose("compiled", torch.device("cpu"))


@both_optimizers
def test_unknown_backend(cls):
    with pytest.raises(ValueError, match=r"backend='cuda': expected one of 'auto', .*'eager', 'compiled'"):
        cls(parameters((19, 17)), backend="cuda")


@both_optimizers
def test_backend_travels_with_copies_but_not_in_checkpoints(cls):
    """A run may resume on another machine."""
    _, optimizer = run("eager", (19, 17), 5, cls=cls)
    saved = optimizer.state_dict()
    assert all("backend" not in group for group in saved["param_groups"])
    assert set(saved) == {"state", "param_groups"}
    other = cls(parameters((19, 17)), momentum_rank=5, backend="compiled")
    other.load_state_dict(saved)
    assert other.backend == "compiled"
    assert copy.deepcopy(other).backend == "compiled"
    assert pickle.loads(pickle.dumps(other)).backend == "compiled"
