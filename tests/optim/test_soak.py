"""The soak test in short: `python tests/helpers/soak.py` is the long one."""

import pytest
import torch
from soak import soak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "dtype", "rule"), [("adamw", torch.bfloat16, "als"), ("muon", torch.float32, "newton")]
)
def test_crashes_at_random_moments_change_nothing_and_memory_stays_flat(optimizer, dtype, rule):
    figures = soak(120, optimizer=optimizer, dtype=dtype, update_rule=rule)
    assert figures["saves"] >= 4
    assert figures["crashes"] >= 2
    assert figures["steps done twice"] > 0
