"""Stand-in for `causal_conv1d_step` in plain PyTorch, to be replaced by the operation of the same name."""

from torch import Tensor

from .function import causal_conv1d


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """x `[B, n, C]`, state `[B, W-1, C]`, updated in place -> y `[B, n, C]`."""
    y, after = causal_conv1d(
        x, weight, bias, activation=activation, initial_state=state, return_state=True, backend=backend
    )
    state.copy_(after)
    return y
