"""Runs a case: checks every candidate, then times them in turn, one sample each a round, in one process."""

import fnmatch
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from . import memory
from .cases import (
    OF_COPY,
    OURS,
    TERAFLOPS,
    Bar,
    Candidate,
    Case,
    Inputs,
    Run,
    Unavailable,
    first_line,
    is_ours,
)
from .check import Check, Expected
from .machine import Rates
from .timing import Sampler, Timer, copies

T = TypeVar("T")
TIME_LIMIT = 40.0  # seconds of samples a case; a slower case gets fewer rounds
FEWEST_ROUNDS = 3


@dataclass
class Measurement:
    """One candidate in one case; `reason` says why figures are absent."""

    name: str
    reason: str | None = None
    check: Check | None = None
    yardstick: str = ""  # what it computes, if not the case's function
    samples: list[float] = field(default_factory=list)  # seconds a call
    timing: str | None = None  # how they were taken, `timing.Sampler.how`
    extra_memory: int | None = None  # bytes beyond inputs and results
    saved: int | None = None  # bytes that autograd keeps for the backward, parameters aside

    @property
    def correct(self) -> bool:
        """It ran and passed its check."""
        return self.check is not None and self.check.passed

    @property
    def median(self) -> float:
        """Seconds a call."""
        return statistics.median(self.samples)


@dataclass
class Result:
    """A case and what was measured, ours first."""

    case: Case
    backend: str  # the one of ours that ran, or why none did
    rates: Rates
    measurements: list[Measurement]
    memory_reason: str | None = None  # why no memory was measured

    @property
    def ours(self) -> Measurement:
        """Our own measurement."""
        return self.measurements[0]

    def speedup(self, peer: Measurement) -> tuple[float, float] | None:
        """How many times as long `peer` takes as ours, by medians and by minima; above 1, ours is faster.

        None unless both ran and both passed their check; a yardstick has none to pass.
        """
        if peer is self.ours or not (self.ours.samples and peer.samples):
            return None
        if not (self.ours.correct and (peer.correct or peer.yardstick)):
            return None
        return peer.median / self.ours.median, min(peer.samples) / min(self.ours.samples)

    def of_matmul_rate(self, measurement: Measurement) -> float | None:
        """Useful FLOP/s as a fraction of torch's matmul rate on this machine, by the median."""
        return self._over(self.case.flops, self.rates.matmul, measurement)

    def of_copy_bandwidth(self, measurement: Measurement) -> float | None:
        """Bytes that must move a second as a fraction of what a copy moves, by the median."""
        return self._over(self.case.bytes, self.rates.copy, measurement)

    def _over(self, amount: int, rate: float, measurement: Measurement) -> float | None:
        if not (measurement.samples and measurement.correct):
            return None
        return amount / measurement.median / rate

    def reached(self, bar: Bar) -> float | None:
        """What ours reached of a bar, by the median; against several peers, of the fastest."""
        if bar.against == TERAFLOPS:
            return self._over(self.case.flops, 1e12, self.ours)
        if bar.against == OF_COPY:
            return self.of_copy_bandwidth(self.ours)
        peers = [m for m in self.measurements if fnmatch.fnmatch(m.name, bar.against)]
        ratios = [speedup[0] for m in peers if (speedup := self.speedup(m))]
        return min(ratios, default=None)


def _attempt(measurement: Measurement, action: Callable[[], T]) -> T | None:
    """Run `action`; what stops it becomes the measurement's reason, so that a run outlives its peers."""
    try:
        return action()
    except Unavailable as reason:
        measurement.reason = str(reason)
    except Exception as error:  # a peer may fail in any way
        measurement.reason = first_line(error)
    return None


def _check(measurement: Measurement, candidate: Candidate, expected: Expected, small: Expected | None) -> Run:
    """Check at this size and, if of ours and given `small`, in every row of that; returns a run to time."""
    measurement.check, run = expected.check(candidate)
    if small is not None and measurement.correct and is_ours(candidate.name):
        same = next(c for c in small.case.candidates if c.name == candidate.name)
        in_every_row, _ = small.check(same)
        if not in_every_row.passed:
            measurement.check = in_every_row
    return run


