"""DistributedDataParallel on the CPU: the ranks stay bit-identical, and equal to one process."""

import warnings

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from processes import run
from roundoff import assert_same_steps
from stepping import products
from tiny_llama import build_llama
from torch.nn.parallel import DistributedDataParallel

from lorapre_peft import LoRAPreConfig, create_lorapre_optimizer, ddp_update_hook

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
RUNS = {
    "adapters-adamw": (True, {"optimizer": "adamw"}),
    "adapters-muon": (True, {"optimizer": "muon"}),
    "weights-adamw": (False, {"optimizer": "adamw", "momentum_rank": 4}),
    "weights-muon": (False, {"optimizer": "muon", "momentum_rank": 4, "update_rule": "newton"}),
}


def build(adapters):
    model = build_llama(**SIZES)
    return get_peft_model(model, LoRAPreConfig(r=8, target_modules="all-linear")) if adapters else model


def batches(steps, rows):
    return torch.randint(4, 64, (steps, rows, 8), generator=torch.Generator().manual_seed(1))


def train(model, optimizer, batches):
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = [param for group in optimizer.param_groups for param in group["params"]]
    return [param.detach().clone() for param in held], [dict(optimizer.state[param]) for param in held]


def in_processes(steps, names):
    """Every process has rows and a global RNG state of its own, which no step may read."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}
    for name in names:
        adapters, options = RUNS[name]
        inner = build(adapters)
        optimizer = create_lorapre_optimizer(inner, lr=1e-2, **options)
        model = DistributedDataParallel(inner)
        torch.manual_seed(100 + rank)
        results[name] = train(model, optimizer, batches(steps, world)[:, rank : rank + 1])
    return results


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_are_bit_identical_after_200_steps(tmp_path, world):
    first, *others = run(world, tmp_path / "run", in_processes, 200, ["adapters-adamw", "weights-adamw"])
    for name, (params, state) in first.items():
        assert all(param.isfinite().all() for param in params)
        for other in others:
            torch.testing.assert_close(other[name], (params, state), rtol=0, atol=0)


def test_two_processes_agree_with_one(tmp_path):
    """The mean of two halves' gradients rounds otherwise than the whole batch's; nothing else differs."""
    found, other = run(2, tmp_path / "run", in_processes, 6, list(RUNS))
    for name in RUNS:
        torch.testing.assert_close(other[name], found[name], rtol=0, atol=0)
        assert_same_steps(tensors(*found[name]), alone(name, 2))


def alone(name, world, **more):
    """A function for `assert_same_steps`: six steps of one process with the rows of all."""
    adapters, options = RUNS[name]

    def run_with(prepare):
        model = build(adapters)
        optimizer = prepare(create_lorapre_optimizer(model, lr=1e-2, **options, **more))
        return tensors(*train(model, optimizer, batches(6, world)))

    return run_with


def tensors(params, states):
    """Parameters and the products of their factors."""
    return [*params, *(product for state in states for product in products(state))]


def in_backward(names, views, hooked):
    """Parameters and states with updates in the backward pass, and by ordinary steps; and what was said."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for name in names:
        adapters, options = RUNS[name]
        for early in (True, False):
            inner = build(adapters)
            options = options | {"update_in_backward": early, "max_param_grad_norm": 0.5}
            optimizer = create_lorapre_optimizer(inner, lr=1e-2, **options)
            # Small buckets, so that there are several.
            model = DistributedDataParallel(inner, gradient_as_bucket_view=views, bucket_cap_mb=0.002)
            if early and hooked:
                model.register_comm_hook(optimizer, ddp_update_hook)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = train(model, optimizer, batches(6, world)[:, rank : rank + 1])
            results.append((*found, sum("not sharded are updated by step" in str(w.message) for w in said)))
    return results


@pytest.mark.parametrize("views", [False, True], ids=["copies", "bucket views"])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_updates_in_the_backward_pass_are_the_ordinary_ones(tmp_path, world, views):
    """Each parameter once its bucket is averaged, the same on all ranks; of AdamW every bit is the ordinary step's.

    Muon's batches are products, whose sums depend on what they hold.
    """
    first, *others = run(world, tmp_path / "run", in_backward, list(RUNS), views, True)
    for name, early, ordinary in zip(RUNS, first[::2], first[1::2]):
        assert early[2] == 0
        if "adamw" in name:
            torch.testing.assert_close(early[:2], ordinary[:2], rtol=0, atol=0)
        else:
            assert_same_steps(tensors(*early[:2]), alone(name, world, max_param_grad_norm=0.5))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_without_the_hook_of_ddp_step_updates_and_says_so(tmp_path):
    for early, ordinary in zip(
        *[iter(run(2, tmp_path / "run", in_backward, ["adapters-adamw"], False, False)[0])] * 2
    ):
        torch.testing.assert_close(early[:2], ordinary[:2], rtol=0, atol=0)
        assert early[2] > 0
        assert ordinary[2] == 0


def in_groups_of_their_own():
    """Each process is a DDP by itself: its parameters after updates by the hook, and by ordinary steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = [dist.new_group([i]) for i in range(world)][rank]
    results = []
    for early in (True, False):
        inner = build(False)
        optimizer = create_lorapre_optimizer(inner, lr=1e-2, momentum_rank=4, update_in_backward=early)
        model = DistributedDataParallel(inner, process_group=group)
        if early:
            model.register_comm_hook((model.process_group, optimizer), ddp_update_hook)
        results.append(train(model, optimizer, batches(3, world)[:, rank : rank + 1])[0])
    return results


def test_the_hook_averages_in_the_group_that_it_is_given(tmp_path):
    first, second = run(2, tmp_path / "run", in_groups_of_their_own)
    for early, ordinary in (first, second):
        torch.testing.assert_close(early, ordinary, rtol=0, atol=0)
    assert not torch.equal(first[0][0], second[0][0])  # They have other rows.


@pytest.mark.parametrize("hook", [False, True])
def test_one_process_updates_once_in_a_backward_pass(tmp_path, hook):
    """DDP puts its emptied bucket in the place of a gradient that the update has freed."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, plain = build(False), build(False)
        options = {"momentum_rank": 4, "lr": 1e-2, "verbose": False}
        ours = create_lorapre_optimizer(model, update_in_backward=True, **options)
        wrapped = DistributedDataParallel(model)
        if hook:
            wrapped.register_comm_hook(ours, ddp_update_hook)
        rows = batches(3, 2)
        train(wrapped, ours, rows)
        train(plain, create_lorapre_optimizer(plain, **options), rows)
        for (name, ours_after), expected in zip(model.named_parameters(), plain.parameters()):
            assert torch.equal(ours_after, expected), name
    finally:
        dist.destroy_process_group()
