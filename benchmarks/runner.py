"""Runs a case: checks every candidate, then times them in turn, one sample each a round, in one process."""

import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from . import memory
from .cases import Candidate, Case, Run, Unavailable
from .check import Check, Expected
from .timing import Timer

T = TypeVar("T")
TIME_LIMIT = 40.0  # seconds of samples a case; a slower case gets fewer rounds
FEWEST_ROUNDS = 5


@dataclass
class Measurement:
    """One candidate in one case; `reason` says why figures are absent."""

    name: str
    reason: str | None = None
    check: Check | None = None
    yardstick: str = ""  # what it computes, if not the case's function
    samples: list[float] = field(default_factory=list)  # seconds a call
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
    matmul_rate: float  # FLOP/s
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
        if not (measurement.samples and measurement.correct):
            return None
        return self.case.flops / measurement.median / self.matmul_rate


def _attempt(measurement: Measurement, action: Callable[[], T]) -> T | None:
    """Run `action`; what stops it becomes the measurement's reason, so that a run outlives its peers."""
    try:
        return action()
    except Unavailable as reason:
        measurement.reason = str(reason)
    except Exception as error:  # a peer may fail in any way
        first_line = (str(error).strip().splitlines() or [""])[0]
        measurement.reason = f"{type(error).__name__}: {first_line}"
    return None


def _check(measurement: Measurement, candidate: Candidate, expected: Expected, small: Expected | None) -> Run:
    """Check at this size and, given `small`, in every row of the small size; returns a run to time."""
    measurement.check, run = expected.check(candidate)
    if small is not None and measurement.correct:
        in_every_row, _ = small.check(small.case.ours)
        if not in_every_row.passed:
            measurement.check = in_every_row
    return run


def measure(
    case: Case,
    device: torch.device,
    matmul_rate: float,
    rounds: int,
    small: Case | None = None,
    with_memory: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Check and time every candidate of `case`.

    Args:
        case: what to measure.
        device: where.
        matmul_rate: FLOP/s to compare with, of `machine.matmul_rate`.
        rounds: samples of each candidate; fewer (but `FEWEST_ROUNDS`) if they would pass `TIME_LIMIT`.
        small: the same case in its small size, where ours is checked in every row besides. None if `case`
            is that one.
        with_memory: also measure peak memory.
        progress: told what happens.
    """
    inputs = case.inputs(device)
    expected = Expected.of(case, inputs)
    small_expected = small and Expected.of(small, small.inputs(device))
    measurements, runs = [Measurement(c.name, yardstick=c.yardstick) for c in case.candidates], {}
    for candidate, measurement in zip(case.candidates, measurements, strict=True):
        progress(f"checking {candidate.name}")
        every_row = small_expected if candidate is case.ours else None
        run = _attempt(measurement, lambda c=candidate, m=measurement, s=every_row: _check(m, c, expected, s))
        if run is not None and expected.inputs is not inputs:
            run = _attempt(measurement, lambda c=candidate: c.prepare(inputs))
        if run is not None:
            runs[candidate.name] = run
    _time([m for m in measurements if m.name in runs], runs, Timer(device), rounds, progress)
    result = Result(case, "", matmul_rate, measurements)
    result.backend = _attempt(Measurement(""), lambda: case.backend(inputs)) or "none"
    if with_memory:
        progress("measuring memory")
        _fill_saved(result, runs)
        _fill_memory(result, device, is_small=small is None)
    return result


def _time(
    measurements: list[Measurement],
    runs: dict[str, Run],
    timer: Timer,
    rounds: int,
    progress: Callable[[str], None],
) -> None:
    """Round-robin; each round starts with another candidate, so that none always follows the same one."""
    repeats, seconds = {}, 0.0
    for m in list(measurements):
        progress(f"warming up {m.name}")
        n = _attempt(m, lambda m=m: timer.repeats(runs[m.name].call))
        if n is None:
            measurements.remove(m)
            continue
        repeats[m.name] = n
        seconds += n * timer.sample(runs[m.name].call, n)
    rounds = min(rounds, max(FEWEST_ROUNDS, int(TIME_LIMIT / max(seconds, 1e-9))))
    for r in range(rounds):
        progress(f"round {r + 1} of {rounds}")
        for m in measurements[r % len(measurements) :] + measurements[: r % len(measurements)]:
            m.samples.append(timer.sample(runs[m.name].call, repeats[m.name]))


def _fill_saved(result: Result, runs: dict[str, Run]) -> None:
    """Of what ran, but for compiled candidates: hooks on saved tensors would compile them again."""
    compiled = {c.name for c in result.case.candidates if c.compiles}
    for m in result.measurements:
        if m.samples and m.name not in compiled:
            m.saved = memory.saved_for_backward(runs[m.name])


def _fill_memory(result: Result, device: torch.device, is_small: bool) -> None:
    names = [m.name for m in result.measurements if m.samples]
    try:
        found = memory.measure(result.case, names, device, is_small)
    except (Unavailable, OSError, subprocess.TimeoutExpired) as error:
        result.memory_reason = str(error)
        return
    for m in result.measurements:
        m.extra_memory = found.get(m.name)
