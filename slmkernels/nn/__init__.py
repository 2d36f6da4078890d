"""Drop-in modules over the operations."""

from .expert_lora import ExpertLoRA
from .expert_set import hold_frozen
from .experts import DomainExperts, SparseExperts
from .feature_maps import FEATURE_MAPS, FeatureMap, feature_map
from .feed_forward import FeedForward
from .hybrid_attention import HybridAttention, hybrid_from_softmax
from .linear_attention import LinearAttention
from .linear_cache import LinearCache
from .norm import LayerNorm, RMSNorm
from .sliding_window import SlidingWindowAttention

__all__ = [
    "FEATURE_MAPS",
    "DomainExperts",
    "ExpertLoRA",
    "FeatureMap",
    "FeedForward",
    "HybridAttention",
    "LayerNorm",
    "LinearAttention",
    "LinearCache",
    "RMSNorm",
    "SlidingWindowAttention",
    "SparseExperts",
    "feature_map",
    "hold_frozen",
    "hybrid_from_softmax",
]
