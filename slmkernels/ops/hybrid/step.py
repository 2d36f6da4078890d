"""Decoding: a ring of the near keys and a state of the far ones, in constant memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...autocast import without_autocast
from ...autograd import mark_changed
from ...dispatch import Operation, operators, register
from ...ring import Ring, check_cache
from ...validation import check_like, check_number, describe, fail
from . import reference
from .function import SUPPORTS, Call, attend, check_alignment, check_mix, check_tokens

STEP = operators("hybrid_attention_step")

FEW_TOKENS = 8  # up to here the step kernels go token by token; beyond, one full call over ring + new tokens


class HybridCache(Ring):
    """The near keys of each sequence's last token in rings, and its far ones in a state.

    The slot of token p is `p % R`; R is `window`, or `2 * window` with block alignment. A key enters the
    state with the first token to which it is far.

    Attributes:
        k, v, phi: rings `[B, H, R, D]`, `[B, H, R, V]` and `[B, H, R, F]`.
        state, normalizer: `[B, H, F, V]` and `[B, H, F]`, float32 (float64 for float64).
        position: int64 `[B, H]`, tokens seen so far; all rows advance together.
        block: whether `alignment` is "block".

    Raises:
        TypeError, ValueError: a size below 1, an unknown alignment or a dtype that is not a float.
    """

    def __init__(
        self,
        batch: int,
        window: int,
        kv_heads: int,
        head_dim: int,
        feature_dim: int,
        v_head_dim: int | None = None,
        *,
        alignment: str = "sliding",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {"batch": batch, "window": window, "kv_heads": kv_heads, "head_dim": head_dim}
        check_cache(dtype, **sizes, feature_dim=feature_dim, v_head_dim=v_head_dim)
        self.block = check_alignment(alignment)
        rows = (batch, kv_heads, 2 * window if self.block else window)
        self.k = torch.zeros(*rows, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(*rows, v_head_dim, dtype=dtype, device=device)
        self.phi = torch.zeros(*rows, feature_dim, dtype=dtype, device=device)
        kind = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        self.state = torch.zeros(batch, kv_heads, feature_dim, v_head_dim, **kind)
        self.normalizer = torch.zeros(batch, kv_heads, feature_dim, **kind)
        self.position = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)

    @property
    def rings(self) -> tuple[Tensor, Tensor, Tensor]:
        """k, v and phi."""
        return self.k, self.v, self.phi

    @property
    def window(self) -> int:
        """W of `hybrid_attention`."""
        return self.k.shape[2] // 2 if self.block else self.k.shape[2]

    @property
    def alignment(self) -> str:
        """Which keys are near: "sliding" or "block"."""
        return "block" if self.block else "sliding"

    def near(self) -> tuple[Tensor, Tensor, Tensor]:
        """The near keys of the last token, their values and features, `[B, n, H, ...]`; n may be 0."""
        length = self.length
        return self.last(length - max(0, reference.first_near(length - 1, self.window, self.block)))

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        for x in (self.state, self.normalizer, self.position):
            x.zero_()

    def __repr__(self) -> str:
        tensors = {"k": self.k, "v": self.v, "phi": self.phi, "state": self.state}
        parts = ", ".join(f"{name}={describe(x)}" for name, x in tensors.items())
        return f"HybridCache({parts}, alignment={self.alignment!r})"


class StepCall(NamedTuple):
    """A checked decode step."""

    q: Tensor  # [B, n, Hq, D]
    k: Tensor  # [B, n, H, D]
    v: Tensor  # [B, n, H, V]
    phi_q: Tensor  # [B, n, Hq, F]
    phi_k: Tensor  # [B, n, H, F]
    mix: Tensor | None  # [Hq]
    cache: HybridCache
    scale: float


def prepare(q, k, v, phi_q, phi_k, cache, *, mix=None, scale=None, backend=None) -> StepCall:
    """Check the public arguments; the errors a user sees come from here."""
    if not isinstance(cache, HybridCache):
        fail("cache", cache, "a HybridCache", TypeError)
    tokens = q, k, v, phi_q, phi_k = check_tokens(q, k, v, phi_q, phi_k, cache.k.dtype)
    check_like("q", q, "cache", cache.k)
    (B, H, _, D), n = cache.k.shape, q.shape[1]
    if q.shape[0] != B or q.shape[3] != D:
        fail("q", q, f"[{B}, n, Hq, {D}] to go with the cache")
    if k.shape[2] != H:
        fail("k", k, f"shape {[B, n, H, D]} to go with the cache")
    for name, x, ring in (("v", v, cache.v), ("phi_k", phi_k, cache.phi)):
        if x.shape[3] != ring.shape[3]:
            fail(name, x, f"shape {[B, n, H, ring.shape[3]]} to go with the cache")
    if torch.is_grad_enabled():
        named = {"q": q, "k": k, "v": v, "phi_q": phi_q, "phi_k": phi_k, "mix": mix}
        for name, x in named.items():
            if isinstance(x, Tensor) and x.requires_grad:
                fail(name, x, "no gradient: decode under torch.no_grad() or torch.inference_mode()")
    scale = D**-0.5 if scale is None else check_number("scale", scale)
    return StepCall(*tokens, check_mix(mix, q), cache, scale)


OPERATION = register(Operation("hybrid_attention_step", dict(SUPPORTS), prepare))


def hybrid_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    cache: HybridCache,
    *,
    mix: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Append n tokens to a `HybridCache` and attend; equals the full call, for any split into steps.

    Args:
        q, k, v: `[B, n, Hq, D]`, `[B, n, Hkv, D]` and `[B, n, Hkv, V]`: the new tokens, in the cache's dtype.
        phi_q, phi_k: their features `[B, n, Hq, F]` and `[B, n, Hkv, F]`.
        cache: updated in place. Its window and alignment are those of `hybrid_attention`.
        mix, scale, backend: as in `hybrid_attention`.

    Returns:
        o `[B, n, Hq, V]`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. The cache is left as it was.
        Unsupported: the named backend cannot run this call.
    """
    call = prepare(q, k, v, phi_q, phi_k, cache, mix=mix, scale=scale)
    chosen = OPERATION.choose(call, backend)
    q, k, v, phi_q, phi_k, mix = call[:6]
    options = cache.window, cache.block, call.scale
    if q.shape[1] > FEW_TOKENS:
        # The first near key stands at a multiple of the window, so that blocks fall where they should.
        keys, values, features = (torch.cat(x, dim=1) for x in zip(cache.near(), (k, v, phi_k), strict=True))
        tensors = q, keys, values, phi_q, features, mix, cache.state, cache.normalizer
        o, state, normalizer = attend(Call(*tensors, None, *options), chosen)
        cache.state.copy_(state)
        cache.normalizer.copy_(normalizer)
        cache.append(k, v, phi_k)
        return o
    changed = *cache.rings, cache.state, cache.normalizer, cache.position
    if chosen == "reference":
        with without_autocast(q):
            return reference.hybrid_attention_step(q, k, v, phi_q, phi_k, *changed, mix, *options)
    prefix = "triton_" if chosen == "triton" else ""
    op = STEP[prefix]
    o = op(q, k, v, phi_q, phi_k, *changed, mix, *options)
    mark_changed(*changed)
    return o


if native.HAS_CPU:

    @torch.library.register_fake("slmkernels::hybrid_attention_step")
    def _fake_step(
        q, k, v, phi_q, phi_k, k_ring, v_ring, phi_ring, state, normalizer, position, mix, window, block,
        scale,
    ):  # fmt: skip
        return q.new_empty(*q.shape[:3], v.shape[-1])
