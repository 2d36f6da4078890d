"""Whether a candidate computes the case: its results against float64, row by row."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Candidate, Case, Inputs, Run

FACTOR = 2.0  # how many times as far from float64 as plain PyTorch in the same dtype a result may be
ROUNDINGS = 2.0  # and by how many roundings of its largest value besides


class Check(NamedTuple):
    """How far a candidate's results are from float64."""

    max_error: float  # largest absolute difference
    allowed: float  # what it may be
    output: str  # the result that comes closest to its bound, or is furthest past it

    @property
    def passed(self) -> bool:
        """Within the bound; NaN never is."""
        return self.max_error <= self.allowed

    @property
    def severity(self) -> float:
        """The error as a multiple of what is allowed; NaN is infinitely bad."""
        if self.passed:
            return self.max_error / self.allowed if self.allowed else 0.0
        return self.max_error / self.allowed if self.max_error < math.inf and self.allowed else math.inf


class Expected(NamedTuple):
    """The results of a case's checked inputs, in float64 and by plain PyTorch in the case's dtype."""

    case: Case
    inputs: Inputs
    exact: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> "Expected":
        """Compute them once for all candidates."""
        checked = case.checked(inputs)
        return cls(case, checked, case.reference(checked), case.plain(checked))

    def check(self, candidate: Candidate) -> tuple[Check | None, Run]:
        """Prepare a candidate, run it once and compare; also returns the prepared run. A yardstick computes
        something else: nothing to compare, None."""
        run = candidate.prepare(self.inputs)
        if candidate.yardstick:
            return None, run
        results = [run.ours(x) for x in run.call()]
        rows = zip(self.case.outputs, results, self.exact, self.plain, strict=True)
        checks = [self._compare(*row) for row in rows]
        return max(checks, key=lambda check: check.severity), run

    def _compare(self, name: str, result: Tensor, exact: Tensor, plain: Tensor) -> Check:
        exactly = not exact.is_floating_point()  # counts and indices
        rounding = 0.0 if exactly else torch.finfo(self.case.dtype).eps * _largest(exact)
        allowed = FACTOR * _largest(plain.double() - exact) + ROUNDINGS * rounding
        return Check(_largest(result[:, -exact.shape[1] :].double() - exact), allowed, name)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
