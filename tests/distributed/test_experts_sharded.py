"""FSDP2 with stacked experts: whole experts on each process, or rows of all of them; and mixtures of transformers and
PEFT.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mixtures import qwen, tokens_of, with_adapter
from processes import run
from roundoff import assert_same_steps, undisturbed
from stacking import group, stacked
from stepping import stream, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from versions import skip_before

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon, create_lorapre_optimizer
from lorapre_peft.lowrank.sharding import local

CLASSES = {"adamw": LoRAPreAdamW, "muon": LoRAPreMuon}
# By layout, how many experts: uneven shards, and with four processes one without an expert; PEFT's lora_A only where
# none is cut.
STACKS = [("3-D", 5), ("3-D", 3), ("lora_A", 4), ("lora_B", 3), ("lora_B", 4)]
SHAPE, STEPS = (7, 12), 5


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def products(state):
    """A state with B A in the place of each pair of factors."""
    moments = [name[0] for name in state if name.endswith("_B")]
    rest = {name: value for name, value in state.items() if name[2:] not in ("A", "B")}
    return rest | {moment: state[f"{moment}_B"] @ state[f"{moment}_A"] for moment in moments}


def gradients(layout, experts, seed):
    """Some experts without tokens in some steps, one with a gradient that is not finite in one, and one step without
    any gradient.
    """
    streams = [stream(SHAPE, STEPS, seed=seed + e) for e in range(experts)]
    streams[1][0].zero_()
    streams[2][3].zero_()
    streams[0][2][-1, -1] = float("nan")
    steps = [stacked(layout, list(of_step)) for of_step in zip(*streams)]
    return [*steps[:-1], None, steps[-1]]


def train(cls, rule, mesh=None, prepare=undisturbed):
    """Steps with all stacks and an ordinary matrix, and all that came out of them, whole."""

    def put(value):
        return value if mesh is None else distribute_tensor(value, mesh, [Shard(0)])

    params, groups, streams = [], [], []
    for i, (layout, experts) in enumerate(STACKS):
        start = stacked(layout, [weights(*SHAPE, seed=10 * i + e).detach() for e in range(experts)])
        params.append(nn.Parameter(put(start)))
        groups.append(group(layout, params[-1], experts))
        streams.append(gradients(layout, experts, seed=10 * i))
    params.append(nn.Parameter(put(weights(9, 8).detach())))
    groups.append({"params": params[-1:]})
    streams.append(stream((9, 8), STEPS + 1))
    options = {"update_rule": rule, "weight_decay": 0.1, "momentum_rank": 2, "max_param_grad_norm": 20.0}
    # Rows of several processes take the eager path: so does one process, for `newton` makes much of another order of
    # sums.
    optimizer = prepare(cls(groups, lr=0.01, backend="eager", **options))
    for step, grads in enumerate(zip(*streams)):
        optimizer.record_metrics = step == STEPS
        for param, grad in zip(params, grads):
            param.grad = None if grad is None else put(grad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    states = [optimizer.state[param] for param in params]
    return {
        "params": [whole(param) for param in params],
        "state": [products({name: whole(value) for name, value in state.items()}) for state in states],
        "held": [sum(local(value).numel() for value in state.values()) for state in states],
        "skipped": optimizer.skipped_updates,
        "metrics": optimizer.metrics(),
    }


def sharded(world):
    mesh = init_device_mesh("cpu", (world,))
    found = {(name, rule): train(cls, rule, mesh) for name, cls in CLASSES.items() for rule in ("als", "newton")}
    cut = nn.Parameter(distribute_tensor(torch.ones(5 * 2, 8), mesh, [Shard(0)]))
    try:
        LoRAPreAdamW([group("lora_A", cut, 5)], momentum_rank=1)
    except NotImplementedError as error:
        found["refused"] = str(error)
    return {str(key): value for key, value in found.items()}


@pytest.fixture(scope="module", params=[2, 4])
def runs(request, tmp_path_factory):
    return run(request.param, tmp_path_factory.mktemp("experts") / "run", sharded, request.param)


def tensors(result):
    return [*result["params"], *(value for state in result["state"] for _, value in sorted(state.items()))]


@pytest.mark.parametrize("name", [(name, rule) for name in CLASSES for rule in ("als", "newton")], ids="-".join)
def test_steps_are_those_of_one_process(runs, name):
    first, *others = (rank[str(name)] for rank in runs)
    assert_same_steps(tensors(first), lambda prepare: tensors(train(CLASSES[name[0]], name[1], prepare=prepare)))
    for found in others:
        assert all(map(torch.equal, tensors(found), tensors(first)))
    # Of whole experts each process counts its own, of those by rows every process all.
    by_rows = sum(layout == "lora_B" for layout, _ in STACKS)
    assert sum(rank[str(name)]["skipped"] - by_rows for rank in runs) == len(STACKS) - by_rows


def test_each_process_holds_the_state_of_its_own_experts(runs):
    """Together as much as one process alone, but for the A factors and counters of matrices that are sharded
    by rows.
    """
    alone = train(LoRAPreAdamW, "als")["held"]
    together = [sum(counts) for counts in zip(*(rank[str(("adamw", "als"))]["held"] for rank in runs))]
    copied = (2 + 1) * SHAPE[1] + 3  # A of m and of v, step, v_energy and v_scale
    for (layout, experts), one, many in zip(STACKS, alone, together):
        assert many == one + (layout == "lora_B") * (len(runs) - 1) * experts * copied


def test_an_expert_that_would_be_cut_is_refused(runs):
    for rank in runs:
        assert "in the middle of an expert: use a number of processes that divides 5, or DDP" in rank["refused"]


# ---- models of transformers and PEFT, sharded by FSDP2 --------------------------------------------------------------


def build(adapter, early=False):
    model = with_adapter(qwen(num_experts=4)) if adapter else qwen(num_experts=5)
    if dist.is_initialized() and dist.get_world_size() > 1:
        layers = (model.base_model.model if adapter else model).model.layers
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    options = {"lr": 1e-2, "momentum_rank": 2, "update_in_backward": early, "verbose": False}
    return model, create_lorapre_optimizer(model, **options)


def stage(adapter, first, last, source, target):
    """From checkpoint ``source``, if any, through steps ``first`` to ``last`` to checkpoint ``target``; the parameters
    then.
    """
    model, optimizer = build(adapter)
    if source is not None:
        weights_, state = get_state_dict(model, optimizer)
        loaded = {"model": weights_, "optimizer": state}
        dcp.load(loaded, checkpoint_id=source)
        set_state_dict(model, optimizer, model_state_dict=weights_, optim_state_dict=loaded["optimizer"])
    steps(model, optimizer, first, last)
    weights_, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights_, "optimizer": state}, checkpoint_id=target)
    return trained(model)


def steps(model, optimizer, first, last):
    for step in range(first, last):
        ids = tokens_of(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(model):
    return [whole(param) for param in model.parameters() if param.requires_grad]


@skip_before("torch", "2.8", "adds FSDP2's gradients up over processes on CPUs, where it should average them")
@pytest.mark.parametrize("adapter", [False, True], ids=["weights", "target_parameters"])
def test_a_mixture_is_resharded_from_checkpoint_to_checkpoint(adapter, tmp_path):
    """1 → 2 → 4 processes, two steps each, as one process takes them."""
    source = None
    for i, world in enumerate((1, 2, 4)):
        target = tmp_path / f"checkpoint-{i}"
        found = run(world, tmp_path / f"run-{i}", stage, adapter, 2 * i, 2 * (i + 1), source, target)[0]
        source = target

    def straight(prepare):
        model, optimizer = build(adapter)
        steps(model, prepare(optimizer), 0, 6)
        return trained(model)

    assert_same_steps(found, straight)


def in_the_backward_pass():
    model, optimizer = build(adapter=False, early=True)
    steps(model, optimizer, 0, 3)
    return trained(model)


@skip_before("torch", "2.8", "adds FSDP2's gradients up over processes on CPUs, where it should average them")
def test_updates_in_the_backward_pass(tmp_path):
    """Five experts over two processes, each updated as soon as its gradient has been reduced and scattered."""
    (found, other) = run(2, tmp_path / "run", in_the_backward_pass)

    def straight(prepare):
        model, optimizer = build(adapter=False)
        steps(model, prepare(optimizer), 0, 3)
        return trained(model)

    assert_same_steps(found, straight)
    assert all(map(torch.equal, found, other))
