"""What the tests of `expert_mlp` and `segment_mlp` share: the cases of `slmkernels.validate`, and the rule.

PyTorch's own computation is the reference in the call's dtype: its linear layers, expert after expert.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from rule import TIERS, Results, Tensors, compare, rounded, run
from torch import Tensor

from slmkernels.ops.experts.reference import GATED
from slmkernels.validate.experts import FORMS, make, public

MATRICES = ("w_gate_up", "w_down", "b_gate_up", "b_down")
LEAVES = ("x", "weights", *MATRICES)
every_form = pytest.mark.parametrize(("activation", "layout"), FORMS)
every_tier = pytest.mark.parametrize("tier", TIERS)

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


def check_limits(dtype: torch.dtype, mlp: Callable[..., Results]) -> None:
    """Assert "swigluoai" of gates and ups below, at and past their limits, and slopes of 0 only past them."""
    values = torch.tensor([-1e3, -7.5, -7.0, -6.5, 0.0, 6.5, 7.0, 7.5, 1e3], dtype=dtype)
    x = torch.cartesian_prod(values, values)  # a row: gate, up
    first = torch.eye(2, dtype=dtype)[:, :1]  # of two channels of y and dy
    tensors = {
        "x": x,
        "weights": torch.ones(len(x), 1),
        "w_gate_up": torch.eye(2)[None],
        "w_down": first[None],
    }
    tensors["dy"] = first.T.expand(len(x), 2)
    options = {"indices": torch.zeros(len(x), 1).int(), "activation": "swigluoai", "layout": "interleaved"}
    ours = run(rounded(tensors, dtype), mlp, **options)
    exact = x.double().requires_grad_()
    gate, up = exact[:, 0].clamp(max=7.0), exact[:, 1].clamp(-7.0, 7.0)
    y = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    (dx,) = torch.autograd.grad(y.sum(), exact)
    tolerance = dict.fromkeys(("rtol", "atol"), 16 * torch.finfo(dtype).eps)
    torch.testing.assert_close(ours["y"][:, 0].double(), y.detach(), **tolerance)
    torch.testing.assert_close(ours["dx"].double(), dx, **tolerance)
    past = torch.stack([x[:, 0] > 7, x[:, 1].abs() > 7], 1)
    assert not ours["dx"][past].any()


def dense(x, w_gate_up, w_down, b_gate_up=None, b_down=None, *, activation, layout) -> Tensor:
    """One expert, whose matrices are two-dimensional, of all tokens: an MLP in PyTorch's own layers."""
    functional = torch.nn.functional
    act = {
        "swiglu": functional.silu,
        "relu2": lambda h: functional.relu(h) ** 2,
        "swigluoai": lambda h: h * torch.sigmoid(1.702 * h),
    }.get(activation, lambda h: functional.gelu(h, approximate="tanh" if "tanh" in activation else "none"))
    h = functional.linear(x, w_gate_up, b_gate_up)
    if activation in GATED:
        h = h.unflatten(-1, (-1, 2)).mT.flatten(-2) if layout == "interleaved" else h
        gate, up = h.chunk(2, -1)
        if activation == "swigluoai":
            gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        return functional.linear(act(gate) * up, w_down, b_down)
    return functional.linear(act(h), w_down, b_down)
