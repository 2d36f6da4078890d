"""`LinearAttention`: one module for the whole family, each published layer a row of `MODES`."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import autocasts, without_autocast
from ..ops.causal_conv1d.function import causal_conv1d
from ..ops.causal_conv1d.step import causal_conv1d_step
from ..ops.linear.function import linear_attention
from ..ops.linear.step import linear_attention_step
from ..validation import check_float_tensor, expect
from .feature_maps import feature_map as build_feature_map
from .feature_maps import wide
from .linear_cache import LinearCache
from .norm import LayerNorm, RMSNorm
from .rotary import packed_positions, rotary_table, rotate


class Mode(NamedTuple):
    """What a layer does beside the recurrence."""

    features: bool = False  # feature maps of q and k, and the normaliser
    rotary: bool = False  # q and k turned by their position
    conv: bool = False  # q, k, v through a short causal convolution and silu; q and k to length 1
    beta: bool = False  # the delta rule, at the rate sigmoid(x W)
    decay: str | None = None  # "fixed", "softplus" a head; "low_rank", "softplus_low_rank" a channel
    norm: type[nn.Module] | None = None  # of each head's output
    gate: str | None = None  # what the output is multiplied with: "silu" of x W, "sigmoid" of x W_down W_up


MODES: dict[str, Mode] = {
    "linear": Mode(features=True),
    "retention": Mode(rotary=True, decay="fixed", norm=LayerNorm, gate="silu"),
    "gla": Mode(decay="low_rank", norm=LayerNorm, gate="silu"),
    "delta": Mode(conv=True, beta=True, norm=RMSNorm),
    "gated_delta": Mode(conv=True, beta=True, decay="softplus", norm=RMSNorm, gate="silu"),
    "kda": Mode(conv=True, beta=True, decay="softplus_low_rank", norm=RMSNorm, gate="sigmoid"),
}
GATE_TEMPERATURE = 16  # GLA's tau: decay = log(sigmoid(.)) / tau


class LinearAttention(nn.Module):
    """Multi-head linear attention, x `[B, T, C]` -> `[B, T, C]`: time linear in T, a state of constant size.

    Letters: H heads of the values, Hk of the queries and keys, K their size, V that of the values.

    | mode | q, k | decay (log of the gate) | output of a head, before `out` |
    |---|---|---|---|
    | linear | feature map | none | o, normalised |
    | retention | rotary | log(1 - 2^-e) | layernorm(o) silu(x W) |
    | gla | as they are | logsigmoid(x W_down W_up + b) / 16 | layernorm(o) silu(x W) |
    | delta | conv, silu, l2norm | none | rmsnorm(o) |
    | gated_delta | conv, silu, l2norm | -exp(A_log) softplus(x W + dt_bias) | rmsnorm(o) silu(x W) |
    | kda | conv, silu, l2norm | the same, W = W_down W_up | rmsnorm(o) sigmoid(x W_down W_up + b) |

    The last three follow the delta rule, with beta = sigmoid(x W). The decay is one number a head, in gla and
    kda one a channel of the keys. Retention's exponents e are 5, 6, 7..., from the ninth head on spread over
    5 to 12. "conv" is a causal convolution of each channel over conv_size tokens, of v too. layernorm is
    of each head, RetNet's group norm. The feature map "identity" has products of any sign: there, and only
    there, mode linear has rmsnorm(o) in the normaliser's place.

    Args:
        dim: C, channels of x.
        num_heads: H, heads of the values, each with a state `[K, V]` (linear: `[F, V]`) of its own.
        num_qk_heads: Hk, a divisor of H; H if None. Qwen3-Next's gated_delta has half as many.
        head_dim: K; `dim // num_heads` if None.
        v_head_dim: V; K if None (RetNet and GLA take 2 K).
        mode: a row of the table.
        feature_map: of mode linear, a name of `feature_maps.FEATURE_MAPS`; "elu" if None.
        feature_dim: what a learned feature map projects to; the map's default if None.
        conv_size: tokens the convolution sees, its own included; 4 if None.
        low_rank: channels between W_down and W_up; if None 16 in gla and K in kda.
        rope_base: base of retention's rotation; 10000 if None.
        bias: biases on `project` and `out`.

    Parameters and their initial values:
        project.weight `[2 Hk K + H V, and H V with a silu gate, H with beta, H with gated_delta's decay; C]`:
        normal, std `C ** -0.5`. out.weight `[C, H V]`: normal, std `(H V) ** -0.5`. decay_down, decay_up,
        gate_down, gate_up: weights normal, std `in_features ** -0.5`. All biases 0.
        conv `[2 Hk K + H V, conv_size]`: uniform within `conv_size ** -0.5`, PyTorch's for a Conv1d.
        A_log `[H]`: log A, A uniform in (0, 16] (Gated DeltaNet, Qwen3-Next); dt_bias `[H]`, in kda `[H K]`:
        softplus's inverse of dt, log dt uniform from log 0.001 to log 0.1 (Mamba-2, Gated DeltaNet).
        norm.weight `[V]`: 1; norm.bias `[V]`: 0. q_map, k_map: see feature_maps.py.

    Sources: Katharopoulos et al. 2020, section 3.2; Qin et al. 2022 (TransNormer: a norm for the normaliser);
    Sun et al. 2023 (RetNet), sections 2.1 and 2.2; Yang et al. 2024 (GLA), section 4.4; Yang et al. 2024
    (DeltaNet); Yang et al. 2025 (Gated DeltaNet); Dao and Gu 2024 (Mamba-2); Kimi Team 2025 (Kimi Linear).

    Raises:
        ValueError: an argument is not as above, or is of another mode; the message names it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_qk_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        *,
        mode: str = "gated_delta",
        feature_map: str | None = None,
        feature_dim: int | None = None,
        conv_size: int | None = None,
        low_rank: int | None = None,
        rope_base: float | None = None,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        expect(mode in MODES, "mode", mode, f"one of {', '.join(MODES)}")
        self.mode, self.parts = mode, MODES[mode]
        num_qk_heads = num_heads if num_qk_heads is None else num_qk_heads
        expect(type(dim) is int and dim >= 1, "dim", dim, "an int >= 1")
        expect(type(num_heads) is int and num_heads >= 1, "num_heads", num_heads, "an int >= 1")
        divides = type(num_qk_heads) is int and num_qk_heads >= 1 and num_heads % num_qk_heads == 0
        expect(divides, "num_qk_heads", num_qk_heads, f"a divisor of num_heads {num_heads}")
        if head_dim is None:
            hint = f"a divisor of dim {dim}, or head_dim beside it"
            expect(dim % num_heads == 0, "num_heads", num_heads, hint)
            head_dim = dim // num_heads
        expect(type(head_dim) is int and head_dim >= 1, "head_dim", head_dim, "an int >= 1")
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        expect(type(v_head_dim) is int and v_head_dim >= 1, "v_head_dim", v_head_dim, "an int >= 1")
        with_rank = self.parts.decay in ("low_rank", "softplus_low_rank")
        for name, value, used in (
            ("feature_map", feature_map, self.parts.features),
            ("feature_dim", feature_dim, self.parts.features),
            ("conv_size", conv_size, self.parts.conv),
            ("low_rank", low_rank, with_rank),
            ("rope_base", rope_base, self.parts.rotary),
        ):
            expect(value is None or used, name, value, f"None with mode {mode!r}, which has no use for it")
        conv_size = 4 if conv_size is None else conv_size
        expect(type(conv_size) is int and conv_size >= 2, "conv_size", conv_size, "an int >= 2")
        low_rank = (16 if mode == "gla" else head_dim) if low_rank is None else low_rank
        expect(type(low_rank) is int and low_rank >= 1, "low_rank", low_rank, "an int >= 1")
        self.rope_base = 10000.0 if rope_base is None else rope_base
        expect(self.rope_base > 0, "rope_base", rope_base, "a number > 0")
        if self.parts.rotary:
            expect(head_dim % 2 == 0, "head_dim", head_dim, f"an even number with mode {mode!r}")
        self.dim, self.num_heads, self.num_qk_heads = dim, num_heads, num_qk_heads
        self.head_dim, self.v_head_dim, self.conv_size = head_dim, v_head_dim, conv_size

        H, K, V, kind = num_heads, head_dim, v_head_dim, {"dtype": dtype, "device": device}
        qkv = 2 * num_qk_heads * K + H * V
        gate = H * V if self.parts.gate == "silu" else 0
        decay = H if self.parts.decay == "softplus" else 0
        self.widths = (qkv, gate, H if self.parts.beta else 0, decay)  # what `project` computes
        self.project = nn.Linear(dim, sum(self.widths), bias=bias, **kind)
        norm, self.state_dim, self.normalize = self.parts.norm, K, False
        if self.parts.features:
            name = feature_map or "elu"
            self.q_map, self.k_map = (
                build_feature_map(name, K, num_qk_heads, feature_dim, **kind) for _ in range(2)
            )
            self.state_dim, self.normalize = self.q_map.size, self.q_map.positive
            norm = None if self.normalize else RMSNorm
        if self.parts.conv:
            self.conv = nn.Parameter(torch.empty(qkv, conv_size, **kind))
        if with_rank:
            self.decay_down = nn.Linear(dim, low_rank, bias=False, **kind)
            self.decay_up = nn.Linear(low_rank, H * K, bias=self.parts.decay == "low_rank", **kind)
        if self.parts.gate == "sigmoid":
            self.gate_down = nn.Linear(dim, low_rank, bias=False, **kind)
            self.gate_up = nn.Linear(low_rank, H * V, **kind)
        if self.parts.decay in ("softplus", "softplus_low_rank"):
            self.A_log = nn.Parameter(torch.empty(H, **kind))
            self.dt_bias = nn.Parameter(torch.empty(H if decay else H * K, **kind))
        self.norm = nn.Identity() if norm is None else norm(V, **kind)
        self.out = nn.Linear(H * V, dim, bias=bias, **kind)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value (class docstring)."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self.parts.conv:
            nn.init.uniform_(self.conv, -(self.conv_size**-0.5), self.conv_size**-0.5)
        if self.parts.decay in ("softplus", "softplus_low_rank"):
            A = 16 * (1 - torch.rand_like(self.A_log, dtype=torch.float32))  # (0, 16]
            self.A_log.copy_(A.log())
            share = torch.rand_like(self.dt_bias, dtype=torch.float32)
            dt = torch.exp(math.log(0.001) + share * math.log(0.1 / 0.001))
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    @property
    def log_gamma(self) -> Tensor:
        """Retention's log gates `[H]`, in float32 at least. No buffer: `to_empty` would leave one unset."""
        weight, H = self.project.weight, self.num_heads
        exponents = torch.linspace(5, min(4 + H, 12), H, dtype=torch.float64, device=weight.device)
        return torch.log1p(-(2**-exponents)).to(torch.promote_types(weight.dtype, torch.float32))

    def new_cache(
        self,
        batch: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LinearCache:
        """An empty cache for decoding, of one size whatever the length of the text.

        Args:
            batch: rows.
            max_length: taken so that all mixers are called alike; there is no limit.
            dtype, device: of the inputs, the module's if None; the state is float32 at least.
        """
        weight = self.project.weight
        return LinearCache(
            batch,
            self.num_heads,
            self.state_dim,
            self.v_head_dim,
            normalize=self.normalize,
            conv=(self.conv_size - 1, self.widths[0]) if self.parts.conv else None,
            dtype=dtype or weight.dtype,
            device=device or weight.device,
        )

    def forward(
        self,
        x: Tensor,
        *,
        cache: LinearCache | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: `[B, T, C]`.
            cache: from `new_cache`; the T tokens follow those it has seen, and are added to it. Under
                torch.no_grad() or torch.inference_mode().
            cu_seqlens: int32 `[N+1]`, sequences packed along T (B must be 1); nothing crosses a boundary and
                positions start again.
            backend: None, "native", "triton" or "reference".

        Returns:
            `[B, T, C]`.

        Raises:
            ValueError: x has other channels; a cache beside cu_seqlens, of another shape or dtype, or with
                gradients asked for. The cache is left as it was.
        """
        check_float_tensor("x", x, 3, "[B, T, C]")
        expect(x.shape[2] == self.dim, "x", x, f"{self.dim} channels")
        if cache is not None:
            self._check_cache(cache, x, cu_seqlens)
        qkv, gate, beta, rate = self.project(x).split(self.widths, dim=-1)  # empty where the mode has none
        decay = self._decay(x, rate)
        beta = wide(beta).sigmoid() if self.parts.beta else None  # [B, T, H]
        if self.parts.conv:
            qkv = self._convolve(qkv, cache, cu_seqlens, backend)
        q, k, v = self._heads(qkv)  # [B, T, Hk, K] twice, [B, T, H, V]
        if self.parts.features:
            q, k = self.q_map(q), self.k_map(k)  # [B, T, Hk, F]
        if self.parts.rotary:
            table = rotary_table(self._positions(x, cache, cu_seqlens), self.head_dim, self.rope_base)
            q, k = rotate(q, *table), rotate(k, *table)
        options = {"decay": decay, "beta": beta, "normalize": self.normalize, "l2norm_qk": self.parts.conv}
        o = self._attend(q, k, v, cache, cu_seqlens=cu_seqlens, backend=backend, **options)
        o = self.norm(o)  # [B, T, H, V]
        if self.parts.gate == "silu":
            o = o * F.silu(gate).unflatten(-1, (self.num_heads, self.v_head_dim))
        elif self.parts.gate == "sigmoid":
            gate = self.gate_up(self.gate_down(x)).sigmoid()
            o = o * gate.unflatten(-1, (self.num_heads, self.v_head_dim))
        return self.out(o.flatten(2))  # [B, T, H * V] -> [B, T, C]

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.num_qk_heads * self.head_dim
        q, k, v = qkv.split((keys, keys, self.num_heads * self.v_head_dim), dim=-1)
        q, k = (y.unflatten(-1, (self.num_qk_heads, self.head_dim)) for y in (q, k))
        return q, k, v.unflatten(-1, (self.num_heads, self.v_head_dim))

    def _decay(self, x: Tensor, rate: Tensor) -> Tensor | None:
        """Log gates <= 0, in float32 at least: `[H]`, `[B, T, H]` or `[B, T, H, K]`."""
        kind, heads = self.parts.decay, (self.num_heads, self.head_dim)
        if kind is None:
            return None
        if kind == "fixed":
            return self.log_gamma
        if kind == "low_rank":
            gate = wide(self.decay_up(self.decay_down(x))).unflatten(-1, heads)
            return F.logsigmoid(gate) / GATE_TEMPERATURE
        A = wide(self.A_log).exp()
        if kind == "softplus":
            return -A * F.softplus(wide(rate) + wide(self.dt_bias))
        rate = self.decay_up(self.decay_down(x))
        return -A[:, None] * F.softplus(wide(rate) + wide(self.dt_bias)).unflatten(-1, heads)

    def _convolve(self, qkv: Tensor, cache: LinearCache | None, cu_seqlens, backend) -> Tensor:
        options = {"activation": "silu", "backend": backend}
        qkv = qkv if cache is None else qkv.to(cache.conv.dtype)  # which differs under autocast only
        weight = self.conv.to(qkv.dtype)
        with without_autocast(qkv):
            if cache is None:
                return causal_conv1d(qkv, weight, cu_seqlens=cu_seqlens, **options)
            if qkv.shape[1] == 1:
                return causal_conv1d_step(qkv, cache.conv, weight, **options)
            y, state = causal_conv1d(qkv, weight, initial_state=cache.conv, return_state=True, **options)
        cache.conv.copy_(state)
        return y

    def _attend(self, q, k, v, cache: LinearCache | None, cu_seqlens, **options) -> Tensor:
        """The recurrence, with a cache from its state on, which is updated in place."""
        if cache is None:
            return linear_attention(q, k, v, cu_seqlens=cu_seqlens, **options)
        state = (cache.state, cache.normalizer) if self.normalize else cache.state
        o = linear_attention_step(q, k, v, state, **options)
        cache.position += q.shape[1]
        return o

    def _positions(self, x: Tensor, cache: LinearCache | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            return packed_positions(cu_seqlens, x.shape[1])
        index = torch.arange(x.shape[1], device=x.device)  # [T]
        return index if cache is None else cache.position + index  # without a wait for the device

    def _check_cache(self, cache: LinearCache, x: Tensor, cu_seqlens: Tensor | None) -> None:
        expect(cu_seqlens is None, "cu_seqlens", cu_seqlens, "None with a cache: it holds one sequence a row")
        expect(isinstance(cache, LinearCache), "cache", cache, "a LinearCache, from new_cache", TypeError)
        shape = (x.shape[0], self.num_heads, self.state_dim, self.v_head_dim)
        dtype = torch.promote_types(x.dtype, torch.float32)
        fits = cache.state.shape == shape and cache.state.dtype == dtype and cache.state.device == x.device
        expect(fits, "cache.state", cache.state, f"{dtype}{list(shape)} on {x.device}")
        has = (cache.normalizer is not None, cache.conv is not None)
        expect(has == (self.normalize, self.parts.conv), "cache", cache, f"one of mode {self.mode!r}")
        if self.parts.conv:
            shape = (x.shape[0], self.conv_size - 1, self.widths[0])
            fits = cache.conv.shape == shape and (cache.conv.dtype == x.dtype or autocasts(x))
            expect(fits, "cache.conv", cache.conv, f"{x.dtype}{list(shape)}")
        if torch.is_grad_enabled():
            asked = x.requires_grad or any(p.requires_grad for p in self.parameters())
            expect(not asked, "cache", cache, "None with gradients: decode under torch.no_grad()")

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}x{self.v_head_dim}, qk_heads={self.num_qk_heads}x{self.head_dim}"
        return f"mode={self.mode!r}, {heads}"
