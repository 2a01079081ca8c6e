"""This module measures along a run how far LoRA-Pre's update is from exact Adam's.

    python -m eval.fidelity --steps 400

The small Llama of the suite ``pretrain-small`` is trained by AdamW. Beside it LoRA-Pre's rules follow the same
gradients, each at several momentum ranks, and move no weights. For each matrix and recorded step three numbers are
measured: the cosine of a rule's update with exact Adam's, the ratio of their Frobenius norms, and the condition
numbers of the Gram matrices that the rule inverts. The median of each over the layers of one type is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from datasets import disable_progress_bars
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from eval.rerun.plan import cells
from eval.rerun.pretraining import PretrainingRunner
from eval.rerun.suite_files import load_suite
from lorapre_peft import LoRAPreAdamW
from lorapre_peft.integrations.targets import weight_targets
from lorapre_peft.lowrank.layout import compressed_rank
from recipes.training import environment, write_atomically

RULES: dict[str, dict[str, Any]] = {
    "als": {"update_rule": "als"},
    "als, ρ = 1−β1": {"update_rule": "als", "residual_weight": 0.1},
    "newton": {"update_rule": "newton"},
}
BETAS = (0.9, 0.95)
GRAMS = ("m_A", "m_B", "v_A", "v_B")


class Shadow:
    """Holds an optimizer that follows gradients without training anything.

    Its learning rate is 1 and its parameters are set to zero before each step, so that they then hold the negative
    update.

    Args:
        build: function that makes the optimizer of a list of parameters.
        shapes: shapes of the matrices.
        device: device of the gradients.
    """

    def __init__(
        self,
        build: Callable[[list[nn.Parameter]], Optimizer],
        shapes: Sequence[torch.Size],
        device: torch.device | str = "cpu",
    ):
        self.params = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        self.optimizer = build(self.params)

    @torch.no_grad()
    def updates(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Take a step with these gradients, and return u of θ ← θ − lr u for each matrix."""
        for param, gradient in zip(self.params, gradients):
            param.zero_()
            param.grad = gradient
        self.optimizer.step()
        return [-param for param in self.params]

    def condition(self, number: int, factor: str) -> float:
        """Return the condition number of the Gram matrix of a factor, such as ``"m_A"``, of the matrix ``number``.

        It is infinite if the Gram matrix is singular.
        """
        sigma = torch.linalg.svdvals(self.optimizer.state[self.params[number]][factor].double())
        return float("inf") if sigma[-1] == 0 else (sigma[0] / sigma[-1]).square().item()


