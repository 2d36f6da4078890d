"""Short causal convolution, depthwise: a private stand-in until the operation is merged."""
