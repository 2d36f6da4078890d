"""Experts in Triton: the sort of assignments, the tiles of rows, activations, the products, the combination.

Maths, slot s = t k + j the assignment of token t to its j-th expert e:

    h_s = w_gate_up[e] x_t + b_gate_up[e]         a_s = act(h_s)
    y_t = sum_j weights_s (w_down[e] a_s + b_down[e])

Rows: `sort_kernel` counts and orders the slots by expert, stably, so that an expert's rows are one range, and
in the order of tokens. Absent experts' slots are in no range. A segment's rows are a range from the start:
nothing is sorted, and kernels find x and y without `order`. Either kind of range is cut into tiles that
`triton_tiles.span` numbers: their number follows from shapes alone, tile to range is a binary search on the
device, and surplus tiles return at once. So the host never waits, and CUDA graphs can hold a call.

Split, one launch each: `count_kernel` where one program is too few; `sort_kernel`; `up_kernel`, a program per
(tile, block of n): gathers x while it multiplies, gate and up from one tile of x, stores a and, for the
backward, h; `rows_kernel`, per (tile, block of d): the rows of a times w_down, each to its slot;
`combine_kernel`: the weighted sum of a token's k slots, in float32 and in their order. Segments need the two
products only, the second straight to y. The backward runs `rows_kernel` and `combine_kernel` again, for dx.
Programs that follow one another share a tile's rows and walk over the columns: the weights of one expert fit
the L2 cache.

Considered: `rows_kernel` making a from h saves a's n values a row on the way out, and reads 2n for every
block of d on the way in. The scattered store of whole rows costs 20 % on Hopper by SonicMoE's figure where
it is TMA's; these are plain stores, and the combination then reads without an index.

Layout: rows of h are in sorted order (of segments: the tokens'), columns in the order of w_gate_up's rows, so
that only `up_kernel` and `dh_kernel` know of gates and ups: they take a tile of both apart. Matrices have any
strides. Slots and rows are int32, whatever multiplies a stride int64. Rows that are not there are
loaded as 0 and never stored: a NaN stays with the tokens of its expert.
"""

import triton
import triton.language as tl

from ...triton_tiles import owner, span

# ---- the sort ----------------------------------------------------------------------------------------------


@triton.jit
def one_hot(indices, s, stop, E, E_PAD: tl.constexpr):
    """[slots, E_PAD] int32: 1 where slot s < stop goes to expert e."""
    e = tl.arange(0, E_PAD)
    expert = tl.load(indices + s, mask=s < stop, other=-1)
    return ((expert[:, None] == e[None, :]) & (e < E)[None, :]).to(tl.int32)


