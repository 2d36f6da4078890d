"""Linear attention in Triton, backward: a sweep for the state's gradient, and all chunks at once.

Maths, one head, one chunk (letters of triton_forward.py; S before it, dS of the state after it, and
y = scale do, or do / den with `normalize`):

    dU = M^T y + (k out_of) dS                   Y = dU + Z^T (beta dU),  dX = beta Y  (without beta dX = dU)
    dM = tril(y u^T)      dN = -tril(dX u^T, -1)
    dq = into (y S^T) + sum_j dM_ij pair_ij k_j
    dk = out_of (u dS^T) + sum_i dM_ij pair_ij q_i - into (dX S^T) + sum_j dN_ij pair_ij k_j
         + sum_i dN_ij pair_ij k_i               dv = dX      dbeta_j = w_j . Y_j
    dS <- total dS + (q into)^T y - (k into)^T dX        at the sequence's start: the initial state's gradient
    normalize: y has one more column, dden = -(o . do) / den, as u has a column of ones and S the column z

A gate g_l gets all that passes over it: from j < l to i >= l inside the chunk, from S to readers i >= l, from
writers j < l to dS, and from S to dS. The first is (sum over i >= l of what i reads) - (sum over j >= l of
what is read of j), the diagonal left out of both: what cancels there is never more than one chunk's.

Split: `state_kernel` walks the chunks backwards, a program per (sequence, head, block of V) with dS in
registers, and leaves dS per chunk and, with beta, Y per token. `gradient_kernel` then has a program per
(chunk, key head), all at once, sums over the heads of its group and over V in a fixed order, and finishes
every gradient: no partial sums in memory, except one number a chunk and head where decay is [H]. With
`normalize` `denominator_kernel` comes first, since dden needs whole rows of V and both others need dden.
Considered: one reverse sweep with dS and everything else in registers. It fills registers twice over, has
partial dq and dk for each block of V, and only B H programs.
"""

import triton
import triton.language as tl

from ...triton_tiles import load_block, load_tokens, locate, product, span, store_block, store_tokens
from .triton_chunk import earlier, gates, load_keys, of_state, one_key, pairs


