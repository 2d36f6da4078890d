"""`AttentionHeads`: what `SlidingWindowAttention` and `HybridAttention` share: all but the attention."""

import torch
from torch import Tensor, nn

from ..validation import check_float_tensor, expect
from .norm import RMSNorm
from .rotary import packed_positions, rotary_table, rotate


class AttentionHeads(nn.Module):
    """Projections to queries, keys and values and back, norms and rotary positions of the heads.

    Arguments, parameters and their initial values: see `SlidingWindowAttention`. A subclass calls
    `reset_parameters` once its own parameters are there.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        *,
        rope_base: float | None,
        qk_norm: bool,
        bias: bool,
        **kind,
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
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, num_kv_heads, head_dim
        self.rope_base = rope_base
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias, **kind)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias, **kind)
        self.q_norm = RMSNorm(head_dim, **kind) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, **kind) if qk_norm else nn.Identity()

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value (class docstring)."""
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, RMSNorm):
                norm.reset_parameters()

    def check_input(self, x: Tensor) -> None:
        """x must be `[B, T, C]`."""
        check_float_tensor("x", x, 3, "[B, T, C]")
        expect(x.shape[2] == self.dim, "x", x, f"{self.dim} channels")

    def heads(
        self, x: Tensor, cache, cu_seqlens: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x `[B, T, C]` -> q `[B, T, Hq, D]`, k and v `[B, T, Hkv, D]`, normed and turned."""
        B, T, _ = x.shape
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv(x).view(B, T, sum(heads), self.head_dim).split(heads, dim=2)  # [B, T, H, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base is not None:
            if positions is None:
                positions = self._positions(x, cache, cu_seqlens)
            cos, sin = rotary_table(positions, self.head_dim, self.rope_base)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def _positions(self, x: Tensor, cache, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            return packed_positions(cu_seqlens, x.shape[1])
        index = torch.arange(x.shape[1], device=x.device)  # [T]
        if cache is None:
            return index
        return cache.position[:, :1] + index  # [B, T], without a wait for the device
