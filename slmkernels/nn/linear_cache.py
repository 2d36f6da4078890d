"""`LinearCache`: what a decoding `LinearAttention` remembers, of one size whatever the length."""

import torch
from torch import Tensor

from ..ring import check_cache
from ..validation import describe


class LinearCache:
    """The recurrent state of each sequence, and the last tokens of the short convolution.

    Attributes:
        state: `[B, H, K, V]`, float32 (float64 for float64 inputs).
        normalizer: `[B, H, K]`, like state, or None.
        conv: `[B, W-1, channels]` in the inputs' dtype, oldest token first, or None.
        position: int64 `[1]`, tokens seen so far; all rows advance together.

    Raises:
        TypeError, ValueError: a size below 1 or a dtype that is not a float.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        normalize: bool = False,
        conv: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        check_cache(dtype, batch=batch, heads=heads, key_dim=key_dim, value_dim=value_dim)
        kind = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        self.state = torch.zeros(batch, heads, key_dim, value_dim, **kind)
        self.normalizer = torch.zeros(batch, heads, key_dim, **kind) if normalize else None
        self.conv = torch.zeros(batch, *conv, dtype=dtype, device=device) if conv else None
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def tensors(self) -> list[Tensor]:
        """Everything it holds."""
        return [x for x in (self.state, self.normalizer, self.conv, self.position) if x is not None]

    @property
    def length(self) -> int:
        """Tokens seen so far. Waits for the device on CUDA."""
        return int(self.position)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        for x in self.tensors():
            x.zero_()

    def __repr__(self) -> str:
        parts = {"state": self.state, "normalizer": self.normalizer, "conv": self.conv}
        text = ", ".join(f"{name}={describe(x)}" for name, x in parts.items() if x is not None)
        return f"LinearCache({text})"
