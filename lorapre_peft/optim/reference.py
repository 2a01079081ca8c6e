"""This module states both update rules for one p×q matrix, line by line in the paper's notation. It is slow. The tests
hold it against an independent oracle (``tests/helpers/oracle.py``), as they hold every faster path.

Every function takes and returns plain tensors of one dtype (float64 for a test) and changes nothing in place. θ is the
parameter, g its gradient, t the step from 1, and λ the decoupled weight decay. A state is a dict of m_B [p, k] and m_A
[k, q]. Adam's also holds v_B and v_A, at a rank of their own. With ``als`` a state also holds two numbers: the count t
of steps and, for Adam, the energy E, the running average of ‖g‖².
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lowrank.rules import test_rows
from .adamw import update_bound
from .muon import orthogonalize

State = dict[str, Any]


def newton_factors(B: Tensor, A: Tensor, x: Tensor, gamma: float, gain: float, delta: float) -> tuple[Tensor, Tensor]:
    """Return both factors after one damped Newton step on each from the old ones (Theorem 3.1). gain: γ for an EMA."""
    eye = torch.eye(B.shape[1], dtype=B.dtype, device=B.device)
    B_new = (1 - gamma) * B + gain * x @ A.T @ torch.linalg.inv(A @ A.T + delta * eye)
    A_new = (1 - gamma) * A + gain * torch.linalg.inv(B.T @ B + delta * eye) @ B.T @ x
    return B_new, A_new


def als_factors(B: Tensor, A: Tensor, x: Tensor, decay: float, weight: float, damping: float) -> tuple[Tensor, Tensor]:
    """Return both factors after one sweep of alternating least squares on the target decay · B A + weight · x.

    This is the sweep of the tracked rule (this project). It makes the new columns of B orthonormal,
    as in a QR decomposition. Afterwards it scales both factors to equal Frobenius norms.
    """
    X = x @ A.T @ torch.linalg.inv(damped(A @ A.T, damping))
    B_new = decay * B + weight * X
    L = torch.linalg.cholesky(damped(B_new.T @ B_new, damping))
    Q = B_new @ torch.linalg.inv(L).T
    B_new, A_new = Q, decay * Q.T @ B @ A + weight * Q.T @ x
    balance = (A_new.norm() / B_new.norm()).sqrt()
    return B_new * balance, A_new / balance


def restarted(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Restart each direction whose row of A is zero, from a fixed row of A and a column of zeros in B.

    So the tracked rule (this project) starts from a state of zeros and recovers from a reset or pruning.
    The fixed row is as long as the others are on average, or has length 1 if there are none.
    """
    k, q = A.shape
    dead = A.norm(dim=1) == 0
    level = 1.0 if dead.all() else (A[~dead] ** 2).sum() / (~dead).sum()
    B, A = B.clone(), A.clone()
    A[dead] = (3 / q * level) ** 0.5 * test_rows(k, q, A.device).to(A.dtype)[dead]
    B[:, dead] = 0
    return B, A


def no_momentum(theta: Tensor, **ranks: int) -> State:
    """Return the state of ``als`` before the first gradient: zeros, for moments of these ranks (such as m=8, v=1)."""
    factors: State = {}
    for moment, k in ranks.items():
        factors |= {
            f"{moment}_B": theta.new_zeros(theta.shape[0], k),
            f"{moment}_A": theta.new_zeros(k, theta.shape[1]),
        }
    return {**factors, "E": 0.0, "t": 0}


def newton_adam(
    theta: Tensor,
    g: Tensor,
    state: State,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 1e-6,
) -> tuple[Tensor, State]:
    """Take one step of Algorithm 1 with the coupling of Appendix B.1.

    The state starts at m_B = v_B = 0, with m_A and v_A drawn from N(0, 0.02²).
    """
    beta1, beta2 = betas
    m_B, m_A, v_B, v_A = (state[name] for name in ("m_B", "m_A", "v_B", "v_A"))
    gamma1, gamma2 = 1 - beta1 ** (1 / 2), 1 - beta2 ** (1 / 4)
    m = beta1 * m_B @ m_A + (1 - beta1) * g
    v = beta2 * (v_B @ v_A) ** 2 + (1 - beta2) * g**2
    m_B, m_A = newton_factors(m_B, m_A, g, gamma1, gamma1, delta)
    v_B, v_A = newton_factors(v_B, v_A, g.abs(), gamma2, gamma2, delta)
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    theta = theta - lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * theta)
    return theta, {"m_B": m_B, "m_A": m_A, "v_B": v_B, "v_A": v_A}


