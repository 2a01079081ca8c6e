"""This module holds the methods that train a LoRA adapter."""

from __future__ import annotations

import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from eval.optimizers.flatlora import perturb
from eval.optimizers.loft import LoFTAdamW
from eval.optimizers.oplora import OPLoRA
from eval.optimizers.pairs import lora_layers, lora_pairs
from eval.optimizers.riemannion import Riemannion
from eval.optimizers.sora import ProximalAdamW, add_gates, gates

from .method import PYTORCH_OPTIMIZER, Method, Options, adam_options, build_adamw, build_sophia, fused, trained


def _loraplus(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    adam = adam_options(args)
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, loraplus_lr_ratio=options["lr_ratio"], fused=fused(model), **adam
    )


def _lorafa(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    config = model.peft_config["default"]
    optimizer = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=args.learning_rate)
    for group in optimizer.param_groups:  # The factory fixes these options at Adam's defaults.
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


def _riemannian(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    return create_riemannian_optimizer(model, torch.optim.AdamW, fused=fused(model), **options, **adam_options(args))


def _lorarite(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from pytorch_optimizer import LoRARite

    # The package keeps its own ε of 1e-6, which it adds to roots of a matrix's eigenvalues. Adam's ε is added to the
    # root of each entry.
    adam = {name: value for name, value in adam_options(args).items() if name != "eps"}
    return LoRARite(lora_pairs(model), **options, **adam)


def _loft(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    return LoFTAdamW(lora_pairs(model), **adam_options(args))


def _oplora(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    return OPLoRA(model, lr=args.learning_rate, max_grad_norm=args.max_grad_norm, **options)


def _flatlora(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    if args.max_steps <= 0:
        raise ValueError("Flat-LoRA's noise grows over the whole run: expected max_steps, found a run of epochs")
    return perturb(model, build_adamw(model, args, {}), options["rho"], args.max_steps)


def _sora(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    gated = gates(model)
    numbers = set(map(id, gated))
    rest = [param for param in trained(model) if id(param) not in numbers]
    groups = [{"params": rest}, {"params": gated, "weight_decay": 0.0, "threshold": options["threshold"]}]
    return ProximalAdamW(groups, fused=fused(model), **adam_options(args))


def _riemannion(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    return Riemannion(lora_pairs(model), lr=args.learning_rate, weight_decay=args.weight_decay, **options)


# These are γ in the authors' commands, their stable_gamma.
LORA_GA_GAMMA, LORA_ONE_GAMMA = 64, 128


@torch.no_grad()
def _gradient_aligned_start(model: nn.Module) -> None:
    """Set A and B to LoRA-GA's start, and subtract s B A from W, where s is the adapter's scaling.

    U and V are the gradient's singular vectors. As in the authors' code (github.com/Outsider565/LoRA-GA),
    A = p^¼/√γ V_{1..r}ᵀ and B = p^¼/√γ U_{r+1..2r} for a weight [p, q].
    """
    for layer, A, B in lora_layers(model):
        rank = len(A.weight)
        U, _, V = _gradient_svd(layer, 2 * rank)
        size = len(B.weight) ** 0.25 / LORA_GA_GAMMA**0.5
        A.weight.copy_(size * V[:, :rank].T)
        B.weight.copy_(size * U[:, rank : 2 * rank])
        _subtract_start(layer, A, B)


@torch.no_grad()
def _one_step_start(model: nn.Module) -> None:
    """Set A and B to LoRA-One's start, from the gradients of the base weights. The weights W stay as they are.

    B A is the best rank-r approximation of W's negative gradient −U Σ Vᵀ, scaled to a largest singular value of 1/γ.
    As in the authors' code (github.com/YuanheZ/LoRA-One, run_exp.py), B = −U √(Σ/(γ σ_1)) and A = √(Σ/(γ σ_1)) Vᵀ.
    """
    for layer, A, B in lora_layers(model):
        rank = len(A.weight)
        U, sigma, V = _gradient_svd(layer, rank)
        root = (sigma[:rank] / (LORA_ONE_GAMMA * sigma[0])).sqrt()
        B.weight.copy_(-U[:, :rank] * root)
        A.weight.copy_((V[:, :rank] * root).T)


@torch.no_grad()
def _locally_optimal_start(model: nn.Module) -> None:
    """Set A and B to Riemannion's start s B A = α U_{1..r} V_{r+1..2r}ᵀ, and subtract s B A from W.

    U and V are the gradient's singular vectors, and s is the adapter's scaling. The tangent space at s B A holds as
    much of the gradient as any other. α = 0.01/√r, as others quote the paper's default.
    """
    for layer, A, B in lora_layers(model):
        rank = len(A.weight)
        U, _, V = _gradient_svd(layer, 2 * rank)
        (scaling,) = layer.scaling.values()
        root = (0.01 / rank**0.5 / scaling) ** 0.5
        A.weight.copy_(root * V[:, rank : 2 * rank].T)
        B.weight.copy_(root * U[:, :rank])
        _subtract_start(layer, A, B)


def _subtract_start(layer: LoraLayer, A: nn.Linear, B: nn.Linear) -> None:
    """Subtract s B A from a layer's weight W, so that the layer computes what it did before it had an adapter."""
    (scaling,) = layer.scaling.values()
    layer.get_base_layer().weight -= scaling * B.weight @ A.weight


def _gradient_svd(layer: LoraLayer, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [p, c], σ [c] and V [q, c] of a layer's gradient in float32, for some c ≥ ``rank``, and delete it.

    σ is in descending order. The gradient [p, q] is the one that `Method.prepare` leaves at the base layer. Raises
    ValueError if ``rank`` is above its smaller side.
    """
    gradient = layer.get_base_layer()._peft_loraga_grad.float()
    del layer.get_base_layer()._peft_loraga_grad
    if rank > min(gradient.shape):
        raise ValueError(
            f"found a weight of shape {tuple(gradient.shape)}; expected {rank} singular values: take a smaller r"
        )
    return torch.svd_lowrank(gradient, q=min(2 * rank, *gradient.shape), niter=16)


ADAPTERS: dict[str, Method] = {
    # PEFT makes these adapters. torch.optim.AdamW trains them unless PEFT brings an optimizer.
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
        lora={"use_rslora": True},
        start=_gradient_aligned_start,
        rate_shift=-2,
        paper="Wang et al., arXiv 2407.05000",
        note="the authors' start, with rsLoRA as in their runs; in PEFT's, B has the gradient's singular values",
    ),
    "lora+": Method(
        "LoRA+", "adapter", _loraplus, {"lr_ratio": 16.0}, rate_shift=-2, paper="Hayou et al., arXiv 2402.12354"
    ),
    "lora-fa": Method(
        "LoRA-FA",
        "adapter",
        _lorafa,
        paper="Zhang et al., arXiv 2308.03303",
        note="PEFT's optimizer multiplies in bfloat16 wherever torch can",
    ),
    # These are other optimizers of the plain LoRA adapter.
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
        # The momentum is an average, because the package's default, a sum, makes steps ten times AdamW's. Blocks of
        # 128 bound the preconditioners, so that no side is too long for them.
        {
            "block_size": 128,
            "start_preconditioning_step": 5,
            "preconditioning_compute_steps": 5,
            "moving_average_for_momentum": True,
            "no_preconditioning_for_layers_with_dim_gt": 1 << 20,
        },
        **PYTORCH_OPTIMIZER,
        paper="Gupta et al., arXiv 1802.09568",
    ),
    "soap": Method(
        "SOAP",
        "adapter",
        _soap,
        {"max_precondition_dim": 1024},
        **PYTORCH_OPTIMIZER,
        paper="Vyas et al., arXiv 2409.11321",
        note="sides of more than 1,024 entries are not preconditioned (the package's default is 10,000), because two "
        "q×q matrices for each adapter of a 7B model would not fit in a GPU's memory",
    ),
    "sophia": Method(
        "Sophia-H",
        "adapter",
        build_sophia,
        rate_shift=6,
        second_order=True,
        **PYTORCH_OPTIMIZER,
        paper="Liu et al., arXiv 2305.14342",
    ),
    "riemannian": Method(
        "Riemannian LoRA",
        "adapter",
        _riemannian,
        {"reg": 1e-2},
        paper="Zhang and Pilanci, arXiv 2402.02347",
        note="reg is PEFT's; the authors' code has 1e-6, and for Mistral from 1e-6 to 100, by task. PEFT's factory "
        "holds the pairs outside of the optimizer's groups: under FSDP2, which replaces them, it does nothing",
    ),
    "lora-rite": Method(
        "LoRA-RITE",
        "adapter",
        _lorarite,
        {"clip_unmagnified_grad": 1.0, "update_skipping": 1.0},
        **PYTORCH_OPTIMIZER,
        rate_shift=-1,
        paper="Yen et al., arXiv 2410.20625",
        note="as in the authors' code, gradients of the product are clipped to norm 1 and ones with a root mean "
        "square above 1 are dropped, so that the loss's scale matters",
    ),
    "loft": Method(
        "LoFT",
        "adapter",
        _loft,
        rate_shift=-4,
        paper="Tastan et al., arXiv 2505.21289",
        note="the second moment follows the moving factor as the first does; the authors' code exchanges R and Rᵀ "
        "there, and has ε = 1e-4, where this has Adam's 1e-8",
    ),
    "riemannion": Method(
        "Riemannion",
        "adapter",
        _riemannion,
        {"beta": 0.9},
        start=_locally_optimal_start,
        rate_shift=3,
        paper="Bogachev et al., arXiv 2507.12142",
        note="Muon on the manifold of rank r, from implementations that quote the paper. They differ in which "
        "momentum is kept: this has Muon's, the sum before it is made orthogonal. The authors' code is of an earlier "
        "variant",
    ),
    "oplora": Method(
        "OPLoRA",
        "adapter",
        _oplora,
        {"momentum": 0.9, "damping": 1e-2},
        rate_shift=6,
        paper="Almansoori et al., September 2025; LoRSum in arXiv 2602.16456",
        note="follows gradient descent with momentum, not Adam; the norm of the full gradients is clipped, as the "
        "authors do, not that of A's and B's",
    ),
    # These train or shape the adapter in other ways.
    "lora-one": Method(
        "LoRA-One",
        "adapter",
        build_adamw,
        lora={"use_rslora": True},
        start=_one_step_start,
        rate_shift=-2,
        paper="Zhang et al., arXiv 2502.01235",
        note="without the preconditioner, whose code the authors have not released",
    ),
    "flat-lora": Method(
        "Flat-LoRA", "adapter", _flatlora, {"rho": 0.05}, paper="Li et al., arXiv 2409.14396", note="under AdamW"
    ),
    "sora": Method(
        "SoRA",
        "adapter",
        _sora,
        {"threshold": 3e-4},
        adapt=add_gates,
        paper="Ding et al., arXiv 2311.11696",
        note="the proximal step alone; the authors' runs add the L1 norm of the gates to the loss, with a weight for "
        "each task. In n steps at a rate that warms up and decays the step lowers a gate by 3e-4 n at most, so that "
        "short runs prune few",
    ),
}
