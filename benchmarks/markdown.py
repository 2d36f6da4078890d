"""The report of a run of all cases, as Markdown: every figure of the JSON that a reader compares."""

from collections.abc import Iterable
from typing import Any

from . import figures
from .cases import OURS

Result = dict[str, Any]
OPERATION_COLUMNS = (
    "", "median ms", "min ms", "x ours", "by minima", "of matmul", "of copy", "memory MiB", "kept MiB",
    "max error", "allowed",
)  # fmt: skip
MODEL_COLUMNS = (
    "", "median ms", "tokens/s", "ms a token", "x ours", "by minima", "memory MiB", "max error", "allowed",
)  # fmt: skip
HOW_TO_READ = f"""\
All candidates of a case take turns in one process. *x ours*: how many times as long the peer takes, by the
ratio of medians and of minima; above 1, {OURS} is faster. *of matmul*, *of copy*: useful FLOP/s and bytes/s
over the rate of torch's matmul in that dtype and of a large copy, both measured in this run. *memory*: peak
beyond inputs and results; *kept*: what autograd keeps for the backward, parameters aside. *max error*: from
float64; *allowed*: twice that of plain PyTorch in the same dtype, and two roundings. What fails its check is
WRONG and has no ratio. A *yardstick* computes another function, and is timed for the cost alone. Times of a
shared machine mean little: quote ratios.
"""


def render(run: dict[str, Any], drawn: Iterable[str] = ()) -> str:
    """The report; `drawn` are the figures that lie beside it, without suffix."""
    drawn = list(drawn)
    parts = [f"# Benchmarks: {figures.where(run)}", _environment(run), HOW_TO_READ]
    parts += [_figure("scoreboard", "Times of the peers, ours = 1", drawn), _bars(run)]
    grouped = figures.operations(run["results"])
    if grouped:
        parts += ["## Operations and models", _summary(grouped)]
    for operation, results in grouped.items():
        name = figures.slug(operation).replace("-", "_")
        parts += [f"### {operation}", _figure(name, f"{operation}, every case", drawn), _table(results)]
    parts += _scaling(run, drawn)
    parts += _threads(run, drawn)
    parts += _overhead(run, drawn)
    parts += _absent(run)
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _environment(run: dict[str, Any]) -> str:
    facts = " | ".join(f"{name} {value}" for name, value in run["environment"].items())
    rates = {}
    for result in run["results"]:
        dtype = result["case"].rsplit("/", 1)[-1]
        rates[dtype] = result["matmul_flops_per_second"] / 1e9
    matmul = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in rates.items())
    copy = [result["copy_bytes_per_second"] / 1e9 for result in run["results"][:1]]
    reached = f"\n\nMeasured here: matmul {matmul}; copy {copy[0]:.1f} GB/s." if copy else ""
    return f"`{facts}`{reached}"


def _figure(name: str, title: str, drawn: list[str]) -> str:
    return f"![{title}]({name}.svg)" if name in drawn else ""


def _rows(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None, form: str = "{:.3g}", factor: float = 1.0) -> str:
    return "" if value is None else form.format(value * factor)


def _bars(run: dict[str, Any]) -> str:
    rows = [
        (
            result["case"],
            bar["against"],
            *(_number(bar[name]) for name in ("must", "aim", "reached")),
            bar["verdict"],
        )
        for result in run["results"]
        for bar in result["bars"]
    ]
    head = ("what ours must be, at least", "against", "must be", "aim", "reached", "verdict")
    return _rows(head, rows) if rows else ""


def _peers(result: Result) -> list[dict[str, Any]]:
    """Those that compute the same function and have a ratio."""
    return [c for c in result["candidates"] if c["speedup"] and c["status"] == "ok"]


