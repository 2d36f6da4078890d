"""What the tests of hybrid attention share: the cases of `slmkernels.validate`, and the rule."""

import functools
import itertools
from collections.abc import Callable

import torch
from rule import Results, Tensors, compare, rounded, run

from slmkernels.ops.hybrid import function
from slmkernels.validate.hybrid import (  # noqa: F401
    ALIGNMENTS,
    LEAVES,
    checked,
    exact,
    make,
    public,
    rounding_of_delta,
    torch_same_dtype,
    undecided,
)


def more_keys(backend: str) -> Callable[..., Results]:
    """A checked call on a backend: unlike the public function with S > T keys, as a decode step needs."""

    def attend(q, k, v, phi_q, phi_k, mix=None, state=None, normalizer=None, **options):
        tensors = q, k, v, phi_q, phi_k, mix, state, normalizer, None
        return function.attend(function.Call(*tensors, *checked(q, **options)), backend)

    return attend


@functools.lru_cache(maxsize=64)
def expected(
    dtype: torch.dtype, *, seed: int = 0, **case
) -> tuple[Tensors, dict, Tensors, Tensors, dict[str, float]]:
    """A case in dtype: its tensors, its options, PyTorch's own results, the exact ones, and the slack."""
    for draw in itertools.count(seed):
        tensors, options = make(seed=draw, **case)
        tensors = rounded(tensors, dtype)
        double = {name: x.double() for name, x in tensors.items()}
        if not undecided(double, options).any():
            break
    truth = run(double, exact, **options)
    same = truth if dtype == torch.float64 else run(tensors, torch_same_dtype, **options)
    return tensors, options, same, truth, rounding_of_delta(double, dtype, options)


def check(dtype: torch.dtype, attend: Callable[..., Results], **case) -> None:
    """Assert the acceptance rule of one implementation for o, the final states and every gradient."""
    tensors, options, same, truth, slack = expected(dtype, **case)
    compare(run(tensors, attend, **options), same, truth, dtype, slack)