def compared(update: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the cosine of an update [p, q] with the exact one, and the ratio of their Frobenius norms.

    The cosine is NaN if one of them is zero.
    """
    u, a = update.double(), exact.double()
    ratio = u.norm() / a.norm()
    return ((u * a).sum() / (u.norm() * a.norm())).item(), ratio.item()


class Fidelity(TrainerCallback):
    """Makes a `Shadow` for each rule and rank follow the gradients of a model's matrices, and records at some steps.

    Args:
        ranks: momentum ranks.
        every: number of steps from one record to the next.

    Attributes:
        series: by rule, rank and type of layer, the recorded steps, and for each the medians over the layers.
    """

    def __init__(self, ranks: Sequence[int], every: int):
        self._ranks, self._every = ranks, every
        self._matrices: dict[str, Tensor] = {}
        self.series: dict[tuple[str, int, str], dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make a shadow of exact Adam, and one for each rule and rank.

        Raises ValueError for a rank at which a matrix is not compressed.
        """
        targets = weight_targets(kwargs["model"], "all-linear", None, None)
        self._matrices = {name: param for name, param in kwargs["model"].named_parameters() if param in targets}
        shapes = [param.shape for param in self._matrices.values()]
        for shape, k in product(shapes, self._ranks):
            if not compressed_rank(shape, k):
                raise ValueError(
                    f"found the momentum rank {k}; expected one that compresses matrices of {shape[0]}×{shape[1]}"
                )
        device = next(iter(self._matrices.values())).device
        self._exact = Shadow(
            lambda params: torch.optim.AdamW(params, lr=1.0, betas=BETAS, weight_decay=0.0), shapes, device
        )
        self._shadows = {
            (rule, k): Shadow(_lorapre(k, options), shapes, device)
            for rule, options in RULES.items()
            for k in self._ranks
        }

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a step with every shadow, and record at steps 1, 2 and 5 and at every multiple of ``every``."""
        step = state.global_step + 1
        gradients = [param.grad for param in self._matrices.values()]
        exact = self._exact.updates(gradients)
        for (rule, k), shadow in self._shadows.items():
            updates = shadow.updates(gradients)
            if step in (1, 2, 5) or step % self._every == 0:
                self._record(step, rule, k, shadow, updates, exact)

    def _record(
        self, step: int, rule: str, k: int, shadow: Shadow, updates: Sequence[Tensor], exact: Sequence[Tensor]
    ) -> None:
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for i, name in enumerate(self._matrices):
            cosine, length = compared(updates[i], exact[i])
            conditions = {factor: shadow.condition(i, factor) for factor in GRAMS}
            found[name.split(".")[-2]].append({"cosine": cosine, "length": length} | conditions)
        for layer, rows in found.items():
            series = self.series[rule, k, layer]
            series["step"].append(step)
            for quantity in rows[0]:
                values = [row[quantity] for row in rows]
                median = math.nan if any(map(math.isnan, values)) else statistics.median(values)
                series[quantity].append(float(f"{median:.4g}") if math.isfinite(median) else None)


def _lorapre(k: int, options: dict[str, Any]) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: LoRAPreAdamW(params, lr=1.0, betas=BETAS, momentum_rank=k, **options)


def measure(ranks: Sequence[int], steps: int, every: int) -> dict[str, Any]:
    """Train ``steps`` steps of the suite's first cell, AdamW, and return the run's declaration and the series.

    ranks, every: as in `Fidelity`.
    """
    suite = load_suite("pretrain-small")
    suite = replace(suite, training=replace(suite.training, steps=steps))
    cell = cells(suite)[0]
    run = suite.run(cell.model, cell.entry, lr=1e-3, seed=0)
    fidelity = Fidelity(ranks, every)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        PretrainingRunner({}).trainer(run, folder, [fidelity]).train()
    series = [
        {"rule": rule, "rank": k, "layer": layer, **values} for (rule, k, layer), values in fidelity.series.items()
    ]
    return {"run": run.declaration, "series": series}


def markdown(found: dict[str, Any]) -> str:
    """Return two tables: each rule and rank along the run, and the cosine by type of layer at the last step."""
    series = found["series"]
    steps = series[0]["step"]
    shown = sorted({min(range(len(steps)), key=lambda i: abs(steps[i] - wanted)) for wanted in (10, steps[-1] // 2)})
    shown = [*shown, len(steps) - 1]
    layers = list(dict.fromkeys(one["layer"] for one in series))
    heads = [f"cosine, step {steps[i]}" for i in shown] + [f"length, step {steps[i]}" for i in shown]
    lines = [
        "Medians over the layers of a type; each cell: the median of the types and, in brackets, their range.",
        "Length: of the update over exact Adam's. Conditions: of A Aᵀ and BᵀB, the largest along the run.",
        "",
        f"| rule | k | {' | '.join(heads)} | condition, m_A | m_B | v_A | v_B |",
        "|" + "---|" * (len(heads) + 6),
    ]
    by_rule = {key: [one for one in series if (one["rule"], one["rank"]) == key] for key in _rows(series)}
    for (rule, k), group in by_rule.items():
        cells_ = [_spread([one[q][i] for one in group]) for q in ("cosine", "length") for i in shown]
        cells_ += [_largest([value for one in group for value in one[factor]]) for factor in GRAMS]
        lines.append(f"| {rule} | {k} | {' | '.join(cells_)} |")
    lines += ["", f"Cosine by type of layer at step {steps[-1]}:", "", f"| rule | k | {' | '.join(layers)} |"]
    lines.append("|" + "---|" * (len(layers) + 2))
    for (rule, k), group in by_rule.items():
        last = {one["layer"]: one["cosine"][-1] for one in group}
        lines.append(f"| {rule} | {k} | {' | '.join(_number(last[layer]) for layer in layers)} |")
    return "\n".join(lines) + "\n"


def _rows(series: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((one["rule"], one["rank"]) for one in series))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _spread(values: Sequence[float | None]) -> str:
    finite = [value for value in values if value is not None]
    if not finite:
        return "–"
    return f"{statistics.median(finite):.2f} ({min(finite):.2f} to {max(finite):.2f})"


def _largest(values: Sequence[float | None]) -> str:
    return "singular" if None in values else f"{max(value for value in values if value is not None):.0e}"


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot cosine, length and the condition of m's Gram matrices over the steps, into a file.

    Each rule is a column and each rank a colour. The median of the types of layers is a line, and their range is a
    band.
    """
    rules = list(dict.fromkeys(one["rule"] for one in found["series"]))
    rows = {
        "cosine": "cosine with exact Adam's update",
        "length": "length over exact Adam's",
        "m_A": "condition of m_A m_Aᵀ",
        "m_B": "condition of m_Bᵀ m_B",
    }
    figure, axes = plt.subplots(
        len(rows), len(rules), figsize=(4.2 * len(rules), 2.9 * len(rows)), sharex=True, sharey="row", squeeze=False
    )
    for line, (quantity, label) in zip(axes, rows.items()):
        for axis, rule in zip(line, rules):
            for i, (_, k) in enumerate(key for key in _rows(found["series"]) if key[0] == rule):
                group = [one for one in found["series"] if (one["rule"], one["rank"]) == (rule, k)]
                columns = [[v for v in column if v is not None] for column in zip(*(one[quantity] for one in group))]
                points = [(step, values) for step, values in zip(group[0]["step"], columns) if values]
                at = [step for step, _ in points]
                axis.plot(at, [statistics.median(values) for _, values in points], color=f"C{i}", label=f"k = {k}")
                low, high = ([end(values) for _, values in points] for end in (min, max))
                axis.fill_between(at, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
            axis.set_xscale("log")
            if quantity != "cosine":
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
        line[0].set_ylabel(label)
    for axis, rule in zip(axes[0], rules):
        axis.set_title(rule)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. argv: its arguments. None stands for the process's own."""
    parser = argparse.ArgumentParser(prog="python -m eval.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="of the run, at whose end the rate is a tenth")
    parser.add_argument("--every", type=int, default=10, help="record at steps 1, 2, 5 and every so many (default 10)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32], metavar="K", help="momentum ranks")
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"), help="folder (default runs/fidelity)")
    args = parser.parse_args(argv)
    for name in ("steps", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment()} | measure(args.ranks, args.steps, args.every)
    write_atomically(args.out / "fidelity.json", json.dumps(found, allow_nan=False))
    made = found["environment"]
    by = f"Made by `{made['command']}` at {made['commit']} on {made['machine']}.\n\n![fidelity](fidelity.png)\n"
    write_atomically(args.out / "fidelity.md", f"# LoRA-Pre's update beside exact Adam's\n\n{markdown(found)}\n{by}")
    plot(found, args.out / "fidelity.png")
    print(markdown(found))


if __name__ == "__main__":
    main()
