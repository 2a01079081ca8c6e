"""This module proves that a change leaves every bit of the steps as it was, by two recordings of the same runs.

    python tests/helpers/bit_equality.py record before.json   # in a work tree of the old commit
    python tests/helpers/bit_equality.py record after.json    # in one of the new commit
    python tests/helpers/bit_equality.py compare before.json after.json

`record` takes a few steps in each of `CASES`, on every backend of this device but the compiled one, whose graphs take
minutes to compile. It writes the SHA-256 of each weight and state tensor at the end, and of each figure of the last
step's metrics. `compare` lists what differs, and exits with 1 if anything does. Other processors and other versions of
PyTorch add sums in another order, so both recordings must come from the same machine.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from backend_runs import DEVICE
from stacking import LAYOUTS
from stepping import stream, weights
from torch import Tensor, nn

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.kernels import choose as backends
from lorapre_peft.optim.base import LoRAPreOptimizer

# These shapes have few and many columns, and whole registers of them or not. Two are equal, so that they are stacked.
# The last ones take the AdamW path.
SHAPES = [(33, 16), (20, 70), (20, 70), (48, 128), (70, 20), (8, 3, 3, 3), (33,), (3,)]
Streams = list[list[Tensor | None]]  # For each parameter it holds the gradients of all steps.


def as_they_are(streams: Streams) -> None:
    """Leave the gradients as they are."""


def with_faults(streams: Streams) -> None:
    """Put gradients in that are missing, zero or not finite, one of each at a first step."""
    streams[0][0], streams[1][0], streams[2][0] = None, torch.zeros(20, 70), torch.full((20, 70), float("nan"))
    streams[3][2][0, 0], streams[4][2], streams[6][2] = float("inf"), torch.zeros(70, 20), None
    streams[0][3][:, 5:] = 0


def one_group(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Put all parameters into one group."""
    return [{"params": params}]


def many_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Give each parameter a group whose learning rate, rank and rule are its own."""
    return [
        {"params": [param], "lr": 0.01 / (i + 1), "momentum_rank": 1 + i % 3, "update_rule": ("als", "newton")[i % 2]}
        for i, param in enumerate(params)
    ]


def experts(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Make groups of the parameters, one for each of `LAYOUTS`, as stacks of four experts."""
    return [{"params": [param], "experts": 4, "experts_dim": dim} for param, (_, dim) in zip(params, LAYOUTS.values())]


def idle_experts(streams: Streams) -> None:
    """Set the gradients of one expert of each stack to zero, at the first step and again at a later one."""
    for step in (0, 3):
        stack, rows, columns = (stream[step] for stream in streams)
        stack[1], rows[20:40], columns[:, 1::4] = 0, 0, 0


@dataclass(frozen=True)
class Case:
    """Holds some steps of one optimizer: its options, and what is special about its parameters and gradients.

    Attributes:
        cls, options: class and options of the optimizer.
        shapes, dtype: shapes and dtype of the parameters.
        steps: number of steps.
        change: function that changes the gradients in place.
        groups: function that makes groups of the parameters.
        resumed_at: step before which a new optimizer takes over with the saved state. None stands for no such step.
    """

    cls: type[LoRAPreOptimizer]
    options: dict[str, Any] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=lambda: SHAPES)
    dtype: torch.dtype = torch.float32
    steps: int = 6
    change: Callable[[Streams], None] = as_they_are
    groups: Callable[[list[nn.Parameter]], list[dict[str, Any]]] = one_group
    resumed_at: int | None = None

    def run(self, backend: str) -> dict[str, Tensor]:
        """Train on a backend, and return by name the parameters, state tensors and metrics of the end."""
        params = [
            nn.Parameter(weights(*shape, seed=i, dtype=self.dtype).detach().to(DEVICE))
            for i, shape in enumerate(self.shapes)
        ]
        streams: Streams = [[*stream(shape, self.steps, seed=i)] for i, shape in enumerate(self.shapes)]
        self.change(streams)
        optimizer = self.built(params, backend)
        for step, grads in enumerate(zip(*streams)):
            if step == self.resumed_at:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = self.built(params, backend)
                optimizer.load_state_dict(saved)
            optimizer.record_metrics = step == self.steps - 1
            given = [(param, None if grad is None else grad.to(param)) for param, grad in zip(params, grads)]
            if self.options.get("update_in_backward"):
                torch.stack([(param * grad).sum() for param, grad in given]).sum().backward()
            else:
                for param, grad in given:
                    param.grad = grad
            optimizer.step()
        found = {f"parameter {i}": param.detach() for i, param in enumerate(params)}
        for i, param in enumerate(params):
            found |= {f"parameter {i}, {name}": value for name, value in optimizer.state[param].items()}
        return found | {name: torch.tensor(value) for name, value in optimizer.metrics().items()}

    def built(self, params: list[nn.Parameter], backend: str) -> LoRAPreOptimizer:
        """Return a new optimizer of the parameters."""
        options = {"lr": 0.01, "momentum_rank": 3, "backend": backend} | self.options
        return self.cls(self.groups(params), **options)