@triton.jit(do_not_specialize=["T", "N"])
def denominator_kernel(
    q, k, v, do, decay, cu, m, kept_state, kept_den, dden, T, N,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, d_b, d_t, d_h,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, L2: tl.constexpr, PRECISION: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dden [B, T, H] of one chunk and head, from o in float32, computed again."""
    chunk, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    b, start, length, t0 = locate(chunk, cu, T, N, C)
    hk = h // G
    if GATE > 0:
        decay += b * d_b + start * d_t + h * d_h
    row = (b * T + start) * H + h
    at = (chunk.to(tl.int64) * H + h) * (K * V)
    v += b * v_b + start * v_t + h * v_h
    do += b * o_b + start * o_t + h * o_h
    q_tile, _ = load_keys(q + b * q_b + start * q_t + hk * q_h, t0, length, q_t, C, K, K_PAD, L2)
    if m is None:
        k_tile, _ = load_keys(k + b * k_b + start * k_t + hk * k_h, t0, length, k_t, C, K, K_PAD, L2)
        M = product(q_tile, tl.trans(k_tile), PRECISION) * pairs(decay, t0, length, d_t, GATE, C)
    else:
        M = load_block(m + row * C, t0, length, H * C, 0, C, C, C)
    into, _, _ = gates(decay, t0, length, d_t, GATE, C, K, K_PAD)
    reader = q_tile * into
    total = tl.zeros([C], tl.float32)
    rows = tl.where(t0 < length, K, 0)
    for column in range(0, V, BLOCK_V):
        S = load_block(kept_state + at, 0, rows, V, column, V, K_PAD, BLOCK_V)
        v_tile = load_block(v, t0, length, v_t, column, V, C, BLOCK_V)
        do_tile = load_block(do, t0, length, o_t, column, V, C, BLOCK_V).to(tl.float32)
        total += tl.sum((product(M, v_tile, PRECISION) + product(reader, S, PRECISION)) * do_tile, 1)
    den = load_tokens(kept_den + row, t0, length, H, C)
    den = tl.where(t0 + tl.arange(0, C) < length, den, 1.0)
    store_tokens(dden + row, -(total / den) / den, t0, length, H, C)


@triton.jit
def output_gradient(
    do, kept_den, t0, length, stride, column, scale, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """y."""
    y = load_block(do, t0, length, stride, column, V, C, BLOCK_V).to(tl.float32)
    if NORMALIZE:
        den = load_tokens(kept_den, t0, length, H, C)
        y = y / tl.where(t0 + tl.arange(0, C) < length, den, 1.0)[:, None]
    else:
        y = y * scale
    return y


@triton.jit(do_not_specialize=["T", "N"])
def state_kernel(
    q, k, do, decay, beta, cu, m, z, kept_den, dden, dstate, dnormalizer,
    dkept_state, dkept_normalizer, dkept_y, dstate0, dnormalizer0, T, N, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, o_b, o_t, o_h, d_b, d_t, d_h, b_b, b_t, b_h,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr, L2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dS after each chunk of one sequence and head, BLOCK_V columns of it, and the initial state's."""
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V if V > 0 else 1
    column = tl.program_id(0) % blocks * BLOCK_V
    h, n = (tl.program_id(0) // blocks % H).to(tl.int64), tl.program_id(0) // (blocks * H)
    b, start, length, first = span(n, cu, T, C)
    hk = h // G
    q += b * q_b + start * q_t + hk * q_h
    k += b * k_b + start * k_t + hk * k_h
    do += b * o_b + start * o_t + h * o_h
    if GATE > 0:
        decay += b * d_b + start * d_t + h * d_h
    if beta is not None:
        beta += b * b_b + start * b_t + h * b_h
    row = (b * T + start) * H + h
    if NORMALIZE:
        kept_den += row
    place = n.to(tl.int64) * H + h
    c = tl.arange(0, K_PAD)

    dS = tl.zeros([K_PAD, BLOCK_V], tl.float32)
    if dstate is not None:
        dS = load_block(dstate + place * (K * V), 0, K, V, column, V, K_PAD, BLOCK_V)
    if NORMALIZE:
        dz = tl.zeros([K_PAD], tl.float32)
        if dnormalizer is not None:
            dz = tl.load(dnormalizer + place * K + c, mask=c < K, other=0.0)
    chunks = tl.cdiv(length, C)
    for done in range(chunks):
        index = chunks - 1 - done
        t0 = index * C
        at = (first + index) * H + h
        store_block(dkept_state + at * (K * V), dS, 0, K, V, column, V, K_PAD, BLOCK_V)
        q_tile, _ = load_keys(q, t0, length, q_t, C, K, K_PAD, L2)
        into, out_of, total = gates(decay, t0, length, d_t, GATE, C, K, K_PAD)
        y = output_gradient(do, kept_den, t0, length, o_t, column, scale, H, V, C, NORMALIZE, BLOCK_V)
        reader = q_tile * into
        change = product(tl.trans(reader), y, PRECISION)
        if beta is not None:
            k_tile, _ = load_keys(k, t0, length, k_t, C, K, K_PAD, L2)
            rate = load_tokens(beta, t0, length, b_t, C)[:, None]
            M = load_block(m + row * C, t0, length, H * C, 0, C, C, C)
            Z = load_block(z + row * C, t0, length, H * C, 0, C, C, C)
            Y = product(tl.trans(M), y, PRECISION) + product(k_tile * out_of, dS, PRECISION)
            Y += product(tl.trans(Z), rate * Y, PRECISION)
            store_block(dkept_y + row * V, Y, t0, length, H * V, column, V, C, BLOCK_V)
            change -= product(tl.trans(k_tile * into), rate * Y, PRECISION)
        dS = dS * of_state(total, GATE) + change
        if NORMALIZE:
            tl.store(dkept_normalizer + at * K + c, dz, mask=(c < K) & (column == 0))
            dz = dz * total + tl.sum(reader * load_tokens(dden + row, t0, length, H, C)[:, None], 0)
    if dstate0 is not None:
        store_block(dstate0 + place * (K * V), dS, 0, K, V, column, V, K_PAD, BLOCK_V)
    if dnormalizer0 is not None:
        tl.store(dnormalizer0 + place * K + c, dz, mask=(c < K) & (column == 0))


@triton.jit
def undo_norm(dx, x, r, L2: tl.constexpr):
    """The gradient of what was normalised to x = r raw, from that of x."""
    if L2:
        dx = (dx - x * tl.sum(x * dx, 1)[:, None]) * r[:, None]
    return dx


@triton.jit(do_not_specialize=["T", "N"])
def gradient_kernel(
    q, k, v, do, decay, beta, cu, m, kept_state, kept_normalizer, kept_den, kept_w,
    dden, dkept_state, dkept_normalizer, dkept_y, dq, dk, dv, ddecay, dbeta, T, N, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, d_b, d_t, d_h, b_b, b_t, b_h,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr, L2: tl.constexpr,
    PRECISION: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Every gradient of one chunk and key head. CONSTANT: decay is [H], its part is one number a chunk."""
    HK: tl.constexpr = H // G
    chunk, hk = tl.program_id(0) // HK, (tl.program_id(0) % HK).to(tl.int64)
    b, start, length, t0 = locate(chunk, cu, T, N, C)
    rows = tl.where(t0 < length, K, 0)  # of a state; a surplus chunk has none
    i, j, c = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :], tl.arange(0, K_PAD)
    q += b * q_b + start * q_t + hk * q_h
    k += b * k_b + start * k_t + hk * k_h
    dq_sum = tl.zeros([C, K_PAD], tl.float32)
    dk_sum = tl.zeros([C, K_PAD], tl.float32)
    for g in range(G):
        h = hk * G + g
        row = (b * T + start) * H + h
        at = chunk.to(tl.int64) * H + h
        gate = decay
        if GATE > 0:
            gate += b * d_b + start * d_t + h * d_h
        if beta is None:
            k_tile, _ = load_keys(k, t0, length, k_t, C, K, K_PAD, L2)
            if m is None:
                q_tile, _ = load_keys(q, t0, length, q_t, C, K, K_PAD, L2)
                M = product(q_tile, tl.trans(k_tile), PRECISION) * pairs(gate, t0, length, d_t, GATE, C)
            else:
                M = load_block(m + row * C, t0, length, H * C, 0, C, C, C)
            _, out_of, _ = gates(gate, t0, length, d_t, GATE, C, K, K_PAD)
            k_writer = k_tile * out_of
        else:
            rate = load_tokens(beta + b * b_b + start * b_t + h * b_h, t0, length, b_t, C)[:, None]
            rate_gradient = tl.zeros([C], tl.float32)
            dN = tl.zeros([C, C], tl.float32)
            error_reader = tl.zeros([C, K_PAD], tl.float32)

        # ---- products over V
        dM = tl.zeros([C, C], tl.float32)
        reader = tl.zeros([C, K_PAD], tl.float32)
        writer = tl.zeros([C, K_PAD], tl.float32)
        carried = tl.zeros([K_PAD], tl.float32)
        den = kept_den
        if NORMALIZE:
            den += row
        for column in range(0, V, BLOCK_V):
            y = output_gradient(
                do + b * o_b + start * o_t + h * o_h, den, t0, length, o_t, column, scale, H, V, C, NORMALIZE,
                BLOCK_V,
            )  # fmt: skip
            S = load_block(kept_state + at * (K * V), 0, rows, V, column, V, K_PAD, BLOCK_V).to(tl.float32)
            dS = load_block(dkept_state + at * (K * V), 0, rows, V, column, V, K_PAD, BLOCK_V).to(tl.float32)
            if beta is None:
                u = load_block(v + b * v_b + start * v_t + h * v_h, t0, length, v_t, column, V, C, BLOCK_V)
                dx = product(tl.trans(M), y, PRECISION) + product(k_writer, dS, PRECISION)
            else:
                w = load_block(kept_w + row * V, t0, length, H * V, column, V, C, BLOCK_V).to(tl.float32)
                Y = load_block(dkept_y + row * V, t0, length, H * V, column, V, C, BLOCK_V).to(tl.float32)
                rate_gradient += tl.sum(w * Y, 1)
                u, dx = rate * w, rate * Y
                dN -= product(dx, tl.trans(u), PRECISION)
                error_reader -= product(dx, tl.trans(S), PRECISION)
            store_block(dv + row * V, dx, t0, length, H * V, column, V, C, BLOCK_V)
            dM += product(y, tl.trans(u), PRECISION)
            reader += product(y, tl.trans(S), PRECISION)
            writer += product(u, tl.trans(dS), PRECISION)
            carried += tl.sum(S * dS, 1)
        if NORMALIZE:
            den_gradient = load_tokens(dden + row, t0, length, H, C)[:, None]
            z = tl.load(kept_normalizer + at * K + c, mask=c < rows, other=0.0)
            dz = tl.load(dkept_normalizer + at * K + c, mask=c < rows, other=0.0)
            dM += den_gradient
            reader += den_gradient * z[None, :]
            writer += dz[None, :]
            carried += z * dz

        # ---- back to q, k and the gates; q and k are loaded here, again, to leave the loop its registers
        q_tile, _ = load_keys(q, t0, length, q_t, C, K, K_PAD, L2)
        k_tile, _ = load_keys(k, t0, length, k_t, C, K, K_PAD, L2)
        into, out_of, total = gates(gate, t0, length, d_t, GATE, C, K, K_PAD)
        reader *= into
        writer *= out_of
        if beta is not None:
            error_reader *= into
            store_tokens(dbeta + row, rate_gradient, t0, length, H, C)
            dN = tl.where(i > j, dN, 0.0)
        own = tl.sum(tl.where(i == j, dM, 0.0), 1)[:, None]  # the diagonal, which no gate touches
        dM = tl.where(i > j, dM, 0.0)
        if GATE == 2:
            inside = tl.zeros([C, K_PAD], tl.float32)
            between = tl.zeros([C, K_PAD], tl.float32)
            for n in range(C):
                one = C - 1 - n
                between = earlier(between, gate, one, t0, length, d_t, C, K, K_PAD)
                faded = tl.where(i > one, tl.exp(between), 0.0)
                key = one_key(k, one, t0, length, k_t, K, K_PAD, L2)
                dm = tl.sum(tl.where(j == one, dM, 0.0), 1)[:, None] * faded
                reader += dm * key[None, :]
                to_key = dm * q_tile
                if beta is not None:
                    dn = tl.sum(tl.where(j == one, dN, 0.0), 1)[:, None] * faded
                    error_reader += dn * key[None, :]
                    to_key += dn * k_tile
                inside += tl.where(i == one, tl.sum(to_key, 0)[None, :], 0.0)
        else:
            pair = pairs(gate, t0, length, d_t, GATE, C)
            dM *= pair
            reader += product(dM, k_tile, PRECISION)
            inside = product(tl.trans(dM), q_tile, PRECISION)
            if beta is not None:
                dN *= pair
                error_reader += product(dN, k_tile, PRECISION)
                inside += product(tl.trans(dN), k_tile, PRECISION)
        if GATE > 0:
            across = q_tile * reader - k_tile * inside
            if beta is not None:
                across += k_tile * error_reader
            written = k_tile * writer
            carried *= total
            if GATE == 2:
                dg = tl.cumsum(across, 0, reverse=True) + tl.cumsum(written, 0) - written + carried[None, :]
                store_block(ddecay + row * K, dg, t0, length, H * K, 0, K, C, K_PAD)
            else:
                of_token = tl.sum(written, 1)
                dg = tl.cumsum(tl.sum(across, 1), 0, reverse=True) + tl.cumsum(of_token, 0) - of_token
                dg += tl.sum(carried, 0)
                if CONSTANT:
                    dg = tl.where(t0 + tl.arange(0, C) < length, dg, 0.0)
                    tl.store(ddecay + at, tl.sum(dg, 0))
                else:
                    store_tokens(ddecay + row, dg, t0, length, H, C)
        dq_sum += reader + own * k_tile
        dk_sum += writer + inside + own * q_tile
        if beta is not None:
            dk_sum += error_reader
    row = ((b * T + start) * HK + hk) * K
    q_tile, q_norm = load_keys(q, t0, length, q_t, C, K, K_PAD, L2)
    k_tile, k_norm = load_keys(k, t0, length, k_t, C, K, K_PAD, L2)
    store_block(dq + row, undo_norm(dq_sum, q_tile, q_norm, L2), t0, length, HK * K, 0, K, C, K_PAD)
    store_block(dk + row, undo_norm(dk_sum, k_tile, k_norm, L2), t0, length, HK * K, 0, K, C, K_PAD)
