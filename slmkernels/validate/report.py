"""What a validation found: a table, lines to run a failure again, JSON."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .. import facts

PARTS = ("forward", "backward", "decode")
WIDTH = 120  # columns of a table that no terminal shows
REASONS = 5  # that are printed


@dataclass
class Failure:
    """A call that is wrong or that raised, and all it takes to run it again."""

    op: str
    backend: str
    dtype: str
    case: int
    decode: bool
    message: str
    sizes: dict
    layout: str
    command: str
    trace: str

    @classmethod
    def of(cls, row: "Row", case: int, call, message: str, trace: str) -> "Failure":
        """`call`: what has failed."""
        command = (
            f"python -m slmkernels validate --device {call.device} --op {row.op} --backend {row.backend}"
        )
        command += f" --dtype {row.dtype} --case {case}"
        sizes = (call.decode, message, call.sizes, call.layout, command, trace)
        return cls(row.op, row.backend, row.dtype, case, *sizes)

    def __str__(self) -> str:
        what = "decode steps" if self.decode else "call"
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        head = f"FAILED {self.op}, {self.backend}, {self.dtype}, {what} of case {self.case}: {self.message}"
        return f"{head}\n  {sizes} layout={self.layout}\n  {self.command}"


@dataclass
class Row:
    """An operation on a backend in a dtype."""

    op: str
    backend: str
    dtype: str
    calls: int = 0
    unsupported: int = 0
    failures: int = 0  # cases
    worst: dict[str, float] = field(
        default_factory=dict
    )  # part -> largest error as a part of what is allowed
    reasons: dict[str, int] = field(default_factory=dict)  # of the calls that were refused

    def refuse(self, reason: str) -> None:
        """The backend cannot run a call."""
        self.unsupported += 1
        reason = reason.rpartition("cannot run this call: ")[2]
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def measure(self, found: dict, decode: bool) -> None:
        """The deviations of a call's results. Gradients are those that start with d: no result does."""
        for name, x in found.items():
            part = "decode" if decode else "backward" if name.startswith("d") else "forward"
            self.worst[part] = max(self.worst.get(part, 0.0), x.ratio)


@dataclass
class Report:
    """All rows and all failures."""

    device: torch.device
    seed: int
    rows: list[Row]
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str = ""  # why the run ended early

    @property
    def calls(self) -> int:
        """That ran."""
        return sum(row.calls for row in self.rows)

    @property
    def passed(self) -> bool:
        """Something ran, and nothing failed."""
        return self.calls > 0 and not self.failures

    def print(self) -> None:
        """The table, the commonest reasons of the backends that refused, and one line that says it all."""
        console = Console()
        console = Console(width=None if console.is_terminal else WIDTH)
        table = Table(
            box=box.SIMPLE,
            title=f"Largest error as a part of what is allowed, {self.device}, seed {self.seed}",
        )
        for name in ("operation", "backend", "dtype"):
            table.add_column(name, no_wrap=True)
        for name in ("calls", "unsupported", *PARTS, "failures"):
            table.add_column(name, justify="right")
        for row in (row for row in self.rows if row.calls):
            worst = (f"{row.worst[part]:.2f}" if part in row.worst else "" for part in PARTS)
            counts = str(row.calls), str(row.unsupported)
            style = "bold red" if row.failures else None
            table.add_row(row.op, row.backend, row.dtype, *counts, *worst, str(row.failures), style=style)
        console.print(table)
        reasons = Counter()
        for row in self.rows:
            reasons.update({(row.backend, reason): n for reason, n in row.reasons.items()})
        for (backend, reason), n in reasons.most_common(REASONS):
            print(f"{backend} refused {n} calls: {reason}")
        print(self.summary())

    def summary(self) -> str:
        """In one line."""
        if self.stopped:
            return f"STOPPED: {self.stopped}"
        if not self.calls:
            return "NOTHING RAN: every call was refused"
        verdict = f"FAILED: {len(self.failures)} of" if self.failures else "passed:"
        return f"{verdict} {self.calls} calls in {self.seconds:.0f} s"

    def as_dict(self) -> dict:
        """For JSON: the environment, a record for each row, the failures."""
        environment = facts.environment(self.device)
        del environment["backend"]  # every call names its own
        rows = [asdict(row) | {"worst": {p: _plain(x) for p, x in row.worst.items()}} for row in self.rows]
        run = {
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "calls": self.calls,
            "passed": self.passed,
        }
        failures = [asdict(failure) for failure in self.failures]
        return {
            "environment": environment,
            **run,
            "stopped": self.stopped,
            "rows": rows,
            "failures": failures,
        }

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")


def _plain(x: float) -> float | str:
    """JSON has no infinity."""
    return round(x, 4) if math.isfinite(x) else str(x)
