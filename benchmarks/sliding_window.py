"""The cases of `sliding_window_attention` and its decode step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from slmkernels import RingCache, sliding_window_attention, sliding_window_attention_step
from slmkernels.ops.sliding_window.function import window_bounds
from slmkernels.ops.sliding_window.reference import attention, visible

from . import peers
from .cases import (
    DECODE_BARS,
    DTYPES,
    OURS,
    TERAFLOPS,
    Bar,
    Candidate,
    Case,
    Inputs,
    Run,
    Scaling,
    chosen_backend,
    for_gpu,
)

CHECKED_ROWS = 64  # of the last queries, where checking every row would cost too much
ALL_ROWS = 1024  # up to this length every row is checked
MODES = ("forward", "forward_backward")
BACKWARD_OVER_FORWARD = 2.5  # five matrix products where the forward pass has two


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, Hq query and H key-value heads of size D, and what the queries see."""

    B: int = 1
    T: int = 4096
    Hq: int = 8
    H: int = 8
    D: int = 64
    window: int | tuple[int, int] | None = 256
    causal: bool = True

    def small(self) -> "Shape":
        """The same kind of case in milliseconds, and cheap to check in float64."""
        shrink = {int: 32, tuple: (16, 16), type(None): None}
        return replace(self, B=min(self.B, 2), T=min(self.T, 128), window=shrink[type(self.window)])

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """(left, right) as `sliding_window_attention` counts them."""
        return window_bounds(self.window, self.causal)

    @property
    def checked_rows(self) -> int:
        """How many of the last queries the check looks at."""
        return self.T if self.T <= ALL_ROWS else CHECKED_ROWS

    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        left, right = (self.T if side is None else side for side in self.bounds)
        return sum(min(t + right, self.T - 1) - max(t - left, 0) + 1 for t in range(self.T))

    def __str__(self) -> str:
        sees = "causal" if self.window is None else f"W={self.window}"
        return f"B={self.B} T={self.T} Hq={self.Hq} Hkv={self.H} D={self.D} {sees}"


SHAPES = {
    "standard": Shape(),
    "long": Shape(T=32768),
    "gqa": Shape(H=2),
    "wide_head": Shape(D=128),
    "small_model": Shape(B=8, T=512, Hq=4, H=4, D=32, window=128),
    "causal": Shape(window=None),
    "bidirectional": Shape(window=(128, 128), causal=False),
}
DECODE = {"decode": Shape(T=1, window=1024)}
# The standard shape, forward and backward in fp32, at other sizes: time and memory are linear in both.
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
FP16_SHAPES = ("standard",)  # the other shapes run in fp32 and bf16
# For a GPU, in bf16.
GPU_TRAINING = Shape(B=4, T=8192, Hq=16, H=4)
GPU_SHAPES = {
    "gpu_w256": GPU_TRAINING,
    "gpu_w512": replace(GPU_TRAINING, window=512),
    "gpu_wide_head": Shape(T=16384, Hq=64, H=8, D=128, window=1024),
}
GPU_DECODE = {"gpu_decode": Shape(B=64, T=1, Hq=16, H=4, window=1024)}
WINDOW_BARS = {
    "forward": (Bar("FlexAttention", 1.3, 2), Bar("FlashAttention-4", 0.8, 1.2)),
    "forward_backward": (Bar("FlexAttention", 1.2, 2),),
}
BARS = {
    "gpu_w256": WINDOW_BARS,
    "gpu_w512": WINDOW_BARS,
    "gpu_wide_head": {"forward": (Bar(TERAFLOPS, 260, 525),), "forward_backward": ()},
}


