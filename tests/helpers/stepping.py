"""This module holds what the tests of the optimizers share: parameters, streams of gradients, and an oracle."""

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
    """Return a parameter of this shape, drawn from N(0, 1)."""
    return nn.Parameter(torch.as_tensor(np.random.default_rng(seed).normal(size=shape), dtype=dtype))


def stream(shape, steps, **options):
    """Return the gradients of all steps (`oracle.gradients`).

    They are float32, so that the oracle sees the same numbers as the optimizer.
    """
    return [torch.from_numpy(g) for g in oracle.gradients(shape, steps, dtype=np.float32, **options)]


def take_steps(optimizer, params, *streams):
    """Take steps with the gradients of each parameter's stream, or without a gradient where the stream has None."""
    for grads in zip(*streams):
        for param, grad in zip(params, grads):
            param.grad = None if grad is None else grad.to(param)
        optimizer.step()


def newton_starts(optimizer):
    """Return the random factors A with which each parameter starts, as numpy arrays, one tuple for each parameter.

    A twin of the optimizer skips a step with NaN in its gradients, which makes the state and leaves it at its start.
    """
    twin = copy.deepcopy(optimizer)
    params = [param for group in twin.param_groups for param in group["params"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take_steps(twin, params, *([torch.full_like(param, float("nan"))] for param in params))
    return [tuple(twin.state[param][f"{moment}_A"].cpu().numpy() for moment in twin.moments) for param in params]


def truth_of(optimizer, k, rule, position=0, **options):
    """Return the oracle of the parameter at ``position`` in an optimizer. ``options`` are those of the oracle."""
    starts = newton_starts(optimizer)[position] if rule == "newton" else (None, None)
    if isinstance(optimizer, LoRAPreAdamW):
        return oracle.Adam(rule, k, starts=starts, **options)
    return oracle.Muon(rule, k, start=starts[0], **options)


def products(state):
    """Return B A of each moment of a parameter's state, as the signs of the factors' columns are not unique."""
    return [state[f"{moment}_B"] @ state[f"{moment}_A"] for moment in ("m", "v") if f"{moment}_B" in state]


def flat(grads):
    """Return gradients as numpy matrices, with all dimensions but the first flattened."""
    return [g.reshape(len(g), -1).numpy() for g in grads]
