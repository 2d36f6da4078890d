"""Experts in Triton, backward: the pre-activations' gradients, the weights', the matrices'.

Maths (letters of triton_forward.py), dA' = w_down[e]^T dO_t, the gradient of a slot's a before its weight:

    dweights_s = <dA'_s, a_s> + <dO_t, b_down[e]>      instead of <dO, y_s>: no row of y is kept
    dh_s = weights_s dA'_s act'(h_s)                   dx_t = sum of the token's slots of w_gate_up[e]^T dh_s
    dw_gate_up[e] = sum dh_s x_t^T                     db_gate_up[e] = sum dh_s
    dw_down[e] = sum dO_t (weights_s a_s)^T            db_down[e] = sum weights_s dO_t

Split, one launch each, after the forward's sort: `dh_kernel`, a program per (tile, block of n): gathers dO,
makes a and act' from h, stores dh, weights a, and its part of dweights; `dweights_kernel` adds the parts;
`rows_kernel` and `combine_kernel` of the forward, to dx; `matrix_kernel` twice, a program per (expert, tile
of its matrix) that walks over all of the expert's rows: each sum is one program's, in the order of tokens,
and an expert without rows gets zeros. Segments are sorted by expert for the last two, whose rows are then
those of one segment after the other.

dA' and all sums are float32; dh and weights a are rounded to the inputs' dtype once. Known and left: an
expert with most of the rows keeps few programs busy for long. Splitting its rows needs sums of parts.
"""

import triton
import triton.language as tl

from .triton_forward import (
    activate,
    columns_of_h,
    gate_and_up,
    gather,
    lift,
    rows_times,
    store_columns,
    tile_rows,
    together,
)


@triton.jit(do_not_specialize=["ranges", "E", "slots"])
def dh_kernel(
    do, w, h, weights, dh, a, parts, order, offsets, experts, ranges, E, slots, do_t, w_e, w_d, w_n,
    D: tl.constexpr, N: tl.constexpr, ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dh and weights a of one tile of rows, BLOCK_N of its n columns; parts [blocks, slots] of dweights.
    What is None is not wanted."""
    GATED: tl.constexpr = ACTIVATION < 4
    H: tl.constexpr = 2 * N if GATED else N
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * BLOCK_N
    e, surplus, row, inside, slot, token = tile_rows(tile, order, offsets, experts, ranges, E, TOP_K, BLOCK_M)
    if surplus | (e < 0):
        return
    c = column + tl.arange(0, BLOCK_N)
    w += e * w_e
    da = rows_times(
        do, token * do_t, inside, D, w, w_d, c.to(tl.int64) * w_n, c < N, D, BLOCK_M, BLOCK_N, BLOCK_K
    )
    c, real = columns_of_h(column, N, GATED, INTERLEAVED, BLOCK_N)
    at, mask = row[:, None] * H + c[None, :], inside[:, None] & real[None, :]
    h_tile = tl.load(h + at, mask=mask, other=0.0)
    if GATED:
        gate, up = gate_and_up(h_tile, INTERLEAVED, BLOCK_M, BLOCK_N)
        gated, slope = activate(gate.to(tl.float32), ACTIVATION)
        factor, up_slope = lift(up.to(tl.float32), ACTIVATION)
        value, slope, gated = gated * factor, slope * factor, gated * up_slope
    else:
        value, slope = activate(h_tile.to(tl.float32), ACTIVATION)
    if weights is not None:
        tl.store(parts + block.to(tl.int64) * slots + slot, tl.sum(da * value, 1), mask=inside)
        weight = tl.load(weights + slot, mask=inside, other=0.0)[:, None]
        da, value = da * weight, value * weight
    if a is not None:
        store_columns(a, row * N, inside, column, value, N, BLOCK_N)
    if dh is not None:
        dh_tile = da * slope
        if GATED:
            dh_tile = together(dh_tile, da * gated, INTERLEAVED, BLOCK_M, BLOCK_N)
        tl.store(dh + at, dh_tile.to(dh.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slots", "blocks", "E"])
def dweights_kernel(
    parts, do, bias, indices, dweights, slots, blocks, E, do_t,
    D: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dweights from its parts and the bias; 0 of absent experts."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(indices + slot, mask=slot < slots, other=-1)
    present = (e >= 0) & (e < E)
    acc = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        acc += tl.load(parts + tl.cast(block, tl.int64) * slots + slot, mask=present, other=0.0)
    if bias is not None:
        for d0 in range(0, D, BLOCK_D):
            do_tile = gather(do, slot // TOP_K * do_t, present, d0, 1, D, BLOCK_D).to(tl.float32)
            b_tile = gather(bias, e.to(tl.int64) * D, present, d0, 1, D, BLOCK_D).to(tl.float32)
            acc += tl.sum(do_tile * b_tile, 1)
    tl.store(dweights + slot, acc, mask=slot < slots)


@triton.jit(do_not_specialize=["E"])
def matrix_kernel(
    left, right, weights, out, left_sum, right_sum, order, offsets, cu, right_t, out_e, out_p, out_q,
    P: tl.constexpr, Q: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's [P, Q], sum over its rows of left^T right, right gathered by token; and the
    sums of left [P] and of weights right [Q], unless these are None."""
    blocks_q: tl.constexpr = (Q + BLOCK_Q - 1) // BLOCK_Q
    blocks: tl.constexpr = blocks_q * ((P + BLOCK_P - 1) // BLOCK_P)
    block, e = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    p0, q0 = block // blocks_q * BLOCK_P, block % blocks_q * BLOCK_Q
    first, last = tl.load(offsets + e), tl.load(offsets + e + 1)
    units, last_unit = 0, 1
    if cu is not None:
        units, last_unit = first, last
    acc = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
    sum_p = tl.zeros([BLOCK_P], tl.float32)
    sum_q = tl.zeros([BLOCK_Q], tl.float32)
    for unit in range(units, last_unit):
        if cu is not None:
            segment = tl.load(order + unit)
            first, last = tl.load(cu + segment), tl.load(cu + segment + 1)
        for r0 in range(first, last, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            inside = r < last
            row = r.to(tl.int64)
            slot = row
            if cu is None:
                slot = tl.load(order + r, mask=inside, other=0).to(tl.int64)
            left_tile = gather(left, row * P, inside, p0, 1, P, BLOCK_P)
            right_tile = gather(right, slot // TOP_K * right_t, inside, q0, 1, Q, BLOCK_Q)
            acc = tl.dot(tl.trans(left_tile), right_tile, acc, input_precision="ieee")
            if left_sum is not None:
                sum_p += tl.sum(left_tile.to(tl.float32), 0)
            if right_sum is not None:
                scaled = right_tile.to(tl.float32)
                if weights is not None:
                    scaled *= tl.load(weights + slot, mask=inside, other=0.0)[:, None]
                sum_q += tl.sum(scaled, 0)
    p, q = p0 + tl.arange(0, BLOCK_P), q0 + tl.arange(0, BLOCK_Q)
    out += e * out_e + p.to(tl.int64)[:, None] * out_p + q.to(tl.int64)[None, :] * out_q
    tl.store(out, acc.to(out.dtype.element_ty), mask=(p < P)[:, None] & (q < Q)[None, :])
    if left_sum is not None:
        tl.store(left_sum + e * P + p, sum_p.to(left_sum.dtype.element_ty), mask=(p < P) & (q0 == 0))
    if right_sum is not None:
        tl.store(right_sum + e * Q + q, sum_q.to(right_sum.dtype.element_ty), mask=(q < Q) & (p0 == 0))
