# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
This module contains the implementation of the LoRA-Pre optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from ..peft_model import PeftModel
from ..tuners.lora.layer import LoraLayer


State = dict[str, Any]


def test_rows(k: int, q: int, device: torch.device) -> Tensor:
    """Return the rows that momentum factors start from: [k, q] in [0, 1), the same on every device and process."""
    return torch.rand(k, q, generator=torch.Generator().manual_seed(0)).to(device)


def no_momentum(theta: Tensor, **ranks: int) -> State:
    """Return the state of ``als`` before the first gradient: zeros, for moments of these ranks (such as m=8, v=1)."""
    factors: State = {}
    for moment, k in ranks.items():
        factors |= {
            f"{moment}_B": theta.new_zeros(theta.shape[0], k),
            f"{moment}_A": theta.new_zeros(k, theta.shape[1]),
        }
    return {**factors, "E": 0.0, "t": 0}


def restarted(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Restart each direction whose row of A is zero, from a fixed row of A and a column of zeros in B.

    So the tracked rule of the package lorapre-peft starts from a state of zeros and recovers from a reset or pruning.
    The fixed row is as long as the others are on average, or has length 1 if there are none.
    """
    k, q = A.shape
    dead = A.norm(dim=1) == 0
    level = 1.0 if dead.all() else (A[~dead] ** 2).sum() / (~dead).sum()
    B, A = B.clone(), A.clone()
    A[dead] = (3 / q * level) ** 0.5 * test_rows(k, q, A.device).to(A.dtype)[dead]
    B[:, dead] = 0
    return B, A


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return gram + δ'I, where δ' is ``damping`` times the mean of gram's diagonal."""
    return gram + damping * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)


def als_factors(B: Tensor, A: Tensor, x: Tensor, decay: float, weight: float, damping: float) -> tuple[Tensor, Tensor]:
    """Return both factors after one sweep of alternating least squares on the target decay · B A + weight · x.

    This is the sweep of the tracked rule of the package lorapre-peft. It makes the new columns of B orthonormal,
    as in a QR decomposition. Afterwards it scales both factors to equal Frobenius norms.
    """
    X = x @ A.T @ torch.linalg.inv(damped(A @ A.T, damping))
    B_new = decay * B + weight * X
    L = torch.linalg.cholesky(damped(B_new.T @ B_new, damping))
    Q = B_new @ torch.linalg.inv(L).T
    B_new, A_new = Q, decay * Q.T @ B @ A + weight * Q.T @ x
    balance = (A_new.norm() / B_new.norm()).sqrt()
    return B_new * balance, A_new / balance


