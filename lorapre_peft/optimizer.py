"""What both optimizers share: groups and their checks, state, the gradient checks, the AdamW path, and the order of a step.

A subclass says what is done with the moments of the compressed matrices (`_update`). How factors follow a gradient is in
``rules.py``; how a step walks through stacked matrices and row tiles is in ``bucket.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import backends
from .bucket import MAX_NORM, Bucket, Metrics, usable
from .checks import above_zero, check_flattened_shards, check_gradient, check_parameter, in_range
from .gradients import Skips, gradient_norms, local_gradient, reads_are_free, takes_part
from .placement import WHOLE, Placement, local, place, placement_of
from .plain import AdamWOptions, Item, adamw_path
from .rules import RULES
from .state import check_loaded_state, restore_state, state_dtype

Located = tuple[dict[str, Any], Tensor, int]  # group, parameter, position of the parameter in the optimizer


@functools.lru_cache(maxsize=4096)
def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """The p×q under which a tensor of two or more dimensions is compressed: trailing dimensions are flattened."""
    return shape[0], math.prod(shape[1:])


@functools.lru_cache(maxsize=4096)
def compressed_rank(shape: torch.Size, momentum_rank: int | None) -> int:
    """The k at which a parameter of this shape is compressed; 0 if it takes the AdamW path.

    None stands for a quarter of the smaller side, at least 1. A matrix is compressed when k < min(p, q) and the factors,
    k(p+q) numbers, are smaller than the p·q that they replace.
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return 0
    p, q = matrix_shape(shape)
    k = max(1, min(p, q) // 4) if momentum_rank is None else momentum_rank
    return k if 0 < k < min(p, q) and k * (p + q) < p * q else 0


def world_size() -> int:
    """Processes of the running distributed job; 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class LoRAPreOptimizer(Optimizer):
    """Base of `LoRAPreAdamW` and `LoRAPreMuon`, not for direct use, and the options that both have.

    Args:
        params, defaults: as in `torch.optim.Optimizer`; ``defaults`` holds the subclass's own options.
        momentum_rank: k ≥ 1. None: a quarter of the smaller side of each matrix, at least 1. 0: the AdamW path for all.
        update_rule: ``"als"`` or ``"newton"``.
        residual_weight: ρ of ``als``, in [0, 1]; None: the rule's default.
        update_scale: factor on the update of compressed matrices, > 0; the paper's pre-training uses 0.25, as GaLore does.
        max_param_grad_norm: clip each parameter's gradient to this norm > 0, by itself; None: no clipping.
        bf16_rounding: how bfloat16 parameters are written: ``"nearest"``, or ``"stochastic"``, which keeps the mean of
            updates too small for bfloat16's 8 bits. The random bits depend on (seed, step, parameter) alone.
        update_in_backward: update each parameter, and free its gradient, as soon as `backward` has made it; `step` then
            only closes the step. Without gradient accumulation, global-norm clipping, GradScaler or several processes.
        temporary_bytes: bound on all temporaries of a compressed matrix's step together. Muon's orthogonalization is
            outside it: it needs the matrix whole.
        maximize: maximize the objective.
        seed: whole number ≥ 0, for ``newton``'s start and for stochastic rounding. No step reads torch's global generator.
        backend: how the step of compressed matrices is computed: ``"eager"``, ``"compiled"`` (`torch.compile`; the first step takes
            seconds), ``"triton"`` (CUDA, package triton), or ``"auto"``: Triton where it runs, else eager. The results are the
            same to float32 round-off. Not saved in checkpoints.

    Attributes:
        skipped_updates: how many updates of single parameters were skipped since construction, for a gradient that is not
            finite or whose square float32 cannot hold.
        record_metrics: set it before the backward pass to have that step's `metrics` kept.
    """

    backend_names = backends.NAMES
    moments: tuple[str, ...]  # prefixes of the factored state: m, and v where there is a second moment

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        momentum_rank: int | None,
        update_rule: str,
        residual_weight: float | None,
        update_scale: float = 1.0,
        max_param_grad_norm: float | None = None,
        bf16_rounding: str = "nearest",
        update_in_backward: bool = False,
        temporary_bytes: int = 64_000_000,
        maximize: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ):
        if backend not in self.backend_names:
            raise ValueError(f"backend={backend!r}: expected one of {', '.join(map(repr, self.backend_names))}")
        if update_in_backward and world_size() > 1:
            raise NotImplementedError(
                f"update_in_backward=True in a run of {world_size()} processes: gradients would be used before they are "
                "averaged. Use update_in_backward=False, or one process"
            )
        common = dict(
            momentum_rank=momentum_rank,
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
        self._reset(backend)
        super().__init__(params, {**defaults, **common})

    def _reset(self, backend: str) -> None:
        self.backend = backend
        self.record_metrics = False
        self._metrics = Metrics()
        self._updated: set[Tensor] = set()  # parameters that this backward pass has already updated
        # Compressed matrices whose factors the host knows to have started: parameter's id → its step counter, whose identity
        # says that the entry still holds. Until then each step reads norms and counters, afterwards nothing.
        self._started: dict[int, Tensor] = {}
        self._skips = Skips()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = state.pop("backend", None)
        super().__setstate__(state)
        if (
            "record_metrics" not in self.__dict__
        ):  # after unpickling and deepcopy: only groups, state and backend travel
            self._reset(backend)
            for group in self.param_groups:
                self._register_hooks(group)

    # ---- groups ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`; its options are checked like the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for param in group["params"]:
                check_parameter(param)
        except Exception:
            self.param_groups.pop()
            raise
        self._register_hooks(group)
        # Kept to notice an engine that replaces the matrices by flattened shards behind the optimizer's back.
        group["num_matrices"] = sum(param.ndim >= 2 for param in group["params"])

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(
                f"lr is a tensor of shape {tuple(lr.shape)}; expected a number or a tensor with one element"
            )
        in_range("lr", lr, 0)
        in_range("weight_decay", group["weight_decay"], 0)
        if group["update_rule"] not in RULES:
            raise ValueError(f"update_rule={group['update_rule']!r}: expected one of {', '.join(map(repr, RULES))}")
        k = group["momentum_rank"]
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
            raise ValueError(
                f"momentum_rank={k!r}: expected a whole number of at least 1, None (a quarter of the smaller side of each "
                "matrix), or 0 (the whole group takes the AdamW path)"
            )
        rho = group["residual_weight"]
        if rho is not None:
            in_range("residual_weight", rho, 0, 1, closed=True)
            if group["update_rule"] != "als":
                raise ValueError(
                    f"residual_weight={rho} is an option of update_rule='als', found update_rule={group['update_rule']!r}: "
                    "leave it out, or use 'als'"
                )
        if not isinstance(group["seed"], int) or group["seed"] < 0:
            raise ValueError(f"seed={group['seed']!r}: expected a whole number of at least 0")
        above_zero("update_scale", group["update_scale"])
        if group["max_param_grad_norm"] is not None:
            above_zero("max_param_grad_norm", group["max_param_grad_norm"])
        if group["bf16_rounding"] not in ("nearest", "stochastic"):
            raise ValueError(f"bf16_rounding={group['bf16_rounding']!r}: expected 'nearest' or 'stochastic'")
        if group["update_in_backward"] != self.defaults["update_in_backward"]:
            raise ValueError("update_in_backward is an option of the whole optimizer: give it to the constructor")
        in_range("temporary_bytes", group["temporary_bytes"], 1)

    def _adamw_options(self, group: dict[str, Any]) -> AdamWOptions:
        """Of a group, at its learning rate now."""
        raise NotImplementedError

    def _update(self, bucket: Bucket) -> Iterator[None]:
        """One step of a bucket of compressed matrices: parameters and factors, in place. Stops at most once, for a collective."""
        raise NotImplementedError

    # ---- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        closure: reevaluates the model and returns the loss, as in `torch.optim`. Returns the closure's value or None.
        Raises RuntimeError for a sparse or complex gradient and where an engine has replaced matrices by flat shards.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.defaults["update_in_backward"]:
            self._metrics = Metrics()
        # With update_in_backward the hooks have left no gradients; what was set by hand is still applied.
        self._apply([located for located in self._located() if takes_part(located[1])])
        self._updated.clear()
        return loss

    def _located(self) -> list[Located]:
        """Every parameter, from the groups as they are now."""
        check_flattened_shards(self.param_groups)
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        return [(group, param, position) for position, (group, param) in enumerate(pairs)]

    def _register_hooks(self, group: dict[str, Any]) -> None:
        if self.defaults["update_in_backward"]:
            for param in group["params"]:
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(self._update_in_backward)

    @torch.no_grad()
    def _update_in_backward(self, param: Tensor) -> None:
        if param in self._updated:
            raise RuntimeError(
                f"a second backward pass reached a parameter of shape {tuple(param.shape)} before optimizer.step(): gradients "
                "cannot be accumulated with update_in_backward=True, which has already used and freed the first ones. Call "
                "step() after every backward pass (gradient_accumulation_steps=1), or use update_in_backward=False"
            )
        if not self._updated:
            self._metrics = Metrics()
        pairs = ((group, other) for group in self.param_groups for other in group["params"])
        self._apply([(group, param, i) for i, (group, other) in enumerate(pairs) if other is param])
        self._updated.add(param)
        param.grad = None

    def _apply(self, todo: list[Located]) -> None:
        """Update these parameters: device by device, and by the processes among which they are sharded."""
        alike: dict[tuple[torch.device, Placement], list[Located]] = {}
        for located in todo:
            param = located[1]
            if param.numel():
                if param.grad is not None:
                    check_gradient(param)
                alike.setdefault((param.device, placement_of(param)), []).append(located)
        for (_, placement), some in alike.items():
            for group, param, position in some:
                if not self.state[param]:
                    self._init_state(param, group, position)
            grads = [local_gradient(param) for _, param, _ in some]
            norms = gradient_norms(grads, [param.grad is None for _, param, _ in some], placement)
            waiting = self._waiting(some)
            known = norms.tolist() if waiting or reads_are_free(norms.device) else None
            recorded, self._metrics = self._metrics, Metrics()
            self._apply_normed(some, grads, norms, known, placement)
            self._metrics.reduce(placement)
            recorded.merge(self._metrics)
            self._metrics = recorded

    def _apply_normed(
        self,
        todo: list[Located],
        grads: list[Tensor],
        norms: Tensor,
        known: list[float] | None,
        placement: Placement = WHOLE,
    ) -> None:
        """`_apply` of what lives in one place, given its part of each gradient and every ‖g‖_F: [N] float64, −1 for no gradient.

        On a CPU, and as long as a matrix of `als` waits for its first gradient, the host has read the norms (``known``) and leaves
        out what is to be skipped. After that nothing is read: what is not finite is masked on the device.
        """
        masked = known is None
        each = norms.unbind()
        if masked:
            finite = usable(norms)
            self._skips.add_unread(finite, norms)
            each_finite = finite.unbind()

        starting: list[Tensor] = []
        buckets: dict[tuple, Bucket] = {}
        plain: dict[int, tuple[dict[str, Any], list[Item]]] = {}
        for i, (group, param, position) in enumerate(todo):
            state, k = self.state[param], compressed_rank(param.shape, group["momentum_rank"])
            if known and not 0 <= known[i] <= MAX_NORM:  # NaN is not either; −1 is no gradient at all
                if not known[i] < 0:
                    self._skips.add(known[i])
                continue
            here = local(param)
            if k == 0:
                offset = placement.rows(param.shape[0]).start * param.shape[1:].numel() if param.ndim else 0
                state = {name: local(value) for name, value in state.items()}
                item = Item(here, grads[i], state, each[i], each_finite[i] if masked else None, position, offset)
                plain.setdefault(id(group), (group, []))[1].append(item)
                continue
            rule = RULES[group["update_rule"]]
            fresh = rule.tracked and self._started.get(id(param)) is not state["step"]
            if fresh and known[i] == 0:
                # LoRA's A before B has moved: nothing to start from, and t counts from the first gradient.
                here.mul_(1 - group["lr"] * group["weight_decay"])
                continue
            key = (id(group), matrix_shape(param.shape), param.dtype, fresh)
            if key not in buckets:
                buckets[key] = Bucket(group, rule, k, matrix_shape(param.shape), placement, fresh)
            buckets[key].add(here, grads[i], state, position, i)
            if fresh:
                starting.append(param)
        for group, items in plain.values():
            adamw_path(group, self._adamw_options(group), items)
        before: Iterator[None] = iter(())
        for bucket in buckets.values():
            bucket.set_norms(each, masked)
            for chunk in bucket.chunks():
                # The rows of this chunk while the sums of the one before are on their way; without processes, all of it.
                update = self._update(chunk)
                next(update, None)
                next(before, None)
                before = update
        next(before, None)
        for param in starting:  # only now: `stack` may have put the counters side by side
            self._started[id(param)] = self.state[param]["step"]

    def _waiting(self, todo: list[Located]) -> bool:
        """Whether a matrix of `als` among these has not started, as far as the host knows; it reads those counters."""
        waiting = False
        for group, param, _ in todo:
            step = self.state[param]["step"]
            tracked = RULES[group["update_rule"]].tracked and compressed_rank(param.shape, group["momentum_rank"])
            if tracked and self._started.get(id(param)) is not step:
                if float(step) == 0:
                    waiting = True
                else:
                    self._started[id(param)] = step
        return waiting

    def _backend(self, bucket: Bucket) -> Any:
        return backends.choose(self.backend, bucket.params[0].device, self.backend_names)

    def state_shapes(self, param: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a parameter's state; they depend on its shape and its group's options alone."""
        k = compressed_rank(param.shape, group["momentum_rank"])
        if k == 0:
            return {"step": (), "exp_avg": tuple(param.shape), "exp_avg_sq": tuple(param.shape)}
        p, q = matrix_shape(param.shape)
        shapes: dict[str, tuple[int, ...]] = {"step": ()}
        for moment in self.moments:
            shapes |= {f"{moment}_B": (p, k), f"{moment}_A": (k, q)}
        if RULES[group["update_rule"]].tracked and "v" in self.moments:
            shapes |= {"v_energy": (), "v_scale": ()}
        return shapes

    def _init_state(self, param: Tensor, group: dict[str, Any], position: int) -> None:
        """Zeros, whatever the gradient; `newton` draws its A factors from a generator of this parameter's own."""
        check_parameter(param)  # an engine may have replaced what the group was built with
        state = self.state[param]
        rule = RULES[group["update_rule"]]
        generator = torch.Generator().manual_seed((group["seed"] * 1_000_003 + position) % 2**63)
        for name, shape in self.state_shapes(param, group).items():
            value = torch.zeros(shape, dtype=state_dtype(param, name), device=param.device)
            if name.endswith("_A") and not rule.tracked:
                value.copy_(rule.init_columns(shape, generator))
            state[name] = place(value, param, name)

    @property
    def skipped_updates(self) -> int:
        """Updates of single parameters skipped since construction, for a gradient that is not finite or whose square float32
        cannot hold. Reading it synchronises the devices, and warns of the first that it sees.
        """
        return self._skips.count()

    # ---- what a run can look at -----------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """What the last step with `record_metrics` saw, over all compressed matrices; reading it synchronises the device.

        captured_energy: share of ‖g‖² inside the row space of m_A, 0 to 1 (before that step's update of m_A).
        largest_update, clamped_share: largest |m̂/(√v̂+ε)| before any clamp, and the share of entries that ``als`` clamped
        (`LoRAPreAdamW` only). Empty if nothing was recorded.
        """
        return self._metrics.read()

    def param_state_bytes(self, param: Tensor, group: dict[str, Any]) -> int:
        """Bytes of one parameter's state, from its shape: also before the first step has made it."""
        shapes = self.state_shapes(param, group)
        return sum(math.prod(shape) * state_dtype(param, name).itemsize for name, shape in shapes.items())

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping every state tensor in float32.

        `torch.optim.Optimizer.load_state_dict` casts state to the parameter's dtype, which would round the factors of a bf16
        parameter; a resumed run would not continue as the uninterrupted one. Raises ValueError, before anything
        changes, if the state is not this optimizer's.
        """
        loaded: dict[str, Any] = {}

        def capture(_: Optimizer, final: dict[str, Any]) -> None:
            # The last pre-hook: the user's own may have replaced what was given.
            check_loaded_state(self, final)
            loaded.update(final)

        def restore(_: Optimizer) -> None:
            restore_state(self, loaded)

        handles = [
            self.register_load_state_dict_pre_hook(capture),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
