"""This module derives the tests' tolerances: how far apart two right computations of the same steps may be.

A sum of n products, added in any order, is off by at most γ(n) = n·u / (1 − n·u) of the sum of their sizes, where u is
half the distance from 1 to the next number (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The
BLAS, the compiler and the CPU choose the order. How far such errors grow depends on the condition of the problem,
which is measured. The same steps are taken again, with everything that a step reads changed in its last places.
Gradients and factors change by ±γ(n). Weights change by ±4u, because they are rounded twice a step. The inverses of
Gram matrices, which are made in float64, change by ±γ(2k). `oracle_room` does so with the float64 oracle, and
`assert_same_steps` with the optimizer that is compared with.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from unittest import mock

import numpy as np
import torch

from lorapre_peft.lowrank.linalg import damped_inverse

TRIES = 3  # This is the number of disturbed runs, of which the largest distance counts.


def gamma(length: int, dtype: torch.dtype = torch.float32) -> float:
    """Return γ(length), the relative error of so many operations in ``dtype``, one after the other."""
    unit = torch.finfo(dtype).eps / 2
    return length * unit / (1 - length * unit)


def chain(shape, k: int) -> int:
    """Return how many operations one number of a step of a p×q matrix goes through, at rank k.

    These are the sums of x Aᵀ (q operations), times the inverse (k), times A (k), and those of Bᵀx (p) and W [A; Bᵀx]
    (2k). Muon's iterations add three products of up to max(p, q), as the errors of the first iteration count most.
    Some twenty operations by entry are added too.
    """
    p, q = (shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else (0, 0)
    return p + q + 4 * k + 3 * max(p, q) + 20


def disturbed(values: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    """Return values whose entries are larger or smaller by the share ``size`` of themselves, at random."""
    return values * (1 + size * rng.choice((-1.0, 1.0), np.shape(values)))


def oracle_room(
    truth, theta, grads, lr, weight_decay=0.0, *, dtype=torch.float32, before=lambda truth, t: None
) -> tuple[np.ndarray, float]:
    """Return how far arithmetic of ``dtype`` may be from the oracle: in θ after each step, and in m's B A at the end.

    Args:
        truth: oracle (`oracle.Adam` or `oracle.Muon`) that has not stepped. It is not changed.
        theta, grads: matrix [p, q] at the start, and the gradients [p, q] of all steps, in float64 or float32.
        lr, weight_decay: learning rate and decoupled λ.
        before: function called with an oracle and t before its step t, counted from 0.

    Returns:
        The largest differences of an entry of θ up to each step, [steps], and of an entry of B A at the end.
    """
    room, product, length = np.zeros(len(grads)), 0.0, chain(theta.shape, truth.m.k)
    size, written = gamma(length, dtype), gamma(4, dtype)
    for seed in range(TRIES):
        rng, exact, rough = np.random.default_rng(seed), copy.deepcopy(truth), copy.deepcopy(truth)
        theta_exact, theta_rough = theta, theta

        def rough_solve(gram, ridge, target, rng=rng):
            damped = disturbed(gram, gamma(length, torch.float64), rng) + ridge * np.eye(len(gram))
            return disturbed(np.linalg.inv(damped), gamma(2 * len(gram), dtype), rng) @ target

        for t, g in enumerate(grads):
            before(exact, t)
            before(rough, t)
            theta_exact = theta_exact - lr * (exact.step(g) + weight_decay * theta_exact)
            with mock.patch("oracle.solve", rough_solve):
                theta_rough = theta_rough - lr * (rough.step(disturbed(g, size, rng)) + weight_decay * theta_rough)
            theta_rough = disturbed(theta_rough, written, rng)
            for factors in filter(lambda f: f.b is not None, (rough.m, getattr(rough, "v", rough.m))):
                factors.b, factors.a = (disturbed(x, size, rng) for x in (factors.b, factors.a))
            room[t] = max(room[t], np.abs(theta_rough - theta_exact).max())
        product = max(product, np.abs(rough.m.product - exact.m.product).max())
    return np.maximum.accumulate(room), product


def change(values: torch.Tensor, size: float, rng: np.random.Generator) -> torch.Tensor:
    """Return a tensor `disturbed` by ``size``, in its own dtype."""
    return values * torch.from_numpy(disturbed(np.ones(values.shape), size, rng)).to(values)


def undisturbed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the same optimizer, as it is."""
    return optimizer


