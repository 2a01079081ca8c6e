"""What is not compressed takes torch.optim.AdamW's step."""

import numpy as np
import pytest
import torch
from stepping import LR, both_optimizers, take_steps, weights

from lorapre_peft import LoRAPreAdamW
from lorapre_peft.lowrank.layout import compressed_rank

PLAIN = {
    "vector": ((12,), None),
    "scalar": ((), None),
    "tiny matrix": ((2, 2), None),
    "rank 0": ((20, 12), 0),
    "rank not below the smaller side": ((12, 8), 8),
    "factors not smaller": ((6, 6), 3),
    "one row": ((1, 40), None),
}


@both_optimizers
@pytest.mark.parametrize(("shape", "k"), PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_path_is_torch_adamw(cls, shape, k, dtype):
    """The same function on the same numbers: equal in every bit."""
    ours, theirs = weights(*shape, dtype=dtype), weights(*shape, dtype=dtype)
    betas, eps = (0.9, 0.95), 1e-6
    options = {"betas": betas, "eps": eps} if cls is LoRAPreAdamW else {"adamw_betas": betas, "adamw_eps": eps}
    optimizer = cls([ours], lr=LR, weight_decay=0.1, momentum_rank=k, **options)
    reference = torch.optim.AdamW([theirs], lr=LR, betas=betas, eps=eps, weight_decay=0.1)
    grads = [
        torch.as_tensor(g, dtype=dtype).reshape(shape) for g in np.random.default_rng(1).normal(size=(30, *shape))
    ]
    take_steps(optimizer, [ours], grads)
    take_steps(reference, [theirs], grads)
    assert torch.equal(ours, theirs)
    assert set(optimizer.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("shape", "momentum_rank", "expected"),
    [
        ((8,), None, 0),
        ((0, 4), 2, 0),
        ((3, 300), None, 1),
        ((32, 24), None, 6),
        ((32, 24), 5, 5),
        ((32, 24), 24, 0),
        ((8, 8), 4, 0),  # 4·16 numbers for 64
        ((8, 8), 3, 3),
        ((16, 4, 3, 3), 2, 2),
        ((16, 1, 3), 3, 0),  # 16×3 once flattened
        ((32, 24), 0, 0),
    ],
    ids=str,
)
def test_compressed_rank(shape, momentum_rank, expected):
    assert compressed_rank(torch.Size(shape), momentum_rank) == expected
