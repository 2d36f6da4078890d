"""What a run prints and keeps: a table for each case, and JSON."""

import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .cases import OURS, Bar
from .machine import Facts
from .runner import Measurement, Result

HEADINGS = (
    "median ms",
    "min ms",
    "ours faster by",
    "by minima",
    "TFLOP/s",
    "of matmul",
    "GB/s",
    "of copy",
    "max error",
    "memory MiB",
)
BAR_HEADINGS = ("against", "must be", "aim", "reached", "verdict")
SAMPLES = re.compile(r"\[[-+.\de,\s]+\]")  # lists of numbers, which go on one line
SCHEMA = 2  # of the JSON; raised when a field changes its meaning


def to_json(environment: Facts, results: list[Result]) -> dict[str, Any]:
    """A run as plain data; times in seconds, memory in bytes, errors absolute.

    `speedup` is the peer's time over ours, null for ours and wherever one of the two did not run or failed
    its check. A candidate of status `yardstick` computes another function, which `yardstick` names: its times
    and its `speedup` say what that costs.
    """
    return {"schema": SCHEMA, "environment": environment, "results": [_result(r) for r in results]}


def _result(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "case": case.name,
        "operation": case.operation,
        "sizes": case.sizes,
        "flops": case.flops,
        "bytes": case.bytes,
        "matmul_flops_per_second": result.rates.matmul,
        "copy_bytes_per_second": result.rates.copy,
        "backend": result.backend,
        "memory_reason": result.memory_reason,
        "tokens": case.tokens,
        "scaling": case.scaling and case.scaling._asdict(),
        "candidates": [_candidate(result, m) for m in result.measurements],
        "bars": [_bar(result, bar) for bar in case.bars],
    }


def _bar(result: Result, bar: Bar) -> dict[str, Any]:
    reached = result.reached(bar)
    return {**bar._asdict(), "reached": reached, "verdict": bar.verdict(reached)}


def _candidate(result: Result, m: Measurement) -> dict[str, Any]:
    speedup = result.speedup(m)
    times = (
        {"median_s": m.median, "min_s": min(m.samples)} if m.samples else {"median_s": None, "min_s": None}
    )
    return {
        "name": m.name,
        "status": status(m),
        "reason": m.reason,
        "yardstick": m.yardstick or None,
        **times,
        "rounds": len(m.samples),
        "samples": [float(f"{seconds:.5g}") for seconds in m.samples],
        "timing": m.timing,
        "speedup": speedup and {"medians": speedup[0], "minima": speedup[1]},
        "of_matmul_rate": result.of_matmul_rate(m),
        "of_copy_bandwidth": result.of_copy_bandwidth(m),
        "max_error": m.check and m.check.max_error,
        "allowed_error": m.check and m.check.allowed,
        "worst_output": m.check and m.check.output,
        "extra_memory_bytes": m.extra_memory,
        "saved_for_backward_bytes": m.saved,
    }


def status(m: Measurement) -> str:
    """`ok`, `wrong` (it failed its check), `absent` (there is a reason) or `yardstick` (not checked)."""
    if m.reason is not None:
        return "absent"
    if m.yardstick:
        return "yardstick"
    return "ok" if m.correct else "wrong"


def write_json(run: dict[str, Any], path: Path) -> None:
    """Write a run; NaN and infinity become null, which JSON lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(run), indent=1, allow_nan=False)
    path.write_text(SAMPLES.sub(lambda numbers: "".join(numbers[0].split()), text) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def print_environment(console: Console, run: dict[str, Any]) -> None:
    """The facts of the machine, on one line."""
    console.print(" | ".join(f"{k} {v}" for k, v in run["environment"].items()), style="dim", highlight=False)


def print_run(console: Console, run: dict[str, Any]) -> None:
    """A whole run."""
    print_environment(console, run)
    for result in run["results"]:
        print_result(console, result)
    print_bars(console, run)


def print_bars(console: Console, run: dict[str, Any]) -> None:
    """What ours had to reach in this run, and whether it did; nothing if there was nothing."""
    table = _table("What ours must be, at least", BAR_HEADINGS)
    for result in run["results"]:
        for bar in result.get("bars", ()):
            table.add_row(result["case"], bar["against"], *_bar_row(bar))
    if table.row_count:
        console.print(table)


def _bar_row(bar: dict[str, Any]) -> list[str]:
    numbers = (_shown(bar[name], "{:.3g}") for name in ("must", "aim", "reached"))
    return [*numbers, bar["verdict"]]


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def print_result(console: Console, result: dict[str, Any]) -> None:
    """One case as a table: ours in the first row, then the peers."""
    copy = result.get("copy_bytes_per_second")  # not in results of before
    here = f"matmul {result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s" + _shown(
        copy, ", copy {:.0f} GB/s", 1e-9
    )
    table = _table(f"{result['case']}  {result['sizes']}  (here: {here})", HEADINGS)
    ran = [candidate for candidate in result["candidates"] if candidate["status"] != "absent"]
    for candidate in ran:
        table.add_row(*_row(candidate, result))
    console.print(table)
    notes = {c["name"]: f"a yardstick, not this function: {c['yardstick']}" for c in ran if _is_yardstick(c)}
    notes |= {c["name"]: c["reason"] for c in result["candidates"] if c not in ran}
    reasons = {c["name"]: c.get("timing") or "" for c in ran}
    notes |= {name: f"timed by {how}" for name, how in reasons.items() if "no graph" in how}
    saved = {c["name"]: c.get("saved_for_backward_bytes") for c in ran}
    sizes = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in saved.items() if size)
    notes |= {"MiB kept for the backward, without parameters": sizes} if sizes else {}
    notes |= {"memory": result["memory_reason"]} if result["memory_reason"] else {}
    for name, reason in notes.items():
        console.print(f"  {name}: {reason}", style="dim", highlight=False)


def _is_yardstick(candidate: dict[str, Any]) -> bool:
    return candidate["status"] == "yardstick"


def _row(candidate: dict[str, Any], result: dict[str, Any]) -> list[str]:
    name, speedup, median = candidate["name"], candidate["speedup"], candidate["median_s"]
    if name == OURS:
        name = f"{name} ({result['backend']})"
    rate = 1 / median if median and candidate["status"] == "ok" else None
    return [
        name,
        _shown(median, "{:.3f}", 1e3),
        _shown(candidate["min_s"], "{:.3f}", 1e3),
        "WRONG" if candidate["status"] == "wrong" else _shown(speedup and speedup["medians"], "{:.2f}x"),
        _shown(speedup and speedup["minima"], "{:.2f}x"),
        _shown(rate, "{:.3g}", result["flops"] / 1e12),
        _shown(candidate["of_matmul_rate"], "{:.0%}"),
        _shown(rate, "{:.3g}", result["bytes"] / 1e9),
        _shown(candidate.get("of_copy_bandwidth"), "{:.0%}"),
        "yardstick" if _is_yardstick(candidate) else _shown(candidate["max_error"], "{:.1e}"),
        _shown(candidate["extra_memory_bytes"], "{:.1f}", 2**-20),
    ]


def _shown(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else form.format(value * factor)
