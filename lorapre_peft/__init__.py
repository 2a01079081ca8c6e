"""LoRA-Pre for PEFT holds the momenta of Adam and Muon as low-rank factors (Wang et al., arXiv 2602.24283)."""

from importlib import import_module
from typing import Any

from .integrations.config import LoRAPreConfig
from .integrations.create import create_lorapre_optimizer
from .optim.adamw import LoRAPreAdamW
from .optim.in_backward import ddp_update_hook
from .optim.muon import LoRAPreMuon

__version__ = "0.1.0"

__all__ = [
    "LoRAPreAdamW",
    "LoRAPreCallback",
    "LoRAPreConfig",
    "LoRAPreMuon",
    "create_lorapre_optimizer",
    "ddp_update_hook",
    "extract_lora",
    "last_complete_checkpoint",
    "lorapre_optimizer",
]

# These are imported when they are asked for. All but the last bring in transformers' trainer classes.
_LAZY = {
    "LoRAPreCallback": ".integrations.callback",
    "lorapre_optimizer": ".integrations.trainer",
    "last_complete_checkpoint": ".integrations.resume",
    "extract_lora": ".extract",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
