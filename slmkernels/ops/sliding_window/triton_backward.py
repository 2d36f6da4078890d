"""Sliding-window attention in Triton, backward: three launches, no atomics, no float32 copy of dq in memory.

Maths, with P = 2^(x u - lse log2 e) recomputed block by block (FlashAttention-2, section 3.1.2):

    delta_i = dO_i . O_i - dlse_i        dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)
    dQ = scale dS K                      dK = scale dS^T Q
    with a softcap dS gains the factor 1 - tanh^2; a sink gets -sum over rows of 2^(sink - lse) delta

Split: `delta_kernel` reads dO and O once, one program per 64 rows of a head, and leaves the sink's gradient
as one partial sum a program. `dq_kernel` has a program per (query tile, query head) and walks over keys,
`dkv_kernel` one per (key tile, key-value head) and walks over the queries of all G heads of its group, so
that each output is summed by one program in a fixed order. That is 7 matrix products a block where a single
pass does 5. The single pass must add its dQ into a zeroed float32 buffer by atomics, or by waiting for its
turn, and convert it afterwards; under a window a query meets only W / BLOCK + 1 key tiles, so that this
traffic is a large part of the time, and a fixed order would cost waiting. Considered: one launch whose
programs do either half (as FlexAttention); it saves a launch and fills the tail, but both halves then live
with the registers and the tile of the hungrier one.

Rows past the end and rows that see nothing have lse = +inf here, so that P = 0 without a mask. P, not the
score, is masked: for any sign of the scale a hidden score may overflow 2^x, and the select throws that
away.
"""

import triton
import triton.language as tl

