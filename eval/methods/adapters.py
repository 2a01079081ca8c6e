"""Methods that train a LoRA adapter."""

from __future__ import annotations

from functools import partial

import torch
from peft import LoraGAConfig
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from .method import Method, Options, adam_options, build_adamw, fused, trained


def _loraplus(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    adam = adam_options(args)
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, loraplus_lr_ratio=options["lr_ratio"], fused=fused(model), **adam
    )


def _lorafa(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    config = model.peft_config["default"]
    optimizer = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=args.learning_rate)
    for group in optimizer.param_groups:  # the factory fixes them at Adam's defaults
        group |= {name: value for name, value in adam_options(args).items() if name != "lr"}
    return optimizer


def _lorapro(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from lora_pro import LoRAProAdamW

    return LoRAProAdamW(model, lorapro_mode=options["mode"], **adam_options(args))


def _shampoo(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    adam = {name: value for name, value in adam_options(args).items() if name != "eps"}
    return ScalableShampoo(trained(model), graft_type=LayerWiseGrafting.RMSPROP, **options, **adam)


def _soap(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(trained(model), **options, **adam_options(args))


def _sophia(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from pytorch_optimizer import SophiaH

    # Its own betas (0.96, 0.99): the second is of a curvature that is measured at every tenth step only.
    built = SophiaH(trained(model), lr=args.learning_rate, weight_decay=args.weight_decay, **options)
    # The graph that it differentiates is of the last micro-batch (`SecondOrderTrainer`), one of so many shares of the loss.
    built.compute_hutchinson_hessian = partial(
        SophiaH.compute_hutchinson_hessian, alpha=args.gradient_accumulation_steps
    )
    return built


_PYTORCH_OPTIMIZER = dict(package="pytorch-optimizer", module="pytorch_optimizer")

ADAPTERS: dict[str, Method] = {
    # Adapters that PEFT makes, under torch.optim.AdamW unless PEFT brings an optimizer.
    "lora": Method("LoRA", "adapter", build_adamw, paper="Hu et al., arXiv 2106.09685"),
    "rslora": Method(
        "rsLoRA",
        "adapter",
        build_adamw,
        lora={"use_rslora": True},
        rate_shift=-1,
        paper="Kalajdzievski, arXiv 2312.03732",
    ),
    "dora": Method("DoRA", "adapter", build_adamw, lora={"use_dora": True}, paper="Liu et al., arXiv 2402.09353"),
    "pissa": Method(
        "PiSSA",
        "adapter",
        build_adamw,
        lora={"init_lora_weights": "pissa_niter_16"},
        rate_shift=-2,
        paper="Meng et al., arXiv 2404.02948",
    ),
    "lora-ga": Method(
        "LoRA-GA",
        "adapter",
        build_adamw,
        lora={"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
        rate_shift=-2,
        paper="Wang et al., arXiv 2407.05000",
    ),
    "lora+": Method(
        "LoRA+", "adapter", _loraplus, {"lr_ratio": 16.0}, rate_shift=-2, paper="Hayou et al., arXiv 2402.12354"
    ),
    "lora-fa": Method("LoRA-FA", "adapter", _lorafa, paper="Zhang et al., arXiv 2308.03303"),
    # Other optimizers of the same adapter.
    "lora-pro": Method(
        "LoRA-Pro",
        "adapter",
        _lorapro,
        {"mode": "full"},
        package="lora-pro-adamw",
        module="lora_pro",
        rate_shift=-2,
        paper="Wang et al., arXiv 2407.18242",
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
        paper="Gupta et al., arXiv 1802.09568",
    ),
    "soap": Method(
        "SOAP",
        "adapter",
        _soap,
        {"max_precondition_dim": 1024},
        **_PYTORCH_OPTIMIZER,
        paper="Vyas et al., arXiv 2409.11321",
    ),
    "sophia": Method(
        "Sophia-H",
        "adapter",
        _sophia,
        rate_shift=6,
        second_order=True,
        **_PYTORCH_OPTIMIZER,
        paper="Liu et al., arXiv 2305.14342",
    ),
}