@triton.jit
def histogram(indices, start, stop, E, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    count = tl.zeros([E_PAD], tl.int32)
    for first in range(start, stop, BLOCK):
        count += tl.sum(one_hot(indices, first + tl.arange(0, BLOCK), stop, E, E_PAD), 0)
    return count


@triton.jit(do_not_specialize=["total", "E", "share"])
def count_kernel(indices, counts, total, E, share, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """counts [programs, E]: slots of each expert among a program's `share`."""
    p, e = tl.program_id(0), tl.arange(0, E_PAD)
    count = histogram(indices, p * share, tl.minimum((p + 1) * share, total), E, E_PAD, BLOCK)
    tl.store(counts + p * E + e, count, mask=e < E)


@triton.jit(do_not_specialize=["total", "E", "share"])
def sort_kernel(
    indices, counts, order, offsets, total, E, share, E_PAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """order: all slots of expert 0, of expert 1, ..., each in rising order; offsets [E+1], where they start.

    Every program adds up the others' counts by itself; a single one has none and counts here.
    """
    p, e = tl.program_id(0), tl.arange(0, E_PAD)
    stop = tl.minimum((p + 1) * share, total)
    before = tl.zeros([E_PAD], tl.int32)  # slots of e in the programs before this one
    if counts is None:
        count = histogram(indices, 0, stop, E, E_PAD, BLOCK)
    else:
        count = tl.zeros([E_PAD], tl.int32)
        for other in range(tl.num_programs(0)):
            row = tl.load(counts + other * E + e, mask=e < E, other=0)
            count += row
            before += tl.where(other < p, row, 0)
    start = tl.cumsum(count, 0) - count
    if p == 0:
        tl.store(offsets + e, start, mask=e < E)
        tl.store(offsets + E, tl.sum(count))
    following = start + before  # where the next slot of e belongs
    for first in range(p * share, stop, BLOCK):
        s = first + tl.arange(0, BLOCK)
        hot = one_hot(indices, s, stop, E, E_PAD)
        at = tl.sum(hot * (following[None, :] + tl.cumsum(hot, 0) - 1), 1)
        tl.store(order + at, s, mask=tl.sum(hot, 1) > 0)
        following += tl.sum(hot, 0)


# ---- where rows lie ----------------------------------------------------------------------------------------


@triton.jit
def tile_rows(tile, order, offsets, experts, ranges, E, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tile -> its expert, -1 if that is absent; whether the tile is surplus; and of each row its number,
    whether it is there, its slot and its token. Of segments (`experts` is given and `order` is not) the last
    two are the number."""
    n = owner(tile, offsets, 0, ranges, BLOCK_M)
    _, start, length, first = span(n, offsets, 0, BLOCK_M)
    m0 = (tile - first.to(tl.int32)) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    inside = m < length
    row = start + m
    if order is None:
        e = tl.load(experts + n).to(tl.int64)
        e = tl.where(e < E, e, -1)
        slot = row
        token = row
    else:
        e = n.to(tl.int64)
        slot = tl.load(order + row, mask=inside, other=0).to(tl.int64)
        token = slot // TOP_K
    return e, m0 >= length, row, inside, slot, token


@triton.jit
def gather(base, rows, inside, first, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first.. of a matrix [.., WIDTH], of the rows at offsets `rows`, as a tile; zero outside."""
    c = first + tl.arange(0, BLOCK)
    mask = inside[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (c < WIDTH)[None, :]
    return tl.load(base + rows[:, None] + c.to(tl.int64)[None, :] * stride, mask=mask, other=0.0)


@triton.jit
def store_columns(base, rows, inside, first, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `gather` with a stride of 1; rounds to the matrix's dtype."""
    c = first + tl.arange(0, BLOCK)
    mask = inside[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (c < WIDTH)[None, :]
    tl.store(base + rows[:, None] + c[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def rows_times(
    left, rows, inside, limit, right, stride_k, columns, real, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of left [.., K] times the columns of right at offsets `columns`; the first `limit` of K."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, limit, BLOCK_K):
        tile = gather(left, rows, inside, k0, 1, K, BLOCK_K)
        matrix = tl.trans(gather(right, columns, real, k0, stride_k, K, BLOCK_K))
        acc = tl.dot(tile, matrix, acc, input_precision="ieee")
    return acc


# ---- gates and ups -----------------------------------------------------------------------------------------


@triton.jit
def columns_of_h(
    column, N: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The columns of h, or rows of w_gate_up, that make BLOCK_N columns of a, and which of them exist: with a
    gate twice as many, in turn or as two halves."""
    if not GATED:
        c = column + tl.arange(0, BLOCK_N)
        real = c < N
    elif INTERLEAVED:
        c = 2 * column + tl.arange(0, 2 * BLOCK_N)
        real = c < 2 * N
    else:
        c = tl.arange(0, 2 * BLOCK_N)
        real = column + c % BLOCK_N < N
        c = column + c % BLOCK_N + c // BLOCK_N * N
    return c, real


@triton.jit
def gate_and_up(tile, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Both parts of a tile of h with the columns of `columns_of_h`."""
    if INTERLEAVED:
        pairs = tl.reshape(tile, (BLOCK_M, BLOCK_N, 2))
    else:
        pairs = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))
    return tl.split(pairs)


@triton.jit
def together(gate, up, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The inverse of `gate_and_up`."""
    pairs = tl.join(gate, up)
    if not INTERLEAVED:
        pairs = tl.permute(pairs, (0, 2, 1))
    return tl.reshape(pairs, (BLOCK_M, 2 * BLOCK_N))


# ---- activations -------------------------------------------------------------------------------------------


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The curve of activation number ACTIVATION of `reference.ACTIVATIONS`, and its slope."""
    if ACTIVATION == 0:  # silu
        s = tl.sigmoid(x)
        value, slope = x * s, s * (1 + x * (1 - s))
    elif ACTIVATION == 3:  # GPT-OSS's silu, of at most 7
        x, past = tl.where(x > 7.0, 7.0, x), x > 7.0
        s = tl.sigmoid(1.702 * x)
        value, slope = x * s, tl.where(past, 0.0, s * (1 + 1.702 * x * (1 - s)))
    elif ACTIVATION == 4:  # relu^2
        r = tl.where(x < 0, 0.0, x)
        value, slope = r * r, 2 * r
    elif ACTIVATION == 1 or ACTIVATION == 5:  # gelu
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value, slope = x * s, s + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # its tanh form: (1 + tanh u) / 2 = sigmoid(2 u)
        s = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        value, slope = x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    return value, slope


@triton.jit
def lift(up, ACTIVATION: tl.constexpr):
    """What the curve of a gate is multiplied by, and its slope: up itself, but of GPT-OSS's SwiGLU."""
    value, slope = up, 1.0
    if ACTIVATION == 3:
        value = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1
        slope = tl.where(tl.abs(up) > 7.0, 0.0, 1.0)
    return value, slope


# ---- products ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ranges", "E"])
def up_kernel(
    x, w, bias, h, a, order, offsets, experts, ranges, E, x_t, w_e, w_r, w_c,
    D: tl.constexpr, N: tl.constexpr, ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a of one tile of rows, BLOCK_N of its n columns, and h unless that is None."""
    GATED: tl.constexpr = ACTIVATION < 4
    H: tl.constexpr = 2 * N if GATED else N
    BLOCK_H: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, column = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    e, surplus, row, inside, _, token = tile_rows(tile, order, offsets, experts, ranges, E, TOP_K, BLOCK_M)
    if surplus | (e < 0):
        return
    c, real = columns_of_h(column, N, GATED, INTERLEAVED, BLOCK_N)
    columns = c.to(tl.int64) * w_r
    w += e * w_e
    acc = rows_times(x, token * x_t, inside, D, w, w_c, columns, real, D, BLOCK_M, BLOCK_H, BLOCK_K)
    if bias is not None:
        acc += tl.load(bias + e * H + c, mask=real, other=0.0).to(tl.float32)[None, :]
    if h is not None:
        at = h + row[:, None] * H + c[None, :]
        tl.store(at, acc.to(h.dtype.element_ty), mask=inside[:, None] & real[None, :])
    if GATED:
        gate, up = gate_and_up(acc, INTERLEAVED, BLOCK_M, BLOCK_N)
        value, _ = activate(gate, ACTIVATION)
        factor, _ = lift(up, ACTIVATION)
        value *= factor
    else:
        value, _ = activate(acc, ACTIVATION)
    store_columns(a, row * N, inside, column, value, N, BLOCK_N)


@triton.jit(do_not_specialize=["ranges", "E"])
def rows_kernel(
    left, w, bias, out, order, offsets, experts, ranges, E, w_e, w_k, w_c,
    K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each row of left [.., K] times its expert's matrix [K, WIDTH], plus bias, to the row's slot of `out`;
    0 to the rows of a segment whose expert is absent."""
    blocks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile, column = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    e, surplus, row, inside, slot, _ = tile_rows(tile, order, offsets, experts, ranges, E, TOP_K, BLOCK_M)
    if surplus:
        return
    limit = K
    if order is None:
        limit = tl.where(e < 0, 0, K)
    c = column + tl.arange(0, BLOCK_N)
    real, columns, w = c < WIDTH, c.to(tl.int64) * w_c, w + e * w_e
    acc = rows_times(left, row * K, inside, limit, w, w_k, columns, real, K, BLOCK_M, BLOCK_N, BLOCK_K)
    if bias is not None:
        acc += tl.load(bias + e * WIDTH + c, mask=real & (e >= 0), other=0.0).to(tl.float32)[None, :]
    store_columns(out, slot * WIDTH, inside, column, acc, WIDTH, BLOCK_N)


@triton.jit(do_not_specialize=["T", "E"])
def combine_kernel(
    rows, indices, weights, out, T, E, D: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_t, the sum of token t's slots that are present, times their weights if there are any."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    t = (tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK_D
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for j in range(TOP_K):
        slot = t * TOP_K + j
        e = tl.load(indices + slot, mask=t < T, other=-1)
        present = (e >= 0) & (e < E)
        row = gather(rows, slot * D, present, column, 1, D, BLOCK_D).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + slot, mask=present, other=0.0)[:, None]
        acc += row
    store_columns(out, t * D, t < T, column, acc, D, BLOCK_D)
