"""This module defines `Method`, one row of a comparison, and what the builders of optimizers share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.loraga import estimate_gradients
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from lorapre_peft.integrations.targets import weight_targets

Options = Mapping[str, Any]
Build = Callable[[nn.Module, TrainingArguments, Options], Optimizer]
# These fields are the same for every method that pytorch-optimizer implements.
PYTORCH_OPTIMIZER = dict(package="pytorch-optimizer", module="pytorch_optimizer")


@dataclass(frozen=True)
class Method:
    """Holds one row of a comparison: what a method trains, and how its adapter and its optimizer are made.

    Attributes:
        title: name in the tables.
        trains: ``"adapter"``, or ``"weights"`` for the matrices of attention and MLP.
        build: function that makes the optimizer of the trainable parameters, from the prepared model, the trainer's
            arguments and the options.
        options: what a suite may set, with defaults.
        lora: fields of the adapter's configuration.
        config: class of the adapter's configuration.
        config_options: names of the options that are also fields of the configuration.
        adapt: function that changes the model after the adapter was put into it.
        start: function that sets the adapter's weights. It finds the gradient of each base weight as
            ``_peft_loraga_grad`` of the base layer.
        package, module: names under which the method is installed and imported. They are None if this project's own
            requirements suffice.
        rate_shift: number of places by which its learning rates lie above AdamW's of the same kind, on the series 1,
            2, 5, 10, …
        second_order: whether the optimizer differentiates the gradients once more.
        paper: where the method was published.
        state: bytes of optimizer state of a float32 matrix with p rows and q columns, as a Python expression in p, q
            and the options. It is empty for adapters.
        others: builder of the authors' optimizer for embeddings, head and norms beside these matrices. None stands for
            AdamW at the same learning rate.
        note: what a reader of its figures must know.
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
        """Return the given options, completed by the defaults. Raise ValueError for an option the method lacks."""
        unknown = set(options) - set(self.options)
        if unknown:
            raise ValueError(
                f"{self.title} has no option {', '.join(sorted(unknown))}; expected: "
                f"{', '.join(self.options) or 'none'}"
            )
        return {**self.options, **options}

    @property
    def installed(self) -> str | None:
        """Return the package's name and version, or None if it is not installed or the method needs none."""
        try:
            return self.package and f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            return None

    def unavailable(self) -> str | None:
        """Return a message why the method's package cannot be used here, or None if it can."""
        if self.package is None:
            return None
        if self.installed is None:
            return f"{self.package} is not installed: pip install --no-deps -c constraints.txt {self.package}"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # A broken package may raise anything.
            return f"{self.installed} does not import: {type(error).__name__}: {error}"
        return None

    def adapter_config(self, rank: int, options: Options, model: nn.Module | None = None) -> LoraConfig | None:
        """Return the configuration of an adapter on all linear layers, or None if the method trains weights.

        The adapter has rank ``rank``, alpha = 2 · rank and no dropout, unless `lora` says otherwise. If a model is
        given, its linear layers are named (`linear_names`); otherwise PEFT selects "all-linear".
        """
        if self.trains == "weights":
            return None
        targets = "all-linear" if model is None else linear_names(model)
        shared = dict(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **self.lora)
        return self.config(**shared, **{name: options[name] for name in self.config_options})

    def prepare(
        self, model: PreTrainedModel, rank: int, options: Options, accumulate_gradients: Callable[[], None]
    ) -> nn.Module:
        """Return the model as it is trained (`attach`), with the adapter's weights set as the method prescribes.

        Args:
            model: a plain model, which is changed.
            rank: rank r of the adapter.
            options: options of the method, as `merged` completes them.
            accumulate_gradients: function that runs forward and backward passes of ``model`` on training batches. Only
                starts that need gradients call it.
        """
        config = self.adapter_config(rank, options, model)
        if self.start is None:
            return self.attach(model, config)
        estimate_gradients(model, config, accumulate_gradients)
        adapted = self.attach(model, config)
        self.start(adapted)
        return adapted

    def attach(self, model: PreTrainedModel, config: LoraConfig | None) -> nn.Module:
        """Return the model with an adapter put into it and changed by `adapt`.

        Without a configuration, return the model itself, of which only the matrices of attention and MLP are
        trainable.
        """
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
    """Return the last parts of the names of a model's linear layers, sorted, without the output head's."""
    targets = weight_targets(model, "all-linear", None, None)
    weights = (name for name, param in model.named_parameters() if param in targets)
    return sorted({name.rpartition(".weight")[0].rpartition(".")[2] for name in weights})


def trained(model: nn.Module) -> list[Tensor]:
    """Return the parameters of a model that require a gradient."""
    return [param for param in model.parameters() if param.requires_grad]


def adam_options(args: TrainingArguments) -> dict[str, Any]:
    """Return the trainer's Adam hyperparameters as keyword arguments: lr, betas, eps and weight_decay."""
    return dict(
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def fused(model: nn.Module) -> bool:
    """Return whether AdamW runs in fused kernels, as it does by default in Trainer.

    It does not on the meta device, which has no fused kernels and on which `eval.rerun.dry_run` takes its step.
    """
    return trained(model)[0].device.type != "meta"


def build_adamw(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    """Return `torch.optim.AdamW` of the trainable parameters, with the trainer's hyperparameters.

    options: further arguments of AdamW, which override the trainer's.
    """
    return torch.optim.AdamW(trained(model), fused=fused(model), **adam_options(args) | dict(options))


def build_sophia(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    """Return pytorch-optimizer's SophiaH of the trainable parameters (Liu et al., arXiv 2305.14342).

    It estimates the curvature by Hutchinson's method, which differentiates the gradients once more. So the gradients
    must come from a backward pass with ``create_graph=True``. The estimate is multiplied by the number of
    micro-batches of a step. options: further arguments of SophiaH.
    """
    from pytorch_optimizer import SophiaH

    # The package's own betas (0.96, 0.99) are kept, because the curvature is measured at every tenth step only.
    built = SophiaH(trained(model), lr=args.learning_rate, weight_decay=args.weight_decay, **options)
    # It differentiates the graph of the last micro-batch (`SecondOrderTrainer`), which is a share of the loss.
    built.compute_hutchinson_hessian = partial(
        SophiaH.compute_hutchinson_hessian, alpha=args.gradient_accumulation_steps
    )
    return built
