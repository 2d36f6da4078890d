"""Linear attention in Triton, forward and decode.

Maths, one head, one chunk of C tokens, S the state [K, V] before it (into, out_of, total, pair: the sums of
gates of `triton_chunk`), per channel c where the gates are:

    M_ij = sum_c q_ic k_jc pair_ijc, j <= i         N_ij = sum_c k_ic k_jc pair_ijc, j < i
    u = v                                           without beta
    u = beta w,  w = (I + N beta)^-1 r,  r = v - (k into) S     with beta (the UT transform: Yang et al. 2024,
                                                    DeltaNet, section 3.2)
    o = scale ((q into) S + M u)                    S <- total S + (k out_of)^T u
    normalize: z is one more column of S whose values are 1; o = (..) / den, den its column of (..) + 1e-6

One matrix serves both directions: with Z = -N (I + beta N)^-1, strictly lower triangular, w = r + Z (beta r),
and in the backward Y = dU + Z^T (beta dU). Nothing is divided by beta.

Split: `forward_kernel` has one program per (sequence, head, block of V), which carries its columns of the
state through the chunks in registers. Columns never meet, so that programs have nothing to add up. Without
beta and with at most one gate a token it is the only launch. Otherwise `intra_kernel` comes first, a program
per (chunk, head), all at once: it leaves M and Z in memory, [B, T, H, C] in float32, and takes the triangular
inverse, and the exponentials of every (i, j, c), off the sequential path and out of the V blocks.
Considered: everything in one launch. Each of V's blocks would then invert again, one chunk after the other.

For the backward the forward keeps, per chunk, the state before it, and per token den, M, Z and w where they
exist. States and w are kept in the dtype that the products' operands have anyway.

Operands of products: float32 for float32 (not on tensor cores), bfloat16 for bfloat16, and TensorFloat-32
for float16. A state, a denominator's reciprocal or a gradient leaves float16's range easily; TensorFloat-32
has float16's digits and float32's range, at half its speed. Sums, gates, states and triangular inverses are
in float32.

Layout: q, k [B, T, Hk, K], v, o [B, T, H, V], any strides but the last, which is 1; states [N, H, K, V]
float32, contiguous. K is padded to a power of two inside the tile. What multiplies a stride is int64.

Split over the sequence: without beta and with at most one gate a token, a segment's last state is what it
adds plus its decay times the state before it. Where programs are few and sequences long (the launcher's
`split_length`, from shapes alone) there are three launches: `forward_kernel` without o, a program per
(segment, head, block of V), for what each adds; `scan_kernel`, for the state each starts with; and
`forward_kernel` from those states, for o. k and v are read twice, and a state a segment is written and read
twice. With beta the decay would be a [K, K] matrix: a single sweep, as with a gate a channel.

Missing: the same split of the backward's sweep; for a gate a channel, pairs of distant tokens by a product of
two factors about a boundary between them, which would take their exponentials from C K a token to 16 K and
allow chunks of 64 (Yang et al. 2024, GLA, section 4.3). No figure stands here, since none of this has run on
a GPU yet.
"""

import triton
import triton.language as tl

from ...triton_tiles import load_block, load_tokens, locate, owner, product, span, store_block
from .triton_chunk import LOWEST, earlier, gates, inverse, load_keys, of_state, one_key, pairs


