"""`python -m benchmarks --all`: every case, threads and host overhead in one run, and the report of it.

A run that is not quick has a time limit. Each case gets a share of what is left, so that samples become fewer
rather than cases; a peer whose call takes longer than `PATIENCE` has one sample and no memory measured, and
who must be compiled is left out once the run is behind, then memory. Whole models come first, for they matter
most.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import figures, machine, markdown, report, runner
from .cases import Candidate, Case, Inputs, Run, Unavailable, first_line

MINUTES, THREAD_MINUTES = 19.0, 2.0  # of the cases, and of those with other numbers of threads
ROUNDS = 11  # samples of a candidate, at most
PATIENCE = 0.7  # seconds
LAG = 0.04  # of the time: so far behind, compiled peers are left out; twice so far, memory
MODEL_WEIGHT = 4  # of a whole model, in cases of an operation
SHARE = 0.5  # of a case's time, for its samples; the rest goes into checks, warm-up and memory
# Measured with other numbers of threads too.
THREAD_CASES = tuple(
    name for name in figures.HEADLINES if name.endswith(("forward_backward/fp32", "training/fp32"))
)
END_TO_END = "end_to_end/"


def weight(case: Case) -> int:
    """What a case takes beside others."""
    return MODEL_WEIGHT if case.name.startswith(END_TO_END) else 1 + sum(c.compiles for c in case.peers)


class Pace:
    """What a case may cost, by the time and the cases that are left."""

    def __init__(self, minutes: float, weights: dict[str, int]) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes
        self.weights, self.left = weights, sum(weights.values())

    @property
    def spent(self) -> float:
        """The part of the time that is gone; past 1 it is up."""
        return (time.monotonic() - self.start) / self.seconds

    @property
    def behind(self) -> float:
        """By how much of the time."""
        return self.spent - 1 + self.left / sum(self.weights.values())

    def limit(self, name: str) -> float:
        """Seconds of samples for a case that is to run next."""
        return max(SHARE * (1 - self.spent) * self.seconds * self.weights[name] / self.left, 0.0)

    def done(self, name: str) -> None:
        """The case has run."""
        self.left -= self.weights[name]


def without_compilers(case: Case, why: str) -> Case:
    """The case, its compiled peers left out with a reason."""

    def prepare(inputs: Inputs) -> Run:
        raise Unavailable(why)

    peers = tuple(Candidate(p.name, prepare, False, p.yardstick) if p.compiles else p for p in case.peers)
    return replace(case, peers=peers)


def measure(
    cases: dict[str, Case],
    small: dict[str, Case] | None,
    device: torch.device,
    console: Console,
    keep: Callable[[list[runner.Result]], dict[str, Any]],
    *,
    rounds: int,
    with_memory: bool,
    pace: Pace | None = None,
    compilers: bool = True,
) -> list[runner.Result]:
    """Measure case after case, print each, and give all so far to `keep`.

    Args:
        cases: what to measure, by name.
        small: the same in their small sizes, to check those too; None if they are the small ones.
        device: where.
        console: for the tables.
        keep: what writes the results -> the run as plain data.
        rounds: samples of each candidate.
        with_memory: measure memory too.
        pace: of a run with a time limit.
        compilers: also peers that must be compiled.
    """
    with Console(stderr=True).status("measuring torch's matmul rate and the copy bandwidth"):
        copy, dtypes = machine.copy_bandwidth(device), {case.dtype for case in cases.values()}
        rates = {dtype: machine.Rates(machine.matmul_rate(dtype, device), copy) for dtype in dtypes}
    results = []
    for name, case in cases.items():
        options, memory_too = {}, with_memory
        if not compilers:
            case = without_compilers(case, "left out: it must be compiled")
        elif pace and pace.behind > LAG:
            case = without_compilers(case, "left out: the run is behind, and it must be compiled")
        if pace:
            models = name.startswith(END_TO_END)
            options = {"limit": pace.limit(name)} | ({} if models else {"patience": PATIENCE})
            memory_too = with_memory and pace.behind < 2 * LAG
        with Console(stderr=True).status(name) as status:
            try:
                if pace and pace.spent > 1:
                    raise TimeoutError(f"not run: the time of {pace.seconds / 60:g} minutes was up")
                result = runner.measure(
                    case,
                    device,
                    rates[case.dtype],
                    rounds,
                    small=small and small[name],
                    with_memory=memory_too,
                    progress=lambda text, name=name, status=status: status.update(f"{name}: {text}"),
                    **options,
                )
            except Exception as error:  # the other cases go on
                result = runner.nothing_measured(case, rates[case.dtype], error)
        if with_memory and not memory_too:
            result.memory_reason = "left out: the run is behind"
        if pace:
            pace.done(name)
        results.append(result)
        report.print_result(console, keep(results)["results"][-1])
    return results


def run_all(
    cases: dict[str, Case],
    small: dict[str, Case] | None,
    device: torch.device,
    console: Console,
    out: Path,
    *,
    rounds: int | None,
    with_memory: bool,
    overhead: bool,
    quick: bool,
    minutes: float = MINUTES,
) -> dict[str, Any]:
    """Measure everything and write results.json, report.md and the figures into `out` -> the run.

    Args: as of `measure`; `rounds` None: as many as there is time for; overhead: of the host, too; quick:
        with two, without compilers and without a time limit; minutes: the limit of the cases, if not.
    """
    rounds = rounds or (2 if quick else ROUNDS)
    threads, environment = torch.get_num_threads(), machine.environment(device)
    extras: dict[str, Any] = {"threads": []} | (_overhead() if overhead else {})
    order = list(cases)
    first = sorted(cases, key=lambda name: not name.startswith(END_TO_END))

    def keep(results: list[runner.Result]) -> dict[str, Any]:
        run = report.to_json(environment, results) | extras
        report.write_json(run, out / "results.json")
        return run

    def keep_threads(n: int, results: list[runner.Result]) -> dict[str, Any]:
        part = {"threads": n, "results": report.to_json(environment, results)["results"]}
        extras["threads"] = [p for p in extras["threads"] if p["threads"] != n] + [part]
        keep(found)
        return part

    options = {"rounds": rounds, "with_memory": with_memory, "compilers": not quick}
    pace = None if quick else Pace(minutes, {name: weight(case) for name, case in cases.items()})
    found = measure({n: cases[n] for n in first}, small, device, console, keep, **options, pace=pace)
    found.sort(key=lambda result: order.index(result.case.name))
    chosen = {name: cases[name] for name in THREAD_CASES if name in cases}
    numbers = [2**i for i in range(threads.bit_length()) if 2**i < threads] if device.type == "cpu" else []
    if chosen and numbers:
        weights = {name: weight(case) for name, case in chosen.items()}
        options |= {"with_memory": False, "compilers": False}
        try:
            for n in numbers:
                console.print(f"With {n} of {threads} threads:", style="bold", highlight=False)
                torch.set_num_threads(n)
                pace = None if quick else Pace(THREAD_MINUTES / len(numbers), weights)
                measure(chosen, None, device, console, partial(keep_threads, n), **options, pace=pace)
        finally:
            torch.set_num_threads(threads)
    run = keep(found)
    write_report(run, out)
    return run


def write_report(run: dict[str, Any], out: Path) -> None:
    """The figures and report.md of a run."""
    (out / "report.md").write_text(markdown.render(run, figures.write(run, out)))


def _overhead() -> dict[str, Any]:
    try:
        return {"overhead": importlib.import_module(f"{__package__}.overhead").measure()}
    except Exception as error:  # the rest of the run goes on
        return {"overhead_reason": first_line(error)}