def update_bound(beta1: float, beta2: float) -> float:
    """Return C = (1−β1)/√((1−β2)(1−β1²/β2)), which is 1.165 at (0.9, 0.95).

    Exact Adam has |m|/√v ≤ C by the Cauchy–Schwarz inequality, if β1² < β2.
    """
    return (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5


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
    """Take one step of AdamW with the tracked rule of the package lorapre-peft.

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


class LoraPreOptimizer(Optimizer):
    """
    Implements LoRA-Pre: AdamW whose two moments of each matrix are kept as low-rank factors, so that the optimizer
    state of a p×q matrix is (p + q)(k + v) numbers instead of 2pq.

    All state is float32 and all arithmetic of a step is float64 (float32 on MPS): the matrices of adapters are small.
    Use `create_lorapre_optimizer` to build it from a model.

    Args:
        params (Iterable[nn.parameter.Parameter]): Parameters to optimize.
        lr (float, optional): Learning rate (default: 1e-3).
        betas (Tuple[float, float], optional): Decays of both moments; betas[0]² must be below betas[1] (default: (0.9,
            0.95), the paper's).
        eps (float, optional): Term added to the denominator (default: 1e-8).
        weight_decay (float, optional): Decoupled weight decay (default: 0.0).
        momentum_rank (int, optional): Rank k of the first moment of every matrix; 0 trains with plain AdamW.
        second_momentum_rank (int, optional): Rank v of the second moment, at most `momentum_rank` (default: 1).

    Reference:
        - LoRA-Pre: https://huggingface.co/papers/2602.24283
        - The rule by which the factors follow the gradients is that of the package lorapre-peft.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_rank: int = 0,
        second_momentum_rank: int = 1,
    ):
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        if not (0.0 <= betas[0] < 1.0 and betas[0] ** 2 < betas[1] < 1.0):
            raise ValueError(f"Invalid betas: {betas} - should be in [0.0, 1.0) with betas[0]**2 < betas[1]")
        if eps < 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        if momentum_rank < 0 or second_momentum_rank < 1:
            raise ValueError(
                f"Invalid ranks: momentum_rank={momentum_rank} - should be >= 0, "
                f"second_momentum_rank={second_momentum_rank} - should be >= 1"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_rank": momentum_rank,
            "second_momentum_rank": second_momentum_rank,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """
        Performs a single optimization step.

        Arguments:
            closure (`Callable`, *optional*): A closure that reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if group["momentum_rank"]:
                    self._lorapre_step(param, group)
                else:
                    self._adamw_step(param, group)
        return loss

    def _lorapre_step(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            k = group["momentum_rank"]
            state.update(no_momentum(param.float(), m=k, v=min(k, group["second_momentum_rank"])))
        wide = torch.float32 if param.device.type == "mps" else torch.float64
        before = {name: value.to(wide) if isinstance(value, Tensor) else value for name, value in state.items()}
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        theta, after = als_adam(param.to(wide), param.grad.to(wide), before, **options)
        param.copy_(theta)
        state.update({name: value.float() if isinstance(value, Tensor) else value for name, value in after.items()})

    def _adamw_step(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        adamw(
            [param],
            [param.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def create_lorapre_optimizer(
    model: PeftModel,
    *,
    lr: float,
    momentum_rank: int | None = None,
    weight_decay: float = 0.0,
    **kwargs,
) -> Optimizer:
    """
    Creates a LoRA-Pre optimizer for a LoRA-adapted model.

    The momenta of every `lora_A`, `lora_B` and `lora_embedding_B` are kept as low-rank factors; everything else that
    is trainable (`modules_to_save`, DoRA magnitudes, biases, `lora_embedding_A`) and adapters of rank 1 are trained
    with AdamW.

    Args:
        model (`torch.nn.Module`): The PEFT model containing LoRA-adapted parameters.
        lr (`float`): Learning rate.
        momentum_rank (`int`, *optional*): Rank of the momenta, below the rank r of every adapter; by default a
            quarter of each adapter's rank.
        weight_decay (`float`): Decoupled weight decay; biases and layer norms have none.
        kwargs (`dict`): Additional keyword arguments of `LoraPreOptimizer`.

    Returns:
        `torch.optim.Optimizer`: The optimizer over all trainable parameters.
    """
    ranks: dict[Tensor, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, r in module.r.items():
            k = max(1, r // 4) if momentum_rank is None else momentum_rank
            if k >= r > 1:
                raise ValueError(
                    f"momentum_rank={k} is not below the rank {r} of {name}: nothing would be compressed."
                )
            held = [module.lora_A, module.lora_B, module.lora_embedding_B]
            for matrix in (container[adapter] for container in held if adapter in container):
                params = matrix.parameters() if isinstance(matrix, torch.nn.Module) else [matrix]
                ranks.update({param: k for param in params if param.ndim == 2 and r > 1})
    if not ranks:
        raise ValueError("create_lorapre_optimizer did not find a LoRA adapter of rank 2 or more on the model.")

    decayed = set(get_parameter_names(model, ALL_LAYERNORM_LAYERS))
    groups: dict[tuple[int, float], list[Tensor]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            decay = weight_decay if name in decayed and "bias" not in name else 0.0
            groups.setdefault((ranks.get(param, 0), decay), []).append(param)
    param_groups = [
        {"params": params, "momentum_rank": k, "weight_decay": decay} for (k, decay), params in groups.items()
    ]
    return LoraPreOptimizer(param_groups, lr=lr, **kwargs)
