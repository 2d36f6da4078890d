"""The cases of `linear_attention` and its decode step.

Useful work is that of an algorithm by chunks of C = 64 tokens, by one formula for every row of the table: a
token and head reads and writes the state, 2 K V multiply-adds (3 K V with the delta rule, which reads it
twice), and meets half a chunk of keys and values, C / 2 (K + V) (C (K + V) with the delta rule, which also
solves for the corrected values). Backward counts 2.5 times as much as forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from slmkernels import linear_attention, linear_attention_step
from slmkernels.ops.linear import reference

from . import linear_peers as peers
from .cases import (
    DECODE_BARS,
    DTYPES,
    OURS,
    Bar,
    Candidate,
    Case,
    Inputs,
    Run,
    Scaling,
    chosen_backend,
    for_gpu,
)

ALL_ROWS = 4096  # up to this length every row is checked
CHECKED_ROWS = 1024  # of the last tokens, where checking every row would cost too much
BACKWARD_OVER_FORWARD = 2.5
MODES = ("forward", "forward_backward")
DELTA = ("delta", "gated delta", "kda")
BY_TOKEN, BY_CHANNEL = ("scalar decay", "gated delta"), ("gla", "kda")  # the decay's sizes


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, H heads of size D, and the row of the table in `linear_attention`."""

    row: str = "linear"
    B: int = 1
    T: int = 4096
    H: int = 8
    D: int = 64
    normalize: bool = False
    dtypes: tuple[str, ...] = ("fp32",)

    def small(self) -> "Shape":
        """The same kind of case in milliseconds."""
        return replace(self, B=min(self.B, 2), T=min(self.T, 150), H=2, D=min(self.D, 32))

    @property
    def options(self) -> dict:
        """The options of the call; with the delta rule the keys are normalised."""
        return {"normalize": self.normalize, "l2norm_qk": self.row in DELTA}

    @property
    def leaves(self) -> tuple[str, ...]:
        """The inputs with a gradient. Retention's decay is a constant."""
        gates = ("decay",) * (self.row in BY_TOKEN + BY_CHANNEL) + ("beta",) * (self.row in DELTA)
        return ("q", "k", "v", *gates)

    @property
    def checked_rows(self) -> int:
        """How many of the last tokens the check looks at."""
        return self.T if self.T <= ALL_ROWS else CHECKED_ROWS

    def flops(self) -> int:
        """Of the forward pass; see the head of this file."""
        delta = self.row in DELTA
        a_token = (2 + delta) * self.D * self.D + (1 + delta) * peers.CHUNK // 2 * 2 * self.D
        return 2 * self.B * self.T * self.H * a_token

    def __str__(self) -> str:
        row = self.row + " normalized" * self.normalize
        return f"{row} B={self.B} T={self.T} H={self.H} K=V={self.D}"


GATED = Shape("gated delta", T=2048)
SHAPES = {
    "plain": Shape(),
    "plain_wide": Shape(D=128),
    "normalized": Shape(normalize=True),
    "retention": Shape("retention"),
    "gla": Shape("gla", T=2048),
    "delta": Shape("delta", T=2048),
    "gated_delta": GATED,
    "gated_delta_wide": replace(GATED, T=4096, D=128, dtypes=("fp32", "bf16")),
    "gated_delta_small_model": replace(GATED, B=8, T=512, H=4),
    "kda": Shape("kda", T=2048),
}
LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536)  # plain and gated delta
DECODE = {"decode": replace(GATED, T=1)}
# For a GPU; with the bars of the rows that have some.
GPU = {"B": 8, "T": 2048, "dtypes": ("bf16",)}
GPU_SHAPES = {
    f"gpu_{row.replace(' ', '_')}_{D}": Shape(row, D=D, **GPU)
    for row in ("gated delta", "scalar decay")
    for D in (64, 128)
}
GPU_DECODE = {"gpu_decode": replace(GATED, B=64, T=1, D=128)}
BARS = {"forward": (Bar("fla *", 1.5, 3),), "forward_backward": (Bar("fla *", 1.3, 3),)}


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """As in use: gates near 1, keys of length 1, positive features where there is a normaliser."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    tokens = shape.B, shape.T, shape.H
    inputs = {name: draw(*tokens, shape.D) for name in ("q", "k", "v", "do")}
    if shape.normalize:
        inputs |= {name: F.elu(inputs[name]) + 1 for name in "qk"}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if shape.row == "retention":
        inputs["decay"] = torch.log1p(-(2.0 ** (-5 - torch.arange(shape.H))))
    elif shape.row in BY_CHANNEL:
        inputs["decay"] = F.logsigmoid(draw(*tokens, shape.D)) / 16
    elif shape.row in BY_TOKEN:
        inputs["decay"] = F.logsigmoid(draw(*tokens)) / 4
    if shape.row in DELTA:
        inputs["beta"] = draw(*tokens).sigmoid()
    return {name: x.to(device) for name, x in inputs.items()}


def _last_rows_only(shape: Shape, inputs: Inputs) -> Inputs:
    """The inputs with keys, values and gradients in the checked rows only; nothing else then matters."""
    if shape.checked_rows == shape.T:
        return inputs
    masked = {name: inputs[name].clone() for name in ("k", "v", "do")}
    for x in masked.values():
        x[:, : -shape.checked_rows] = 0
    return {**inputs, **masked}


def _expected(shape: Shape, backward: bool, dtype: torch.dtype | None, inputs: Inputs) -> tuple[Tensor, ...]:
    """The checked rows by our reference, in `dtype` or in the inputs' own."""
    rows = slice(-shape.checked_rows, None)
    cut = {name: x if x.ndim == 1 else x[:, rows] for name, x in inputs.items()}
    cut = {name: x.to(dtype or x.dtype) for name, x in cut.items()}
    attend = peers.our_reference(shape.options)
    return peers.linear_run(attend, cut, backward, shape.row == "retention").call()


