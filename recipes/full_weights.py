"""This module fine-tunes the weights of SmolLM2-135M with LoRA-Pre and with torch.optim.AdamW, at several rates each.

It trains ``recipes/configs/smollm2_full.yaml`` once for each method, rate, rank and seed. Every other key of
`recipes.sft` can be given here too. Both methods train the same matrices, those of attention and MLP. Embeddings and
head stay frozen. LoRA-Pre updates in the backward pass, as it would on a 7B model. Each run is one JSON file in the
output folder, so that the script, if it is started again, repeats nothing that is finished. The held-out loss that
chooses a rate is also the one that is printed, which favours the best rates a little. `python -m eval.rerun` measures
a test set as well.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass, field
from typing import Any

from lorapre_peft.integrations.summary import format_bytes
from recipes.arguments import CONFIGS
from recipes.sft import Recipe, build_trainer, parse
from recipes.training import environment, held_bytes, kept, start_run, write_atomically


@dataclass
class FullWeightArguments:
    """Holds the grid of the comparison. A part of docs/history.md was made with the defaults."""

    lrs: list[float] = field(
        default_factory=lambda: [1e-4, 2e-4, 5e-4, 1e-3], metadata={"help": "Learning rates of LoRA-Pre."}
    )
    baseline_lrs: list[float] = field(
        default_factory=lambda: [1e-4, 2e-4, 5e-4, 1e-3], metadata={"help": "Learning rates of torch.optim.AdamW."}
    )
    momentum_ranks: list[int] = field(default_factory=lambda: [8], metadata={"help": "Momentum ranks of LoRA-Pre."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds, of the data and its order."})


# The comparison sets these keys of `recipes.sft` itself. The text says why, or what can be given instead.
GRID = {
    "learning_rate": "it differs from run to run; give --lrs and --baseline_lrs",
    "momentum_rank": "it differs from run to run; give --momentum_ranks",
    "seed": "it differs from run to run; give --seeds",
    "optimizer": "LoRA-Pre's AdamW and torch.optim.AdamW are compared",
    "optim": "LoRA-Pre's AdamW and torch.optim.AdamW are compared",
    "use_peft": "it is false; python -m recipes.quickstart compares adapters",
    "config": "it is recipes/configs/smollm2_full.yaml; give single keys",
}


def arguments(*more: str) -> tuple[Recipe, FullWeightArguments]:
    """Parse the command line on top of the comparison's config, and ``more`` on top of both.

    Returns the recipe and the grid. Raises SystemExit for a key of `GRID`, and for no held-out problems.
    """
    for key, instead in GRID.items():
        if any(given.partition("=")[0].replace("-", "_") == f"__{key}" for given in sys.argv[1:]):
            raise SystemExit(f"--{key} cannot be given here: {instead}")
    folder = ["--output_dir", "runs/full_weights", "--resume", "true"]
    defaults = ["--config", str(CONFIGS / "smollm2_full.yaml"), *folder]
    recipe, options = parse([*defaults, *sys.argv[1:], *more], FullWeightArguments)
    if not recipe.data.eval_size:
        raise SystemExit("found eval_size=0; the held-out loss chooses the rates: expected an eval_size above 0")
    return recipe, options


def train(recipe: Recipe) -> dict[str, Any]:
    """Train one run, and return its held-out loss in nats per token, its optimizer state in bytes, and its log."""
    trainer = build_trainer(recipe, recipe.load_data())
    trainer.train()
    return {
        "loss": trainer.evaluate()["eval_loss"],
        "optimizer_state_bytes": held_bytes(trainer.optimizer.optimizer),
        "log": trainer.state.log_history,
    }


def best_rates(results: list[dict[str, Any]]) -> str:
    """Return as text the mean held-out loss at each rate, for each method and rank.

    The text also says which rate is the best one, and whether the grid has it inside.
    """
    lines = []
    for key in sorted({(r["method"], r["momentum_rank"]) for r in results}):
        runs = [r for r in results if (r["method"], r["momentum_rank"]) == key]
        rates = sorted({r["lr"] for r in runs})
        means = {lr: sum(r["loss"] for r in runs if r["lr"] == lr) / sum(r["lr"] == lr for r in runs) for lr in rates}
        best = min(means, key=means.get)
        if len(rates) == 1:
            place = "the only rate"
        elif best in (rates[0], rates[-1]):
            place = "AT THE GRID'S EDGE: widen it"
        else:
            place = "inside the grid"
        name = "torch.optim.AdamW" if key[0] == "adamw" else f"LoRA-Pre, k={key[1]}"
        lines.append(
            f"{name:20}{means[best]:8.3f} at lr {best:g} ({place}), state "
            f"{format_bytes(runs[0]['optimizer_state_bytes'])}"
        )
        lines.append(" " * 20 + "  ".join(f"{lr:g}: {loss:.3f}" for lr, loss in means.items()))
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    recipe, options = arguments()
    folder = recipe.folder
    grid = vars(options)
    config = {name: value for name, value in recipe.config.items() if name not in grid}
    start_run(folder, config, recipe.precision, resume=recipe.lorapre.resume)
    plan = [("adamw", lr, seed, 0) for seed in options.seeds for lr in options.baseline_lrs]
    plan += [("lorapre", lr, seed, k) for seed in options.seeds for k in options.momentum_ranks for lr in options.lrs]
    results = []
    for number, (method, lr, seed, k) in enumerate(plan, 1):
        done = folder / f"{method}{f'_k{k}' if k else ''}_lr{lr:g}_seed{seed}.json"
        if not done.exists():
            print(f"run {number} of {len(plan)}: {done.stem}")
            own = ["--optimizer", "trainer"] if method == "adamw" else ["--momentum_rank", str(k)]
            one, _ = arguments(*own, "--learning_rate", str(lr), "--seed", str(seed))
            result = {"method": method, "lr": lr, "seed": seed, "momentum_rank": k, **train(one)}
            write_atomically(done, json.dumps(result, indent=2))
            gc.collect()
        results.append(json.loads(done.read_text()))
    summary = {"options": kept(recipe.config), "environment": environment(recipe.precision), "results": results}
    (folder / "results.json").write_text(json.dumps(summary, indent=2))
    sizes = f"{recipe.data.train_size} problems, {recipe.data.eval_size} held out"
    print(f"\n{recipe.model.model_name_or_path}, attention and MLP weights, {sizes}, held-out loss")
    print(best_rates(results))


if __name__ == "__main__":
    main()
