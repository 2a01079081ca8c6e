"""The methods that `python -m eval.rerun` compares: one entry of `METHODS` each.

An entry says what is trained, how the adapter is made, how the optimizer is built, and where its learning rates lie. To add
one, write its `build` and its entry; the runner needs no change. Packages are imported inside `build`, so that one that is
missing or broken costs its own rows only (`unavailable`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from trl import SFTConfig

from lorapre_peft import LoRAPreConfig, lorapre_optimizer
from lorapre_peft.integrations.targets import weight_targets

Options = Mapping[str, Any]
Build = Callable[[nn.Module, SFTConfig, Options], Optimizer]


@dataclass(frozen=True)
class Method:
    """One row of a table.

    title: as the table names it. trains: ``"adapter"`` or ``"weights"`` (of attention and MLP; everything else is frozen).
    build: the optimizer from the prepared model, the trainer's arguments and the options. options: what a suite may set, with
    defaults. lora: fields of the adapter's `LoraConfig`. package, module: what it is installed and imported as, where it is
    none of this project's own requirements. rate_shift: how many places its learning rates lie above AdamW's of the same
    kind, on the series 1, 2, 5, 10, … second_order: the optimizer differentiates the gradients once more.
    """

    title: str
    trains: str
    build: Build
    options: Options = field(default_factory=dict)
    lora: Options = field(default_factory=dict)
    package: str | None = None
    module: str | None = None
    rate_shift: int = 0
    second_order: bool = False

    def merged(self, options: Options) -> dict[str, Any]:
        """The options with the defaults of those not given. Raises ValueError for one that the method does not have."""
        unknown = set(options) - set(self.options)
        if unknown:
            raise ValueError(
                f"{self.title} has no option {', '.join(sorted(unknown))}; expected: {', '.join(self.options) or 'none'}"
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
        """The adapter of all linear layers, alpha = 2r, no dropout; by module names if the model is given. None for weights."""
        if self.trains == "weights":
            return None
        targets = "all-linear" if model is None else linear_names(model)
        shared = dict(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **self.lora)
        if self.build is _lorapre:
            return LoRAPreConfig(**shared, **{name: options[name] for name in ("momentum_rank", "update_rule")})
        return LoraConfig(**shared)

    def prepare(
        self, model: PreTrainedModel, rank: int, options: Options, accumulate_gradients: Callable[[], None]
    ) -> nn.Module:
        """The model as it is trained (`attach`), its adapter at the start that the method prescribes.

        accumulate_gradients: runs forward and backward passes of the given model on training batches, for starts that need
        gradients.
        """
        config = self.adapter_config(rank, options, model)
        if config is not None and config.init_lora_weights == "lora_ga":
            preprocess_loraga(model, config, accumulate_gradients)
        return self.attach(model, config)

    def attach(self, model: PreTrainedModel, config: LoraConfig | None) -> nn.Module:
        """The model with the adapter, or, without one, with its matrices alone trainable."""
        if config is not None:
            return get_peft_model(model, config)
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
    return [param for param in model.parameters() if param.requires_grad]


def adam_options(args: SFTConfig) -> dict[str, Any]:
    return dict(
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def _fused(model: nn.Module) -> bool:
    """As Trainer's default is; not for the plan's dry run on the meta device, which has no fused kernels."""
    return trained(model)[0].device.type != "meta"


def _adamw(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    return torch.optim.AdamW(trained(model), fused=_fused(model), **adam_options(args))


def _muon(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    return torch.optim.Muon(
        trained(model), lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


def _lorapre(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    if not any(hasattr(module, "lora_A") for module in model.modules()):
        options = options | {"others": "frozen"}
    factory, options = lorapre_optimizer(args=args, verbose=False, **options)
    return factory()(model, **options)


def _loraplus(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    adam = adam_options(args)
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, loraplus_lr_ratio=options["lr_ratio"], fused=_fused(model), **adam
    )


def _lorafa(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    config = model.peft_config["default"]
    optimizer = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=args.learning_rate)
    for group in optimizer.param_groups:  # the factory fixes them at Adam's defaults
        group |= {name: value for name, value in adam_options(args).items() if name != "lr"}
    return optimizer


def _lorapro(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    from lora_pro import LoRAProAdamW

    return LoRAProAdamW(model, lorapro_mode=options["mode"], **adam_options(args))


def _projected(
    model: nn.Module, args: SFTConfig, options: Options, optimizer: type[Optimizer], **more: Any
) -> Optimizer:
    """GaLore and those that took over its interface: a group with a rank has its gradients projected."""
    built = optimizer(
        [{"params": trained(model), **options}], no_deprecation_warning=True, **adam_options(args), **more
    )
    built.register_step_post_hook(_compact_projections)
    return built


def _compact_projections(optimizer: Optimizer, *_: Any) -> None:
    """Of float32 gradients GaLore and Fira keep a view of all singular vectors as the projection; what it shows is enough."""
    for state in optimizer.state.values():
        projection = getattr(state.get("projector"), "ortho_matrix", None)
        if projection is not None and projection.untyped_storage().nbytes() > projection.nbytes:
            state["projector"].ortho_matrix = projection.clone(memory_format=torch.contiguous_format)


def _galore(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    from galore_torch import GaLoreAdamW

    return _projected(model, args, options, GaLoreAdamW)


def _fira(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    from fira import FiraAdamW

    return _projected(model, args, options, FiraAdamW)


def _apollo(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    from apollo_torch import APOLLOAdamW

    return _projected(model, args, options, APOLLOAdamW)


def _mlorc(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    from eval.mlorc import MLorcAdamW

    return MLorcAdamW(trained(model), use_bias_correction=True, **options, **adam_options(args))


def _shampoo(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    adam = {name: value for name, value in adam_options(args).items() if name != "eps"}
    return ScalableShampoo(trained(model), graft_type=LayerWiseGrafting.RMSPROP, **options, **adam)


def _soap(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(trained(model), **options, **adam_options(args))


def _sophia(model: nn.Module, args: SFTConfig, options: Options) -> Optimizer:
    from pytorch_optimizer import SophiaH

    # Its own betas (0.96, 0.99): the second is of a curvature that is measured at every tenth step only.
    built = SophiaH(trained(model), lr=args.learning_rate, weight_decay=args.weight_decay, **options)
    # The graph that it differentiates is of the last micro-batch (`SecondOrderTrainer`), one of so many shares of the loss.
    built.compute_hutchinson_hessian = partial(
        SophiaH.compute_hutchinson_hessian, alpha=args.gradient_accumulation_steps
    )
    return built


_LORAPRE = dict(optimizer="adamw", momentum_rank=2, update_rule="als", residual_weight=None)
_LORAPRE_MUON = _LORAPRE | dict(optimizer="muon", adjust_lr_fn="match_rms_adamw")
_ON_WEIGHTS = dict(momentum_rank=8, bf16_rounding="stochastic")
_PROJECTION = dict(rank=8, update_proj_gap=200, proj_type="std")
_PYTORCH_OPTIMIZER = dict(package="pytorch-optimizer", module="pytorch_optimizer")

METHODS: dict[str, Method] = {
    # Adapters that PEFT makes, under torch.optim.AdamW unless PEFT brings an optimizer.
    "lora": Method("LoRA", "adapter", _adamw),
    "rslora": Method("rsLoRA", "adapter", _adamw, lora={"use_rslora": True}, rate_shift=-1),
    "dora": Method("DoRA", "adapter", _adamw, lora={"use_dora": True}),
    "pissa": Method("PiSSA", "adapter", _adamw, lora={"init_lora_weights": "pissa_niter_16"}, rate_shift=-2),
    "lora-ga": Method(
        "LoRA-GA",
        "adapter",
        _adamw,
        lora={"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
        rate_shift=-2,
    ),
    "lora+": Method("LoRA+", "adapter", _loraplus, {"lr_ratio": 16.0}, rate_shift=-2),
    "lora-fa": Method("LoRA-FA", "adapter", _lorafa),
    # Other optimizers of the same adapter.
    "lora-pro": Method(
        "LoRA-Pro", "adapter", _lorapro, {"mode": "full"}, package="lora-pro-adamw", module="lora_pro", rate_shift=-2
    ),
    "shampoo": Method(
        "Shampoo",
        "adapter",
        _shampoo,
        # The momentum as an average: the package's default, a sum, makes steps ten times AdamW's. Blocks of 128 bound the
        # preconditioners, so that no side is too long for them.
        {
            "block_size": 128,
            "start_preconditioning_step": 5,
            "preconditioning_compute_steps": 5,
            "moving_average_for_momentum": True,
            "no_preconditioning_for_layers_with_dim_gt": 1 << 20,
        },
        **_PYTORCH_OPTIMIZER,
    ),
    "soap": Method("SOAP", "adapter", _soap, {"max_precondition_dim": 1024}, **_PYTORCH_OPTIMIZER),
    "sophia": Method("Sophia-H", "adapter", _sophia, rate_shift=6, second_order=True, **_PYTORCH_OPTIMIZER),
    "lorapre-adam": Method("LoRA-Pre Adam", "adapter", _lorapre, _LORAPRE),
    "lorapre-muon": Method("LoRA-Pre Muon", "adapter", _lorapre, _LORAPRE_MUON),
    # The weights of attention and MLP.
    "adamw": Method("AdamW", "weights", _adamw),
    "muon": Method("Muon", "weights", _muon),
    "galore": Method(
        "GaLore",
        "weights",
        _galore,
        _PROJECTION | {"scale": 0.25},
        package="galore-torch",
        module="galore_torch",
        rate_shift=2,
    ),
    "fira": Method(
        "Fira", "weights", _fira, _PROJECTION | {"alpha": 0.25}, package="fira", module="fira", rate_shift=2
    ),
    "apollo": Method(
        "APOLLO",
        "weights",
        _apollo,
        _PROJECTION | {"scale": 1.0, "scale_type": "channel", "proj": "random"},
        package="apollo-torch",
        module="apollo_torch",
        rate_shift=2,
    ),
    "mlorc": Method("MLorc", "weights", _mlorc, {"rank": 8}, package="mlorc-optim", module="eval.mlorc"),
    "lorapre-adam-weights": Method("LoRA-Pre Adam", "weights", _lorapre, _LORAPRE | _ON_WEIGHTS),
    "lorapre-muon-weights": Method("LoRA-Pre Muon", "weights", _lorapre, _LORAPRE_MUON | _ON_WEIGHTS),
}
