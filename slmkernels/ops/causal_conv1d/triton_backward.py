"""Causal convolution in Triton: the backward kernel.

    dz_t = dy_t, or dy_t s_t (1 + z_t (1 - s_t)), s = 1 / (1 + exp(-z)), z recomputed
    de_u = sum_w weight[w] dz_{u-w}  (+ d(state)_{u-T} for u >= T),  u < W-1: the initial state's rows
    d(weight[w]) = sum_t dz_t e_{t+w}      d(bias) = sum_t dz_t

Layout and the grid over packed sequences as in triton_forward.py, with W-1 rows more a sequence: a tile is
BLOCK_T rows u of de. d(weight) and d(bias) of a tile go to [tiles, W+1, C] in float32, which the launcher
sums in fixed order: no atomics, the same bits from run to run.

A tile needs dz at W shifts and computes it W times over, W (W+1) loads an element that all but hit L1, and W
sigmoids: with silu and W = 4 some 80 instructions an element, at float16 on an H100 about 1.5 times what the
6 bytes an element would take from memory by its data sheet (estimated, not measured; no GPU at hand). Walking
down the tokens row by row would compute each dz once, but a Triton program then has one row in flight.
"""

import triton
import triton.language as tl

from .triton_forward import load_tap, load_tokens, locate, pre_activation, sigmoid


@triton.jit
def gradient_of_z(
    dy, x, initial, weight, bias, t, length, c, x_t, dy_t, C, W: tl.constexpr, SILU: tl.constexpr
):
    """dz of tokens t (a column), zero outside the sequence."""
    inside = (t >= 0) & (t < length) & (c < C)
    dz = tl.load(dy + t.to(tl.int64) * dy_t + c, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = pre_activation(x, initial, weight, bias, t, length, c, x_t, C, W)
        s = sigmoid(z)
        dz = tl.where(inside, dz * (s * (1.0 + z * (1.0 - s))), 0.0)
    return dz


@triton.jit(do_not_specialize=["T", "N"])
def backward_kernel(
    dy, dstate, x, weight, bias, initial, dx, dinitial, sums, cu, T, N, x_b, x_t, dy_b, dy_t, C,
    W: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """de of one tile of rows, into dx and dinitial, and the tile's part of d(weight) and d(bias)."""
    columns = tl.cdiv(C, BLOCK_C)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    n, first, start, length = locate(tile, cu, T, N, W - 1, BLOCK_T)
    b = n.to(tl.int64) if cu is None else start * 0
    x += b * x_b + start * x_t
    dy += b * dy_b + start * dy_t
    dx += (b * T + start) * C
    past = n.to(tl.int64) * (W - 1) * C
    if initial is not None:
        initial += past
    u = first + tl.arange(0, BLOCK_T)[:, None]
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]

    dz = gradient_of_z(dy, x, initial, weight, bias, u, length, c, x_t, dy_t, C, W, SILU)
    row = sums + tl.cast(tile, tl.int64) * ((W + 1) * C)
    cs = column * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(row + W * C + cs, tl.sum(dz, 0), mask=cs < C)
    for w in tl.static_range(W):
        e = load_tokens(x, initial, u + (w - (W - 1)), length, c, x_t, C, W)
        tl.store(row + w * C + cs, tl.sum(dz * e, 0), mask=cs < C)

    de = load_tap(weight, c, 0, C, W) * dz
    for w in tl.static_range(1, W):
        dz = gradient_of_z(dy, x, initial, weight, bias, u - w, length, c, x_t, dy_t, C, W, SILU)
        de += load_tap(weight, c, w, C, W) * dz
    if dstate is not None:
        j = u - length
        given = (j >= 0) & (j < W - 1) & (c < C)
        de += tl.load(dstate + past + j.to(tl.int64) * C + c, mask=given, other=0.0).to(tl.float32)
    t = u - (W - 1)
    tl.store(dx + t.to(tl.int64) * C + c, de.to(dx.dtype.element_ty), mask=(t >= 0) & (t < length) & (c < C))
    if dinitial is not None:
        rows = dinitial + past + u.to(tl.int64) * C + c
        tl.store(rows, de.to(dinitial.dtype.element_ty), mask=(t < 0) & (c < C))
