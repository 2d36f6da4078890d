"""`FeedForward`: the dense layer that experts stand beside, or in place of."""

import torch
from torch import Tensor, nn

from ..ops.experts.reference import ACTIVATIONS, GATED, activate
from ..validation import check_flag, expect


class FeedForward(nn.Module):
    """`out(silu(gate) * up)`, gate and up from `gate_up`; x `[..., C]` -> `[..., C]`.

    Args:
        dim: C, channels of x.
        hidden: channels between the two projections.
        activation: as of `slmkernels.expert_mlp`; those without a gate have no up either.
        bias: biases on both projections.

    Weights: normal, std `in_features ** -0.5`; biases 0. Source: Shazeer 2020 (SwiGLU).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, value in (("dim", dim), ("hidden", hidden)):
            expect(type(value) is int and value >= 1, name, value, "an int >= 1")
        expect(activation in ACTIVATIONS, "activation", activation, f"one of {', '.join(ACTIVATIONS)}")
        check_flag("bias", bias)
        kind = {"bias": bias, "dtype": dtype, "device": device}
        self.activation = activation
        self.gate_up = nn.Linear(dim, (2 if activation in GATED else 1) * hidden, **kind)
        self.out = nn.Linear(hidden, dim, **kind)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value (class docstring)."""
        for linear in (self.gate_up, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(activate(self.gate_up(x), self.activation, False))
