"""`python -m benchmarks --compare OLD.json NEW.json`: what became slower, or faster, beyond noise.

A case's figure is our time over its peers' (the geometric mean of the medians, and of the minima, of those
that both runs timed): they took turns, so that whatever slows a machine slows both. Where there is no such
peer it is our time; if the machines, versions or threads differ, our time over what the machine's measured
rates allow. Between machines that differ a change of the ratio counts only where that time changes with it:
a peer may have changed too.

Noise: of the change (new over old) an interval by the bootstrap, of the medians and of the minima. A case
changed where both lie beyond `LEAST` on the same side: samples of one process do not show how much one
process differs from the next. Source: Efron 1979, percentile intervals.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .cases import OURS
from .report import SCHEMA

LEAST = 0.05  # a change up to here is noise, whatever the samples say
COVERAGE = 0.99  # of an interval: there are some 200 cases
RESAMPLES = 2000
FEWEST_SAMPLES = 3  # of a candidate; with fewer its noise is not known
SAME = ("cpu", "gpu", "isa", "threads", "torch", "triton", "device", "backend")  # or the environments differ
STATISTICS: dict[str, Callable] = {"medians": np.median, "minima": np.min}
Interval = tuple[float, float, float]  # low, the figure, high


class NotComparable(ValueError):
    """A file is not a run, or two runs have nothing in common; the message says which and why."""


@dataclass
class Change:
    """One case in both runs: the figure's change, new over old; above 1, ours became slower."""

    case: str
    against: str  # what the figure is relative to
    medians: Interval
    minima: Interval
    ours: tuple[float, float]  # median seconds, old and new
    confirmed: tuple[float, ...] = ()  # further figures that must have changed likewise

    @property
    def verdict(self) -> str:
        """`slower`, `faster` or `same`."""
        for verdict, sign in (("slower", 1), ("faster", -1)):
            ends = [interval[0 if sign > 0 else 2] for interval in (self.medians, self.minima)]
            if all(sign * math.log(x) > math.log1p(LEAST) for x in (*ends, *self.confirmed)):
                return verdict
        return "same"

    def __str__(self) -> str:
        low, middle, high = self.medians
        times = " -> ".join(f"{seconds * 1e3:.3g}" for seconds in self.ours)
        return (
            f"{self.case}: {middle:.2f} x the time {self.against} "
            f"({COVERAGE:.0%} interval {low:.2f} to {high:.2f}, by minima {self.minima[1]:.2f}); "
            f"ours {times} ms"
        )


