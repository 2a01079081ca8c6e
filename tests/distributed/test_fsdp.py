"""FSDP2: matrices sharded by rows over 2, 3 and 4 processes give the steps of one process."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run
from roundoff import assert_same_steps, undisturbed
from stepping import stream, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from versions import skip_before

import lorapre_peft.lowrank.moments
import lorapre_peft.optim.base
from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.lowrank.sharding import local
from lorapre_peft.optim.base import LoRAPreOptimizer

# (2, 24) is LoRA's A with fewer rows than processes; of (5, 12) the fourth process has no row. The vectors take the
# AdamW path.
SHAPES = [(7, 20), (33, 16), (2, 24), (5, 12), (33,), (20, 7), (33, 16), (8, 3, 3, 3), (3,)]
# Longer sums than the others'. Not for `newton`: there, rounding the gradients by 1e-7 moves one process's own weights
# as far as sharding does.
LARGE = (150, 140)


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


@dataclass(frozen=True)
class Case:
    """Steps with fixed gradients that are to be the same however many processes share the rows of the matrices."""

    cls: type[LoRAPreOptimizer]
    rule: str = "als"
    options: dict[str, Any] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=lambda: SHAPES)
    steps: int = 5
    dtype: torch.dtype = torch.float32
    reads_norms: bool = True  # False: as on a GPU, where the host does not read which gradients are finite

    def mesh(self, world: int) -> DeviceMesh:
        """What the parameters are sharded over."""
        return init_device_mesh("cpu", (world,))

    def streams(self) -> list[list[Tensor | None]]:
        """The gradients of each parameter, step by step."""
        return [[*stream(shape, self.steps, seed=i)] for i, shape in enumerate(self.shapes)]

    def gradient(self, step: int, grad: Tensor | None, world: int, mesh: DeviceMesh | None) -> Tensor | None:
        """What a parameter has as its gradient in this process; without a mesh, one process has it whole."""
        if grad is None:
            return None
        return grad.to(self.dtype) if mesh is None else shard(grad.to(self.dtype), mesh)

    def train(self, world: int, mesh: DeviceMesh | None = None, prepare: Callable = undisturbed) -> dict[str, Any]:
        """Take the steps, sharded over a mesh of ``world`` processes or in this one; return all that has to agree."""
        start = [weights(*shape, seed=i, dtype=self.dtype) for i, shape in enumerate(self.shapes)]
        params = start if mesh is None else [nn.Parameter(shard(param, mesh)) for param in start]
        # Sharded matrices take the eager path: so does one process, for `newton` makes much of another order of sums.
        optimizer = prepare(self.cls(params, lr=0.01, update_rule=self.rule, backend="eager", **self.options))
        with pytest.MonkeyPatch.context() as patch:
            if not self.reads_norms:
                for module in (lorapre_peft.optim.base, lorapre_peft.lowrank.moments):
                    patch.setattr(module, "reads_are_free", lambda device: False)
            for step, grads in enumerate(zip(*self.streams())):
                optimizer.record_metrics = step == self.steps - 1
                for param, grad in zip(params, grads):
                    param.grad = self.gradient(step, grad, world, mesh)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about gradients that are not finite
                    optimizer.step()
            states = [optimizer.state[param] for param in params]
            copies = [local(state[name]).clone() for state in states for name in sorted(state) if name.endswith("_A")]
            return {
                "params": [whole(param) for param in params],
                "state": [products({name: whole(value) for name, value in state.items()}) for state in states],
                "copies": copies,
                "metrics": optimizer.metrics(),
                "skipped": optimizer.skipped_updates,
            }


class Replicated(Case):
    """HSDP: of four processes two and two hold everything."""

    def mesh(self, world: int) -> DeviceMesh:
        return init_device_mesh("cpu", (2, 2) if world == 4 else (1, world))


class Faulty(Case):
    """Gradients that are not finite, missing or zero: every process has to get over them alike."""

    def streams(self) -> list[list[Tensor | None]]:
        streams = super().streams()
        streams[5][1][-1, 3] = float("nan")  # in the last process's rows
        streams[1][2][0] = float("inf")
        streams[4][1][-1] = float("nan")
        streams[0][3] = streams[8][3] = None
        streams[2][0] = torch.zeros(SHAPES[2])  # it starts a step later than the others
        streams[3][2] = torch.zeros(SHAPES[3])
        return streams


class Absent(Case):
    """The second process has no gradients in every second step, as if those of its rows were zero."""

    def gradient(self, step: int, grad: Tensor | None, world: int, mesh: DeviceMesh | None) -> Tensor | None:
        if step % 2:
            count = -(-len(grad) // world)
            grad[count : 2 * count] = 0
            if mesh is not None and mesh.get_local_rank() == 1:
                return None
        return super().gradient(step, grad, world, mesh)


ALL = {
    "max_param_grad_norm": 2.0,
    "weight_decay": 0.1,
    "maximize": True,
    "update_scale": 0.5,
    "seed": 3,
    "temporary_bytes": 20_000,  # tiles of rows, several chunks to a bucket
}
MUON = {"nesterov": True, "adjust_lr_fn": "original", "adamw_lr": 1e-3}
LONG = {
    f"{cls.__name__}, {rule}, 50 steps": Case(cls, rule, shapes=SHAPES[:5], steps=50)
    for cls, rule in itertools.product((LoRAPreAdamW, LoRAPreMuon), ("als", "newton"))
}
OPTIONS = {
    "adamw, als, all options": Case(LoRAPreAdamW, "als", ALL, [*SHAPES, LARGE]),
    "adamw, newton, all options": Case(LoRAPreAdamW, "newton", ALL),
    "muon, als, all options": Case(LoRAPreMuon, "als", ALL | MUON, [*SHAPES, LARGE]),
    "muon, newton, all options": Case(LoRAPreMuon, "newton", ALL | MUON),
}
FAULTY = {
    "adamw, als, faults": Faulty(LoRAPreAdamW),
    "adamw, als, unread faults": Faulty(LoRAPreAdamW, reads_norms=False),
    "adamw, newton, unread faults": Faulty(LoRAPreAdamW, "newton", reads_norms=False),
    "muon, als, unread faults": Faulty(LoRAPreMuon, reads_norms=False),
}
ABSENT = {
    "adamw, als, absent": Absent(LoRAPreAdamW),
    "muon, newton, unread absent": Absent(LoRAPreMuon, "newton", reads_norms=False),
}
STOCHASTIC = {
    "adamw, als, stochastic": Case(LoRAPreAdamW, options={"bf16_rounding": "stochastic"}, dtype=torch.bfloat16)
}
REPLICATED = {"adamw, als, HSDP": Replicated(LoRAPreAdamW), "muon, als, HSDP": Replicated(LoRAPreMuon)}
CASES = LONG | OPTIONS | FAULTY | ABSENT | STOCHASTIC | REPLICATED


def sharded(world):
    """All cases, sharded over the processes."""
    return {name: case.train(world, case.mesh(world)) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=(*(pytest.param(world, marks=pytest.mark.slow) for world in (2, 3)), 4))
def runs(request, tmp_path_factory):
    """What `sharded` gave in ``request.param`` processes, by rank."""
    return run(request.param, tmp_path_factory.mktemp("fsdp") / "run", sharded, request.param)


def tensors(result):
    """All of what `Case.train` returns that one process and many have in common."""
    states = [value for state in result["state"] for _, value in sorted(state.items())]
    return [*result["params"], *states, *(torch.tensor(value) for _, value in sorted(result["metrics"].items()))]


def assert_as_one_process(runs, name, skipped=0):
    """Parameters, state and figures but for the order of sums; what the processes share, and what is replicated, in
    every bit.
    """
    first, *others = (rank[name] for rank in runs)
    assert_same_steps(tensors(first), lambda prepare: tensors(CASES[name].train(len(runs), prepare=prepare)))
    assert first["skipped"] == skipped
    for found in others:
        assert all(map(torch.equal, tensors(found), tensors(first)))
        assert found["skipped"] == skipped
        assert all(map(torch.equal, found["copies"], first["copies"]))


@pytest.mark.parametrize("name", LONG)
def test_many_steps_are_those_of_one_process(runs, name):
    assert_as_one_process(runs, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_in_shards_what_they_do_in_one_process(runs, name):
    assert_as_one_process(runs, name)


@pytest.mark.parametrize("name", FAULTY)
def test_every_process_skips_the_same_gradients_as_one(runs, name):
    assert_as_one_process(runs, name, skipped=3)


@pytest.mark.parametrize("name", ABSENT)
def test_a_process_without_gradients_counts_as_one_of_zeros(runs, name):
    assert_as_one_process(runs, name)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_of_shards_is_that_of_the_whole(runs, name):
    assert_as_one_process(runs, name)


@pytest.mark.parametrize("name", REPLICATED)
def test_replicas_of_shards_take_the_steps_of_one_process(runs, name):
    assert_as_one_process(runs, name)


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


IN_BACKWARD = list(itertools.product((LoRAPreAdamW, LoRAPreMuon), ("als", "newton")))


def steps_of_a_model(cls, rule, early, world=1, rank=0, prepare=undisturbed):
    """Parameters and states after five steps, and how many gradients were held after each backward pass; with layers
    of fewer rows than processes.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 20), nn.Tanh(), nn.Linear(20, 3))
    if world > 1:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    options = dict(momentum_rank=2, update_rule=rule, update_in_backward=early, max_param_grad_norm=0.5)
    optimizer = prepare(cls(model.parameters(), lr=0.01, **options))
    held = []
    for step in range(5):
        rows = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        model(rows.chunk(world)[rank]).square().mean().backward()
        held.append(sum(param.grad is not None for param in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    states = [optimizer.state[param] for param in model.parameters()]
    states = [products({name: whole(value) for name, value in state.items()}) for state in states]
    tensors = [*map(whole, model.parameters()), *(value for state in states for _, value in sorted(state.items()))]
    return tensors, held


def in_backward(world):
    return [
        steps_of_a_model(cls, rule, early, world, dist.get_rank())
        for cls, rule in IN_BACKWARD
        for early in (True, False)
    ]


@skip_before("torch", "2.8", "adds FSDP2's gradients up over processes on CPUs, where it should average them")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_updates_in_the_backward_pass_are_the_ordinary_ones(tmp_path, world):
    """FSDP2 calls the hooks after each reduce-scatter; stepped one by one or together, a matrix's step is the same but
    for sums' order.
    """
    first, *others = run(world, tmp_path / "run", in_backward, world)
    for (cls, rule), early, ordinary in zip(IN_BACKWARD, first[::2], first[1::2]):
        assert early[1] == [0] * 5
        assert ordinary[1] == [6] * 5
        assert_same_steps(
            early[0] + ordinary[0],
            lambda prepare, of=(cls, rule): 2 * steps_of_a_model(*of, early=False, prepare=prepare)[0],
        )
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


def placed_otherwise():
    """Steps with gradients that lie otherwise than their parameter: (weights, of one process)."""
    mesh, pairs = init_device_mesh("cpu", (2,)), []
    for cls, placement in itertools.product((LoRAPreAdamW, LoRAPreMuon), (Replicate(), Partial(), Shard(1))):
        value = torch.ones(12, 16)
        params = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])), nn.Parameter(value)]
        optimizers = [cls([param], lr=0.1, momentum_rank=2, backend="eager") for param in params]
        for step in range(3):
            grad = stream((12, 16), 3)[step]
            params[0].grad = distribute_tensor(grad, mesh, [Shard(0)]).redistribute(placements=[Replicate()])
            if placement != Replicate():
                half = grad / 2 if isinstance(placement, Partial) else grad.chunk(2, 1)[dist.get_rank()]
                params[0].grad = DTensor.from_local(half, mesh, [placement], run_check=False)
            params[1].grad = grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        pairs.append(tuple(map(whole, params)))
    return pairs


def test_a_gradient_placed_otherwise_than_its_parameter_is_redistributed(tmp_path):
    """As products of DTensors leave it; FSDP2 places its own like the parameters."""
    for found, expected in run(2, tmp_path / "run", placed_otherwise)[0]:
        assert (expected - 1).abs().max() > 0.1
        # The sums over rows are added up in another order: some roundings of numbers of the size of the weights.
        torch.testing.assert_close(found, expected, rtol=0, atol=16 * torch.finfo(torch.float32).eps)


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
