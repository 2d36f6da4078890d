"""Sliding-window attention in Triton: what the kernels share, the forward kernel and the decode step.

Maths, one query row of one head, in units of log2 so that the GPU's exp2 does the work (x = q.k, u = scale *
log2(e); with a softcap x = tanh(q.k * scale / softcap) and u = softcap * log2(e)):

    m = max over visible j of x_j u      p_j = 2^(x_j u - m)      denom = sum p_j      o = sum p_j v_j / denom
    lse = (m + log2 denom) / log2 e      a sink joins denom and lse after the last key

m, denom and o grow block by block over the keys (online softmax: Milakov & Gimelshein 2018; the outer loop
over queries and the late division: Dao 2023, FlashAttention-2, section 3.1). A sink joins at the end, not
at the start: a large one would push p below the smallest float16.

Layout: tensors [B, T, H, D] with any strides but the last, which is 1; lse [B, Hq, T] float32, contiguous.
Head sizes are padded to a power of two inside the tile. Positions inside a sequence are int32; whatever
multiplies a stride is int64.

Split: one program per (query tile, query head), tiles fastest, so that neighbours read the same keys from
L2. A program visits only key blocks that meet its band, and masks only those that the band's edges cross,
by a uniform branch inside the one pipelined loop. Considered: three loops (left edge, interior, right edge)
as in FlashAttention-3. Each loop fills its own load pipeline, so at W = 256, with 1 + 3 + 1 blocks, nothing
would be left to overlap, and the loop's code would stand there three times.

Packed sequences: tile t of the grid belongs to the sequence n with cu[n] // BLOCK + n <= t < the same of
n+1. Those ranges rise strictly and are long enough for every sequence, so that the grid, total // BLOCK +
N, follows from shapes alone (no host synchronisation) and a program finds its n by bisection. Surplus tiles
do nothing.
"""

import triton
import triton.language as tl

from ...triton_tiles import accumulate, load_rows, store_rows

# ---- what both directions share ----------------------------------------------------------------------------


