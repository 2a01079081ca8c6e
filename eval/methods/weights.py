"""This module holds the methods that train the weights of attention and MLP themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from eval.optimizers.ablation import AblationAdam
from eval.optimizers.chained import ChainedOptimizer
from eval.optimizers.mofasgd import MoFaSGD
from eval.optimizers.projected import compact_projections, saved_as_numbers
from eval.optimizers.racs import RACS, Alice
from eval.optimizers.scale import Scale
from eval.optimizers.shampoo import Shampoo
from eval.optimizers.sinkgd import SinkGD
from lorapre_peft.integrations.targets import embedding_parameters, output_heads

from .method import PYTORCH_OPTIMIZER, Build, Method, Options, adam_options, build_adamw, build_sophia, trained


def _without_momentum(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    return build_adamw(model, args, {"betas": (0.0, args.adam_beta2)})


def _ablation(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    adam = adam_options(args)
    options = dict(options, betas=options["betas"] or adam["betas"])
    return AblationAdam(trained(model), seed=args.seed, **adam | options)


def _shampoo(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    return Shampoo(trained(model), **options, **adam_options(args))


def _adamw8bit(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    optimizer = AdamW8bit(trained(model), **adam_options(args))
    # A process's one manager knows parameters by id and place, so that an earlier model's overrides would count again.
    optimizer.mng = GlobalOptimManager.__new__(GlobalOptimManager)
    optimizer.mng.initialize()
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    optimizer.mng.override_config(embeddings, "optim_bits", 32)  # as Trainer does
    return optimizer


def _adam_mini(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from adam_mini import Adam_mini

    width, heads = model.config.hidden_size, model.config.num_attention_heads
    head_dim = getattr(model.config, "head_dim", None) or width // heads
    if width % head_dim:
        raise ValueError(
            f"found heads of {head_dim} numbers in a model {width} wide; adam-mini needs a width that they divide, "
            "for it takes a head's size to be width² over the number of heads"
        )
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return Adam_mini(named, dim=width, n_heads=width // head_dim, verbose=False, **adam_options(args))


def _adafactor(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    # PyTorch's first ε, 1.2e-7 in float32, bounds the mean of g² from below, which clipped gradients are often under.
    # The paper's 1e-30 would be 0 in float32, as PyTorch squares it.
    eps = (1e-16, 1e-3)
    return torch.optim.Adafactor(trained(model), lr=args.learning_rate, eps=eps, weight_decay=args.weight_decay)


def _adalomo(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from transformers.optimization import Adafactor

    fixed = dict(scale_parameter=True, relative_step=False, warmup_init=False)
    return Adafactor(trained(model), lr=args.learning_rate, weight_decay=args.weight_decay, **fixed)


def _muon(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    return torch.optim.Muon(
        trained(model), lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


def _projected(
    model: nn.Module,
    args: TrainingArguments,
    options: Options,
    optimizer: type[Optimizer],
    projector: type,
    **more: Any,
) -> Optimizer:
    """Return an optimizer with GaLore's interface, which projects the gradients of a group that has a rank.

    projector: class of its projection objects. more: further arguments of the optimizer.
    """
    built = optimizer(
        [{"params": trained(model), **options}], no_deprecation_warning=True, **adam_options(args), **more
    )
    built.register_step_post_hook(compact_projections)
    return saved_as_numbers(built, projector)


def _galore(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    return _projected(model, args, options, GaLoreAdamW, GaLoreProjector)


def _fira(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from fira import FiraAdamW
    from fira.gradient_projection import GradientProjector

    return _projected(model, args, options, FiraAdamW, GradientProjector)


def _apollo(model: nn.Module, args: TrainingArguments, options: Options, **more: Any) -> Optimizer:
    from apollo_torch import APOLLOAdamW
    from apollo_torch.random_projector import GradientProjector

    return _projected(model, args, options, APOLLOAdamW, GradientProjector, **more)


def _conda(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from pytorch_optimizer import Conda
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    return saved_as_numbers(Conda(trained(model), **options, **adam_options(args)), GaLoreProjector)


def _mlorc(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    from eval.optimizers.mlorc import MLorcAdamW

    return MLorcAdamW(trained(model), use_bias_correction=True, **options, **adam_options(args))


def _own(cls: Callable[..., Optimizer]) -> Build:
    """Return a builder of one of this project's classes, called with parameters, lr, weight_decay and the options."""

    def build(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
        return cls(trained(model), lr=args.learning_rate, weight_decay=args.weight_decay, **options)

    return build


def _scale_others(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    """Return the optimizer that SCALE's authors use for the rest of a model.

    The head has momentum, embeddings are normalised over the tokens, and AdamW trains the norms at 2e-2 with torch's
    default betas, as by default in the authors' code, whatever the rate of the matrices is.
    """
    heads = {param for head in output_heads(model) for param in head.parameters()}
    embedded = embedding_parameters(model) - heads
    head, embedding, rest = [], [], []
    for param in trained(model):
        matrices = head if param in heads else embedding if param in embedded else rest
        (matrices if param.ndim == 2 else rest).append(param)
    groups = [{"params": head, "momentum": 0.9}, {"params": embedding, "dim": 0}]
    scale = Scale([group for group in groups if group["params"]], args.learning_rate, weight_decay=args.weight_decay)
    return ChainedOptimizer(scale, torch.optim.AdamW(rest, lr=2e-2, weight_decay=args.weight_decay))


_PROJECTION = dict(rank=8, update_proj_gap=200, proj_type="std")
_PROJECTED_STATE = "4*rank*(min(p, q) + 2*max(p, q))"

WEIGHTS: dict[str, Method] = {
    # These keep dense state.
    "adamw": Method("AdamW", "weights", build_adamw, paper="Loshchilov and Hutter, arXiv 1711.05101", state="8*p*q"),
    "adamw-no-momentum": Method(
        "AdamW, β1 = 0",
        "weights",
        _without_momentum,
        paper="Loshchilov and Hutter, arXiv 1711.05101",
        state="8*p*q",
        note="torch.optim.AdamW keeps a first moment here too, the last gradient; the rule needs half of the state",
    ),
    "muon": Method(
        "Muon",
        "weights",
        _muon,
        paper="Jordan et al., kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982 for the rate's scale",
        state="4*p*q",
    ),
    "conda": Method(
        "Conda",
        "weights",
        _conda,
        {"update_proj_gap": 2000, "scale": 0.25},
        **PYTORCH_OPTIMIZER,
        rate_shift=2,
        paper="Wang et al., arXiv 2509.24218",
        state="4*(2*p*q + min(p, q)**2)",
    ),
    # These use curvature.
    "shampoo-weights": Method(
        "Shampoo",
        "weights",
        _shampoo,
        {"gap": 10, "damping": 1e-6},
        paper="Gupta et al., arXiv 1802.09568; Anil et al., arXiv 2002.09018",
        state="8*(p*q + p**2 + q**2)",
        note="the classes of pytorch-optimizer keep their statistics in objects that no checkpoint holds "
        "(ScalableShampoo), or take the preconditioned gradient for the gradient's momentum (Shampoo)",
    ),
    "sophia-weights": Method(
        "Sophia-H",
        "weights",
        build_sophia,
        **PYTORCH_OPTIMIZER,
        rate_shift=3,
        second_order=True,
        paper="Liu et al., arXiv 2305.14342",
        state="12*p*q",
        note="the package keeps the last estimate of the curvature too, a third of the state; the rule needs two",
    ),
    # These quantise or share second moments.
    "adamw-8bit": Method(
        "AdamW, 8-bit",
        "weights",
        _adamw8bit,
        package="bitsandbytes",
        module="bitsandbytes",
        paper="Dettmers et al., arXiv 2110.02861",
        state="2*p*q + 8*p*q/256",
        others=_adamw8bit,
        note="matrices of fewer than 4,096 entries keep float32 moments",
    ),
    "adam-mini": Method(
        "Adam-mini",
        "weights",
        _adam_mini,
        package="adam-mini",
        module="adam_mini",
        paper="Zhang et al., arXiv 2406.16793",
        state="4*(p*q + p)",
        others=_adam_mini,
        note="one second moment for each row, and in queries and keys for each head, which takes less than stated",
    ),
    "adafactor": Method(
        "Adafactor",
        "weights",
        _adafactor,
        rate_shift=5,
        paper="Shazeer and Stern, arXiv 1804.04235",
        state="4*(p + q)",
        others=_adafactor,
        note="the rate is relative to the root mean square of the matrix, and PyTorch caps it at 1/√step; the first ε "
        "is 1e-16, since PyTorch's, 1.2e-7, bounds the mean of g² from below",
    ),
    "adalomo": Method(
        "AdaLomo",
        "weights",
        _adalomo,
        rate_shift=5,
        paper="Lv et al., arXiv 2310.10195",
        state="4*(p + q + 1)",
        others=_adalomo,
        note="transformers' Adafactor with the options that make it AdaLomo's rule, which is Adafactor's without the "
        "cap of the rate. The authors' package updates within the backward pass, where gradients cannot be "
        "accumulated or clipped by their common norm; that concerns memory, not the rule",
    ),
    # This takes LoRA-Pre apart.
    "ablation": Method(
        "Adam, moments by choice",
        "weights",
        _ablation,
        dict(
            first="als",
            second="als",
            matched=False,
            momentum_rank=8,
            second_momentum_rank=1,
            betas=None,
            gammas=None,
            damping=1e-6,
            init_std=None,
        ),
        paper="this project; the moments are those of arXiv 2602.24283 and of Adam",
        state="8*(p*q*((matched or first == 'full') + (matched or second == 'full')) + (p + q)*("
        "(first in ('als', 'newton'))*momentum_rank + (second in ('als', 'newton'))*second_momentum_rank) + 1)",
        note="for experiments: in float64, with float64 state",
    ),
    # These keep low-rank state.
    "galore": Method(
        "GaLore",
        "weights",
        _galore,
        _PROJECTION | {"scale": 0.25},
        package="galore-torch",
        module="galore_torch",
        rate_shift=2,
        paper="Zhao et al., arXiv 2403.03507",
        state=_PROJECTED_STATE,
    ),
    "fira": Method(
        "Fira",
        "weights",
        _fira,
        _PROJECTION | {"alpha": 0.25},
        package="fira",
        module="fira",
        rate_shift=2,
        paper="Chen et al., arXiv 2410.01623",
        state=_PROJECTED_STATE,
        note="outside the subspace the authors' package has G − α P Pᵀ G, where the paper has G − P Pᵀ G; their α is "
        "0.25 for pre-training and 1 for fine-tuning, as in these suites",
    ),
    "apollo": Method(
        "APOLLO",
        "weights",
        _apollo,
        _PROJECTION | {"scale": 1.0, "scale_type": "channel", "proj": "random"},
        package="apollo-torch",
        module="apollo_torch",
        rate_shift=2,
        paper="Zhu et al., arXiv 2412.05270",
        state=_PROJECTED_STATE,
        note="the authors' package keeps the random projection, which the paper would make anew from its seed",
    ),
    "apollo-mini": Method(
        "APOLLO-Mini",
        "weights",
        partial(_apollo, scale_front=True),
        _PROJECTION | {"rank": 1, "scale": 128.0, "scale_type": "tensor", "proj": "random"},
        package="apollo-torch",
        module="apollo_torch",
        rate_shift=2,
        paper="Zhu et al., arXiv 2412.05270",
        state=_PROJECTED_STATE,
        note="the scale is multiplied in before the limiter of the norm's growth, as in the authors' runs",
    ),
    "mlorc": Method(
        "MLorc",
        "weights",
        _mlorc,
        {"rank": 8},
        package="mlorc-optim",
        module="eval.optimizers.mlorc",
        paper="Shen et al., arXiv 2506.01897",
        state="8*rank*(p + q + 1)",
        note="with Adam's bias correction, and with the power iteration of the authors' code, which the package, by "
        "another author, leaves out",
    ),
    "alice": Method(
        "Alice",
        "weights",
        _own(Alice),
        {"rank": 8, "leading": 3, "gap": 200},
        rate_shift=4,
        paper="Gong et al., arXiv 2502.07752",
        state="4*(rank*(min(p, q) + rank + 2*max(p, q)) + max(p, q) + 1)",
        note="3 of 8 directions are the leading ones, as 40 of 128 are in the paper's 60M run; another rank needs "
        "another number of them (option leading). pytorch-optimizer's Alice takes the rows for the smaller side, and "
        "starts from the axes instead of the gradient's directions",
    ),
    "mofasgd": Method(
        "MoFaSGD",
        "weights",
        _own(MoFaSGD),
        {"rank": 8, "beta": 0.9},
        rate_shift=4,
        paper="Mahdavinia and Mahdavi, arXiv 2507.08091",
        state="4*rank*(p + q + 1)",
        note="the paper's algorithm, with the β of the authors' config for fine-tuning; their code starts from the "
        "weight's SVD and divides by clipped singular values",
    ),
    # These keep vectors or nothing.
    "racs": Method(
        "RACS",
        "weights",
        _own(RACS),
        rate_shift=4,
        paper="Gong et al., arXiv 2502.07752",
        state="4*(p + q + 1)",
        note="pytorch-optimizer's RACS takes means of squares for the fixed point of Eq. 16, so that its steps grow "
        "as gradients shrink",
    ),
    "sinkgd": Method(
        "SinkGD", "weights", _own(SinkGD), {"iterations": 5}, paper="Scetbon et al., arXiv 2502.06742", state="0"
    ),
    "scale": Method(
        "SCALE",
        "weights",
        _own(Scale),
        paper="Glentis et al., arXiv 2506.16659",
        state="0",
        others=_scale_others,
        note="beside these matrices the authors keep a momentum in the output head, p q numbers there",
    ),
}
