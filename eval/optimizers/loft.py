"""This module implements LoFT, a LoRA optimizer whose moments follow the other factor as it moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .pairs import PairOptimizer, damped_gram


class LoFTAdamW(PairOptimizer):
    """Implements LoFT (Tastan, Laskaridis, Takáč, Nandakumar and Horváth, arXiv 2505.21289).

    It trains LoRA's factors so that their product follows the AdamW of full fine-tuning. A step of B [p, r] reads the
    other factor A [r, q] and C = (A Aᵀ + δ I)^(-1). A step of A is the same with everything transposed.
        g̃ = g_B C                                   the gradient of the product, in coordinates of A's rows
        R = A_old Aᵀ C,  m ← m R,  P_i ← Rᵀ P_i R    the moments in the coordinates of the new A
        m ← β1 m + (1−β1) g̃,  P_i ← β2 P_i + (1−β2) g̃_i g̃_iᵀ       P_i is r×r for each row i of B
        u = m̂ A / (√v̂ + ε),  v_ij = A_jᵀ P_i A_j     Adam's update of the product
        B ← B − lr u Aᵀ C
    The moments of both factors move at each step. The factors themselves are updated in turns, B first. The state is
    (p + q) r (r + 2) numbers.

    The authors' code recalibrates the second moment with R and Rᵀ exchanged. The form here is the one that follows
    from m ← m R.

    Args:
        params: A and B of each layer in turns, as `lora_pairs` returns them.
        lr: learning rate.
        betas, eps: decay rates (β1, β2) and ε of Adam.
        weight_decay: decoupled λ of the factor that is updated.
        damping: δ, which is 1e-6 in the authors' code.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, damping=damping))

    def step_pair(self, A: Tensor, B: Tensor, group: dict[str, Any]) -> None:
        """Move the moments of both factors on, and update B at odd steps or A at even ones, in place."""
        step_B = self._direction(self.state[B], B.grad, A, group)
        step_A = self._direction(self.state[A], A.grad.T, B.T, group).T
        factor, step = (B, step_B) if self.state[B]["step"] % 2 else (A, step_A)
        factor.mul_(1 - group["lr"] * group["weight_decay"])
        factor.add_(step, alpha=-group["lr"])

    def _direction(self, state: dict[str, Any], gradient: Tensor, other: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the step [n, r] of the factor X of a product X Y, whose gradient is given. other: Y [r, d]."""
        beta1, beta2 = group["betas"]
        gram = damped_gram(other, group["damping"])
        g = torch.linalg.solve(gram, gradient.T).T
        if not state:
            state["step"] = 0
            state["m"], state["P"] = torch.zeros_like(g), g.new_zeros(*g.shape, g.shape[1])
        else:
            R = torch.linalg.solve(gram, other @ state["other"].T).T
            state["m"], state["P"] = state["m"] @ R, R.T @ state["P"] @ R
        state["step"] += 1
        state["other"] = other.clone(memory_format=torch.contiguous_format)
        state["m"].lerp_(g, 1 - beta1)
        state["P"].lerp_(g[:, :, None] * g[:, None, :], 1 - beta2)
        v = ((state["P"] @ other) * other).sum(1).clamp_min(0)
        denominator = (v / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        update = state["m"] @ other / (1 - beta1 ** state["step"]) / denominator
        return torch.linalg.solve(gram, other @ update.T).T