@triton.jit
def locate(tile, cu, cu_other, length, length_other, N, BLOCK: tl.constexpr):
    """Tile number -> first row in its sequence; the sequence's start and length, on either side."""
    if cu is None:
        first, start = tile * BLOCK, tile.to(tl.int64) * 0
        other = start
    else:
        low, high = tile * 0, tile * 0 + N
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu + middle) // BLOCK + middle <= tile
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        start, other = tl.load(cu + low), tl.load(cu_other + low)
        length = tl.load(cu + low + 1) - start
        length_other = tl.load(cu_other + low + 1) - other
        first = (tile - (start // BLOCK + low)) * BLOCK
    return first, start.to(tl.int64), length, other.to(tl.int64), length_other


@triton.jit
def overlap(first, before, after, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Positions on the other side that rows r = first.. meet: r-before..r+after for any of them, in 0..limit.

    Queries meet keys with (before, after) = (left, right), keys meet queries with (right, left).
    """
    low = tl.maximum(first - before, 0) // BLOCK * BLOCK
    return low, tl.minimum(first + ROWS + after, limit)


@triton.jit
def crosses_edge(i0, j0, left, right, S, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether some pair of the block (query positions i0.., keys j0..) is hidden."""
    return (j0 < i0 + ROWS - 1 - left) | (j0 + COLS - 1 > i0 + right) | (j0 + COLS > S)


@triton.jit
def visible(i, j, left, right, S):
    """The band itself, for positions that broadcast."""
    return (j >= i - left) & (j <= i + right) & (j < S)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy: 1 - 2 / (1 + e^2x) loses its digits near 0, where the series takes over."""
    far = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.885390081777927))  # 2 log2(e); exp2 may be inf or 0, both are fine
    y = x * x
    series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    return tl.where(y < 0.0625, x * series, far)


# ---- forward -----------------------------------------------------------------------------------------------


@triton.jit
def finish(acc, m, denom, sink):
    """Join the sink (log2 units, -inf for none) and divide -> o, lse."""
    m_all = tl.maximum(m, sink)
    shift = tl.where(m_all == float("-inf"), 0.0, m_all)
    keep = tl.exp2(m - shift)
    denom_all = denom * keep + tl.exp2(sink - shift)
    o = acc * (keep / tl.where(denom_all == 0.0, 1.0, denom_all))[:, None]
    lse = (m_all + tl.log2(tl.where(denom_all == 0.0, 1.0, denom_all))) * 0.6931471805599453
    return o, lse


@triton.jit(do_not_specialize=["T", "S", "N", "left", "right"])
def forward_kernel(
    q, k, v, sinks, o, lse, cu_q, cu_k, T, S, N, left, right, inner, unit,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of queries, one head."""
    HQ: tl.constexpr = H * G
    tiles = tl.cdiv(T, BLOCK_M) if cu_q is None else T // BLOCK_M + N
    head = tl.program_id(0) // tiles
    b, h = (head // HQ).to(tl.int64), (head % HQ).to(tl.int64)
    m0, start_q, T_n, start_k, S_n = locate(tl.program_id(0) % tiles, cu_q, cu_k, T, S, N, BLOCK_M)
    i0 = m0 + S_n - T_n  # position of the tile's first query among the keys
    low, high = overlap(i0, left, right, S_n, BLOCK_M, BLOCK_N)
    if cu_q is not None:
        high = tl.where(m0 < T_n, high, low)  # surplus tile

    q += b * q_b + h * q_h + start_q * q_t
    k += b * k_b + h // G * k_h + start_k * k_t
    v += b * v_b + h // G * v_h + start_k * v_t
    i = i0 + tl.arange(0, BLOCK_M)[:, None]
    q_tile = load_rows(q, m0, T_n, q_t, BLOCK_M, D, D_PAD)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denom = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(low, high, BLOCK_N):
        k_tile = load_rows(k, n0, S_n, k_t, BLOCK_N, D, D_PAD)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if SOFTCAP:
            x = tanh(x * inner)
        if crosses_edge(i0, n0, left, right, S_n, BLOCK_M, BLOCK_N):
            x = tl.where(visible(i, n0 + tl.arange(0, BLOCK_N)[None, :], left, right, S_n), x, float("-inf"))
        v_tile = load_rows(v, n0, S_n, v_t, BLOCK_N, DV, DV_PAD)
        acc, m, denom = accumulate(acc, m, denom, x, unit, v_tile)

    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * 1.4426950408889634
    acc, row_lse = finish(acc, m, denom, sink)
    o += (b * T + start_q) * (HQ * DV) + h * DV
    store_rows(o, acc, m0, T_n, HQ * DV, BLOCK_M, DV, DV_PAD)
    rows = m0 + tl.arange(0, BLOCK_M)
    tl.store(lse + (b * HQ + h) * T + start_q + rows, row_lse, mask=rows < T_n)


# ---- decode ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "W"])
def step_kernel(
    q, k, v, sinks, o, k_ring, v_ring, position, n, W, inner, unit,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, kr_b, kr_h, kr_w, vr_b, vr_h, vr_w, p_b, p_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Append n tokens to one (batch, key-value head)'s ring and attend; its G query heads are rows t * G + g.

    Old keys are read from the ring, new ones from the arguments, so that nothing written here is read
    here. The one hazard is that a fast warp overwrites a slot which a slow warp has yet to read: the barrier
    between the last read and the first write is for that. Each program has its own counter, read before the
    barrier and written after it, so that no program waits for another.
    """
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    position += b * p_b + h * p_h
    start = tl.load(position)
    filled = tl.minimum(start, W).to(tl.int32)
    first_slot = (start % W).to(
        tl.int32
    )  # where the first new token goes; the slot before holds the newest old one
    newest = tl.where(first_slot > 0, first_slot, W) - 1
    q += b * q_b + h * G * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    k_ring += b * kr_b + h * kr_h
    v_ring += b * vr_b + h * vr_h
    o += (b * n * H + h) * (G * DV)
    d, dv, c = tl.arange(0, D_PAD)[None, :], tl.arange(0, DV_PAD)[None, :], tl.arange(0, BLOCK_N)[None, :]

    for r0 in range(0, n * G, BLOCK_M):
        r = r0 + tl.arange(0, BLOCK_M)
        t, g = (r // G)[:, None], (r % G)[:, None]
        q_rows = q + t.to(tl.int64) * q_t + g * q_h
        q_tile = tl.load(q_rows + d, mask=(t < n) & (d < D), other=0.0)
        acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        denom = tl.zeros([BLOCK_M], tl.float32)
        for n0 in range(0, tl.where(r0 // G < W, filled, 0), BLOCK_N):
            k_tile = load_rows(k_ring, n0, filled, kr_w, BLOCK_N, D, D_PAD)
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if SOFTCAP:
                x = tanh(x * inner)
            slot = n0 + c
            age = newest - slot + tl.where(slot > newest, W, 0)  # 0 is the newest token in the ring
            x = tl.where((slot < filled) & (age + t + 1 < W), x, float("-inf"))
            v_tile = load_rows(v_ring, n0, filled, vr_w, BLOCK_N, DV, DV_PAD)
            acc, m, denom = accumulate(acc, m, denom, x, unit, v_tile)
        low, high = overlap(r0 // G, W - 1, BLOCK_M // G + 1, n, 1, BLOCK_N)
        for n0 in range(low, high, BLOCK_N):
            k_tile = load_rows(k, n0, n, k_t, BLOCK_N, D, D_PAD)
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if SOFTCAP:
                x = tanh(x * inner)
            x = tl.where(visible(t, n0 + c, W - 1, 0, n), x, float("-inf"))
            v_tile = load_rows(v, n0, n, v_t, BLOCK_N, DV, DV_PAD)
            acc, m, denom = accumulate(acc, m, denom, x, unit, v_tile)
        sink = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if sinks is not None:
            sink = tl.load(sinks + h * G + r % G).to(tl.float32) * 1.4426950408889634
        acc, _ = finish(acc, m, denom, sink)
        o_rows = o + t.to(tl.int64) * (H * G * DV) + g * DV
        tl.store(o_rows + dv, acc.to(o.dtype.element_ty), mask=(t < n) & (dv < DV))

    tl.debug_barrier()
    for n0 in range(tl.maximum(n - W, 0), n, BLOCK_N):  # of more than W tokens only the last W have a slot
        t = n0 + tl.arange(0, BLOCK_N)[:, None]
        slot = ((first_slot + t) % W).to(tl.int64)
        k_tile = load_rows(k, n0, n, k_t, BLOCK_N, D, D_PAD)
        v_tile = load_rows(v, n0, n, v_t, BLOCK_N, DV, DV_PAD)
        tl.store(k_ring + slot * kr_w + d, k_tile, mask=(t < n) & (d < D))
        tl.store(v_ring + slot * vr_w + dv, v_tile, mask=(t < n) & (dv < DV))
    tl.store(position, start + n)
