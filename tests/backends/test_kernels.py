"""What only one backend has: blocks and ranks of Triton's kernels, threads of the C++ ones."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import types
import unittest.mock
import warnings
from pathlib import Path

import pytest
import torch
from backend_runs import (
    assert_like_eager,
    assert_like_rounded,
    cpp_,
    parameters,
    peak_of_a_step,
    run,
    tensors,
    triton_,
)
from roundoff import assert_same_steps, gamma
from stepping import LR, both_optimizers, both_rules, stream, take_steps, weights
from torch import nn
from versions import skip_before

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.kernels import cpp as cpp_backend
from lorapre_peft.memory.peak import AllocationTracker

# ---- Triton ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "k"),
    [((70, 12), 2), ((9, 300), 3), ((150, 70), 8)],
    ids=["narrow", "blocks of columns", "blocks of rows"],
)
@triton_
def test_blocks_equal_one_block(monkeypatch, shape, k):
    """Rows split among programs and walked through by one; factors in several parts and in one."""
    from lorapre_peft.kernels.gpu import backend as triton_backend

    options = dict(second_momentum_rank=k, n=1)
    for sizes in ({"SPLIT_ROWS": 1, "PART": 64, "MAX_BLOCKS": 2}, {"PROGRAMS": 1, "PART": 4096}):
        for name, size in sizes.items():
            monkeypatch.setattr(triton_backend, name, size)
        assert_like_eager(run("triton", shape, k, 2, **options), shape, k, 2, **options)


@triton_
def test_matrices_share_launches_and_bits(monkeypatch):
    """Matrices of two groups in one launch, and each in a launch of its own."""
    from lorapre_peft.kernels.gpu import backend as triton_backend

    def steps():
        params = parameters((33, 31), 3)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": LR / 2, "betas": (0.8, 0.9)}]
        optimizer = LoRAPreAdamW(groups, lr=LR, momentum_rank=3, backend="triton")
        take_steps(optimizer, params, *(stream((33, 31), 4, seed=i) for i in range(3)))
        return [*params, *(value for param in params for value in optimizer.state[param].values())]

    launches, launch = [], triton_backend._launch
    monkeypatch.setattr(triton_backend, "_launch", lambda *args: launches.append(1) or launch(*args))
    together = steps()
    assert len(launches) == 4
    monkeypatch.setattr(triton_backend, "_matrices_at_once", lambda kind: 1)
    assert all(torch.equal(a, b) for a, b in zip(together, steps()))
    assert len(launches) == 4 + 4 * 3


@pytest.mark.parametrize("ranks", [(1, 1), (8, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (11008, 4096), (8, 4096), (4096, 8), (32, 32)])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_temporaries_of_a_launch_stay_within_the_bound_and_use_it(monkeypatch, shape, ranks):
    """The allocations of a launch whose kernels do nothing, on the meta device."""
    from lorapre_peft.kernels.gpu import backend as triton_backend

    for module in ("factors", "numbers", "passes"):
        monkeypatch.setattr(triton_backend, module, unittest.mock.MagicMock())
    bound = 64_000_000
    kind = triton_backend.Kind(shape, ranks, torch.float32, torch.float32, False, bound)
    n = triton_backend._matrices_at_once(kind)
    rows = torch.empty(8, n, dtype=torch.int64, device="meta")
    table = types.SimpleNamespace(names=("v_energy",), group_numbers=rows[0], positions=rows[0])
    numbers = torch.empty(15, 1, dtype=torch.float64, device="meta")
    found, every = torch.empty(n, 2, dtype=torch.float64, device="meta"), slice(0, n)
    with AllocationTracker() as tracker:
        triton_backend._launch(kind, table, (rows[0], rows[0], rows), True, numbers, found, every, None)
    assert bound / 3 < tracker.peak_bytes <= bound


@pytest.mark.parametrize("size", [1e-20, 1e-16, 1e16], ids="{:g}".format)
@triton_
def test_norms_of_any_size(size):
    """Squares that float32 does not hold are summed on another scale; v's energy is what every other backend keeps."""
    (_, found), (_, expected) = (
        run(name, (19, 17), 2, 2, grads=[[g * size for g in stream((19, 17), 2)]], n=1) for name in ("triton", "eager")
    )
    (a,), (b,) = (optimizer.state.values() for optimizer in (found, expected))
    torch.testing.assert_close(a["v_energy"], b["v_energy"], rtol=2 * gamma(19 * 17), atol=0)


