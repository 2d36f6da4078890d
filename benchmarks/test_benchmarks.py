"""The registry under pytest-benchmark, in small sizes: `pytest benchmarks --benchmark-only`.

Good for comparing two commits on one machine (`--benchmark-autosave`, `--benchmark-compare`). For ratios
to the peers, `python -m benchmarks` is the better tool: it takes turns.
"""

import pytest
import torch

from benchmarks.cases import Unavailable, registry
from benchmarks.check import Expected

pytest.importorskip("pytest_benchmark")
CASES = registry(small=True)
PAIRS = [
    pytest.param(
        name, candidate, id=f"{name}-{candidate.name}", marks=pytest.mark.slow if candidate.compiles else ()
    )
    for name, case in CASES.items()
    for candidate in case.candidates
]


@pytest.mark.parametrize(("name", "candidate"), PAIRS)
def test_case(benchmark, name, candidate):
    benchmark.group = name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = CASES[name]
    try:
        check, run = Expected.of(case, case.inputs(device)).check(candidate)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert candidate.yardstick or check.passed, check
    benchmark(run.call)
