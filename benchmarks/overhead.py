"""What a call costs before it computes anything to speak of: `python -m benchmarks.overhead`.

Calls of one token, forward only, beside `torch.add(x, x)` of their first tensor. The bar is three times that
and 5 us, and twice as much where inputs require gradients. Times of microseconds rise with all else that a
machine does: the minimum over many short samples, taken in turn, is what a call costs; the median is shown to
say how quiet the machine was. A call this small should wake no thread, so both numbers of threads are shown.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import slmkernels as slm

from . import machine, report
from .__main__ import WIDTH

ROUNDS = 200
CALLS = 20  # of a sample: shorter than what a busy machine lets run in one piece
WARM_UP = 20
HEADS, SIZE, FEATURES, WINDOW, EXPERTS, TOP_K, TAPS = 2, 32, 16, 16, 4, 2, 4

Call = tuple[Tensor, Callable[[], Any]]  # the first tensor, and the call


def _tokens(gradients: bool, *sizes: int) -> list[Tensor]:
    """One token of random heads of each size, `[1, 1, HEADS, size]`."""
    return [torch.randn(1, 1, HEADS, size, requires_grad=gradients) for size in sizes]


def _gates(gradients: bool) -> dict[str, Tensor]:
    gates = {"decay": -torch.rand(1, 1, HEADS), "beta": torch.rand(1, 1, HEADS)}
    return {name: x.requires_grad_(gradients) for name, x in gates.items()}


def _matrices(gradients: bool) -> list[Tensor]:
    shapes = (EXPERTS, 2 * SIZE, SIZE), (EXPERTS, SIZE, SIZE)
    return [torch.randn(shape, requires_grad=gradients) for shape in shapes]


def _sliding_window(gradients: bool) -> Call:
    q, k, v = _tokens(gradients, SIZE, SIZE, SIZE)
    return q, partial(slm.sliding_window_attention, q, k, v, window=WINDOW)


def _linear(gradients: bool) -> Call:
    q, k, v = _tokens(gradients, SIZE, SIZE, SIZE)
    return q, partial(slm.linear_attention, q, k, v)


def _gated_delta(gradients: bool) -> Call:
    q, k, v = _tokens(gradients, SIZE, SIZE, SIZE)
    return q, partial(slm.linear_attention, q, k, v, **_gates(gradients))


def _hybrid(gradients: bool) -> Call:
    q, *others = _tokens(gradients, SIZE, SIZE, SIZE, FEATURES, FEATURES)
    return q, partial(slm.hybrid_attention, q, *others, window=WINDOW)


def _convolution(gradients: bool) -> Call:
    x, weight = (torch.randn(shape, requires_grad=gradients) for shape in ((1, 1, SIZE), (SIZE, TAPS)))
    return x, partial(slm.causal_conv1d, x, weight, activation="silu")


def _expert_mlp(gradients: bool) -> Call:
    x, weights = (torch.rand(1, size, requires_grad=gradients) for size in (SIZE, TOP_K))
    indices = torch.arange(TOP_K, dtype=torch.int32)[None]
    return x, partial(slm.expert_mlp, x, indices, weights, *_matrices(gradients))


def _segment_mlp(gradients: bool) -> Call:
    x = torch.randn(1, SIZE, requires_grad=gradients)
    cu_seqlens, experts = (torch.tensor(values, dtype=torch.int32) for values in ([0, 1], [1]))
    return x, partial(slm.segment_mlp, x, cu_seqlens, experts, *_matrices(gradients))


def _route(gradients: bool) -> Call:
    logits = torch.randn(1, EXPERTS, requires_grad=gradients)
    return logits, partial(slm.route, logits, TOP_K)


def _sliding_window_step(_: bool) -> Call:
    q, k, v = _tokens(False, SIZE, SIZE, SIZE)
    cache = slm.RingCache(1, WINDOW, HEADS, SIZE)
    return q, partial(slm.sliding_window_attention_step, q, k, v, cache)


def _linear_step(_: bool) -> Call:
    q, k, v = _tokens(False, SIZE, SIZE, SIZE)
    return q, partial(slm.linear_attention_step, q, k, v, torch.zeros(1, HEADS, SIZE, SIZE))


def _gated_delta_step(_: bool) -> Call:
    q, k, v = _tokens(False, SIZE, SIZE, SIZE)
    state = torch.zeros(1, HEADS, SIZE, SIZE)
    return q, partial(slm.linear_attention_step, q, k, v, state, l2norm_qk=True, **_gates(False))


def _hybrid_step(_: bool) -> Call:
    q, *others = _tokens(False, SIZE, SIZE, SIZE, FEATURES, FEATURES)
    cache = slm.HybridCache(1, WINDOW, HEADS, SIZE, FEATURES)
    return q, partial(slm.hybrid_attention_step, q, *others, cache)


def _convolution_step(_: bool) -> Call:
    x, state, weight = (torch.randn(shape) for shape in ((1, 1, SIZE), (1, TAPS - 1, SIZE), (SIZE, TAPS)))
    return x, partial(slm.causal_conv1d_step, x, state, weight, activation="silu")


DIFFERENTIABLE = {
    "sliding_window_attention": _sliding_window,
    "linear_attention": _linear,
    "linear_attention (decay, beta)": _gated_delta,
    "hybrid_attention": _hybrid,
    "causal_conv1d": _convolution,
    "expert_mlp": _expert_mlp,
    "segment_mlp": _segment_mlp,
    "route": _route,
}
STEPS = {
    "sliding_window_attention_step": _sliding_window_step,
    "linear_attention_step": _linear_step,
    "linear_attention_step (decay, beta)": _gated_delta_step,
    "hybrid_attention_step": _hybrid_step,
    "causal_conv1d_step": _convolution_step,
}


def _microseconds(call: Callable[[], Any], calls: int) -> float:
    """A sample: the mean of so many calls."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / (1e3 * calls)


