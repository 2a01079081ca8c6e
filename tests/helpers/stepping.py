"""What the tests of the optimizers share: parameters, gradient streams and the oracle of an optimizer."""

import copy
import warnings

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon

both_optimizers = pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon], ids=["adamw", "muon"])


both_rules = pytest.mark.parametrize("rule", ["als", "newton"])


LR = 0.01


def weights(*shape, seed=0, dtype=torch.float32):
    return nn.Parameter(torch.as_tensor(np.random.default_rng(seed).normal(size=shape), dtype=dtype))


def stream(shape, steps, **options):
    """Gradients in float32, so that the oracle sees the very numbers that the optimizer does."""
    return [torch.from_numpy(g) for g in oracle.gradients(shape, steps, dtype=np.float32, **options)]


def take_steps(optimizer, params, *streams):
    for grads in zip(*streams):
        for param, grad in zip(params, grads):
            param.grad = None if grad is None else grad.to(param)
        optimizer.step()


def newton_starts(optimizer):
    """The random factors of each parameter: a skipped update makes the state and leaves it as it starts."""
    twin = copy.deepcopy(optimizer)
    params = [param for group in twin.param_groups for param in group["params"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take_steps(twin, params, *([torch.full_like(param, float("nan"))] for param in params))
    return [tuple(twin.state[param][f"{moment}_A"].cpu().numpy() for moment in twin.moments) for param in params]


def truth_of(optimizer, k, rule, position=0, **options):
    """The oracle of one of an optimizer's parameters."""
    starts = newton_starts(optimizer)[position] if rule == "newton" else (None, None)
    if isinstance(optimizer, LoRAPreAdamW):
        return oracle.Adam(rule, k, starts=starts, **options)
    return oracle.Muon(rule, k, start=starts[0], **options)


def products(state):
    """B A of each moment of a parameter's state: the signs of its factors' columns are free."""
    return [state[f"{moment}_B"] @ state[f"{moment}_A"] for moment in ("m", "v") if f"{moment}_B" in state]


def flat(grads):
    return [g.reshape(len(g), -1).numpy() for g in grads]
