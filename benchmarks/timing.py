"""How long a call takes: wall time on the CPU, CUDA events on a GPU."""

import time
from collections.abc import Callable

import torch

SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated inside one sample
MOST_REPEATS = 1000
FLUSH_BYTES = 2**28  # more than any L2 cache


class Timer:
    """Times calls on one device.

    On CUDA each call starts with a cold L2 cache, and the events bracket the call alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.cuda else None

    def repeats(self, call: Callable[[], object]) -> int:
        """How many calls make a sample long enough for the clock, after warming up."""
        call()
        seconds = self.sample(call, 1)
        if self.cuda or seconds >= SHORTEST_SAMPLE:
            return 1
        return min(int(SHORTEST_SAMPLE / max(self.sample(call, 10), 1e-9)) + 1, MOST_REPEATS)

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        """Seconds of one call, the mean of `repeats` in a row."""
        if self.cuda:
            return sum(self._cuda_seconds(call) for _ in range(repeats)) / repeats
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def _cuda_seconds(self, call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
