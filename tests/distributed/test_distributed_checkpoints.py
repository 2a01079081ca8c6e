"""torch.distributed.checkpoint: what one number of processes saved goes on in another; what would be restored wrongly
is refused.
"""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run
from roundoff import assert_same_steps
from stepping import products
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from versions import skip_before

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.lowrank.sharding import local

CLASSES = {"adamw": LoRAPreAdamW, "muon": LoRAPreMuon}


def build(cls, seed=0, **options):
    """A model, sharded by FSDP2 in a run of several processes, and its optimizer; layers with fewer rows than
    processes too.
    """
    torch.manual_seed(seed)
    layers = [
        nn.Linear(20, 7),
        nn.Tanh(),
        nn.Linear(7, 33, bias=False),
        nn.LayerNorm(33),
        nn.Linear(33, 3),
        nn.Linear(3, 50),
    ]
    model = nn.Sequential(*layers)
    if dist.is_initialized() and dist.get_world_size() > 1:
        for layer in layers[2:]:
            fully_shard(layer)
        fully_shard(model)
    return model, cls(model.parameters(), lr=0.01, momentum_rank=1, weight_decay=0.1, **options)


def train(model, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 20, generator=generator), torch.randn(16, 50, generator=generator)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def everything(model, optimizer):
    states = [optimizer.state[param] for param in model.parameters()]
    return {
        "params": [whole(param) for param in model.parameters()],
        "state": [{name: whole(value) for name, value in state.items()} for state in states],
    }


def stage(first, last, source, target):
    """Both optimizers from checkpoint ``source``, if any, through steps ``first`` to ``last`` to checkpoint
    ``target``.
    """
    results = {}
    for name, cls in CLASSES.items():
        model, optimizer = build(cls, seed=0 if source is None else 1)
        if source is not None:
            weights, state = get_state_dict(model, optimizer)
            loaded = {"model": weights, "optimizer": state}
            dcp.load(loaded, checkpoint_id=source / name)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=loaded["optimizer"])
        train(model, optimizer, first, last)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=target / name)
        results[name] = everything(model, optimizer)
    return results


@skip_before("torch", "2.8", "adds FSDP2's gradients up over processes on CPUs, where it should average them")
def test_resharding_goes_on_as_one_process(tmp_path):
    """1 → 2 → 4 → 1 processes, three steps each."""
    source = None
    for i, world in enumerate((1, 2, 4, 1)):
        target = tmp_path / f"checkpoint-{i}"
        found = run(world, tmp_path / f"run-{i}", stage, 3 * i, 3 * (i + 1), source, target)[0]
        source = target
    for name, cls in CLASSES.items():

        def straight(prepare, cls=cls):
            model, optimizer = build(cls)
            train(model, prepare(optimizer), 0, 12)
            return tensors(everything(model, optimizer))

        assert_same_steps(tensors(found[name]), straight)


def tensors(everything):
    """Parameters and the products of their factors."""
    return [*everything["params"], *(product for state in everything["state"] for product in products(state))]


def in_two_processes(folder):
    straight = stage(0, 6, None, folder / "straight")
    stage(0, 3, None, folder / "first")
    return {"straight": straight, "resumed": stage(3, 6, folder / "first", folder / "second"), **details(folder)}


def refused(optimizer, edit):
    state_dict = optimizer.state_dict()
    state_dict["state"] = {index: edit(dict(state)) for index, state in state_dict["state"].items()}
    before = [t.clone() for state in optimizer.state.values() for t in map(local, state.values())]
    try:
        optimizer.load_state_dict(state_dict)
    except ValueError as error:
        after = [t for state in optimizer.state.values() for t in map(local, state.values())]
        assert all(map(torch.equal, after, before))
        return str(error)
    return "loaded"


def details(folder):
    """What needs several processes but no training of its own."""
    results = {}
    for name, cls in CLASSES.items():
        model, trained = build(cls)
        train(model, trained, 0, 3)
        fresh_model, fresh = build(cls)
        before = everything_of(fresh_model)
        schema = [
            {
                parameter: {key: tuple(value.shape) for key, value in state.items()}
                for parameter, state in found.items()
            }
            for found in (get_optimizer_state_dict(m, o)["state"] for m, o in ((model, trained), (fresh_model, fresh)))
        ]
        assert schema[0] == schema[1]
        assert all(map(torch.equal, before, everything_of(fresh_model)))
        compressed = [state for state in fresh.state.values() if "m_A" in state]
        assert compressed
        assert not any(local(value).any() for state in compressed for value in state.values())

        for options in (
            StateDictOptions(full_state_dict=True, cpu_offload=True),
            StateDictOptions(flatten_optimizer_state_dict=True),
            StateDictOptions(cpu_offload=True),
        ):
            saved = get_optimizer_state_dict(model, trained, options=options)
            if options.full_state_dict:
                options.broadcast_from_rank0 = True
                assert dist.get_rank() == 0 or not saved
            _, other = build(cls)
            other_model, other = build(cls)
            set_optimizer_state_dict(other_model, other, saved, options=options)
            for ours, theirs in zip(model.parameters(), other_model.parameters()):
                mine, its = trained.state[ours], other.state[theirs]
                assert mine.keys() == its.keys()
                for key, value in mine.items():
                    assert type(value) is type(its[key])
                    assert torch.equal(local(value), local(its[key]))
                    assert not isinstance(value, DTensor) or value.placements == its[key].placements
        results[name] = [
            refused(trained, lambda state: {key: local(value) for key, value in state.items()}),
            refused(trained, lambda state: {key: whole(value) for key, value in state.items()}),
        ]
    return {"refused": results}


def everything_of(model):
    return [local(param).detach().clone() for param in model.parameters()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return run(2, folder / "run", in_two_processes, folder)


def test_resumed_run_equals_the_uninterrupted_one(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["resumed"], rank["straight"], rtol=0, atol=0)


def test_what_no_process_should_load_is_refused(ranks):
    """Rank-local tensors would be restored as they are, on even shards even those of another process."""
    for rank in ranks:
        for part, full in rank["refused"].values():
            assert "parameter 0 of shape (7, 20)" in part
            assert "is a plain tensor; expected a DTensor with placements (Shard(dim=0),)" in full
            assert "full_state_dict=True" in full
