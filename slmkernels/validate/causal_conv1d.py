"""Random calls of `causal_conv1d`, and the same by PyTorch's own convolution."""

from collections.abc import Callable
from itertools import pairwise

import torch

from ..ops.causal_conv1d.function import causal_conv1d
from ..ops.causal_conv1d.step import causal_conv1d_step
from .draws import Draws, offsets
from .rule import Results, Tensors
from .subject import Options, Subject, step_by_step


def draw_filter(d: Draws) -> Options:
    """What a call and decode steps share."""
    sizes = {"C": d.choice((1, 3, 16, 21, 64, 70, 128, 200, 300)), "W": d.choice((1, 2, 3, 4, 4, 4, 5, 8, 9))}
    return sizes | {"bias": d.flag(), "activation": d.choice((None, "silu")), "float32": d.flag(30)}


def draw(d: Draws) -> Options:
    """Sizes and options of a random call."""
    options = draw_filter(d) | {"past": d.flag()}
    if d.flag(30):
        lengths = d.lengths()
        return options | {"T": sum(lengths), "packed": offsets(lengths)}
    return options | {"B": d.integer(1, 3), "T": d.length()}


def draw_steps(d: Draws) -> Options:
    """The same for decoding."""
    return draw_filter(d) | {"past": True, "B": d.integer(1, 3), "split": d.split()}


def make(
    *, seed=0, B=1, T=70, C=64, W=4, bias=True, past=True, float32=False, packed=None, **options
) -> tuple[Tensors, Options]:
    """Float64 tensors of one call, and its options. `past` is the initial state, `last` the final one;
    `float32` parameters stand beside an x of any dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    N, kind = len(packed) - 1 if packed else B, "_float32" if float32 else ""
    tensors = {"x": normal(B, T, C), f"weight{kind}": normal(C, W)}
    tensors |= {"dy": normal(B, T, C), "dlast": normal(N, W - 1, C)}
    if bias:
        tensors[f"bias{kind}"] = normal(C)
    if past:
        tensors["past"] = normal(N, W - 1, C)
    if packed:
        options["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32)
    return tensors, options


def renamed(convolve: Callable) -> Callable[..., Results]:
    """A function of x, weight, bias, initial_state -> y, state, called with the names of `make`."""

    def attend(x, past=None, weight=None, weight_float32=None, bias=None, bias_float32=None, **rest):
        weight, bias = weight_float32 if weight is None else weight, bias_float32 if bias is None else bias
        y, last = convolve(x, weight, bias, initial_state=past, **rest)
        return {"y": y, "last": last}

    return attend


def ours(backend: str) -> Callable[..., Results]:
    """`causal_conv1d` on a backend."""
    return renamed(
        lambda *tensors, **rest: causal_conv1d(*tensors, return_state=True, backend=backend, **rest)
    )


def steps(backend: str) -> Callable[..., Results]:
    """`causal_conv1d_step` on a backend."""

    def decode(x, weight, bias, *, initial_state, split, **rest):
        state = initial_state.clone(memory_format=torch.contiguous_format)

        def step(x):
            return causal_conv1d_step(x, state, weight, bias, backend=backend, **rest)

        return step_by_step(split, step, {"x": x}), state

    return renamed(decode)


def plain(x, weight, bias=None, *, activation=None, initial_state=None, cu_seqlens=None):
    """The formula by PyTorch's own convolution, in the inputs' dtype -> y, state."""
    if cu_seqlens is not None:
        parts = [
            plain(
                x[:, a:b], weight, bias, activation=activation,
                initial_state=None if initial_state is None else initial_state[n : n + 1],
            )
            for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))
        ]  # fmt: skip
        return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])
    B, T, C = x.shape
    W = weight.shape[1]
    past = x.new_zeros(B, W - 1, C) if initial_state is None else initial_state
    e = torch.cat([past, x], 1)
    bias = None if bias is None else bias.to(x.dtype)
    y = x
    if x.numel():
        y = torch.nn.functional.conv1d(e.transpose(1, 2), weight.to(x.dtype)[:, None], bias, groups=C)
        y = y.transpose(1, 2)
    return torch.nn.functional.silu(y) if activation else y, e[:, T:]


EXACT = ours("reference")
SUBJECT = Subject(draw, make, ours, renamed(plain), EXACT, draw_steps=draw_steps, steps=steps)