def load(path: Path) -> dict[str, Any]:
    """A run that `--json` or `--all` wrote. Raises `NotComparable` for anything else."""
    try:
        run = json.loads(path.read_text())
    except OSError as error:
        raise NotComparable(f"{path}: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not text
        raise NotComparable(f"{path} is not JSON: {error}") from error
    if not isinstance(run, dict) or not {"schema", "environment", "results"} <= set(run):
        raise NotComparable(f"{path} is not a run of these benchmarks: it lacks schema, environment, results")
    if run["schema"] != SCHEMA:
        raise NotComparable(f"{path} has schema {run['schema']}; expected {SCHEMA}: measure once more")
    return run


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of the environment differs, in words."""
    before, after = old["environment"], new["environment"]
    pairs = [(name, before.get(name), after.get(name)) for name in SAME]
    return [f"{name}: {x} -> {y}" for name, x, y in pairs if x != y]


def cases(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every result by name, those with another number of threads too."""
    found = {result["case"]: result for result in run["results"]}
    for part in run.get("threads", ()):
        where = f" (threads: {part['threads']})"
        found |= {result["case"] + where: result for result in part["results"]}
    return found


def change(name: str, old: dict[str, Any], new: dict[str, Any], alike: bool) -> Change | None:
    """What became of a case; None where ours was not timed in both."""
    before, after = _timed(old), _timed(new)
    if OURS not in before or OURS not in after:
        return None
    peers = [peer for peer in before if peer != OURS and peer in after]
    draws = np.random.default_rng(0)
    times = {
        statistic: {
            (side, candidate): _bootstrap(run[candidate], function, draws)
            for side, run in (("old", before), ("new", after))
            for candidate in (OURS, *peers)
        }
        for statistic, function in STATISTICS.items()
    }
    machine = 1.0 if alike else _allowed(old) / _allowed(new)
    intervals, alone = {}, []
    for statistic, log in times.items():
        ours = log["new", OURS] - log["old", OURS]
        alone.append(math.exp(ours[0]) * machine)
        if peers:
            ours = ours - np.mean([log["new", peer] - log["old", peer] for peer in peers], axis=0)
        else:
            ours = ours + math.log(machine)
        intervals[statistic] = _interval(ours)
    against = f"relative to {', '.join(peers)}" if peers else "relative to the machine's rates"
    return Change(
        name,
        against if peers or not alike else "on the same machine",
        intervals["medians"],
        intervals["minima"],
        tuple(float(np.median(run[OURS])) for run in (before, after)),
        tuple(alone) if peers and not alike else (),
    )


def _timed(result: dict[str, Any]) -> dict[str, list[float]]:
    """The samples of what computed the case, by candidate."""
    rows = [c for c in result["candidates"] if c["status"] == "ok"]
    return {c["name"]: c["samples"] for c in rows if len(c["samples"]) >= FEWEST_SAMPLES}


def _bootstrap(samples: list[float], statistic: Callable, draws: np.random.Generator) -> np.ndarray:
    """Logarithms of a statistic: of the samples, then of each of `RESAMPLES` resamplings."""
    samples = np.asarray(samples)
    again = samples[draws.integers(len(samples), size=(RESAMPLES, len(samples)))]
    return np.log(np.concatenate([[statistic(samples)], statistic(again, axis=1)]))


def _interval(logarithms: np.ndarray) -> Interval:
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(logarithms[1:], (tail, 1 - tail))
    return tuple(math.exp(x) for x in (min(low, logarithms[0]), logarithms[0], max(high, logarithms[0])))


def _allowed(result: dict[str, Any]) -> float:
    """Seconds that a case takes at the rates measured on its machine, the slower of both."""
    work, traffic = result["flops"], result["bytes"]
    return max(work / result["matmul_flops_per_second"], traffic / result["copy_bytes_per_second"])


def _state(result: dict[str, Any]) -> str:
    ours = result["candidates"][0]
    return ours["status"] + (f" ({ours['reason']})" if ours.get("reason") else "")


def compare(old: dict[str, Any], new: dict[str, Any], console: Console) -> int:
    """Print what changed -> how many regressions there are.

    A regression is a case that became slower, one that no longer runs or is wrong now, and an overhead past
    its bar that was not.

    Raises:
        NotComparable: no case is in both.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    before, after, apart = cases(old), cases(new), differences(old, new)
    shared = [name for name in before if name in after]
    if not shared:
        raise NotComparable("the two runs have no case in common")
    for run, when in ((old, "old"), (new, "new")):
        facts = run["environment"]
        say(f"{when}: {facts.get('date', 'no date')}, commit {facts.get('commit', 'unknown')}")
    for text in apart:
        say(f"differs: {text}")
    if apart:
        say("The environments differ: a change must show relative to the peers and to the machine's rates.")
    for missing, where in ((set(before) - set(after), "old"), (set(after) - set(before), "new")):
        for name in sorted(missing):
            say(f"only in the {where} run: {name}")

    worse, better, untimed, same = _overheads(old, new), [], [], 0
    for name in shared:
        states = _state(before[name]), _state(after[name])
        was, is_now = (state == "ok" for state in states)
        found = change(name, before[name], after[name], not apart) if was and is_now else None
        if was != is_now:
            (worse if was else better).append(f"{name}: was {states[0]}, is {states[1]}")
        elif found is None:
            untimed.append(
                f"{name}: {states[0]} -> {states[1]}, too few samples" if was else f"{name}: {states[1]}"
            )
        elif found.verdict == "same":
            same += 1
        else:
            (worse if found.verdict == "slower" else better).append(str(found))
    for title, lines in (("Regressions", worse), ("Improvements", better), ("Not compared", untimed)):
        if lines:
            say(f"\n{title}:")
        for line in lines:
            say(f"  {line}")
    counts = f"{len(worse)} regressions, {len(better)} improvements, {same} the same within noise"
    say(f"\n{len(shared)} cases: {counts}")
    return len(worse)


def _overheads(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Calls that were within their bar and are not any more."""
    within = {(row["operation"], row["gradients"]) for row in old.get("overhead", ()) if row["passed"]}
    return [
        f"overhead of {row['operation']}{' with gradients' * row['gradients']}: "
        f"{row['microseconds_min']:.1f} us, past its bar of {row['bar']:.1f} us"
        for row in new.get("overhead", ())
        if (row["operation"], row["gradients"]) in within and not row["passed"]
    ]
