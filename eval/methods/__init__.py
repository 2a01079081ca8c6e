"""This package holds the methods that `python -m eval.rerun` and the pre-training recipe compare.

Each method is one entry of `METHODS`. An entry says what is trained, how the adapter is made, how the optimizer is
built, and where its learning rates lie. To add a method, write its builder and its entry in the file of its family.
The runners need no change. Packages are imported inside the builders, so that a missing or broken package costs only
its own rows (`Method.unavailable`). `python -m eval.methods` prints all methods.
"""

from .adapters import ADAPTERS
from .lorapre import LORAPRE
from .method import Method, adam_options
from .pretraining import pretraining_optimizer
from .weights import WEIGHTS

METHODS: dict[str, Method] = {**ADAPTERS, **WEIGHTS, **LORAPRE}

WITHOUT_ROW = {
    "AdaPM (arXiv 2510.09103)": (
        "its authors announce code and have released none, and only the abstract was at hand, which does not give the "
        "rule of its corrected low-rank momentum"
    ),
    "RunLoRA (arXiv 2312.03415)": (
        "the cheapest order of LoRA's products: the same numbers in another time, which `eval.speed --preset "
        "layers` measures"
    ),
}
"""This maps each method that the comparisons leave out to the reason."""

__all__ = ["METHODS", "WITHOUT_ROW", "Method", "adam_options", "pretraining_optimizer"]
