"""Runs random calls, each on a backend and in a dtype, and holds the results against float64."""

import contextlib
import functools
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..dispatch import Unsupported
from .draws import Draws
from .layouts import LAYOUTS, equal_gradients, laid_out
from .registry import SUBJECTS
from .report import Failure, Report, Row
from .rule import (
    COTANGENTS,
    EPS,
    Deviation,
    Tensors,
    deviation,
    error,
    named,
    poisoned_memory,
    rounded,
    run,
    size,
    statistic,
)
from .subject import Options, Subject

BACKENDS = ("native", "triton")  # the third, the reference, is what they are held against
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in EPS}
CASES = 1_000_000  # of a seed
DRAWS = 1_000  # of the tensors of a case
FEW = 100  # numbers: the largest error of fewer is a matter of luck
LUCK = 4  # draws, of which PyTorch's largest error counts then, as a part of the largest number
FUTILE = 32  # refused calls in a row, after which a backend is not asked again


@dataclass
class Call:
    """A random call of an operation in a dtype: the whole sequence with its gradients, or in decode steps."""

    subject: Subject
    case: int
    dtype: torch.dtype
    device: torch.device
    decode: bool
    sizes: Options = field(init=False)
    layout: str = field(init=False)

    def __post_init__(self) -> None:
        d = Draws(self.case)
        self.sizes = (self.subject.draw_steps if self.decode else self.subject.draw)(d)
        self.layout = d.choice(LAYOUTS)

    def tensors(self, draw: int = 0) -> tuple[Tensors, Options]:
        """The arguments and the gradients of the results, and the options; `draw`: other numbers."""
        sizes = {name: x for name, x in self.sizes.items() if name != "split"}
        if self.decode:
            sizes["T"] = sum(self.sizes["split"])
        tensors, options = self.subject.make(seed=DRAWS * self.case + draw, **sizes)
        if self.layout == "equal gradients":
            tensors = equal_gradients(tensors)
        tensors = self.subject.settle(rounded(tensors, self.dtype), options)
        there = {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in options.items()}
        return {name: x.to(self.device) for name, x in tensors.items()}, there

    def compute(self, function: Callable, tensors: Tensors, **options) -> Tensors:
        """All results, and all gradients unless decoding."""
        if not self.decode:
            return run(tensors, function, **options)
        with torch.no_grad():
            arguments = {name: x for name, x in tensors.items() if name not in COTANGENTS}
            return named(function(**arguments, **options))

    def ours(self, backend: str, tensors: Tensors, options: Options) -> Tensors:
        """What the backend computes; raises `Unsupported`. It must leave its arguments alone."""
        function, given = self.subject.ours(backend), laid_out(tensors, self.layout)
        if self.decode:
            function = functools.partial(self.subject.steps(backend), split=self.sizes["split"])
        with poisoned_memory():
            results = self.compute(function, given, **options)
        changed = [name for name, x in given.items() if not torch.equal(x, tensors[name])]
        if changed:
            raise AssertionError(f"{', '.join(changed)} changed during the call")
        return results

    def expected(self, tensors: Tensors, options: Options) -> tuple[Tensors, Tensors]:
        """PyTorch's results in the dtype, and the exact ones."""
        truth = self.compute(self.subject.exact, {name: x.double() for name, x in tensors.items()}, **options)
        if self.dtype == torch.float64:
            return truth, truth
        return self.compute(self.subject.plain, tensors, **options), truth

    def check(self, backend: str) -> dict[str, Deviation]:
        """How far each result of a backend is from float64; raises `Unsupported`."""
        tensors, options = self.tensors()
        ours = self.ours(backend, tensors, options)
        same, truth = self.expected(tensors, options)
        if not (ours.keys() <= truth.keys() if self.decode else ours.keys() == truth.keys()):
            raise AssertionError(f"the results are {sorted(ours)}; expected {sorted(truth)}")
        found = {}
        for name, x in ours.items():
            eps = EPS[statistic(self.dtype) if name in self.subject.float32 else self.dtype]
            found[name] = deviation(name, x, same[name], truth[name], self.dtype, eps)
        over = [name for name, x in found.items() if x.ratio > 1 and not x.problem]
        for name, more in self._looked_at_again(over, tensors, options, same, truth).items():
            found[name] = found[name]._replace(allowed=found[name].allowed + more)
        return found

    def _looked_at_again(self, over: list[str], tensors, options, same, truth) -> dict[str, float]:
        """What more is allowed of the results that are over: the subject's slack, and PyTorch's bad luck."""
        if not over:
            return {}
        more = dict.fromkeys(over, 0.0)
        if not self.decode:
            double = {name: x.double() for name, x in tensors.items()}
            slack = self.subject.slack(double, self.dtype, options)
            more = {name: slack.get(name, 0.0) for name in over}
        few = [name for name in over if truth[name].numel() < FEW and self.dtype != torch.float64]
        plain = {name: error(same[name], truth[name]) / size(truth[name]) for name in few}
        largest = dict(plain)
        for draw in range(1, LUCK if few else 0):
            other_same, other_truth = self.expected(*self.tensors(draw))
            for name in few:
                another = error(other_same[name], other_truth[name]) / size(other_truth[name])
                largest[name] = max(largest[name], another)
        return more | {
            name: more[name] + 2 * (largest[name] - plain[name]) * size(truth[name]) for name in few
        }


