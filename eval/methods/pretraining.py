"""This module builds the optimizer of a whole model: a method trains its matrices, and AdamW or the authors' choice
the embeddings, head and norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from eval.optimizers.chained import ChainedOptimizer
from lorapre_peft.integrations.targets import weight_targets

from .method import Method, Options, adam_options, build_adamw, fused


def pretraining_optimizer(
    method: Method,
    model: PreTrainedModel,
    args: TrainingArguments,
    options: Options,
    others_lr: float | None = None,
) -> Optimizer:
    """Return the optimizer of all trainable parameters of a model.

    The method trains the matrices of attention and MLP at ``args.learning_rate``.

    Args:
        method: entry of `METHODS` that trains weights.
        model: plain model, before it is wrapped.
        args: trainer's arguments, of which the learning rate, Adam's hyperparameters and the weight decay are read.
        options: options of the method, as `Method.merged` completes them.
        others_lr: learning rate of AdamW without weight decay, which trains embeddings, head and norms. A comparison
            of what happens to the matrices alone has the same rate in every row. None stands for the authors' own way
            (`Method.others`) at ``args.learning_rate``.

    Raises:
        ValueError: a method that trains an adapter, or a model with nothing but matrices to train.
    """
    if method.trains != "weights":
        raise ValueError(f"{method.title} trains an adapter; pre-training needs a method that trains weights")
    matrices = weight_targets(model, "all-linear", None, None).keys()
    others = [param for param in model.parameters() if param.requires_grad and param not in matrices]
    if not others:
        raise ValueError(
            "found no trainable parameter beside the matrices; expected embeddings, head and norms to be trainable"
        )
    with _frozen(others):
        main = method.build(model, args, options)
    with _frozen(matrices):
        if others_lr is None:
            rest = (method.others or build_adamw)(model, args, {})
        else:
            adam = adam_options(args) | {"lr": others_lr, "weight_decay": 0.0}
            rest = torch.optim.AdamW(others, fused=fused(model), **adam)
    return ChainedOptimizer(main, rest)


@contextmanager
def _frozen(params: Iterable[Tensor]) -> Iterator[None]:
    """Freeze parameters for the time of a ``with`` block, so that a builder does not find them (`trained`)."""
    params = list(params)
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)
