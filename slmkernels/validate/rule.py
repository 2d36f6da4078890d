"""The acceptance rule, for calls whose tensors have names.

An implementation passes if its error against the definition in float64 is at most twice that of PyTorch's own
operations in the same dtype, plus a rounding of the largest value, forward and in every gradient:

    |ours - ref64| <= 2 |torch_same_dtype - ref64| + eps * max(1, max|ref64|)
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native

# A few units in the last place: of the state's type for float64 and float32, of the results' otherwise.
EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

LOW = {"q", "k", "v", "phi_q", "phi_k", "o"}  # in the call's dtype; all else in float32 at least
LOW |= {"x", "w_gate_up", "w_down", "b_gate_up", "b_down", "y", "weight", "bias", "past", "last", "logits"}
# Gradients of the results, beside the arguments of a call.
COTANGENTS = ("do", "dlse", "dstate", "dnormalizer", "dy", "dlast", "dweights", "dprobabilities", "dz")
Tensors = dict[str, Tensor]
Results = tuple[Tensor | None, ...] | Tensors  # o, state, normalizer; or with names of their own


class Deviation(NamedTuple):
    """How far a result is from float64, and how far it may be."""

    error: float
    allowed: float
    problem: str = ""  # what is wrong with it beside its numbers

    @property
    def ratio(self) -> float:
        """The error as a part of what is allowed: above 1 fails; inf for NaN and for what is no number."""
        if self.problem or not self.error < torch.inf:
            return torch.inf
        return self.error / self.allowed if self.error else 0.0

    def __str__(self) -> str:
        return self.problem or f"error {self.error:.2e}, allowed {self.allowed:.2e}"


def is_low(name: str) -> bool:
    """Is this argument, result or gradient in the call's dtype?"""
    return name in LOW or name.removeprefix("d") in LOW


def statistic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is not low: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def rounded(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The tensors as a call in dtype gets them."""
    return {name: x.to(dtype if is_low(name) else statistic(dtype)) for name, x in tensors.items()}


def named(results: Results) -> Tensors:
    """The results by their names, without those that are absent."""
    if not isinstance(results, dict):
        results = dict(zip(("o", "state", "normalizer"), results, strict=True))
    return {name: x for name, x in results.items() if x is not None}


def run(tensors: Tensors, attend: Callable[..., Results], **options) -> Tensors:
    """All results of one implementation and all gradients, from every result."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if name not in COTANGENTS}
    results = named(attend(**leaves, **options))
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
    gradients = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()} | gradients


def error(ours: Tensor, truth: Tensor) -> float:
    """The largest distance, where the truth is finite; NaN if any is."""
    finite = truth.isfinite()
    distance = torch.where(finite, ours.double() - truth, 0.0).abs()
    return distance.max().item() if distance.numel() else 0.0


def size(truth: Tensor) -> float:
    """The largest finite number, at least 1."""
    finite = truth[truth.isfinite()].abs()
    return max(1.0, finite.max().item()) if finite.numel() else 1.0


def deviation(
    name: str, ours: Tensor, same: Tensor, truth: Tensor, dtype: torch.dtype, eps: float | None = None,
) -> Deviation:  # fmt: skip
    """Of one result of a call in dtype. Integers and infinities must be equal. `eps`: the dtype's if None."""
    expected = dtype if is_low(name) else statistic(dtype)
    expected = expected if truth.is_floating_point() else truth.dtype
    if ours.dtype != expected or ours.shape != truth.shape:
        return Deviation(0.0, 0.0, f"is {ours.dtype}{list(ours.shape)}, not {expected}{list(truth.shape)}")
    if not truth.is_floating_point():
        return Deviation(0.0, 0.0, "" if torch.equal(ours, truth) else "differs in some integer")
    if not torch.equal(ours.double()[~truth.isfinite()], truth[~truth.isfinite()]):
        return Deviation(0.0, 0.0, "is not infinite where it must be")
    plain = error(same, truth)
    if not plain < torch.inf:
        return Deviation(0.0, 0.0, "PyTorch's own result is not finite, the rule would say nothing")
    return Deviation(error(ours, truth), 2 * plain + (EPS[dtype] if eps is None else eps) * size(truth))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, also inside the operators, so that an element nobody wrote is seen."""
    previous = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    native_previous = native.host is not None and native.host.get_poisoned()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if native.host is not None:  # the CPU operators allocate on their own
        native.host.set_poisoned(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous, warn_only=warn_only)
        if native.host is not None:
            native.host.set_poisoned(native_previous)
