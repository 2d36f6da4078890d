"""Short depthwise causal convolution."""
