"""Inputs that the tests of `expert_mlp` and `segment_mlp` share, and both functions as `rule.run` calls them.

PyTorch's own computation is the reference in the call's dtype: its linear layers, expert after expert.
"""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from rule import TIERS, Results, Tensors, compare, rounded, run
from torch import Tensor

from slmkernels import expert_mlp, segment_mlp
from slmkernels.ops.experts.reference import ACTIVATIONS, GATED

MATRICES = ("w_gate_up", "w_down", "b_gate_up", "b_down")
LEAVES = ("x", "weights", *MATRICES)
LAYOUTS = ("concatenated", "interleaved")
FORMS = [
    (name, layout) for name in ACTIVATIONS for layout in LAYOUTS if name in GATED or layout == LAYOUTS[0]
]
every_form = pytest.mark.parametrize(("activation", "layout"), FORMS)
every_tier = pytest.mark.parametrize("tier", TIERS)
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


REFERENCE = public("reference")


@functools.lru_cache(maxsize=64)
def expected(dtype: torch.dtype, **case) -> tuple[Tensors, dict, Tensors, Tensors]:
    """A case in dtype: its tensors, its options, PyTorch's own results, the exact ones."""
    tensors, options = make(**case)
    tensors = rounded(tensors, dtype)
    truth = run({name: x.double() for name, x in tensors.items()}, REFERENCE, **options)
    same = truth if dtype == torch.float64 else run(tensors, REFERENCE, **options)
    return tensors, options, same, truth


FEW = 100  # numbers: the largest error of fewer is a matter of luck


def luck(dtype: torch.dtype, *, seed=0, draws=4, **case) -> dict[str, float]:
    """What to allow beside 2 |torch_same_dtype - ref64|, so that this is PyTorch's largest error of some
    draws of the same sizes, for results of few numbers."""
    draws = [expected(dtype, seed=seed + i, **case)[2:] for i in range(draws if dtype.itemsize == 2 else 1)]
    few = [name for name, x in draws[0][1].items() if 0 < x.numel() < FEW]
    error = {name: [(same[name] - x[name]).abs().max().item() for same, x in draws] for name in few}
    return {name: 2 * (max(x) - x[0]) for name, x in error.items()}


def check(dtype: torch.dtype, mlp: Callable[..., Results], **case) -> None:
    """Assert the acceptance rule of one implementation for y and every gradient."""
    tensors, options, same, truth = expected(dtype, **case)
    compare(run(tensors, mlp, **options), same, truth, dtype, luck(dtype, **case))


def dense(x, w_gate_up, w_down, b_gate_up=None, b_down=None, *, activation, layout) -> Tensor:
    """One expert, whose matrices are two-dimensional, of all tokens: an MLP in PyTorch's own layers."""
    functional = torch.nn.functional
    act = {
        "swiglu": functional.silu,
        "relu2": lambda h: functional.relu(h) ** 2,
    }.get(activation, lambda h: functional.gelu(h, approximate="tanh" if "tanh" in activation else "none"))
    h = functional.linear(x, w_gate_up, b_gate_up)
    if activation in GATED:
        h = h.unflatten(-1, (-1, 2)).mT.flatten(-2) if layout == "interleaved" else h
        gate, up = h.chunk(2, -1)
        return functional.linear(act(gate) * up, w_down, b_down)
    return functional.linear(act(h), w_down, b_down)
