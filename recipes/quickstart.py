"""This module trains a LoRA adapter of SmolLM2-135M with LoRA-Pre, beside torch.optim.AdamW (`make quickstart`).

Everything runs offline, on a CPU unless there is a CUDA device, because weights and problems come from Python
packages. ``recipes/configs/smollm2.yaml`` is trained once by each optimizer. Every key of `recipes.sft` can be given
here too. Stopped runs go on with ``--resume``.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset, DatasetDict, disable_progress_bars
from trl import SFTTrainer

from eval.exact_match import ExactMatch, generate
from lorapre_peft import LoRAPreConfig
from lorapre_peft.integrations.summary import format_bytes
from recipes.arguments import CONFIGS
from recipes.data import GENERATED, write_manifest
from recipes.problems import STOP
from recipes.sft import Recipe, build_trainer, parse
from recipes.training import (
    Forecast,
    OptimizerTimer,
    Progress,
    environment,
    held_bytes,
    kept,
    start_run,
    train,
    write_atomically,
)


@dataclass
class QuickstartArguments:
    """Holds the arguments that the comparison adds to a recipe's keys."""

    baseline: bool = field(
        default=True, metadata={"help": "Train with torch.optim.AdamW as well, from the same seed."}
    )
    baseline_lr: float = field(default=5e-3, metadata={"help": "Learning rate of torch.optim.AdamW."})
    max_new_tokens: int = field(default=96, metadata={"help": "Tokens generated per held-out problem."})


def arguments(*more: str) -> tuple[Recipe, QuickstartArguments]:
    """Parse the command line on top of the quickstart's config, and ``more`` on top of both.

    Returns the recipe and the comparison's arguments. Raises SystemExit for data without answers, for no held-out
    problems, for full weights, and for another optimizer than those that are compared.
    """
    defaults = ["--config", str(CONFIGS / "smollm2.yaml"), "--output_dir", "runs/quickstart"]
    recipe, options = parse([*defaults, *sys.argv[1:], *more], QuickstartArguments)
    data, adapter = recipe.data, recipe.model.use_peft
    if data.dataset_name != GENERATED or not data.eval_size or not adapter:
        raise SystemExit(
            f"found dataset_name={data.dataset_name!r}, eval_size={data.eval_size} and use_peft={adapter}; the "
            f"quickstart trains an adapter, and tests it on problems with answers: expected {GENERATED!r}, an "
            "eval_size above 0 and use_peft. Other data and full weights are for recipes.sft, with the same keys"
        )
    optimizer, optim = recipe.lorapre.optimizer, recipe.sft.optim.value
    if (optimizer == "trainer" and not more) or optim not in ("adamw_torch", "adamw_torch_fused"):
        raise SystemExit(
            f"found optimizer={optimizer!r} and optim={optim!r}; the quickstart compares LoRA-Pre, optimizer adamw or "
            "muon, with torch.optim.AdamW, optim adamw_torch or adamw_torch_fused. Others are for recipes.sft, with "
            "the same keys"
        )
    return recipe, options


def run(recipe: Recipe, options: QuickstartArguments, data: DatasetDict, runs_left: int) -> dict[str, Any]:
    """Train one adapter, measure it, and return its results, which are also written into its folder.

    With ``--resume`` a finished run is read, and a stopped one goes on. runs_left: number of runs from this one on,
    which the forecast includes.
    """
    done = recipe.folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    start = time.perf_counter()
    timer = OptimizerTimer()
    trainer = build_trainer(recipe, data, [timer])
    Progress.replace(trainer)
    load_seconds = time.perf_counter() - start
    base = recipe.folder.parent / "base.json"
    if not base.exists():  # A new adapter adds nothing, so this measures the base model.
        measured = answers(trainer, data["eval"], options.max_new_tokens, "answers before")
        write_atomically(base, json.dumps(held_out(trainer.evaluate()) | measured, indent=2))
    before = json.loads(base.read_text())

    def forecast(step_seconds: float, steps_left: int) -> str:
        testing = before["eval_seconds"] + before["answer_seconds"]
        later = (runs_left - 1) * (load_seconds + step_seconds * trainer.state.max_steps + testing)
        minutes = (step_seconds * steps_left + testing + later) / 60
        return (
            f"about {max(minutes, 1):.0f} min to go: {step_seconds:.1f} s a step, {testing:.0f} s for a round of tests"
        )

    trainer.add_callback(Forecast(forecast))
    metrics = train(trainer, resume=recipe.lorapre.resume)
    result = {
        **held_out(metrics),
        **answers(trainer, data["eval"], options.max_new_tokens, f"answers after {recipe.folder.name}"),
        "load_seconds": load_seconds,
        "optimizer_state_bytes": held_bytes(trainer.optimizer.optimizer),
        "optimizer_seconds_per_step": timer.per_step(),
        "train_seconds": metrics["train_runtime"],  # This is the time since the last resume.
        "log": trainer.state.log_history,
    }
    write_atomically(done, json.dumps(result, indent=2))
    return result


