"""Sliding-window attention, the definition: dense scores, a mask, a softmax. Pure PyTorch.

Differentiable by autograd and exact in float64; every kernel is checked against this file.
Letters: B batch, T queries, S keys, Hq query heads, H key-value heads, D head size.
Source: Beltagy et al., Longformer (2020), section 3.1; sinks as in gpt-oss, softcap as in Gemma 2.
"""

from itertools import pairwise

import torch
from torch import Tensor


def visible(
    T: int, S: int, left: int | None, right: int | None, device: torch.device | None = None
) -> Tensor:
    """The window as a mask, bool [T, S]: query t stands at i = t + S - T and sees i-left <= j <= i+right."""
    i = torch.arange(T, device=device)[:, None] + (S - T)
    j = torch.arange(S, device=device)[None, :]
    mask = torch.ones(T, S, dtype=torch.bool, device=device)
    if left is not None:
        mask &= j >= i - left
    if right is not None:
        mask &= j <= i + right
    return mask


def attention(q, k, v, sinks, left, right, scale, softcap):
    """One sequence per batch row -> o [B, T, Hq, Dv] and lse [B, Hq, T], both in the computing dtype."""
    B, T, Hq, _ = q.shape
    S, H = k.shape[1], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.to(dtype).repeat_interleave(Hq // H, dim=2)
    v = v.to(dtype).repeat_interleave(Hq // H, dim=2)
    s = torch.einsum("bthd,bshd->bhts", q.to(dtype), k) * scale  # [B, Hq, T, S]
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible(T, S, left, right, q.device), float("-inf"))
    sink = s.new_tensor(float("-inf")) if sinks is None else sinks.to(dtype)[:, None, None]
    s = torch.cat([s, sink.expand(B, Hq, T, 1)], dim=-1)  # one more column, that carries no value
    empty = (s == float("-inf")).all(dim=-1, keepdim=True)
    s = torch.cat([s, torch.where(empty, 0.0, float("-inf")).to(dtype)], dim=-1)  # keeps softmax off 0 / 0
    lse = torch.logsumexp(s, dim=-1).masked_fill(empty[..., 0], float("-inf"))
    p = torch.softmax(s, dim=-1)[..., :S]
    return torch.einsum("bhts,bshd->bthd", p, v), lse


def sliding_window_attention(
    q, k, v, sinks=None, cu_seqlens=None, cu_seqlens_k=None, *, left, right, scale, softcap=None
) -> tuple[Tensor, Tensor]:
    """The whole operation -> o [B, T, Hq, Dv] in q's dtype, lse [B, Hq, T] in float32 at least."""
    options = (sinks, left, right, scale, softcap)
    if cu_seqlens is None:
        o, lse = attention(q, k, v, *options)
        return o.to(q.dtype), lse
    spans_q = cu_seqlens.tolist()
    spans_k = spans_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    parts = [
        attention(q[:, a:b], k[:, c:d], v[:, c:d], *options)
        for (a, b), (c, d) in zip(pairwise(spans_q), pairwise(spans_k), strict=True)
    ]
    o = torch.cat([part[0] for part in parts], dim=1)
    return o.to(q.dtype), torch.cat([part[1] for part in parts], dim=2)


def sliding_window_attention_step(q, k, v, k_ring, v_ring, position, sinks, scale, softcap):
    """Decoding by the definition: append k, v `[B, n, H, D]` token by token to the rings and attend.

    Rings are `[B, H, W, D]`, slot of token p is p % W; `position` int64 `[B, H]` counts tokens so far.
    Rings and position are updated in place. Returns o `[B, n, Hq, Dv]`.
    """
    W, start = k_ring.shape[2], int(position.flatten()[0]) if position.numel() else 0
    outputs = []
    for t in range(q.shape[1]):
        slot = (start + t) % W
        k_ring[:, :, slot], v_ring[:, :, slot] = k[:, t], v[:, t]
        n = min(start + t + 1, W)  # filled slots; their order does not matter to a softmax
        keys, values = k_ring[:, :, :n].transpose(1, 2), v_ring[:, :, :n].transpose(1, 2)
        o, _ = attention(q[:, t : t + 1], keys, values, sinks, None, None, scale, softcap)
        outputs.append(o.to(q.dtype))
    position += q.shape[1]
    return torch.cat(outputs, dim=1) if outputs else q.new_empty(*q.shape[:3], v.shape[-1])
