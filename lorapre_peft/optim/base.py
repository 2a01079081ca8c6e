"""This module holds `LoRAPreOptimizer`, the base of both optimizers: groups, state, AdamW path, order of a step.

A subclass defines what it does with the moments of the compressed matrices (`_update`). How factors follow a gradient
is in ``lowrank/rules.py``. Which matrices are stepped together is in ``lowrank/layout.py``: a `Layout` has one `Part`
for each device and each set of processes that share rows, and a part has

* tables (``kernels/table.py``), whose matrices a backend with kernels for the whole step takes at once,
* batches of equal matrices (``lowrank/batch.py``), whose steps are tensor operations,
* plain parameters, which take the AdamW path.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..kernels import choose
from ..kernels.eager import Eager
from ..lowrank.batch import Batch, usable
from ..lowrank.constants import constants
from ..lowrank.float64 import reads_are_free
from ..lowrank.layout import Layout, Member, Part, lay_out, parts_of
from ..lowrank.metrics import Metrics
from ..lowrank.rules import RULES
from ..lowrank.sharding import WHOLE, local, placement_of
from .adamw_path import AdamWOptions, Item, adamw_path
from .bare import is_embedding, warn_of_choice
from .gradients import Skips, gradient_norms, kind_of_gradient, local_gradient, takes_part
from .in_backward import InBackwardOptimizer, Located, groups_of
from .options import (
    check_flattened_shards,
    check_gradient,
    check_options,
    check_parameter,
    check_stack,
    check_uncompressed,
    one_of,
    warn_of_misspelt,
    without_round_off,
)
from .state import OF_PLACES, RANK_OPTIONS, STACK_OPTIONS

NO_GRADIENT = (
    "step() found no gradient on any of its parameters: call it after loss.backward(), and make the optimizer from "
    "the parameters that are trained, after fully_shard and whatever else puts new ones into the model"
)
_kind = operator.attrgetter("shape", "dtype", "device")


class LoRAPreOptimizer(InBackwardOptimizer):
    """Implements what `LoRAPreAdamW` and `LoRAPreMuon` have in common, options included. It is not for direct use.

    Args:
        params, defaults: as in `torch.optim.Optimizer`; ``defaults`` holds all options of a group. Those that both
            optimizers have are:

            momentum_rank: rank k ≥ 1 of the momentum. With 0 all parameters take the AdamW path. None stands for 8,
                or for a quarter of a matrix's smaller side if that is less, and at least 1. A group that has a
                ``momentum_rank`` of its own, as those of `create_lorapre_optimizer` have, is compressed as it says,
                embeddings included. In other groups matrices that are plainly embeddings or heads (`is_embedding`)
                take the AdamW path.
            update_rule: ``"als"`` or ``"newton"``.
            residual_weight: ρ of ``als``, in [0, 1]. None stands for 1.
            update_scale: factor > 0 on the update of compressed matrices. The paper's pre-training uses 0.25, as
                GaLore does.
            max_param_grad_norm: norm > 0 to which each parameter's gradient is clipped by itself. None means no
                clipping.
            bf16_rounding: how bfloat16 parameters are rounded. ``"stochastic"`` keeps the mean of updates that are too
                small for bfloat16's 8 bits, and ``"nearest"`` does not. The random bits depend on (seed, step,
                parameter) alone.
            update_in_backward: whether each parameter is updated, and its gradient freed, as soon as `backward` has
                made the gradient. `step` then only closes the step. This excludes gradient accumulation, global-norm
                clipping and GradScaler. In several processes it works under FSDP2, and under DDP with
                `ddp_update_hook`.
            temporary_bytes: bound on all temporaries of a compressed matrix's step together. None means 64 MB, and
                512 MB for what a GPU steps in batches (Muon, momentum ranks above 16, sharded matrices and the AdamW
                path). Muon's orthogonalization, which needs the whole matrix, and what each thread of
                ``backend="cpp"`` holds (``kernels/cpp.py``) do not count towards it.
            maximize: whether the objective is maximized.
            seed: whole number ≥ 0, for the start of ``newton`` and for stochastic rounding. No step reads torch's
                global generator.
            experts, experts_dim: keys of a group, not of the constructor. Every parameter of such a group holds the
                matrices of so many experts. They lie one after the other (0, the default: [experts, p, q] or
                [experts · p, q]), or interleaved along the last dimension (−1: [p, q · experts]). Each expert gets
                factors of its own, and is left alone where its gradient is exactly zero (an expert without tokens).
                State tensors then have a leading dimension of experts.
        backend: how the step of compressed matrices is computed. ``"cpp"`` is for CPUs under Linux, with kernels from
            the wheel or from a C++ compiler, which runs once for a few seconds. ``"triton"`` is for CUDA and needs the
            package triton. ``"compiled"`` uses `torch.compile`, whose first step takes seconds. ``"eager"`` runs
            everywhere. ``"auto"`` takes C++ or Triton where they run, else eager. The results are the same to float32
            round-off. The backend is not saved in checkpoints.

    Attributes:
        skipped_updates: how many updates of single parameters were skipped since construction, for a gradient that is
            not finite or whose square float32 cannot hold.
        record_metrics: whether `metrics` are kept of a step. It has to be set before the backward pass, and on every
            process.
    """

    backend_names = choose.NAMES
    # Matrices that are stepped together have these options in common. The other options are numbers of each matrix.
    shared_options: tuple[str, ...] = ("update_rule", "bf16_rounding", "temporary_bytes")

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str):
        one_of("backend", backend, self.backend_names)
        self._reset(backend)
        self._constructed = False
        super().__init__(params, {**defaults, "experts": None, "experts_dim": 0})
        self._constructed = True
        warn_of_choice(self.param_groups, self.ranks, stacklevel=4)

    def _reset(self, backend: str) -> None:
        self.backend = backend
        self.record_metrics = False
        self._constructed = True
        self._checked: dict[int, list[Any]] = {}
        self._reset_backward()
        # The key is the position of a step's first parameter.
        self._layouts: dict[int, Layout] = {}
        self._skips = Skips()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = state.pop("backend", None)
        super().__setstate__(state)
        # Unpickling and deepcopy restore only the groups, the state and the backend.
        if "record_metrics" not in self.__dict__:
            self._reset(backend)
            for group in self.param_groups:
                self._register_hooks(group)
        self._places.clear()

    # ---- groups ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`; its options are checked like the constructor's."""
        told, stacklevel = param_group.get("momentum_rank") is not None, 3 if self._constructed else 6
        warn_of_misspelt(param_group, {"params", *OF_PLACES, *self.defaults}, stacklevel)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = group.get("param_names") or [None] * len(group["params"])
        alike = Counter(param.shape for param in group["params"])
        found = [
            i for i, param in enumerate(group["params"]) if is_embedding(names[i], param.shape, alike[param.shape])
        ]
        group.setdefault("uncompressed", [] if told else found)
        self._resolve(group)
        try:
            self.check_group(group)
            for param in group["params"]:
                if param.requires_grad:  # Of frozen parameters any will do, such as a quantised model's bytes.
                    check_parameter(param)
                check_stack(param, group)
        except Exception:
            self.param_groups.pop()
            raise
        self._register_hooks(group)
        # `check_flattened_shards` reads this to notice an engine that has replaced the matrices by flattened shards.
        group["num_params"] = len(group["params"])
        group["num_matrices"] = sum(param.ndim >= 2 for param in group["params"])
        if self._constructed:  # The constructor says it of all its groups at once.
            warn_of_choice([group], self.ranks, stacklevel=3)

    def _resolve(self, group: dict[str, Any]) -> None:
        """Replace options that are None by what they stand for, so that checkpoints hold the actual values."""
        rule = RULES.get(group["update_rule"])
        if group["residual_weight"] is None and rule is not None:
            group["residual_weight"] = rule.residual_weight

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for an option out of its range."""
        check_options(group)
        if group["update_in_backward"] != self.defaults["update_in_backward"]:
            raise ValueError("update_in_backward is an option of the whole optimizer: give it to the constructor")
        self._check_decays(group)

    def _check_decays(self, group: dict[str, Any]) -> None:
        """Raise ValueError for decay rates out of their range."""
        raise NotImplementedError

    def _check_edited(self, group: dict[str, Any]) -> None:
        """Raise ValueError for options that a scheduler or the user has moved out of their range.

        The host reads no tensor on a device. A learning rate below 0 is let be.
        """
        found = [id(value) if isinstance(value, Tensor) else value for value in map(group.get, self.defaults)]
        if self._checked.get(id(group)) == found:
            return
        if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in group.values()):
            self._check_decays(group)
        else:
            self.check_group(without_round_off(group))
        self._checked[id(group)] = [list(value) if isinstance(value, list) else value for value in found]

    def _adamw_options(self, group: dict[str, Any]) -> AdamWOptions:
        """Return the hyperparameters of the AdamW path of ``group`` at its current learning rate."""
        raise NotImplementedError

    # ---- the step -------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # There is nothing in it to compile, and tracing it takes seconds.
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step.

        closure: reevaluates the model and returns the loss, as in `torch.optim`. Returns the closure's value or None.
        Raises RuntimeError for a sparse or complex gradient or one of another shape, and where an engine has replaced
        matrices by flat shards, and ValueError for options out of their range and for a state that no longer fits,
        before anything has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.defaults["update_in_backward"]:
            self._metrics = Metrics()
        check_flattened_shards(self.param_groups)
        check_uncompressed(self.param_groups)
        located = self._located()
        if self.defaults["update_in_backward"]:
            # Parameters that have been taken out of the groups are not held.
            self._layouts = {first: layout for first, layout in self._layouts.items() if first < len(located)}
            left_over = self._left_over(located)
            # After a step without any gradient the layout is asked for, which says so.
            idle = not left_over and not self._updated
            located = [found for found in located if placement_of(found[1]) is WHOLE] if idle else left_over
        self._step(located)
        self._forget_backward()
        return loss

    def _step(self, located: list[Located]) -> None:
        """Update these parameters, separately for each device and for each set of processes that shares them."""
        for group in groups_of(located).values():
            self._resolve(group)  # An option may have been edited.
            self._check_edited(group)
        for part in self._layout(located):
            self._step_part(part)

    def _layout(self, located: list[Located]) -> list[Part]:
        """Return which of these parameters, among those that take part, are stepped together.

        The answer of the last step is kept as long as nothing about the parameters has changed.
        """
        if not located:
            return []
        groups, params, positions = zip(*located)
        names = (*RANK_OPTIONS, *STACK_OPTIONS, *self.shared_options)
        options = {
            key: (self.backend, *group.get("uncompressed", ()), *map(group.get, names))
            for key, group in groups_of(located).items()
        }
        kinds = [*map(_kind, params), *map(kind_of_gradient, params)]
        kept = self._layouts.get(positions[0])
        if kept is None or not kept.describes([*groups, *params], options, kinds):
            taking_part = [(group, param, i) for group, param, i in located if takes_part(param)]
            if not taking_part and any(param.requires_grad for param in params):
                warnings.warn(NO_GRADIENT, stacklevel=7)
            for _, param, _ in taking_part:
                if param.grad is not None:
                    check_gradient(param)
            members = [
                Member(group, param, i, self.ranks(param, group), self.state_shapes(param, group))
                for group, param, i in taking_part
            ]
            for member in members:
                self._state_of(member)  # What no longer fits its state is an error before anything has changed.
            parts = parts_of(members)
            for part in parts:
                self._divide(part)
            kept = self._layouts[positions[0]] = Layout([*groups, *params], options, kinds, parts)
        return kept.parts

    def _divide(self, part: Part) -> None:
        """Fill in which members of a part are stepped together."""
        lay_out(part, lambda group: tuple(map(group.get, self.shared_options)))

    def _step_part(self, part: Part) -> None:
        """Update the parameters of one device that the same processes share, batch by batch."""
        members, matrices, placement, backend = part.members, part.matrices, part.placement, self._backend(part.device)
        states = part.split_states(self._state_of(member) for member in members)
        if not matrices:
            return
        whole = placement is WHOLE
        own: list[Any] = [
            member.param.grad if whole and member.stack is None else local_gradient(member.param) for member in members
        ]
        grads = part.split(own)
        norms = gradient_norms(grads, [matrix.param.grad is None for matrix in matrices], placement, backend)
        stacked = tuple(matrix.stack is not None for matrix in matrices)
        if any(stacked):  # An expert without tokens counts as one without a gradient.
            idle = (norms == 0) & constants(stacked, norms.device, torch.bool)
            norms = norms.masked_fill(idle, -1)
        recorded, self._metrics = self._metrics, Metrics()
        with torch.autocast(part.device.type, enabled=False):  # The step may run inside the user's autocast.
            self._update_part(part, states, grads, norms, *self._usable(norms))
        self._metrics.reduce(placement)
        recorded.merge(self._metrics)
        self._metrics = recorded

    def _update_part(
        self,
        part: Part,
        states: list[dict[str, Tensor]],
        grads: list[Tensor],
        norms: Tensor,
        taken: list[bool],
        update: Tensor | None,
    ) -> None:
        """Update the matrices of a part.

        norms: ‖g‖_F of each matrix, [N] float64. taken, update: what `_usable` returns for them.
        """
        members, placement = part.matrices, part.placement
        params = part.split(local(member.param) for member in part.members)
        for indices in part.plain:
            group = members[indices[0]].group
            masks = {i: None if update is None else update[i] for i in indices if taken[i]}
            items = [Item(members[i], grads[i], states[i], norms[i], mask, placement) for i, mask in masks.items()]
            if items:
                adamw_path(group, self._adamw_options(group), items)
        waiting: Iterator[None] = iter(())
        for indices in part.batches:
            kept = [i for i in indices if taken[i]]
            if not kept:
                continue
            order = constants(tuple(kept), norms.device, torch.int64)
            mask = None if update is None else update.gather(0, order)
            chosen = (
                [members[i] for i in kept],
                [params[i] for i in kept],
                [states[i] for i in kept],
                [grads[i] for i in kept],
            )
            # This computes the rows of this batch while the sums of the one before travel between processes. In a
            # single process it takes the whole step of this batch.
            current = self._update(Batch(*chosen, norms.gather(0, order), mask, placement))
            next(current, None)
            next(waiting, None)
            waiting = current
        next(waiting, None)

    def _usable(self, norms: Tensor) -> tuple[list[bool], Tensor | None]:
        """Return which matrices are stepped, from their gradients' norms [N], and which of those are updated.

        The second is [N] bool, or None for all. On a CPU the host reads the norms. Elsewhere it reads nothing, and
        what is not usable is masked on the device.
        """
        update = self._count_skips(norms)
        return (update.tolist(), None) if reads_are_free(norms.device) else ([True] * len(norms), update)

    def _count_skips(self, norms: Tensor) -> Tensor:
        """Return which gradients of these norms [N] can be used: [N] bool. Count those that exist and cannot be."""
        update = usable(norms)
        if not reads_are_free(norms.device):
            self._skips.add_unread(update, norms)
        elif not update.all():
            for norm in norms[~update].tolist():
                if not norm < 0:  # A norm of −1 stands for no gradient at all.
                    self._skips.add(norm)
        return update

    def _update(self, batch: Batch) -> Iterator[None]:
        """Take one step with a batch of compressed matrices, in place: their parameters and their factors.

        The generator stops at most once, while it waits for a collective.
        """
        raise NotImplementedError

    def _backend(self, device: torch.device) -> Eager:
        return choose.choose(self.backend, device, self.backend_names)

    @property
    def skipped_updates(self) -> int:
        """Return how many updates of single parameters were skipped since construction.

        An update is skipped for a gradient that is not finite or whose square float32 cannot hold. Reading the count
        synchronises the devices, and warns of the first such gradient that it sees.
        """
        return self._skips.count()

    # ---- what a run can look at -----------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return what the last step saw over all compressed matrices: an empty dict without `record_metrics`.

        captured_energy: share of ‖g‖² inside the row space of m_A, 0 to 1, before that step's update of m_A.
        largest_update, clamped_share: largest |m̂/(√v̂+ε)| before any clamp, and the share of entries that ``als``
        clamped (`LoRAPreAdamW` only). Where experts are sharded, the figures are those of this process's own. Reading
        them synchronises the device.
        """
        return self._metrics.read()
