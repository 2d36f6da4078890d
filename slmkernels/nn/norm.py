"""Norms that stay in their input's dtype."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + 1e-6) * weight` over the last dimension; the weight starts at 1.

    torch's own, but under autocast, where x is narrower than the weight, the weight follows x: torch would
    leave its fused path and warn.
    """

    def __init__(self, dim: int, **kind):
        super().__init__(dim, eps=1e-6, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """`(x - mean) / sqrt(var + 1e-6) * weight + bias` over the last dimension; starts at 1 and 0."""

    def __init__(self, dim: int, **kind):
        super().__init__(dim, eps=1e-6, **kind)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
