"""What `validate` has to know of an operation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .draws import Draws
from .rule import Results, Tensors

Options = dict[str, Any]


def no_slack(tensors: Tensors, dtype: torch.dtype, options: Options) -> dict[str, float]:
    """The rule as it is."""
    return {}


@dataclass(frozen=True)
class Subject:
    """An operation: random calls of it, and the ways to compute them. Tensors go by names.

    Attributes:
        draw: sizes and options of a random call, which are keyword arguments of `make`.
        make: these and a seed -> the call's tensors in float64 (`dx`: the gradient of result x), its options.
        ours: a backend -> the public function.
        plain: PyTorch's own operations in the tensors' dtype.
        exact: the definition.
        slack: tensors in float64, dtype, options -> what is allowed beside the rule, by result.
        settle: tensors in their dtype, options -> the tensors without what float32 cannot decide (which of
            two scores is greater), so that nothing jumps.
        float32: results that are computed in float32 at least, whatever the dtype: they take its eps.
        draw_steps: the same as `draw` for decoding; has `split`, the tokens of each step, in place of T.
        steps: a backend -> the decode steps over all tokens, called with `split` too.
    """

    draw: Callable[[Draws], Options]
    make: Callable[..., tuple[Tensors, Options]]
    ours: Callable[[str], Callable[..., Results]]
    plain: Callable[..., Results]
    exact: Callable[..., Results]
    slack: Callable[[Tensors, torch.dtype, Options], dict[str, float]] = no_slack
    settle: Callable[[Tensors, Options], Tensors] = lambda tensors, options: tensors
    float32: frozenset[str] = frozenset()
    draw_steps: Callable[[Draws], Options] | None = None
    steps: Callable[[str], Callable[..., Results]] | None = None


def step_by_step(split: list[int], step: Callable[..., Tensor], tokens: dict[str, Tensor]) -> Tensor:
    """The outputs `[B, T, ...]` of `step`, called with `split` of the tokens `[B, T, ...]` at a time."""
    outputs, start = [], 0
    for n in split:
        outputs.append(step(**{name: x[:, start : start + n] for name, x in tokens.items()}))
        start += n
    return torch.cat(outputs, dim=1)