@dataclass
class Lane:
    """An operation on a backend, which gets its share of the time."""

    op: str
    backend: str
    rows: list[Row]  # a dtype each, in turn
    seconds: float = 0.0
    cases: int = 0
    futile: int = 0

    @property
    def order(self) -> tuple:
        """The lane that comes first in this order has the next turn."""
        return self.cases >= len(self.rows), self.seconds

    @property
    def open(self) -> bool:
        """Is there hope that the backend runs a call?"""
        return self.futile < FUTILE or self.cases < len(self.rows)

    def turn(self, case: int, row: Row, device: torch.device) -> list[Failure]:
        """One case in one dtype: the whole call, and decode steps where the operation has them."""
        begin, subject = time.perf_counter(), SUBJECTS[self.op]
        failures = []
        for decode in (False, True) if subject.steps else (False,):
            call = Call(subject, case, DTYPES[row.dtype], device, decode)
            try:
                found = call.check(self.backend)
            except Unsupported as refusal:
                row.refuse(str(refusal))
                self.futile += 1
                continue
            except Exception as crash:
                message = f"{type(crash).__name__}: {crash}"
                trace = traceback.format_exc()
            else:
                row.measure(found, decode)
                wrong = {name: x for name, x in found.items() if not x.ratio <= 1}
                message, trace = "; ".join(f"{name}: {x}{_times(x)}" for name, x in wrong.items()), ""
            self.futile = 0
            row.calls += 1
            if message:
                failures.append(Failure.of(row, case, call, message, trace))
        row.failures += bool(failures)
        self.cases += 1
        self.seconds += time.perf_counter() - begin
        return failures


def _times(x: Deviation) -> str:
    return f", {x.ratio:.3g} times" if x.ratio < torch.inf else ""


def _answers(device: torch.device) -> bool:
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def _in_full_precision():
    """PyTorch's float32 convolutions are not in TensorFloat-32 then; no warnings beside the table."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def validate(
    ops: Sequence[str] = tuple(SUBJECTS),
    backends: Sequence[str] = BACKENDS,
    dtypes: Sequence[str] = tuple(DTYPES),
    *,
    device: torch.device | str = "cpu",
    seconds: float = 60.0,
    seed: int = 0,
    case: int | None = None,
    found: Callable[[Failure], None] = lambda failure: None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run random calls of operations on backends; hold every result, gradient and decode step to the rule.

    Every operation on every backend gets the same share of the time, and at least one case in every dtype.
    A seed gives the same cases on every machine; how many there are depends on the time.

    Args:
        ops: names of `SUBJECTS`.
        backends: of "native" and "triton".
        dtypes: names of `DTYPES`.
        device: where to run. The float64 reference runs there too.
        seconds: of all together; a turn that has begun is finished. 0: one case in every dtype.
        seed: of the cases `seed * CASES`, `seed * CASES + 1`, ...
        case: run this one alone, in every dtype on every backend.
        found: told of each failure.
        progress: told of the state after each turn.
    """
    device, begin, stopped = torch.device(device), time.perf_counter(), ""
    lanes = [
        Lane(op, backend, [Row(op, backend, dtype) for dtype in dtypes]) for op in ops for backend in backends
    ]
    report = Report(device, seed, [row for lane in lanes for row in lane.rows])
    with _in_full_precision():
        while turns := [lane for lane in lanes if lane.open]:
            lane = min(turns, key=lambda lane: lane.order)
            report.seconds = time.perf_counter() - begin
            if lane.order[0] and (report.seconds >= seconds or case is not None):
                break
            row = lane.rows[lane.cases % len(lane.rows)]
            number = seed * CASES + lane.cases if case is None else case
            failures = lane.turn(number, row, device)
            for failure in failures:
                report.failures.append(failure)
                found(failure)
            if failures and not _answers(device):
                stopped = f"{device} does not answer after this failure; what follows would fail too"
                break
            progress(report)
    report.stopped = stopped
    return report
