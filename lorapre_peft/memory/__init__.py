"""This package measures the peak memory of a training run where it runs, or estimates it from the model's shapes."""

from .peak import AllocationTracker, MemoryEstimate, estimate, measure

__all__ = ["AllocationTracker", "MemoryEstimate", "estimate", "measure"]