ALL_OPTIONS = dict(max_param_grad_norm=2.0, weight_decay=0.1, maximize=True, update_scale=0.5, seed=3)
MUON_OPTIONS = ALL_OPTIONS | dict(nesterov=True, adjust_lr_fn="original", adamw_lr=1e-3, ns_steps=3)
STACKS = [(4, 20, 12), (80, 12), (20, 48)]
CASES = {
    "adamw als": Case(LoRAPreAdamW),
    "adamw newton": Case(LoRAPreAdamW, {"update_rule": "newton"}),
    "muon als": Case(LoRAPreMuon),
    "muon newton": Case(LoRAPreMuon, {"update_rule": "newton"}),
    "adamw, first step": Case(LoRAPreAdamW, steps=1),
    "adamw newton, first step": Case(LoRAPreAdamW, {"update_rule": "newton"}, steps=1),
    "adamw, rank 1": Case(LoRAPreAdamW, {"momentum_rank": 1}),
    "adamw, rank 17 and 5": Case(LoRAPreAdamW, {"momentum_rank": 17, "second_momentum_rank": 5}),
    "adamw newton, rank 12": Case(LoRAPreAdamW, {"update_rule": "newton", "momentum_rank": 12}),
    "muon, rank 17": Case(LoRAPreMuon, {"momentum_rank": 17}),
    "adamw, rank 0": Case(LoRAPreAdamW, {"momentum_rank": 0}),
    "adamw, default rank": Case(LoRAPreAdamW, {"momentum_rank": None}),
    "adamw, clipped and all other options": Case(LoRAPreAdamW, ALL_OPTIONS),
    "muon, clipped and all other options": Case(LoRAPreMuon, MUON_OPTIONS),
    "adamw, residual weight": Case(LoRAPreAdamW, {"residual_weight": 0.1}),
    "adamw, bfloat16 stochastic": Case(LoRAPreAdamW, {"seed": 1}, dtype=torch.bfloat16),
    "muon, bfloat16 stochastic": Case(LoRAPreMuon, {"seed": 1}, dtype=torch.bfloat16),
    "adamw, bfloat16 nearest": Case(LoRAPreAdamW, {"bf16_rounding": "nearest"}, dtype=torch.bfloat16),
    "muon, products in bfloat16": Case(LoRAPreMuon, {"ns_dtype": "bfloat16"}),
    "adamw, float16": Case(LoRAPreAdamW, dtype=torch.float16),
    "adamw, float64": Case(LoRAPreAdamW, dtype=torch.float64),
    "adamw, many groups": Case(LoRAPreAdamW, groups=many_groups),
    "muon, many groups": Case(LoRAPreMuon, groups=many_groups),
    "adamw, faults": Case(LoRAPreAdamW, change=with_faults),
    "adamw newton, faults": Case(LoRAPreAdamW, {"update_rule": "newton"}, change=with_faults),
    "muon, faults": Case(LoRAPreMuon, change=with_faults),
    "adamw, experts": Case(LoRAPreAdamW, shapes=STACKS, groups=experts, change=idle_experts),
    "muon, experts": Case(LoRAPreMuon, shapes=STACKS, groups=experts, change=idle_experts),
    "adamw, resumed": Case(LoRAPreAdamW, resumed_at=3),
    "muon, resumed": Case(LoRAPreMuon, resumed_at=3),
    "adamw, in the backward pass": Case(LoRAPreAdamW, {"update_in_backward": True}),
    "adamw, tiles of rows": Case(LoRAPreAdamW, {"temporary_bytes": 20_000}),
    "muon, tiles of rows": Case(LoRAPreMuon, {"temporary_bytes": 20_000}),
    "adamw, split among threads": Case(LoRAPreAdamW, shapes=[(1100, 2000), (1100, 2000)], steps=3),
}  # fmt: skip


def bits(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and entries."""
    entries = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + entries).hexdigest()


def machine() -> dict[str, str]:
    """Return what decides the order of sums: the device, the vector instructions, threads and PyTorch's version."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    capability, threads = torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())
    return {"device": device, "instructions": capability, "threads": threads, "torch": torch.__version__}


def record(names: list[str]) -> dict[str, Any]:
    """Return the recording of some cases: the machine, and by case and backend the hash of each number's bits."""
    found = {}
    for name in names:
        case = CASES[name]
        for backend in backends.available(DEVICE):
            if backend != "compiled" and backend in case.cls.backend_names:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # They are about default ranks and skipped gradients.
                    found[f"{name} ({backend})"] = {key: bits(value) for key, value in case.run(backend).items()}
    return {"machine": machine(), "cases": found}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a line for each case whose numbers differ, or which one recording lacks.

    Raises ValueError if the recordings were made on different machines.
    """
    if before["machine"] != after["machine"]:
        raise ValueError(
            f"found recordings of {before['machine']} and of {after['machine']}, whose sums have other orders: record "
            "both commits on one machine"
        )
    lines = []
    for case in dict.fromkeys((*before["cases"], *after["cases"])):
        old, new = before["cases"].get(case), after["cases"].get(case)
        if old is None or new is None:
            lines.append(f"{case}: only in the recording {'after' if old is None else 'before'}")
        elif old != new:
            names = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
            lines.append(f"{case}: {len(names)} of {len(old)} differ: {'; '.join(names[:4])}")
    return lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train, and write the hashes into a file")
    recording.add_argument("file", type=Path)
    comparison = commands.add_parser("compare", help="list what differs between two files")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        found = record(list(CASES))
        args.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found['cases'])} cases, {sum(map(len, found['cases'].values()))} tensors: {args.file}")
        return
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (args.before, args.after))
    try:
        found = differences(before, after)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(found) or f"{len(before['cases'])} cases are equal in every bit")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
