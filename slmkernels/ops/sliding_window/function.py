"""`sliding_window_attention`: the public function, its checks, its autograd, its choice of backend."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import native, triton_support
from ...autocast import as_autocast_wants, autocasts, without_autocast
from ...autograd import Function, apply_function
from ...dispatch import Operation, operators, register
from ...validation import (
    alike,
    as_dtype,
    check_cu_seqlens,
    check_float_tensor,
    check_like,
    check_number,
    fail,
    wide,
)
from . import reference, triton_kernels  # noqa: F401  (triton_kernels defines operators)

FORWARD = operators("sliding_window_forward")
BACKWARD = operators("sliding_window_backward")

NO_BOUND = 2**62  # a side this long hides nothing, and position + side would pass 2**63
Window = int | tuple[int | None, int | None] | None


class Call(NamedTuple):
    """A checked call: window as (left, right), None = unbounded; everything else as the user gave it."""

    q: Tensor  # [B, T, Hq, D]
    k: Tensor  # [B, S, H, D]
    v: Tensor  # [B, S, H, Dv]
    sinks: Tensor | None  # [Hq]
    cu_seqlens: Tensor | None  # [N+1]
    cu_seqlens_k: Tensor | None  # [N+1]
    left: int | None
    right: int | None
    scale: float
    softcap: float | None


def window_bounds(window: Window, causal: bool) -> tuple[int | None, int | None]:
    """The `window` argument as (left, right): query i sees i - left <= j <= i + right, None for no bound."""
    expected = "None, an int >= 1, or a pair (left, right) of ints >= 0 or None"
    if window is None:
        return None, (0 if causal else None)
    if type(window) is int:
        if window < 1:
            fail("window", window, expected)
        if not causal:
            hint = "a pair (left, right) when causal=False; an int counts the keys behind a causal query"
            fail("window", window, hint)
        return (None if window > NO_BOUND else window - 1), 0
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        fail("window", window, expected, TypeError)
    for side in window:
        if side is not None and type(side) is not int:
            fail("window", window, expected, TypeError)
        if side is not None and side < 0:
            fail("window", window, expected)
    left, right = (None if side is None or side >= NO_BOUND else side for side in window)
    return left, (0 if causal else right)


def check_sinks(sinks, q: Tensor) -> None:
    """One logit per query head, on q's device."""
    check_float_tensor("sinks", sinks, 1, "[Hq]")
    if sinks.shape[0] != q.shape[2] or sinks.device != q.device:
        fail("sinks", sinks, f"shape [{q.shape[2]}], one logit per query head, on {q.device}")


def prepare(
    q, k, v, *, window=None, causal=True, scale=None, softcap=None, sinks=None,
    cu_seqlens=None, cu_seqlens_k=None, return_lse=False, backend=None,
) -> Call:  # fmt: skip
    """Check the public arguments and normalise them; the errors a user sees come from here."""
    if not alike(4, q, k, v) or autocasts(q):
        check_float_tensor("q", q, 4, "[B, T, Hq, D]")
        check_float_tensor("k", k, 4, "[B, S, Hkv, D]")
        check_float_tensor("v", v, 4, "[B, S, Hkv, Dv]")
        q, k, v = as_autocast_wants(q, k, v)
        check_like("k", k, "q", q)
        check_like("v", v, "q", q)
    (B, T, Hq, D), (k_B, S, H, k_D), (v_B, v_S, v_H, _) = q.shape, k.shape, v.shape
    if D < 1:
        fail("q", q, "a head dimension of at least 1")
    if k_B != B or k_D != D:
        fail("k", k, f"batch {B} and head dimension {D} like q")
    if v_B != B or v_S != S or v_H != H:
        fail("v", v, f"[{B}, {S}, {H}, Dv] to go with k")
    if H < 1 or Hq % H != 0:
        fail("q", q, f"a number of heads that k's {H} heads divide")
    left, right = window_bounds(window, causal)
    scale = D**-0.5 if scale is None else check_number("scale", scale)
    softcap = None if softcap is None else check_number("softcap", softcap, positive=True)
    if sinks is not None:
        check_sinks(sinks, q)
    if cu_seqlens is not None:
        if B != 1:
            fail("q", q, "batch 1 with cu_seqlens (sequences are packed along T)")
        check_cu_seqlens("cu_seqlens", cu_seqlens, T, q.device)
    if cu_seqlens_k is not None:
        if cu_seqlens is None:
            fail("cu_seqlens_k", cu_seqlens_k, "cu_seqlens beside it")
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, S, q.device)
        if cu_seqlens_k.shape != cu_seqlens.shape:
            sequences = cu_seqlens.shape[0] - 1
            fail("cu_seqlens_k", cu_seqlens_k, f"as many sequences as cu_seqlens, {sequences}")
    elif cu_seqlens is not None and S != T:
        fail("k", k, f"length {T} like q, or cu_seqlens_k")
    return Call(q, k, v, sinks, cu_seqlens, cu_seqlens_k, left, right, scale, softcap)


