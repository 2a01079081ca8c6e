"""Which optimizer updates a parameter as soon as the backward pass has made its gradient."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

# The hook on each parameter: its latest optimizer's only.
_HOOKS: MutableMapping[Tensor, RemovableHandle] = WeakTensorKeyDictionary()


def register_hooks(method: Callable[[Any, Tensor], None] | None, owner: Any, params: Iterable[Tensor]) -> None:
    """Have the backward pass call ``method(owner, param)`` once a parameter's gradient is made, for as long as ``owner`` exists.

    Hooks of earlier owners are removed; with None that is all.
    """
    for param in params:
        if param in _HOOKS:
            _HOOKS.pop(param).remove()
        if method is not None and param.requires_grad:
            hook = functools.partial(_call, method, weakref.ref(owner))
            _HOOKS[param] = param.register_post_accumulate_grad_hook(hook)


def _call(method: Callable[[Any, Tensor], None], owner: weakref.ref, param: Tensor) -> None:
    alive = owner()
    if alive is not None:  # else nobody can call its step any more
        method(alive, param)
