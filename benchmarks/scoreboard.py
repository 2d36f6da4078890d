"""`python -m benchmarks --all`: every case, threads and host overhead in one run, and the report of it.

A run that is not quick has a time limit. Each case gets a share of what is left, so that samples become fewer
rather than cases; a peer whose call takes longer than `PATIENCE` has one sample and no memory measured, and
who must be compiled is left out once the run is behind. Whole models come first, for they matter most.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import figures, machine, markdown, report, runner
from .cases import Candidate, Case, Inputs, Run, Unavailable, first_line

MINUTES, THREAD_MINUTES = 19.0, 2.0  # of the cases, and of those with other numbers of threads
ROUNDS = 11  # samples of a candidate, at most
PATIENCE = 1.0  # seconds
LAG = 0.05  # of the time: a run that is so far behind is late
SHARE = 0.5  # of a case's time, for its samples; the rest goes into checks, warm-up and memory
# Measured with other numbers of threads too.
THREAD_CASES = tuple(
    name for name in figures.HEADLINES if name.endswith(("forward_backward/fp32", "training/fp32"))
)
END_TO_END = "end_to_end/"


class Pace:
    """What a case may cost, by the time and the cases that are left."""

    def __init__(self, minutes: float, cases: int) -> None:
        self.start, self.seconds, self.cases, self.done = time.monotonic(), 60 * minutes, cases, 0

    @property
    def spent(self) -> float:
        """The part of the time that is gone; past 1 it is up."""
        return (time.monotonic() - self.start) / self.seconds

    @property
    def late(self) -> bool:
        """More time is gone than cases are done."""
        return self.spent > self.done / self.cases + LAG

    def limit(self) -> float:
        """Seconds of samples for the next case."""
        share = (1 - self.spent) * self.seconds / (self.cases - self.done)
        return max(SHARE * share, 0.0)


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
        options = {}
        if not compilers:
            case = without_compilers(case, "left out of a quick run: it must be compiled")
        elif pace and pace.late:
            case = without_compilers(case, "left out: the run is behind, and it must be compiled")
        if pace:
            models = name.startswith(END_TO_END)
            options = {"limit": pace.limit()} | ({} if models else {"patience": PATIENCE})
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
                    with_memory=with_memory,
                    progress=lambda text, name=name, status=status: status.update(f"{name}: {text}"),
                    **options,
                )
            except Exception as error:  # the other cases go on
                result = runner.nothing_measured(case, rates[case.dtype], error)
        if pace:
            pace.done += 1
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
) -> dict[str, Any]:
    """Measure everything and write results.json, report.md and the figures into `out` -> the run.

    Args: as of `measure`; `rounds` None: as many as there is time for; overhead: of the host, too; quick:
        with two, without compilers and without a time limit.
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
    pace = None if quick else Pace(MINUTES, len(cases))
    found = measure({n: cases[n] for n in first}, small, device, console, keep, **options, pace=pace)
    found.sort(key=lambda result: order.index(result.case.name))
    chosen = {name: cases[name] for name in THREAD_CASES if name in cases}
    numbers = [2**i for i in range(threads.bit_length()) if 2**i < threads] if device.type == "cpu" else []
    if chosen and numbers:
        options |= {"with_memory": False, "compilers": False}
        try:
            for n in numbers:
                console.print(f"With {n} of {threads} threads:", style="bold", highlight=False)
                torch.set_num_threads(n)
                pace = None if quick else Pace(THREAD_MINUTES / len(numbers), len(chosen))
                keeper = lambda results, n=n: keep_threads(n, results)  # noqa: E731
                measure(chosen, None, device, console, keeper, **options, pace=pace)
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
