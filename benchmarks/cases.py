"""What is measured: the record of a case, and the registry of all of them.

An operation's cases stand in a module of its own name in this package, with a function
`cases(small: bool) -> Iterator[Case]`; the line in `OPERATIONS` makes them known.
"""

import fnmatch
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from slmkernels import dispatch

OPERATIONS = ("sliding_window", "linear", "causal_conv1d", "hybrid", "experts", "end_to_end")
OURS = "slmkernels"  # the name of our candidate in every case
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Inputs = dict[str, Tensor]


# What a bar measures besides the times of a peer over ours.
TERAFLOPS = "TFLOP/s"
OF_COPY = "of the copy bandwidth"


class Unavailable(Exception):
    """A candidate cannot run a case here; the message is the reason the report shows."""


def first_line(error: Exception) -> str:
    """An exception as one line of a report."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Scaling(NamedTuple):
    """Where a case stands on a curve: how the time grows with one size."""

    curve: str  # what is measured
    axis: str  # which size: "T" tokens, "W" keys of a window, "E" experts
    at: int


class Bar(NamedTuple):
    """What ours must reach and aims at, on a GPU in a case for one, on a CPU in the others; more is better.

    `against`: a glob of peers, the fastest of which counts (its time over ours), `TERAFLOPS` (useful work) or
    `OF_COPY` (bytes moved once, over what a copy reaches).
    """

    against: str
    must: float
    aim: float

    def verdict(self, reached: float | None) -> str:
        """In a word or two."""
        if reached is None:
            return "not measured"
        return "aim reached" if reached >= self.aim else "pass" if reached >= self.must else "miss"


class Run(NamedTuple):
    """A candidate made ready: `call` is what is timed, `ours` brings one of its results into our layout."""

    call: Callable[[], tuple[Tensor, ...]]
    ours: Callable[[Tensor], Tensor] = lambda x: x
    parameters: tuple[Tensor, ...] = ()  # of its inputs, what a model holds anyway


class Candidate(NamedTuple):
    """Something that computes a case: our kernel or a peer.

    `prepare` brings the inputs into the candidate's native layout and builds its masks, outside the timing;
    it raises `Unavailable` where the candidate cannot do the case.
    """

    name: str
    prepare: Callable[[Inputs], Run]
    compiles: bool = False  # the first call takes many seconds
    yardstick: str = ""  # what it computes, if not the case's function: then it is timed and not checked


DECODE_BARS = (Bar(OF_COPY, 0.6, 0.85),)


@dataclass(frozen=True)
class Case:
    """One measurement: what runs, against what, and how its results are checked.

    `reference` and `plain` return the expected results of checked inputs, in float64 and by plain PyTorch in
    the case's dtype; each may hold only the last rows along dimension 1, and only those are compared.
    """

    name: str  # operation/shape/mode/dtype
    operation: str  # the public function
    dtype: torch.dtype
    sizes: str  # for people
    outputs: tuple[str, ...]  # the names of the results, in order
    inputs: Callable[[torch.device], Inputs]
    checked: Callable[[Inputs], Inputs]  # the same inputs, changed so that a few rows of reference suffice
    ours: Candidate
    peers: tuple[Candidate, ...]
    reference: Callable[[Inputs], tuple[Tensor, ...]]
    plain: Callable[[Inputs], tuple[Tensor, ...]]
    backend: Callable[[Inputs], str]  # which of our backends runs it
    flops: int  # useful work only: nothing outside a window, nothing computed twice in a forward pass
    bytes: int  # every input and result moved once
    gpu: bool = False  # too large for a CPU: there it runs only where it is named in full
    graph: bool = False  # a call of microseconds: on a GPU it is timed by replaying a CUDA graph
    bars: tuple[Bar, ...] = ()
    tokens: int = 0  # of a model that a call goes through
    scaling: Scaling | None = None

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Ours first, then the peers."""
        return self.ours, *self.peers

    def on(self, device: torch.device, chosen: str) -> "Case":
        """The case as a device runs it: on CUDA with a row for each backend of ours that is not the chosen
        one, so that the report shows which kernel wins; with the bars that are for the device."""
        if device.type != "cuda":
            return replace(self, bars=() if self.gpu else self.bars)
        names = [name for name in dispatch.BACKENDS if name not in (chosen, "reference")]
        rows = (_held_to(name, self.ours) for name in names)
        return replace(self, peers=(*rows, *self.peers), bars=self.bars if self.gpu else ())


def is_ours(name: str) -> bool:
    """Whether a candidate of that name is of ours, on any backend."""
    return name.split()[0] == OURS


def _held_to(backend: str, ours: Candidate) -> Candidate:
    """Our candidate on one backend."""

    def prepare(inputs: Inputs) -> Run:
        with dispatch.use_backend(backend):
            run = ours.prepare(inputs)

        def call() -> tuple[Tensor, ...]:
            with dispatch.use_backend(backend):
                return run.call()

        return run._replace(call=call)

    return ours._replace(name=f"{ours.name} {backend}", prepare=prepare)


def for_gpu(case: Case, bars: tuple[Bar, ...], small: bool) -> Case:
    """A case too large for a CPU, and what ours must reach in it; neither holds of its small size."""
    return case if small else replace(case, gpu=True, bars=bars)


def chosen_backend(name: str, *args, **kwargs) -> str:
    """The backend of ours that runs a call of the operation `name`."""
    operation = dispatch.OPERATIONS[name]
    return operation.choose(operation.prepare(*args, **kwargs))


def registry(small: bool = False) -> dict[str, Case]:
    """Every case by name; `small` shrinks the sizes (same names) for smoke runs and tests."""
    modules = (importlib.import_module(f"{__package__}.{name}") for name in OPERATIONS)
    return {case.name: case for module in modules for case in module.cases(small)}


def select(
    cases: dict[str, Case], patterns: list[str], dtypes: list[str], gpu: bool = True
) -> dict[str, Case]:
    """The cases that match a glob (a bare prefix such as `sliding_window/long` counts) and a dtype.

    No pattern matches all; so does no dtype. Without `gpu`, cases for a GPU must be named in full. Raises
    ValueError for a pattern that matches nothing.
    """
    wanted = {DTYPES[name] for name in dtypes or DTYPES}
    chosen = set()
    for pattern in patterns or ["*"]:
        hits = [n for n in cases if fnmatch.fnmatch(n, pattern) or n.startswith(pattern.rstrip("/") + "/")]
        if not hits:
            raise ValueError(f"no case matches {pattern!r}; --list shows them all")
        here = {name for name in hits if gpu or name == pattern or not cases[name].gpu}
        if not here:
            raise ValueError(f"{pattern!r} matches cases for a GPU only; name one in full to run it here")
        chosen |= here
    return {name: case for name, case in cases.items() if name in chosen and case.dtype in wanted}
