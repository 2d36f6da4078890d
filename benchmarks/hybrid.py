"""The cases of `hybrid_attention` and its decode step.

Useful work, in FLOPs: a near pair of query and key takes 2 (D + V); a query that has far keys reads the
state of F V numbers, 2 F V; a key that becomes far is written into it, 2 F V once a key-value head. Backward:
the near part counts 2.5 times (five matrix products where forward has two), the read twice (gradients of
phi_q and of the state), the write three times (gradients of phi_k and v; the states between two kept ones).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from slmkernels import HybridCache, hybrid_attention, hybrid_attention_step
from slmkernels.ops.hybrid import reference

from . import hybrid_peers as peers
from .cases import DECODE_BARS, DTYPES, OURS, Candidate, Case, Inputs, Run, Scaling, chosen_backend, for_gpu

ALL_ROWS = 1024  # up to this length every row is checked
CHECKED_ROWS = 512  # of the last tokens, where checking every row would cost too much


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, Hq query and H key-value heads of sizes D = V, F features, what is near."""

    B: int = 1
    T: int = 4096
    Hq: int = 8
    H: int = 8
    D: int = 64
    F: int = 64
    window: int = 256
    alignment: str = "sliding"

    def small(self) -> "Shape":
        """The same kind of case in milliseconds."""
        sizes = {"D": min(self.D, 32), "F": min(self.F, 41), "window": 32}
        return replace(self, B=min(self.B, 2), T=min(self.T, 128), **sizes)

    @property
    def options(self) -> dict:
        """The options of the call."""
        return {"window": self.window, "alignment": self.alignment}

    @property
    def block(self) -> bool:
        """Whether the alignment is by blocks."""
        return self.alignment == "block"

    @property
    def checked_rows(self) -> int:
        """How many of the last tokens the check looks at."""
        return self.T if self.T <= ALL_ROWS else CHECKED_ROWS

    @property
    def checked_keys(self) -> int:
        """And of the last keys: all that are near to those tokens, whole blocks of them."""
        return min(self.T, self.checked_rows + self.window)

    def first_near(self) -> list[int]:
        """Of every token; as many keys are far to it."""
        return [max(0, reference.first_near(t, self.window, self.block)) for t in range(self.T)]

    def flops(self, backward: bool) -> int:
        """See the head of this file."""
        first = self.first_near()
        pairs = sum(t + 1 - near for t, near in enumerate(first))
        near = 2 * 2 * self.D * pairs * self.Hq * (1 + 2.5 * backward)
        reads = sum(near > 0 for near in first) * self.Hq * (1 + 2 * backward)
        writes = first[-1] * self.H * (1 + 3 * backward)
        return int(self.B * (near + 2 * self.F * self.D * (reads + writes)))

    def numbers(self) -> int:
        """In the arguments and the result, all of a token's."""
        return self.B * self.T * (self.Hq + self.H) * (2 * self.D + self.F)

    def __str__(self) -> str:
        heads = f"Hq={self.Hq} Hkv={self.H} D=V={self.D} F={self.F}"
        return f"B={self.B} T={self.T} {heads} W={self.window} {self.alignment}"