def reason_against_cuda(call: Call) -> str | None:
    """None where the CUDA C++ kernels take the call by its dtype and shapes, else why not."""
    for name, x in (("q", call.q), ("v", call.v)):
        size = x.shape[-1]
        if size % 8 != 0 or not 8 <= size <= 128:
            return f"{name} has head dimension {size}; CUDA kernels take multiples of 8 from 8 to 128"
    if call.q.shape[1] + call.k.shape[1] >= 2**29:
        return f"q and k have {call.q.shape[1] + call.k.shape[1]} rows; CUDA kernels take fewer than 2^29"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.stride(1) >= 2**31:
            return f"{name} has rows {x.stride(1)} numbers apart; CUDA kernels take fewer than 2^31"
    return native.reason_against_16bit(call.q)


def reason_against_native(call: Call) -> str | None:
    """None where native kernels can run the call, else why not."""
    return native.reason_against(call.q) or (reason_against_cuda(call) if call.q.is_cuda else None)


# Best first.
SUPPORTS = {
    "native": reason_against_native,
    "triton": triton_support.reason_against,
    "reference": lambda call: None,
}
OPERATION = register(Operation("sliding_window_attention", SUPPORTS, prepare))


def _unbounded(side: int | None) -> int:
    return -1 if side is None else side  # the operators' schema has no optional int that costs nothing


class SlidingWindowAttention(Function):
    """Forward and backward over the operators of one backend; saves q, k, v, o, lse, nothing of size T S."""

    @staticmethod
    def forward(q, k, v, sinks, cu_seqlens, cu_seqlens_k, left, right, scale, softcap, prefix):
        return FORWARD[prefix](q, k, v, sinks, cu_seqlens, cu_seqlens_k, left, right, scale, softcap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, sinks, cu_seqlens, cu_seqlens_k, *ctx.options, ctx.prefix = inputs
        ctx.save_for_backward(q, k, v, sinks, cu_seqlens, cu_seqlens_k, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, sinks, cu_seqlens, cu_seqlens_k, o, lse = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        op = BACKWARD[ctx.prefix]
        dq, dk, dv, dsinks = op(do, dlse, q, k, v, o, lse, sinks, cu_seqlens, cu_seqlens_k, *ctx.options)
        return dq, dk, dv, None if sinks is None else dsinks, *[None] * 7


def attend(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """Run a checked call on a backend that supports it -> o, lse."""
    if backend == "reference":
        options = {"left": call.left, "right": call.right, "scale": call.scale, "softcap": call.softcap}
        with without_autocast(call.q):
            return reference.sliding_window_attention(*call[:6], **options)
    if call.sinks is not None:  # statistics are float32 at least
        call = call._replace(sinks=as_dtype(call.sinks, wide(call.q.dtype)))
    bounds = _unbounded(call.left), _unbounded(call.right)
    prefix = "triton_" if backend == "triton" else ""
    arguments = (*call[:6], *bounds, call.scale, call.softcap or 0.0, prefix)
    return apply_function(SlidingWindowAttention, *arguments)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over a window of keys, forward and backward, in time linear in the sequence length.

    Args:
        q: queries `[B, T, Hq, D]`, float32, bfloat16, float16 or float64. Query t stands at position
            `i = t + S - T` (bottom-right alignment).
        k, v: keys `[B, S, Hkv, D]` and values `[B, S, Hkv, Dv]`, like q; Hkv divides Hq (GQA, MQA).
        window: an int W (causal only): the W keys `i-W < j <= i`, itself included. A pair (left, right),
            inclusive: `i-left <= j <= i+right`, None for no bound on a side; causal caps right at 0.
            None: no bound.
        causal: keys after the query's position are hidden.
        scale: factor of the scores, `D ** -0.5` if None.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: `[Hq]`, one learned logit a head that joins the softmax's denominator (and lse) only.
        cu_seqlens: int32 `[N+1]`, offsets of N sequences packed along T (B must be 1); nothing crosses a
            boundary, empty sequences are legal.
        cu_seqlens_k: the same for the keys where they differ from the queries'.
        return_lse: also return the log of the softmax's denominator.
        backend: None (best that supports the call), "native", "triton" or "reference".

    Returns:
        o `[B, T, Hq, Dv]` in q's dtype, and with `return_lse` also lse `[B, Hq, T]` in float32 (float64 for
        float64 inputs). A row that sees no key: o = 0, lse = -inf. Both are differentiable, once.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        Unsupported: the named backend cannot run this call.

    Source: Beltagy et al. 2020 (Longformer), section 3.1; Dao 2023 (FlashAttention-2), section 3.
    """
    call = prepare(
        q, k, v, window=window, causal=causal, scale=scale, softcap=softcap, sinks=sinks,
        cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    o, lse = attend(call, OPERATION.choose(call, backend))
    return (o, lse) if return_lse else o


def _fake_forward(q, k, v, sinks, cu_seqlens, cu_seqlens_k, left, right, scale, softcap):
    B, T, Hq, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(B, T, Hq, v.shape[-1]), q.new_empty(B, Hq, T, dtype=dtype)


def _fake_backward(do, dlse, q, k, v, o, lse, sinks, cu_seqlens, cu_seqlens_k, left, right, scale, softcap):
    def like(x):
        return x.new_empty(x.shape)  # contiguous, whatever x's strides

    return like(q), like(k), like(v), lse.new_empty(q.shape[2] if sinks is not None else 0)


for _prefix in ("",) * native.HAS_CPU + ("triton_",):
    torch.library.register_fake(f"slmkernels::{_prefix}sliding_window_forward", _fake_forward)
    torch.library.register_fake(f"slmkernels::{_prefix}sliding_window_backward", _fake_backward)
