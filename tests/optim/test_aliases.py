"""Parameters that share memory, state whose memory changes, and groups that change, beside what torch does."""

import copy
import gc

import pytest
import torch
from roundoff import assert_same_steps, undisturbed
from torch import nn

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon

LR = 1e-2


def matrix(p=32, q=64):
    param = nn.Parameter(torch.randn(p, q))
    param.grad = torch.randn(p, q)
    return param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 2], ids=["AdamW path", "compressed"])
def test_a_parameter_and_its_transpose(rank, dtype):
    """PEFT ties adapters of embedding and head in this way. An update by one is kept when the other has none."""
    param = nn.Parameter(torch.randn(8, 128, dtype=dtype))
    transposed = nn.Parameter(param.detach().t())
    assert param.data_ptr() == transposed.data_ptr()
    param.grad, transposed.grad = torch.ones_like(param), torch.zeros_like(transposed)
    before = param.detach().clone()
    LoRAPreAdamW([{"params": [param, transposed], "momentum_rank": rank}], lr=LR).step()
    assert (param.detach() - before).abs().mean() > LR / 2  # Rounding to bfloat16 keeps the mean.


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
def test_factors_get_other_memory(cls):
    """A tool that resets or moves factors by ``.data =`` and leaves the scalars is noticed."""

    def trained(backend, prepare=undisturbed):
        generator = torch.Generator().manual_seed(0)
        param = nn.Parameter(torch.randn(32, 64, generator=generator))
        optimizer = prepare(cls([{"params": [param], "momentum_rank": 4}], lr=LR, backend=backend))
        for step in range(5):
            param.grad = torch.randn(32, 64, generator=generator)
            optimizer.step()
            if step == 2:
                for value in optimizer.state[param].values():
                    if value.ndim:
                        value.data = torch.zeros_like(value)
        return [param.detach()]

    assert_same_steps(trained("auto"), lambda prepare: trained("eager", prepare))


def test_a_group_that_is_removed_is_no_longer_trained():
    params = [matrix(), matrix()]
    optimizer = LoRAPreAdamW(
        [{"params": [param], "momentum_rank": 4} for param in params], lr=LR, update_in_backward=True
    )
    for _ in range(2):
        before = [param.detach().clone() for param in params]
        sum(param.square().sum() for param in params).backward()
        optimizer.step()
        moved = [not torch.equal(param, old) for param, old in zip(params, before)]
        if len(optimizer.param_groups) == 2:
            assert moved == [True, True]
            optimizer.param_groups.pop()
    assert moved == [True, False]


@pytest.mark.parametrize("copied", [True, False])
def test_another_optimizer_that_is_discarded_gives_hooks_back(copied):
    param = matrix()
    param.grad = None
    optimizer = LoRAPreAdamW([param], lr=LR, momentum_rank=4, update_in_backward=True)
    other = copy.copy(optimizer) if copied else LoRAPreAdamW([param], momentum_rank=4, update_in_backward=True)
    del other
    gc.collect()
    for _ in range(2):
        param.square().sum().backward()
        optimizer.step()
    param.square().sum().backward()
    assert param.grad is None
    with pytest.raises(RuntimeError, match="a second backward pass reached a parameter"):
        param.square().sum().backward()


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
def test_another_default_device(cls):
    param = matrix()
    optimizer = cls([{"params": [param], "momentum_rank": 4}], lr=LR)
    optimizer.record_metrics = True
    before = param.detach().clone()
    with torch.device("meta"):
        optimizer.step()
    assert not torch.equal(param, before)
