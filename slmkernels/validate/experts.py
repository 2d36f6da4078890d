"""Random calls of `expert_mlp` and `segment_mlp`.

PyTorch's own computation is the reference in the call's dtype: its linear layers, expert after expert.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.experts.function import LAYOUTS, expert_mlp, segment_mlp
from ..ops.experts.reference import ACTIVATIONS, GATED, LIMIT
from .draws import Draws
from .rule import Results, Tensors
from .subject import Options, Subject

FORMS = [
    (name, layout) for name in ACTIVATIONS for layout in LAYOUTS if name in GATED or layout == LAYOUTS[0]
]
ROUTINGS = ("any", "distinct", "one", "even", "none")
ABSENT = (-1, 2**31 - 1, -(2**31))  # and E


def choose(routing: str, T: int, k: int, E: int, generator: torch.Generator) -> Tensor:
    """Indices [T, k]. "any": with repeats; "distinct": without; "one": all the last expert; "even": no odd
    expert; "none": all absent."""
    if routing == "distinct":
        return torch.rand(T, E, generator=generator).argsort(1)[:, :k].int()
    if routing in ("one", "none"):
        return torch.full((T, k), E - 1 if routing == "one" else -1, dtype=torch.int32)
    indices = torch.randint(E, (T, k), generator=generator, dtype=torch.int32)
    return indices if routing == "any" else indices // 2 * 2


def make(
    *, seed=0, T=50, d=32, n=24, E=4, k=2, routing="any", absent=0.0, lengths=None, activation="swiglu",
    layout="concatenated", biases=True, transposed=False, gates=1.0,
) -> tuple[Tensors, dict]:  # fmt: skip
    """Float64 tensors of one call (`dy`: the gradient of y), and its options.

    `lengths`: of segments, the call is then one of `segment_mlp`. `absent`: the part of the indices that is
    outside. `transposed`: the matrices are views of [E, d, 2n] and [E, n, d]. `gates`: factor of w_gate_up.
    Biases of a clamped activation put units within its limits or far past them: at a limit the slope jumps.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    T, k = (T, k) if lengths is None else (sum(lengths), 1)
    H, rows = (2 if activation in GATED else 1) * n, T if lengths is None else len(lengths)
    tensors = {"x": normal(T, d), "weights": normal(T, k)}
    tensors["w_gate_up"] = gates * d**-0.5 * normal(E, H, d)
    tensors["w_down"] = n**-0.5 * normal(E, d, n)
    if biases:
        tensors |= {"b_gate_up": normal(E, H), "b_down": normal(E, d)}
        if activation == "swigluoai":
            tensors["b_gate_up"] += 2 * LIMIT * torch.randint(-1, 2, (E, H), generator=generator)
    tensors["dy"] = normal(T, d)
    if transposed:
        tensors |= {name: tensors[name].mT.contiguous().mT for name in ("w_gate_up", "w_down")}
    indices = choose(routing, rows, k, E, generator)
    outside = torch.tensor([*ABSENT, E], dtype=torch.int32)[torch.randint(4, (rows, k), generator=generator)]
    indices = torch.where(torch.rand(rows, k, generator=generator) < absent, outside, indices)
    options = {"activation": activation, "layout": layout}
    if lengths is None:
        return tensors, options | {"indices": indices}
    del tensors["weights"]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return tensors, options | {"cu_seqlens": cu_seqlens, "expert_of_segment": indices[:, 0]}


def public(backend: str | None) -> Callable[..., Results]:
    """`expert_mlp`, or `segment_mlp` where the options are of segments, on a backend."""

    def mlp(
        x, w_gate_up, w_down, weights=None, indices=None, cu_seqlens=None, expert_of_segment=None, **rest
    ):
        if cu_seqlens is not None:
            y = segment_mlp(x, cu_seqlens, expert_of_segment, w_gate_up, w_down, **rest, backend=backend)
        else:
            y = expert_mlp(x, indices, weights, w_gate_up, w_down, **rest, backend=backend)
        return {"y": y}

    return mlp


def draw(d: Draws, segments: bool) -> Options:
    """Sizes and options of a random call of either function."""
    activation, layout = d.choice(FORMS)
    E = d.choice((1, 2, 3, 4, 8, 16, 33))
    sizes = {"d": d.size(), "n": d.size(), "E": E, "routing": d.choice(ROUTINGS[:4] * 3 + ROUTINGS)}
    options = {"activation": activation, "layout": layout, "biases": d.flag(), "transposed": d.flag(25)}
    sizes |= {"absent": d.choice((0.0, 0.0, 0.2))}
    if segments:
        return sizes | options | {"lengths": d.lengths()}
    return sizes | options | {"T": d.length(), "k": d.integer(1, min(E, 6))}


def subject(segments: bool) -> Subject:
    """Of `segment_mlp`, or of `expert_mlp`."""
    reference = public("reference")
    return Subject(functools.partial(draw, segments=segments), make, public, reference, reference)


EXPERT_MLP, SEGMENT_MLP = subject(False), subject(True)
