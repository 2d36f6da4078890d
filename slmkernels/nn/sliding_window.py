"""`SlidingWindowAttention`: projections, rotary positions and sliding-window attention as one nn.Module."""

import torch
from torch import Tensor, nn

from ..ops.sliding_window.function import Window, sliding_window_attention, window_bounds
from ..ops.sliding_window.step import RingCache, sliding_window_attention_step
from ..validation import expect
from .attention import AttentionHeads


class SlidingWindowAttention(AttentionHeads):
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
        heads = (dim, num_heads, num_kv_heads, head_dim)
        kind = {"dtype": dtype, "device": device}
        super().__init__(*heads, rope_base=rope_base, qk_norm=qk_norm, bias=bias, **kind)
        left, _ = window_bounds(window, causal)
        self.window, self.causal, self.softcap = window, causal, softcap
        self.ring = None if left is None else left + 1  # slots a decoding cache needs; None: every token
        self.attend = sliding_window_attention
        self.sinks = nn.Parameter(torch.empty(num_heads, **kind)) if sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value (class docstring)."""
        super().reset_parameters()
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
        self.check_input(x)
        if cache is not None:
            self._check_cache(cache, x.shape[1], cu_seqlens)
        q, k, v = self.heads(x, cache, cu_seqlens, positions)
        options = {"softcap": self.softcap, "sinks": self.sinks, "backend": backend}
        if cache is not None:
            o = sliding_window_attention_step(q, k, v, cache, **options)
        else:
            o = self.attend(q, k, v, window=self.window, causal=self.causal, cu_seqlens=cu_seqlens, **options)
        return self.out(o.flatten(2))  # [B, T, Hq * D] -> [B, T, C]

    def _check_cache(self, cache: RingCache, T: int, cu_seqlens: Tensor | None) -> None:
        expect(cu_seqlens is None, "cu_seqlens", cu_seqlens, "None with a cache: it holds one sequence a row")
        expect(self.causal, "causal", self.causal, "True to decode with a cache")
        if self.ring is not None:
            hint = f"{self.ring}, this module's window"
            expect(cache.window == self.ring, "cache.window", cache.window, hint)
        elif torch.compiler.is_compiling():  # the length is not there to look at, but when the graph runs
            room = (cache.position[:1, :1] + T <= cache.window).all()
            torch._assert_async(
                room, f"cache of {cache.window} tokens is full: full attention forgets nothing"
            )
        elif cache.length + T > cache.window:
            raise ValueError(
                f"cache holds {cache.length} of {cache.window} tokens and cannot take {T} more: full "
                f"attention (window=None) forgets nothing; give new_cache max_length >= {cache.length + T}"
            )

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}/{self.num_kv_heads}x{self.head_dim}"
        return f"{heads}, window={self.window}, causal={self.causal}, rope_base={self.rope_base}"
