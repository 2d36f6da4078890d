"""Hybrid attention in Triton: the window's geometry, the states of far keys, forward and decode step.

Maths, one query row i of one head, in units of log2 so that the GPU's exp2 does the work (x = q.k,
u = scale * log2(e), r the factor `mix`):

    m = max over near j of x_j u      p_j = r 2^(x_j u - m), near j      a_j = phi_q . phi_k_j, far j
    o = (sum p_j v_j + sum a_j v_j) / (sum p_j + sum a_j + 1e-6)

The near keys come first, by the online softmax, whose rescaling ends with the true m and leaves the far part
alone. The far keys follow, from a state S = sum phi_k_j v_j^T with z = sum phi_k_j: keys are cut into
segments of SEG, a state stands before each, and a tile of queries takes the state of the segment in which its
first near key lies. Far keys from there on, at most SEG + BLOCK_M (with block alignment SEG + W), are
multiplied pair by pair: so the window need not fit the segments.

Split, three launches: `segment_kernel`, what each segment adds to the state, a program per (segment, head,
block of F, block of V); `scan_kernel`, from what each adds to what it starts with, in place, and the final
state; `forward_kernel`, a program per (query tile, query head). Where no key is far the first two are left
out. The states are float32, at most 128 numbers a token and key-value head (`state_spacing`), and serve the
backward again. Considered: one sweep of the keys with the state in registers, as linear attention does. It
has F V / BLOCK programs a head, each waiting for the one before, and cannot hold a state of 256 x 256.

Operands of products with a far weight or a state are rounded as `triton_support.OPERANDS` says: a far weight
may pass float16's range. Sums, weights' sums and statistics are float32.

Layout: tensors [B, T, H, ...] with any strides but the last, which is 1; states [slots, H, F V + F], each
state followed by its z; statistics [B, Hq, T] float32. Head sizes are padded to a power of two inside the
tile. Positions inside a sequence are int32; whatever multiplies a stride is int64. Packed sequences number
tiles and segments as `triton_tiles.span` says.
"""

import triton
import triton.language as tl

from ...triton_tiles import accumulate, load_block, load_rows, locate, owner, product, span, store_rows

# ---- the window --------------------------------------------------------------------------------------------


@triton.jit
def first_near(i, W, ALIGNED: tl.constexpr):
    """The first key that is near to position i >= 0; may be negative."""
    return i // W * W - W if ALIGNED else i - W + 1


@triton.jit
def first_beyond(j, W, ALIGNED: tl.constexpr):
    """The first position to which every key before j is far, j >= 1."""
    return (j + W - 1) // W * W + W if ALIGNED else j + W - 1


@triton.jit
def far_keys(length, W, ALIGNED: tl.constexpr):
    """How many keys are far to the last query of a sequence."""
    return tl.maximum(first_near(tl.maximum(length - 1, 0), W, ALIGNED), 0)


