"""Drop-in modules over the operations."""

from .feature_maps import FEATURE_MAPS, FeatureMap, feature_map
from .hybrid_attention import HybridAttention, hybrid_from_softmax
from .linear_attention import LinearAttention
from .linear_cache import LinearCache
from .norm import LayerNorm, RMSNorm
from .sliding_window import SlidingWindowAttention

__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "HybridAttention",
    "LayerNorm",
    "LinearAttention",
    "LinearCache",
    "RMSNorm",
    "SlidingWindowAttention",
    "feature_map",
    "hybrid_from_softmax",
]
