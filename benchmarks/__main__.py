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
    report.print_environment(console, {"environment": environment})
    with Console(stderr=True).status("measuring torch's matmul rate and the copy bandwidth"):
        copy, dtypes = machine.copy_bandwidth(device), {case.dtype for case in cases.values()}
        rates = {dtype: machine.Rates(machine.matmul_rate(dtype, device), copy) for dtype in dtypes}
    for name, case in cases.items():
        with Console(stderr=True).status(name) as status:
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
    run = report.to_json(environment, results)
    report.print_bars(console, run)
    return run


def _write(run: dict, folder: Path) -> None:
    """results.json, results.txt and the figures."""
    report.write_json(run, folder / "results.json")
    page = Console(file=io.StringIO(), width=WIDTH)
    report.print_run(page, run)
    (folder / "results.txt").write_text(page.file.getvalue())
    report.plot(run, folder)


def _write_for_gpu(run: dict, results: Path) -> None:
    """A folder for each operation, so that a run of one leaves the others' results as they are."""
    gpu = re.sub(r"[^a-z0-9]+", "-", run["environment"]["gpu"].lower()).strip("-")
    for operation in dict.fromkeys(result["case"].split("/")[0] for result in run["results"]):
        own = [result for result in run["results"] if result["case"].split("/")[0] == operation]
        _write({**run, "results": own}, results / gpu / operation)


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
    if options.json:
        report.write_json(run, options.json)
    if options.plot:
        report.plot(run, options.plot)
    if options.out:
        _write(run, options.out)
    elif options.device == "cuda" and not (options.json or options.plot or options.load or options.quick):
        _write_for_gpu(run, RESULTS)
    return int(any(_failed(result) for result in run["results"]))


if __name__ == "__main__":
    sys.exit(main())
