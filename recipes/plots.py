"""This module plots the log of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy


def plot_training(log: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot the losses over the steps, and below them the learning rate and the norm of the gradient, into a file.

    The axis on the right shows the losses as perplexities. log: Trainer's ``log_history``. path: the image file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        return [step for step, _ in points], [value for _, value in points]

    figure, (losses, rate) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    losses.plot(*series("loss"), color="C0", linewidth=1, label="training")
    held_out = series("eval_loss")
    if held_out[0]:
        label = f"held out, at the end {held_out[1][-1]:.3f} (perplexity {numpy.exp(held_out[1][-1]):.2f})"
        losses.plot(*held_out, color="C1", marker="o", markersize=4, label=label)
    losses.set(ylabel="loss (nats per token)", title=title)
    # The perplexity of a run that has diverged may be too large for float64.
    perplexity = losses.secondary_yaxis("right", functions=(lambda x: numpy.exp(numpy.minimum(x, 700)), numpy.log))
    perplexity.set_ylabel("perplexity")
    perplexity.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    perplexity.yaxis.set_major_formatter(ScalarFormatter())
    losses.legend()
    rate.plot(*series("learning_rate"), color="C2")
    rate.set(xlabel="step", ylabel="learning rate")
    rate.yaxis.label.set_color("C2")
    norm = rate.twinx()
    norm.plot(*series("grad_norm"), color="C3", linewidth=1)
    norm.set_ylabel("gradient norm")
    norm.yaxis.label.set_color("C3")
    for axis in (losses, rate):
        axis.grid(alpha=0.3)
    with numpy.errstate(divide="ignore"):  # Matplotlib tries a perplexity of 0 before it knows the limits.
        figure.savefig(path, dpi=150)
    plt.close(figure)