from ...triton_tiles import load_rows, store_rows
from .triton_forward import crosses_edge, locate, overlap, tanh, visible


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    o, do, lse, dlse, sinks, delta, dsinks, T, do_b, do_t, do_h,
    HQ: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, T] and, where there are sinks, their partial gradients [Hq, B, tiles]."""
    tiles = tl.cdiv(T, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (head // HQ).to(tl.int64), (head % HQ).to(tl.int64)
    m0 = tile * BLOCK_M
    o_tile = load_rows(o + (b * T * HQ + h) * DV, m0, T, HQ * DV, BLOCK_M, DV, DV_PAD).to(tl.float32)
    do_tile = load_rows(do + b * do_b + h * do_h, m0, T, do_t, BLOCK_M, DV, DV_PAD).to(tl.float32)
    rows = m0 + tl.arange(0, BLOCK_M)
    at = (b * HQ + h) * T + rows
    total = tl.sum(o_tile * do_tile, 1)
    if dlse is not None:
        total -= tl.load(dlse + at, mask=rows < T, other=0.0)
    row_lse = tl.load(lse + at, mask=rows < T, other=float("-inf"))
    total = tl.where(row_lse == float("-inf"), 0.0, total)  # whatever dlse holds there
    tl.store(delta + at, total, mask=rows < T)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32)
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
        part = tl.exp2((sink - row_lse) * 1.4426950408889634) * total
        batches = tl.num_programs(0) // (tiles * HQ)
        tl.store(dsinks + (h * batches + b) * tiles + tile, -tl.sum(part, 0))


@triton.jit
def load_statistics(lse, delta, rows, T):
    """lse in log2 units, +inf for rows outside or empty (P becomes 0), and delta."""
    row_lse = tl.load(lse + rows, mask=rows < T, other=float("-inf")) * 1.4426950408889634
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    return row_lse, tl.load(delta + rows, mask=rows < T, other=0.0)


@triton.jit(do_not_specialize=["T", "S", "N", "left", "right"])
def dq_kernel(
    q, k, v, do, lse, delta, dq, cu_q, cu_k, T, S, N, left, right, scale, inner, unit,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, one head."""
    HQ: tl.constexpr = H * G
    tiles = tl.cdiv(T, BLOCK_M) if cu_q is None else T // BLOCK_M + N
    head = tl.program_id(0) // tiles
    b, h = (head // HQ).to(tl.int64), (head % HQ).to(tl.int64)
    m0, start_q, T_n, start_k, S_n = locate(tl.program_id(0) % tiles, cu_q, cu_k, T, S, N, BLOCK_M)
    i0 = m0 + S_n - T_n
    low, high = overlap(i0, left, right, S_n, BLOCK_M, BLOCK_N)
    if cu_q is not None:
        high = tl.where(m0 < T_n, high, low)  # surplus tile

    k += b * k_b + h // G * k_h + start_k * k_t
    v += b * v_b + h // G * v_h + start_k * v_t
    rows = (b * HQ + h) * T + start_q
    row_lse, row_delta = load_statistics(lse + rows, delta + rows, m0 + tl.arange(0, BLOCK_M), T_n)
    q_tile = load_rows(q + b * q_b + h * q_h + start_q * q_t, m0, T_n, q_t, BLOCK_M, D, D_PAD)
    do_tile = load_rows(do + b * do_b + h * do_h + start_q * do_t, m0, T_n, do_t, BLOCK_M, DV, DV_PAD)
    i = i0 + tl.arange(0, BLOCK_M)[:, None]
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for n0 in range(low, high, BLOCK_N):
        k_tile = load_rows(k, n0, S_n, k_t, BLOCK_N, D, D_PAD)
        v_tile = load_rows(v, n0, S_n, v_t, BLOCK_N, DV, DV_PAD)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if SOFTCAP:
            x = tanh(x * inner)
        p = tl.exp2(x * unit - row_lse[:, None])
        if crosses_edge(i0, n0, left, right, S_n, BLOCK_M, BLOCK_N):
            p = tl.where(visible(i, n0 + tl.arange(0, BLOCK_N)[None, :], left, right, S_n), p, 0.0)
        if SOFTCAP:
            p *= 1.0 - x * x
        ds = p * (tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee") - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    dq += (b * T + start_q) * (HQ * D) + h * D
    store_rows(dq, acc * scale, m0, T_n, HQ * D, BLOCK_M, D, D_PAD)


@triton.jit(do_not_specialize=["T", "S", "N", "left", "right"])
def dkv_kernel(
    q, k, v, do, lse, delta, dk, dv, cu_q, cu_k, T, S, N, left, right, scale, inner, unit,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, one key-value head; blocks are transposed, [keys, queries]."""
    tiles = tl.cdiv(S, BLOCK_N) if cu_k is None else S // BLOCK_N + N
    head = tl.program_id(0) // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    n0, start_k, S_n, start_q, T_n = locate(tl.program_id(0) % tiles, cu_k, cu_q, S, T, N, BLOCK_N)
    shift = S_n - T_n  # query t stands at position t + shift
    low, high = overlap(n0 - shift, right, left, T_n, BLOCK_N, BLOCK_M)
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
    if cu_k is not None:
        blocks = tl.where(n0 < S_n, blocks, 0)  # surplus tile

    q += b * q_b + h * G * q_h + start_q * q_t
    do += b * do_b + h * G * do_h + start_q * do_t
    rows = (b * H + h) * G * T + start_q
    k_tile = load_rows(k + b * k_b + h * k_h + start_k * k_t, n0, S_n, k_t, BLOCK_N, D, D_PAD)
    v_tile = load_rows(v + b * v_b + h * v_h + start_k * v_t, n0, S_n, v_t, BLOCK_N, DV, DV_PAD)
    j = n0 + tl.arange(0, BLOCK_N)[:, None]
    dk_acc = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, DV_PAD], tl.float32)
    for block in range(G * blocks):  # (head of the group, block) in one loop: loads run ahead across heads
        g = tl.cast(block // blocks, tl.int64)
        m0 = low + block % blocks * BLOCK_M
        q_tile = load_rows(q + g * q_h, m0, T_n, q_t, BLOCK_M, D, D_PAD)
        do_tile = load_rows(do + g * do_h, m0, T_n, do_t, BLOCK_M, DV, DV_PAD)
        at = rows + g * T
        row_lse, row_delta = load_statistics(lse + at, delta + at, m0 + tl.arange(0, BLOCK_M), T_n)
        x = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [keys, queries]
        if SOFTCAP:
            x = tanh(x * inner)
        p = tl.exp2(x * unit - row_lse[None, :])
        if crosses_edge(m0 + shift, n0, left, right, S_n, BLOCK_M, BLOCK_N):
            i = m0 + shift + tl.arange(0, BLOCK_M)[None, :]
            p = tl.where(visible(i, j, left, right, S_n), p, 0.0)
        dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
        if SOFTCAP:
            p *= 1.0 - x * x  # here, so that x need not live until dP is there
        ds = p * (tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee") - row_delta[None, :])
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    dk += (b * S + start_k) * (H * D) + h * D
    store_rows(dk, dk_acc * scale, n0, S_n, H * D, BLOCK_N, D, D_PAD)
    dv += (b * S + start_k) * (H * DV) + h * DV
    store_rows(dv, dv_acc, n0, S_n, H * DV, BLOCK_N, DV, DV_PAD)
