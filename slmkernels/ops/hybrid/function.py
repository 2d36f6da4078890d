"""`hybrid_attention`: the public function, its checks, its autograd, its choice of backend."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import native, triton_support
from ...autocast import as_autocast_wants, autocasts, without_autocast
from ...autograd import Function, apply_function, wants_gradient
from ...dispatch import Operation, operators, register
from ...validation import (
    alike,
    as_dtype,
    check_cu_seqlens,
    check_flag,
    check_float_tensor,
    check_like,
    check_number,
    check_state,
    fail,
    wide,
)
from . import reference, triton_kernels  # noqa: F401  (triton_kernels defines operators)

FORWARD = operators("hybrid_attention_forward")
BACKWARD = operators("hybrid_attention_backward")

ALIGNMENTS = ("sliding", "block")
NO_BOUND = 2**62  # a window this long hides nothing, and position + window would pass 2**63
SEGMENT = 512  # tokens between two states that the forward keeps for the backward, or one window if longer


class Call(NamedTuple):
    """A checked call. mix and states are in float32 (float64 for float64 inputs)."""

    q: Tensor  # [B, T, Hq, D]
    k: Tensor  # [B, S, H, D]; S = T but for a decode step, whose queries stand at the end
    v: Tensor  # [B, S, H, V]
    phi_q: Tensor  # [B, T, Hq, F]
    phi_k: Tensor  # [B, S, H, F]
    mix: Tensor | None  # [Hq]
    initial_state: Tensor | None  # [N, H, F, V]
    initial_normalizer: Tensor | None  # [N, H, F]
    cu_seqlens: Tensor | None  # [N+1]
    window: int
    block: bool  # block alignment
    scale: float


def check_window(window) -> int:
    """An int of at least 1."""
    if type(window) is not int:
        fail("window", window, "an int >= 1", TypeError)
    if window < 1:
        fail("window", window, "an int >= 1")
    return min(window, NO_BOUND)


def check_alignment(alignment) -> bool:
    """True for block alignment."""
    if alignment not in ALIGNMENTS:
        fail("alignment", alignment, f"one of {', '.join(ALIGNMENTS)}")
    return alignment == "block"


def check_tokens(q, k, v, phi_q, phi_k, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The five tensors of a call or of a step. Autocast casts them to `dtype`, to its own if None."""
    if not alike(4, q, k, v, phi_q, phi_k) or autocasts(q):
        tensors = {"q": q, "k": k, "v": v, "phi_q": phi_q, "phi_k": phi_k}
        letters = "[B, T, Hq, D]", "[B, T, Hkv, D]", "[B, T, Hkv, V]", "[B, T, Hq, F]", "[B, T, Hkv, F]"
        for (name, x), shape in zip(tensors.items(), letters, strict=True):
            check_float_tensor(name, x, 4, shape)
        q, k, v, phi_q, phi_k = cast = as_autocast_wants(*tensors.values(), dtype=dtype)
        for name, x in zip(tensors, cast, strict=True):
            check_like(name, x, "q", q)
    (B, T, Hq, D), (k_B, k_T, H, k_D) = q.shape, k.shape
    (v_B, v_T, v_H, V), (phi_B, phi_T, phi_H, F) = v.shape, phi_q.shape
    if D < 1:
        fail("q", q, "a head dimension of at least 1")
    if k_B != B or k_T != T or k_D != D:
        fail("k", k, f"[{B}, {T}, Hkv, {D}] to go with q")
    if H < 1 or Hq < 1 or Hq % H != 0:
        fail("q", q, f"a number of heads that k's {H} heads divide")
    if v_B != B or v_T != T or v_H != H or V < 1:
        fail("v", v, f"[{B}, {T}, {H}, V] to go with k, V at least 1")
    if phi_B != B or phi_T != T or phi_H != Hq or F < 1:
        fail("phi_q", phi_q, f"[{B}, {T}, {Hq}, F] to go with q, F at least 1")
    if phi_k.shape != (B, T, H, F):
        fail("phi_k", phi_k, f"shape {[B, T, H, F]}, to go with k and phi_q")
    return q, k, v, phi_q, phi_k


