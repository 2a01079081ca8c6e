"""This module finds the momentum rank at which LoRA-Pre has GaLore's peak memory, by size of model.

`python -m eval.equal_memory` prints the table. The budget of a model is what GaLore takes in weights, gradients and
state at its published rank. LoRA-Pre's peaks include the temporaries of its step, and are those of
`lorapre_peft.memory.estimate`. Those of the other optimizers are arithmetic (`lorapre_peft.memory.peers`). In all rows
the weights are bfloat16, all gradients exist at once, and embeddings and head are frozen. Activations are the same
everywhere, and are left out.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache

from torch import nn

from eval.rerun.models import base_config
from lorapre_peft.integrations.summary import format_bytes
from lorapre_peft.integrations.targets import embedding_parameters
from lorapre_peft.memory.models import meta_model
from lorapre_peft.memory.peak import estimate
from lorapre_peft.memory.peers import peers

# These are GaLore's ranks by model (its scripts/benchmark_c4). They are the paper's momentum ranks too.
RANKS = {"llama-60m": 128, "llama-130m": 256, "llama-350m": 256, "llama-1b": 512}
OPTIMIZERS: dict[str, dict[str, str]] = {
    "AdamW, als": {"optimizer": "adamw", "update_rule": "als"},
    "AdamW, newton": {"optimizer": "adamw", "update_rule": "newton"},
    "Muon, als": {"optimizer": "muon", "update_rule": "als"},
}


def largest_rank(model: nn.Module, budget: int, options: dict[str, str]) -> tuple[int, int]:
    """Return a momentum rank whose peak is within the budget while the next one's is not, and its peak in bytes.

    If not even rank 1 is within the budget, the result is 0 and the peak of rank 1. The search is by bisection. The
    peak grows with the rank, apart from small steps of the temporaries, which depend on how many matrices are stepped
    together.
    """
    side = min(min(param.shape) for param in model.parameters() if param.ndim == 2 and param.requires_grad)

    @cache
    def peak(k: int) -> int:
        return estimate(model, momentum_rank=k, in_backward=False, batch=0, **options).total

    k = bisect_right(range(1, side), budget, key=peak)
    return k, peak(max(k, 1))


def row(name: str, galore_rank: int) -> dict[str, str]:
    """Return the cells of a model's row: the budget, what dense methods take beyond it, and LoRA-Pre's ranks."""
    model = meta_model(base_config(name))
    for param in embedding_parameters(model):
        param.requires_grad_(False)
    dense = peers(model, galore_rank, 0)
    budget = dense[f"GaLore r={galore_rank}, bf16"].total
    found = {"GaLore": f"r = {galore_rank}, {format_bytes(budget)}"}
    for peer in ("AdamW, bf16", "8-bit AdamW, bf16"):
        found[peer] = f"{format_bytes(dense[peer].total - budget)} more"
    for title, options in OPTIMIZERS.items():
        k, peak = largest_rank(model, budget, options)
        found[f"LoRA-Pre {title}"] = f"k = {k}, {format_bytes(peak)}" if k else "none"
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table. argv: arguments of the command line. None stands for the process's own."""
    parser = argparse.ArgumentParser(prog="python -m eval.equal_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=RANKS, default=list(RANKS), help="default: all")
    args = parser.parse_args(argv)
    rows = {name: row(name, RANKS[name]) for name in args.models}
    heads = list(next(iter(rows.values())))
    print(f"| model | {' | '.join(heads)} |\n|" + "---|" * (len(heads) + 1))
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells.values())} |")


if __name__ == "__main__":
    main()