@triton.jit
def query_tile(
    m0,
    length,
    offset,
    W,
    ALIGNED: tl.constexpr,
    SEG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of queries m0.. of a sequence -> i0, position of the first; the keys that some of them see near, from
    `low` on (a multiple of BLOCK_N) to `high`; `inner`, from which on they are near to all; the segment whose
    state they read. The keys from that segment to `inner` are far to some. Nothing for a surplus tile."""
    i0 = m0 + offset
    last = tl.minimum(m0 + BLOCK_M, length) + offset - 1
    real = m0 < length
    first = tl.where(real, tl.maximum(first_near(i0, W, ALIGNED), 0), 0)
    inner = tl.where(real, tl.maximum(first_near(last, W, ALIGNED), 0), 0)
    high = tl.where(real, last + 1, 0)
    return i0, first // BLOCK_N * BLOCK_N, high, inner, first // SEG


# ---- states ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["S", "T", "N", "reach", "W"])
def segment_kernel(
    phi, x, den, delta, states, cu, S, T, N, reach, W, f_b, f_t, f_h, x_b, x_t, x_h,
    H: tl.constexpr, G: tl.constexpr, F: tl.constexpr, V: tl.constexpr, SEG: tl.constexpr,
    ALIGNED: tl.constexpr, STATE0: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of what one segment adds to the state, [F, V] with z [F]: sums of phi_k v^T and phi_k.

    With `den` the backward's, to the state's gradient: sums over the queries, of all G heads, that read the
    state before this segment, of phi_q y^T and -phi_q delta / den, where x = do and y = do / den.
    """
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = blocks_v * ((F + BLOCK_F - 1) // BLOCK_F)
    block, h = tl.program_id(0) % blocks, (tl.program_id(0) // blocks % H).to(tl.int64)
    slot = tl.program_id(0) // (blocks * H)
    feature, column = block // blocks_v * BLOCK_F, block % blocks_v * BLOCK_V
    n = owner(slot, cu, reach, N, SEG)
    _, _, _, first_slot = span(n, cu, reach, SEG)
    b, start, length, _ = span(n, cu, S, SEG)
    j0 = (slot - first_slot.to(tl.int32)) * SEG
    if den is None:
        low, high = j0, tl.minimum(j0 + SEG, far_keys(length, W, ALIGNED))
    else:
        low, high = first_beyond(j0, W, ALIGNED), tl.minimum(first_beyond(j0 + SEG, W, ALIGNED), length)
        low = tl.where(j0 > 0, low, 0 if STATE0 else high)
        low, high = tl.maximum(low - (S - T), 0), high - (S - T)  # query t stands at position t + S - T
    steps = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    phi += b * f_b + start * f_t + h * G * f_h
    x += b * x_b + start * x_t + h * G * x_h
    row = (b * H + h) * G * T + start
    acc = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_F], tl.float32)
    for step in range(G * steps):
        g = tl.cast(step // steps, tl.int64)
        r0 = low + step % steps * BLOCK_N
        phi_tile = load_block(phi + g * f_h, r0, high, f_t, feature, F, BLOCK_N, BLOCK_F)
        x_tile = load_block(x + g * x_h, r0, high, x_t, column, V, BLOCK_N, BLOCK_V)
        if den is None:
            acc = tl.dot(tl.trans(phi_tile), x_tile, acc, input_precision="ieee")
            z += tl.sum(phi_tile.to(tl.float32), 0)
        else:
            r = r0 + tl.arange(0, BLOCK_N)
            inverse = 1.0 / tl.load(den + row + g * T + r, mask=r < high, other=1.0)
            row_delta = tl.load(delta + row + g * T + r, mask=r < high, other=0.0) * inverse
            acc += product(tl.trans(phi_tile), x_tile.to(tl.float32) * inverse[:, None], PRECISION)
            z -= tl.sum(phi_tile.to(tl.float32) * row_delta[:, None], 0)
    states += (slot.to(tl.int64) * H + h) * (F * V + F)
    f, c = feature + tl.arange(0, BLOCK_F), column + tl.arange(0, BLOCK_V)
    tl.store(states + f[:, None] * V + c[None, :], acc, mask=(f < F)[:, None] & (c < V)[None, :])
    tl.store(states + F * V + f, z, mask=(f < F) & (column == 0))


@triton.jit(do_not_specialize=["S", "N", "reach", "W"])
def scan_kernel(
    states, state0, normalizer0, state, normalizer, cu, S, N, reach, W,
    H: tl.constexpr, F: tl.constexpr, V: tl.constexpr, SEG: tl.constexpr, ALIGNED: tl.constexpr,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one head's states, STEPS segments at a time: from what each adds to the sum of those
    before it (REVERSE: after it) and of state0, in place; the sum of all is the final state."""
    SIZE: tl.constexpr = F * V + F
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    h, n = (tl.program_id(0) // blocks % H).to(tl.int64), tl.program_id(0) // (blocks * H)
    _, _, _, first = span(n, cu, reach, SEG)
    _, _, length, _ = span(n, cu, S, SEG)
    place = n.to(tl.int64) * H + h
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    of_state, of_normalizer = e < F * V, (e >= F * V) & (e < SIZE)
    carry = tl.zeros([BLOCK], tl.float32)
    if state0 is not None:
        carry += tl.load(state0 + place * (F * V) + e, mask=of_state, other=0.0)
    if normalizer0 is not None:
        carry += tl.load(normalizer0 + place * F + e - F * V, mask=of_normalizer, other=0.0)
    slots = far_keys(length, W, ALIGNED) // SEG + 1
    rows = tl.arange(0, STEPS)
    for r0 in range(0, slots, STEPS):
        r = r0 + rows
        if REVERSE:
            here, before = slots - 1 - r, slots - r
        else:
            here, before = r, r - 1
        here = states + ((first + here) * H + h)[:, None] * SIZE + e[None, :]
        before = states + ((first + before) * H + h)[:, None] * SIZE + e[None, :]
        inside = (r < slots)[:, None] & (e < SIZE)[None, :]
        added = tl.load(here, mask=inside, other=0.0)
        x = tl.load(before, mask=inside & (rows > 0)[:, None], other=0.0)
        x = tl.where((rows > 0)[:, None], x, carry[None, :])
        tl.debug_barrier()  # every warp has read them
        tl.store(here, tl.cumsum(x, 0), mask=inside)
        carry += tl.sum(added, 0)
    if state is not None:
        tl.store(state + place * (F * V) + e, carry, mask=of_state)
        tl.store(normalizer + place * F + e - F * V, carry, mask=of_normalizer)


# ---- forward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "S", "N", "reach", "W"])
def forward_kernel(
    q, k, v, phi_q, phi_k, mix, states, cu, o, shift, top, den, T, S, N, reach, W, unit,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, fq_b, fq_t, fq_h, fk_b, fk_t, fk_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    D_PAD: tl.constexpr, F_PAD: tl.constexpr, V_PAD: tl.constexpr, SEG: tl.constexpr,
    ALIGNED: tl.constexpr, STATE0: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """o of one tile of queries, one head; for a backward m (shift), the first key at it (top) and den."""
    HQ: tl.constexpr = H * G
    tiles = tl.num_programs(0) // HQ
    tile, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, start, length, m0 = locate(tile, cu, T, N, BLOCK_M)
    _, _, _, slot = span(owner(tile, cu, T, N, BLOCK_M), cu, reach, SEG)
    i0, low, high, inner, segment = query_tile(m0, length, S - T, W, ALIGNED, SEG, BLOCK_M, BLOCK_N)
    q += b * q_b + start * q_t + h * q_h
    k += b * k_b + start * k_t + h // G * k_h
    v += b * v_b + start * v_t + h // G * v_h
    phi_q += b * fq_b + start * fq_t + h * fq_h
    phi_k += b * fk_b + start * fk_t + h // G * fk_h
    i = i0 + tl.arange(0, BLOCK_M)[:, None]
    first = first_near(i, W, ALIGNED)

    # ---- near keys
    q_tile = load_rows(q, m0, length, q_t, BLOCK_M, D, D_PAD)
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denom = tl.zeros([BLOCK_M], tl.float32)
    if top is not None:
        at = tl.zeros([BLOCK_M], tl.int32)
    for n0 in range(low, high, BLOCK_N):
        k_tile = load_rows(k, n0, high, k_t, BLOCK_N, D, D_PAD)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if (n0 < inner) | (n0 + BLOCK_N - 1 > i0):
            j = n0 + tl.arange(0, BLOCK_N)[None, :]
            x = tl.where((j >= first) & (j <= i), x, float("-inf"))
        v_tile = load_rows(v, n0, high, v_t, BLOCK_N, V, V_PAD)
        before = m
        acc, m, denom = accumulate(acc, m, denom, x, unit, v_tile)
        if top is not None:
            at = tl.where(m > before, n0 + tl.argmax(x, 1), at)
    if mix is not None:
        gain = tl.load(mix + h)
        acc *= gain
        denom *= gain

    # ---- far keys, pair by pair
    far_tile = load_rows(phi_q, m0, length, fq_t, BLOCK_M, F, F_PAD)
    for n0 in range(segment * SEG, inner, BLOCK_N):
        phi_tile = load_rows(phi_k, n0, high, fk_t, BLOCK_N, F, F_PAD)
        a = tl.dot(far_tile, tl.trans(phi_tile), input_precision="ieee")
        if n0 + BLOCK_N > low:
            a = tl.where(n0 + tl.arange(0, BLOCK_N)[None, :] < first, a, 0.0)
        v_tile = load_rows(v, n0, high, v_t, BLOCK_N, V, V_PAD)
        acc += product(a, v_tile, PRECISION)
        denom += tl.sum(a, 1)

    # ---- far keys before, by their state
    features = F
    if not STATE0:
        features = tl.where(segment > 0, F, 0)  # before the first segment there is nothing
    states += ((slot + segment) * H + h // G) * (F * V + F)
    for f in range(0, features, BLOCK_S):
        state = load_rows(states, f, F, V, BLOCK_S, V, V_PAD)
        part = load_block(phi_q, m0, length, fq_t, f, F, BLOCK_M, BLOCK_S)
        acc += product(part, state, PRECISION)
        c = f + tl.arange(0, BLOCK_S)
        z = tl.load(states + F * V + c, mask=c < F, other=0.0)
        denom += tl.sum(part.to(tl.float32) * z[None, :], 1)

    denom += 1e-6
    store_rows(
        o + (b * T + start) * (HQ * V) + h * V, acc / denom[:, None], m0, length, HQ * V, BLOCK_M, V, V_PAD
    )
    if top is not None:
        r = m0 + tl.arange(0, BLOCK_M)
        row, inside = (b * HQ + h) * T + start + r, r < length
        tl.store(shift + row, m, mask=inside)
        tl.store(top + row, at + start.to(tl.int32), mask=inside)
        tl.store(den + row, denom, mask=inside)


# ---- decode ------------------------------------------------------------------------------------------------


@triton.jit
def load_keys(
    ring, new, j0, end, origin, head, R, ring_stride, stride, column,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Keys j0.. before `end`: those before `origin` from their slots, the others from the new tokens."""
    j, c = (j0 + tl.arange(0, ROWS))[:, None], (column + tl.arange(0, COLS))[None, :]
    slot = ((head + j - origin + R) % R).to(tl.int64)
    inside = (j < end) & (c < WIDTH)
    old = tl.load(ring + slot * ring_stride + c, mask=inside & (j < origin), other=0.0)
    fresh = tl.load(new + (j - origin).to(tl.int64) * stride + c, mask=inside & (j >= origin), other=0.0)
    return tl.where(j < origin, old, fresh)


@triton.jit(do_not_specialize=["n", "W"])
def step_kernel(
    q, k, v, phi_q, phi_k, mix, o, k_ring, v_ring, phi_ring, state, normalizer, position, n, W, unit,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, fq_b, fq_t, fq_h, fk_b, fk_t, fk_h,
    kr_b, kr_h, kr_w, vr_b, vr_h, vr_w, fr_b, fr_h, fr_w, p_b, p_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    D_PAD: tl.constexpr, F_PAD: tl.constexpr, V_PAD: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Append n tokens to one (batch, key-value head)'s ring and attend; its G query heads are rows t * G + g.

    Everything is read before anything is written: near keys from ring and arguments, the state as it was
    before the step, and pair by pair the keys that have become far since. Then those enter the state, then
    the new tokens the ring, with a barrier before each. Positions are counted from two windows back or less
    (`origin` is the first new token's): that changes no block. Each program has its own counter.
    """
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    position += b * p_b + h * p_h
    start = tl.load(position)
    R = 2 * W if ALIGNED else W
    origin = (start % W).to(tl.int32) + W
    head = (start % R).to(tl.int32)  # the first new token's slot
    oldest = origin - tl.minimum(start, R).to(tl.int32)
    known = tl.maximum(first_near(origin - 1, W, ALIGNED), oldest)  # the state has the keys before
    q += b * q_b + h * G * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    phi_q += b * fq_b + h * G * fq_h
    phi_k += b * fk_b + h * fk_h
    k_ring += b * kr_b + h * kr_h
    v_ring += b * vr_b + h * vr_h
    phi_ring += b * fr_b + h * fr_h
    state += (b * H + h) * (F * V)
    normalizer += (b * H + h) * F
    o += (b * n * H + h) * (G * V)
    d, e, c = tl.arange(0, D_PAD)[None, :], tl.arange(0, V_PAD)[None, :], tl.arange(0, F_PAD)[None, :]

    for r0 in range(0, n * G, BLOCK_M):
        r = r0 + tl.arange(0, BLOCK_M)
        t, g = (r // G)[:, None], (r % G)[:, None]
        i, end = origin + t, origin + tl.minimum((r0 + BLOCK_M - 1) // G + 1, n)
        first = first_near(i, W, ALIGNED)
        q_tile = tl.load(q + t.to(tl.int64) * q_t + g * q_h + d, mask=(t < n) & (d < D), other=0.0)
        acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        denom = tl.zeros([BLOCK_M], tl.float32)
        for j0 in range(tl.maximum(first_near(origin + r0 // G, W, ALIGNED), oldest), end, BLOCK_N):
            k_tile = load_keys(k_ring, k, j0, end, origin, head, R, kr_w, k_t, 0, D, BLOCK_N, D_PAD)
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            j = j0 + tl.arange(0, BLOCK_N)[None, :]
            x = tl.where((j >= first) & (j <= i), x, float("-inf"))
            v_tile = load_keys(v_ring, v, j0, end, origin, head, R, vr_w, v_t, 0, V, BLOCK_N, V_PAD)
            acc, m, denom = accumulate(acc, m, denom, x, unit, v_tile)
        if mix is not None:
            gain = tl.load(mix + h * G + r % G)
            acc *= gain[:, None]
            denom *= gain
        rows = phi_q + t.to(tl.int64) * fq_t + g * fq_h
        far_tile = tl.load(rows + c, mask=(t < n) & (c < F), other=0.0)
        for j0 in range(known, first_near(end - 1, W, ALIGNED), BLOCK_N):
            phi_tile = load_keys(phi_ring, phi_k, j0, end, origin, head, R, fr_w, fk_t, 0, F, BLOCK_N, F_PAD)
            a = tl.dot(far_tile, tl.trans(phi_tile), input_precision="ieee")
            a = tl.where(j0 + tl.arange(0, BLOCK_N)[None, :] < first, a, 0.0)
            v_tile = load_keys(v_ring, v, j0, end, origin, head, R, vr_w, v_t, 0, V, BLOCK_N, V_PAD)
            acc += product(a, v_tile, PRECISION)
            denom += tl.sum(a, 1)
        for f in range(0, F, BLOCK_S):
            S = load_rows(state, f, F, V, BLOCK_S, V, V_PAD)
            feature = f + tl.arange(0, BLOCK_S)
            part = tl.load(rows + feature[None, :], mask=(t < n) & (feature < F)[None, :], other=0.0)
            acc += product(part, S, PRECISION)
            z = tl.load(normalizer + feature, mask=feature < F, other=0.0)
            denom += tl.sum(part.to(tl.float32) * z[None, :], 1)
        acc = acc / (denom + 1e-6)[:, None]
        o_rows = o + t.to(tl.int64) * (H * G * V) + g * V
        tl.store(o_rows + e, acc.to(o.dtype.element_ty), mask=(t < n) & (e < V))

    tl.debug_barrier()
    after = first_near(origin + n - 1, W, ALIGNED)
    for f in range(0, tl.where(after > known, F, 0), BLOCK_S):
        S = load_rows(state, f, F, V, BLOCK_S, V, V_PAD)
        feature = f + tl.arange(0, BLOCK_S)
        z = tl.load(normalizer + feature, mask=feature < F, other=0.0)
        for j0 in range(known, after, 16):
            phi_tile = load_keys(phi_ring, phi_k, j0, after, origin, head, R, fr_w, fk_t, f, F, 16, BLOCK_S)
            v_tile = load_keys(v_ring, v, j0, after, origin, head, R, vr_w, v_t, 0, V, 16, V_PAD)
            S = tl.dot(tl.trans(phi_tile), v_tile, S, input_precision="ieee")
            z += tl.sum(phi_tile.to(tl.float32), 0)
        store_rows(state, S, f, F, V, BLOCK_S, V, V_PAD)
        tl.store(normalizer + feature, z, mask=feature < F)

    tl.debug_barrier()
    for n0 in range(tl.maximum(n - R, 0), n, BLOCK_N):  # of more than R tokens only the last R have a slot
        t = n0 + tl.arange(0, BLOCK_N)[:, None]
        slot = ((head + t) % R).to(tl.int64)
        k_tile = load_rows(k, n0, n, k_t, BLOCK_N, D, D_PAD)
        v_tile = load_rows(v, n0, n, v_t, BLOCK_N, V, V_PAD)
        phi_tile = load_rows(phi_k, n0, n, fk_t, BLOCK_N, F, F_PAD)
        tl.store(k_ring + slot * kr_w + d, k_tile, mask=(t < n) & (d < D))
        tl.store(v_ring + slot * vr_w + e, v_tile, mask=(t < n) & (e < V))
        tl.store(phi_ring + slot * fr_w + c, phi_tile, mask=(t < n) & (c < F))
    tl.store(position, start + n)
