"""What the Triton kernels of several operations share: chunks of sequences, tiles, products, a softmax."""

import triton
import triton.language as tl

# ---- where a chunk lies ------------------------------------------------------------------------------------


@triton.jit
def span(n, cu, T, C):
    """Sequence n -> batch row, first token, length, number of its first chunk among all chunks.

    Packed, sequence n owns the chunks from cu[n] // C + n up to the same of n + 1: enough of them for any
    length, and their number, T // C + N, follows from shapes alone. Surplus ones hold no token.
    """
    if cu is None:
        b, start, length = n.to(tl.int64), n.to(tl.int64) * 0, T
        first = b * tl.cdiv(T, C)
    else:
        start = tl.load(cu + n).to(tl.int64)
        b, length = start * 0, tl.load(cu + n + 1) - start.to(tl.int32)
        first = start // C + n
    return b, start, length, first


@triton.jit
def owner(chunk, cu, T, N, C):
    """Chunk number -> the sequence that owns it, by `span`'s numbers."""
    if cu is None:
        n = chunk // tl.cdiv(T, C)
    else:
        n, high = chunk * 0, chunk * 0 + N
        while high - n > 1:
            middle = (n + high) // 2
            before = tl.load(cu + middle) // C + middle <= chunk
            n = tl.where(before, middle, n)
            high = tl.where(before, high, middle)
    return n


@triton.jit
def locate(chunk, cu, T, N, C):
    """Chunk number -> batch row, the sequence's first token and length, the chunk's first token in it."""
    n = owner(chunk, cu, T, N, C)
    b, start, length, first = span(n, cu, T, C)
    return b, start, length, (chunk - first.to(tl.int32)) * C


# ---- tiles -------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(base, first, limit, stride, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows first..first+ROWS-1 of a matrix [limit, D] as a tile [ROWS, D_PAD]; zero outside."""
    r, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    inside = (first + r < limit)[:, None]
    if D != D_PAD:
        inside = inside & (d < D)[None, :]
    base += tl.cast(first, tl.int64) * stride
    return tl.load(base + r[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, tile, first, limit, stride, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """The inverse of `load_rows`; rounds to the matrix's dtype."""
    r, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    inside = (first + r < limit)[:, None]
    if D != D_PAD:
        inside = inside & (d < D)[None, :]
    base += tl.cast(first, tl.int64) * stride
    tl.store(base + r[:, None] * stride + d[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_block(
    base, first, limit, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Rows first.. and columns column.. of a matrix [limit, WIDTH] as a tile [ROWS, COLS]; zero outside."""
    r, c = tl.arange(0, ROWS), column + tl.arange(0, COLS)
    inside = (first + r < limit)[:, None]
    if WIDTH % COLS != 0 or WIDTH == 0:
        inside = inside & (c < WIDTH)[None, :]
    base += tl.cast(first, tl.int64) * stride
    return tl.load(base + r[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def store_block(
    base, tile, first, limit, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The inverse of `load_block`; rounds to the matrix's dtype."""
    r, c = tl.arange(0, ROWS), column + tl.arange(0, COLS)
    inside = (first + r < limit)[:, None]
    if WIDTH % COLS != 0 or WIDTH == 0:
        inside = inside & (c < WIDTH)[None, :]
    base += tl.cast(first, tl.int64) * stride
    tl.store(base + r[:, None] * stride + c[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_tokens(base, first, limit, stride, C: tl.constexpr):
    """One float32 number a token, zero outside."""
    r = tl.arange(0, C)
    base += tl.cast(first, tl.int64) * stride
    return tl.load(base + r.to(tl.int64) * stride, mask=first + r < limit, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(base, x, first, limit, stride, C: tl.constexpr):
    """The inverse of `load_tokens`."""
    r = tl.arange(0, C)
    base += tl.cast(first, tl.int64) * stride
    tl.store(base + r.to(tl.int64) * stride, x, mask=first + r < limit)


# ---- arithmetic --------------------------------------------------------------------------------------------


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b with float32 sums. PRECISION, a dtype or one of tl.dot's names for float32, is the operands'."""
    if PRECISION == "bf16":
        c = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRECISION == "fp16":
        c = tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return c


@triton.jit
def accumulate(acc, m, denom, x, unit, v):
    """One key block of the online softmax: scores x [M, N] (hidden ones -inf), values v [N, DV_PAD]."""
    m_new = tl.maximum(m, tl.max(x, 1) * unit)
    # rows that saw nothing yet: 2^(-inf - 0) = 0, no nan
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(x * unit - shift[:, None])
    keep = tl.exp2(m - shift)
    acc = acc * keep[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, m_new, denom * keep + tl.sum(p, 1)
