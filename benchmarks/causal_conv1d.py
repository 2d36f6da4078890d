"""The cases of `causal_conv1d` and its decode step."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from slmkernels import causal_conv1d, causal_conv1d_step
from slmkernels.ops.causal_conv1d import reference

from .cases import DTYPES, OURS, Candidate, Case, Inputs, Run, chosen_backend

RESULTS = ("y", "dx", "dweight", "dbias")


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens of C channels, W taps, silu."""

    B: int = 1
    T: int = 4096
    C: int = 1024
    W: int = 4

    def small(self) -> "Shape":
        """The same kind of case in milliseconds."""
        return replace(self, B=min(self.B, 2), T=min(self.T, 64), C=64)

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} C={self.C} W={self.W} silu"


SHAPES = {"standard": Shape(), "small_model": Shape(B=8, T=512, C=512)}
DECODE = Shape(T=1)


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    tokens = (shape.B, shape.T, shape.C)
    shapes = {"x": tokens, "weight": (shape.C, shape.W), "bias": (shape.C,), "dy": tokens}
    shapes["state"] = (shape.B, shape.W - 1, shape.C)
    return {
        name: torch.randn(sizes, generator=generator).to(dtype).to(device) for name, sizes in shapes.items()
    }


# ---- forward, and forward with backward --------------------------------------------------------------------


def conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What models fall back on without a kernel: transpose, pad on both sides, convolve, cut, silu."""
    T, (C, W) = x.shape[1], weight.shape
    z = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=W - 1, groups=C)[..., :T]
    return F.silu(z).transpose(1, 2)


def _run(function: Callable[..., Tensor], backward: bool, inputs: Inputs) -> Run:
    leaves = [inputs[name].detach().requires_grad_(backward) for name in ("x", "weight", "bias")]
    dy = inputs["dy"]

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            y = function(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy)) if backward else (y,)

    return Run(call, lambda x: x.reshape(1, -1) if x.ndim == 1 else x)  # the check compares along dimension 1


def _expected(function: Callable[..., Tensor], dtype: torch.dtype | None, backward: bool, inputs: Inputs):
    converted = {name: x if dtype is None else x.to(dtype) for name, x in inputs.items()}
    run = _run(function, backward, converted)
    return tuple(run.ours(x) for x in run.call())


def _reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.causal_conv1d(x, weight, bias, silu=True)[0]


def full_case(label: str, shape: Shape, mode: str, dtype: str) -> Case:
    """The case of one shape, `forward` or `forward_backward`, in one dtype."""
    backward = mode == "forward_backward"
    ours = partial(causal_conv1d, activation="silu")
    elements = math.prod((shape.B, shape.T, shape.C))
    return Case(
        name=f"causal_conv1d/{label}/{mode}/{dtype}",
        operation="causal_conv1d",
        dtype=DTYPES[dtype],
        sizes=str(shape),
        outputs=RESULTS if backward else RESULTS[:1],
        inputs=partial(_inputs, shape, DTYPES[dtype]),
        checked=lambda inputs: inputs,
        ours=Candidate(OURS, partial(_run, ours, backward)),
        peers=(Candidate("conv1d + silu", partial(_run, conv1d_silu, backward)),),
        reference=partial(_expected, _reference, torch.float64, backward),
        plain=partial(_expected, conv1d_silu, None, backward),
        backend=lambda i: chosen_backend("causal_conv1d", i["x"], i["weight"], i["bias"], activation="silu"),
        flops=elements * 2 * shape.W * (1 + 2 * backward),  # z; and dx, d(weight)
        bytes=elements * DTYPES[dtype].itemsize * (2 + 3 * backward),  # x, y; and x, dy, dx
    )


# ---- decoding ----------------------------------------------------------------------------------------------


def _step_ours(inputs: Inputs) -> Run:
    x, state, weight, bias = inputs["x"], inputs["state"].clone(), inputs["weight"], inputs["bias"]

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (causal_conv1d_step(x, state, weight, bias, activation="silu"),)

    return Run(call)


def _step_roll(inputs: Inputs) -> Run:
    """The usual step in PyTorch: a state [B, C, W] rolls, the token goes last, a sum of products, silu."""
    x, weight, bias = inputs["x"][:, 0].contiguous(), inputs["weight"], inputs["bias"]
    state = F.pad(inputs["state"].transpose(1, 2), (1, 0)).contiguous()

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            state.copy_(torch.roll(state, shifts=-1, dims=-1))
            state[:, :, -1] = x
            return (F.silu(torch.sum(state * weight, dim=-1) + bias),)

    return Run(call, lambda y: y[:, None])


def _step_expected(dtype: torch.dtype | None, inputs: Inputs) -> tuple[Tensor, ...]:
    x, state, weight, bias = (
        inputs[name] if dtype is None else inputs[name].to(dtype) for name in ("x", "state", "weight", "bias")
    )
    if dtype is not None:
        return (reference.causal_conv1d_step(x, state.clone(), weight, bias, silu=True),)
    z = (torch.cat([state, x], 1) * weight.t()).sum(1, keepdim=True) + bias
    return (F.silu(z),)


def step_case(label: str, shape: Shape, dtype: str) -> Case:
    """One token behind a state."""
    step = "causal_conv1d_step"
    channels = shape.B * shape.C
    return Case(
        name=f"causal_conv1d/{label}/step/{dtype}",
        operation=step,
        dtype=DTYPES[dtype],
        sizes=str(shape),
        outputs=("y",),
        inputs=partial(_inputs, shape, DTYPES[dtype]),
        checked=lambda inputs: inputs,
        ours=Candidate(OURS, _step_ours),
        peers=(Candidate("roll and sum", _step_roll),),
        reference=partial(_step_expected, torch.float64),
        plain=partial(_step_expected, None),
        backend=lambda i: chosen_backend(step, i["x"], i["state"], i["weight"], i["bias"], activation="silu"),
        flops=channels * 2 * shape.W,
        bytes=DTYPES[dtype].itemsize * (channels * 2 * shape.W + shape.C * (shape.W + 1)),
        graph=True,
    )


def cases(small: bool = False) -> Iterator[Case]:
    """Every shape, forward and forward with backward, in float32 and bfloat16; then decoding."""
    for dtype in ("fp32", "bf16"):
        for label, shape in SHAPES.items():
            for mode in ("forward", "forward_backward"):
                yield full_case(label, shape.small() if small else shape, mode, dtype)
        for label, shape in {"decode": DECODE, "decode_batch": replace(DECODE, B=8)}.items():
            yield step_case(label, shape.small() if small else shape, dtype)
