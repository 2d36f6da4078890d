"""The same numbers elsewhere in memory: what a kernel gets from views, wide projections and sums."""

import torch
from torch import Tensor

from .rule import COTANGENTS, Tensors, is_low

LAYOUTS = ("dense", "dense", "transposed", "slice", "every other", "equal gradients")


def transposed(x: Tensor) -> Tensor:
    """Its first dimensions but one in the other order in memory, as `[B, H, T, D]` seen as `[B, T, H, D]`."""
    return x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.ndim > 2 else x.mT.contiguous().mT


def padded(x: Tensor, step: int) -> Tensor:
    """A part of wider rows, the rest of which is NaN: from its third element on, or every other one."""
    wide = x.new_full((*x.shape[:-1], step * x.shape[-1] + 5), torch.nan)
    view = wide[..., 3 : 3 + step * x.shape[-1] : step]
    return view.copy_(x)


def equal_gradients(tensors: Tensors) -> Tensors:
    """All gradients of the results 1, as a sum's are."""
    return {name: torch.ones_like(x) if name in COTANGENTS else x for name, x in tensors.items()}


def laid_out(tensors: Tensors, layout: str) -> Tensors:
    """Copies of the tensors of a call in one of `LAYOUTS`; equal gradients are one number, expanded."""

    def lay(name, x):
        if layout == "equal gradients":
            return x.new_ones(()).expand(x.shape) if name in COTANGENTS else x.clone()
        if layout == "dense" or x.ndim < 2 or not is_low(name):
            return x.clone()
        return transposed(x) if layout == "transposed" else padded(x, 1 if layout == "slice" else 2)

    return {name: lay(name, x) for name, x in tensors.items()}
