"""What a row of a comparison is: `Method`, and what the builders of optimizers share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.loraga import estimate_gradients, preprocess_loraga
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from lorapre_peft.integrations.targets import weight_targets

Options = Mapping[str, Any]
Build = Callable[[nn.Module, TrainingArguments, Options], Optimizer]
# The package and module of methods that are pytorch-optimizer's.
PYTORCH_OPTIMIZER = dict(package="pytorch-optimizer", module="pytorch_optimizer")


@dataclass(frozen=True)
class Method:
    """One row of a table.

    title: as the table names it. trains: ``"adapter"`` or ``"weights"`` (of attention and MLP). build: makes the
    optimizer of the model's trainable parameters from the prepared model, the trainer's arguments and the options.
    options: what a suite may set, with defaults. lora: fields of the adapter's configuration. config: its class, and
    config_options the options that are fields of it. adapt: changes the model after the adapter is in it. start: sets
    the adapter's weights, with the gradients of the base weights at hand (``_peft_loraga_grad`` of each base layer).
    package, module: what the method is installed and imported as, where it is none of this project's own requirements.
    rate_shift: how many places its learning rates lie above AdamW's of the same kind, on the series 1, 2, 5, 10, …
    second_order: the optimizer differentiates the gradients once more.

    paper: where the method was published. state: bytes of optimizer state that a float32 matrix of p rows and q
    columns takes, as an expression in p, q and the options; empty for adapters. others: how the authors train
    embeddings, head and norms beside these matrices; None says by AdamW at the same learning rate. note: what a reader
    of its figures must know.
    """

    title: str
    trains: str
    build: Build
    options: Options = field(default_factory=dict)
    lora: Options = field(default_factory=dict)
    config: type[LoraConfig] = LoraConfig
    config_options: tuple[str, ...] = ()
    adapt: Callable[[nn.Module], None] | None = None
    start: Callable[[nn.Module], None] | None = None
    package: str | None = None
    module: str | None = None
    rate_shift: int = 0
    second_order: bool = False
    paper: str = ""
    state: str = ""
    others: Build | None = None
    note: str = ""

    def merged(self, options: Options) -> dict[str, Any]:
        """The options with the defaults of those not given. Raises ValueError for one that the method lacks."""
        unknown = set(options) - set(self.options)
        if unknown:
            raise ValueError(
                f"{self.title} has no option {', '.join(sorted(unknown))}; expected: "
                f"{', '.join(self.options) or 'none'}"
            )
        return {**self.options, **options}

    @property
    def installed(self) -> str | None:
        """The package with its version; None if it is not installed, or if the method needs none of its own."""
        try:
            return self.package and f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            return None

    def unavailable(self) -> str | None:
        """Why the method's package cannot be used here, or None."""
        if self.package is None:
            return None
        if self.installed is None:
            return f"{self.package} is not installed: pip install --no-deps -c constraints.txt {self.package}"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # whatever a broken package raises
            return f"{self.installed} does not import: {type(error).__name__}: {error}"
        return None

    def adapter_config(self, rank: int, options: Options, model: nn.Module | None = None) -> LoraConfig | None:
        """The adapter of all linear layers (named if the model is given), alpha = 2r, no dropout. None for weights."""
        if self.trains == "weights":
            return None
        targets = "all-linear" if model is None else linear_names(model)
        shared = dict(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **self.lora)
        return self.config(**shared, **{name: options[name] for name in self.config_options})

    def prepare(
        self, model: PreTrainedModel, rank: int, options: Options, accumulate_gradients: Callable[[], None]
    ) -> nn.Module:
        """The model as it is trained (`attach`), its adapter at the start that the method prescribes.

        accumulate_gradients: runs forward and backward passes of the given model on training batches, for starts that
        need gradients.
        """
        config = self.adapter_config(rank, options, model)
        if config is not None and config.init_lora_weights == "lora_ga":
            preprocess_loraga(model, config, accumulate_gradients)
        if self.start is None:
            return self.attach(model, config)
        estimate_gradients(model, config, accumulate_gradients)
        adapted = self.attach(model, config)
        self.start(adapted)
        return adapted

    def attach(self, model: PreTrainedModel, config: LoraConfig | None) -> nn.Module:
        """The model with the adapter, or, without one, with its matrices alone trainable."""
        if config is not None:
            adapted = get_peft_model(model, config)
            if self.adapt is not None:
                self.adapt(adapted)
            return adapted
        targets = weight_targets(model, "all-linear", None, None)
        for param in model.parameters():
            param.requires_grad_(param in targets)
        return model


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers, without its output head."""
    targets = weight_targets(model, "all-linear", None, None)
    weights = (name for name, param in model.named_parameters() if param in targets)
    return sorted({name.rpartition(".weight")[0].rpartition(".")[2] for name in weights})


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that require a gradient."""
    return [param for param in model.parameters() if param.requires_grad]


def adam_options(args: TrainingArguments) -> dict[str, Any]:
    """Adam's hyperparameters as the trainer's arguments have them."""
    return dict(
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def fused(model: nn.Module) -> bool:
    """As Trainer's default is; not for the plan's dry run on the meta device, which has no fused kernels."""
    return trained(model)[0].device.type != "meta"


def build_adamw(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    """`torch.optim.AdamW`; ``options`` are further arguments of it, and win."""
    return torch.optim.AdamW(trained(model), fused=fused(model), **adam_options(args) | dict(options))


def build_sophia(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from pytorch_optimizer import SophiaH

    # Its own betas (0.96, 0.99): the second is of a curvature that is measured at every tenth step only.
    built = SophiaH(trained(model), lr=args.learning_rate, weight_decay=args.weight_decay, **options)
    # The graph that it differentiates is of the last micro-batch (`SecondOrderTrainer`), a share of the loss.
    built.compute_hutchinson_hessian = partial(
        SophiaH.compute_hutchinson_hessian, alpha=args.gradient_accumulation_steps
    )
    return built
