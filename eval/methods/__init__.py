"""The methods that `python -m eval.rerun` and the pre-training recipe compare: one entry of `METHODS` each.

An entry says what is trained, how the adapter is made, how the optimizer is built, and where its learning rates lie. To add
one, write its builder and its entry in the file of its family; the runners need no change. Packages are imported inside the
builders, so that one that is missing or broken costs its own rows only (`Method.unavailable`).
"""

from .adapters import ADAPTERS
from .lorapre import LORAPRE
from .method import Method, adam_options
from .pretraining import pretraining_optimizer
from .weights import WEIGHTS

METHODS: dict[str, Method] = {**ADAPTERS, **WEIGHTS, **LORAPRE}

__all__ = ["METHODS", "Method", "adam_options", "pretraining_optimizer"]