@pytest.mark.parametrize(
    ("rule", "k_v", "options"),
    [("als", 1, {}), ("als", 3, {"maximize": True, "max_param_grad_norm": 0.5}), ("newton", None, {})],
    ids=["als", "als, clipped and maximized", "newton"],
)
@triton_
def test_bfloat16_on_tensor_cores(bfloat16_products, rule, k_v, options):
    shape, k = (200, 150), 8
    options = options | dict(dtype=torch.bfloat16, n=1, update_rule=rule, second_momentum_rank=k_v)
    found, expected = (run(name, shape, k, **options) for name in ("triton", "eager"))
    assert_like_rounded(found[0], expected[0])
    assert_same_steps(
        tensors([], found[1]), lambda prepare: tensors([], run("eager", shape, k, prepare=prepare, **options)[1])
    )


@triton_
def test_rows_alone_equal_eager(monkeypatch):
    """Ranks above those of the step's kernels take the kernels of the row part, in more than one block and in one."""
    from lorapre_peft.kernels.gpu import backend as triton_backend
    from lorapre_peft.kernels.gpu import rows as triton_rows

    monkeypatch.setattr(triton_backend, "MAX_RANK", 2)
    shapes = [(70, 12), (9, 140)]
    for shape in shapes:
        assert_like_eager(run("triton", shape, 3, 3), shape, 3, 3)
    monkeypatch.setattr(triton_rows, "PROGRAMS", 1)
    for shape in shapes:
        assert_like_eager(run("triton", shape, 3, 3), shape, 3, 3)


@triton_
def test_ranks_beyond_the_kernels_are_eager(monkeypatch, fresh_backends):
    from lorapre_peft.kernels.gpu import backend as triton_backend
    from lorapre_peft.kernels.gpu import rows as triton_rows

    monkeypatch.setattr(triton_backend, "MAX_RANK", 4)
    monkeypatch.setattr(triton_rows, "MAX_ROW_RANK", 4)
    with pytest.warns(UserWarning, match=r"momentum rank 5 is above 4, .* momentum_rank=4 or less is fast") as said:
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


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler takes minutes of one core
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@skip_before("triton", "3.4", "cannot compile for a GPU that is not there where a number is a constant")
def test_triton_kernels_compile_for_a_gpu(tmp_path):
    """For compute capabilities 8.0, 8.9 and 9.0, without one: in a process without the interpreter. Up to rank 32 no
    thread holds more than its registers. Each capability has a path of its own for bfloat16 alone.
    """
    code = Path(__file__).parents[1] / "helpers" / "compile_triton.py"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    cases = ["8x4096:2,1:float32:80", "4096x8:2,1:float32:89", "64x4096:16,1:float32:80"]
    of_rows = ["512x512:32,1:bfloat16:80", "512x512:100,100:float32:89"]
    found = subprocess.run(
        [sys.executable, code, "4096x4096:8,1:bfloat16", *cases, *of_rows],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    kernels = json.loads(found.stdout.splitlines()[-1])
    assert len(kernels) == 9 * (3 + len(cases)) + 2 * len(of_rows)
    assert all(kernel["shared"] <= 99 * 1024 for kernel in kernels.values())
    assert not any(kernel["spilled"] for name, kernel in kernels.items() if "100,100" not in name)


# ---- C++ ------------------------------------------------------------------------------------------------------------


@cpp_
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "k"), [((11, 600), 7), ((300, 12), 7), ((530, 9), 1), ((70, 140), 17)], ids=str)
def test_matrices_longer_than_a_block(shape, k, dtype):
    """More columns or rows than are taken at once, with few ranks and with as many as are packed side by side."""
    equal = {"second_momentum_rank": k}
    for options in {}, equal | {"bf16_rounding": "stochastic", "maximize": True}:
        found = run("cpp", shape, k, dtype=dtype, **options)
        if dtype == torch.float32:
            assert_like_eager(found, shape, k, **options)
        else:
            assert_like_rounded(found[0], run("eager", shape, k, dtype=dtype, **options)[0])


