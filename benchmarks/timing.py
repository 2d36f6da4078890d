"""How long a call takes: wall time on the CPU; on a GPU between CUDA events, or by replaying CUDA graphs.

Between events a call starts with a cold L2 cache, and behind work that keeps the GPU busy while the host
queues the call's launches: what is measured is the GPU's time. A call of microseconds, such as a decode step,
is captured into a graph instead: one call after the other, each on inputs of its own, of which there are so
many that none finds its inputs in the cache.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from .cases import first_line

SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated inside one sample
MOST_REPEATS = 1000
MOST_EVENTS = 10  # calls of one sample, each behind a flush
FLUSH_BYTES = 2**28  # more than any L2 cache
LEAD_CYCLES = 2_000_000  # about a millisecond of GPU time in which the host runs ahead
MOST_COPIES = 32  # of the inputs that a graph goes through

Call = Callable[[], object]


class Sampler(NamedTuple):
    """`seconds()` takes a sample: the mean seconds of one call. `how`: by "clock", "events" or "graph", and
    after "events" the reason why there is no graph if one was wanted."""

    seconds: Callable[[], float]
    how: str


def copies(size: int) -> int:
    """How many inputs of so many bytes push each other out of the L2 cache."""
    return min(-(-FLUSH_BYTES // max(size, 1)), MOST_COPIES)


class Timer:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.cuda else None

    def sampler(self, calls: Sequence[Call], graph: bool = False) -> Sampler:
        """Warm up and prepare to time `calls`, which do the same on inputs of their own.

        Args:
            calls: only a graph goes through all of them; else the first one is timed.
            graph: replay a CUDA graph on a GPU, if the calls can be captured.
        """
        calls[0]()
        if not self.cuda:
            return Sampler(_clock(calls[0]), "clock")
        why = ""
        if graph:
            try:
                return Sampler(_graph(calls), "graph")
            except Exception as error:  # a peer may resist a capture in any way
                torch.cuda.synchronize()
                why = f" (no graph: {first_line(error)})"
        return Sampler(self._events(calls[0]), "events" + why)

    def _events(self, call: Call) -> Callable[[], float]:
        def once() -> float:
            self._flush.zero_()
            return _between_events(call)

        n = min(int(SHORTEST_SAMPLE / max(once(), 1e-9)) + 1, MOST_EVENTS)
        return lambda: sum(once() for _ in range(n)) / n


def _clock(call: Call) -> Callable[[], float]:
    def mean(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - start) / n

    n = 1
    if mean(1) < SHORTEST_SAMPLE:
        n = min(int(SHORTEST_SAMPLE / max(mean(10), 1e-9)) + 1, MOST_REPEATS)
    return lambda: mean(n)


def _between_events(call: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LEAD_CYCLES)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _graph(calls: Sequence[Call]) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        with _waiting_forbidden():  # found before the capture, which does not end well on an error
            calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def replay(n: int, calls: Sequence[Call] = calls) -> float:  # the calls hold the tensors the graph reads
        def replays() -> None:
            for _ in range(n):
                graph.replay()

        return _between_events(replays) / (n * len(calls))

    replay(1)
    n = min(int(SHORTEST_SAMPLE / max(replay(1) * len(calls), 1e-9)) + 2, MOST_REPEATS)
    return lambda: replay(n)


@contextlib.contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """An operation that waits for the device is an error inside the block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
