"""This module implements AdamW with both moments held as low-rank factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..kernels.eager import adam_scalars, adam_table
from ..kernels.table import Table, WholeStep, named_options, tables_of
from ..lowrank.batch import Batch
from ..lowrank.float64 import to_float32, to_float64
from ..lowrank.layout import Part
from ..lowrank.moments import Moment, move_on
from ..lowrank.rounding import mix
from ..lowrank.rules import RULES, Average
from ..lowrank.sharding import WHOLE
from .adamw_path import AdamWOptions
from .base import LoRAPreOptimizer
from .options import check_betas, in_range


def update_bound(beta1: float, beta2: float) -> float:
    """Return C = (1−β1)/√((1−β2)(1−β1²/β2)), which is 1.165 at (0.9, 0.95).

    Exact Adam has |m|/√v ≤ C by the Cauchy–Schwarz inequality, if β1² < β2.
    """
    return (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5


class LoRAPreAdamW(LoRAPreOptimizer):
    """Implements AdamW with factors of ranks k and k_v in place of the two moments of each p×q matrix.

    The state of a matrix is then (p+q)(k+k_v) numbers instead of 2pq. With ``update_rule="newton"`` this is LoRA-Pre
    for Adam (Wang et al., "Taming Momentum", arXiv 2602.24283, Theorem 3.1 and Algorithm 1). With ``"als"``, the
    default, it is this project's tracked rule on the same state. Parameters that are not matrices, or are too small to
    compress, take the step of `torch.optim.AdamW`, in float32 (float64 for float64 parameters) and written with
    ``bf16_rounding``.

    Args:
        params: parameters, named parameters or groups, as in `torch.optim`, of any floating-point dtype. Tensors of
            more than two dimensions are flattened to (first, rest).
        lr: learning rate ≥ 0, a number or a one-element tensor.
        betas: decay rates (β1, β2) in [0, 1); the default is the paper's (0.9, 0.95). ``als`` needs β1² < β2. With
            β2 = 0.999 the start-up bias of ``newton`` is far worse.
        eps: ε ≥ 0 in m̂/(√v̂ + ε).
        weight_decay: decoupled λ ≥ 0, as in `torch.optim.AdamW` but 0 by default.
        momentum_rank: rank k ≥ 1 of the first moment. With 0 all parameters take the AdamW path. None stands for 8, or
            for a quarter of a matrix's smaller side if that is less, and at least 1. Unless its group gives a
            ``momentum_rank``, a matrix that is plainly an embedding or a head takes the AdamW path. A warning says
            what was chosen.
        update_rule: ``"als"`` or ``"newton"``.
        residual_weight: ρ in [0, 1] of ``als``. The part of the gradient outside the momentum's subspace has the
            weight min(1, ρ/(1−β1ᵗ)) in m̂. None stands for 1, the sum of the weights that Adam gives one gradient over
            all steps. The step then moves by the whole of that part at once, and the clamp shortens it where gradients
            are noise. With 1−β1 the momentum is m = β1 m_B m_A + (1−β1) g.
        second_momentum_rank: rank k_v ≥ 1 of the second moment, at most k. None stands for 1 with ``als``, and for k
            with ``newton``, which has no other.
        update_scale, max_param_grad_norm, bf16_rounding, update_in_backward, temporary_bytes, maximize, seed, backend:
            as `LoRAPreOptimizer` documents them.

    The state of a compressed matrix is float32: ``step`` [], ``m_B`` [p, k], ``m_A`` [k, q], ``v_B`` [p, k_v],
    ``v_A`` [k_v, q], and with ``als`` also ``v_energy`` E and ``v_scale`` c = E/‖v_B v_A‖², both []. On the AdamW path
    it is ``step``, ``exp_avg`` and ``exp_avg_sq``; for float64 parameters the latter two are float64.

    Raises:
        ValueError: an option out of its range.
        NotImplementedError: a parameter that an engine has flattened, or sharded otherwise than by rows (tensor
            parallelism).
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
        second_momentum_rank: int | None = None,
        update_rule: str = "als",
        residual_weight: float | None = None,
        update_scale: float = 1.0,
        max_param_grad_norm: float | None = None,
        bf16_rounding: str = "stochastic",
        update_in_backward: bool = False,
        temporary_bytes: int | None = None,
        maximize: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_rank=momentum_rank,
            second_momentum_rank=second_momentum_rank,
            update_rule=update_rule,
            residual_weight=residual_weight,
            update_scale=update_scale,
            max_param_grad_norm=max_param_grad_norm,
            bf16_rounding=bf16_rounding,
            update_in_backward=update_in_backward,
            temporary_bytes=temporary_bytes,
            maximize=maximize,
            seed=seed,
        )
        super().__init__(params, defaults, backend)

    def _resolve(self, group: dict[str, Any]) -> None:
        super()._resolve(group)
        rule = RULES.get(group["update_rule"])
        if group["second_momentum_rank"] is None and rule is not None:
            group["second_momentum_rank"] = rule.second_momentum_rank

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for an option out of its range."""
        super().check_group(group)
        in_range("eps", group["eps"], 0)

    def _check_decays(self, group: dict[str, Any]) -> None:
        check_betas("betas", group["betas"])
        beta1, beta2 = group["betas"]
        if RULES[group["update_rule"]].tracked and not beta1**2 < beta2:
            raise ValueError(
                f"betas={beta1, beta2}: update_rule='als' needs betas[0]² < betas[1], found {beta1**2:g} and "
                f"{beta2:g}; without it Adam's own update has no bound. Raise betas[1] or lower betas[0]; the paper "
                "has (0.9, 0.95)"
            )

    def _adamw_options(self, group: dict[str, Any]) -> AdamWOptions:
        return AdamWOptions(group["lr"], group["betas"], group["eps"])

    def ranks(self, param: Tensor, group: dict[str, Any]) -> tuple[int, ...]:
        """Return the ranks of m and of v of a parameter, or () if it takes the AdamW path."""
        first = super().ranks(param, group)
        return (*first, min(*first, group["second_momentum_rank"] or first[0])) if first else ()

    # ---- the step, batch by batch -----------------------------------------------------------------------------------

    def _update(self, batch: Batch) -> Iterator[None]:
        backend, tracked = self._backend(batch.device), batch.rule.tracked
        beta1, beta2 = batch.numbers(lambda group: group["betas"][0]), batch.numbers(lambda group: group["betas"][1])
        m = Moment(backend, batch, "m", Average(beta1, 1 - beta1))
        v = Moment(backend, batch, "v", Average(beta2.sqrt(), 1 - beta2.sqrt()))
        t = to_float64(batch.advance(batch.read("v_energy") > 0 if tracked else None))
        c = to_float64(batch.read("v_scale")) if tracked else torch.ones_like(t)
        mixture = batch.rule.mixture(m.average, batch.numbers("residual_weight"), t)
        eps = batch.numbers(lambda group: _positive(group["eps"]))
        table = adam_table(batch, m, v, backend.run(adam_scalars, mixture, t, c, beta1, beta2, eps))
        bound = None
        if tracked:
            bound = to_float32(batch.numbers(lambda group: update_bound(*group["betas"])), batch.device)
        metrics = self._metrics if self.record_metrics else None
        backend.adam(batch, m, v, table, bound, metrics)
        if metrics is not None:
            metrics.add_captured(m.captured())
            metrics.add_energy(batch.norms)
        squared_norm = (yield from move_on(backend, batch, [m, v]))[1]
        if tracked:
            # E ← β2 E + (1−β2)‖g‖² is exactly the sum of Adam's own v. The next step reads c = E/‖v_B v_A‖².
            energy = beta2 * to_float64(batch.read("v_energy")) + (1 - beta2) * batch.norms.square()
            scale = energy / squared_norm.clamp_min(torch.finfo(torch.float64).tiny)
            batch.save("v_energy", energy)
            batch.save("v_scale", scale.clamp_max(torch.finfo(torch.float32).max))

    # ---- the step in kernels of its own -----------------------------------------------------------------------------

    def _divide(self, part: Part) -> None:
        backend = self._backend(part.device)
        if isinstance(backend, WholeStep) and part.placement is WHOLE:
            taken = [member for member in part.members if member.ranks and backend.takes(member)]
            part.members = [member for member in part.members if not (member.ranks and backend.takes(member))]
            for rule in RULES:
                of_rule = [member for member in taken if member.group["update_rule"] == rule]
                part.tables += map(backend.table, tables_of(of_rule))
        super()._divide(part)

    def _step_part(self, part: Part) -> None:
        for table in part.tables:
            self._step_table(table)
        super()._step_part(part)

    def _step_table(self, table: Table) -> None:
        if not table.holds_state([self.state[param] for param in table.params]):
            table.take_state([self._state_of(member) for member in table.members])
        options = [self._kernel_options(group) for group in table.groups]
        metrics = self._metrics if self.record_metrics else None
        self._count_skips(cast(WholeStep, self._backend(table.device)).step(table, options, metrics))

    def _kernel_options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return named_options(
            group,
            beta1=beta1,
            beta2=beta2,
            eps=_positive(group["eps"]),
            bound=update_bound(beta1, beta2) if RULES[group["update_rule"]].tracked else float("inf"),
            seed=mix(group["seed"]),
            stochastic=group["bf16_rounding"] == "stochastic",
            skips_zeros=group["experts"] is not None,
            **{name: group[name] for name in ("lr", "weight_decay", "update_scale")},
        )


def _positive(eps: float) -> float:
    """Return ε, but at least the square root of the smallest normal float32, below which v holds no square.

    An entry that never had a gradient then has the update 0 and not 0/0. After so many zero gradients that √v̂ is
    below this floor, ε dominates and the update goes to zero.
    """
    return max(eps, torch.finfo(torch.float32).tiny ** 0.5)
