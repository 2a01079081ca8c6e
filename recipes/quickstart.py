"""Train a LoRA adapter of SmolLM2-135M with LoRA-Pre on generated problems, beside torch.optim.AdamW: `make quickstart`.

Everything runs offline on a CPU: weights and problems come from Python packages. Stopped runs go on with ``--resume``.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from eval.exact_match import ExactMatch, generate
from lorapre_peft import LoRAPreCallback, LoRAPreConfig, lorapre_optimizer
from lorapre_peft.table import format_bytes
from recipes.models import SMOLLM2, load_model
from recipes.problems import problems
from recipes.training import OptimizerTimer, environment, sft_config, state_bytes


@dataclass
class QuickstartArguments:
    """Options of the quickstart; the defaults are the run that the README shows."""

    model: str = field(default=SMOLLM2, metadata={"help": "'smollm2' (from a package), a local folder, or a hub id."})
    optimizer: str = field(default="adamw", metadata={"help": "'adamw' or 'muon': the LoRA-Pre optimizer."})
    update_rule: str = field(default="als", metadata={"help": "'als' or 'newton'."})
    r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    momentum_rank: int | None = field(default=None, metadata={"help": "Rank of the momenta; None: a quarter of r."})
    lr: float = field(default=5e-3, metadata={"help": "Learning rate of LoRA-Pre."})
    baseline_lr: float = field(default=5e-3, metadata={"help": "Learning rate of torch.optim.AdamW."})
    baseline: bool = field(
        default=True, metadata={"help": "Train with torch.optim.AdamW as well, from the same seed."}
    )
    steps: int = field(default=60, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=4, metadata={"help": "Problems per step."})
    test_size: int = field(default=48, metadata={"help": "Held-out problems for loss and accuracy."})
    max_new_tokens: int = field(default=160, metadata={"help": "Tokens generated per held-out problem."})
    bf16: bool = field(
        default=True,
        metadata={"help": "Base model and products in bfloat16, adapter in float32; --no_bf16 on a CPU without AMX."},
    )
    seed: int = field(default=0, metadata={"help": "Of the data, the adapter's start and the order of batches."})
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where adapters, logs and results go."})
    resume: bool = field(default=False, metadata={"help": "Go on with a stopped run of the same options."})


def train(options: QuickstartArguments, method: str, train_set: Dataset, test_set: Dataset) -> dict[str, Any]:
    """Train one adapter and measure it; with ``--resume`` a finished run is read and a stopped one goes on."""
    folder = Path(options.output_dir) / method
    done = folder / "result.json"
    if options.resume and done.exists():
        return json.loads(done.read_text())

    set_seed(options.seed)
    model, tokenizer = load_model(options.model, torch.bfloat16 if options.bf16 else torch.float32)
    adapter = dict(r=options.r, lora_alpha=2 * options.r, target_modules="all-linear", task_type="CAUSAL_LM")
    shared = dict(steps=options.steps, batch_size=options.batch_size, seed=options.seed, bf16=options.bf16)
    timer = OptimizerTimer()
    if method == "adamw":
        args = sft_config(folder, lr=options.baseline_lr, **shared)
        model = get_peft_model(model, LoraConfig(**adapter))
        extra: dict[str, Any] = {"callbacks": [timer]}
    else:
        args = sft_config(folder, lr=options.lr, **shared)
        config = LoRAPreConfig(momentum_rank=options.momentum_rank, update_rule=options.update_rule, **adapter)
        model = get_peft_model(model, config)
        extra = {
            "optimizer_cls_and_kwargs": lorapre_optimizer(options.optimizer, args),
            "callbacks": [LoRAPreCallback(), timer],
        }
    trainer = SFTTrainer(
        model, args, train_dataset=train_set, eval_dataset=test_set, processing_class=tokenizer, **extra
    )
    base = Path(options.output_dir) / "base.json"
    if not base.exists():  # a new adapter adds nothing: this is the base model
        base.write_text(json.dumps(measure(options, trainer, test_set, "accuracy before"), indent=2))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=options.resume and get_last_checkpoint(str(folder)) is not None)
    seconds = time.perf_counter() - start

    model.save_pretrained(str(folder / "adapter"))
    result = {
        **measure(options, trainer, test_set, f"accuracy after {method}"),
        "optimizer_state_bytes": state_bytes(trainer.optimizer),
        "optimizer_seconds_per_step": sum(timer.seconds) / len(timer.seconds) if timer.seconds else None,
        "train_seconds": seconds,  # since the last resume
        "log": trainer.state.log_history,
    }
    done.write_text(json.dumps(result, indent=2))
    return result


def measure(options: QuickstartArguments, trainer: SFTTrainer, test_set: Dataset, progress: str) -> dict[str, float]:
    """Held-out loss, and of greedy answers the shares that end in ``#### number`` and that are right."""
    loss = trainer.evaluate()["eval_loss"]
    # One token at a time, a merged float32 model is several times faster on a CPU than bfloat16 and an adapter beside it.
    model = copy.deepcopy(trainer.model).float().merge_and_unload()
    completions = generate(
        model,
        trainer.processing_class,
        test_set["prompt"],
        max_new_tokens=options.max_new_tokens,
        batch_size=64,
        progress=progress,
    )
    found = ExactMatch("number").compute(predictions=completions, references=test_set["answer"])
    return {"loss": loss, "answered": found["answered"], "accuracy": found["exact_match"]}


