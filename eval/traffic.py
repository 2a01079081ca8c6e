"""This module computes the bytes that each process sends in a training step, by size of model.

    python -m eval.traffic --processes 8

Under DDP every process computes the whole step from averaged gradients, so that no optimizer sends anything. Under
FSDP2 AdamW's step is elementwise and sends nothing either, while LoRA-Pre adds up sums over a matrix's rows. A test
counts the collectives of real steps (`tests/distributed/test_traffic.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from eval.rerun.models import base_config
from lorapre_peft.integrations.create import create_lorapre_optimizer
from lorapre_peft.integrations.summary import format_bytes
from lorapre_peft.lowrank.experts import stack_of
from lorapre_peft.lowrank.layout import matrix_shape
from lorapre_peft.lowrank.rules import RULES
from lorapre_peft.memory.models import meta_model
from lorapre_peft.optim.base import LoRAPreOptimizer

MODELS = ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "Llama-2-7b-hf")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW, als, k = 8": dict(optimizer="adamw", update_rule="als", momentum_rank=8),
    "AdamW, newton, k = 8": dict(optimizer="adamw", update_rule="newton", momentum_rank=8),
    "AdamW, newton, k = 128": dict(optimizer="adamw", update_rule="newton", momentum_rank=128),
    "Muon, als, k = 8": dict(optimizer="muon", update_rule="als", momentum_rank=8),
}


def all_reduce(payload: int, processes: int) -> float:
    """Return the bytes that a process sends in a ring all-reduce: each part of the payload twice, except for one part.

    payload: bytes of the tensor.
    """
    return 2 * payload * (processes - 1) / processes


def all_gather(payload: int, processes: int) -> float:
    """Return the bytes that a process sends in a ring all-gather or reduce-scatter. payload: bytes altogether."""
    return payload * (processes - 1) / processes


def payloads(optimizer: LoRAPreOptimizer, processes: int) -> tuple[int, int]:
    """Return the bytes of what an FSDP2 step adds up over the processes, and of what it gathers.

    Each matrix or vector adds ‖g‖² and whether there is a gradient, both float64. Each moment of rank k of a p×q
    matrix adds k q float32 numbers of projections, and its Gram matrices in float64, which are 2k² numbers for ``als``
    and k² for ``newton``. Muon gathers its momentum, which is p×q float32 with p rounded up to a multiple of the
    processes. Experts that lie one after the other are each whole on one process, so that nothing is sent for them.
    """
    summed = gathered = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            ranks = optimizer.ranks(param, group)
            stack = stack_of(group) if ranks else None
            if stack is not None and stack.dim == 0:
                continue
            matrices = 1 if stack is None else stack.experts
            summed += matrices * 2 * 8
            if not ranks:
                continue
            p, q = matrix_shape(param.shape, stack)
            grams = 2 if RULES[group["update_rule"]].projects_new else 1
            summed += matrices * sum(4 * k * q + 8 * grams * k * k for k in ranks)
            if len(optimizer.moments) == 1:
                gathered += matrices * 4 * processes * -(-p // processes) * q
    return summed, gathered


def sent(config: PretrainedConfig, processes: int) -> dict[str, float]:
    """Return the bytes that each process sends in a step for DDP, for FSDP2, and for each optimizer beside FSDP2's.

    DDP all-reduces the gradients once. FSDP2 gathers the weights for the forward and for the backward pass, and
    reduces and scatters the gradients. All of these are bfloat16.
    """
    model = meta_model(config)
    size = sum(param.nbytes for param in model.parameters())
    found = {"DDP": all_reduce(size, processes), "FSDP2": 3 * all_gather(size, processes)}
    for name, options in OPTIMIZERS.items():
        optimizer = create_lorapre_optimizer(model, lr=1e-3, embeddings="adamw", verbose=False, **options)
        summed, gathered = payloads(optimizer, processes)
        found[name] = all_reduce(summed, processes) + all_gather(gathered, processes)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table. argv: arguments of the command line. None stands for the process's own."""
    parser = argparse.ArgumentParser(prog="python -m eval.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8, help="that share the model (default 8)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of the suites' models, folders or shapes")
    args = parser.parse_args(argv)
    if args.processes < 2:
        parser.error(f"--processes {args.processes}: expected at least 2, as one alone sends nothing")
    try:
        rows = {name: sent(base_config(name), args.processes) for name in args.models}
    except ValueError as error:  # A model that is not found.
        parser.error(str(error))
    heads = list(next(iter(rows.values())))
    print(f"| {args.processes} processes | {' | '.join(heads)} |\n|" + "---|" * (len(heads) + 1))
    for name, row in rows.items():
        cells = (format_bytes(round(row[head])) for head in heads[:2])
        added = (f"+{format_bytes(round(row[head]))} ({100 * row[head] / row['FSDP2']:.2g} %)" for head in heads[2:])
        print(f"| {name} | {' | '.join([*cells, *added])} |")


if __name__ == "__main__":
    main()