def als_adam(
    theta: Tensor,
    g: Tensor,
    state: State,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    residual_weight: float = 1.0,
    damping: float = 1e-6,
) -> tuple[Tensor, State]:
    """Take one step of AdamW with the tracked rule (this project).

    state: before the first step, that of `no_momentum`. Its t counts steps from the first gradient that is not zero,
    and so it does again once E has been reset to 0.
    """
    beta1, beta2 = betas
    E, t = state["E"], state["t"] + 1 if state["E"] > 0 else int(g.any())
    if t == 0:
        return (1 - lr * weight_decay) * theta, state
    m_B, m_A = restarted(state["m_B"], state["m_A"])
    v_B, v_A = restarted(state["v_B"], state["v_A"])
    r = min(1, residual_weight / (1 - beta1**t))
    X = g @ m_A.T @ torch.linalg.inv(damped(m_A @ m_A.T, damping))
    m_hat = (beta1 * m_B + (1 - beta1) * X) @ m_A / (1 - beta1**t) + r * (g - X @ m_A)
    v = (1 - beta2) * g**2
    if (v_B @ v_A).any():  # Otherwise v starts here, or another tool has zeroed it.
        c = E / (v_B @ v_A).norm() ** 2
        v = beta2 * c * (v_B @ v_A) ** 2 + v
    m_B, m_A = als_factors(m_B, m_A, g, beta1, 1 - beta1, damping)
    v_B, v_A = als_factors(v_B, v_A, g.abs(), beta2**0.5, 1 - beta2**0.5, damping)
    E = beta2 * E + (1 - beta2) * g.norm() ** 2
    v_hat = v / (1 - beta2**t)
    C = update_bound(beta1, beta2)
    update = (m_hat / (v_hat.sqrt() + eps)).clamp(-C, C)
    theta = theta - lr * (update + weight_decay * theta)
    return theta, {"m_B": m_B, "m_A": m_A, "v_B": v_B, "v_A": v_A, "E": E, "t": t}


def newton_muon(
    theta: Tensor,
    g: Tensor,
    state: State,
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    delta: float = 1e-6,
) -> tuple[Tensor, State]:
    """Take one step of Algorithm 2.

    The heavy-ball sum μ m + g is the EMA divided by 1−μ, hence the gain (1−√μ)/(1−μ).
    """
    mu, m_B, m_A = momentum, state["m_B"], state["m_A"]
    m = mu * m_B @ m_A + g
    m_B, m_A = newton_factors(m_B, m_A, g, 1 - mu**0.5, (1 - mu**0.5) / (1 - mu), delta)
    theta = theta - lr * (orthogonalize(m) + weight_decay * theta)
    return theta, {"m_B": m_B, "m_A": m_A}


def als_muon(
    theta: Tensor,
    g: Tensor,
    state: State,
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    residual_weight: float = 1.0,
    damping: float = 1e-6,
) -> tuple[Tensor, State]:
    """Take one step of Algorithm 2 with the tracked rule (this project).

    It makes the same sweep as Adam, on the target μ M + g, and treats the residual in the same way. The count t of
    ``state`` begins at the first gradient that is not zero, and again once m_A has been reset to 0.
    """
    mu = momentum
    t = state["t"] + 1 if state["m_A"].any() else int(g.any())
    if t == 0:
        return (1 - lr * weight_decay) * theta, state
    m_B, m_A = restarted(state["m_B"], state["m_A"])
    # The heavy-ball sum is the EMA divided by 1−μ.
    r = min(1, residual_weight / (1 - mu**t)) * (1 - mu**t) / (1 - mu)
    X = g @ m_A.T @ torch.linalg.inv(damped(m_A @ m_A.T, damping))
    m = (mu * m_B + X) @ m_A + r * (g - X @ m_A)
    m_B, m_A = als_factors(m_B, m_A, g, mu, 1.0, damping)
    theta = theta - lr * (orthogonalize(m) + weight_decay * theta)
    return theta, {"m_B": m_B, "m_A": m_A, "t": t}


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return gram + δ'I, where δ' is ``damping`` times the mean of gram's diagonal."""
    return gram + damping * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
