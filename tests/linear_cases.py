"""What the tests of linear attention share: the cases of `slmkernels.validate`, and the rule."""

import functools
from collections.abc import Callable

import torch
from rule import Results, Tensors, compare, rounded, run

from slmkernels.validate.linear import (  # noqa: F401
    DELTA,
    GATED,
    LEAVES,
    ROWS,
    VARIANT_IDS,
    VARIANTS,
    exact,
    make,
    public,
    torch_same_dtype,
)


@functools.lru_cache(maxsize=32)
def expected(row: str, dtype: torch.dtype, **case) -> tuple[Tensors, dict, Tensors, Tensors]:
    """A case in dtype: its tensors, its options, PyTorch's own results and the exact ones."""
    tensors, options = make(row, **case)
    tensors = rounded(tensors, dtype)
    double = {name: x.double() for name, x in tensors.items()}
    truth = run(double, exact, **options)
    same = truth if dtype == torch.float64 else run(tensors, torch_same_dtype, **options)
    return tensors, options, same, truth


def check(row: str, dtype: torch.dtype, attend: Callable[..., Results], **case) -> None:
    """Assert the acceptance rule of one implementation for o, the final states and every gradient."""
    tensors, options, same, truth = expected(row, dtype, **case)
    compare(run(tensors, attend, **options), same, truth, dtype)
