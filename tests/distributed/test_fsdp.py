"""FSDP2: matrices sharded by rows over 2, 3 and 4 processes give the steps of one process."""

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from processes import run
from roundoff import assert_same_steps, undisturbed
from stepping import stream, weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from versions import skip_before

import lorapre_peft.lowrank.moments
import lorapre_peft.optim.base
from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.lowrank.sharding import local

# (2, 24) is LoRA's A with fewer rows than processes; of (5, 12) the fourth process has no row. The vectors take the
# AdamW path.
SHAPES = [(7, 20), (33, 16), (2, 24), (5, 12), (33,), (20, 7), (33, 16), (8, 3, 3, 3), (3,)]
# Longer sums than the others'. Not for `newton`: there, rounding the gradients by 1e-7 moves one process's own weights
# as far as sharding does.
LARGE = (150, 140)

ALL = {
    "max_param_grad_norm": 2.0,
    "weight_decay": 0.1,
    "maximize": True,
    "update_scale": 0.5,
    "seed": 3,
    "temporary_bytes": 20_000,  # tiles of rows, several chunks to a bucket
}
MUON = {"nesterov": True, "adjust_lr_fn": "original", "adamw_lr": 1e-3}
CASES = {
    "adamw als 50": (LoRAPreAdamW, "als", {"steps": 50}),
    "adamw newton 50": (LoRAPreAdamW, "newton", {"steps": 50}),
    "muon als 50": (LoRAPreMuon, "als", {"steps": 50}),
    "muon newton 50": (LoRAPreMuon, "newton", {"steps": 50}),
    "adamw als 5": (LoRAPreAdamW, "als", {"options": ALL, "large": True}),
    "adamw newton 5": (LoRAPreAdamW, "newton", {"options": ALL}),
    "muon als 5": (LoRAPreMuon, "als", {"options": ALL | MUON, "large": True}),
    "muon newton 5": (LoRAPreMuon, "newton", {"options": ALL | MUON}),
    "adamw faults": (LoRAPreAdamW, "als", {"faults": True}),
    "adamw faults masked": (LoRAPreAdamW, "als", {"faults": True, "masked": True}),
    "newton faults masked": (LoRAPreAdamW, "newton", {"faults": True, "masked": True}),
    "muon faults masked": (LoRAPreMuon, "als", {"faults": True, "masked": True}),
    "adamw absent": (LoRAPreAdamW, "als", {"absent": True}),
    "muon absent masked": (LoRAPreMuon, "newton", {"absent": True, "masked": True}),
    "adamw stochastic": (LoRAPreAdamW, "als", {"options": {"bf16_rounding": "stochastic"}, "dtype": torch.bfloat16}),
    "adamw hsdp": (LoRAPreAdamW, "als", {}),
    "muon hsdp": (LoRAPreMuon, "als", {}),
}