def measure(
    case: Case,
    device: torch.device,
    rates: Rates,
    rounds: int,
    small: Case | None = None,
    with_memory: bool = True,
    limit: float = TIME_LIMIT,
    patience: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Check and time every candidate of `case`.

    Args:
        case: what to measure.
        device: where.
        rates: to compare with.
        rounds: samples of each candidate; fewer (but `FEWEST_ROUNDS`) if they would pass `limit`.
        small: the same case in its small size, where ours is checked in every row besides. None if `case`
            is that one.
        with_memory: also measure peak memory.
        limit: seconds of samples.
        patience: seconds; a peer whose call takes longer has one sample and no memory measured.
        progress: told what happens.
    """
    inputs = case.inputs(device)
    backend = _attempt(Measurement(""), lambda: case.backend(inputs)) or "none"
    case, small = case.on(device, backend), small and small.on(device, backend)
    expected = Expected.of(case, inputs)
    small_expected = small and Expected.of(small, small.inputs(device))
    measurements, runs = [Measurement(c.name, yardstick=c.yardstick) for c in case.candidates], {}
    for candidate, measurement in zip(case.candidates, measurements, strict=True):
        progress(f"checking {candidate.name}")
        run = _attempt(measurement, lambda c=candidate, m=measurement: _check(m, c, expected, small_expected))
        if run is not None and expected.inputs is not inputs:
            run = _attempt(measurement, lambda c=candidate: c.prepare(inputs))
        if run is not None:
            runs[candidate.name] = run
    _time(case, device, measurements, runs, inputs, rounds, limit, patience, progress)
    result = Result(case, backend, rates, measurements)
    if with_memory:
        progress("measuring memory")
        _fill_saved(result, runs)
        _fill_memory(result, device, small is None, patience)
    return result


def nothing_measured(case: Case, rates: Rates, error: Exception) -> Result:
    """The result of a case that failed before its candidates could: for want of memory, say."""
    return Result(case, "none", rates, [Measurement(OURS, reason=first_line(error))])


def _time(
    case: Case,
    device: torch.device,
    measurements: list[Measurement],
    runs: dict[str, Run],
    inputs: Inputs,
    rounds: int,
    limit: float,
    patience: float,
    progress: Callable[[str], None],
) -> None:
    """Round-robin; each round starts with another candidate, so that none always follows the same one."""
    timer, samplers, seconds = Timer(device), {}, 0.0
    further = [
        {name: x.clone() for name, x in inputs.items()}
        for _ in range(1, copies(case.bytes) if case.graph and timer.cuda else 1)
    ]
    for candidate, m in zip(case.candidates, measurements, strict=True):
        if m.name not in runs:
            continue
        progress(f"warming up {m.name}")
        if patience < math.inf and not is_ours(m.name) and not candidate.compiles:
            once = _attempt(m, lambda c=runs[m.name].call: _seconds(c))
            if once is None or once > patience:
                m.samples, m.timing = [] if once is None else [once], "clock"
                continue

        def prepared(candidate: Candidate = candidate) -> Sampler:
            others = () if candidate.compiles else further  # it would compile for each
            calls = [runs[candidate.name].call, *(candidate.prepare(x).call for x in others)]
            return timer.sampler(calls, case.graph)

        sampler = _attempt(m, prepared)
        taken = sampler and _attempt(m, lambda s=sampler: _seconds(s.seconds))
        if taken is not None:
            samplers[m.name], m.timing = sampler.seconds, sampler.how
            seconds += taken
    measurements = [m for m in measurements if m.name in samplers]
    rounds = min(rounds, max(FEWEST_ROUNDS, int(limit / max(seconds, 1e-9))))
    for r in range(rounds):
        progress(f"round {r + 1} of {rounds}")
        for m in measurements[r % len(measurements) :] + measurements[: r % len(measurements)]:
            m.samples.append(samplers[m.name]())


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _fill_saved(result: Result, runs: dict[str, Run]) -> None:
    """Of what ran, but for compiled candidates: hooks on saved tensors would compile them again."""
    compiled = {c.name for c in result.case.candidates if c.compiles}
    for m in result.measurements:
        if m.samples and m.name not in compiled:
            m.saved = _attempt(Measurement(""), lambda m=m: memory.saved_for_backward(runs[m.name]))


def _fill_memory(result: Result, device: torch.device, is_small: bool, patience: float) -> None:
    """Of what ran; with little patience, without what would take its time once more."""
    slow = {c.name for c in result.case.candidates if c.compiles and patience < math.inf}
    slow |= {m.name for m in result.measurements if m.samples and m.median > patience}
    names = [m.name for m in result.measurements if m.samples and m.name not in slow - {OURS}]
    try:
        found = memory.measure(result.case, names, device, is_small)
    except (Unavailable, OSError) as error:
        result.memory_reason = str(error)
        return
    except RuntimeError as error:  # out of memory on a GPU, for one
        result.memory_reason = first_line(error)
        return
    for m in result.measurements:
        m.extra_memory = found.get(m.name)
