"""This module implements Muon with its momentum held as low-rank factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..kernels.cpp import Cpp
from ..kernels.table import named_options
from ..lowrank.batch import Batch
from ..lowrank.float64 import to_float32, to_float64
from ..lowrank.layout import slices
from ..lowrank.moments import Moment, move_on
from ..lowrank.rules import MIN_FACTOR_NORM, Average
from .adamw_path import AdamWOptions
from .base import LoRAPreOptimizer
from .options import check_betas, in_range, is_whole

# These are the coefficients of the quintic in torch.optim.Muon.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(m: Tensor, steps: int = 5, dtype: torch.dtype | None = None, floor: float = 0.0) -> Tensor:
    """Move a matrix towards the nearest semi-orthogonal one by Newton–Schulz iteration, in ``dtype`` (None: its own).

    m and the result are [..., p, q] of m's dtype. The iteration is the quintic of `torch.optim.Muon`, after which
    singular values lie between about 0.7 and 1.2. A matrix whose entries are all at most ``floor`` in size becomes
    zero. The floor of 1e-7 that torch puts under the norm is left out, as LoRA's gradients can be smaller and the step
    must not depend on their scale.
    """
    a, b, c = NEWTON_SCHULZ
    peak = torch.maximum(m.amax((-2, -1), keepdim=True), -m.amin((-2, -1), keepdim=True))
    x = m / torch.where(peak > floor, peak, float("inf"))  # This comes first, so that no square underflows.
    x /= torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1.0)  # The largest entry of x is 1, or all are 0.
    # Torch multiplies a single matrix up to twice as fast without the dimension of a batch.
    x = x.to(dtype or m.dtype).reshape(-1, *m.shape[-2:]).squeeze(0)
    tall, add = m.shape[-2] > m.shape[-1], torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        # The sums are inside the products, as in torch. In bfloat16 each separate sum would be rounded once more.
        polynomial = add(gram, gram, gram, beta=b, alpha=c)
        x = add(x, x, polynomial, beta=a) if tall else add(x, polynomial, x, beta=a)
    return x.reshape(m.shape).to(m.dtype)


def shape_scale(shape: tuple[int, int], adjust_lr_fn: str | None) -> float:
    """Return the factor on the learning rate of a p×q matrix, by its name in `torch.optim.Muon`, or 1 for None."""
    if adjust_lr_fn == "original":
        return max(1.0, shape[0] / shape[1]) ** 0.5
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * max(shape) ** 0.5
    return 1.0


class LoRAPreMuon(LoRAPreOptimizer):
    """Implements Muon with factors of rank k in place of the momentum of each p×q matrix.

    The state of a matrix is then (p+q)k numbers instead of pq. With ``update_rule="newton"`` this is LoRA-Pre for Muon
    (Wang et al., arXiv 2602.24283, Algorithm 2): the momentum m = μ m_B m_A + g of the previous factors goes through
    the Newton–Schulz iteration, and the step follows the result. With ``"als"``, the default, the part of g outside
    the row space of m_A has the weight min(ρ, 1−μᵗ)/(1−μ). Parameters that are not matrices, or are too small to
    compress, take AdamW with a learning rate of their own.

    Args:
        params: as in `LoRAPreAdamW`.
        lr: learning rate ≥ 0 of the compressed matrices.
        momentum: μ in [0, 1).
        weight_decay: decoupled λ ≥ 0 of compressed matrices and of the AdamW path.
        momentum_rank, update_rule: as in `LoRAPreAdamW`.
        residual_weight: as in `LoRAPreAdamW`, for an average of decay μ. With 1−μ the momentum is that of Algorithm 2,
            m = μ m_B m_A + g.
        nesterov: whether the step follows g + μ m instead of m, as in torch.optim.Muon. The paper reports no such
            step, so the default is False.
        adjust_lr_fn: scale of the learning rate, as in torch.optim.Muon: ``"original"`` is √max(1, p/q), and
            ``"match_rms_adamw"`` is 0.2 √max(p, q), with which learning rates are of the size of AdamW's. None is no
            scale, as in Algorithm 2, whereas torch's None means ``"original"``.
        ns_steps: number ≥ 1 of Newton–Schulz steps.
        ns_dtype: ``"float32"``, or ``"bfloat16"`` as in torch.optim.Muon, which is several times as fast where a
            processor multiplies bfloat16 matrices and several times as slow where it does not.
        adamw_lr: learning rate ≥ 0 of the AdamW path. None stands for ``lr``. It follows the schedule of ``lr`` in
            proportion: it holds where ``lr`` is what it was at first, which the group keeps as ``adamw_base_lr``.
        adamw_betas, adamw_eps: decay rates and ε of the AdamW path.
        update_scale, max_param_grad_norm, bf16_rounding, update_in_backward, temporary_bytes, maximize, seed, backend:
            as `LoRAPreOptimizer` documents them. There is no ``backend="triton"``: a step multiplies whole matrices.

    The state of a compressed matrix is float32: ``step`` [], ``m_B`` [p, k] and ``m_A`` [k, q].

    Raises:
        ValueError: an option out of its range.
        NotImplementedError: a parameter that an engine has flattened, or sharded otherwise than by rows (tensor
            parallelism).
    """

    moments = ("m",)
    backend_names = ("auto", "cpp", "eager", "compiled")
    shared_options = (*LoRAPreOptimizer.shared_options, "nesterov", "ns_steps", "ns_dtype")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        momentum_rank: int | None = None,
        update_rule: str = "als",
        residual_weight: float | None = None,
        nesterov: bool = False,
        adjust_lr_fn: str | None = None,
        ns_steps: int = 5,
        ns_dtype: str = "float32",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
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
            momentum=momentum,
            weight_decay=weight_decay,
            momentum_rank=momentum_rank,
            update_rule=update_rule,
            residual_weight=residual_weight,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
            ns_steps=ns_steps,
            ns_dtype=ns_dtype,
            adamw_lr=adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            update_scale=update_scale,
            max_param_grad_norm=max_param_grad_norm,
            bf16_rounding=bf16_rounding,
            update_in_backward=update_in_backward,
            temporary_bytes=temporary_bytes,
            maximize=maximize,
            seed=seed,
        )
        super().__init__(params, defaults, backend)

    def _check_decays(self, group: dict[str, Any]) -> None:
        in_range("momentum", group["momentum"], 0, 1)
        check_betas("adamw_betas", group["adamw_betas"])

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for an option out of its range."""
        super().check_group(group)
        in_range("adamw_eps", group["adamw_eps"], 0)
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"adjust_lr_fn={group['adjust_lr_fn']!r}: expected None, 'original' or 'match_rms_adamw'")
        if not is_whole(group["ns_steps"], 1):
            raise ValueError(f"ns_steps={group['ns_steps']!r}: expected a whole number of at least 1")
        if group["ns_dtype"] not in ("float32", "bfloat16"):
            raise ValueError(f"ns_dtype={group['ns_dtype']!r}: expected 'float32' or 'bfloat16'")
        # Schedulers only write `lr`. A saved group has been at another `lr` than its first one since.
        base_lr = group.setdefault("adamw_base_lr", float(group["lr"]))
        if group["adamw_lr"] is not None:
            in_range("adamw_lr", group["adamw_lr"], 0)
            if not base_lr:
                raise ValueError(
                    "adamw_lr follows the schedule of lr in proportion and cannot follow lr=0: give an lr above 0"
                )

    def _adamw_options(self, group: dict[str, Any]) -> AdamWOptions:
        ratio = 1.0 if group["adamw_lr"] is None else group["adamw_lr"] / group["adamw_base_lr"]
        return AdamWOptions(group["lr"] * ratio, group["adamw_betas"], group["adamw_eps"])

    def _update(self, batch: Batch) -> Iterator[None]:
        backend = self._backend(batch.device)
        if isinstance(backend, Cpp) and backend.takes_batch(batch):
            self._update_by_kernel(backend, batch)
            return
        mu = batch.numbers("momentum")
        m = Moment(backend, batch, "m", Average(mu, torch.ones_like(mu)))
        t = to_float64(batch.advance(m.started if batch.rule.tracked else None))
        mixture = batch.rule.mixture(m.average, batch.numbers("residual_weight"), t)
        steps = self._steps(batch)
        for matrices in batch.chunks():
            g = batch.gradients(matrices, batch.all_rows)
            momentum = backend.momentum(m, matrices, g, mixture)
            if batch.groups[0]["nesterov"]:
                momentum = torch.addcmul(g, momentum, to_float32(mu[matrices], g.device)[:, None, None])
            self._move(batch, matrices, momentum, *steps)
        backend.finish_rows(m)
        if self.record_metrics:
            self._metrics.add_captured(m.captured())
            self._metrics.add_energy(batch.norms)
        yield from move_on(backend, batch, [m])

    def _update_by_kernel(self, backend: Cpp, batch: Batch) -> None:
        options = [named_options(group, beta1=group["momentum"]) for group in batch.groups]
        metrics, steps = self._metrics if self.record_metrics else None, self._steps(batch)
        # The kernels' only temporaries are the momenta, and copies of gradients that are not contiguous. Threads share
        # the matrices of a call.
        temporaries = 1 if all(map(Tensor.is_contiguous, batch.grads)) else 2
        for matrices in slices(len(batch), batch.matrices_at_once(temporaries)):
            momenta = backend.momenta(batch, matrices, options, batch.groups[0]["nesterov"], metrics)
            for part in slices(len(momenta), batch.matrices_at_once()):
                at = slice(matrices.start + part.start, matrices.start + part.stop)
                self._move(batch, at, momenta[part], *steps)

    @staticmethod
    def _steps(batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return step and decay as `Batch.steps` does, with the step scaled for the shape of the matrices."""
        step, decay = batch.steps()
        scale = batch.numbers(lambda group: shape_scale(batch.shape, group["adjust_lr_fn"]))
        return step * to_float32(scale, batch.device), decay

    def _move(self, batch: Batch, matrices: slice, momentum: Tensor, step: Tensor, decay: Tensor | None) -> None:
        """Move some matrices by a step along their orthogonalized momenta.

        momentum: [n, rows, q], not orthogonalized yet. step, decay: what `_steps` returns.
        """
        batch.write(matrices, batch.all_rows, self._direction(batch, momentum), step, decay)

    @staticmethod
    def _direction(batch: Batch, m: Tensor) -> Tensor:
        """Return this process's rows of some matrices' orthogonalized momenta. m and the result: [n, rows, q]."""
        group = batch.groups[0]
        m = batch.placement.gather(m, batch.shape[0])
        # After many zero gradients the factors rest at their floor. What they hold then is not a direction to step in.
        floor = 10 * MIN_FACTOR_NORM**2
        found = orthogonalize(m, group["ns_steps"], getattr(torch, group["ns_dtype"]), floor)
        return found[:, batch.rows].contiguous()
