"""Which optimizer updates a parameter as soon as the backward pass has made its gradient."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from .base import LoRAPreOptimizer

# The hook on each parameter: its latest optimizer's only.
_HOOKS: MutableMapping[Tensor, RemovableHandle] = WeakTensorKeyDictionary()


def register_hooks(optimizer: LoRAPreOptimizer, params: Iterable[Tensor]) -> None:
    """Have ``optimizer`` update these parameters in the backward pass, if it does, for as long as it exists; no earlier one any more."""
    for param in params:
        if param in _HOOKS:
            _HOOKS.pop(param).remove()
        if optimizer.defaults["update_in_backward"] and param.requires_grad:
            hook = functools.partial(_update, weakref.ref(optimizer))
            _HOOKS[param] = param.register_post_accumulate_grad_hook(hook)


def _update(owner: weakref.ref[LoRAPreOptimizer], param: Tensor) -> None:
    optimizer = owner()
    if optimizer is not None:  # else nobody can call its step any more
        optimizer.update_in_backward(param)