SHAPES = {
    "standard": Shape(),
    "block": Shape(alignment="block"),
    "small_model": Shape(B=8, T=512, Hq=4, H=4, D=32, F=32, window=128),
    "gqa": Shape(H=2),
    "based": Shape(F=153, window=64),  # Taylor features of 16 numbers
}
LENGTHS = (1024, 4096, 8192, 16384, 32768)  # forward and backward: time and memory are linear
DECODE = {"decode": Shape(T=1), "decode_batch": Shape(B=8, T=1)}
CASE_DTYPES = ("fp32", "bf16")
# For a GPU, in bf16.
GPU_SHAPES = {"gpu": Shape(B=4, T=8192, Hq=16, H=4)}
GPU_DECODE = {"gpu_decode": Shape(B=64, T=1)}


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """As in use: features are positive, those of LoLCATs (a softmax)."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    heads = {"q": shape.Hq, "k": shape.H, "v": shape.H, "do": shape.Hq}
    inputs = {name: draw(shape.B, shape.T, H, shape.D) for name, H in heads.items()}
    for name, H in (("phi_q", shape.Hq), ("phi_k", shape.H)):
        inputs[name] = draw(shape.B, shape.T, H, shape.F).softmax(-1)
    return {name: x.to(dtype).to(device) for name, x in inputs.items()}


def _last_rows_only(shape: Shape, inputs: Inputs) -> Inputs:
    """The inputs with a gradient in the checked rows only: all gradients then follow from those rows."""
    if shape.checked_rows == shape.T:
        return inputs
    do = inputs["do"].clone()
    do[:, : -shape.checked_rows] = 0
    return {**inputs, "do": do}


def _expected(shape: Shape, backward: bool, dtype: torch.dtype | None, inputs: Inputs) -> tuple[Tensor, ...]:
    """The checked rows by our reference, in `dtype` or in the inputs' own. Keys before are in the state."""
    rows, keys = shape.checked_rows, shape.checked_keys
    spans = {"q": rows, "k": keys, "v": keys, "phi_q": rows, "phi_k": keys}
    x = {name: x.to(dtype or x.dtype) for name, x in inputs.items()}
    leaves = [x[name][:, -span:].detach().requires_grad_(backward) for name, span in spans.items()]
    high = torch.promote_types(x["q"].dtype, torch.float32)
    v, phi = (x[name][:, : shape.T - keys].to(high) for name in ("v", "phi_k"))
    states = {
        "initial_state": torch.einsum("bthf,bthv->bhfv", phi, v),
        "initial_normalizer": phi.sum(1),
    }
    options = {"window": shape.window, "block": shape.block, "scale": shape.D**-0.5}
    o = reference.hybrid_attention(*leaves, **states, **options)[0]
    gradients = torch.autograd.grad(o, leaves, x["do"][:, -rows:]) if backward else ()
    return o.detach(), *gradients


def _tensors(inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in peers.LEAVES}


def hybrid_case(label: str, shape: Shape, mode: str, dtype: str, compiles: bool = True) -> Case:
    """The case of one shape, `forward` or `forward_backward`, in one dtype."""
    backward = mode == "forward_backward"
    function = partial(hybrid_attention, **shape.options)
    return Case(
        name=f"hybrid/{label}/{mode}/{dtype}",
        operation="hybrid_attention",
        dtype=DTYPES[dtype],
        sizes=str(shape),
        outputs=("o", *(f"d{name}" for name in peers.LEAVES)) if backward else ("o",),
        inputs=partial(_inputs, shape, DTYPES[dtype]),
        checked=partial(_last_rows_only, shape) if backward else lambda inputs: inputs,
        ours=Candidate(OURS, lambda inputs: peers.hybrid_run(function, inputs, backward)),
        peers=peers.hybrid_peers(shape.window, shape.block, backward, compiles),
        reference=partial(_expected, shape, backward, torch.float64),
        plain=partial(_expected, shape, backward, None),
        backend=lambda i: chosen_backend("hybrid_attention", **_tensors(i), **shape.options),
        flops=shape.flops(backward),
        bytes=DTYPES[dtype].itemsize * shape.numbers() * (1 + backward),  # backward: o and the gradients
    )


