"""This module holds what a suite says, and the runs that it declares. `eval.rerun.suite_files` reads it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eval.methods import METHODS
from recipes.precision import AUTO, Precision, accelerator, choose

_STEPS = (1, 2, 5)


@dataclass(frozen=True)
class Training:
    """Says how every run of a suite trains, whatever its method. The schedule is a cosine after a warmup.

    ``"auto"`` is for `Suite.settled` to replace, as a run declares the dtypes in which it was trained.

    Attributes:
        steps: number of optimizer steps.
        batch_size: number of sequences of an optimizer step.
        micro_batch: number of sequences of a forward pass.
        max_length: largest number of tokens of a sequence.
        warmup: share of the steps.
        rank: rank r of adapters.
        adapter_dtype: dtype of the frozen base under an adapter, whose own weights are float32, or ``"auto"``.
        weights_dtype: dtype of trained weights.
        bf16: whether products are in bfloat16, or ``"auto"``.
        gradient_checkpointing: whether activations are computed again in the backward pass.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``micro_batch``.
    """

    steps: int
    batch_size: int = 4
    micro_batch: int = 4
    max_length: int = 512
    warmup: float = 0.05
    rank: int = 8
    adapter_dtype: str = AUTO
    weights_dtype: str = "float32"
    bf16: bool | str = AUTO
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of micro_batch={self.micro_batch}: a step would train "
                "fewer sequences"
            )

    def described(self) -> str:
        """Return a sentence without its end, for the report."""
        return f"{self.steps} steps of {self.batch_size} sequences, rank {self.rank}, cosine schedule"


@dataclass(frozen=True)
class Pretraining(Training):
    """Says how every run of a pre-training suite trains: a Llama from random weights, on rows of tokens of text.

    The rows have ``max_length`` tokens. rank, weights_dtype and gradient_checkpointing concern fine-tuning, and must
    keep their defaults.

    Attributes:
        others_lr: AdamW's rate for embeddings, head and norms in every run, so that rows differ only in what happens
            to the matrices. None stands for the way in which a method's authors train them.
        min_lr_rate: share of the rate at which the schedule ends.
        adam_beta2: β2 of Adam.
        max_grad_norm: norm to which the gradients are clipped together.

    Raises:
        ValueError: an option of fine-tuning is given.
    """

    others_lr: float | None = 3e-3
    min_lr_rate: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "weights_dtype", "gradient_checkpointing"):
            if getattr(self, name) != getattr(Training, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: found in pretraining, which has no such option")

    def described(self) -> str:
        """Return a sentence without its end, for the report."""
        return f"{self.steps} steps of {self.batch_size} sequences of {self.max_length} tokens, cosine schedule"


@dataclass(frozen=True)
class Run:
    """Holds one training and what is measured after it, which is all that a suite sets.

    answers: number of test problems that are answered by greedy generation.
    """

    model: str
    data: dict[str, Any]
    training: Training
    method: str
    options: dict[str, Any]
    lr: float
    seed: int
    answers: int = 0

    @property
    def declaration(self) -> dict[str, Any]:
        """Return all fields as a dictionary."""
        return dataclasses.asdict(self)

    @property
    def name(self) -> str:
        """Return a readable name, which is unique by a hash of the declaration.

        The same run has the same name in every suite and on every machine.
        """
        canonical = json.dumps(self.declaration, sort_keys=True)
        return f"{self.method}_lr{self.lr:g}_seed{self.seed}_{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Paper:
    """Describes the protocol that trains every method at the one learning rate of the paper's Table 2."""

    lr: float
    seeds: list[int]


@dataclass(frozen=True)
class Tuned:
    """Describes the protocol that finds each method's best rate on the validation split, and trains seeds at it.

    Attributes:
        rates: AdamW's grid by kind, ``adapter`` and ``weights``, on the series 1, 2, 5, 10, … A method's own grid lies
            `Method.rate_shift` places above.
        tuning_seeds: seeds at which rates are tried.
        seeds: seeds at the best rate.
        extend: largest number of rates by which a grid is extended, if its best rate lies at its edge or all of its
            runs diverged.
    """

    rates: dict[str, list[float]]
    tuning_seeds: list[int]
    seeds: list[int]
    extend: int = 3


@dataclass(frozen=True)
class Entry:
    """Holds a row that a suite asks for: a method with options, under a label.

    Attributes:
        method, options: name of the method, and its options.
        label: name of the row.
        rates: the row's own grid, in place of the shifted one.
        tuning_seeds: the row's own seeds, in place of the protocol's. With several the report compares rates seed by
            seed.
    """

    method: str
    options: dict[str, Any]
    label: str
    rates: list[float] | None = None
    tuning_seeds: list[int] | None = None


