"""The host reads nothing that a step computes, the first one included: a GPU would have to wait, and no CUDA graph
could hold it.

On a CPU reads are free and the ordinary path makes them; here they are refused, and every bit must be the ordinary
path's.
"""

import sys
import warnings

import pytest
import torch
from backend_runs import triton_
from roundoff import gamma
from stepping import LR, both_optimizers, both_rules, stream, take_steps, weights
from torch.utils._python_dispatch import TorchDispatchMode

from lorapre_peft import LoRAPreAdamW

# A bucket of three matrices, one of a single convolution, and the AdamW path.
SHAPES = [(20, 12), (20, 12), (20, 12), (8, 3, 2, 2), (12,), ()]
STEPS = 6
REFUSED = {
    "_local_scalar_dense": "item, float, int, bool",
    "nonzero": "a shape that depends on values",
    "masked_select": "a shape that depends on values",
    "equal": "a comparison on the host",
}
# A list of indices has to be copied to the device: in no CUDA graph.
COPIED = dict.fromkeys(("index", "index_put_", "index_select"), "indices from the host")
BAD = {(1, 3): float("nan"), (4, 3): float("inf"), (2, 4): float("-inf"), (3, 4): float("nan"), (5, 5): float("nan")}


class NoReads(TorchDispatchMode):
    """Refuses what makes a GPU wait, but not to torch's own AdamW and Triton's interpreter, which wait on a
    CPU alone.
    """

    def __init__(self, refused=REFUSED):
        super().__init__()
        self.refused = refused

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.refused and not called_from("/torch/optim/", "/triton/"):
            raise AssertionError(f"{name}: {self.refused[name]}")
        return func(*args, **(kwargs or {}))


