"""This module updates each parameter in the backward pass, and frees its gradient, as soon as the gradient is there.

In one process, and under FSDP2, a hook on the parameter does this. FSDP2 calls such hooks on the sharded parameter
after each reduce-scatter, in the same order on every process. Under DDP a parameter's hook runs before the gradient is
averaged, so `ddp_update_hook` does it instead.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

UPDATED_BY_STEP = (
    "update_in_backward=True in several processes: parameters that are not sharded are updated by step(), as their "
    "gradients are averaged after the backward pass has made them. Under DDP register the hook that updates them "
    "earlier: ddp_model.register_comm_hook(optimizer, lorapre_peft.ddp_update_hook)"
)
# This maps each parameter to its hook, which belongs to the latest optimizer alone.
_HOOKS: MutableMapping[Tensor, RemovableHandle] = WeakTensorKeyDictionary()


class Updater(Protocol):
    """Describes an optimizer that updates single parameters."""

    def update_averaged(self, param: Tensor) -> None:
        """Update a parameter with its gradient, which is averaged over the processes."""


def register_hooks(method: Callable[[Any, Tensor], None] | None, owner: Any, params: Iterable[Tensor]) -> None:
    """Make the backward pass call ``method(owner, param)`` after each parameter's gradient, while ``owner`` exists.

    The hooks of earlier owners are removed. If ``method`` is None, no new ones are made.
    """
    for param in params:
        if param in _HOOKS:
            _HOOKS.pop(param).remove()
        if method is not None and param.requires_grad:
            hook = functools.partial(_call, method, weakref.ref(owner))
            _HOOKS[param] = param.register_post_accumulate_grad_hook(hook)


def has_hook(param: Tensor) -> bool:
    """Return whether the backward pass calls an optimizer for this parameter."""
    return param in _HOOKS


def _call(method: Callable[[Any, Tensor], None], owner: weakref.ref, param: Tensor) -> None:
    alive = owner()
    if alive is not None:  # Otherwise nobody can call its step any more.
        method(alive, param)


def ddp_update_hook(optimizer: Updater, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket as a communication hook of DDP, and then update each parameter of the bucket.

    Register it with ``ddp_model.register_comm_hook(optimizer, ddp_update_hook)``, for an optimizer with
    ``update_in_backward=True``. DDP keeps its buckets, which are as large as all gradients together. With
    ``gradient_as_bucket_view=True`` the gradients take no memory beside them.
    """
    averaged = allreduce_hook(cast(Any, None), bucket).wait()
    for param, grad in zip(bucket.parameters(), bucket.gradients()):
        param.grad = grad
        optimizer.update_averaged(param)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(averaged)
    return done


# DDP compares the annotations with these objects. The import from __future__ makes strings of them, which DDP refuses.
ddp_update_hook.__annotations__ |= {"bucket": GradBucket, "return": torch.futures.Future[Tensor]}
