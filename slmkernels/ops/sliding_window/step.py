"""Decoding: a ring of the last W keys and values, and attention of new tokens over it, in constant memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...autocast import as_autocast_wants, autocasts, without_autocast
from ...autograd import mark_changed
from ...dispatch import Operation, operators, register
from ...ring import Ring, check_cache
from ...validation import (
    alike,
    as_dtype,
    check_float_tensor,
    check_like,
    check_number,
    describe,
    fail,
    wide,
)
from . import reference
from .function import SUPPORTS, Call, attend, check_sinks

STEP = operators("sliding_window_step")

FEW_TOKENS = 8  # up to here the step kernels go token by token; beyond, one full call over ring + new tokens


class RingCache(Ring):
    """The last `window` keys and values of each sequence; the slot of token p is `p % window`.

    Attributes:
        k, v: rings `[B, H, W, D]` and `[B, H, W, Dv]`.
        position: int64 `[B, H]`, tokens seen so far; all rows advance together.

    Raises:
        TypeError, ValueError: a size below 1 or a dtype that is not a float.
    """

    def __init__(
        self,
        batch: int,
        window: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {"batch": batch, "window": window, "kv_heads": kv_heads}
        check_cache(dtype, **sizes, head_dim=head_dim, v_head_dim=v_head_dim)
        rows = (batch, kv_heads, window)
        self.k = torch.zeros(*rows, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(*rows, v_head_dim, dtype=dtype, device=device)
        self.position = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)

    @property
    def rings(self) -> tuple[Tensor, Tensor]:
        """k and v."""
        return self.k, self.v

    @property
    def window(self) -> int:
        """W, the number of keys a query sees, itself included."""
        return self.k.shape[2]

    def __repr__(self) -> str:
        return f"RingCache(k={describe(self.k)}, v={describe(self.v)})"


class StepCall(NamedTuple):
    """A checked decode step."""

    q: Tensor  # [B, n, Hq, D]
    k: Tensor  # [B, n, H, D]
    v: Tensor  # [B, n, H, Dv]
    cache: RingCache
    sinks: Tensor | None  # [Hq]
    scale: float
    softcap: float | None


def prepare(q, k, v, cache, *, scale=None, softcap=None, sinks=None, backend=None) -> StepCall:
    """Check the public arguments; the errors a user sees come from here."""
    if not isinstance(cache, RingCache):
        fail("cache", cache, "a RingCache", TypeError)
    if not alike(4, q, k, v, cache.k) or autocasts(q):
        check_float_tensor("q", q, 4, "[B, n, Hq, D]")
        check_float_tensor("k", k, 4, "[B, n, Hkv, D]")
        check_float_tensor("v", v, 4, "[B, n, Hkv, Dv]")
        q, k, v = as_autocast_wants(q, k, v, dtype=cache.k.dtype)
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_like(name, x, "cache", cache.k)
    (B, H, _, D), (q_B, n, Hq, q_D), Dv = cache.k.shape, q.shape, cache.v.shape[3]
    if q_B != B or q_D != D:
        fail("q", q, f"[{B}, n, Hq, {D}] to go with the cache")
    if Hq % H != 0:
        fail("q", q, f"a number of heads that the cache's {H} heads divide")
    if k.shape != (B, n, H, D):
        fail("k", k, f"shape {[B, n, H, D]}")
    if v.shape != (B, n, H, Dv):
        fail("v", v, f"shape {[B, n, H, Dv]}")
    if sinks is not None:
        check_sinks(sinks, q)
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("sinks", sinks)):
            if x is not None and x.requires_grad:
                fail(name, x, "no gradient: decode under torch.no_grad() or torch.inference_mode()")
    scale = D**-0.5 if scale is None else check_number("scale", scale)
    softcap = None if softcap is None else check_number("softcap", softcap, positive=True)
    return StepCall(q, k, v, cache, sinks, scale, softcap)


def full_call(call: StepCall) -> Call:
    """The full operation as a wide step calls it, but for the keys that the ring holds."""
    return Call(*call[:3], call.sinks, None, None, call.cache.window - 1, 0, call.scale, call.softcap)


def reason_against_cuda(call: StepCall) -> str | None:
    """None where the CUDA C++ kernel takes the call by its dtype and shapes, else why not."""
    for name, x in (("q", call.q), ("v", call.v)):
        size = x.shape[-1]
        if size % 8 != 0 or size > 256:
            return f"{name} has head dimension {size}; CUDA kernels take multiples of 8 up to 256"
    return native.reason_against_float64(call.q)


def reason_against_native(call: StepCall) -> str | None:
    """None where native kernels can run the call, else why not."""
    if call.q.shape[1] > FEW_TOKENS:
        return SUPPORTS["native"](full_call(call))
    return native.reason_against(call.q) or (reason_against_cuda(call) if call.q.is_cuda else None)


SUPPORTS_STEP = {**SUPPORTS, "native": reason_against_native}
OPERATION = register(Operation("sliding_window_attention_step", SUPPORTS_STEP, prepare))


def sliding_window_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: RingCache,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Append n tokens to a `RingCache` and attend; equals the full causal call, for any split into steps.

    Args:
        q: `[B, n, Hq, D]`, k `[B, n, Hkv, D]`, v `[B, n, Hkv, Dv]`: the new tokens, in the cache's dtype.
        cache: updated in place. Its `window` is the W of `sliding_window_attention(window=W)`.
        scale, softcap, sinks, backend: as in `sliding_window_attention`.

    Returns:
        o `[B, n, Hq, Dv]`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. The cache is left as it was.
        Unsupported: the named backend cannot run this call.
    """
    call = prepare(q, k, v, cache, scale=scale, softcap=softcap, sinks=sinks)
    chosen = OPERATION.choose(call, backend)
    q, k, v = call.q, call.k, call.v
    if q.shape[1] > FEW_TOKENS:
        past_k, past_v = cache.last(min(cache.length, cache.window - 1))
        keys, values = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        o, _ = attend(full_call(call)._replace(k=keys, v=values), chosen)
        cache.append(k, v)
        return o
    if sinks is not None:  # statistics are float32 at least
        sinks = as_dtype(sinks, wide(q.dtype))
    rings = cache.k, cache.v, cache.position
    if chosen == "reference":
        with without_autocast(q):
            op = reference.sliding_window_attention_step
            return op(q, k, v, *rings, sinks, call.scale, call.softcap)
    prefix = "triton_" if chosen == "triton" else ""
    op = STEP[prefix]
    o = op(q, k, v, *rings, sinks, call.scale, call.softcap or 0.0)
    mark_changed(*rings)
    return o


if native.HAS_CPU:

    @torch.library.register_fake("slmkernels::sliding_window_step")
    def _fake_step(q, k, v, k_ring, v_ring, position, sinks, scale, softcap):
        return q.new_empty(*q.shape[:3], v.shape[-1])
