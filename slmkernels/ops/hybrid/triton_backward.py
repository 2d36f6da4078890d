"""Hybrid attention in Triton, backward: the queries' gradients, the state's, the keys'.

Maths, with the weights computed again block by block (letters of triton_forward.py; e_ij = 2^(x_ij u - m_i),
p = r e, D the sum of the weights, t the first key at the maximum):

    delta_i = dO_i . O_i            g_ij = (dO_i . v_j - delta_i) / D_i, the gradient of the weight w_ij
    dV_j = sum_i (w_ij / D_i) dO_i                  near and far
    far:  dphi_q_i = sum_j g_ij phi_k_j             dphi_k_j = sum_i g_ij phi_q_i
    near: ds_ij = p_ij g_ij, but for j = t_i: minus the sum of the others, r rest_i: the shift m is no
          constant, so that of p_it = r nothing is left, and each other one passes its gradient on to s_it
          dQ_i = scale sum_j ds_ij k_j              dK_j = scale sum_i ds_ij q_i
          dr = sum over rows and near j of e_ij g_ij

The state before a segment gets dS = sum phi_q_i y_i^T, y = dO / D, and dz = -sum phi_q_i delta_i / D_i of the
queries that read it, and passes both on to all segments before. Which state a query reads may differ from
the forward, which decides for whole tiles: here it is that of the segment of its own first near key, so that
each segment's queries are one range.

Split, four launches: `dq_kernel`, a program per (query tile, query head), which leaves delta and rest for
the others; `segment_kernel` and `scan_kernel` of the forward, backwards; `dkv_kernel`, a program per (key
tile, key-value head) that walks over the queries of all G heads of its group, those to which some of its keys
are near and those that reach its segment pair by pair, and then takes the rest of the sequence from dS. Each
output is summed by one program in a fixed order. Where no key is far the second and third are left out.

Range: w / D is at most 1, whatever the inputs' range; of g nothing is known, so that its products are
rounded as those of the states are. Digits: dphi_q and dphi_k are small differences of large sums, of dO S^T
and delta z, of v dS^T and dz, where the values' mean is not small. Of 8192 far keys, with a mean of half a
deviation, a state rounded to bfloat16 errs by 5 % of dphi_q: its rest is multiplied, too (`closely`).
"""

import triton
import triton.language as tl

from ...triton_tiles import load_block, load_rows, locate, owner, product, span, store_rows
from .triton_forward import far_keys, first_beyond, first_near, query_tile


@triton.jit
def closely(a, state, PRECISION: tl.constexpr):
    """a @ state, whose operand keeps 16 digits where it would keep 8."""
    c = product(a, state, PRECISION)
    if PRECISION == "bf16":
        c += product(a, state - state.to(tl.bfloat16).to(tl.float32), PRECISION)
    return c


