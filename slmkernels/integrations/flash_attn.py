"""FlashAttention's functions over our operator: `import slmkernels.integrations.flash_attn as flash_attn`.

Names, arguments, their order and defaults are those of flash-attn 2.8, and so is what comes back. They run
wherever `sliding_window_attention` does, on CPUs too, in float32, bfloat16, float16 and float64, for heads of
any size.

Arguments with one meaning throughout:
    q: `[B, T, Hq, D]`; packed sequences lie behind each other, `[total_q, Hq, D]`.
    k, v: `[B, S, H, D]`, H divides Hq; packed `[total_k, H, D]`.
    softmax_scale: factor of the scores, `D ** -0.5` if None.
    causal: query t stands at position `t + S - T` (bottom-right alignment) and sees no later key.
    window_size: (left, right), both inclusive, -1 for no bound on that side; (W - 1, 0) are W keys.
    softcap: scores become `softcap * tanh(score / softcap)`; 0 or less for none.
    cu_seqlens_q, cu_seqlens_k: int32 `[N+1]`, offsets of the sequences.
    max_seqlen_q, max_seqlen_k, num_splits: what a launch there is sized by; without effect on the result.
    deterministic: results are always the same bits in every run.
    return_attn_probs: the result is (o, lse, an empty tensor), as there without dropout; lse `[B, Hq, T]` or
        `[Hq, total_q]`, float32 at least.
    dropout_p other than 0, alibi_slopes, block_table: `Unsupported`.

A row that sees no key: o = 0 and lse = -inf (FlashAttention: inf). lse has a gradient here.

Raises, throughout:
    TypeError, ValueError: an argument is not as above; the message names it.
    Unsupported: an argument that has no counterpart here is set; the message names it and what is supported.
"""

import torch
from torch import Tensor

from ..validation import check_flag, check_float_tensor, expect, fail
from .arguments import refuse_unless_none
from .flash_attn_call import (
    NO_BIAS,
    NO_PAGES,
    Result,
    Window,
    append,
    attend,
    attend_packed,
    attend_spans,
    bounds,
    check_new,
    rotation,
    row_numbers,
    unpack,
)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """q `[B, T, Hq, D]`, k, v `[B, S, H, D]` -> o `[B, T, Hq, D]`."""
    return attend(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """q `[B, T, Hq, D]`, kv `[B, S, 2, H, D]` -> o `[B, T, Hq, D]`."""
    k, v = unpack("kv", kv, 2, "[B, S, 2, H, D]")
    return attend(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """qkv `[B, T, 3, H, D]` -> o `[B, T, H, D]`."""
    q, k, v = unpack("qkv", qkv, 3, "[B, T, 3, H, D]")
    return attend(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Result:  # fmt: skip
    """Packed sequences: q `[total_q, Hq, D]`, k, v `[total_k, H, D]` -> o `[total_q, Hq, D]`."""
    refuse_unless_none("block_table", block_table, NO_PAGES)
    return attend_packed(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """Packed sequences: q `[total_q, Hq, D]`, kv `[total_k, 2, H, D]` -> o `[total_q, Hq, D]`."""
    k, v = unpack("kv", kv, 2, "[total_k, 2, H, D]")
    return attend_packed(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:  # fmt: skip
    """Packed sequences: qkv `[total, 3, H, D]` -> o `[total, H, D]`."""
    q, k, v = unpack("qkv", qkv, 3, "[total, 3, H, D]")
    return attend_packed(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, offsets_name="cu_seqlens",
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None,
    num_splits: int = 0, return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Decoding: append k, v to the caches, in place, and attend q `[B, T, Hq, D]` to them. No gradients.

    Args:
        k_cache, v_cache: `[Bc, S, H, D]`.
        k, v: `[B, n, H, D]`, new tokens, written behind those that are there; None to only attend.
        rotary_cos, rotary_sin: `[positions, R / 2]`, with k only. The first R channels of q and k are turned
            by their positions in the cache; all of q by its first one's, if neither causal nor windowed.
        rotary_interleaved: pairs are channels 0 and 1, 2 and 3, ...; else 0 and R / 2, 1 and R / 2 + 1, ...
        cache_seqlens: tokens in each row of the caches, an int or int32 `[B]`; None, without k: all of them.
        cache_batch_idx: int32 `[B]`, the rows of the caches that belong to q's; None: the same rows.
        cache_leftpad: int32 `[B]`, where each row begins; 0 if None.
        return_softmax_lse: the result is (o, lse), lse `[B, Hq, T]`.

    A tensor of lengths or rows is read on the host, which waits for a GPU. Rows of one length are read in
    place (copied with cache_batch_idx), rows of different lengths are packed first. For a cache of the
    window's size, that wraps, there is `sliding_window_attention_step`.
    """
    refuse_unless_none("block_table", block_table, NO_PAGES)
    refuse_unless_none("alibi_slopes", alibi_slopes, NO_BIAS)
    check_flag("return_softmax_lse", return_softmax_lse)
    windowed = bounds(window_size) != (None, None)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if x is not None or name not in ("k", "v"):
            check_float_tensor(name, x, 4, "[B, T, H, D]")
            if torch.is_grad_enabled() and x.requires_grad:
                fail(name, x, "no gradient: decode under torch.no_grad() or torch.inference_mode()")
    B, T = q.shape[:2]
    rows = row_numbers("cache_batch_idx", cache_batch_idx, B, 0, k_cache.shape[0] - 1)
    if rows is None:
        expect(k_cache.shape[0] == B, "k_cache", k_cache, f"batch {B} like q, or cache_batch_idx")
    n, capacity = check_new(k, v, k_cache, v_cache, B), k_cache.shape[1]
    if k is not None:
        expect(cache_seqlens is not None, "cache_seqlens", None, "an int, or an int32 tensor [B], with k")
    if type(cache_seqlens) is int:
        cache_seqlens = torch.full((B,), cache_seqlens, dtype=torch.int32)
    lengths = row_numbers("cache_seqlens", cache_seqlens, B, 0, capacity - n) or [capacity] * B
    starts = row_numbers("cache_leftpad", cache_leftpad, B, 0, capacity) or [0] * B
    good = all(start <= length for start, length in zip(starts, lengths, strict=True))
    expect(good, "cache_leftpad", starts, f"at most cache_seqlens, {lengths}")
    if rotary_cos is not None or rotary_sin is not None:
        expect(k is not None, "rotary_cos", rotary_cos, "None without k")
        ahead = torch.arange(T if causal or windowed else 1)
        turn = rotation(rotary_cos, rotary_sin, q, check_flag("rotary_interleaved", rotary_interleaved))
        q, k = turn(q, lengths, ahead), turn(k, lengths, torch.arange(n))
    if k is not None:
        append(k_cache, k, rows, lengths)
        append(v_cache, v, rows, lengths)
    spans = [(start, length + n) for start, length in zip(starts, lengths, strict=True)]
    options = 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False, True
    o, lse = attend_spans(q, k_cache, v_cache, rows, spans, options)
    return (o, lse) if return_softmax_lse else o
