"""Fine-tune the weights of SmolLM2-135M with LoRA-Pre and with torch.optim.AdamW, each over its own grid of learning rates.

The same matrices (attention and MLP) are trained by both; embeddings and head stay frozen. LoRA-Pre updates in the
backward pass, as it would on a 7B model. One run is one JSON file in the output folder: started again, the script
repeats nothing that is finished.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import HfArgumentParser, set_seed
from trl import SFTTrainer

from lorapre_peft import LoRAPreCallback, lorapre_optimizer
from lorapre_peft.table import format_bytes
from lorapre_peft.targets import weight_targets
from recipes.models import SMOLLM2, load_model
from recipes.problems import problems
from recipes.training import environment, sft_config, state_bytes


@dataclass
class FullWeightArguments:
    """Options of the comparison; the defaults are what the README reports."""

    model: str = field(default=SMOLLM2, metadata={"help": "'smollm2' (from a package), a local folder, or a hub id."})
    lrs: list[float] = field(
        default_factory=lambda: [1e-4, 2e-4, 5e-4, 1e-3], metadata={"help": "Learning rates of LoRA-Pre."}
    )
    baseline_lrs: list[float] = field(
        default_factory=lambda: [1e-4, 2e-4, 5e-4, 1e-3], metadata={"help": "Learning rates of torch.optim.AdamW."}
    )
    momentum_ranks: list[int] = field(default_factory=lambda: [8], metadata={"help": "Momentum ranks of LoRA-Pre."})
    update_rule: str = field(default="als", metadata={"help": "'als' or 'newton'."})
    steps: int = field(default=40, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=4, metadata={"help": "Problems per step."})
    test_size: int = field(default=64, metadata={"help": "Held-out problems for the loss."})
    bf16: bool = field(
        default=True, metadata={"help": "Products in bfloat16, weights in float32; --no_bf16 on a CPU without AMX."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds, of the data and its order."})
    output_dir: str = field(default="runs/full_weights", metadata={"help": "Where the runs' JSON files go."})


def train(options: FullWeightArguments, method: str, lr: float, seed: int, k: int, folder: Path) -> dict[str, Any]:
    """One run: the held-out loss after training and the optimizer's state."""
    train_set, test_set = data(options, seed)
    set_seed(seed)
    model, tokenizer = load_model(options.model)
    shared = dict(
        lr=lr, steps=options.steps, batch_size=options.batch_size, seed=seed, bf16=options.bf16, save_strategy="no"
    )
    if method == "adamw":
        targets = weight_targets(model, "all-linear", None, None)
        for param in model.parameters():
            param.requires_grad_(param in targets)
        args = sft_config(folder, **shared)
        extra: dict[str, Any] = {}
    else:
        args = sft_config(folder, max_grad_norm=0, **shared)
        optimizer = lorapre_optimizer(
            "adamw", args, momentum_rank=k, update_rule=options.update_rule, others="frozen", update_in_backward=True
        )
        extra = {"optimizer_cls_and_kwargs": optimizer, "callbacks": [LoRAPreCallback()]}
    trainer = SFTTrainer(
        model, args, train_dataset=train_set, eval_dataset=test_set, processing_class=tokenizer, **extra
    )
    trainer.train()
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "momentum_rank": k,
        "loss": trainer.evaluate()["eval_loss"],
        "optimizer_state_bytes": state_bytes(trainer.optimizer),
        "log": trainer.state.log_history,
    }


def data(options: FullWeightArguments, seed: int) -> tuple[Dataset, Dataset]:
    train_set = problems(options.steps * options.batch_size, seed=2 * seed)
    return train_set, problems(options.test_size, seed=2 * seed + 1, exclude=train_set)


def best_rates(results: list[dict[str, Any]]) -> str:
    """Per method: mean held-out loss at each rate, the best one, and whether the grid has it inside."""
    lines = []
    for key in sorted({(r["method"], r["momentum_rank"]) for r in results}):
        runs = [r for r in results if (r["method"], r["momentum_rank"]) == key]
        rates = sorted({r["lr"] for r in runs})
        means = {lr: sum(r["loss"] for r in runs if r["lr"] == lr) / sum(r["lr"] == lr for r in runs) for lr in rates}
        best = min(means, key=means.get)
        inside = "inside the grid" if rates[0] < best < rates[-1] else "AT THE GRID'S EDGE: widen it"
        name = "torch.optim.AdamW" if key[0] == "adamw" else f"LoRA-Pre, k={key[1]}"
        lines.append(
            f"{name:20}{means[best]:8.3f} at lr {best:g} ({inside}), state {format_bytes(runs[0]['optimizer_state_bytes'])}"
        )
        lines.append(" " * 20 + "  ".join(f"{lr:g}: {loss:.3f}" for lr, loss in means.items()))
    return "\n".join(lines)


def main() -> None:
    (options,) = HfArgumentParser(FullWeightArguments).parse_args_into_dataclasses()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plan = [("adamw", lr, seed, 0) for seed in options.seeds for lr in options.baseline_lrs]
    plan += [("lorapre", lr, seed, k) for seed in options.seeds for k in options.momentum_ranks for lr in options.lrs]
    results = []
    for number, (method, lr, seed, k) in enumerate(plan, 1):
        name = f"{method}_{options.update_rule}_k{k}" if method == "lorapre" else method
        done = folder / f"{name}_lr{lr:g}_seed{seed}_steps{options.steps}x{options.batch_size}.json"
        if not done.exists():
            print(f"run {number} of {len(plan)}: {done.stem}")
            result = train(options, method, lr, seed, k, folder)
            partial = done.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=2))
            partial.rename(done)
            gc.collect()
        results.append(json.loads(done.read_text()))
    summary = {"options": asdict(options), "environment": environment(), "results": results}
    (folder / "results.json").write_text(json.dumps(summary, indent=2))
    print(
        f"\n{options.model}, attention and MLP weights, {options.steps} steps of {options.batch_size} problems, held-out loss"
    )
    print(best_rates(results))


if __name__ == "__main__":
    main()
