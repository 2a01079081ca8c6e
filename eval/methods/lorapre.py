"""This module holds LoRA-Pre's own methods: Adam and Muon, each for an adapter and for weights.

The update rule is one of their options.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from lorapre_peft import LoRAPreConfig, lorapre_optimizer

from .method import Method, Options

PAPER = "Wang et al., arXiv 2602.24283"


def _lorapre(model: nn.Module, args: TrainingArguments, options: Options) -> Optimizer:
    if not any(hasattr(module, "lora_A") for module in model.modules()):
        options = options | {"others": "frozen"}
    factory, options = lorapre_optimizer(args=args, verbose=False, **options)
    return factory()(model, **options)


_RULE = dict(momentum_rank=2, update_rule="als", residual_weight=None)
_ADAM = dict(optimizer="adamw", second_momentum_rank=None, **_RULE)
_MUON = dict(optimizer="muon", adjust_lr_fn="match_rms_adamw", **_RULE)
_ON_WEIGHTS = dict(momentum_rank=8, bf16_rounding="stochastic")
_ADAPTER = dict(config=LoRAPreConfig, config_options=("momentum_rank", "update_rule"))

LORAPRE: dict[str, Method] = {
    "lorapre-adam": Method("LoRA-Pre Adam", "adapter", _lorapre, _ADAM, **_ADAPTER, paper=PAPER),
    "lorapre-muon": Method("LoRA-Pre Muon", "adapter", _lorapre, _MUON, **_ADAPTER, paper=PAPER),
    "lorapre-adam-weights": Method(
        "LoRA-Pre Adam",
        "weights",
        _lorapre,
        _ADAM | _ON_WEIGHTS,
        paper=PAPER,
        state="4*(p + q)*(momentum_rank + (second_momentum_rank or (1 if update_rule == 'als' else momentum_rank)))",
    ),
    "lorapre-muon-weights": Method(
        "LoRA-Pre Muon",
        "weights",
        _lorapre,
        _MUON | _ON_WEIGHTS,
        paper=PAPER,
        state="4*(p + q)*momentum_rank",
    ),
}