def check_mix(mix, q: Tensor) -> Tensor | None:
    """One factor per query head, in the dtype of the state."""
    if mix is None:
        return None
    check_float_tensor("mix", mix, 1, "[Hq]")
    if mix.shape[0] != q.shape[2] or mix.device != q.device:
        fail("mix", mix, f"shape [{q.shape[2]}], one factor per query head, on {q.device}")
    return as_dtype(mix, wide(q.dtype))


def prepare(
    q, k, v, phi_q, phi_k, *, window, alignment="sliding", mix=None, scale=None,
    initial_state=None, return_state=False, cu_seqlens=None, backend=None,
) -> Call:  # fmt: skip
    """Check the public arguments and normalise them; the errors a user sees come from here."""
    window, block = check_window(window), check_alignment(alignment)
    q, k, v, phi_q, phi_k = check_tokens(q, k, v, phi_q, phi_k)
    mix = check_mix(mix, q)
    scale = q.shape[3] ** -0.5 if scale is None else check_number("scale", scale)
    N = q.shape[0]
    if cu_seqlens is not None:
        if N != 1:
            fail("q", q, "batch 1 with cu_seqlens (sequences are packed along T)")
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[1], q.device)
        N = cu_seqlens.shape[0] - 1
    states = (None, None)
    if initial_state is not None:
        shape = (N, v.shape[2], phi_q.shape[3], v.shape[3])
        states = check_state("initial_state", initial_state, True, shape, q, "[N, H, F, V]")
        states = (x.to(wide(q.dtype)) for x in states)
    return Call(q, k, v, phi_q, phi_k, mix, *states, cu_seqlens, window, block, scale)


# Best first; the same for the operation and its decode step.
SUPPORTS = {
    "native": native.reason_against_call,
    "triton": triton_support.reason_against,
    "reference": lambda call: None,
}
OPERATION = register(Operation("hybrid_attention", dict(SUPPORTS), prepare))