def _decode_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A token, a full ring before it, and a state of as many keys as `shape.window`."""
    past = _inputs(replace(shape, T=shape.window), dtype, device)
    generator = torch.Generator().manual_seed(1)
    size = shape.B, shape.H, shape.F, shape.D
    state, normalizer = (torch.randn(s, generator=generator) for s in (size, size[:3]))
    return {
        **_inputs(shape, dtype, device),
        **{f"past_{name}": past[name] for name in ("k", "v", "phi_k")},
        "state": state.to(device),
        "normalizer": normalizer.abs().to(device),
    }


def _filled_cache(shape: Shape, inputs: Inputs) -> HybridCache:
    like = {"dtype": inputs["q"].dtype, "device": inputs["q"].device}
    cache = HybridCache(shape.B, shape.window, shape.H, shape.D, shape.F, alignment=shape.alignment, **like)
    cache.append(*(inputs[f"past_{name}"] for name in ("k", "v", "phi_k")))
    cache.state.copy_(inputs["state"])
    cache.normalizer.copy_(inputs["normalizer"])
    return cache


def _decode_ours(shape: Shape, inputs: Inputs) -> Run:
    tensors, cache = _tensors(inputs), _filled_cache(shape, inputs)

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (hybrid_attention_step(**tensors, cache=cache),)

    return Run(call)


def _decode_expected(shape: Shape, dtype: torch.dtype | None, inputs: Inputs) -> tuple[Tensor, ...]:
    x = {name: x.to(dtype or x.dtype) for name, x in inputs.items()}
    k, v, phi_k = (torch.cat([x[f"past_{name}"], x[name]], dim=1) for name in ("k", "v", "phi_k"))
    states = {"initial_state": x["state"], "initial_normalizer": x["normalizer"]}
    options = {"window": shape.window, "block": shape.block, "scale": shape.D**-0.5}
    return (reference.hybrid_attention(x["q"], k, v, x["phi_q"], phi_k, **states, **options)[0],)


def decode_case(label: str, shape: Shape, dtype: str) -> Case:
    """One token behind a full ring and a state, sliding: one key enters the state."""
    step = "hybrid_attention_step"
    near = math.prod((shape.B, shape.Hq, shape.window, 2 * shape.D))
    state = math.prod((shape.B, shape.H, shape.F, shape.D))
    return Case(
        name=f"hybrid/{label}/step/{dtype}",
        operation=step,
        dtype=DTYPES[dtype],
        sizes=str(shape),
        outputs=("o",),
        inputs=partial(_decode_inputs, shape, DTYPES[dtype]),
        checked=lambda inputs: inputs,
        ours=Candidate(OURS, partial(_decode_ours, shape)),
        peers=(
            Candidate("PyTorch in place", peers.decode_pytorch),
            peers.decode_separate(normalize=False),
            peers.decode_separate(normalize=True),
        ),
        reference=partial(_decode_expected, shape, torch.float64),
        plain=partial(_decode_expected, shape, None),
        backend=lambda i: chosen_backend(step, **_tensors(i), cache=_filled_cache(shape, i)),
        flops=2 * (near + state * (1 + shape.Hq // shape.H)),
        # the rings of keys and values, read; the float32 state, read and written
        bytes=DTYPES[dtype].itemsize * near * shape.H // shape.Hq + 2 * 4 * state,
        graph=True,
    )


def cases(small: bool = False) -> Iterator[Case]:
    """Every shape, forward and with backward, dtype by dtype; decoding; longer sequences; for a GPU."""
    for label, shape in SHAPES.items():
        for mode in ("forward", "forward_backward"):
            for dtype in CASE_DTYPES:
                yield hybrid_case(label, shape.small() if small else shape, mode, dtype)
    for label, shape in DECODE.items():
        for dtype in CASE_DTYPES:
            yield decode_case(label, shape.small() if small else shape, dtype)
    for T in LENGTHS:
        long = Shape(T=T)
        shape = long.small() if small else long
        case = hybrid_case(f"scaling_{T}", shape, "forward_backward", "fp32", False)
        yield replace(case, scaling=Scaling("W=256", "T", T))
    for label, shape in GPU_SHAPES.items():
        for mode in ("forward", "forward_backward"):
            yield for_gpu(hybrid_case(label, shape.small() if small else shape, mode, "bf16"), (), small)
    for label, shape in GPU_DECODE.items():
        yield for_gpu(decode_case(label, shape.small() if small else shape, "bf16"), DECODE_BARS, small)
