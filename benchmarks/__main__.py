"""`python -m benchmarks`: run cases, print tables, write JSON and figures."""

import argparse
import io
import json
import re
import sys
from pathlib import Path

import torch
from rich.console import Console

from . import machine, report, runner
from .cases import DTYPES, Case, is_ours, registry, select

ROUNDS, QUICK_ROUNDS = 15, 3
WIDTH = 160  # columns of a report that no terminal shows
RESULTS = Path(__file__).parent / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times slmkernels and its peers in turn, in one process. A case that fails its check "
        "against float64 shows WRONG and no speed-up, and the exit status is 1. Quote ratios, not times. "
        "On a GPU each of our backends has a row, cases for a GPU run too, and a run that is not quick, and "
        "not told where to write, writes benchmarks/results/<gpu>/<operation>/.",
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
    environment, results = machine.environment(device), []
    run = report.to_json(environment, results)
    report.print_environment(console, run)
    with Console(stderr=True).status("measuring torch's matmul rate and the copy bandwidth"):
        copy, dtypes = machine.copy_bandwidth(device), {case.dtype for case in cases.values()}
        rates = {dtype: machine.Rates(machine.matmul_rate(dtype, device), copy) for dtype in dtypes}
    for name, case in cases.items():
        with Console(stderr=True).status(name) as status:
            try:
                result = runner.measure(
                    case,
                    device,
                    rates[case.dtype],
                    rounds,
                    small=None if options.quick else small[name],
                    with_memory=not (options.quick or options.no_memory),
                    progress=lambda text, name=name, status=status: status.update(f"{name}: {text}"),
                )
            except Exception as error:  # the other cases go on
                result = runner.nothing_measured(case, rates[case.dtype], error)
        results.append(result)
        run = report.to_json(environment, results)
        report.print_result(console, run["results"][-1])
        _write(run, options, pages=False)  # so that a run that is cut short leaves what it measured
    report.print_bars(console, run)
    return run


def _write(run: dict, options: argparse.Namespace, pages: bool = True) -> None:
    """The JSON where the options want it, and with `pages` the tables and figures beside it."""
    if options.json:
        report.write_json(run, options.json)
    if options.plot and pages:
        report.plot(run, options.plot)
    for folder, part in _folders(run, options):
        report.write_json(part, folder / "results.json")
        if pages:
            page = Console(file=io.StringIO(), width=WIDTH)
            report.print_run(page, part)
            (folder / "results.txt").write_text(page.file.getvalue())
            report.plot(part, folder)


def _folders(run: dict, options: argparse.Namespace) -> list[tuple[Path, dict]]:
    """The folders to fill, with what of the run goes into each. For a GPU a folder for each operation, so
    that a run of one leaves the others' results as they are."""
    if options.out:
        return [(options.out, run)]
    if options.device == "cpu" or options.json or options.plot or options.quick or options.load:
        return []
    gpu = re.sub(r"[^a-z0-9]+", "-", run["environment"]["gpu"].lower()).strip("-")
    parts = {}
    for result in run["results"]:
        parts.setdefault(result["case"].split("/")[0], []).append(result)
    return [(RESULTS / gpu / name, {**run, "results": part}) for name, part in parts.items()]


def _failed(result: dict) -> bool:
    """Ours did not run or was wrong; of our further backends, was wrong."""
    ours, *others = result["candidates"]
    return ours["status"] != "ok" or any(c["status"] == "wrong" and is_ours(c["name"]) for c in others)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if one of our own results is wrong or missing."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    try:
        gpu = options.device == "cuda" or options.quick or options.list
        cases = select(registry(options.quick), options.cases, options.dtype, gpu)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for name, case in cases.items():
            console.print(f"{name:<46} {case.sizes}", highlight=False)
        return 0
    if options.load:
        run = json.loads(options.load.read_text())
        report.print_run(console, run)
    else:
        run = _run(options, cases, console)
    _write(run, options)
    return int(any(_failed(result) for result in run["results"]))


if __name__ == "__main__":
    sys.exit(main())
