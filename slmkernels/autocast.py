"""What autocast means for an operation that computes in the dtypes it is given."""

import contextlib

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Does autocast act on x's device?"""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor):
    """A context in which PyTorch's operations compute in the dtypes they are given, as kernels do."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()