def _randn(device: torch.device, dtype: torch.dtype, **shapes: tuple[int, ...]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    return {name: draw(shape).to(dtype).to(device) for name, shape in shapes.items()}


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    queries, keys = (shape.B, shape.T, shape.Hq, shape.D), (shape.B, shape.T, shape.H, shape.D)
    return _randn(device, dtype, q=queries, k=keys, v=keys, do=queries)


def _last_rows_only(shape: Shape, backward: bool, inputs: Inputs) -> Inputs:
    """The inputs with a gradient in the checked rows only: all gradients then follow from those rows."""
    if not backward:
        return inputs
    do = torch.zeros_like(inputs["do"])
    do[:, -shape.checked_rows :] = inputs["do"][:, -shape.checked_rows :]
    return {**inputs, "do": do}


def _last_rows(shape: Shape, backward: bool, attend, inputs: Inputs) -> tuple[Tensor, ...]:
    """The checked rows of the results by `attend(q, k, v, left, right)` over the keys that they see."""
    left, right = shape.bounds
    rows = shape.checked_rows
    keys = shape.T if left is None else min(shape.T, rows + left)
    spans = {"q": rows, "k": keys, "v": keys}
    leaves = [inputs[name][:, -span:].detach().requires_grad_(backward) for name, span in spans.items()]
    o = attend(*leaves, left, right)
    gradients = torch.autograd.grad(o, leaves, inputs["do"][:, -rows:].to(o.dtype)) if backward else ()
    return o.detach(), *gradients


def _exact(q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return attention(q, k, v, None, left, right, q.shape[-1] ** -0.5, None)[0]


def _plain(q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None) -> Tensor:
    mask = visible(q.shape[1], k.shape[1], left, right, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def attention_case(label: str, shape: Shape, mode: str, dtype: str) -> Case:
    """The case of one shape, `forward` or `forward_backward`, in one dtype."""
    backward = mode == "forward_backward"
    options = {"window": shape.window, "causal": shape.causal}
    function = partial(sliding_window_attention, **options)
    element = DTYPES[dtype].itemsize
    queries, keys = shape.B * shape.T * shape.Hq * shape.D, shape.B * shape.T * shape.H * shape.D
    forward_flops = 4 * shape.D * shape.pairs() * shape.B * shape.Hq
    return Case(
        name=f"sliding_window/{label}/{mode}/{dtype}",
        operation="sliding_window_attention",
        dtype=DTYPES[dtype],
        sizes=str(shape),
        outputs=("o", "dq", "dk", "dv") if backward else ("o",),
        inputs=partial(_inputs, shape, DTYPES[dtype]),
        checked=partial(_last_rows_only, shape, backward),
        ours=Candidate(OURS, lambda inputs: peers.attention_run(function, inputs, backward)),
        peers=peers.attention_peers(*shape.bounds, backward),
        reference=partial(_last_rows, shape, backward, _exact),
        plain=partial(_last_rows, shape, backward, _plain),
        backend=lambda i: chosen_backend("sliding_window_attention", i["q"], i["k"], i["v"], **options),
        flops=int(forward_flops * (1 + BACKWARD_OVER_FORWARD * backward)),
        bytes=element * (2 + 2 * backward) * (queries + keys),  # q, k, v, o; and do, dq, dk, dv
    )


def _decode_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    token, past = (shape.B, 1, shape.H, shape.D), (shape.B, shape.window, shape.H, shape.D)
    query = (shape.B, 1, shape.Hq, shape.D)
    return _randn(device, dtype, q=query, k=token, v=token, past_k=past, past_v=past)


def _filled_cache(shape: Shape, inputs: Inputs) -> RingCache:
    like = {"dtype": inputs["q"].dtype, "device": inputs["q"].device}
    cache = RingCache(shape.B, shape.window, shape.H, shape.D, **like)
    cache.append(inputs["past_k"], inputs["past_v"])
    return cache


def _decode_ours(shape: Shape, inputs: Inputs) -> Run:
    tokens = inputs["q"], inputs["k"], inputs["v"]
    cache = _filled_cache(shape, inputs)

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (sliding_window_attention_step(*tokens, cache),)

    return Run(call)


def _decode_expected(shape: Shape, attend, inputs: Inputs) -> tuple[Tensor, ...]:
    keys, values = (
        torch.cat([inputs[f"past_{name}"], inputs[name]], dim=1)[:, -shape.window :] for name in "kv"
    )
    return (attend(inputs["q"], keys, values, None, None),)


def decode_case(label: str, shape: Shape, dtype: str) -> Case:
    """One token behind a full ring."""
    step = "sliding_window_attention_step"
    element = DTYPES[dtype].itemsize
    return Case(
        name=f"sliding_window/{label}/step/{dtype}",
        operation=step,
        dtype=DTYPES[dtype],
        sizes=str(shape),
        outputs=("o",),
        inputs=partial(_decode_inputs, shape, DTYPES[dtype]),
        checked=lambda inputs: inputs,
        ours=Candidate(OURS, partial(_decode_ours, shape)),
        peers=(Candidate("SDPA over the ring", peers.decode_sdpa),),
        reference=partial(_decode_expected, shape, _exact),
        plain=partial(_decode_expected, shape, _plain),
        backend=lambda i: chosen_backend(step, i["q"], i["k"], i["v"], _filled_cache(shape, i)),
        flops=4 * math.prod((shape.B, shape.Hq, shape.window, shape.D)),
        bytes=element * 2 * math.prod((shape.B, shape.H, shape.window, shape.D)),
        graph=True,
    )


def cases(small: bool = False) -> Iterator[Case]:
    """Every shape, forward and forward with backward, dtype by dtype; decoding; scaling; for a GPU."""

    def full(label: str, shape: Shape, mode: str, dtype: str) -> Case:
        return attention_case(label, shape.small() if small else shape, mode, dtype)

    def step(label: str, shape: Shape, dtype: str) -> Case:
        return decode_case(label, replace(shape, B=min(shape.B, 2), window=64) if small else shape, dtype)

    for label, shape in SHAPES.items():
        for mode in MODES:
            for dtype in DTYPES:
                if dtype != "fp16" or label in FP16_SHAPES:
                    yield full(label, shape, mode, dtype)
    for label, shape in DECODE.items():
        for dtype in DTYPES:
            yield step(label, shape, dtype)
    longer = [(f"scaling_T_{T}", Scaling("W=256", "T", T), Shape(T=T)) for T in LENGTHS]
    wider = [(f"scaling_W_{W}", Scaling("T=4096", "W", W), Shape(window=W)) for W in WINDOWS]
    for label, scaling, shape in longer + wider:
        yield replace(full(label, shape, "forward_backward", "fp32"), scaling=scaling)
    for label, shape in GPU_SHAPES.items():
        for mode in MODES:
            yield for_gpu(full(label, shape, mode, "bf16"), BARS[label][mode], small)
    for label, shape in GPU_DECODE.items():
        yield for_gpu(step(label, shape, "bf16"), DECODE_BARS, small)
