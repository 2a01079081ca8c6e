"""This module holds what the tests of the backends share.

It lists the backends that run here, takes a few steps on one of them, and compares the results of two.
"""

import pytest
import torch
from roundoff import assert_same_steps, undisturbed
from stepping import LR, products, stream, take_steps, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW
from lorapre_peft.kernels import choose as backends
from lorapre_peft.memory.peak import AllocationTracker
from lorapre_peft.optim.adamw import update_bound

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MARKS = {
    "compiled": [pytest.mark.slow],  # test_graphs.py runs its graphs without compiling.
    "triton": [] if DEVICE.type == "cuda" else [pytest.mark.interpreted],
}
BACKENDS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(name not in backends.available(DEVICE), reason=f"{name} cannot run here"),
            *MARKS.get(name, []),
        ],
    )
    for name in ("eager", "compiled", "triton", "cpp")
]
cpp_ = BACKENDS[3].marks[0]
eager_and_cpp = pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[3]])


def triton_(test):
    """Mark a test that runs the Triton backend alone."""
    for mark in BACKENDS[2].marks:
        test = mark(test)
    return test


def parameters(shape, n=2, dtype=torch.float32):
    """Return n random parameters of one shape on `DEVICE`."""
    return [nn.Parameter(weights(*shape, seed=i, dtype=dtype).detach().to(DEVICE)) for i in range(n)]


def run(
    backend,
    shape,
    k,
    steps=3,
    n=2,
    cls=LoRAPreAdamW,
    dtype=torch.float32,
    grads=None,
    prepare=undisturbed,
    **options,
):
    """Train n parameters of one shape for some steps on a backend, and return (parameters, optimizer).

    Args:
        k: momentum rank.
        cls: class of the optimizer.
        grads: for each parameter the gradients of all steps. None stands for those of `stream`.
        prepare: function called with the optimizer, whose return value takes the steps.
        options: further options of the optimizer.
    """
    params = parameters(shape, n, dtype)
    optimizer = prepare(cls(params, **{"lr": LR, "momentum_rank": k, "backend": backend} | options))
    take_steps(optimizer, params, *(grads or [stream(shape, steps, seed=i) for i in range(n)]))
    assert all(("m_B" in optimizer.state[param]) == (k > 0) for param in params)
    return params, optimizer


def tensors(params, optimizer):
    """Return the tensors that two backends have in common.

    These are the parameters and, of their states, the counts of steps and the products of factors.
    """
    states = list(optimizer.state.values())
    return [*params, *(value for state in states for value in (state["step"], *products(state)))]


def assert_like_eager(found, shape, k, steps=3, **options):
    """Assert that ``found``, the result of `run`, is the eager backend's result apart from the order of sums.

    The other arguments are those of `run`.
    """
    assert_same_steps(
        tensors(*found), lambda prepare: tensors(*run("eager", shape, k, steps, prepare=prepare, **options))
    )


def assert_like_rounded(found, expected, steps=3):
    """Assert that half-precision weights of two backends differ in the last places only, after steps of `LR`.

    An updated weight that lies within round-off, 1e-6 of it, of the middle between two numbers may be rounded to
    either, and later steps keep the difference. That happens to one entry in a hundred at most, as numbers around 1
    are 2⁻⁸ or 2⁻¹¹ apart. The difference is then one or two places of the largest weight that ``steps`` updates of at
    most `update_bound` times `LR` can reach.
    """
    for a, b in zip(found, expected):
        eps = torch.finfo(b.dtype).eps
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=2 * eps * update_bound(0.9, 0.95) * LR * steps)
        assert (a != b).float().mean() < 0.01


def peak_of_a_step(optimizer, params):
    """Take three steps on random gradients, and return the peak bytes of the third step's temporaries."""
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        with AllocationTracker() as tracker:
            optimizer.step()
    return tracker.peak_bytes
