"""`causal_conv1d`: the public function, its checks, its autograd, its choice of backend."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import native
from ...autocast import autocasts, without_autocast
from ...autograd import Function, apply_function
from ...dispatch import Operation, operators, register
from ...validation import alike, check_cu_seqlens, check_float_tensor, check_like, fail
from . import reference, triton_kernels

FORWARD = operators("causal_conv1d_forward")
BACKWARD = operators("causal_conv1d_backward")

MAX_WIDTH = 8  # taps of the native kernels


class Call(NamedTuple):
    """A checked call."""

    x: Tensor  # [B, T, C]
    weight: Tensor  # [C, W]
    bias: Tensor | None  # [C]
    initial_state: Tensor | None  # [N, W-1, C]
    cu_seqlens: Tensor | None  # [N+1]
    silu: bool


def check_activation(activation) -> bool:
    """Is it silu?"""
    if activation is not None and activation != "silu":
        fail("activation", activation, 'None or "silu"')
    return activation is not None


def check_parameter(name: str, value, x: Tensor, letters: str) -> None:
    """Weight or bias: one row or number a channel, in x's dtype or, beside a 16-bit x, in float32."""
    check_float_tensor(name, value, 2 if name == "weight" else 1, letters)
    dtype = x.dtype
    if value.dtype != dtype and (value.dtype != torch.float32 or dtype == torch.float64):
        fail(name, value, f"x's dtype {dtype}, or float32 with a 16-bit x", TypeError)
    if value.shape[0] != x.shape[2]:
        fail(name, value, f"{letters} with x's {x.shape[2]} channels")
    if value.device != x.device:
        fail(name, value, f"x's device {x.device}")


def check_parameters(x: Tensor, weight, bias) -> None:
    """Weight [C, W] and bias [C] for x."""
    if not (alike(None, x, weight) and weight.ndim == 2 and weight.shape[0] == x.shape[2]):
        check_parameter("weight", weight, x, "[C, W]")
    if weight.shape[1] < 1:
        fail("weight", weight, "[C, W] with at least one tap")
    if bias is not None:
        check_parameter("bias", bias, x, "[C]")


def check_state(name: str, state: Tensor, x: Tensor, weight: Tensor, N: int) -> None:
    """The W-1 tokens before each sequence."""
    check_like(name, state, "x", x)
    shape = [N, weight.shape[1] - 1, x.shape[2]]
    if list(state.shape) != shape:
        fail(name, state, f"shape {shape}: [N, W-1, C], the oldest token first")


def prepare(
    x, weight, bias=None, *, activation=None, initial_state=None, return_state=False, cu_seqlens=None,
    backend=None,
) -> Call:  # fmt: skip
    """Check the public arguments and normalise them; the errors a user sees come from here."""
    silu = check_activation(activation)
    if type(return_state) is not bool:
        fail("return_state", return_state, "a bool", TypeError)
    check_float_tensor("x", x, 3, "[B, T, C]")
    if initial_state is not None:
        check_float_tensor("initial_state", initial_state, 3, "[N, W-1, C]")
    if autocasts(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        initial_state = None if initial_state is None else initial_state.to(x.dtype)
    check_parameters(x, weight, bias)
    N = x.shape[0]
    if cu_seqlens is not None:
        if N != 1:
            fail("x", x, "batch 1 with cu_seqlens (sequences are packed along T)")
        check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[1], x.device)
        N = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_state("initial_state", initial_state, x, weight, N)
    return Call(x, weight, bias, initial_state, cu_seqlens, silu)


def reason_against_native(call) -> str | None:
    """None where the native kernels can run `call`, else why not."""
    if call.x.is_cpu and call.weight.shape[1] > MAX_WIDTH:
        return f"weight has {call.weight.shape[1]} taps; up to {MAX_WIDTH} are supported"
    return native.reason_against_kernel(call.x)


# Best first; the same for the operation and its decode step.
SUPPORTS = {
    "native": reason_against_native,
    "triton": triton_kernels.reason_against,
    "reference": lambda call: None,
}
OPERATION = register(Operation("causal_conv1d", dict(SUPPORTS), prepare))


class CausalConv1d(Function):
    """Forward and backward over the operators of one backend; saves the inputs alone."""

    @staticmethod
    def forward(x, weight, bias, initial_state, cu_seqlens, silu, return_state, prefix):
        return FORWARD[prefix](x, weight, bias, initial_state, cu_seqlens, silu, return_state)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.silu, ctx.return_state, ctx.prefix = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x)
        if not ctx.return_state:
            dstate = None
        op = BACKWARD[ctx.prefix]
        dx, dweight, dbias, dinitial = op(dy, dstate, x, weight, bias, initial_state, cu_seqlens, ctx.silu)
        dbias = None if bias is None else dbias
        return dx, dweight, dbias, None if initial_state is None else dinitial, *[None] * 4


def convolve(call: Call, backend: str, return_state: bool) -> tuple[Tensor, Tensor]:
    """Run a checked call on a backend that supports it -> y, state."""
    if backend == "reference":
        with without_autocast(call.x):
            return reference.causal_conv1d(*call)
    prefix = "triton_" if backend == "triton" else ""
    return apply_function(CausalConv1d, *call, return_state, prefix)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Short depthwise causal convolution over tokens, with its activation; forward and backward, fused.

        y_t = activation(bias + sum_w weight[:, w] * x_{t - (W-1) + w})

    Args:
        x: `[B, T, C]`, float32, bfloat16, float16 or float64; any strides, and no copy where the last one
            is 1 (a slice of a wider projection).
        weight: `[C, W]`; `weight[:, W-1]` multiplies the newest token. In x's dtype, or float32 beside a
            16-bit x. (`torch.nn.Conv1d(C, C, W, groups=C)` keeps it as `[C, 1, W]`.)
        bias: `[C]` or None, like weight.
        activation: None or "silu".
        initial_state: `[N, W-1, C]` in x's dtype, the tokens before each sequence, the oldest first; zeros
            if None. N is B, or the number of packed sequences.
        return_state: also return the last W-1 tokens of each sequence, for the call or step that goes on.
        cu_seqlens: int32 `[N+1]`, offsets of N sequences packed along T (B must be 1); nothing crosses a
            boundary, empty sequences are legal and keep their state.
        backend: None (best that supports the call), "native" (up to 8 taps), "triton" or "reference".

    Under autocast x and initial_state are cast; weight and bias stay as they are.

    Returns:
        y `[B, T, C]` in x's dtype, and with `return_state` also the state `[N, W-1, C]`. Both are
        differentiable, once, in x, weight, bias and initial_state.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        Unsupported: the named backend cannot run this call.

    Source: Gu and Dao 2023 (Mamba), section 3.4.
    """
    call = prepare(
        x, weight, bias, activation=activation, initial_state=initial_state, return_state=return_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    y, state = convolve(call, OPERATION.choose(call, backend), return_state)
    return (y, state) if return_state else y


def _fake_forward(x, weight, bias, initial_state, cu_seqlens, silu, return_state):
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_empty(N if return_state else 0, weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), state


def _fake_backward(dout, dstate, x, weight, bias, initial_state, cu_seqlens, silu):
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    N = 0 if initial_state is None else initial_state.shape[0]
    dinitial = x.new_empty(N, weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial


for _prefix in ("",) * native.HAS_CPU + ("triton_",):
    torch.library.register_fake(f"slmkernels::{_prefix}causal_conv1d_forward", _fake_forward)
    torch.library.register_fake(f"slmkernels::{_prefix}causal_conv1d_backward", _fake_backward)
