"""LoRA-Pre for PEFT: Adam's and Muon's momenta held as low-rank factors (Wang et al., arXiv 2602.24283)."""

from importlib import import_module
from typing import Any

from .adamw import LoRAPreAdamW
from .config import LoRAPreConfig
from .create import create_lorapre_optimizer
from .muon import LoRAPreMuon

__version__ = "0.1.0"

__all__ = [
    "LoRAPreAdamW",
    "LoRAPreCallback",
    "LoRAPreConfig",
    "LoRAPreMuon",
    "create_lorapre_optimizer",
    "lorapre_optimizer",
]


def __getattr__(name: str) -> Any:
    # transformers' trainer classes are imported when they are asked for, not with the package.
    if name in ("LoRAPreCallback", "lorapre_optimizer"):
        return getattr(import_module(".trainer", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
