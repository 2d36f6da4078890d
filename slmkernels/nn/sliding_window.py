"""`SlidingWindowAttention`: projections, rotary positions and sliding-window attention as one nn.Module."""

import torch
from torch import Tensor, nn

from ..ops.sliding_window.function import Window, sliding_window_attention, window_bounds
from ..ops.sliding_window.step import RingCache, sliding_window_attention_step
from ..validation import check_float_tensor, expect
from .norm import RMSNorm
from .rotary import packed_positions, rotary_table, rotate


class SlidingWindowAttention(nn.Module):
    """Multi-head attention over a window of keys: x `[B, T, C]` -> `[B, T, C]`.

    Args:
        dim: C, channels of x.
        num_heads: query heads Hq.
        num_kv_heads: key-value heads Hkv, a divisor of Hq (GQA, MQA); Hq if None.
        head_dim: D; `dim // num_heads` if None.
        window: as in `slmkernels.sliding_window_attention`: an int W counts the keys a causal query sees,
            itself included; a pair (left, right) is inclusive; None is full attention.
        causal: keys after the query are hidden.
        rope_base: base of the rotary embedding (float32, Llama's half rotation); None: no positions at all.
        qk_norm: RMSNorm of every query and key head, before the rotation.
        sinks: one learned logit per head in the softmax's denominator.
        softcap: scores become `softcap * tanh(score / softcap)`.
        bias: biases on both projections.

    Parameters and their initial values:
        qkv.weight `[(Hq + 2 Hkv) D, C]`: normal, std `C ** -0.5`; out.weight `[C, Hq D]`: normal, std
        `(Hq D) ** -0.5`; biases 0; q_norm.weight, k_norm.weight `[D]`: 1; sinks `[Hq]`: 0.

    The attribute `attend` is the attention function itself, `sliding_window_attention` or one with its
    signature; decoding with a cache does not go through it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: Window = None,
        *,
        causal: bool = True,
        rope_base: float | None = 10000.0,
        qk_norm: bool = False,
        sinks: bool = False,
        softcap: float | None = None,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        expect(type(dim) is int and dim >= 1, "dim", dim, "an int >= 1")
        expect(type(num_heads) is int and num_heads >= 1, "num_heads", num_heads, "an int >= 1")
        divides = type(num_kv_heads) is int and num_kv_heads >= 1 and num_heads % num_kv_heads == 0
        expect(divides, "num_kv_heads", num_kv_heads, f"a divisor of num_heads {num_heads}")
        if head_dim is None:
            hint = f"a divisor of dim {dim}, or head_dim beside it"
            expect(dim % num_heads == 0, "num_heads", num_heads, hint)
            head_dim = dim // num_heads
        expect(type(head_dim) is int and head_dim >= 1, "head_dim", head_dim, "an int >= 1")
        if rope_base is not None:
            expect(rope_base > 0, "rope_base", rope_base, "a number > 0, or None")
            expect(head_dim % 2 == 0, "head_dim", head_dim, "an even number with rope_base")
        left, _ = window_bounds(window, causal)
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, num_kv_heads, head_dim
        self.window, self.causal, self.rope_base, self.softcap = window, causal, rope_base, softcap
        self.ring = None if left is None else left + 1  # slots a decoding cache needs; None: every token
        self.attend = sliding_window_attention

        kind = {"dtype": dtype, "device": device}
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias, **kind)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias, **kind)
        self.q_norm = RMSNorm(head_dim, **kind) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, **kind) if qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.empty(num_heads, **kind)) if sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value (class docstring)."""
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, RMSNorm):
                norm.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def new_cache(
        self,
        batch: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RingCache:
        """An empty cache for decoding: a ring of `window` slots, whatever the length of the text.

        Full attention (window=None) needs `max_length` slots, and writing more is an error. dtype and device
        are the module's if None.
        """
        expect(self.causal, "causal", self.causal, "True to decode with a cache")
        slots = max_length if self.ring is None else self.ring
        hint = "an int >= 1 with window=None, where every token is kept"
        expect(slots is not None, "max_length", max_length, hint)
        weight = self.qkv.weight
        dtype, device = dtype or weight.dtype, device or weight.device
        return RingCache(batch, slots, self.num_kv_heads, self.head_dim, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        *,
        cache: RingCache | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: `[B, T, C]`.
            cache: from `new_cache`; the T tokens follow those it has seen, and are added to it.
            cu_seqlens: int32 `[N+1]`, sequences packed along T (B must be 1); positions restart in each.
            positions: integer `[T]` or `[B, T]` for the rotary embedding; by default 0, 1, 2... from the
                start of the sequence (with a cache, from its length).
            backend: None, "native", "triton" or "reference".

        Returns:
            `[B, T, C]`.

        Raises:
            ValueError: a cache beside cu_seqlens, of another window, or full.
        """
        check_float_tensor("x", x, 3, "[B, T, C]")
        expect(x.shape[2] == self.dim, "x", x, f"{self.dim} channels")
        B, T, _ = x.shape
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv(x).view(B, T, sum(heads), self.head_dim).split(heads, dim=2)  # [B, T, H, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            self._check_cache(cache, T, cu_seqlens)
        if self.rope_base is not None:
            if positions is None:
                positions = self._positions(x, cache, cu_seqlens)
            cos, sin = rotary_table(positions, self.head_dim, self.rope_base)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        options = {"softcap": self.softcap, "sinks": self.sinks, "backend": backend}
        if cache is not None:
            o = sliding_window_attention_step(q, k, v, cache, **options)
        else:
            o = self.attend(q, k, v, window=self.window, causal=self.causal, cu_seqlens=cu_seqlens, **options)
        return self.out(o.flatten(2))  # [B, T, Hq * D] -> [B, T, C]

    def _positions(self, x: Tensor, cache: RingCache | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            return packed_positions(cu_seqlens, x.shape[1])
        index = torch.arange(x.shape[1], device=x.device)  # [T]
        if cache is None:
            return index
        return cache.position[:, :1] + index  # [B, T], without a wait for the device

    def _check_cache(self, cache: RingCache, T: int, cu_seqlens: Tensor | None) -> None:
        expect(cu_seqlens is None, "cu_seqlens", cu_seqlens, "None with a cache: it holds one sequence a row")
        expect(self.causal, "causal", self.causal, "True to decode with a cache")
        if self.ring is not None:
            hint = f"{self.ring}, this module's window"
            expect(cache.window == self.ring, "cache.window", cache.window, hint)
        elif cache.length + T > cache.window:
            raise ValueError(
                f"cache holds {cache.length} of {cache.window} tokens and cannot take {T} more: full "
                f"attention (window=None) forgets nothing; give new_cache max_length >= {cache.length + T}"
            )

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}/{self.num_kv_heads}x{self.head_dim}"
        return f"{heads}, window={self.window}, causal={self.causal}, rope_base={self.rope_base}"