@triton.jit(do_not_specialize=["T", "S", "N", "reach", "W"])
def dq_kernel(
    q, k, v, phi_k, mix, states, cu, o, do, shift, top, den, dq, dphi_q, delta, rest, total,
    T, S, N, reach, W, scale, unit, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, fk_b, fk_t, fk_h,
    o_b, o_t, o_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    D_PAD: tl.constexpr, F_PAD: tl.constexpr, V_PAD: tl.constexpr, SEG: tl.constexpr,
    ALIGNED: tl.constexpr, STATE0: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq and dphi_q of one tile of queries, one head; a row's delta, rest and, for mix, sum of e g."""
    HQ: tl.constexpr = H * G
    tiles = tl.num_programs(0) // HQ
    tile, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, start, length, m0 = locate(tile, cu, T, N, BLOCK_M)
    _, _, _, slot = span(owner(tile, cu, T, N, BLOCK_M), cu, reach, SEG)
    i0, low, high, inner, segment = query_tile(m0, length, S - T, W, ALIGNED, SEG, BLOCK_M, BLOCK_N)
    k += b * k_b + h // G * k_h
    k_top = k
    k += start * k_t
    v += b * v_b + start * v_t + h // G * v_h
    phi_k += b * fk_b + start * fk_t + h // G * fk_h
    do += b * o_b + start * o_t + h * o_h
    o += (b * T + start) * (HQ * V) + h * V
    r = m0 + tl.arange(0, BLOCK_M)
    row, inside = (b * HQ + h) * T + start + r, r < length
    m = tl.load(shift + row, mask=inside, other=float("inf"))  # e = 0 in rows past the end
    inverse = 1.0 / tl.load(den + row, mask=inside, other=1.0)
    at = tl.load(top + row, mask=inside, other=0)
    do_tile = load_rows(do, m0, length, o_t, BLOCK_M, V, V_PAD)
    o_tile = load_rows(o, m0, length, HQ * V, BLOCK_M, V, V_PAD)
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + row, row_delta, mask=inside)
    i = i0 + tl.arange(0, BLOCK_M)[:, None]
    first = first_near(i, W, ALIGNED)
    gain = 1.0
    if mix is not None:
        gain = tl.load(mix + h)

    # ---- near keys
    q_tile = load_rows(q + b * q_b + start * q_t + h * q_h, m0, length, q_t, BLOCK_M, D, D_PAD)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    others = tl.zeros([BLOCK_M], tl.float32)
    of_top = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(low, high, BLOCK_N):
        k_tile = load_rows(k, n0, high, k_t, BLOCK_N, D, D_PAD)
        v_tile = load_rows(v, n0, high, v_t, BLOCK_N, V, V_PAD)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        e = tl.exp2(x * unit - m[:, None])
        j = n0 + tl.arange(0, BLOCK_N)[None, :]
        if (n0 < inner) | (n0 + BLOCK_N - 1 > i0):
            e = tl.where((j >= first) & (j <= i), e, 0.0)
        g = (tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee") - row_delta[:, None]) * inverse[
            :, None
        ]
        eg = e * g
        is_top = start.to(tl.int32) + j == at[:, None]
        if total is not None:
            of_top += tl.sum(tl.where(is_top, eg, 0.0), 1)
        eg = tl.where(is_top, 0.0, eg)
        others += tl.sum(eg, 1)
        acc = tl.dot((gain * eg).to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    d = tl.arange(0, D_PAD)[None, :]
    k_tile = tl.load(k_top + at.to(tl.int64)[:, None] * k_t + d, mask=inside[:, None] & (d < D), other=0.0)
    acc = (acc - gain * others[:, None] * k_tile.to(tl.float32)) * scale
    store_rows(dq + (b * T + start) * (HQ * D) + h * D, acc, m0, length, HQ * D, BLOCK_M, D, D_PAD)
    tl.store(rest + row, others, mask=inside)
    if total is not None:
        tl.store(total + row, others + of_top, mask=inside)

    # ---- far keys, pair by pair
    acc = tl.zeros([BLOCK_M, F_PAD], tl.float32)
    for n0 in range(segment * SEG, inner, BLOCK_N):
        v_tile = load_rows(v, n0, high, v_t, BLOCK_N, V, V_PAD)
        g = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee") - row_delta[:, None]
        if n0 + BLOCK_N > low:
            g = tl.where(n0 + tl.arange(0, BLOCK_N)[None, :] < first, g, 0.0)
        acc += product(g, load_rows(phi_k, n0, high, fk_t, BLOCK_N, F, F_PAD), PRECISION)

    # ---- far keys before, by their state
    columns, features = V, F
    if not STATE0:
        columns, features = tl.where(segment > 0, V, 0), tl.where(segment > 0, F, 0)
    states += ((slot + segment) * H + h // G) * (F * V + F)
    for c in range(0, columns, BLOCK_S):
        state = load_block(states, 0, F, V, c, V, F_PAD, BLOCK_S)
        acc += closely(load_block(do, m0, length, o_t, c, V, BLOCK_M, BLOCK_S), tl.trans(state), PRECISION)
    f = tl.arange(0, F_PAD)
    z = tl.load(states + F * V + f, mask=f < features, other=0.0)
    acc = (acc - row_delta[:, None] * z[None, :]) * inverse[:, None]
    store_rows(dphi_q + (b * T + start) * (HQ * F) + h * F, acc, m0, length, HQ * F, BLOCK_M, F, F_PAD)


@triton.jit(do_not_specialize=["T", "S", "N", "reach", "W"])
def dkv_kernel(
    q, k, v, phi_q, phi_k, mix, dstates, cu, do, shift, top, den, delta, rest, dk, dv, dphi_k,
    T, S, N, reach, W, scale, unit, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, fq_b, fq_t, fq_h,
    fk_b, fk_t, fk_h, o_b, o_t, o_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    D_PAD: tl.constexpr, F_PAD: tl.constexpr, V_PAD: tl.constexpr, SEG: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dk, dv and dphi_k of one tile of keys, one key-value head; blocks are transposed, [keys, queries]."""
    tiles = tl.num_programs(0) // H
    tile, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, start, length, n0 = locate(tile, cu, S, N, BLOCK_N)
    _, _, _, slot = span(owner(tile, cu, S, N, BLOCK_N), cu, reach, SEG)
    segment, offset = n0 // SEG, S - T  # query t stands at position t + offset
    low = tl.maximum(n0 - offset, 0)
    inner = first_beyond(n0 + 1, W, ALIGNED) - offset  # the first query to which one of these keys is far
    outer = tl.minimum(first_beyond(n0 + BLOCK_N, W, ALIGNED), length) - offset  # to which all are
    end = tl.minimum(first_beyond((segment + 1) * SEG, W, ALIGNED), length) - offset  # which reads a state
    if cu is not None:
        surplus = n0 >= length
        outer, end = tl.where(surplus, 0, outer), tl.where(surplus, 0, end)
    q += b * q_b + start * q_t + h * G * q_h
    phi_q += b * fq_b + start * fq_t + h * G * fq_h
    do += b * o_b + start * o_t + h * G * o_h
    v += b * v_b + start * v_t + h * v_h
    phi_k += b * fk_b + start * fk_t + h * fk_h
    row = (b * H + h) * G * T + start
    shift += row
    top += row
    den += row
    delta += row
    rest += row
    j = n0 + tl.arange(0, BLOCK_N)[:, None]
    v_tile = load_rows(v, n0, length, v_t, BLOCK_N, V, V_PAD)
    dv_acc = tl.zeros([BLOCK_N, V_PAD], tl.float32)

    # ---- near queries
    k_tile = load_rows(k + b * k_b + start * k_t + h * k_h, n0, length, k_t, BLOCK_N, D, D_PAD)
    acc = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    blocks = tl.cdiv(tl.maximum(outer - low, 0), BLOCK_M)
    for block in range(G * blocks):  # (head of the group, block) in one loop: loads run ahead across heads
        g = tl.cast(block // blocks, tl.int64)
        m0 = low + block % blocks * BLOCK_M
        q_tile = load_rows(q + g * q_h, m0, outer, q_t, BLOCK_M, D, D_PAD)
        do_tile = load_rows(do + g * o_h, m0, outer, o_t, BLOCK_M, V, V_PAD)
        i = m0 + tl.arange(0, BLOCK_M)
        inside = i < outer
        m = tl.load(shift + g * T + i, mask=inside, other=float("inf"))
        at = tl.load(top + g * T + i, mask=inside, other=0) - start.to(tl.int32)
        others = tl.load(rest + g * T + i, mask=inside, other=0.0)
        inverse = 1.0 / tl.load(den + g * T + i, mask=inside, other=1.0)
        row_delta = tl.load(delta + g * T + i, mask=inside, other=0.0)
        gain = 1.0
        if mix is not None:
            gain = tl.load(mix + h * G + g)
        x = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [keys, queries]
        e = tl.exp2(x * unit - m[None, :])
        if (m0 + offset < n0 + BLOCK_N - 1) | (m0 + BLOCK_M > inner):
            i += offset
            near = (j >= first_near(i, W, ALIGNED)[None, :]) & (j <= i[None, :])
            e = tl.where(near, e, 0.0)
        p = e * (gain * inverse)[None, :]
        dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
        ds = p * (tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee") - row_delta[None, :])
        ds = tl.where(j == at[None, :], -(gain * others)[None, :], ds)
        acc = tl.dot(ds.to(q_tile.dtype), q_tile, acc, input_precision="ieee")
    dk += (b * S + start) * (H * D) + h * D
    store_rows(dk, acc * scale, n0, length, H * D, BLOCK_N, D, D_PAD)

    # ---- far queries, pair by pair
    phi_tile = load_rows(phi_k, n0, length, fk_t, BLOCK_N, F, F_PAD)
    acc = tl.zeros([BLOCK_N, F_PAD], tl.float32)
    low = tl.maximum(inner, 0)
    blocks = tl.cdiv(tl.maximum(end - low, 0), BLOCK_M)
    for block in range(G * blocks):
        g = tl.cast(block // blocks, tl.int64)
        m0 = low + block % blocks * BLOCK_M
        far_tile = load_rows(phi_q + g * fq_h, m0, end, fq_t, BLOCK_M, F, F_PAD)
        do_tile = load_rows(do + g * o_h, m0, end, o_t, BLOCK_M, V, V_PAD)
        i = m0 + tl.arange(0, BLOCK_M)
        inverse = 1.0 / tl.load(den + g * T + i, mask=i < end, other=1.0)
        row_delta = tl.load(delta + g * T + i, mask=i < end, other=0.0)
        a = tl.dot(phi_tile, tl.trans(far_tile), input_precision="ieee")
        dw = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee") - row_delta[None, :]
        if m0 < outer:
            far = j < first_near(i + offset, W, ALIGNED)[None, :]
            a, dw = tl.where(far, a, 0.0), tl.where(far, dw, 0.0)
        dv_acc = tl.dot((a * inverse[None, :]).to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
        acc += product(dw * inverse[None, :], far_tile, PRECISION)

    # ---- the rest of the sequence, by the state's gradient
    last = far_keys(length, W, ALIGNED)
    columns, features = tl.where(n0 < last, V, 0), tl.where(n0 < last, F, 0)
    dstates += ((slot + segment) * H + h) * (F * V + F)
    for f in range(0, features, BLOCK_S):
        dstate = load_rows(dstates, f, F, V, BLOCK_S, V, V_PAD)
        dv_acc += product(load_block(phi_k, n0, last, fk_t, f, F, BLOCK_N, BLOCK_S), dstate, PRECISION)
    for c in range(0, columns, BLOCK_S):
        dstate = load_block(dstates, 0, F, V, c, V, F_PAD, BLOCK_S)
        acc += closely(load_block(v, n0, last, v_t, c, V, BLOCK_N, BLOCK_S), tl.trans(dstate), PRECISION)
    f = tl.arange(0, F_PAD)
    dz = tl.load(dstates + F * V + f, mask=f < features, other=0.0)
    acc += tl.where(j < last, dz[None, :], 0.0)
    dv += (b * S + start) * (H * V) + h * V
    store_rows(dv, dv_acc, n0, length, H * V, BLOCK_N, V, V_PAD)
    dphi_k += (b * S + start) * (H * F) + h * F
    store_rows(dphi_k, acc, n0, length, H * F, BLOCK_N, F, F_PAD)
