"""The acceptance rule of the operations' tests, for calls whose tensors have names.

An implementation passes if its error against the definition in float64 is at most twice that of PyTorch's own
operations in the same dtype, plus a rounding of the largest value, forward and in every gradient:

    |ours - ref64| <= 2 |torch_same_dtype - ref64| + eps * max(1, max|ref64|)
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from slmkernels import native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# A few units in the last place: of the state's type for float64 and float32, of the results' otherwise.
EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TIERS = native.host.isa_supported() if native.host else []

needs_native = pytest.mark.skipif(not native.HAS_CPU, reason=str(native.REASONS.get("_C_cpu")))
every_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

LOW = {"q", "k", "v", "phi_q", "phi_k", "o"}  # in the call's dtype; all else in float32 at least
LOW |= {"x", "w_gate_up", "w_down", "b_gate_up", "b_down", "y"}
COTANGENTS = ("do", "dstate", "dnormalizer", "dy")  # of the results, beside the arguments of a call
Tensors = dict[str, Tensor]
Results = tuple[Tensor, Tensor, Tensor | None] | Tensors  # o, state, normalizer; or with names of their own


@contextlib.contextmanager
def on_tier(tier: str) -> Iterator[None]:
    """Run the native kernels on an instruction set."""
    best = native.host.get_isa()
    native.host.set_isa(tier)
    try:
        yield
    finally:
        native.host.set_isa(best)


@contextlib.contextmanager
def on_threads(n: int) -> Iterator[None]:
    """Run with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_low(name: str) -> bool:
    """Is this argument, result or gradient in the call's dtype?"""
    return name in LOW or name.removeprefix("d") in LOW


def rounded(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The tensors as a call in dtype gets them."""
    high = torch.promote_types(dtype, torch.float32)
    return {name: x.to(dtype if is_low(name) else high) for name, x in tensors.items()}


def run(tensors: Tensors, attend: Callable[..., Results], **options) -> Tensors:
    """All results of one implementation and all gradients, from every result."""
    leaves = {
        name: x.detach().clone().requires_grad_() for name, x in tensors.items() if name not in COTANGENTS
    }
    results = attend(**leaves, **options)
    if not isinstance(results, dict):
        results = dict(zip(("o", "state", "normalizer"), results, strict=True))
    results = {name: x for name, x in results.items() if x is not None}
    linked = [name for name, x in results.items() if x.requires_grad]
    gradients = [torch.zeros_like(x) for x in leaves.values()]
    if linked:
        gradients = torch.autograd.grad(
            [results[name] for name in linked],
            list(leaves.values()),
            [tensors[f"d{name}"] for name in linked],
            allow_unused=True,
            materialize_grads=True,
        )
    named = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()} | named


def compare(
    ours: Tensors, same: Tensors, truth: Tensors, dtype: torch.dtype, slack: dict[str, float] | None = None
) -> None:
    """Assert the acceptance rule for every result; `slack` is allowed beside it."""
    assert ours.keys() == truth.keys()
    for name, x in truth.items():
        expected = dtype if is_low(name) else torch.promote_types(dtype, torch.float32)
        assert ours[name].dtype == expected, name
        assert ours[name].shape == x.shape, name
        if x.numel() == 0:
            continue
        plain = (same[name].double() - x).abs().max().item()
        assert plain < torch.inf, f"{name}: PyTorch's own result is not finite, the rule would say nothing"
        error = (ours[name].double() - x).abs().max().item()
        allowed = 2 * plain + EPS[dtype] * max(1.0, x.abs().max().item()) + (slack or {}).get(name, 0.0)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def same_in_float64(ours: Tensors, expected: Tensors, names=None) -> None:
    """Equal up to the last digits of float64; `names`: only these results."""
    for name in names or expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-11, atol=1e-11, msg=name)


def same_bits(ours: Tensors, expected: Tensors) -> None:
    """Equal in every result of `expected`, bit for bit."""
    for name, x in expected.items():
        assert torch.equal(ours[name], x), name
