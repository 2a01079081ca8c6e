"""What both optimizers share: groups and their checks, state, the gradient checks, the AdamW path, and the order of a step.

A subclass says what is done with the moments of the compressed matrices (`_update`). How factors follow a gradient is in
``rules.py``, which matrices are stepped together in ``plan.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from ..kernels import choose as backends
from ..lowrank.batch import Wave, usable
from ..lowrank.layout import Located, Plan, compressed_rank, make_plan, matrix_shape, plan_key
from ..lowrank.metrics import Metrics
from ..lowrank.rules import RESIDUAL_WEIGHT, RULES
from ..lowrank.sharding import WHOLE, Placement, place, placement_of, world_size
from .adamw_path import AdamWOptions, adamw_path, make_item
from .gradients import Skips, gradient_norms, local_gradient, reads_are_free, takes_part
from .in_backward import register_hooks
from .options import check_flattened_shards, check_gradient, check_options, check_parameter
from .state import check_held_states, check_loaded_state, restore_state, state_dtype


class LoRAPreOptimizer(Optimizer):
    """Base of `LoRAPreAdamW` and `LoRAPreMuon`, not for direct use, and the options that both have.

    Args:
        params, defaults: as in `torch.optim.Optimizer`; ``defaults`` holds the subclass's own options.
        momentum_rank: k ≥ 1. None: a quarter of the smaller side of each matrix, at least 1. 0: the AdamW path for all.
        update_rule: ``"als"`` or ``"newton"``.
        residual_weight: ρ of ``als``, in [0, 1]; None: 1.
        update_scale: factor on the update of compressed matrices, > 0; the paper's pre-training uses 0.25, as GaLore does.
        max_param_grad_norm: clip each parameter's gradient to this norm > 0, by itself; None: no clipping.
        bf16_rounding: how bfloat16 parameters are written: ``"nearest"``, or ``"stochastic"``, which keeps the mean of
            updates too small for bfloat16's 8 bits. The random bits depend on (seed, step, parameter) alone.
        update_in_backward: update each parameter, and free its gradient, as soon as `backward` has made it; `step` then
            only closes the step. Without gradient accumulation, global-norm clipping, GradScaler or several processes.
        temporary_bytes: bound on all temporaries of a compressed matrix's step together. Outside it are Muon's
            orthogonalization, which needs the matrix whole, and 4k(q + 4) float32 numbers per thread of ``backend="cpp"``.
        maximize: maximize the objective.
        seed: whole number ≥ 0, for ``newton``'s start and for stochastic rounding. No step reads torch's global generator.
        backend: how the step of compressed matrices is computed: ``"cpp"`` (CPUs under Linux with a C++ compiler, which runs once for a few
            seconds), ``"triton"`` (CUDA, package triton), ``"compiled"`` (`torch.compile`; the first step takes seconds),
            ``"eager"``, or ``"auto"``: C++ or Triton where they run, else eager. The results are the same to float32 round-off.
            Not saved in checkpoints.

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
        self._plans: dict[int, Plan] = {}  # by the position of a step's first parameter
        self._skips = Skips()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = state.pop("backend", None)
        super().__setstate__(state)
        # After unpickling and deepcopy only groups, state and backend are there.
        if "record_metrics" not in self.__dict__:
            self._reset(backend)
            for group in self.param_groups:
                register_hooks(self, group["params"])

    # ---- groups ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`; its options are checked like the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["residual_weight"] is None and group["update_rule"] == "als":
            group["residual_weight"] = RESIDUAL_WEIGHT  # now, so that checkpoints hold it
        try:
            self._check_group(group)
            for param in group["params"]:
                check_parameter(param)
        except Exception:
            self.param_groups.pop()
            raise
        register_hooks(self, group["params"])
        # Kept to notice an engine that replaces the matrices by flattened shards behind the optimizer's back.
        group["num_matrices"] = sum(param.ndim >= 2 for param in group["params"])

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group)
        if group["update_in_backward"] != self.defaults["update_in_backward"]:
            raise ValueError("update_in_backward is an option of the whole optimizer: give it to the constructor")

    def _adamw_options(self, group: dict[str, Any]) -> AdamWOptions:
        """Of a group, at its learning rate now."""
        raise NotImplementedError

    def _update(self, wave: Wave) -> Iterator[None]:
        """One step of a wave of compressed matrices: parameters and factors, in place. Stops at most once, for a collective."""
        raise NotImplementedError

    def _step_in_one_call(self, some: list[Located], backend: Any) -> list[Located]:
        """Step those of these parameters for which the backend has a kernel that does all of it; what is left."""
        return some

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in `torch.optim.Optimizer`; a backward pass that broke off under ``update_in_backward`` may be repeated after it."""
        super().zero_grad(set_to_none)
        self._updated.clear()

    def _located(self) -> list[Located]:
        """Every parameter, from the groups as they are now."""
        check_flattened_shards(self.param_groups)
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        return [(group, param, position) for position, (group, param) in enumerate(pairs)]

    @torch.no_grad()
    def update_in_backward(self, param: Tensor) -> None:
        """What the parameter's hook calls, with its gradient just made."""
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
        alike: dict[Any, list[Located]] = {}
        for located in todo:
            param, grad = located[1], located[1].grad
            if grad is not None and (grad.dtype is not param.dtype or grad.layout is not torch.strided):
                check_gradient(param)
            if param.numel():
                sharded = isinstance(param, DTensor)
                alike.setdefault((param.device, placement_of(param)) if sharded else param.device, []).append(located)
        for some in alike.values():
            device, placement = some[0][1].device, placement_of(some[0][1])
            if placement is WHOLE:
                some = self._step_in_one_call(some, self._backend(device))
            if not some:
                continue
            states = [self.state[param] or self._init_state(group, param, position) for group, param, position in some]
            grads = [param.grad if placement is WHOLE else local_gradient(param) for _, param, _ in some]
            absent = [param.grad is None for _, param, _ in some]
            norms = gradient_norms(grads, absent, placement, self._backend(device))
            plan = self._plans.get(some[0][2])
            if plan is not None and not plan.holds(plan_key(some), [state["step"] for state in states]):
                plan = None
            known = norms.tolist() if reads_are_free(norms.device) else None
            recorded, self._metrics = self._metrics, Metrics()
            with torch.autocast(device.type, enabled=False):  # of a step or backward pass inside the user's
                self._apply_normed(some, states, grads, norms, known, placement, plan)
            self._metrics.reduce(placement)
            recorded.merge(self._metrics)
            self._metrics = recorded

    def _apply_normed(
        self,
        todo: list[Located],
        states: list[dict[str, Tensor]],
        grads: list[Tensor],
        norms: Tensor,
        known: list[float] | None,
        placement: Placement = WHOLE,
        plan: Plan | None = None,
    ) -> None:
        """`_apply` of what lives in one place, given its states, its part of each gradient and every ‖g‖_F: [N] float64, −1 for no gradient.

        On a CPU the host has read the norms (``known``). Otherwise nothing is read: what is not finite is masked on the device.
        """
        finite = None
        if known is None:
            finite = usable(norms)
            self._skips.add_unread(finite, norms)
        elif not all(map(usable, known)):
            finite = usable(norms)
            for norm in known:
                if not usable(norm) and not norm < 0:  # −1 is no gradient at all
                    self._skips.add(norm)
        if plan is None:
            check_held_states(self, todo, states)
            plan = make_plan(
                todo,
                states,
                placement,
                len(self.moments),
                self._backend(todo[0][1].device).factor_temporaries,
            )
        for group, indices in plan.plain:
            taken = [i for i in indices if known is None or usable(known[i])]
            parts = [(*todo[i][1:], states[i], grads[i], norms[i]) for i in taken]
            masks = [finite[i] for i in taken] if known is None else [None] * len(taken)
            items = [make_item(*part, mask, placement) for part, mask in zip(parts, masks)]
            if items:
                adamw_path(group, self._adamw_options(group), items)
        before: Iterator[None] = iter(())
        params = [param for _, param, _ in todo]
        for wave in plan.waves:
            # The rows of this wave while the sums of the one before are on their way; without processes, all of it.
            update = self._update_wave(wave, params, grads, norms, finite)
            next(update, None)
            next(before, None)
            before = update
        next(before, None)
        plan.steps = [state["step"] for state in states]  # only now: the stacks may have put the counters side by side
        self._plans[todo[0][2]] = plan

    def _update_wave(
        self, wave: Wave, params: list[Tensor], grads: list[Tensor], norms: Tensor, finite: Tensor | None
    ) -> Iterator[None]:
        wave.begin(params, grads, norms, finite, self.moments)
        yield from self._update(wave)
        wave.end()

    def _backend(self, device: torch.device) -> Any:
        return backends.choose(self.backend, device, self.backend_names)

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

    def _init_state(self, group: dict[str, Any], param: Tensor, position: int) -> dict[str, Tensor]:
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
        return state

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