def segment_length(window: int, block: bool) -> int:
    """Tokens between two states kept for the backward. Blocks of `window` are not cut."""
    return window * max(1, SEGMENT // window) if block else SEGMENT


class HybridAttention(Function):
    """Forward and backward over the operators of one backend.

    Saves the inputs, o, three numbers a row, and a state every `segment` tokens (0: none, no backward
    follows); nothing of size T S.
    """

    @staticmethod
    def forward(
        q, k, v, phi_q, phi_k, mix, state, normalizer, cu_seqlens, window, block, scale, segment, prefix
    ):
        op = FORWARD[prefix]
        tensors = q, k, v, phi_q, phi_k, mix, state, normalizer, cu_seqlens
        return op(*tensors, window, block, scale, segment)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options, ctx.prefix = inputs[:9], inputs[9:13], inputs[13]
        o, _, _, *saved = output
        ctx.save_for_backward(*tensors, o, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dstate, dnormalizer, *_):
        saved = ctx.saved_tensors
        do = torch.zeros_like(saved[9]) if do is None else do
        op = BACKWARD[ctx.prefix]
        gradients = op(do, dstate, dnormalizer, *saved, *ctx.options)
        given = zip(gradients, saved[:8], strict=True)
        return *(gradient if x is not None else None for gradient, x in given), *[None] * 6


def attend(call: Call, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run a checked call on a backend that supports it -> o, state, normalizer."""
    if backend == "reference":
        options = {"window": call.window, "block": call.block, "scale": call.scale}
        with without_autocast(call.q):
            return reference.hybrid_attention(*call[:9], **options)
    segment = 0
    if wants_gradient(*call[:8]):
        segment = segment_length(call.window, call.block)
    prefix = "triton_" if backend == "triton" else ""
    return apply_function(HybridAttention, *call, segment, prefix)[:3]


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    alignment: str = "sliding",
    mix: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Softmax attention to the near keys and linear attention to the far ones, under one normaliser, in time
    linear in T.

        s_ij = scale q_i . k_j,  m_i = max of s_ij over the near j
        w_ij = mix exp(s_ij - m_i)     near j
        w_ij = phi_q_i . phi_k_j       far j: those before the near ones
        o_i  = sum_j w_ij v_j / (sum_j w_ij + 1e-6)

    Args:
        q, k, v: queries `[B, T, Hq, D]`, keys `[B, T, Hkv, D]` and values `[B, T, Hkv, V]`, float32,
            bfloat16, float16 or float64; Hkv divides Hq (GQA, MQA).
        phi_q, phi_k: their features `[B, T, Hq, F]` and `[B, T, Hkv, F]`, like q. Products
            phi_q . phi_k must not be negative (not checked: the sum of the weights divides).
        window: W, an int >= 1.
        alignment: "sliding": the last W keys are near, the query's own included. "block": tokens stand in
            blocks of W; near are those of the query's own block up to itself and of the block before it.
        mix: `[Hq]`, the factor of the near weights, of any of these dtypes; 1 if None.
        scale: factor of the scores, `D ** -0.5` if None.
        initial_state: far keys from before the sequence, a pair: `sum phi_k v^T` `[N, Hkv, F, V]` and
            `sum phi_k` `[N, Hkv, F]` for N sequences (B, or those of cu_seqlens); zeros if None.
        return_state: also return the same pair for the far keys of the last query. The keys that are near to
            it are not in it: to continue a sequence use `hybrid_attention_step`, whose cache has both.
        cu_seqlens: int32 `[N+1]`, offsets of N sequences packed along T (B must be 1); nothing crosses a
            boundary, empty sequences are legal.
        backend: None (best that supports the call), "native", "triton" or "reference".

    Returns:
        o `[B, T, Hq, V]` in q's dtype, and with `return_state` the pair in float32 (float64 for float64
        inputs). Differentiable, once, in every tensor; m's gradient goes to the first key at the maximum.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        Unsupported: the named backend cannot run this call.

    Source: Zhang et al. 2024 (LoLCATs), section 3.2; alignment "block" is what they train with.
    """
    check_flag("return_state", return_state)
    call = prepare(
        q, k, v, phi_q, phi_k, window=window, alignment=alignment, mix=mix, scale=scale,
        initial_state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    o, state, normalizer = attend(call, OPERATION.choose(call, backend))
    return (o, (state, normalizer)) if return_state else o


def fake_forward(
    q, k, v, phi_q, phi_k, mix, state, normalizer, cu_seqlens, window, block, scale, segment
):  # fmt: skip
    """Shapes of the native forward: o, state, normalizer; of each row the shift m, the key at it (its row in
    k) and the sum of the weights; the states, each [state, normalizer], between segments."""
    (B, T, Hq, _), (S, H, V), F = q.shape, v.shape[1:], phi_q.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(B, T, Hq, V),
        q.new_empty(N, H, F, V, dtype=dtype),
        q.new_empty(N, H, F, dtype=dtype),
        q.new_empty(B, Hq, T, dtype=dtype),
        q.new_empty(B, Hq, T, dtype=torch.int32),
        q.new_empty(B, Hq, T, dtype=dtype),
        q.new_empty((B, S // segment, H, F * (V + 1)) if segment else (0,), dtype=dtype),
    )


def fake_backward(
    do, dstate, dnormalizer, q, k, v, phi_q, phi_k, mix, state, normalizer, cu_seqlens, o, shift, top,
    denominator, kept, window, block, scale, segment,
):  # fmt: skip
    """Shapes of the gradients, contiguous; those of absent arguments are empty."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    statistics = (q.new_empty(0 if x is None else x.shape, dtype=dtype) for x in (mix, state, normalizer))
    return *(x.new_empty(x.shape) for x in (q, k, v, phi_q, phi_k)), *statistics


if native.HAS_CPU:
    torch.library.register_fake("slmkernels::hybrid_attention_forward", fake_forward)
    torch.library.register_fake("slmkernels::hybrid_attention_backward", fake_backward)
