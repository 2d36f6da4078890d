"""The operations that are validated."""

from . import causal_conv1d, experts, hybrid, linear, route, sliding_window

SUBJECTS = {
    "sliding_window_attention": sliding_window.SUBJECT,
    "linear_attention": linear.SUBJECT,
    "hybrid_attention": hybrid.SUBJECT,
    "causal_conv1d": causal_conv1d.SUBJECT,
    "route": route.SUBJECT,
    "expert_mlp": experts.EXPERT_MLP,
    "segment_mlp": experts.SEGMENT_MLP,
}