def _tensors(inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in peers.LEAVES if name in inputs}


def linear_case(label: str, shape: Shape, mode: str, dtype: str, compiles: bool = True) -> Case:
    """The case of one shape, `forward` or `forward_backward`, in one dtype."""
    backward = mode == "forward_backward"
    function = partial(linear_attention, **shape.options)
    constant = shape.row == "retention"
    tokens = shape.B * shape.T * shape.H
    numbers = {"decay": shape.D if shape.row in BY_CHANNEL else 1, "beta": 1}
    gates = 4 * tokens * sum(numbers[name] for name in shape.leaves[3:])
    return Case(
        name=f"linear/{label}/{mode}/{dtype}",
        operation="linear_attention",
        dtype=DTYPES[dtype],
        sizes=str(shape),
        outputs=("o", *(f"d{name}" for name in shape.leaves)) if backward else ("o",),
        inputs=partial(_inputs, shape, DTYPES[dtype]),
        checked=partial(_last_rows_only, shape),
        ours=Candidate(OURS, lambda inputs: peers.linear_run(function, inputs, backward, constant)),
        peers=peers.linear_peers(shape.row, shape.options, backward, compiles),
        reference=partial(_expected, shape, backward, torch.float64),
        plain=partial(_expected, shape, backward, None),
        backend=lambda inputs: chosen_backend("linear_attention", **_tensors(inputs), **shape.options),
        flops=int(shape.flops() * (1 + BACKWARD_OVER_FORWARD * backward)),
        # q, k, v, gates, o; and do, dq, dk, dv and the gates' gradients
        bytes=(1 + backward) * (DTYPES[dtype].itemsize * 4 * tokens * shape.D + gates),
    )


def _decode_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    state = torch.randn(shape.B, shape.H, shape.D, shape.D, generator=torch.Generator().manual_seed(1))
    return {**_inputs(shape, dtype, device), "state": state.to(device)}


def _decode_ours(inputs: Inputs) -> Run:
    tensors, state = _tensors(inputs), inputs["state"].clone()

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (linear_attention_step(**tensors, state=state, l2norm_qk=True),)

    return Run(call)


def _decode_expected(dtype: torch.dtype | None, inputs: Inputs) -> tuple[Tensor, ...]:
    x = {name: y.to(dtype or y.dtype) for name, y in inputs.items()}
    tensors = (*(x[name] for name in peers.LEAVES), x["state"])
    form = {"form": reference.recurrent, "scale": x["q"].shape[-1] ** -0.5}
    return (reference.linear_attention(*tensors, l2norm_qk=True, **form)[0],)


def decode_case(label: str, shape: Shape, dtype: str) -> Case:
    """One token of the gated delta rule behind a state."""
    step, state = "linear_attention_step", shape.B * shape.H * shape.D * shape.D
    return Case(
        name=f"linear/{label}/step/{dtype}",
        operation=step,
        dtype=DTYPES[dtype],
        sizes=str(shape),
        outputs=("o",),
        inputs=partial(_decode_inputs, shape, DTYPES[dtype]),
        checked=lambda inputs: inputs,
        ours=Candidate(OURS, _decode_ours),
        peers=(
            Candidate("PyTorch in place", peers.decode_pytorch),
            Candidate("transformers, by tokens", peers.decode_transformers),
            Candidate("fla fused_recurrent_gated_delta_rule", peers.decode_fla),
        ),
        reference=partial(_decode_expected, torch.float64),
        plain=partial(_decode_expected, None),
        backend=lambda i: chosen_backend(step, **_tensors(i), state=i["state"], l2norm_qk=True),
        flops=2 * 3 * state,
        bytes=2 * 4 * state,  # the float32 state, read and written
        graph=True,
    )


def cases(small: bool = False) -> Iterator[Case]:
    """Every shape, forward and forward with backward; decoding; longer and longer sequences; for a GPU."""

    def full(label: str, shape: Shape, mode: str, dtype: str, compiles: bool = True) -> Case:
        return linear_case(label, shape.small() if small else shape, mode, dtype, compiles)

    for label, shape in SHAPES.items():
        for mode in MODES:
            for dtype in shape.dtypes:
                yield full(label, shape, mode, dtype)
    for label, shape in DECODE.items():
        yield decode_case(label, shape, "fp32")
    for label, shape in {"plain": Shape(), "gated_delta": GATED}.items():
        for T in LENGTHS:
            for mode in MODES:
                case = full(f"scaling_{label}_{T}", replace(shape, T=T), mode, "fp32", False)
                yield replace(case, scaling=Scaling(label.replace("_", " "), "T", T))
    for label, shape in GPU_SHAPES.items():
        for mode in MODES:
            yield for_gpu(full(label, shape, mode, "bf16"), BARS[mode], small)
    for label, shape in GPU_DECODE.items():
        yield for_gpu(decode_case(label, shape.small() if small else shape, "bf16"), DECODE_BARS, small)
