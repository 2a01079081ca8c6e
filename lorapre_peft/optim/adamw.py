"""AdamW with both moments held as low-rank factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..kernels.cpp import Cpp, Table, Tables
from ..kernels.eager import adam_scalars, adam_table
from ..lowrank.batch import Wave, usable
from ..lowrank.float64 import wide
from ..lowrank.layout import Located
from ..lowrank.moments import Moments
from ..lowrank.rounding import mix
from ..lowrank.rules import RULES, Average
from .adamw_path import AdamWOptions
from .base import LoRAPreOptimizer
from .options import check_betas, in_range
from .state import check_held_states


def update_bound(beta1: float, beta2: float) -> float:
    """C = (1−β1)/√((1−β2)(1−β1²/β2)): |m|/√v ≤ C for exact Adam by Cauchy–Schwarz, if β1² < β2. 1.165 at (0.9, 0.95)."""
    return (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5


class LoRAPreAdamW(LoRAPreOptimizer):
    """AdamW whose moments of each p×q matrix are factors of rank k: 2(p+q)k numbers of state instead of 2pq.

    LoRA-Pre for Adam (Wang et al., "Taming Momentum", arXiv 2602.24283, Theorem 3.1 and Algorithm 1) with
    ``update_rule="newton"``; with ``"als"``, the default, this project's tracked rule on the same state. Parameters that
    are no matrices, or too small to compress, take `torch.optim.AdamW`'s step exactly.

    Args:
        params: parameters, named parameters or groups, as in `torch.optim`. Floating-point, of any dtype; tensors of more
            than two dimensions are flattened to (first, rest). State is float32 whatever their dtype. Bare parameters are compressed
            whatever they are for: embeddings belong into a group with momentum_rank=0.
        lr: learning rate, ≥ 0; a number or a one-element tensor.
        betas: decays (β1, β2) in [0, 1); the paper's (0.9, 0.95). ``als`` needs β1² < β2. β2 = 0.999 makes the start-up
            bias of ``newton`` far worse.
        eps: ε ≥ 0 in m̂/(√v̂ + ε).
        weight_decay: decoupled λ ≥ 0, as in `torch.optim.AdamW` but 0 by default.
        momentum_rank: k ≥ 1. None: a quarter of the smaller side of each matrix, at least 1. 0: the AdamW path for all.
        update_rule: ``"als"`` or ``"newton"``.
        residual_weight: ρ in [0, 1] of ``als``: the part of the gradient outside the momentum's subspace has the weight min(1, ρ/(1−β1ᵗ))
            in m̂. None: 1, the sum of the weights that Adam gives one gradient over the steps; that part is then moved by in one step,
            which the clamp shortens where gradients are noise. 1−β1 gives m = β1 m_B m_A + (1−β1) g.
        common: update_scale, max_param_grad_norm, bf16_rounding, update_in_backward, temporary_bytes, maximize, seed and
            backend, as `LoRAPreOptimizer` documents them.

    State per compressed matrix, all float32: ``step`` [], ``m_B`` and ``v_B`` [p, k], ``m_A`` and ``v_A`` [k, q], and with
    ``als`` ``v_energy`` E and ``v_scale`` c = E/‖v_B v_A‖², both []. On the AdamW path: ``step``, ``exp_avg``, ``exp_avg_sq``,
    float64 for float64 parameters.

    Raises:
        ValueError: an option out of its range.
        NotImplementedError: a parameter that an engine has flattened, or sharded otherwise than by rows (tensor parallelism).
    """

    moments = ("m", "v")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum_rank: int | None = None,
        update_rule: str = "als",
        residual_weight: float | None = None,
        **common: Any,
    ):
        ranks = dict(momentum_rank=momentum_rank, update_rule=update_rule, residual_weight=residual_weight)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **ranks, **common)

    def _reset(self, backend: str) -> None:
        super()._reset(backend)
        self._tables: dict[int, Tables] = {}  # by the position of a step's first parameter

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        in_range("eps", group["eps"], 0)
        self._check_betas(group)

    def _check_betas(self, group: dict[str, Any]) -> None:
        check_betas("betas", group["betas"])
        beta1, beta2 = group["betas"]
        if group["update_rule"] == "als" and not beta1**2 < beta2:
            raise ValueError(
                f"betas={beta1, beta2}: update_rule='als' needs betas[0]² < betas[1], found {beta1**2:g} and {beta2:g}; "
                "without it Adam's own update has no bound. Raise betas[1] or lower betas[0]; the paper has (0.9, 0.95)"
            )

    def _adamw_options(self, group: dict[str, Any]) -> AdamWOptions:
        return AdamWOptions(group["lr"], group["betas"], group["eps"])

    def _update(self, wave: Wave) -> Iterator[None]:
        beta1, beta2 = wave.group["betas"]
        self._check_betas(wave.group)  # a scheduler that cycles momentum may have moved them
        backend = self._backend(wave.device)
        averages = [Average(beta1, 1 - beta1), Average(beta2**0.5, 1 - beta2**0.5)]
        moments = Moments(backend, wave, averages)
        t = wide(wave.advance(wave.read("v_energy") > 0 if wave.rule.tracked else None))
        energy = wide(wave.read("v_scale")) if wave.rule.tracked else torch.ones_like(t)
        scalars = backend.run(adam_scalars, moments.mixture(t), t, energy, beta1, beta2, _positive(wave.group["eps"]))
        bound = update_bound(beta1, beta2) if wave.rule.tracked else None
        metrics = self._metrics if self.record_metrics else None
        table = adam_table(wave, moments.keep, moments.gain, scalars.to(wave.device))
        for factors in moments:
            backend.adam(factors, table[:, factors.bucket.part], bound, metrics)
            if metrics is not None:
                metrics.add_captured(factors.captured())
        if metrics is not None:
            metrics.add_energy(wave.norms)
        squared_norm = (yield from moments.finish())[1]
        if wave.rule.tracked:
            # E ← β2 E + (1−β2)‖g‖²: the sum of Adam's own v, kept exactly. c = E/‖v_B v_A‖² waits for the next step.
            energy = beta2 * wide(wave.read("v_energy")) + (1 - beta2) * wave.norms.square()
            wave.write("v_energy", energy)
            scale = energy / squared_norm.clamp_min(torch.finfo(torch.float64).tiny)
            wave.write("v_scale", scale.clamp_max(torch.finfo(torch.float32).max))

    def _step_in_one_call(self, some: list[Located], backend: Any) -> list[Located]:
        """With C++ kernels, step the matrices that they take; what is left: (group, parameter, position)."""
        if not isinstance(backend, Cpp):
            return some
        first = some[0][2]
        tables = self._tables.get(first)
        if tables is None or not tables.hold(some):
            tables = self._tables[first] = Tables(some, backend)
        for table in tables.by_rule:
            self._step_table(table, backend)
        return [some[i] for i in tables.rest]

    def _step_table(self, table: Table, backend: Cpp) -> None:
        states = [self.state[param] or self._init_state(group, param, i) for group, param, i in table.located]
        if not table.holds_state(states):
            check_held_states(self, table.located, states)
            table.take_state(states)
        options = [self._kernel_options(group) for group in table.groups]
        sum_bytes = min(int(group["temporary_bytes"]) for group in table.groups) // 2
        found = backend.step(table, options, sum_bytes, self.record_metrics)
        for norm, *_ in found:
            if not usable(norm):
                self._skips.add(norm)
        if self.record_metrics:
            kept = [i for i, (norm, *_) in enumerate(found) if usable(norm)]
            self._metrics.add_steps([found[i] for i in kept], sum(table.params[i].numel() for i in kept))

    def _kernel_options(self, group: dict[str, Any]) -> tuple[float, ...]:
        """What `cpp_backend.OPTIONS` names, of a group as it is now."""
        self._check_betas(group)
        rule, bound, clip = RULES[group["update_rule"]], float("inf"), group["max_param_grad_norm"]
        if rule.tracked:
            bound = update_bound(*group["betas"])
        return (
            *(*group["betas"], float(group["lr"]), group["weight_decay"], _positive(group["eps"])),
            *(group["residual_weight"] or 0.0, group["update_scale"], float("inf") if clip is None else clip),
            *(-1.0 if group["maximize"] else 1.0, bound, not rule.tracked, rule.damping),
            *(mix(group["seed"]), group["bf16_rounding"] == "stochastic"),
        )


def _positive(eps: float) -> float:
    """ε, or for a smaller one the √ of the smallest normal float32: what is below that, v cannot hold.

    So an entry that never had a gradient gives 0 and not 0/0, and after many zero gradients the update fades.
    """
    return max(eps, torch.finfo(torch.float32).tiny ** 0.5)
