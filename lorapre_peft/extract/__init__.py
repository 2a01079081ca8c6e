"""This package extracts LoRA adapters from the difference of two checkpoints."""

from .lora import ExtractionReport, extract_lora

__all__ = ["ExtractionReport", "extract_lora"]