@dataclass(frozen=True)
class Suite:
    """Holds what a suite file says.

    Attributes:
        name, description: name of the file, and a sentence for the report.
        models: names of the base models.
        data: source of the data, and its options.
        training: how all runs train.
        entries: rows.
        protocols: protocols by name.
        primary: metric of rankings and plots.
        metrics: metrics of the tables.
        answers: number of test problems that a final run answers.
        records_of: other suites of ``eval/suites`` whose records count here too, for runs that both declare.
        factors: lists of options that change together. The report averages the primary metric over all factors but
            one.
        step_seconds: expected seconds of a run over its steps, by kind or by method, for the plan before anything has
            run.
        published: the paper's numbers, by model, label and metric.
        published_source: where they were published.
    """

    name: str
    description: str
    models: list[str]
    data: dict[str, Any]
    training: Training
    entries: list[Entry]
    protocols: dict[str, Paper | Tuned]
    primary: str = "test_loss"
    metrics: list[str] = field(default_factory=lambda: ["test_loss"])
    answers: int = 0
    records_of: list[str] = field(default_factory=list)
    factors: list[list[str]] = field(default_factory=list)
    step_seconds: dict[str, float] = field(default_factory=dict)
    published: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    published_source: str = ""

    def settled(self, records: Mapping[str, Mapping[str, Any]]) -> tuple[Suite, Precision]:
        """Return the suite with a dtype in the place of every ``"auto"``, and the precision with its reason.

        All runs of a folder train in the same dtypes. These are those of its records, whichever machine they are from,
        or without records those that this machine multiplies fast. Raises ValueError if the records have several.
        """
        auto = [name for name in ("adapter_dtype", "bf16") if getattr(self.training, name) == AUTO]
        found = set()
        for record in records.values():
            theirs = type(self.training)(**record["run"]["training"])
            if dataclasses.replace(theirs, **dict.fromkeys(auto, AUTO)) == self.training:
                found.add((theirs.adapter_dtype, theirs.bf16))
        if not auto or not found:
            precision = choose(accelerator(), self.training.adapter_dtype, self.training.bf16)
        elif len(found) == 1:
            precision = Precision(*found.pop(), "as in the finished runs")
        else:
            said = " and of ".join(f"adapter_dtype {dtype}, bf16 {str(bf16).lower()}" for dtype, bf16 in sorted(found))
            raise ValueError(f"{self.name}: finished runs of {said}: name both in the suite, or give another --out")
        training = dataclasses.replace(self.training, adapter_dtype=precision.dtype, bf16=precision.bf16)
        return dataclasses.replace(self, training=training), precision

    @property
    def pretrains(self) -> bool:
        """Return whether models are trained from random weights."""
        return isinstance(self.training, Pretraining)

    @property
    def state_title(self) -> str:
        """Return the heading of the optimizer's state in reports. In pre-training it is the matrices' state alone."""
        return "state of the matrices" if self.pretrains else "optimizer state"

    def run(self, model: str, entry: Entry, lr: float, seed: int, answers: int = 0) -> Run:
        """Return a run of this suite."""
        return Run(model, self.data, self.training, entry.method, entry.options, lr, seed, answers)

    def grid(self, entry: Entry, tuned: Tuned) -> list[float]:
        """Return the learning rates of an entry, sorted. Raise ValueError if there are none for what it trains."""
        method = METHODS[entry.method]
        if not entry.rates and method.trains not in tuned.rates:
            raise ValueError(f"{entry.label} trains {method.trains}: expected rates for that, found {tuned.rates}")
        own = [shifted(rate, 0) for rate in entry.rates or ()]
        return sorted(own or [shifted(rate, method.rate_shift) for rate in tuned.rates[method.trains]])


def higher_is_better(metric: str) -> bool:
    """Return whether larger values of a metric are better, as they are of all but losses."""
    return not metric.endswith("loss")


def shifted(rate: float, places: int) -> float:
    """Return the rate so many places further on the series …, 1, 2, 5, 10, 20, ….

    Raises ValueError for a rate that is not on it.
    """
    digits, _, exponent = f"{rate:.6e}".partition("e")
    if float(digits) not in _STEPS:
        raise ValueError(f"learning rate {rate:g}: expected one of the series 1, 2, 5, 10, … such as 2e-4")
    decades, step = divmod(_STEPS.index(int(float(digits))) + places, len(_STEPS))
    return float(f"{_STEPS[step]}e{int(exponent) + decades}")
