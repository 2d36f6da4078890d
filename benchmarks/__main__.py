"""`python -m benchmarks`: run cases, print tables, write JSON and figures."""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from . import machine, report, runner
from .cases import DTYPES, Case, registry, select

ROUNDS, QUICK_ROUNDS = 15, 3
WIDTH = 120  # columns of a report that no terminal shows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times slmkernels and its peers in turn, in one process. A case that fails its check "
        "against float64 shows WRONG and no speed-up, and the exit status is 1. Quote ratios, not times.",
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help="names, prefixes or globs, such as 'sliding_window/*/fp32'")
    add("--list", action="store_true", help="list the cases and stop")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--dtype", action="append", choices=tuple(DTYPES), default=[], help="only this dtype; may be repeated"
    )
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--rounds", type=int, metavar="N", help=f"samples of each candidate (default {ROUNDS})")
    add("--quick", action="store_true", help=f"small sizes, {QUICK_ROUNDS} rounds, no memory: a smoke run")
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--plot", type=Path, metavar="DIR", help="draw a figure for each operation, SVG and PNG")
    add("--out", type=Path, metavar="DIR", help="all of it: results.json, results.txt and the figures")
    add("--load", type=Path, metavar="FILE", help="show the results of an earlier --json instead of running")
    return parser


def _run(options: argparse.Namespace, cases: dict[str, Case], console: Console) -> dict:
    device = torch.device(options.device)
    small, rounds = registry(small=True), options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    environment, results, rates = machine.environment(device), [], {}
    report.print_environment(console, {"environment": environment})
    for name, case in cases.items():
        with Console(stderr=True).status(name) as status:
            if case.dtype not in rates:
                status.update("measuring torch's matmul rate")
                rates[case.dtype] = machine.matmul_rate(case.dtype, device)
            result = runner.measure(
                case,
                device,
                rates[case.dtype],
                rounds,
                small=None if options.quick else small[name],
                with_memory=not (options.quick or options.no_memory),
                progress=lambda text, name=name, status=status: status.update(f"{name}: {text}"),
            )
        results.append(result)
        report.print_result(console, report.to_json(environment, [result])["results"][0])
    return report.to_json(environment, results)


def _show(run: dict, console: Console) -> None:
    report.print_environment(console, run)
    for result in run["results"]:
        report.print_result(console, result)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if one of our own results is wrong or missing."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(record=True, width=None if sys.stdout.isatty() else WIDTH)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    try:
        cases = select(registry(options.quick), options.cases, options.dtype)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for name, case in cases.items():
            console.print(f"{name:<46} {case.sizes}", highlight=False)
        return 0
    if options.load:
        run = json.loads(options.load.read_text())
        _show(run, console)
    else:
        run = _run(options, cases, console)
    if options.json:
        report.write_json(run, options.json)
    if options.out:
        report.write_json(run, options.out / "results.json")
        (options.out / "results.txt").write_text(console.export_text())
    for folder in {options.plot, options.out} - {None}:
        report.plot(run, folder)
    return int(any(result["candidates"][0]["status"] != "ok" for result in run["results"]))


if __name__ == "__main__":
    sys.exit(main())
