"""slmkernels: fused attention kernels for small language models, on CPU and GPU, forward and backward."""

from importlib.metadata import PackageNotFoundError, version

from .dispatch import Unsupported, explain, use_backend
from .facts import info
from .ops.causal_conv1d.function import causal_conv1d
from .ops.causal_conv1d.step import causal_conv1d_step
from .ops.experts.function import expert_mlp, segment_mlp
from .ops.experts.route import Routing, route, update_selection_bias
from .ops.hybrid.function import hybrid_attention
from .ops.hybrid.step import HybridCache, hybrid_attention_step
from .ops.linear.function import linear_attention
from .ops.linear.step import linear_attention_step
from .ops.sliding_window.function import sliding_window_attention
from .ops.sliding_window.step import RingCache, sliding_window_attention_step

try:
    __version__ = version("slmkernels")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "HybridCache",
    "RingCache",
    "Routing",
    "Unsupported",
    "causal_conv1d",
    "causal_conv1d_step",
    "expert_mlp",
    "explain",
    "hybrid_attention",
    "hybrid_attention_step",
    "info",
    "linear_attention",
    "linear_attention_step",
    "route",
    "segment_mlp",
    "sliding_window_attention",
    "sliding_window_attention_step",
    "update_selection_bias",
    "use_backend",
]
