"""The acceptance rule of `slmkernels.validate` as assertions, and what the operations' tests share."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from slmkernels import native
from slmkernels.validate.rule import EPS, Results, Tensors, deviation, is_low, rounded, run  # noqa: F401

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TIERS = native.host.isa_supported() if native.host else []

needs_native = pytest.mark.skipif(not native.HAS_CPU, reason=str(native.REASONS.get("_C_cpu")))
every_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@contextlib.contextmanager
def on_tier(tier: str) -> Iterator[None]:
    """Run the native kernels on an instruction set."""
    best = native.host.get_isa()
    native.host.set_isa(tier)
    try:
        yield
    finally:
        native.host.set_isa(best)


@contextlib.contextmanager
def on_threads(n: int) -> Iterator[None]:
    """Run with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    ours: Tensors, same: Tensors, truth: Tensors, dtype: torch.dtype, slack: dict[str, float] | None = None
) -> None:
    """Assert the acceptance rule for every result; `slack` is allowed beside it."""
    assert ours.keys() == truth.keys()
    for name, x in truth.items():
        d = deviation(name, ours[name], same[name], x, dtype)
        d = d._replace(allowed=d.allowed + (slack or {}).get(name, 0.0))
        assert d.ratio <= 1, f"{name}: {d}"


def same_in_float64(ours: Tensors, expected: Tensors, names=None) -> None:
    """Equal up to the last digits of float64; `names`: only these results."""
    for name in names or expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-11, atol=1e-11, msg=name)


def same_bits(ours: Tensors, expected: Tensors) -> None:
    """Equal in every result of `expected`, bit for bit."""
    for name, x in expected.items():
        assert torch.equal(ours[name], x), name
