"""This module is the command ``lorapre-memory``, which compares LoRA-Pre's estimate with arithmetic for its peers."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..integrations.config import LoRAPreConfig
from ..integrations.create import create_lorapre_optimizer
from ..integrations.summary import adamw_state_bytes, format_bytes
from ..integrations.targets import embedding_parameters, weight_targets
from ..lowrank.experts import stack_of
from ..lowrank.layout import matrix_shape
from ..lowrank.rules import RULES
from .models import find_config, meta_model
from .peak import MemoryEstimate, estimate

GALORE_RANK = 128  # This is the smallest rank in GaLore's published pre-training runs (scripts/benchmark_c4).
LORA_RANK = 16


def peers(model: nn.Module, momentum_rank: int, activations: int) -> dict[str, MemoryEstimate]:
    """Return weights, gradients and state, in bytes, of training a plain model with LoRA-Pre's peers.

    The full-weight peers train what requires a gradient, and hold all gradients at once. LoRA has adapters on all
    linear layers but the head. Temporaries are not counted. activations: a number that is the same for all peers.
    """
    total = sum(param.numel() for param in model.parameters())
    params = [param for param in model.parameters() if param.requires_grad]
    trained = sum(param.numel() for param in params)
    # Each expert of a stack counts as a matrix of its own for the peers too, even if their own code treats a stack
    # otherwise.
    targets = []
    for param, options in weight_targets(model, "all-linear", None, None).items():
        stack = stack_of(options)
        targets += [matrix_shape(param.shape, stack)] * (1 if stack is None else stack.experts)
    found: dict[str, MemoryEstimate] = {}

    def add(name: str, weights: int, gradients: int, state: int) -> None:
        found[name] = MemoryEstimate(weights, gradients, state, None, activations)

    # A parameter takes 4 bytes for its weight, 4 for its gradient and 8 for two float32 moments. What is frozen only
    # has a weight.
    add("AdamW, fp32", 4 * total, 4 * trained, 8 * trained)
    # A parameter takes 2 + 2 + 4 bytes, as torch.optim.AdamW keeps its moments in the parameter's dtype.
    add("AdamW, bf16", 2 * total, 2 * trained, 4 * trained)
    # A parameter takes 2 + 2 + 2 bytes, and each moment also has a float32 scale for every block of 256 entries.
    # Tensors below 4096 entries have two float32 moments (bitsandbytes, optim/optimizer.py: min_8bit_size, blocksize,
    # absmax1 and absmax2).
    eight_bit = sum(2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n for n in map(nn.Parameter.numel, params))
    add("8-bit AdamW, bf16", 2 * total, 2 * trained, eight_bit)
    # A parameter takes 2 + 2 bytes. A p×q target has the projector [r, min(p, q)] and both moments [r, max(p, q)] in
    # the gradient's dtype. Everything else is as in AdamW in bf16 (galore_torch: galore_projector.py with proj_type
    # "std", adamw.py).
    rest = trained - sum(p * q for p, q in targets)
    for rank in dict.fromkeys((GALORE_RANK, momentum_rank)):
        projected = sum(min(rank, p, q) * (min(p, q) + 2 * max(p, q)) for p, q in targets)
        add(f"GaLore r={rank}, bf16", 2 * total, 2 * trained, 2 * projected + 4 * rest)
    # A parameter of the frozen bf16 base takes 2 bytes, and one of an adapter 4 + 4 + 8, as PEFT's
    # autocast_adapter_dtype keeps adapters in float32.
    adapters = sum(LORA_RANK * (p + q) for p, q in targets)
    add(f"LoRA r={LORA_RANK}, bf16 base", 2 * total + 4 * adapters, 4 * adapters, 8 * adapters)
    return found


def memory_table(rows: dict[str, MemoryEstimate]) -> str:
    """Return a table as aligned text, with a row for each name and a column for each part."""
    columns = [field.name for field in dataclasses.fields(MemoryEstimate)] + ["total"]
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{column:>13}" for column in columns)]
    for name, row in rows.items():
        values = (getattr(row, column) for column in columns)
        lines.append(f"{name:{width}}" + "".join(f"{'–' if v is None else format_bytes(v):>13}" for v in values))
    return "\n".join(lines)


def adapter_table(model: nn.Module, ranks: Sequence[int], optimizer: str = "adamw", **options: Any) -> str:
    """Return a table of the state of adapters on all linear layers, for AdamW and for LoRA-Pre at r/2, r/4 and r/8.

    optimizer, options: as in `create_lorapre_optimizer`.
    """
    lines = [f"{'adapter':>8}{'parameters':>14}{'AdamW':>12}{'k = r/2':>12}{'k = r/4':>12}{'k = r/8':>12}"]
    for r in ranks:
        adapted = get_peft_model(model, LoRAPreConfig(r=r, target_modules="all-linear"))
        params = [param for param in adapted.parameters() if param.requires_grad]
        sizes = [format_bytes(sum(map(adamw_state_bytes, params)))]
        for k in (r // 2, r // 4, r // 8):
            fits = k >= (options.get("second_momentum_rank") or 1)
            sizes.append(format_bytes(_state_bytes(adapted, optimizer, k, **options)) if fits else "–")
        row = "".join(f"{size:>12}" for size in sizes)
        lines.append(f"{f'r = {r}':>8}{sum(param.numel() for param in params):>14,}{row}")
        model = adapted.unload()
    return "\n".join(lines)


def _state_bytes(model: nn.Module, optimizer: str, momentum_rank: int, **options: Any) -> int:
    options |= dict(lr=1e-4, momentum_rank=momentum_rank, verbose=False)
    built = create_lorapre_optimizer(model, optimizer, **options)
    return sum(built.param_state_bytes(param, group) for group in built.param_groups for param in group["params"])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table for a model. argv: the command line, or None for the process's own."""
    parser = argparse.ArgumentParser(
        prog="lorapre-memory",
        description="Peak memory of full-weight training with LoRA-Pre, from a dry run that allocates nothing, "
        "beside its peers.",
    )
    parser.add_argument("model", help="folder of a saved model, config.json, built-in name, or name on the hub")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument(
        "--momentum-rank", type=int, default=8, help="k of weights, also the rank of one GaLore row (default 8)"
    )
    parser.add_argument(
        "--second-momentum-rank", type=int, help="rank of the second moment (default: 1 with als, else k)"
    )
    parser.add_argument("--update-rule", choices=sorted(RULES), default="als")
    parser.add_argument("--embeddings", choices=["frozen", "adamw"], default="frozen", help="embeddings and head")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="LoRA-Pre's")
    parser.add_argument("--no-in-backward", action="store_true", help="leave out the row with updates in the backward")
    parser.add_argument("--batch", type=int, default=1, help="sequences per forward pass (default 1)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per sequence (default 512)")
    parser.add_argument("--no-checkpointing", action="store_true", help="without gradient checkpointing")
    parser.add_argument(
        "--lora-r", type=int, nargs="+", metavar="R", help="instead: the state of adapters of these ranks"
    )
    args = parser.parse_args(argv)
    of_weights = ("momentum_rank", "embeddings", "dtype", "no_in_backward", "batch", "seq_len", "no_checkpointing")
    unused = [f"--{name.replace('_', '-')}" for name in of_weights if getattr(args, name) != parser.get_default(name)]
    if args.lora_r and unused:
        parser.error(
            f"--lora-r prints the state of adapters, which does not depend on {', '.join(unused)}: leave that out"
        )

    names = ("momentum_rank", "second_momentum_rank", "update_rule", "embeddings")
    options = {name: getattr(args, name) for name in names}
    name = f"LoRA-Pre {'AdamW' if args.optimizer == 'adamw' else 'Muon'}, {args.update_rule} k={args.momentum_rank}"
    try:
        config, origin = find_config(args.model)
        model = meta_model(config, getattr(torch, args.dtype))
        if args.lora_r:
            print(f"{args.model}: {origin}; optimizer state of an adapter on all linear layers, float32")
            chosen = dict(update_rule=args.update_rule, second_momentum_rank=args.second_momentum_rank)
            print(adapter_table(model, args.lora_r, args.optimizer, **chosen))
            return
        if args.embeddings == "frozen":
            for param in embedding_parameters(model):
                param.requires_grad_(False)  # The peers freeze them too, so that all rows train the same.
        print("dry run of a step with LoRA-Pre, some ten seconds for a model of 7B parameters", file=sys.stderr)
        ordinary = estimate(
            model,
            args.optimizer,
            in_backward=False,
            batch=args.batch,
            seq_len=args.seq_len,
            checkpointing=not args.no_checkpointing,
            **options,
        )
        rows = {}
        if not args.no_in_backward:
            in_backward = estimate(model, args.optimizer, in_backward=True, batch=0, **options)
            rows[f"{name}, in backward"] = dataclasses.replace(in_backward, activations=ordinary.activations)
        rows |= {name: ordinary} | peers(model, args.momentum_rank, ordinary.activations)
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")

    parameters = sum(param.numel() for param in model.parameters())
    checkpointing = "without" if args.no_checkpointing else "with"
    print(
        f"{args.model}: {origin}; {type(model).__name__}, {parameters:,} parameters; {args.dtype}, batch {args.batch} "
        f"× {args.seq_len} tokens, {checkpointing} gradient checkpointing"
    )
    print(memory_table(rows))
    embeddings = "embeddings and head frozen; " if args.embeddings == "frozen" else ""
    print(
        f"All rows: {embeddings}total is the sum of the peaks. LoRA-Pre: a dry run of the code; 'in backward' is "
        "update_in_backward=True,\nwith one gradient at a time. Peers: arithmetic, with all gradients at once, "
        "temporaries not counted (–), and LoRA-Pre's activations."
    )
