"""Causal convolution in Triton: the forward kernel and the decode step.

Maths, per channel: e = initial state (W-1 tokens, or zeros), then x; z_t = bias + sum_w weight[w] e_{t+w};
y = z or z / (1 + exp(-z)). Accumulated in float32.

Layout: x [B, T, C] with any strides but the last, which is 1; weight [C, W] and states [N, W-1, C]
contiguous. What multiplies a stride is int64.

Split: a program has BLOCK_T tokens of one sequence by BLOCK_C channels, and loads the W shifted tiles that
its sum needs; all but the first come from L1, so device memory sees each token once, plus W-1 of BLOCK_T at
the tile's edge. The program of a sequence's first tile also writes its last state: one launch in all.

Packed sequences: each sequence is lengthened by EXTRA rows (0 forward, W-1 backward); tile t belongs to the
sequence n with begin[n] // BLOCK + n <= t < the same of n+1. Those ranges rise strictly, so every sequence,
an empty one too, has a first tile, and the grid follows from shapes alone: no host synchronisation.
"""

import triton
import triton.language as tl


@triton.jit
def locate(tile, cu, T, N, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
    """Tile of the grid -> its sequence, first row in it, the sequence's first token and number of tokens."""
    if cu is None:
        tiles = tl.maximum(tl.cdiv(T + EXTRA, BLOCK), 1)
        n, first, start, length = tile // tiles, (tile % tiles) * BLOCK, tile * 0, T
    else:
        n, high = tile * 0, tile * 0 + N
        while high - n > 1:
            middle = (n + high) // 2
            before = (tl.load(cu + middle) + middle * EXTRA) // BLOCK + middle <= tile
            n = tl.where(before, middle, n)
            high = tl.where(before, high, middle)
        start = tl.load(cu + n)
        first = (tile - ((start + n * EXTRA) // BLOCK + n)) * BLOCK
        length = tl.load(cu + n + 1) - start
    return n, first, start.to(tl.int64), length


@triton.jit
def load_tokens(x, initial, position, length, c, x_t, C, W: tl.constexpr):
    """Tokens `position` (a column) of a sequence, channels c (a row), in float32; those before it from the
    initial state, zeros after it and where there is none. x and initial point at the sequence."""
    inside = (position >= 0) & (position < length) & (c < C)
    e = tl.load(x + position.to(tl.int64) * x_t + c, mask=inside, other=0.0).to(tl.float32)
    if initial is not None:
        row = position + (W - 1)
        past = tl.load(initial + row * C + c, mask=(row >= 0) & (position < 0) & (c < C), other=0.0)
        e += past.to(tl.float32)
    return e


@triton.jit
def load_tap(weight, c, w, C, W: tl.constexpr):
    return tl.load(weight + c.to(tl.int64) * W + w, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z); at -inf e^-z is inf and the result 0."""
    return 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def pre_activation(x, initial, weight, bias, t, length, c, x_t, C, W: tl.constexpr):
    """z of tokens t (a column)."""
    z = tl.zeros([t.shape[0], c.shape[1]], tl.float32)
    if bias is not None:
        z += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    for w in tl.static_range(W):
        e = load_tokens(x, initial, t + (w - (W - 1)), length, c, x_t, C, W)
        z += load_tap(weight, c, w, C, W) * e
    return z


@triton.jit(do_not_specialize=["T", "N"])
def forward_kernel(
    x, weight, bias, initial, y, state, cu, T, N, x_b, x_t, C,
    W: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of one tile of tokens and channels; with a first tile also the sequence's last state."""
    columns = tl.cdiv(C, BLOCK_C)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    n, first, start, length = locate(tile, cu, T, N, 0, BLOCK_T)
    b = n.to(tl.int64) if cu is None else start * 0
    x += b * x_b + start * x_t
    if initial is not None:
        initial += n.to(tl.int64) * (W - 1) * C
    t = first + tl.arange(0, BLOCK_T)[:, None]
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    z = pre_activation(x, initial, weight, bias, t, length, c, x_t, C, W)
    if SILU:
        z *= sigmoid(z)
    y += (b * T + start) * C
    tl.store(y + t.to(tl.int64) * C + c, z.to(y.dtype.element_ty), mask=(t < length) & (c < C))
    if state is not None and first == 0:
        state += n.to(tl.int64) * (W - 1) * C
        column_c = column * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        for j in tl.static_range(W - 1):
            position = length - (W - 1) + j + tl.zeros([1, 1], tl.int32)
            e = load_tokens(x, initial, position, length, column_c, x_t, C, W)
            tl.store(state + j * C + column_c, e.to(state.dtype.element_ty), mask=column_c < C)


@triton.jit(do_not_specialize=["n"])
def step_kernel(
    x, state, weight, bias, y, n, x_b, x_t, s_b, s_t, C,
    W: tl.constexpr, SILU: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """n tokens behind the state of one batch entry, BLOCK_C channels; then the state moves on.

    The new state is read before the barrier and written after it: a fast warp must not overwrite what a slow
    one has yet to read.
    """
    columns = tl.cdiv(C, BLOCK_C)
    b, column = (tl.program_id(0) // columns).to(tl.int64), tl.program_id(0) % columns
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    x += b * x_b
    state += b * s_b
    y += b * n * C
    for t in range(n):
        z = tl.zeros([1, BLOCK_C], tl.float32)
        if bias is not None:
            z += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        for w in tl.static_range(W):
            u = t + w
            old = tl.load(state + u * s_t + c, mask=(c < C) & (u < W - 1), other=0.0)
            at = tl.maximum(u - (W - 1), 0)
            new = tl.load(x + tl.cast(at, tl.int64) * x_t + c, mask=(c < C) & (u >= W - 1), other=0.0)
            z += load_tap(weight, c, w, C, W) * (old.to(tl.float32) + new.to(tl.float32))
        if SILU:
            z *= sigmoid(z)
        tl.store(y + tl.cast(t, tl.int64) * C + c, z.to(y.dtype.element_ty), mask=c < C)
    j = tl.arange(0, BLOCK_W)[:, None]
    u = n + j
    kept = (j < W - 1) & (c < C)
    old = tl.load(state + u * s_t + c, mask=kept & (u < W - 1), other=0.0)
    at = tl.maximum(u - (W - 1), 0).to(tl.int64)
    new = tl.load(x + at * x_t + c, mask=kept & (u >= W - 1), other=0.0)
    tl.debug_barrier()
    tl.store(state + j * s_t + c, tl.where(u < W - 1, old, new), mask=kept)