def shard(value, mesh):
    """What FSDP2 makes of a tensor: rows over the last dimension of the mesh, replicated over the others."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    parts = value.detach().chunk(mesh.size(mesh.ndim - 1))
    rank = mesh.get_local_rank(mesh.ndim - 1)
    part = parts[rank] if rank < len(parts) else value.new_empty(0, *value.shape[1:])
    return DTensor.from_local(
        part.clone(), mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def products(state):
    """A state with B A in the place of each pair of factors."""
    moments = [name[0] for name in state if name.endswith("_B")]
    rest = {name: value for name, value in state.items() if name[2:] not in ("A", "B")}
    return rest | {moment: state[f"{moment}_B"] @ state[f"{moment}_A"] for moment in moments}


def gradients(shapes, steps, faults):
    """A list of gradients for each parameter; with ``faults`` also what a step must get over on every process
    alike.
    """
    streams = [stream(shape, steps, seed=i) for i, shape in enumerate(shapes)]
    if faults:
        streams[5][1][-1, 3] = float("nan")  # in the last process's rows
        streams[1][2][0] = float("inf")
        streams[4][1][-1] = float("nan")
        streams[0][3] = streams[8][3] = None
        streams[2][0] = torch.zeros(shapes[2])  # it starts a step later than the others
        streams[3][2] = torch.zeros(shapes[3])
    return streams


def train(
    cls,
    rule,
    world,
    mesh=None,
    *,
    steps=5,
    options=None,
    large=False,
    faults=False,
    absent=False,
    masked=False,
    dtype=torch.float32,
    prepare=undisturbed,
):
    """Steps over fixed gradient streams, and everything that has to agree between one process and many, whole.

    mesh: shard everything over it. absent: what the second of ``world`` processes holds has no gradient in every
        second step.
    masked: as on a GPU, where the host does not read which gradients are finite.
    """
    shapes = SHAPES[:5] if steps > 5 else [*SHAPES, LARGE] if large else SHAPES
    start = [weights(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    params = start if mesh is None else [nn.Parameter(shard(param, mesh)) for param in start]
    # Sharded matrices take the eager path: so does one process, for `newton` makes much of another order of sums.
    optimizer = prepare(cls(params, lr=0.01, update_rule=rule, backend="eager", **options or {}))
    with pytest.MonkeyPatch.context() as patch:
        if masked:
            for module in (lorapre_peft.optim.base, lorapre_peft.lowrank.moments):
                patch.setattr(module, "reads_are_free", lambda device: False)
        for step, grads in enumerate(zip(*gradients(shapes, steps, faults))):
            optimizer.record_metrics = step == steps - 1
            for param, grad in zip(params, grads):
                missing = absent and step % 2
                if missing:
                    count = -(-len(grad) // world)
                    grad[count : 2 * count] = 0
                nobody = grad is None or (missing and mesh is not None and mesh.get_local_rank() == 1)
                param.grad = None if nobody else grad.to(dtype) if mesh is None else shard(grad.to(dtype), mesh)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        states = [optimizer.state[param] for param in params]
        return {
            "params": [whole(param) for param in params],
            "state": [products({name: whole(value) for name, value in state.items()}) for state in states],
            "copies": [
                local(state[name]).clone() for state in states for name in sorted(state) if name.endswith("_A")
            ],
            "metrics": optimizer.metrics(),
            "skipped": optimizer.skipped_updates,
        }  # fmt: skip


def sharded(world):
    """Each case sharded over the processes."""
    flat = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, 2) if world == 4 else (1, world))
    meshes = {name: grid if "hsdp" in name else flat for name in CASES}
    return {name: train(cls, rule, world, meshes[name], **how) for name, (cls, rule, how) in CASES.items()}


@pytest.fixture(scope="module", params=(*(pytest.param(world, marks=pytest.mark.slow) for world in (2, 3)), 4))
def runs(request, tmp_path_factory):
    """What `sharded` gave in ``request.param`` processes, by rank."""
    return run(request.param, tmp_path_factory.mktemp("fsdp") / "run", sharded, request.param)


def tensors(result):
    """All of what `train` returns that one process and many have in common."""
    states = [value for state in result["state"] for _, value in sorted(state.items())]
    return [*result["params"], *states, *(torch.tensor(value) for _, value in sorted(result["metrics"].items()))]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(runs, name):
    """Parameters, state and figures but for the order of sums; what the processes share, and what is replicated, in
    every bit.
    """
    cls, rule, how = CASES[name]
    first, *others = (rank[name] for rank in runs)
    assert_same_steps(tensors(first), lambda prepare: tensors(train(cls, rule, len(runs), prepare=prepare, **how)))
    assert first["skipped"] == (3 if "faults" in name else 0)
    for found in others:
        assert all(map(torch.equal, tensors(found), tensors(first)))
        assert found["skipped"] == first["skipped"]
        assert all(map(torch.equal, found["copies"], first["copies"]))


def counted(world):
    """Collectives of one step, by number of entries: of AdamW and of Muon."""
    mesh = init_device_mesh("cpu", (world,))
    results = []
    for cls in (LoRAPreAdamW, LoRAPreMuon):
        params = [nn.Parameter(shard(weights(20, 12, seed=i), mesh)) for i in range(3)]
        optimizer = cls(params, momentum_rank=2)
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_reduce", "all_gather_into_tensor"):
                plain = getattr(dist, name)

                def counting(tensor, *args, plain=plain, calls=calls, **kwargs):
                    calls.append(tensor.numel())
                    return plain(tensor, *args, **kwargs)

                patch.setattr(dist, name, counting)
            for _ in range(2):
                calls.clear()
                for i, param in enumerate(params):
                    param.grad = shard(weights(20, 12, seed=i), mesh)
                optimizer.step()
        results.append(list(calls))
    return results


def test_collectives_of_a_step(tmp_path):
    """A batch: the norms, kq projections and 2k² Gram entries of each moment and matrix; of Muon also its whole
    momentum.

    v has the rank 1.
    """
    n, p, q, k = 3, 20, 12, 2
    norms = n + n  # and whether there is a gradient at all
    adamw, muon = run(2, tmp_path / "run", counted, 2)[0]
    assert adamw == [norms, n * (k + 1) * q, n * 2 * (k * k + 1)]
    assert muon == [norms, n * p * q, n * k * q, n * 2 * k * k]


def in_backward(world):
    """What several optimizers make of a sharded model in the backward pass and by ordinary steps; layers with fewer
    rows than processes too.
    """
    results = {}
    for cls, rule in itertools.product((LoRAPreAdamW, LoRAPreMuon), ("als", "newton")):
        for early in (True, False):
            torch.manual_seed(0)
            layers = [nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 20), nn.Tanh(), nn.Linear(20, 3)]
            model = nn.Sequential(*layers)
            for layer in model:
                fully_shard(layer)
            fully_shard(model)
            options = dict(momentum_rank=2, update_rule=rule, update_in_backward=early, max_param_grad_norm=0.5)
            optimizer = cls(model.parameters(), lr=0.01, **options)
            held = []
            for step in range(5):
                rows = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
                model(rows.chunk(world)[dist.get_rank()]).square().mean().backward()
                held.append(sum(param.grad is not None for param in model.parameters()))
                optimizer.step()
                optimizer.zero_grad()
            states = [optimizer.state[param] for param in model.parameters()]
            results[f"{cls.__name__} {rule} {early}"] = {
                "params": [whole(param) for param in model.parameters()],
                "states": [products({name: whole(value) for name, value in state.items()}) for state in states],
                "held": held,
            }
    return results


@skip_before("torch", "2.8", "adds FSDP2's gradients up over processes on CPUs, where it should average them")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_updates_in_the_backward_pass_are_the_ordinary_ones(tmp_path, world):
    """FSDP2 calls the hooks after each reduce-scatter; stepped one by one or together, a matrix's step is the same but
    for sums' order.
    """
    first, *others = run(world, tmp_path / "run", in_backward, world)
    for name in [name for name in first if name.endswith("True")]:
        early, ordinary = first[name], first[name.replace("True", "False")]
        assert early["held"] == [0] * 5
        assert ordinary["held"] == [6] * 5
        torch.testing.assert_close(early["params"], ordinary["params"])
        torch.testing.assert_close(early["states"], ordinary["states"])
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def moved():
    """A module that goes to another place and back between steps: its DTensors get other local tensors."""
    mesh = init_device_mesh("cpu", (2,))
    module = nn.Linear(16, 12, bias=False)
    module.weight = nn.Parameter(distribute_tensor(torch.ones(12, 16), mesh, [Shard(0)]))
    optimizer = LoRAPreAdamW(module.parameters(), lr=0.1, momentum_rank=2)
    changes = []
    for step in range(4):
        if step == 3:
            module._apply(torch.clone)
        module.weight.grad = distribute_tensor(
            torch.randn(12, 16, generator=torch.Generator().manual_seed(step)), mesh, [Shard(0)]
        )
        before = module.weight.to_local().clone()
        optimizer.step()
        changes.append((module.weight.to_local() - before).abs().max().item())
    return changes


def test_sharded_matrices_train_on_after_their_module_was_moved(tmp_path):
    for changes in run(2, tmp_path / "run", moved):
        assert min(changes) > 0.01


def other_layouts():
    """What a tensor-parallel plan and other sharding make of a parameter."""
    mesh, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    value = torch.ones(8, 6)
    errors = []
    for on, placements in ((mesh, [Shard(1)]), (grid, [Shard(0), Shard(0)]), (mesh, [Replicate()])):
        try:
            LoRAPreAdamW([nn.Parameter(distribute_tensor(value, on, placements))])
        except NotImplementedError as error:
            errors.append(str(error))
    return errors


def test_other_dtensors_are_refused(tmp_path):
    errors = run(2, tmp_path / "run", other_layouts)[0]
    assert len(errors) == 3
    for error in errors:
        assert "shape (8, 6) that is a DTensor with placements" in error
        assert "Use FSDP2, DDP or one process" in error
