"""Decoding: tokens one at a time through a state that is updated in place, in constant memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...autograd import mark_changed
from ...dispatch import Operation, operators, register
from ...validation import State, check_flag, check_number, check_state, fail, wide
from .function import GIVES_WAY, SUPPORTS, Call, attend, check_gates, check_tokens

STEP = operators("linear_attention_step")

FEW_TOKENS = 8  # up to here the step kernels go token by token; beyond, one full call


class StepCall(NamedTuple):
    """A checked decode step."""

    q: Tensor  # [B, n, Hk, K]
    k: Tensor  # [B, n, Hk, K]
    v: Tensor  # [B, n, H, V]
    decay: Tensor | None  # [H], [B, n, H] or [B, n, H, K]
    beta: Tensor | None  # [B, n, H]
    state: Tensor  # [B, H, K, V]
    normalizer: Tensor | None  # [B, H, K]
    scale: float
    l2norm_qk: bool


def prepare(
    q, k, v, state, *, decay=None, beta=None, scale=None, normalize=False, l2norm_qk=False, backend=None
) -> StepCall:
    """Check the public arguments; the errors a user sees come from here."""
    check_flag("normalize", normalize)
    check_flag("l2norm_qk", l2norm_qk)
    q, k, v, sizes = check_tokens(q, k, v)
    decay, beta = check_gates(decay, beta, q, sizes)
    if normalize and beta is not None:
        fail("normalize", normalize, "False with beta: the delta rule has no normaliser")
    dtype = wide(q.dtype)
    parts = check_state("state", state, normalize, (sizes[0], sizes[4], sizes[3], sizes[5]), q)
    for part in parts:
        if part is not None and (part.dtype != dtype or not part.is_contiguous()):
            fail("state", part, f"contiguous, {dtype}: it is updated in place")
    if torch.is_grad_enabled():
        named = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "state": parts[0]}
        for name, x in (*named.items(), ("state", parts[1])):
            if x is not None and x.requires_grad:
                fail(name, x, "no gradient: decode under torch.no_grad() or torch.inference_mode()")
    scale = sizes[3] ** -0.5 if scale is None else check_number("scale", scale)
    return StepCall(q, k, v, decay, beta, *parts, scale, l2norm_qk)


def full_call(call: StepCall) -> Call:
    """The step as a call of the full operation."""
    return Call(*call[:7], None, call.scale, call.normalizer is not None, call.l2norm_qk)


def reason_against_cuda(call: StepCall) -> str | None:
    """None where the CUDA C++ kernel takes the call by its dtype and shapes, else why not."""
    K, V = call.state.shape[2:]
    if K > 256:
        return f"q has head dimension {K}; CUDA kernels take up to 256"
    if V % 4 != 0:
        return f"v has head dimension {V}; CUDA kernels take multiples of 4"
    return native.reason_against_float64(call.q)


def reason_against_native(call: StepCall) -> str | None:
    """None where native kernels can run the call, else why not."""
    if call.q.shape[1] > FEW_TOKENS:
        return SUPPORTS["native"](full_call(call))
    return native.reason_against(call.q) or (reason_against_cuda(call) if call.q.is_cuda else None)


def gives_way(call: StepCall) -> str | None:
    """Why Triton should run a call that native kernels can run, if it should: only one of many tokens."""
    return GIVES_WAY["native"](full_call(call)) if call.q.shape[1] > FEW_TOKENS else None


SUPPORTS_STEP = {**SUPPORTS, "native": reason_against_native}
OPERATION = register(Operation("linear_attention_step", SUPPORTS_STEP, prepare, {"native": gives_way}))


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    l2norm_qk: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Advance by n >= 1 tokens, updating the state in place; equals the full call, for any split into steps.

    Args:
        q, k `[B, n, Hk, K]`, v `[B, n, H, V]`: the new tokens. decay `[H]`, `[B, n, H]` or `[B, n, H, K]`,
            beta `[B, n, H]`.
        state: `[B, H, K, V]`, float32 (float64 for float64 inputs), contiguous; updated in place. With
            `normalize` a pair with z `[B, H, K]`. Zeros, or what `linear_attention(return_state=True)` gave.
        scale, normalize, l2norm_qk, backend: as in `linear_attention`.

    Returns:
        o `[B, n, H, V]` in q's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. The state is left as it was.
        Unsupported: the named backend cannot run this call.
    """
    call = prepare(
        q, k, v, state, decay=decay, beta=beta, scale=scale, normalize=normalize, l2norm_qk=l2norm_qk
    )
    chosen = OPERATION.choose(call, backend)
    if chosen == "reference" or call.q.shape[1] > FEW_TOKENS:
        o, *after = attend(full_call(call), chosen)
        for x, y in zip(call[5:7], after, strict=True):
            if x is not None:
                x.copy_(y)
        return o
    prefix = "triton_" if chosen == "triton" else ""
    o = STEP[prefix](*call)
    mark_changed(call.state, call.normalizer)
    return o


if native.HAS_CPU:

    @torch.library.register_fake("slmkernels::linear_attention_step")
    def _fake_step(q, k, v, decay, beta, state, normalizer, scale, l2norm_qk):
        return v.new_empty(v.shape)
