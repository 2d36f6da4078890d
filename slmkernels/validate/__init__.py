"""The proof: random calls of every operation on every backend, each against float64.

`python -m slmkernels validate` runs it. Each operation has a module here, with its random calls and with the
same formula in PyTorch's own operations, the yardstick of the `rule`; `runner` takes turns between them.
"""

from .registry import SUBJECTS
from .report import Report
from .runner import BACKENDS, DTYPES, validate

__all__ = ["BACKENDS", "DTYPES", "SUBJECTS", "Report", "validate"]