@triton.jit(do_not_specialize=["T", "N"])
def intra_kernel(
    q, k, decay, beta, cu, m, z, T, N, q_b, q_t, q_h, k_b, k_t, k_h, d_b, d_t, d_h, b_b, b_t, b_h,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, L2: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """M of one chunk and head and, with beta, Z."""
    chunk, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    b, start, length, t0 = locate(chunk, cu, T, N, C)
    hk = h // G
    q += b * q_b + start * q_t + hk * q_h
    k += b * k_b + start * k_t + hk * k_h
    if GATE > 0:
        decay += b * d_b + start * d_t + h * d_h
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    q_tile, _ = load_keys(q, t0, length, q_t, C, K, K_PAD, L2)
    k_tile, _ = load_keys(k, t0, length, k_t, C, K, K_PAD, L2)
    if GATE == 2:
        M = tl.zeros([C, C], tl.float32)
        N_tile = tl.zeros([C, C], tl.float32)
        between = tl.zeros([C, K_PAD], tl.float32)
        for n in range(C):
            column = C - 1 - n
            between = earlier(between, decay, column, t0, length, d_t, C, K, K_PAD)
            key = one_key(k, column, t0, length, k_t, K, K_PAD, L2)
            faded = tl.exp(between) * key[None, :]
            M = tl.where(j == column, tl.sum(q_tile * faded, 1)[:, None], M)
            if beta is not None:
                N_tile = tl.where(j == column, tl.sum(k_tile * faded, 1)[:, None], N_tile)
    else:
        pair = pairs(decay, t0, length, d_t, GATE, C)
        M = product(q_tile, tl.trans(k_tile), PRECISION) * pair
        N_tile = product(k_tile, tl.trans(k_tile), PRECISION) * pair
    row = ((b * T + start) * H + h) * C
    store_block(m + row, tl.where(i >= j, M, 0.0), t0, length, H * C, 0, C, C, C)
    if beta is not None:
        N_tile = tl.where(i > j, N_tile, 0.0)
        rate = load_tokens(beta + b * b_b + start * b_t + h * b_h, t0, length, b_t, C)
        Z = -product(N_tile, inverse(rate[:, None] * N_tile, C, SOLVE), SOLVE)
        store_block(z + row, Z, t0, length, H * C, 0, C, C, C)


@triton.jit(do_not_specialize=["T", "N"])
def forward_kernel(
    q, k, v, decay, beta, state0, normalizer0, cu, m, z, o, state, normalizer, fade,
    kept_state, kept_normalizer, kept_den, kept_w, T, N, segment, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, b_b, b_t, b_h,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr, L2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """o and the final state of one sequence and head, BLOCK_V columns of it.

    With `segment`, of that many tokens of a sequence; states are then one a segment. Without o only the
    state, and into `fade` exp(the sum of the gates); without `state` only o.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V if V > 0 else 1
    column = tl.program_id(0) % blocks * BLOCK_V
    h, part = (tl.program_id(0) // blocks % H).to(tl.int64), tl.program_id(0) // (blocks * H)
    if segment is None:
        b, start, length, first = span(part, cu, T, C)
    else:
        n = owner(part, cu, T, N, segment)
        b, start, length, first = span(n, cu, T, segment)
        before = (part - first.to(tl.int32)) * segment  # tokens of the sequence
        b, start, length, first = span(n, cu, T, C)
        start, first = start + before, first + before // C
        length = tl.minimum(length - before, segment)  # below 0 in a surplus segment
    hk = h // G
    q += b * q_b + start * q_t + hk * q_h
    k += b * k_b + start * k_t + hk * k_h
    v += b * v_b + start * v_t + h * v_h
    if GATE > 0:
        decay += b * d_b + start * d_t + h * d_h
    if beta is not None:
        beta += b * b_b + start * b_t + h * b_h
    row = (b * T + start) * H + h  # of what is kept for each token
    place = part.to(tl.int64) * H + h
    c = tl.arange(0, K_PAD)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]

    S = tl.zeros([K_PAD, BLOCK_V], tl.float32)
    if state0 is not None:
        S = load_block(state0 + place * (K * V), 0, K, V, column, V, K_PAD, BLOCK_V)
    if NORMALIZE:
        sums = tl.zeros([K_PAD], tl.float32)
        if normalizer0 is not None:
            sums = tl.load(normalizer0 + place * K + c, mask=c < K, other=0.0)
    faded = 1.0  # the product of the chunks' `total`
    for index in range(tl.cdiv(tl.maximum(length, 0), C)):
        t0 = index * C
        at = (first + index) * H + h
        if kept_state is not None:
            store_block(kept_state + at * (K * V), S, 0, K, V, column, V, K_PAD, BLOCK_V)
            if NORMALIZE:
                tl.store(kept_normalizer + at * K + c, sums, mask=(c < K) & (column == 0))
        if o is not None:
            q_tile, _ = load_keys(q, t0, length, q_t, C, K, K_PAD, L2)
        k_tile, _ = load_keys(k, t0, length, k_t, C, K, K_PAD, L2)
        u = load_block(v, t0, length, v_t, column, V, C, BLOCK_V).to(tl.float32)
        into, out_of, total = gates(decay, t0, length, d_t, GATE, C, K, K_PAD)
        if o is not None:
            if m is None:
                M = product(q_tile, tl.trans(k_tile), PRECISION)
                if GATE == 0:
                    M = tl.where(i >= j, M, 0.0)
                else:
                    M *= pairs(decay, t0, length, d_t, GATE, C)
            else:
                M = load_block(m + row * C, t0, length, H * C, 0, C, C, C)
        if beta is not None:
            rate = load_tokens(beta, t0, length, b_t, C)[:, None]
            u -= product(k_tile * into, S, PRECISION)
            Z = load_block(z + row * C, t0, length, H * C, 0, C, C, C)
            u += product(Z, rate * u, PRECISION)
            if kept_w is not None:
                store_block(kept_w + row * V, u, t0, length, H * V, column, V, C, BLOCK_V)
            u = rate * u
        if o is not None:
            reader = q_tile * into
            out = product(M, u, PRECISION) + product(reader, S, PRECISION)
            if NORMALIZE:
                den = tl.sum(M, 1) + tl.sum(reader * sums[None, :], 1) + 1e-6
                out = out / den[:, None]
                if kept_den is not None:
                    r = t0 + tl.arange(0, C)
                    tl.store(kept_den + row + r.to(tl.int64) * H, den, mask=(r < length) & (column == 0))
            else:
                out = out * scale
            store_block(o + row * V, out, t0, length, H * V, column, V, C, BLOCK_V)
        writer = k_tile * out_of
        S = S * of_state(total, GATE) + product(tl.trans(writer), u, PRECISION)
        if NORMALIZE:
            sums = sums * total + tl.sum(writer, 0)
        if fade is not None:
            faded *= total
    if state is not None:
        store_block(state + place * (K * V), S, 0, K, V, column, V, K_PAD, BLOCK_V)
    if normalizer is not None:
        tl.store(normalizer + place * K + c, sums, mask=(c < K) & (column == 0))
    if fade is not None:
        tl.store(fade + place, faded, mask=column == 0)


@triton.jit(do_not_specialize=["T", "N"])
def scan_kernel(
    part_state, part_normalizer, fade, state0, normalizer0, cu, state, normalizer, T, N, segment,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one head's state over a sequence's segments: from what each adds to what each starts
    with, in place, and the final state. The first block's program does the same for the normalizer."""
    blocks: tl.constexpr = (K * V + BLOCK - 1) // BLOCK if V > 0 else 1
    block = tl.program_id(0) % blocks
    h, n = (tl.program_id(0) // blocks % H).to(tl.int64), tl.program_id(0) // (blocks * H)
    _, _, length, first = span(n, cu, T, segment)
    place = n.to(tl.int64) * H + h
    e, c = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K_PAD)
    inside, of_key = e < K * V, (c < K) & (block == 0)
    S = tl.zeros([BLOCK], tl.float32)
    if state0 is not None:
        S = tl.load(state0 + place * (K * V) + e, mask=inside, other=0.0)
    if normalizer is not None:
        sums = tl.zeros([K_PAD], tl.float32)
        if normalizer0 is not None:
            sums = tl.load(normalizer0 + place * K + c, mask=of_key, other=0.0)
    for index in range(tl.cdiv(length, segment)):
        at = (first + index) * H + h
        total = 1.0
        if fade is not None:
            total = tl.load(fade + at)
        here = part_state + at * (K * V) + e
        added = tl.load(here, mask=inside, other=0.0)
        tl.store(here, S, mask=inside)
        S = S * total + added
        if normalizer is not None:
            here = part_normalizer + at * K + c
            added = tl.load(here, mask=of_key, other=0.0)
            tl.store(here, sums, mask=of_key)
            sums = sums * total + added
    tl.store(state + place * (K * V) + e, S, mask=inside)
    if normalizer is not None:
        tl.store(normalizer + place * K + c, sums, mask=of_key)


@triton.jit(do_not_specialize=["n"])
def step_kernel(
    q, k, v, decay, beta, state, normalizer, o, n, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, b_b, b_t, b_h,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PAD: tl.constexpr,
    GATE: tl.constexpr, L2: tl.constexpr, BLOCK_V: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """n tokens through one state, in place, token by token and without tl.dot; every sum in float32.

    A program has a (batch row, head) and one of SPLIT shares of V. With a normaliser SPLIT is 1: the blocks
    of V all read it, and one program that walks over them writes it once all have.
    """
    h = (tl.program_id(0) // SPLIT % H).to(tl.int64)
    b = (tl.program_id(0) // (SPLIT * H)).to(tl.int64)
    share: tl.constexpr = (V + SPLIT * BLOCK_V - 1) // (SPLIT * BLOCK_V) * BLOCK_V
    hk, c = h // G, tl.arange(0, K_PAD)
    q += b * q_b + hk * q_h
    k += b * k_b + hk * k_h
    v += b * v_b + h * v_h
    if GATE > 0:
        decay += b * d_b + h * d_h
    if beta is not None:
        beta += b * b_b + h * b_h
    o += (b * n * H + h) * V
    state += (b * H + h) * (K * V)
    if normalizer is not None:
        normalizer += (b * H + h) * K
        sums = tl.load(normalizer + c, mask=c < K, other=0.0)
    for block in range(share // BLOCK_V):
        column = tl.program_id(0) % SPLIT * share + block * BLOCK_V
        e = column + tl.arange(0, BLOCK_V)
        S = load_block(state, 0, K, V, column, V, K_PAD, BLOCK_V)
        if normalizer is not None:
            sums = tl.load(normalizer + c, mask=c < K, other=0.0)
        for t in range(n):
            query = one_key(q, t, 0, n, q_t, K, K_PAD, L2)
            key = one_key(k, t, 0, n, k_t, K, K_PAD, L2)
            value = tl.load(v + tl.cast(t, tl.int64) * v_t + e, mask=e < V, other=0.0).to(tl.float32)
            gate = 1.0
            if GATE == 1:
                gate = tl.exp(tl.maximum(tl.load(decay + tl.cast(t, tl.int64) * d_t), LOWEST))
            elif GATE == 2:
                row = tl.load(decay + tl.cast(t, tl.int64) * d_t + c, mask=c < K, other=0.0)
                gate = tl.exp(tl.maximum(row, LOWEST))
            S = S * of_state(gate, GATE)
            if beta is not None:
                rate = tl.load(beta + tl.cast(t, tl.int64) * b_t)
                value = rate * (value - tl.sum(S * key[:, None], 0))
            S += key[:, None] * value[None, :]
            out = tl.sum(S * query[:, None], 0)
            if normalizer is not None:
                sums = sums * gate + key
                out = out / (tl.sum(sums * query, 0) + 1e-6)
            else:
                out = out * scale
            tl.store(o + tl.cast(t, tl.int64) * (H * V) + e, out.to(o.dtype.element_ty), mask=e < V)
        store_block(state, S, 0, K, V, column, V, K_PAD, BLOCK_V)
    if normalizer is not None:
        tl.debug_barrier()  # every warp has read it
        tl.store(normalizer + c, sums, mask=c < K)
