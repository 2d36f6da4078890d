"""Tiles of rows between memory and registers, for the Triton kernels of every operation."""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, first, limit, stride, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows first..first+ROWS-1 of a matrix [limit, D] as a tile [ROWS, D_PAD]; zero outside."""
    r, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    inside = (first + r < limit)[:, None]
    if D != D_PAD:
        inside = inside & (d < D)[None, :]
    base += tl.cast(first, tl.int64) * stride
    return tl.load(base + r[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, tile, first, limit, stride, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """The inverse of `load_rows`; rounds to the matrix's dtype."""
    r, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    inside = (first + r < limit)[:, None]
    if D != D_PAD:
        inside = inside & (d < D)[None, :]
    base += tl.cast(first, tl.int64) * stride
    tl.store(base + r[:, None] * stride + d[None, :], tile.to(base.dtype.element_ty), mask=inside)
