"""This module updates each parameter in the backward pass, and frees its gradient, as soon as the gradient is there.

In one process, and under FSDP2, a hook on the parameter does this. FSDP2 calls such hooks on the sharded parameter
after each reduce-scatter, in the same order on every process. Under DDP a parameter's hook runs before the gradient is
averaged, so `ddp_update_hook` does it instead.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Iterable, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import GradBucket, ProcessGroup
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..lowrank.metrics import Metrics
from ..lowrank.sharding import WHOLE, placement_of, world_size
from .state import StatefulOptimizer

# A located parameter is a group, a parameter of the group, and the parameter's position in the optimizer.
Located = tuple[dict[str, Any], Tensor, int]

UPDATED_BY_STEP = (
    "update_in_backward=True in several processes: parameters that are not sharded are updated by step(), as their "
    "gradients are averaged after the backward pass has made them. Under DDP register the hook that updates them "
    "earlier: ddp_model.register_comm_hook(optimizer, lorapre_peft.ddp_update_hook)"
)
# This maps each parameter to its hook, and to the latest optimizer, to which alone the hook belongs.
_HOOKS: MutableMapping[Tensor, tuple[RemovableHandle, weakref.ref]] = WeakTensorKeyDictionary()


def groups_of(located: list[Located]) -> dict[int, dict[str, Any]]:
    """Return the groups of these parameters by their ids, in the order in which they come."""
    groups = [group for group, _, _ in located]
    return dict(zip(map(id, groups), groups))


def register_hooks(optimizer: InBackwardOptimizer, params: Iterable[Tensor]) -> None:
    """Make the backward pass update each parameter after its gradient, if that is the optimizer's way.

    The hooks of earlier optimizers are removed.
    """
    for param in params:
        if param in _HOOKS:
            _HOOKS.pop(param)[0].remove()
        if optimizer.defaults["update_in_backward"] and param.requires_grad:
            alive = weakref.ref(optimizer)
            hook = functools.partial(_update, alive)
            _HOOKS[param] = param.register_post_accumulate_grad_hook(hook), alive


def has_hook(param: Tensor) -> bool:
    """Return whether the backward pass calls an optimizer, which still exists, for this parameter."""
    return param in _HOOKS and _HOOKS[param][1]() is not None


def _update(alive: weakref.ref, param: Tensor) -> None:
    optimizer = alive()
    if optimizer is not None:  # Otherwise nobody can call its step any more.
        optimizer._update_in_backward(param)


class InBackwardOptimizer(StatefulOptimizer):
    """Base of `LoRAPreOptimizer`, with the updates of ``update_in_backward`` and what one backward pass has done.

    A subclass calls `_reset_backward` before anything else, and says how some parameters are stepped (`_step`).
    """

    _metrics: Metrics

    def _reset_backward(self) -> None:
        self._metrics = Metrics()
        # These are the parameters that this backward pass has already updated.
        self._updated: set[Tensor] = set()
        # Hooks look every parameter up here. It stays empty until one does.
        self._places: dict[Tensor, Located] = {}

    def _step(self, located: list[Located]) -> None:
        """Update these parameters."""
        raise NotImplementedError

    def _located(self) -> list[Located]:
        """Return every parameter with its group and position, from the groups as they are now."""
        groups = [group for group in self.param_groups for _ in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        return list(zip(groups, params, itertools.count()))

    def _register_hooks(self, group: dict[str, Any]) -> None:
        """Make the backward pass update the group's parameters, if that is this optimizer's way."""
        register_hooks(self, group["params"])
        self._places.clear()

    def _update_in_backward(self, param: Tensor) -> None:
        """Update a parameter whose gradient the backward pass has just made; the parameter's hook calls this."""
        if world_size() == 1 or placement_of(param) is not WHOLE:
            self._update_one(param)

    def update_averaged(self, param: Tensor) -> None:
        """Update a parameter whose gradient DDP has just averaged; `ddp_update_hook` calls this."""
        if not self.defaults["update_in_backward"]:
            raise ValueError(
                "ddp_update_hook updates parameters in the backward pass: build the optimizer with "
                "update_in_backward=True"
            )
        # In a single process the parameter's own hook has updated it, and the bucket holds nothing more.
        if self._is_own(param) and not (world_size() == 1 and param in self._updated):
            self._update_one(param)

    def _is_own(self, param: Tensor) -> bool:
        """Return whether this optimizer has the parameter; other optimizers may train others of the same model."""
        if not self._places:
            self._places = {located[1]: located for located in self._located()}
        return param in self._places

    @torch.compiler.disable  # As for a step, there is nothing in it to compile.
    @torch.no_grad()
    def _update_one(self, param: Tensor) -> None:
        if param in self._updated:
            raise RuntimeError(
                f"a second backward pass reached a parameter of shape {tuple(param.shape)} before optimizer.step(): "
                "gradients cannot be accumulated with update_in_backward=True, which has already used and freed the "
                "first ones. Call step() after every backward pass (gradient_accumulation_steps=1), checkpoint layers "
                "that are used several times with use_reentrant=False, or use update_in_backward=False"
            )
        if not self._updated:
            self._metrics = Metrics()
        if self._is_own(param) and param.numel():
            self._step([self._places[param]])
        self._updated.add(param)
        param.grad = None

    def _left_over(self, located: list[Located]) -> list[Located]:
        """Return the parameters with a gradient, such as one set by hand, that the backward pass has not updated.

        If an engine has replaced the parameters, or the optimizer that owned their hooks is gone, all parameters with
        a gradient are returned, and new hooks are registered.
        """
        for param in self._updated:  # DDP may have put its emptied bucket in the place of a freed gradient.
            param.grad = None
        found = [(group, param, i) for group, param, i in located if param.grad is not None]
        if any(not has_hook(param) for _, param, _ in found):
            for group in self.param_groups:
                self._register_hooks(group)
        if world_size() > 1 and any(placement_of(param) is WHOLE for _, param, _ in found):
            warnings.warn(UPDATED_BY_STEP, stacklevel=4)
        return found

    def _forget_backward(self) -> None:
        self._updated.clear()
        self._places.clear()  # Somebody may change the groups before the next backward pass.

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as in `torch.optim.Optimizer`.

        A backward pass that broke off under ``update_in_backward`` may be repeated afterwards.
        """
        super().zero_grad(set_to_none)
        self._forget_backward()


def ddp_update_hook(
    state: InBackwardOptimizer | tuple[ProcessGroup, InBackwardOptimizer], bucket: GradBucket
) -> torch.futures.Future[Tensor]:
    """Average a bucket as a communication hook of DDP, and then update each parameter of the bucket.

    Register it with ``ddp_model.register_comm_hook(optimizer, ddp_update_hook)``, for an optimizer with
    ``update_in_backward=True``. A DDP that was made with a ``process_group`` of its own needs
    ``(ddp_model.process_group, optimizer)`` in the optimizer's place. DDP does not tell a hook its group, and without
    it all processes average. DDP keeps its buckets, which are as large as all gradients together. With
    ``gradient_as_bucket_view=True`` the gradients take no memory beside them.
    """
    process_group, optimizer = state if isinstance(state, tuple) else (None, state)
    averaged = allreduce_hook(cast(Any, process_group), bucket).wait()
    for param, grad in zip(bucket.parameters(), bucket.gradients()):
        param.grad = grad
        optimizer.update_averaged(param)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(averaged)
    return done


# DDP compares the annotations with these objects. The import from __future__ makes strings of them, which DDP refuses.
ddp_update_hook.__annotations__ |= {"bucket": GradBucket, "return": torch.futures.Future[Tensor]}
