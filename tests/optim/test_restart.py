"""How `als` starts, and starts again where momenta have been zeroed from outside: ReLoRA's resets, pruning, resets by
hand.
"""

import oracle
import pytest
import torch
from backend_runs import BACKENDS, DEVICE
from stepping import LR, both_optimizers, stream, take_steps, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.lowrank.rules import RULES, Average
from lorapre_peft.lowrank.rules import test_rows as start_rows

SHAPE, K = (40, 24), 5


def trained(cls, backend, steps=2, **options):
    param = nn.Parameter(weights(*SHAPE).detach().to(DEVICE))
    optimizer = cls([param], lr=LR, momentum_rank=K, weight_decay=0.1, backend=backend, **options)
    take_steps(optimizer, [param], stream(SHAPE, steps))
    return param, optimizer


CASES = [
    pytest.param(cls, *backend.values, marks=backend.marks)
    for cls in (LoRAPreAdamW, LoRAPreMuon)
    for backend in BACKENDS
    if backend.values[0] in cls.backend_names
]


@pytest.mark.parametrize(("cls", "backend"), CASES)
@pytest.mark.parametrize("kept", [("step",), ()], ids=["step kept", "all zeroed"])
def test_a_zeroed_state_starts_like_a_new_one(cls, backend, kept):
    """In every bit: zeros are what a state begins with, and t counts from its first gradient."""
    param, optimizer = trained(cls, backend)
    for name, value in optimizer.state[param].items():
        if name not in kept:
            value.zero_()
    twin = nn.Parameter(param.detach().clone())
    new = cls([twin], lr=LR, momentum_rank=K, weight_decay=0.1, backend=backend)
    for one, its in ((optimizer, param), (new, twin)):
        take_steps(one, [its], stream(SHAPE, 2, seed=7))
    assert torch.equal(param, twin)
    assert all(torch.equal(value, new.state[twin][name]) for name, value in optimizer.state[param].items())


@pytest.mark.parametrize(("cls", "backend"), CASES)
def test_single_zeroed_directions_come_back(cls, backend):
    """Pruning may take two of five directions; of noise, which has as many as it can get, the sweeps find them
    again.
    """
    param, optimizer = trained(cls, backend, **({"second_momentum_rank": K} if cls is LoRAPreAdamW else {}))
    state = optimizer.state[param]
    for moment in optimizer.moments:
        state[f"{moment}_A"][1:3] = 0
        state[f"{moment}_B"][:, 1:3] = 0
    take_steps(optimizer, [param], stream(SHAPE, 5, seed=7))
    assert param.isfinite().all()
    for moment in optimizer.moments:
        singular = torch.linalg.svdvals(state[f"{moment}_B"] @ state[f"{moment}_A"])
        assert singular[K - 1] > 1e-2 * singular[0]


@both_optimizers
def test_a_zeroed_column_of_one_factor_alone_is_no_direction(cls):
    """A direction is its row of A: with that gone its column of B means nothing, and must not meet the new row."""
    param, optimizer = trained(cls, "eager")
    state = optimizer.state[param]
    expected = (state["m_B"][:, 1:] @ state["m_A"][1:]).clone()
    for moment in optimizer.moments:
        state[f"{moment}_A"][0] = 0
    rule, gram = RULES["als"], (state["m_A"] @ state["m_A"].mT).double()
    A, B = rule.restart(state["m_A"], state["m_B"], gram)
    torch.testing.assert_close(B @ A, expected)
    assert A[0].any()
    # As long as the others are on average, so that the damping, which goes by the mean, swamps none of them.
    assert A[0].norm().item() == pytest.approx(A[1:].norm(dim=1).square().mean().sqrt().item(), rel=0.2)


@pytest.mark.parametrize(("k", "q"), [(1, 7), (5, 24), (64, 300)])
def test_start_rows_are_the_oracles(k, q):
    """The same numbers on every device and process, and none that a gradient's rows are likely to miss: conditions
    stay small.
    """
    rows = start_rows(k, q, DEVICE).cpu().double()
    assert (rows.numpy() == oracle.hashed_rows(k, q)).all()
    assert torch.linalg.cond(rows) < 10 * (k * 3 + 1) ** 0.5 / (
        1 - (k / q) ** 0.5
    )  # of uniform numbers: mean 1/2, deviation 1/√12


@pytest.mark.parametrize("rho", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("average", [(0.9, 0.1), (0.95, 1.0)], ids=["adam", "muon"])
def test_residual_weight_after_bias_correction(rho, average):
    """min(1, ρ/(1−βᵗ)): what lies outside the subspace enters as it is as long as an EMA with bias correction would
    keep more.
    """
    t = torch.arange(1, 60, dtype=torch.float64)
    average = Average(*(torch.full_like(t, number) for number in average))
    mixture = RULES["als"].mixture(average, torch.full_like(t, rho), t)
    ema = 1 - average.decay**t
    corrected = mixture.residual * (1 - average.decay) / average.weight / ema
    torch.testing.assert_close(corrected, (rho / ema).clamp_max(1.0))
    assert corrected[0] == min(1, rho / (1 - average.decay[0]))
    torch.testing.assert_close(mixture.c_X + mixture.residual, average.weight)