def called_from(*folders):
    frame = sys._getframe(2)
    while frame is not None and "/lorapre_peft/" not in frame.f_code.co_filename:
        if any(folder in frame.f_code.co_filename for folder in folders):
            return True
        frame = frame.f_back
    return False


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Reads wait, as `reads_are_free` knows of a GPU; those that bypass the dispatcher on a CPU raise here."""

    def refuse(*_):
        raise AssertionError("read by the host")

    def begin():
        for module in ("optim.base", "lowrank.moments"):
            monkeypatch.setattr(f"lorapre_peft.{module}.reads_are_free", lambda device: False)
        for name in ("tolist", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, refuse)

    yield begin
    monkeypatch.undo()


def streams(bad=()):
    """Gradients of every parameter; those in ``bad``, {(parameter, step): value}, hold one entry that is not
    finite.
    """
    found = [stream(shape if len(shape) > 1 else (20, 12), STEPS, seed=i) for i, shape in enumerate(SHAPES)]
    found = [
        [g.flatten()[: shape.numel()].view(shape).clone() for g in grads]
        for shape, grads in zip(map(torch.Size, SHAPES), found)
    ]
    for (i, step), value in dict(bad).items():
        found[i][step].view(-1)[0] = value
    return found


def build(cls, dtype=torch.float32, **options):
    params = [weights(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
    return params, cls(params, **{"lr": LR, "momentum_rank": 2, "weight_decay": 0.1, "backend": "eager"} | options)


def contents(params, optimizer):
    return [
        [param.detach().clone(), *(value.clone() for value in optimizer.state[param].values())] for param in params
    ]


def same(a, b):
    return [all(torch.equal(x, y) for x, y in zip(*pair)) for pair in zip(a, b)]


def without_reads(as_on_a_gpu, cls, grads, **options):
    """What parameters and state are after each step, none of which reads; and the optimizer."""
    params, optimizer = build(cls, **options)
    as_on_a_gpu()
    found = [contents(params, optimizer)]
    for t in range(STEPS):
        for param, g in zip(params, grads):
            param.grad = g[t].to(param)
        with NoReads():
            optimizer.step()
        found.append(contents(params, optimizer))
    return found, optimizer


OPTIONS = {
    "float32": {},
    "clipped, maximized": {"max_param_grad_norm": 3.0, "maximize": True},
    "stochastic rounding": {"dtype": torch.bfloat16, "bf16_rounding": "stochastic"},
    "float64 in tiles": {"dtype": torch.float64, "temporary_bytes": 2 * 4 * 8 * 120},
}


@both_optimizers
@both_rules
@pytest.mark.parametrize("bad", [{}, BAD], ids=["finite", "not finite"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_no_reads_and_the_same_bits(as_on_a_gpu, cls, rule, bad, options):
    options = {"update_rule": rule} | options
    params, ordinary = build(cls, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take_steps(ordinary, params, *streams(bad))
    expected = contents(params, ordinary)
    found, _ = without_reads(as_on_a_gpu, cls, streams(bad), **options)
    assert same(found[-1], expected) == [True] * len(SHAPES)


@both_optimizers
@both_rules
def test_skipped_in_every_bit_and_counted(as_on_a_gpu, cls, rule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said before it is asked
        found, optimizer = without_reads(as_on_a_gpu, cls, streams(BAD), update_rule=rule)
    for t in range(STEPS):
        kept = same(found[t], found[t + 1])
        assert kept == [(i, t) in BAD for i in range(len(SHAPES))]
    with pytest.warns(UserWarning, match="the update of that parameter is skipped") as said:
        assert optimizer.skipped_updates == len(BAD)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.skipped_updates == len(BAD)


@both_optimizers
def test_nothing_is_copied_from_the_host(as_on_a_gpu, cls):
    grads = streams()
    params, optimizer = build(cls)
    as_on_a_gpu()
    with NoReads(REFUSED | COPIED):
        take_steps(optimizer, params, *grads)


@both_optimizers
def test_metrics_leave_out_what_is_skipped(as_on_a_gpu, cls):
    results = []
    for deny in (False, True):
        params, optimizer = build(cls)
        take_steps(optimizer, params, *(g[:3] for g in streams(BAD)))
        if deny:
            as_on_a_gpu()
        optimizer.record_metrics = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            take_steps(optimizer, params, *(g[3:4] for g in streams(BAD)))
        results.append(optimizer.metrics())
    assert results[0]
    assert results[0].keys() == results[1].keys()
    for found, expected in zip(*(metrics.items() for metrics in reversed(results))):
        if found[0] != "clamped_share":  # what is skipped counts among the entries, as no host knows of it
            assert found == (expected[0], pytest.approx(expected[1], rel=2 * gamma(len(SHAPES))))  # sums over matrices


@pytest.mark.parametrize("rule", ["als", pytest.param("newton", marks=pytest.mark.slow)])
@triton_
def test_kernels_skip_what_is_not_finite(as_on_a_gpu, rule):
    options = {"update_rule": rule, "backend": "triton"}
    params, ordinary = build(LoRAPreAdamW, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take_steps(ordinary, params, *streams(BAD))
    found, optimizer = without_reads(as_on_a_gpu, LoRAPreAdamW, streams(BAD), **options)
    assert same(found[-1], contents(params, ordinary)) == [True] * len(SHAPES)
    assert same(found[3], found[4]) == [(i, 3) in BAD for i in range(len(SHAPES))]
    with pytest.warns(UserWarning, match="skipped"):
        assert optimizer.skipped_updates == len(BAD)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "eager"])
@both_rules
def test_a_cuda_graph_holds_the_step(rule, backend):
    """Replayed, a captured step is the ordinary one in every bit."""

    def build_on_the_gpu():
        params = [weights(*shape, seed=i).detach().cuda().requires_grad_() for i, shape in enumerate(SHAPES)]
        for param, grads in zip(params, streams()):
            param.grad = grads[0].to(param)
        return params, LoRAPreAdamW(params, lr=LR, momentum_rank=2, update_rule=rule, backend=backend)

    ordinary, optimizer = build_on_the_gpu()
    for _ in range(STEPS):
        optimizer.step()
    replayed, captured = build_on_the_gpu()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(STEPS - 3):
        graph.replay()
    assert same(contents(replayed, captured), contents(ordinary, optimizer)) == [True] * len(SHAPES)
