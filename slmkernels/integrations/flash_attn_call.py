"""`sliding_window_attention` in FlashAttention's conventions, and what its key-value cache asks for."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from ..dispatch import Unsupported
from ..nn.rotary import rotate
from ..ops.sliding_window.function import sliding_window_attention
from ..validation import check_flag, check_float_tensor, check_number, expect, fail
from .arguments import call_renamed, refuse_unless_none

Window = tuple[int, int]
Result = Tensor | tuple[Tensor, Tensor, Tensor]
NO_PAGES = "keys and values lie in one piece, not in pages"
NO_BIAS = "scores have no position bias"


def bounds(window_size) -> tuple[int | None, int | None]:
    """FlashAttention's window in ours: None for no bound."""
    expected = "a pair (left, right) of ints, -1 for no bound on that side"
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    good = pair and all(type(side) is int for side in window_size)
    expect(good, "window_size", window_size, expected, TypeError)
    expect(min(window_size) >= -1, "window_size", window_size, expected)
    left, right = (None if side == -1 else side for side in window_size)
    return left, right


def attend(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
    return_attn_probs, cu_seqlens_q=None, cu_seqlens_k=None, offsets_name="cu_seqlens_q",
) -> Result:  # fmt: skip
    """One call with q, k, v `[B, T, H, D]`. `offsets_name`: that of cu_seqlens_q in errors."""
    if check_number("dropout_p", dropout_p) != 0:
        fail("dropout_p", dropout_p, "0: attention has no dropout here", Unsupported)
    refuse_unless_none("alibi_slopes", alibi_slopes, NO_BIAS)
    check_flag("deterministic", deterministic)
    check_flag("return_attn_probs", return_attn_probs)
    softcap = check_number("softcap", softcap)
    o, lse = call_renamed(
        sliding_window_attention, {"scale": "softmax_scale", "cu_seqlens": offsets_name}, q, k, v,
        window=bounds(window_size), causal=check_flag("causal", causal), scale=softmax_scale,
        softcap=softcap if softcap > 0 else None, cu_seqlens=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        return_lse=True,
    )  # fmt: skip
    return (o, lse, q.new_empty(0)) if return_attn_probs else o


def attend_packed(q, k, v, *options, cu_seqlens_q, cu_seqlens_k, offsets_name="cu_seqlens_q") -> Result:
    """The same with q, k, v `[total, H, D]`."""
    for name, x, total in (("q", q, "total_q"), ("k", k, "total_k"), ("v", v, "total_k")):
        check_float_tensor(name, x, 3, f"[{total}, H, D]")
    for name, x in ((offsets_name, cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        expect(isinstance(x, Tensor), name, x, "an int32 tensor [N+1]", TypeError)
    packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "offsets_name": offsets_name}
    result = attend(q[None], k[None], v[None], *options, **packed)
    return result[0] if isinstance(result, Tensor) else (result[0][0], result[1][0], result[2])


def unpack(name: str, packed: Tensor, parts: int, letters: str) -> tuple[Tensor, ...]:
    """k, v or q, k, v as views."""
    check_float_tensor(name, packed, letters.count(",") + 1, letters)
    expect(packed.shape[-3] == parts, name, packed, letters)
    return packed.unbind(-3)


def row_numbers(name: str, value, B: int, low: int, high: int) -> list[int] | None:
    """An int32 tensor `[B]` of numbers from low to high, as a list; None stays."""
    if value is None:
        return None
    good = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
    expect(good, name, value, "an int32 tensor [B]", TypeError)
    expect(value.shape == (B,), name, value, f"shape [{B}], one for each row of q")
    numbers = value.tolist()
    expect(all(low <= number <= high for number in numbers), name, numbers, f"numbers from {low} to {high}")
    return numbers


def check_new(k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, B: int) -> int:
    """How many tokens k, v are to be appended, after a look whether all fit together."""
    shape = list(k_cache.shape[:3])
    expect(
        list(v_cache.shape[:3]) == shape, "v_cache", v_cache, f"{shape} and a head dimension, like k_cache"
    )
    expect((k is None) == (v is None), "v", v, "given with k, and only with it")
    if k is None:
        return 0
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        shape = [B, k.shape[1], *cache.shape[2:]]
        good = list(x.shape) == shape and x.dtype == cache.dtype and x.device == cache.device
        expect(good, name, x, f"{cache.dtype} {shape} on {cache.device}, to go into {name}_cache")
    return k.shape[1]


def append(cache: Tensor, x: Tensor, rows: list[int] | None, lengths: list[int]) -> None:
    """Write x `[B, n, H, D]` into rows of the cache `[Bc, S, H, D]`, behind the first `lengths` tokens."""
    if rows is None and len(set(lengths)) == 1:  # a slice, which does not wait for a GPU
        cache[:, lengths[0] : lengths[0] + x.shape[1]] = x
        return
    row = torch.tensor(range(len(lengths)) if rows is None else rows, device=cache.device)
    first = torch.tensor(lengths, device=cache.device)
    cache[row[:, None], first[:, None] + torch.arange(x.shape[1], device=cache.device)] = x


def rotation(cos, sin, q: Tensor, interleaved: bool) -> Callable[[Tensor, list[int], Tensor], Tensor]:
    """turn(x, lengths, ahead): the first R channels of x `[B, n, H, D]`, turned by lengths + ahead."""
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_float_tensor(name, table, 2, "[positions, R / 2]")
        good = table.shape == cos.shape and 2 * table.shape[1] <= q.shape[3] and table.device == q.device
        expect(good, name, table, f"[positions, R / 2] with R up to {q.shape[3]}, on {q.device}")
    half = cos.shape[1]

    def turn(x: Tensor, lengths: list[int], ahead: Tensor) -> Tensor:
        at = torch.tensor(lengths)[:, None] + ahead  # [B, n]
        needed = int(at.max()) + 1 if at.numel() else 0
        expect(needed <= len(cos), "rotary_cos", cos, f"a table of at least {needed} positions")
        at = at.to(x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        turns = [table[at][:, :, None].to(dtype) for table in (cos, sin)]
        pairs, rest = x[..., : 2 * half], x[..., 2 * half :]
        if interleaved:  # as two halves, and back
            pairs = rotate(pairs.unflatten(-1, (half, 2)).mT.flatten(-2), *turns)
            pairs = pairs.unflatten(-1, (2, half)).mT.flatten(-2)
        else:
            pairs = rotate(pairs, *turns)
        return torch.cat([pairs, rest], -1)

    return turn


def attend_spans(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: list[int] | None, spans: list[tuple[int, int]], options
) -> tuple[Tensor, Tensor]:
    """Row b of q `[B, T, Hq, D]` attends to tokens spans[b] of its row of the caches: o, lse `[B, Hq, T]`."""
    B, T = q.shape[:2]
    if len(set(spans)) <= 1:
        at = slice(None) if rows is None else torch.tensor(rows, device=q.device)
        a, b = spans[0] if spans else (0, 0)
        return attend(q, k_cache[at][:, a:b], v_cache[at][:, a:b], *options)[:2]
    at = list(zip(range(B) if rows is None else rows, spans, strict=True))
    k, v = (torch.cat([cache[row, a:b] for row, (a, b) in at]) for cache in (k_cache, v_cache))
    offsets = [T * row for row in range(B + 1)], list(accumulate((b - a for a, b in spans), initial=0))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in offsets)
    o, lse, _ = attend_packed(q.flatten(0, 1), k, v, *options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    return o.unflatten(0, (B, T)), lse.unflatten(1, (B, T)).transpose(0, 1).contiguous()
