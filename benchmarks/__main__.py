"""`python -m benchmarks`: run cases, print tables, write JSON and figures."""

import argparse
import io
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from . import compare, figures, machine, machine_kind, report, runner, scoreboard
from .cases import DTYPES, Case, is_ours, registry, select

ROUNDS, QUICK_ROUNDS = 15, 3
WIDTH = 160  # columns of a report that no terminal shows
RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path(__file__).parents[1] / "build" / "benchmarks"


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
    add(
        "--all",
        action="store_true",
        help="the scoreboard: the cases (of all operations, if none is named), models, scaling, threads and "
        f"host overhead in about {scoreboard.MINUTES + scoreboard.THREAD_MINUTES + 2:.0f} minutes, written "
        "as report.md, results.json and figures to --out or benchmarks/results/<machine kind>/",
    )
    add(
        "--minutes",
        type=float,
        metavar="N",
        default=scoreboard.MINUTES,
        help="of --all, for its cases: fewer mean fewer samples",
    )
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="name what became slower or faster from one run's JSON to another's, beyond noise; exit status "
        "1 if anything became slower",
    )
    add("--load", type=Path, metavar="FILE", help="show an earlier run instead; with --all write its report")
    return parser


def _run(options: argparse.Namespace, cases: dict[str, Case], console: Console) -> dict:
    device = torch.device(options.device)
    environment = machine.environment(device)
    report.print_environment(console, report.to_json(environment, []))
    small = None if options.quick else registry(small=True)
    with_memory = not (options.quick or options.no_memory)
    if options.all:
        run = scoreboard.run_all(
            cases,
            small,
            device,
            console,
            _scoreboard_folder(options),
            rounds=options.rounds,
            with_memory=with_memory,
            overhead=not options.cases,
            quick=options.quick,
            minutes=options.minutes,
        )
        report.print_bars(console, run)
        return run

    def keep(results: list[runner.Result]) -> dict:
        run = report.to_json(environment, results)
        _write(run, options, pages=False)  # so that a run that is cut short leaves what it measured
        return run

    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    run = keep(
        scoreboard.measure(cases, small, device, console, keep, rounds=rounds, with_memory=with_memory)
    )
    report.print_bars(console, run)
    return run


def _scoreboard_folder(options: argparse.Namespace) -> Path:
    """Where `--all` writes; a quick run is no result to keep."""
    kind = machine_kind.kind(torch.device(options.device))
    return options.out or (QUICK_RESULTS if options.quick else RESULTS) / kind


def _write(run: dict, options: argparse.Namespace, pages: bool = True) -> None:
    """The JSON where the options want it, and with `pages` the tables and figures beside it."""
    if options.json:
        report.write_json(run, options.json)
    if options.plot and pages:
        figures.write(run, options.plot)
    for folder, part in _folders(run, options):
        report.write_json(part, folder / "results.json")
        if pages:
            page = Console(file=io.StringIO(), width=WIDTH)
            report.print_run(page, part)
            (folder / "results.txt").write_text(page.file.getvalue())
            figures.write(part, folder)


def _folders(run: dict, options: argparse.Namespace) -> list[tuple[Path, dict]]:
    """The folders to fill, with what of the run goes into each. For a GPU a folder for each operation, so
    that a run of one leaves the others' results as they are."""
    if options.out:
        return [(options.out, run)]
    if options.device == "cpu" or options.json or options.plot or options.quick or options.load:
        return []
    gpu = machine_kind.slug(run["environment"]["gpu"])
    parts = {}
    for result in run["results"]:
        parts.setdefault(result["case"].split("/")[0], []).append(result)
    return [(RESULTS / gpu / name, {**run, "results": part}) for name, part in parts.items()]


def _compare(options: argparse.Namespace, parser: argparse.ArgumentParser, console: Console) -> int:
    try:
        old, new = (compare.load(path) for path in options.compare)
        return int(compare.compare(old, new, console) > 0)
    except compare.NotComparable as error:
        parser.error(str(error))


def _failed(result: dict) -> bool:
    """Ours did not run or was wrong; of our further backends, was wrong."""
    ours, *others = result["candidates"]
    return ours["status"] != "ok" or any(c["status"] == "wrong" and is_ours(c["name"]) for c in others)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if one of our own results is wrong or missing."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.compare:
        return _compare(options, parser, console)
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
        if options.all:
            scoreboard.write_report(run, options.out or options.load.parent)
    else:
        run = _run(options, cases, console)
    if not options.all:
        _write(run, options)
    return int(any(_failed(result) for result in run["results"]))


if __name__ == "__main__":
    sys.exit(main())
