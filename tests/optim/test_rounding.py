"""Stochastic rounding: unbiased, repeatable, and the same however the weights are cut into tiles."""

from itertools import combinations

import pytest
import torch
from stepping import stream, take_steps, weights
from torch import nn

from lorapre_peft import LoRAPreAdamW
from lorapre_peft.lowrank.rounding import random_bits, random_keys, write_stochastic


def key(seed=0, step=1, position=0):
    return random_keys(((seed, position),), torch.tensor([float(step)]))


def rounded(value, keys, offset=0):
    """bfloat16 of float32 values [n, ...], by keys [n]."""
    targets = [torch.empty(value.shape[1:], dtype=torch.bfloat16) for _ in value]
    write_stochastic(targets, value, keys, offset)
    return torch.stack(targets)


def test_rounding_is_unbiased():
    """For a value at 30 % of the way between two bf16 numbers: three in ten go up. 4 standard errors, n = 200,000."""
    value = torch.full((200_000,), 1 + 0.3 * 2**-7)
    target = rounded(value[None], key())[0]
    assert set(target.tolist()) == {1.0, 1 + 2**-7}
    assert (target > 1).float().mean() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 200_000) ** 0.5)


def test_rounding_keeps_what_bf16_holds_and_what_is_not_finite():
    value = torch.tensor([1.0, -2.5, 0.0, -0.0, 1e-40, float("inf"), -float("inf"), float("nan")])
    target = rounded(value[None], key())[0]
    assert torch.equal(target[:4].float(), value[:4])
    assert target[4].abs() <= 1e-40 * 2
    assert torch.equal(target[5:7].float(), value[5:7])
    assert target[7].isnan()


def test_random_bits_are_even_and_independent():
    """Every bit is set half of the time, and neighbours, next steps and next parameters are uncorrelated (5 sigma)."""
    count = 200_000
    keys = torch.cat([key(), key(step=2), key(position=1), key(seed=1)])
    draws = random_bits(torch.Size([4, count]), keys, 0)
    for i in range(32):
        assert (draws[0] >> i & 1).float().mean() == pytest.approx(0.5, abs=5 * 0.5 / count**0.5)
    low = [(bits & 0xFFFF).double() - 32767.5 for bits in draws]
    for one, other in [*combinations(low, 2), (low[0], low[0].roll(1))]:
        assert abs((one * other).mean() / low[0].var()) < 5 / count**0.5


def test_rounding_does_not_depend_on_tiles():
    value = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    here = key(3, 7, 1)
    tiles = [rounded(value[None, start : start + 7], here, start * 30) for start in range(0, 40, 7)]
    assert torch.equal(rounded(value[None], here), torch.cat(tiles, 1))


def test_rounding_of_a_stack_is_that_of_each():
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    keys = random_keys(((1, 4), (1, 0), (1, 9)), torch.tensor([3.0, 3.0, 8.0]))
    alone = [
        rounded(value[None], key(1, step, position)) for value, step, position in zip(values, (3, 3, 8), (4, 0, 9))
    ]
    assert torch.equal(rounded(values, keys), torch.cat(alone))


@pytest.mark.parametrize("k", [2, 0], ids=["compressed", "adamw path"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_small_updates_move_bf16_weights_on_average(rounding, k):
    """lr 2e-5 on weights of 1: nearest rounding loses every update, stochastic keeps their mean.

    A constant gradient moves each weight by lr a step: 100 steps make 2e-3, a quarter of bf16's spacing of 2^-7 above
    1 and half of that of 2^-8 below. 3,200 entries; the mean move is within 5 standard errors.
    """
    param = nn.Parameter(torch.ones(80, 40, dtype=torch.bfloat16))
    optimizer = LoRAPreAdamW([param], lr=2e-5, momentum_rank=k, bf16_rounding=rounding)
    before = torch.get_rng_state()
    take_steps(optimizer, [param], [torch.ones(80, 40)] * 100)
    assert torch.equal(before, torch.get_rng_state())
    moved = (1 - param.float()).mean().item()
    if rounding == "nearest":
        assert moved == 0
    else:
        spacing = 2**-8  # bf16 just below 1
        deviation = (2e-3 * (spacing - 2e-3) / 3200) ** 0.5
        assert moved == pytest.approx(2e-3, abs=5 * deviation)


def test_stochastic_rounding_follows_seed_step_and_position():
    def result(seed, position):
        params = [weights(16, 12, seed=1, dtype=torch.bfloat16) for _ in range(2)]
        optimizer = LoRAPreAdamW(params, lr=1e-3, momentum_rank=2, bf16_rounding="stochastic", seed=seed)
        take_steps(optimizer, params, *[stream((16, 12), 5)] * 2)
        return params[position]

    assert torch.equal(result(0, 0), result(0, 0))
    assert not torch.equal(result(0, 0), result(1, 0))
    assert not torch.equal(result(0, 0), result(0, 1))
