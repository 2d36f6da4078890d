"""Drop-in modules over the operations."""

from .norm import RMSNorm
from .sliding_window import SlidingWindowAttention

__all__ = ["RMSNorm", "SlidingWindowAttention"]
