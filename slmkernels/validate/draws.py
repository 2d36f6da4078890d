"""Random sizes, from a seed: the same on every machine."""

from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
PRIMES = (2, 3, 5, 7, 11, 13, 17, 31, 37, 61, 67, 97, 127, 131, 191, 257)
SIZES = (8, 16, 16, 32, 32, 64, 64, 96, 128)  # that kernels are made for
ODD_SIZES = (1, 3, 20, 33, 40, 72, 100)


class Draws:
    """Draws numbers from a seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Sequence[T]) -> T:
        """One of these."""
        return options[self.integer(0, len(options) - 1)]

    def flag(self, percent: int = 50) -> bool:
        """True so often."""
        return self.integer(1, 100) <= percent

    def length(self) -> int:
        """Of a sequence: none, one, a few, primes, around the edges of tiles, and now and then many."""
        kind = self.integer(1, 100)
        if kind <= 5:
            return 0
        if kind <= 12:
            return 1
        if kind <= 35:
            return self.integer(2, 16)
        if kind <= 60:
            return self.integer(17, 130)
        if kind <= 75:
            return self.choice(PRIMES)
        if kind <= 95:
            return max(1, 64 * self.integer(1, 4) + self.integer(-1, 1))
        return self.integer(300, 600)

    def lengths(self) -> list[int]:
        """Of packed sequences, some of them empty."""
        return [min(self.length(), 200) for _ in range(self.integer(1, 5))]

    def size(self, largest: int = 256) -> int:
        """Of a head or of features: mostly one that kernels are made for."""
        if self.flag(3):
            return largest
        return self.choice(SIZES if self.flag(75) else ODD_SIZES)

    def heads(self) -> dict[str, int]:
        """Key-value heads, and query heads for each."""
        return {"H": self.integer(1, 3), "group": self.choice((1, 1, 2, 3, 4))}

    def window(self) -> int:
        """Of one key, of some, or of more than there are."""
        return self.choice((1, 2, self.integer(3, 20), self.integer(21, 90), 64, 128, 256, 1000))

    def split(self) -> list[int]:
        """Tokens of each decode step: mostly one; now and then a few, or a prompt."""
        steps = [
            self.choice((1, 1, 1, 1, 2, 3, 8, 9, self.integer(10, 40))) for _ in range(self.integer(1, 25))
        ]
        return steps if self.flag(90) else [*steps, 0, 1]


def offsets(lengths: Sequence[int]) -> list[int]:
    """0 and the running sums: cu_seqlens of these lengths."""
    sums = [0]
    for n in lengths:
        sums.append(sums[-1] + n)
    return sums