def _summary(grouped: dict[str, list[Result]]) -> str:
    """Of each operation the smallest, the middle and the largest ratio to the fastest peer of a case."""
    rows = []
    for operation, results in grouped.items():
        ratios = sorted(
            (min(c["speedup"]["medians"] for c in peers), result["case"])
            for result in results
            if (peers := _peers(result))
        )
        wrong = sum(result["candidates"][0]["status"] != "ok" for result in results)
        if ratios:
            shown = (f"{ratios[i][0]:.2f}" for i in (0, len(ratios) // 2, -1))
            rows.append((operation, str(len(results)), *shown, ratios[0][1], str(wrong or "")))
        else:
            rows.append((operation, str(len(results)), "", "", "", "", str(wrong or "")))
    head = ("fastest peer over ours", "cases", "least", "middle", "most", "least in", "ours wrong or absent")
    return _rows(head, rows)


def _table(results: list[Result]) -> str:
    models = any(result["tokens"] for result in results)
    rows = []
    for result in results:
        rows.append(
            (
                f"**{result['case']}**: {result['sizes']}",
                *[""] * (len(MODEL_COLUMNS if models else OPERATION_COLUMNS) - 1),
            )
        )
        for c in result["candidates"]:
            if c["status"] != "absent":
                rows.append(_model_row(c, result) if models else _operation_row(c, result))
    return _rows(MODEL_COLUMNS if models else OPERATION_COLUMNS, rows)


def _name(c: dict[str, Any], result: Result) -> str:
    if c["name"] == OURS:
        return f"**{OURS}** ({result['backend']})"
    return c["name"] + " (yardstick)" * (c["status"] == "yardstick")


def _ratios(c: dict[str, Any]) -> tuple[str, str]:
    if c["status"] == "wrong":
        return "WRONG", ""
    ratio = c["speedup"] or {"medians": None, "minima": None}
    return _number(ratio["medians"], "{:.2f}"), _number(ratio["minima"], "{:.2f}")


def _errors(c: dict[str, Any]) -> tuple[str, str]:
    return _number(c["max_error"], "{:.1e}"), _number(c["allowed_error"], "{:.1e}")


def _operation_row(c: dict[str, Any], result: Result) -> tuple[str, ...]:
    return (
        _name(c, result),
        _number(c["median_s"], "{:.4g}", 1e3),
        _number(c["min_s"], "{:.4g}", 1e3),
        *_ratios(c),
        _number(c["of_matmul_rate"], "{:.0%}"),
        _number(c["of_copy_bandwidth"], "{:.0%}"),
        _number(c["extra_memory_bytes"], "{:.1f}", 2**-20),
        _number(c["saved_for_backward_bytes"] or None, "{:.1f}", 2**-20),
        *_errors(c),
    )


def _model_row(c: dict[str, Any], result: Result) -> tuple[str, ...]:
    seconds, tokens = c["median_s"], result["tokens"]
    return (
        _name(c, result),
        _number(seconds, "{:.4g}", 1e3),
        _number(tokens / seconds if seconds else None, "{:.0f}"),
        _number(seconds, "{:.3g}", 1e3 / tokens),
        *_ratios(c),
        _number(c["extra_memory_bytes"], "{:.1f}", 2**-20),
        *_errors(c),
    )


def _scaling(run: dict[str, Any], drawn: list[str]) -> list[str]:
    """A table for each curve: a row for each size, a column for each candidate."""
    parts = []
    for axis, (size, _) in figures.AXES.items():
        found = figures.curves(run, axis)
        if found:
            parts += [f"## Scaling: {size}", _figure(f"scaling_{axis}", f"Time over {size}", drawn)]
        for name, results in found.items():
            timed = [
                {c["name"]: c for c in r["candidates"] if c["status"] in ("ok", "wrong")} for r in results
            ]
            names = list(dict.fromkeys(name for row in timed for name in row))
            rows = [[str(r["scaling"]["at"])] for r in results]
            for row, candidates in zip(rows, timed, strict=True):
                for candidate in names:
                    c = candidates.get(candidate, {"status": "", "median_s": None})
                    row.append("WRONG" if c["status"] == "wrong" else _number(c["median_s"], "{:.4g}", 1e3))
            memory = [row.get(OURS, {}).get("extra_memory_bytes") for row in timed]
            for row, size_of in zip(rows, memory, strict=True):
                row.append(_number(size_of, "{:.1f}", 2**-20))
            parts += [f"**{name}**, median ms", _rows([axis, *names, "memory of ours, MiB"], rows)]
    return parts


def _threads(run: dict[str, Any], drawn: list[str]) -> list[str]:
    bars = figures.thread_speedups(run)
    if not bars:
        return []
    rows = [(row.case, row.name, str(row.threads), f"{row.times:.2f}") for row in bars]
    head = ("case", "", "threads", "times as fast as with 1 (medians)")
    return ["## Scaling: threads", _figure("scaling_threads", "Threads", drawn), _rows(head, rows)]


def _overhead(run: dict[str, Any], drawn: list[str]) -> list[str]:
    reason, rows = run.get("overhead_reason"), run.get("overhead", ())
    if not (reason or rows):
        return []
    title = "## Host overhead: calls of one token, forward"
    if reason:
        return [title, f"Not measured: {reason}"]
    head = ("microseconds", "min", "median", "torch.add, min", "bar", "within")
    table = [
        (
            row["operation"] + ", with gradients" * row["gradients"],
            *(_number(row[name]) for name in ("microseconds_min", "microseconds_median", "add_min", "bar")),
            "yes" if row["passed"] else "NO",
        )
        for row in rows
    ]
    return [title, _figure("overhead", "Host overhead", drawn), _rows(head, table)]


def _absent(run: dict[str, Any]) -> list[str]:
    """Who did not run, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in run["results"]:
        for c in result["candidates"]:
            if c["status"] == "absent":
                reasons.setdefault((c["name"], c["reason"]), []).append(result["case"])
    if not reasons:
        return []
    rows = [
        (name, reason, ", ".join(cases) if len(cases) <= 3 else f"{len(cases)} cases")
        for (name, reason), cases in reasons.items()
    ]
    return ["## Who did not run, and why", _rows(("", "why", "where"), rows)]