def bar(add: float, gradients: bool) -> float:
    """What a call may take, in microseconds, where `torch.add` of the same tensor takes `add`."""
    return (3 * add + 5) * (2 if gradients else 1)


@torch.enable_grad()
def measure(rounds: int = ROUNDS, calls: int = CALLS) -> list[dict[str, Any]]:
    """Time every operation on the CPU with the threads that torch is set to.

    Args:
        rounds: samples of each call; calls and `torch.add` take turns.
        calls: of a sample, whose mean counts.

    Returns:
        a dict for each operation, without and with gradients (steps have none): operation, gradients,
        threads, microseconds_min, microseconds_median, add_min (of `torch.add`), bar, passed (the minimum
        is within the bar).
    """
    torch.manual_seed(0)
    wanted = [(name, False, make) for name, make in {**DIFFERENTIABLE, **STEPS}.items()]
    wanted += [(name, True, make) for name, make in DIFFERENTIABLE.items()]
    timed, samples = [], []
    for name, gradients, make in wanted:
        x, call = make(gradients)
        x = x.detach()
        timed.append((name, gradients, call, partial(torch.add, x, x)))
        samples.append(([], []))
        _microseconds(call, WARM_UP)
    for _ in range(rounds):
        for (*_, call, add), (of_call, of_add) in zip(timed, samples, strict=True):
            of_call.append(_microseconds(call, calls))
            of_add.append(_microseconds(add, calls))
    return [
        _row(name, gradients, *taken) for (name, gradients, *_), taken in zip(timed, samples, strict=True)
    ]


def _row(name: str, gradients: bool, of_call: list[float], of_add: list[float]) -> dict[str, Any]:
    limit = bar(min(of_add), gradients)
    return {
        "operation": name,
        "gradients": gradients,
        "threads": torch.get_num_threads(),
        "microseconds_min": min(of_call),
        "microseconds_median": statistics.median(of_call),
        "add_min": min(of_add),
        "bar": limit,
        "passed": min(of_call) <= limit,
    }


def print_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table of what `measure` gave."""
    table = Table(title="One token, forward: microseconds a call", title_justify="left", title_style="bold")
    table.add_column("operation")
    for heading in ("gradients", "threads", "min", "median", "torch.add", "bar", ""):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = (f"{row[key]:.2f}" for key in ("microseconds_min", "microseconds_median", "add_min", "bar"))
        verdict = "[green]within[/]" if row["passed"] else "[red]above[/]"
        wanted = "yes" if row["gradients"] else "no"
        table.add_row(row["operation"], wanted, str(row["threads"]), *numbers, verdict)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a call is above its bar."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description="Times calls of one token beside torch.add of the same tensor, with one thread and with "
        "torch's default.",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, a list of objects")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    rows, threads = [], torch.get_num_threads()
    report.print_environment(console, {"environment": machine.environment(torch.device("cpu"))})
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            rows += measure(options.rounds)
    finally:
        torch.set_num_threads(threads)
    print_rows(console, rows)
    if options.json:
        report.write_json(rows, options.json)
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
