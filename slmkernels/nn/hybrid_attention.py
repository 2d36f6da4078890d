"""`HybridAttention`: softmax over the near keys, linear attention over the far ones, as one nn.Module."""

import math

import torch
from torch import Tensor, nn

from ..ops.hybrid.function import check_alignment, check_window, hybrid_attention
from ..ops.hybrid.step import HybridCache, hybrid_attention_step
from ..validation import expect
from .attention import AttentionHeads
from .feature_maps import FEATURE_MAPS, wide
from .feature_maps import feature_map as build_feature_map
from .sliding_window import SlidingWindowAttention

POSITIVE_MAPS = tuple(name for name, kind in FEATURE_MAPS.items() if kind.positive)


class HybridAttention(AttentionHeads):
    """Multi-head hybrid attention, x `[B, T, C]` -> `[B, T, C]`: time linear in T, a cache of constant size.

    Near keys weigh `sigmoid(mix_logit) exp(s_ij - max_j s_ij)` and far keys
    `(1 - sigmoid(mix_logit)) phi_q(q_i) . phi_k(k_j)`; the sum over all of them divides
    (`slmkernels.hybrid_attention`).

    The maps see queries and keys as the softmax does, normed and rotated, for it is the softmax's weights of
    these that they are to come near to (so do LoLCATs).

    Args:
        dim, num_heads, num_kv_heads, head_dim, rope_base, qk_norm, bias: as in `SlidingWindowAttention`.
        window: W, an int >= 1, the keys a query is near to.
        alignment: "sliding": the last W keys, the query's own included. "block": in blocks of W, those of the
            query's own block up to itself and of the block before it.
        feature_map: a name of `feature_maps.FEATURE_MAPS`, not "identity", whose products may be negative.
        feature_dim: what a learned feature map projects to; the map's default if None.

    Parameters and their initial values: qkv, out, q_norm and k_norm as in `SlidingWindowAttention`, by the
        same names. q_map, one for each query head, and k_map, one for each key head: see feature_maps.py.
        mix_logit `[Hq]`: `log(q_map.product) + sqrt(2 log W)`. The largest of W standard normal scores is
        nearly sqrt(2 log W), so that a near key of score s weighs about `exp(s) product`, where a far one
        weighs `product` on average, whatever the map and W: near keys have half of the weight in a text of
        4 W tokens (measured: 0.46 to 0.54).

    Source: Zhang et al. 2024 (LoLCATs), section 3.2. There the far weights' factor is 1, or by an option the
    one here: features such as elu's, whose products are far above 1, leave the near keys nothing without it.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        window: int,
        alignment: str = "sliding",
        feature_map: str = "hedgehog",
        feature_dim: int | None = None,
        rope_base: float | None = 10000.0,
        qk_norm: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        heads, kind = (dim, num_heads, num_kv_heads, head_dim), {"dtype": dtype, "device": device}
        super().__init__(*heads, rope_base=rope_base, qk_norm=qk_norm, bias=bias, **kind)
        check_window(window)
        check_alignment(alignment)
        hint = f"one of {', '.join(POSITIVE_MAPS)}, whose products are never negative"
        expect(feature_map in POSITIVE_MAPS, "feature_map", feature_map, hint)
        self.window, self.alignment, self.feature_map = window, alignment, feature_map
        self.q_map, self.k_map = (
            build_feature_map(feature_map, self.head_dim, n, feature_dim, **kind)
            for n in (self.num_heads, self.num_kv_heads)
        )
        self.mix_logit = nn.Parameter(torch.empty(num_heads, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value (class docstring)."""
        super().reset_parameters()
        for feature_map in (self.q_map, self.k_map):
            if hasattr(feature_map, "reset_parameters"):
                feature_map.reset_parameters()
        largest = math.sqrt(2 * math.log(self.window))
        nn.init.constant_(self.mix_logit, math.log(self.q_map.product) + largest)

    def new_cache(
        self,
        batch: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> HybridCache:
        """An empty cache for decoding, of one size whatever the length of the text.

        Args:
            batch: rows.
            max_length: taken so that all mixers are called alike; there is no limit.
            dtype, device: of the inputs, the module's if None; the state is float32 at least.
        """
        weight = self.qkv.weight
        sizes = (batch, self.window, self.num_kv_heads, self.head_dim, self.k_map.size)
        kind = {"dtype": dtype or weight.dtype, "device": device or weight.device}
        return HybridCache(*sizes, alignment=self.alignment, **kind)

    def forward(
        self,
        x: Tensor,
        *,
        cache: HybridCache | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: `[B, T, C]`.
            cache: from `new_cache`; the T tokens follow those it has seen, and are added to it. Under
                torch.no_grad() or torch.inference_mode().
            cu_seqlens: int32 `[N+1]`, sequences packed along T (B must be 1); positions restart in each.
            positions: integer `[T]` or `[B, T]` for the rotary embedding; by default 0, 1, 2... from the
                start of the sequence (with a cache, from its length).
            backend: None, "native", "triton" or "reference".

        Returns:
            `[B, T, C]`.

        Raises:
            ValueError: a cache beside cu_seqlens, of another shape, or with gradients asked for.
        """
        self.check_input(x)
        if cache is not None:
            self._check_cache(cache, x.shape[0], cu_seqlens)
        q, k, v = self.heads(x, cache, cu_seqlens, positions)
        near, far = wide(self.mix_logit).sigmoid(), wide(-self.mix_logit).sigmoid()  # [Hq], together 1
        tokens = (q, k, v, self.q_map(q) * far[:, None].to(q.dtype), self.k_map(k))
        options = {"mix": near, "backend": backend}
        if cache is not None:
            o = hybrid_attention_step(*tokens, cache, **options)
        else:
            options |= {"window": self.window, "alignment": self.alignment}
            o = hybrid_attention(*tokens, cu_seqlens=cu_seqlens, **options)
        return self.out(o.flatten(2))  # [B, T, Hq * D] -> [B, T, C]

    def _check_cache(self, cache: HybridCache, batch: int, cu_seqlens: Tensor | None) -> None:
        expect(cu_seqlens is None, "cu_seqlens", cu_seqlens, "None with a cache: it holds one sequence a row")
        expect(isinstance(cache, HybridCache), "cache", cache, "a HybridCache, from new_cache", TypeError)
        rows = cache.state.shape[0]
        expect(rows == batch, "cache", cache, f"a batch of {batch}, as x has")
        ours = {"window": self.window, "alignment": self.alignment}
        for name, value in ours.items():
            theirs = getattr(cache, name)
            expect(theirs == value, f"cache.{name}", theirs, f"{value!r}, this module's {name}")

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}/{self.num_kv_heads}x{self.head_dim}"
        return f"{heads}, window={self.window}, alignment={self.alignment!r}, rope_base={self.rope_base}"


def hybrid_from_softmax(
    attention: SlidingWindowAttention,
    *,
    window: int | None = None,
    alignment: str = "sliding",
    feature_map: str = "hedgehog",
    feature_dim: int | None = None,
) -> HybridAttention:
    """A `HybridAttention` with the projections, norms and positions of a trained softmax attention.

    Its parameters are copies, frozen where those are. Feature maps and mix have their initial values: for
    keys that are not near the result is to be trained (`slmkernels.train.attention_transfer`), up to there
    it equals the attention, if no more keys are near than the attention sees. With them, it sees farther
    than a windowed one.

    Args:
        attention: causal, without softcap and sinks.
        window: of the result; the attention's own if None.
        alignment, feature_map, feature_dim: as in `HybridAttention`.

    Raises:
        TypeError, ValueError: what cannot be carried over, or a missing window; the message names it.
    """
    kind = type(attention)
    expect(issubclass(kind, SlidingWindowAttention), "attention", kind, "a SlidingWindowAttention", TypeError)
    expect(attention.causal, "attention.causal", attention.causal, "True: hybrid attention is causal")
    for name in ("softcap", "sinks"):
        value = getattr(attention, name)
        expect(value is None, f"attention.{name}", value, "None: hybrid attention has none")
    window = attention.ring if window is None else window
    expect(window is not None, "window", window, "an int >= 1: the attention is full and has none")
    weight = attention.qkv.weight
    hybrid = HybridAttention(
        attention.dim,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        window=window,
        alignment=alignment,
        feature_map=feature_map,
        feature_dim=feature_dim,
        rope_base=attention.rope_base,
        qk_norm=not isinstance(attention.q_norm, nn.Identity),
        bias=attention.qkv.bias is not None,
        dtype=weight.dtype,
        device=weight.device,
    )
    hybrid.load_state_dict({**hybrid.state_dict(), **attention.state_dict()})
    for name, parameter in attention.named_parameters():
        hybrid.get_parameter(name).requires_grad_(parameter.requires_grad)
    return hybrid.train(attention.training)
