"""Short depthwise causal convolution, the definition: each channel a weighted sum of its last W tokens.

Differentiable by autograd and exact in float64; every kernel is checked against this file.
Letters: B batch, T tokens, C channels, W taps, N sequences (B, or those packed along T).
Source: Gu and Dao, Mamba (2023), section 3.4: the convolution before the state-space layer.
"""

from itertools import pairwise

import torch
from torch import Tensor


def convolve(x, weight, bias, initial, silu) -> tuple[Tensor, Tensor]:
    """One sequence per batch row, `initial` [B, W-1, C] or None -> y [B, T, C] and the last W-1 inputs."""
    B, T, C = x.shape
    W = weight.shape[1]
    if initial is None:
        initial = x.new_zeros(B, W - 1, C)
    e = torch.cat([initial, x], dim=1)  # [B, W-1+T, C]
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.new_zeros(1, 1, C, dtype=dtype) if bias is None else bias.to(dtype)
    for w in range(W):
        z = z + weight[:, w].to(dtype) * e[:, w : w + T].to(dtype)
    y = torch.nn.functional.silu(z) if silu else z
    return y.to(x.dtype), e[:, T:]


def causal_conv1d(
    x, weight, bias=None, initial_state=None, cu_seqlens=None, silu=False
) -> tuple[Tensor, Tensor]:
    """The whole operation -> y [B, T, C] in x's dtype and the state after it [N, W-1, C]."""
    if cu_seqlens is None:
        return convolve(x, weight, bias, initial_state, silu)
    parts = [
        convolve(x[:, a:b], weight, bias, None if initial_state is None else initial_state[n : n + 1], silu)
        for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))
    ]
    if not parts:
        return x.new_empty(x.shape), x.new_empty(0, weight.shape[1] - 1, x.shape[2])
    return torch.cat([y for y, _ in parts], dim=1), torch.cat([state for _, state in parts])


def causal_conv1d_step(x, state, weight, bias=None, silu=False) -> Tensor:
    """New tokens x [B, n, C] behind `state` [B, W-1, C], which is updated in place -> y [B, n, C]."""
    y, last = convolve(x, weight, bias, state, silu)
    state.copy_(last)
    return y
