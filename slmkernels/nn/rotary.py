"""Rotary position embedding (Su et al. 2021), half rotation as in Llama: channel d is paired with d + D/2."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and channel pair, in float32 whatever the model's dtype.

    Args:
        positions: integer `[T]` or `[B, T]`.
        head_dim: D, even.
        base: pair d turns by `base ** (-2 d / D)` radians a position.

    Returns:
        cos, sin `[T, 1, D/2]` or `[B, T, 1, D/2]`: the dimension of size 1 is the heads'.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)  # [D/2]
    angles = positions[..., None].float() * base ** (-pairs / head_dim)  # [..., T, D/2]
    return angles.cos()[..., None, :], angles.sin()[..., None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x `[B, T, H, D]`; computed in float32 at least, returned in x's dtype."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)  # [B, T, H, D/2] each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Positions `[total]` that start again at 0 in every packed sequence; needs no wait for the device."""
    index = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, index.to(cu_seqlens.dtype), right=True) - 1
    return index - cu_seqlens[sequence]
