"""Any shapes, ranks, dtypes, groups and gradients: finite in, finite out, bounded steps, and a state that survives a
file.

Deterministic and short by default. `HYPOTHESIS_PROFILE=long pytest tests/optim/test_fuzz.py` draws other examples each
time, and forty times as many.
"""

import io
import os
import warnings

import pytest
import torch
from backend_runs import eager_and_cpp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stepping import both_optimizers
from torch import nn

from lorapre_peft import LoRAPreMuon
from lorapre_peft.optim.adamw import update_bound

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, **COMMON)
settings.register_profile("long", max_examples=2000, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

ENTRIES = 6000  # of one parameter: what keeps an example to milliseconds
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# A gradient is a pattern times a scale. The largest is below the norm of 1.8e19 beyond which updates are skipped.
SCALES = [1.0, 1e-30, 1e-12, 1e-6, 1e3, 1e6, 1e15]
PATTERNS = ["normal", "zeros", "single", "alternating", "constant", "low rank", "one row", "none", "nan", "inf"]


@st.composite
def shapes(draw) -> tuple[int, ...]:
    """One to four dimensions of 1 to 300, with odd and extreme ones, and at most ENTRIES entries."""
    sizes, left = [], ENTRIES
    for _ in range(draw(st.integers(1, 4))):
        sizes.append(draw(st.sampled_from([1, 2, 3, 5, 7, 16, 33, 127, 255, 300]) | st.integers(1, 300)))
        sizes[-1] = min(sizes[-1], left)
        left //= sizes[-1]
    return tuple(draw(st.permutations(sizes)))


RANKS = st.sampled_from([None, 0, 1, 2, 3, 8, 1000]) | st.integers(1, 300)
PARAMETERS = st.lists(st.tuples(shapes(), st.sampled_from(DTYPES)), min_size=1, max_size=4)
LAYOUTS = st.lists(st.tuples(RANKS, PARAMETERS), min_size=1, max_size=3)


def gradients(patterns: list[str]):
    """The gradient of each step of a run: (pattern, scale, seed)."""
    one = st.tuples(st.sampled_from(patterns), st.sampled_from(SCALES), st.integers(0, 3))
    return st.lists(one, min_size=1, max_size=8)


def gradient(param: nn.Parameter, pattern: str, scale: float, seed: int, step: int) -> torch.Tensor | None:
    """One of PATTERNS, in the parameter's dtype; float16 cannot hold the largest scales: those entries are
    infinite.
    """
    if pattern == "none":
        return None
    shape, entry = param.shape, seed * 7919 % param.numel()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + step), dtype=torch.float64)
    if pattern == "zeros":
        values.zero_()
    elif pattern == "constant":
        values.fill_(1)
    elif pattern == "alternating":
        values.fill_((-1) ** step)
    elif pattern == "single":
        values = torch.zeros_like(values).view(-1).index_fill_(0, torch.tensor(entry), 1.0).view(shape)
    elif pattern == "low rank":
        values = values[:1] * values.reshape(shape[0], -1).sum(1).view(-1, *[1] * (len(shape) - 1))
    elif pattern == "one row":
        values[1:] = 0
    elif pattern in ("nan", "inf"):
        values.view(-1)[entry] = float(pattern)
    return (values * scale).to(param.dtype)