def held_out(metrics: dict[str, float]) -> dict[str, float]:
    """Return the loss of the held-out problems in nats per token, and the seconds that it took."""
    return {"loss": metrics["eval_loss"], "eval_seconds": metrics["eval_runtime"]}


def answers(trainer: SFTTrainer, test_set: Dataset, max_new_tokens: int, progress: str) -> dict[str, float]:
    """Return the shares of greedy answers that give a number behind a marker and that are right, and the seconds.

    `eval.answers` says what a marker is.
    """
    start = time.perf_counter()
    # A CPU generates several times faster with a merged float32 model than with a bfloat16 one beside an adapter.
    model = copy.deepcopy(trainer.model).float().merge_and_unload()
    completions = generate(
        model,
        trainer.processing_class,
        test_set["prompt"],
        max_new_tokens=max_new_tokens,
        batch_size=64,
        stop=STOP,
        progress=progress,
    )
    found = ExactMatch("number").compute(predictions=completions, references=test_set["answer"])
    seconds = time.perf_counter() - start
    return {"answered": found["answered"], "accuracy": found["exact_match"], "answer_seconds": seconds}


def seconds_by_part(results: dict[str, dict[str, Any]], start_seconds: float) -> dict[str, float]:
    """Return the seconds of each part of the command, in order. The parts of all runs are added up.

    start_seconds: seconds until this process was ready. The installation's seconds are those that ``make install`` has
    left in the environment.
    """
    before, *after = results.values()
    installed = Path(sys.prefix, "installed")
    text = installed.read_text() if installed.exists() else ""
    seconds = {"installation": float(text)} if text else {}
    return seconds | {
        "start": start_seconds,
        "loading": sum(result["load_seconds"] for result in after),
        "tests before": before["eval_seconds"] + before["answer_seconds"],
        "training": sum(result["train_seconds"] for result in after),
        "tests after": sum(result["eval_seconds"] + result["answer_seconds"] for result in after),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a table as text, with a row for each measured model."""
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
    """Plot each method's training loss over the steps, with the held-out losses as dashed lines, into a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, result in results.items():
        color = "grey"
        if "log" in result:
            points = [(row["step"], row["loss"]) for row in result["log"] if "loss" in row]
            steps, losses = zip(*points) if points else ((), ())  # There are none with logging_strategy no.
            (line,) = axis.plot(steps, losses, label=f"{name}, training")
            color = line.get_color()
        label = f"{name}, held out: {result['loss']:.3f}"
        axis.axhline(result["loss"], color=color, linestyle="--", linewidth=1, label=label)
    axis.set(xlabel="step", ylabel="loss per completion token (nats)", title=title)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run the command line."""
    start_seconds = time.time() - psutil.Process().create_time()
    disable_progress_bars()  # The rows are few.
    recipe, options = arguments()
    folder, lorapre = recipe.folder, recipe.lorapre
    config = {
        name: value for name, value in recipe.config.items() if name != "baseline"
    }  # The baseline may be added to a finished run.
    start_run(folder, config, recipe.precision, resume=lorapre.resume)
    data = recipe.load_data()
    write_manifest(data, recipe.data.dataset_name, folder / "manifest.json")

    rule = lorapre.update_rule or LoRAPreConfig.update_rule
    plans = {f"LoRA-Pre {lorapre.optimizer} ({rule})": ["--output_dir", str(folder / "lorapre")]}
    if options.baseline:
        plans["torch.optim.AdamW"] = [
            *("--output_dir", str(folder / "adamw"), "--optimizer", "trainer"),
            *("--learning_rate", str(options.baseline_lr)),
        ]
    results = {}
    for done, (name, more) in enumerate(plans.items()):
        print(f"\n{name}")
        results[name] = run(*arguments(*recipe.precision.options, *more), data, len(plans) - done)
    results = {"before": json.loads((folder / "base.json").read_text()), **results}

    seconds = seconds_by_part(results, start_seconds)
    about = {"options": kept(config), "environment": environment(recipe.precision)}
    summary = about | {"seconds": seconds, "results": results}
    (folder / "results.json").write_text(json.dumps(summary, indent=2))
    title = f"{recipe.model.model_name_or_path}, LoRA r={recipe.model.lora_r}, {recipe.data.train_size} problems"
    plot(results, title, folder / "losses.png")
    print(f"\n{title}, {recipe.data.eval_size} held out\n")
    print(table(results))
    print(f"\nseconds: {', '.join(f'{part} {taken:.0f}' for part, taken in seconds.items())}")
    print(f"\nadapter: {folder / 'lorapre'}\nfigures: {folder / 'results.json'}\nplot:    {folder / 'losses.png'}")


if __name__ == "__main__":
    main()