def prepare_output(options: QuickstartArguments) -> Path:
    """Make the output folder and keep the options there; a folder in use is only entered by ``--resume`` with the same ones."""
    folder = Path(options.output_dir)
    record = folder / "options.json"
    wanted = {
        name: value for name, value in asdict(options).items() if name not in ("resume", "output_dir", "baseline")
    }
    if record.exists():
        found = json.loads(record.read_text())
        if not options.resume:
            raise SystemExit(
                f"{folder} holds an earlier run: add --resume to go on with it, or give another --output_dir"
            )
        changed = [
            f"{name}={wanted[name]!r} (was {found.get(name)!r})" for name in wanted if wanted[name] != found.get(name)
        ]
        if changed:
            raise SystemExit(
                f"{folder} was started with other options: {', '.join(changed)}. Use those, or another --output_dir"
            )
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(wanted, indent=2))
    return folder


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per measured model."""
    lines = [f"{'':26}{'loss':>8}{'answered':>10}{'correct':>9}{'state':>12}{'optimizer/step':>16}{'training':>10}"]
    for name, result in results.items():
        line = f"{name:26}{result['loss']:>8.3f}{result['answered']:>10.1%}{result['accuracy']:>9.1%}"
        if "train_seconds" in result:
            step = result["optimizer_seconds_per_step"]
            line += f"{format_bytes(result['optimizer_state_bytes']):>12}"
            line += f"{'–' if step is None else f'{1000 * step:.1f} ms':>16}{result['train_seconds']:>8.0f} s"
        lines.append(line)
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Training loss of each method over the steps, with the held-out losses as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, result in results.items():
        if "log" not in result:
            axis.axhline(
                result["loss"],
                color="grey",
                linestyle="--",
                linewidth=1,
                label=f"{name}, held out: {result['loss']:.3f}",
            )
            continue
        points = [(row["step"], row["loss"]) for row in result["log"] if "loss" in row]
        (line,) = axis.plot(*zip(*points), label=f"{name}, training")
        label = f"{name}, held out: {result['loss']:.3f}"
        axis.axhline(result["loss"], color=line.get_color(), linestyle="--", linewidth=1, label=label)
    axis.set(
        xlabel="step", ylabel="loss per completion token (nats)", title="LoRA on SmolLM2-135M, generated problems"
    )
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    (options,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses()
    folder = prepare_output(options)
    train_set = problems(options.steps * options.batch_size, seed=2 * options.seed)
    test_set = problems(options.test_size, seed=2 * options.seed + 1, exclude=train_set)

    results = {f"LoRA-Pre {options.optimizer} ({options.update_rule})": train(options, "lorapre", train_set, test_set)}
    if options.baseline:
        results["torch.optim.AdamW"] = train(options, "adamw", train_set, test_set)
    results = {"before": json.loads((folder / "base.json").read_text()), **results}

    summary = {"options": asdict(options), "environment": environment(), "results": results}
    (folder / "results.json").write_text(json.dumps(summary, indent=2))
    title = f"{options.model}, LoRA r={options.r}, {options.steps} steps of {options.batch_size} problems"
    plot(results, title, folder / "losses.png")
    print(f"\n{title}, {options.test_size} held out\n")
    print(table(results))
    print(
        f"\nadapter: {folder / 'lorapre' / 'adapter'}\nfigures: {folder / 'results.json'}\nplot:    {folder / 'losses.png'}"
    )


if __name__ == "__main__":
    main()
