"""Decoding: new tokens through the convolution, with a state of W-1 tokens that is updated in place."""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...autocast import autocasts, without_autocast
from ...autograd import mark_changed
from ...dispatch import Operation, operators, register
from ...validation import FLOATS, check_float_tensor, fail
from . import reference
from .function import SUPPORTS, check_activation, check_parameters, check_state

STEP = operators("causal_conv1d_step")


class StepCall(NamedTuple):
    """A checked decode step."""

    x: Tensor  # [B, n, C]
    state: Tensor  # [B, W-1, C]
    weight: Tensor  # [C, W]
    bias: Tensor | None  # [C]
    silu: bool


def fits(x, state, weight, bias) -> bool:
    """Whether these are dense tensors of one dtype and of fitting sizes: nearly every step, found quickly."""
    if not (type(x) is type(state) is Tensor and isinstance(weight, Tensor)):
        return False
    dtype, shape, taps, device = x.dtype, x.shape, weight.shape, x.device
    if dtype not in FLOATS or len(shape) != 3 or len(taps) != 2 or taps[1] < 1:
        return False
    if not (x.layout is state.layout is weight.layout is torch.strided):
        return False
    if state.dtype != dtype or weight.dtype != dtype or state.device != device or weight.device != device:
        return False
    B, _, C = shape
    if state.shape != (B, taps[1] - 1, C) or taps[0] != C or not state.is_contiguous():
        return False
    if bias is None:
        return True
    return isinstance(bias, Tensor) and bias.dtype == dtype and bias.shape == (C,) and bias.device == device


def prepare(x, state, weight, bias=None, *, activation=None, backend=None) -> StepCall:
    """Check the public arguments; the errors a user sees come from here."""
    silu = check_activation(activation)
    if not fits(x, state, weight, bias):
        check_float_tensor("x", x, 3, "[B, n, C]")
        check_float_tensor("state", state, 3, "[B, W-1, C]")
        if autocasts(x):  # the state says what is computed in
            x = x.to(state.dtype)
        check_parameters(x, weight, bias)
        check_state("state", state, x, weight, x.shape[0])
        if state.stride(2) != 1 and state.shape[2] > 1:
            fail("state", state, f"a stride of 1, not {state.stride(2)}, along C: it is updated in place")
        if any(state.stride(d) == 0 and state.shape[d] > 1 for d in (0, 1)):
            fail("state", state, f"memory of its own for each row, not strides {state.stride()}")
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("state", state), ("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                fail(name, tensor, "no gradient: decode under torch.no_grad() or torch.inference_mode()")
    return StepCall(x, state, weight, bias, silu)


OPERATION = register(Operation("causal_conv1d_step", dict(SUPPORTS), prepare))


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Append n tokens and convolve; equals the full `causal_conv1d`, for any split into steps.

    Args:
        x: the new tokens `[B, n, C]`, in the state's dtype.
        state: `[B, W-1, C]`, the tokens before them, the oldest first; updated in place. Zeros at the start,
            or what `causal_conv1d(return_state=True)` gave. Strides are free but the last.
        weight, bias, activation, backend: as in `causal_conv1d`.

    Returns:
        y `[B, n, C]`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. The state is left as it was.
        Unsupported: the named backend cannot run this call.
    """
    call = prepare(x, state, weight, bias, activation=activation)
    chosen = OPERATION.choose(call, backend)
    if chosen == "reference":
        with without_autocast(x):
            return reference.causal_conv1d_step(*call)
    prefix = "triton_" if chosen == "triton" else ""
    y = STEP[prefix](*call)
    mark_changed(call.state)
    return y


def _fake_step(x, state, weight, bias, silu):
    return x.new_empty(x.shape)


for _prefix in ("",) * native.HAS_CPU + ("triton_",):
    torch.library.register_fake(f"slmkernels::{_prefix}causal_conv1d_step", _fake_step)