@cpp_
def test_small_gradients_are_squared_in_float64():
    """Gradients of a norm below `SMALL_SQUARE`, by far above what v of float32 can hold."""
    shape, k = (40, 48), 3
    grads = [[g * 2.0**-45 for g in stream(shape, 4, seed=i)] for i in range(2)]
    found = run("cpp", shape, k, grads=grads, eps=0.0)[0]
    assert_same_steps(found, lambda prepare: run("eager", shape, k, prepare=prepare, grads=grads, eps=0.0)[0])
    assert all((a != b).any() for a, b in zip(found, parameters(shape)))


@cpp_
@both_rules
@pytest.mark.parametrize(("shape", "k"), [((70, 40), 3), ((600, 12), 2)], ids=str)
def test_rows_split_among_threads(monkeypatch, rule, shape, k):
    """The parts are cut by shape alone, so that the number of threads does not show in a single bit."""
    options = {"n": 3, "update_rule": rule}
    whole, _ = run("cpp", shape, k, 3, **options)
    monkeypatch.setattr(cpp_backend, "SPLIT_ENTRIES", 500)
    # The sums of all matrices at once, and of fewer.
    for size in (64_000_000, 2 * 4 * 2 * shape[0] * shape[1]):
        one, three = (run_in(threads, shape, k, temporary_bytes=size, **options) for threads in (1, 3))
        assert all(map(torch.equal, one[0], three[0]))
        assert not all(map(torch.equal, one[0], whole))
        assert_like_eager(one, shape, k, 3, **options)


