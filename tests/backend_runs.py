"""What the tests of the backends share: which run here, a few steps on one of them, and how close they are."""

import pytest
import torch
from stepping import LR, stream, take_steps, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW, backends
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
