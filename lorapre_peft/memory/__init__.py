"""The peak memory of a training run, measured where it runs, or estimated from the model's shapes."""

from .peak import AllocationTracker, MemoryEstimate, estimate, measure

__all__ = ["AllocationTracker", "MemoryEstimate", "estimate", "measure"]
