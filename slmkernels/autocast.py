"""What autocast means for an operation that computes in the dtypes it is given."""

import contextlib

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Does autocast act on x's device?"""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def as_autocast_wants(*tensors: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The tensors in `dtype` where autocast acts on the first one's device; if None in autocast's own dtype,
    and float64 stays."""
    x = tensors[0]
    if not autocasts(x):
        return tensors
    if dtype is not None:  # of a cache, which says what is computed in
        return tuple(y.to(dtype) for y in tensors)
    if x.dtype == torch.float64:
        return tensors
    low = torch.get_autocast_dtype(x.device.type)
    return tuple(y if y.dtype == torch.float64 else y.to(low) for y in tensors)


def without_autocast(x: Tensor):
    """A context in which PyTorch's operations compute in the dtypes they are given, as kernels do."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()