def disturb(optimizer: torch.optim.Optimizer, rng: np.random.Generator) -> torch.optim.Optimizer:
    """Return the same optimizer, which now disturbs gradients, factors and weights before each of its steps.

    Weights and gradients of half precision stay as they are, since changes so small are rounded away. A weight is
    rounded from the float32 update, and falls the other way if the factors' changes have moved that.
    """

    def before_step(optimizer, args, kwargs):
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            if param.grad is None:
                continue
            factors = [value for name, value in optimizer.state.get(param, {}).items() if name[2:] in ("A", "B")]
            size = gamma(chain(param.shape, min(factors[0].shape) if factors else 0))
            param.grad = change(param.grad, size, rng)
            for value in factors:
                value.copy_(change(value, size, rng))
            if param.dtype in (torch.float32, torch.float64):
                param.data.copy_(change(param.data, gamma(4), rng))

    optimizer.register_step_pre_hook(before_step)
    return optimizer


def rough_run(run: Callable[[Callable], Iterable[torch.Tensor]], seed: int) -> list[torch.Tensor]:
    """Return copies of what ``run`` returns if its optimizers and the inverses in their steps are disturbed."""
    rng = np.random.default_rng(seed)

    def rough_inverse(gram, ridge):
        return change(damped_inverse(gram, ridge), gamma(2 * gram.shape[-1]), rng)

    with mock.patch("lorapre_peft.lowrank.rules.damped_inverse", rough_inverse):
        return [value.detach().clone() for value in run(partial(disturb, rng=rng))]


def assert_same_steps(
    found: Iterable[torch.Tensor], run: Callable[[Callable], Iterable[torch.Tensor]], rtol: float = 0.0
) -> None:
    """Assert that ``found``, the tensors of another run, equal those of ``run`` apart from the order of sums.

    Each of the two may be as far from exact arithmetic as the disturbed runs are from the undisturbed one.

    Args:
        found: tensors of the other run.
        run: function run(prepare) that trains with ``prepare(optimizer)`` in place of each optimizer that it makes,
            and returns the tensors that are compared.
        rtol: relative difference that is allowed even if the trained weights are the same. Losses that are computed in
            another way have one.
    """
    found, expected = ([value.detach().clone() for value in values] for values in (found, run(undisturbed)))
    assert len(found) == len(expected)
    for a, b, *rough in zip(found, expected, *(rough_run(run, seed) for seed in range(TRIES))):
        room = max((one - b).abs().max().item() for one in rough)
        # Each result is rounded to its own dtype at the end, which the disturbed runs may miss.
        rounding = torch.finfo(b.dtype).eps if b.is_floating_point() else 0
        torch.testing.assert_close(a, b, rtol=max(rtol, rounding), atol=2 * room)


def model_room(model: torch.nn.Module, forward: Callable[[torch.nn.Module], torch.Tensor]) -> float:
    """Return how far an entry of what ``forward`` computes from a model may be from its exact value.

    It is measured with a copy of the model. Its weights are disturbed by γ of the sums that they take part in, which
    are those of a row and of a low-rank product.
    """
    rng, rough = np.random.default_rng(0), copy.deepcopy(model)
    for param in rough.parameters():
        param.data = change(param.data, gamma(chain(param.shape, 0)), rng)
    with torch.no_grad():
        return (forward(rough) - forward(model)).abs().max().item()


def extraction_room(change: torch.Tensor, weight: torch.Tensor) -> float:
    """Return how far an entry of a weight plus its change may be off, if the change comes from its singular vectors.

    A computed SVD is that of a matrix which is γ(p + q) of the largest singular value away. The sum is rounded, and so
    was the difference from which the change was taken.
    """
    largest = torch.linalg.matrix_norm(change.double(), 2).item() if change.ndim == 2 else 0.0
    return gamma(2) * weight.abs().max().item() + gamma(sum(change.shape)) * largest


def error_room(change: torch.Tensor, weight: torch.Tensor) -> float:
    """Return how far ‖merged − tuned‖ / ‖change‖ may be off.

    Entries of the change and of the sum are rounded by as much as those of the weights.
    """
    return gamma(4) * (weight.float().abs().max() / change.float().square().mean().sqrt()).item()
