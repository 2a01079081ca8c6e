"""This module takes LoRA-Pre's Adam apart: each moment may be low-rank, exact or left out.

What the update rules leave fixed is an option here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre_peft.optim.adamw import update_bound
from lorapre_peft.optim.reference import als_factors, damped, newton_factors, restarted

from .matrix import MatrixOptimizer

MOMENTS = ("full", "als", "newton", "none")


class AblationAdam(MatrixOptimizer):
    """Implements Adam's step u = m̂/(√v̂ + ε) with a choice for each moment, for experiments.

    It is slow. Arithmetic and state are float64.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        first: kind of m̂. ``"full"`` is Adam's own, ``"als"`` and ``"newton"`` are the low-rank ones by the functions
            of `lorapre_peft.optim.reference`, and ``"none"`` is the gradient.
        second: kind of v̂, with the same names. With ``"none"`` u is m̂. Otherwise entries of u are clamped at the
            bound of ``als`` if either moment is ``"als"``.
        matched: whether u gets the Frobenius norm that exact Adam's step would have on the same gradients.
        betas, eps: decay rates (β1, β2) and ε of Adam.
        weight_decay: decoupled λ.
        momentum_rank, second_momentum_rank: ranks of a low-rank m and v.
        gammas: (γ1, γ2) of ``newton``. None stands for γ1 = 1 − β1^(1/2) and γ2 = 1 − β2^(1/4), as in Appendix B.1 of
            LoRA-Pre's paper (arXiv 2602.24283).
        damping: damping of the k×k inverses, which is absolute for ``newton`` and relative for ``als``.
        init_std: standard deviation of the normal distribution from which the factors A are drawn. None stands for
            each rule's own start, which is 0.02 for ``newton`` and fixed rows for ``als``.
        seed: seed of these draws.

    The steps t of the bias corrections are counted from the first gradient that is not zero.

    Raises:
        ValueError: a moment that is not in `MOMENTS`, or betas for which ``als`` has no bound.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        first: str = "als",
        second: str = "als",
        matched: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_rank: int = 8,
        second_momentum_rank: int = 1,
        gammas: tuple[float, float] | None = None,
        damping: float = 1e-6,
        init_std: float | None = None,
        seed: int = 0,
    ):
        for name, value in (("first", first), ("second", second)):
            if value not in MOMENTS:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(MOMENTS)}")
        if "als" in (first, second) and first != "none" and not betas[0] ** 2 < betas[1]:
            raise ValueError(f"betas={betas}: als needs betas[0]² < betas[1]; raise betas[1] or lower betas[0]")
        beta1, beta2 = betas
        self._draw = torch.Generator().manual_seed(seed)
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            first=first,
            second=second,
            matched=matched,
            betas=(beta1, beta2),
            eps=eps,
            ranks=(momentum_rank, second_momentum_rank),
            gammas=gammas or (1 - beta1 ** (1 / 2), 1 - beta2 ** (1 / 4)),
            damping=damping,
            init_std=init_std,
        )
        super().__init__(params, defaults)

    def update(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u [p, q] in the gradient's dtype, and move the moments on. u stays zero until a gradient is not."""
        g = gradient.double()
        if not state:
            if not g.any():
                return gradient
            self._start(state, g, group)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        t, eps = state["step"], group["eps"]
        if "m" in state:
            state["m"].lerp_(g, 1 - beta1)
        if "v" in state:
            state["v"].lerp_(g.square(), 1 - beta2)
        u = _first_moment(state, g, group)
        if group["second"] != "none":
            u = u / (_second_moment(state, g, group).sqrt() + eps)
            if "als" in (group["first"], group["second"]):
                bound = update_bound(0.0 if group["first"] == "none" else beta1, beta2)
                u = u.clamp(-bound, bound)
        if group["matched"]:
            exact = (state["m"] / (1 - beta1**t)) / ((state["v"] / (1 - beta2**t)).sqrt() + eps)
            u = u * (exact.norm() / u.norm().clamp_min(torch.finfo(u.dtype).tiny))  # A zero stays a zero.
        return u.to(gradient.dtype)

    def _start(self, state: dict[str, Any], g: Tensor, group: dict[str, Any]) -> None:
        """Make a matrix's state: ``m`` and ``v`` if exact moments are needed, and the factors of low-rank ones."""
        state["step"] = 0
        for name, kind, k in zip("mv", (group["first"], group["second"]), group["ranks"]):
            if kind == "full" or group["matched"]:
                state[name] = torch.zeros_like(g)
            if kind in ("als", "newton"):
                std = group["init_std"] if group["init_std"] is not None else 0.02 * (kind == "newton")
                state[f"{name}_B"] = g.new_zeros(g.shape[0], k)
                state[f"{name}_A"] = std * torch.randn(k, g.shape[1], generator=self._draw, dtype=g.dtype).to(g.device)
        if group["second"] == "als":
            state["energy"] = g.new_zeros(())


def _first_moment(state: dict[str, Any], g: Tensor, group: dict[str, Any]) -> Tensor:
    """Return m̂ [p, q] float64 after this gradient g, and move its factors on."""
    kind, beta, t, damping = group["first"], group["betas"][0], state["step"], group["damping"]
    if kind == "none":
        return g
    if kind == "full":
        return state["m"] / (1 - beta**t)
    B, A = state["m_B"], state["m_A"]
    if kind == "newton":
        m_hat = (beta * B @ A + (1 - beta) * g) / (1 - beta**t)
        gamma = group["gammas"][0]
        state["m_B"], state["m_A"] = newton_factors(B, A, g, gamma, gamma, damping)
        return m_hat
    B, A = restarted(B, A)
    inside = torch.linalg.solve(damped(A @ A.mT, damping), A @ g.mT).mT @ A
    state["m_B"], state["m_A"] = als_factors(B, A, g, beta, 1 - beta, damping)
    return (beta * B @ A + (1 - beta) * inside) / (1 - beta**t) + g - inside  # Here ρ is 1.


def _second_moment(state: dict[str, Any], g: Tensor, group: dict[str, Any]) -> Tensor:
    """Return v̂ [p, q] float64 after this gradient g, and move its factors on."""
    kind, beta, t, damping = group["second"], group["betas"][1], state["step"], group["damping"]
    if kind == "full":
        return state["v"] / (1 - beta**t)
    B, A = state["v_B"], state["v_A"]
    if kind == "newton":
        v = beta * (B @ A).square() + (1 - beta) * g.square()
        gamma = group["gammas"][1]
        state["v_B"], state["v_A"] = newton_factors(B, A, g.abs(), gamma, gamma, damping)
        return v / (1 - beta**t)
    B, A = restarted(B, A)
    v, held = (1 - beta) * g.square(), (B @ A).square()
    if held.any():
        v += beta * state["energy"] / held.sum() * held
    state["v_B"], state["v_A"] = als_factors(B, A, g.abs(), beta**0.5, 1 - beta**0.5, damping)
    state["energy"].lerp_(g.square().sum(), 1 - beta)
    return v / (1 - beta**t)
