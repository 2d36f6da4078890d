"""`Ring`: the last tokens of each sequence in memory of one size, which the decoding caches are made of."""

import torch
from torch import Tensor

from .validation import FLOATS, fail


def check_cache(dtype: torch.dtype, **sizes: int) -> None:
    """The arguments of a cache: a float's dtype; sizes by their names, ints of at least 1 (the batch 0)."""
    for name, size in sizes.items():
        least = 0 if name == "batch" else 1
        if type(size) is not int:
            fail(name, size, f"an int of at least {least}", TypeError)
        if size < least:
            fail(name, size, f"at least {least}")
    if dtype not in FLOATS:
        fail("dtype", dtype, "float32, bfloat16, float16 or float64", TypeError)


class Ring:
    """What caches of the last R tokens share; the slot of token p is `p % R`.

    Attributes:
        rings: `[B, H, R, size]` each, one for every tensor that is kept of a token.
        position: int64 `[B, H]`, tokens seen so far; a counter for each program of a decode kernel, so that
            one launch may read and advance it without a race. All rows advance together.
    """

    rings: tuple[Tensor, ...]
    position: Tensor

    @property
    def length(self) -> int:
        """Tokens seen so far. Waits for the device on CUDA."""
        return int(self.position[0, 0]) if self.position.numel() else 0

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.position.zero_()

    def slots(self, first: int, end: int) -> Tensor:
        """Where the tokens from `first` up to `end` stand."""
        return torch.arange(first, end, device=self.position.device) % self.rings[0].shape[2]

    def last(self, n: int) -> tuple[Tensor, ...]:
        """The last n tokens of every ring in order of time, `[B, n, H, size]`; n at most min(length, R)."""
        slots = self.slots(self.length - n, self.length)
        return tuple(ring[:, :, slots].transpose(1, 2) for ring in self.rings)

    def append(self, *tokens: Tensor) -> None:
        """Write `[B, n, H, size]` for every ring behind what is there; the oldest tokens are overwritten."""
        n = tokens[0].shape[1]
        end, kept = self.length + n, min(n, self.rings[0].shape[2])
        slots = self.slots(end - kept, end)
        for ring, x in zip(self.rings, tokens, strict=True):
            ring[:, :, slots] = x[:, n - kept :].transpose(1, 2)
        self.position += n