def build(cls, layout, rule, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    parameter_groups = [
        {
            "params": [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s, dtype in params],
            "momentum_rank": k,
        }
        for k, params in layout
    ]
    return cls(parameter_groups, update_rule=rule, **options)


def parameters(optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step(optimizer, drawn, number: int, *, finite: bool = False) -> None:
    """A step of gradients of which each parameter gets its own; with ``finite``, nothing that its dtype cannot
    hold.
    """
    for position, param in enumerate(parameters(optimizer)):
        param.grad = gradient(param, *drawn, step=number + position)
        if finite and param.grad is not None and not param.grad.isfinite().all():
            param.grad = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a gradient has the norm")
        optimizer.step()


def assert_finite(optimizer) -> None:
    for param in parameters(optimizer):
        assert param.isfinite().all(), f"a parameter of shape {tuple(param.shape)}"
        for name, value in optimizer.state[param].items():
            assert value.isfinite().all(), f"{name} of a parameter of shape {tuple(param.shape)}"


@both_optimizers
@given(
    layout=LAYOUTS,
    drawn=gradients(PATTERNS),
    stochastic=st.booleans(),
    tile=st.sampled_from([4_000, 64_000_000]),
    backend=st.sampled_from(["auto", "eager"]),
)
def test_als_stays_finite_and_bounded(cls, layout, drawn, stochastic, tile, backend):
    """Not finite gradients are skipped; every other update obeys Adam's bound C, or Newton–Schulz's 1.3 for Muon.

    With lr 1 and parameters at 0, where the update is the parameter itself.
    """
    rounding = "stochastic" if stochastic else "nearest"
    options = {"bf16_rounding": rounding, "temporary_bytes": tile, "backend": backend}
    optimizer = build(cls, layout, "als", lr=1.0, **options)
    for number, one in enumerate(drawn):
        for param in parameters(optimizer):
            param.data.zero_()
        step(optimizer, one, number)
        assert_finite(optimizer)
        for param in parameters(optimizer):
            bound = update_bound(0.9, 0.95)
            if cls is LoRAPreMuon and "m_A" in optimizer.state[param]:
                bound = 1.3  # an entry is at most the largest singular value
            # Rounded to float32, then to the parameter's dtype, stochastically by up to a whole place.
            assert param.abs().max() <= bound * (1 + torch.finfo(torch.float32).eps) * (
                1 + torch.finfo(param.dtype).eps
            )


@both_optimizers
@given(
    layout=LAYOUTS,
    drawn=gradients([p for p in PATTERNS if p not in ("nan", "inf")]),
    backend=st.sampled_from(["auto", "eager"]),
)
def test_newton_stays_finite(cls, layout, drawn, backend):
    """The published rule has no bound, so that only finiteness is asked of it, in dtypes with float32's range."""
    layout = [(k, [(s, torch.float32 if d == torch.float16 else d) for s, d in params]) for k, params in layout]
    optimizer = build(cls, layout, "newton", lr=1e-3, backend=backend)
    for number, one in enumerate(drawn):
        step(optimizer, one, number, finite=True)
        assert_finite(optimizer)


@both_optimizers
@pytest.mark.parametrize("rule", ["als", "newton"])
@given(layout=LAYOUTS, drawn=gradients(PATTERNS), cut=st.integers(0, 8))
def test_state_dict_round_trip(cls, rule, layout, drawn, cut):
    """Saved to a file at any moment and loaded into another optimizer: the same bits, then and after every
    later step.
    """
    optimizer = build(cls, layout, rule, lr=1e-2, weight_decay=0.1)
    for number, one in enumerate(drawn[:cut]):
        step(optimizer, one, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = build(cls, layout, rule, seed=1, lr=1.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(parameters(optimizer), parameters(other)):
        theirs.data.copy_(ours)
    for number, one in enumerate([None, *drawn[cut:]], cut - 1):
        for each in (optimizer, other):
            if one is not None:
                step(each, one, number)
        for ours, theirs in zip(parameters(optimizer), parameters(other)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
            assert optimizer.state[ours].keys() == other.state[theirs].keys()
            for name, value in optimizer.state[ours].items():
                torch.testing.assert_close(other.state[theirs][name], value, rtol=0, atol=0, equal_nan=True)


@both_optimizers
@eager_and_cpp
def test_a_jump_of_33_orders_of_magnitude(cls, backend):
    """B'ᵀx grows as the square of the new gradient over √ of the old one: without `unit` it would overflow float32."""
    optimizer = build(cls, [(1, [((20, 12), torch.float32)])], "als", backend=backend)
    for number, scale in enumerate((1e-18, 1e15)):
        step(optimizer, ("normal", scale, 0), number)
    assert_finite(optimizer)