@cpp_
@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
def test_parts_without_rows(monkeypatch, cls):
    """Nine rows in eight parts of two leave three parts empty."""
    monkeypatch.setattr(cpp_backend, "SPLIT_ENTRIES", 9 * 40 // 8)
    monkeypatch.setattr(cpp_backend, "MOMENTA_SPLIT_ENTRIES", 9 * 40 // 8)
    assert_like_eager(run("cpp", (9, 40), 2, cls=cls), (9, 40), 2, cls=cls)


def run_in(threads, shape, k, **options):
    """Three steps in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run("cpp", shape, k, 3, **options)
    finally:
        torch.set_num_threads(before)


@cpp_
@both_rules
def test_one_call_steps_all_and_company_does_not_show(monkeypatch, rule):
    """Matrices of many shapes and groups take one call a step, and each the same bits as alone."""
    shapes, calls = [(40, 24), (24, 40), (40, 24), (300, 8), (8, 300), (8, 5, 3, 3)], []
    step = cpp_backend.Cpp.step
    monkeypatch.setattr(cpp_backend.Cpp, "step", lambda self, *args: calls.append(args) or step(self, *args))
    grads = [stream((*shape[:1], math.prod(shape[1:])), 4, seed=i) for i, shape in enumerate(shapes)]
    grads = [[g.view(shape) for g in some] for shape, some in zip(shapes, grads)]

    def trained(numbers):
        params = [weights(*shape, seed=i) for i, shape in enumerate(shapes)]
        groups = [{"params": [param], "lr": LR / (i + 1)} for i, param in enumerate(params)]
        optimizer = LoRAPreAdamW(groups, momentum_rank=2, update_rule=rule, backend="cpp")
        take_steps(optimizer, params, *(some if i in numbers else [None] * 4 for i, some in enumerate(grads)))
        return params

    together = trained(range(len(shapes)))
    assert len(calls) == 4
    assert all(torch.equal(param, trained([i])[i]) for i, param in enumerate(together))


@cpp_
@both_rules
@pytest.mark.parametrize("moved", ["one tensor replaced", "all tensors of a parameter replaced", "other memory"])
def test_state_may_move_between_steps(rule, moved):
    """The kernels read and write the state where it lies now, not where it lay in the last step."""

    def trained(move):
        params = [weights(20, 12, seed=i) for i in range(3)]
        optimizer = LoRAPreAdamW(params, lr=LR, momentum_rank=3, update_rule=rule, backend="cpp")
        for step in range(4):
            take_steps(optimizer, params, *(stream((20, 12), 4, seed=i)[step : step + 1] for i in range(3)))
            if step == 1:
                move(optimizer.state[params[1]])
        return [*params, *(value for param in params for value in optimizer.state[param].values())]

    def move(state):
        for name in ["m_A"] if moved == "one tensor replaced" else list(state):
            if moved == "other memory":
                state[name].data = state[name].clone()
            else:
                state[name] = state[name].clone()

    assert all(map(torch.equal, trained(move), trained(lambda state: None)))


@cpp_
@both_optimizers
def test_freed_memory_is_an_error(cls):
    """A tool that frees a gradient's storage and leaves the tensor would have the kernels read address 0."""
    param = weights(20, 12)
    param.grad = torch.ones(20, 12)
    param.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="without memory"):
        cls([param], lr=LR, momentum_rank=3, backend="cpp").step()


@cpp_
@both_rules
@pytest.mark.parametrize(
    ("shape", "k"), [((19, 17), 5), ((600, 12), 4), ((11, 600), 7), ((70, 140), 17), ((10, 3, 1, 9), 7)], ids=str
)
def test_muons_kernel_equals_eager(rule, shape, k):
    """Narrow and wide matrices, one and more blocks of rows and of columns, with few ranks and with packed ones."""
    for options in (
        {"nesterov": True, "weight_decay": 0.1},
        {"maximize": True, "max_param_grad_norm": 3.0, "momentum": 0.8},
        {"residual_weight": 0.3 if rule == "als" else None, "dtype": torch.bfloat16, "bf16_rounding": "nearest"},
    ):
        options |= {"cls": LoRAPreMuon, "update_rule": rule, "n": 3}
        found = run("cpp", shape, k, **options)
        assert_like_eager(found, shape, k, **options)


@cpp_
@pytest.mark.parametrize("threads", [1, 3])
def test_muons_rows_split_among_threads(monkeypatch, threads):
    """The factors, which nothing but the kernel makes, are the same in every bit."""
    monkeypatch.setattr(cpp_backend, "MOMENTA_SPLIT_ENTRIES", 500)
    options = {"n": 3, "cls": LoRAPreMuon}
    (params, one), (others, other) = (run_in(count, (70, 40), 3, **options) for count in (1, threads))
    for a, b in zip(params, others):
        assert all(torch.equal(one.state[a][name], other.state[b][name]) for name in ("step", "m_B", "m_A"))
    assert_like_eager((others, other), (70, 40), 3, 3, **options)


@cpp_
def test_sums_of_split_rows_stay_within_the_bound(monkeypatch):
    monkeypatch.setattr(cpp_backend, "SPLIT_ENTRIES", 500)  # as many parts as there may be: 270 kB of sums a matrix
    bound, params = 200_000, [nn.Parameter(0.02 * torch.randn(64, 512)) for _ in range(2)]
    optimizer = LoRAPreAdamW(params, lr=LR, momentum_rank=4, backend="cpp", temporary_bytes=bound)
    assert peak_of_a_step(optimizer, params) <= bound


@cpp_
def test_kernels_that_do_not_compile_are_named(monkeypatch, fresh_backends, tmp_path):
    """A compiler that fails: an error where the backend was asked for, a warning and the eager one where it
    was not.
    """
    from lorapre_peft.kernels import cpp as cpp_backend

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
def test_kernels_that_do_not_load_are_named(monkeypatch, fresh_backends):
    """A cache where nothing may be executed, a library that is missing: what the compiler does not see."""
    from lorapre_peft.kernels import cpp as cpp_backend

    def refuse(path):
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(cpp_backend.ctypes, "CDLL", refuse)
    monkeypatch.setattr(cpp_backend, "library", functools.cache(cpp_backend.library.__wrapped__))
    with pytest.warns(UserWarning, match=r"backend 'cpp' does not start.*failed to map segment"):
        run("auto", (19, 17), 5)
