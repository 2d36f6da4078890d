"""Linear attention in Triton: one chunk of a sequence. Its keys, its gates, its triangular inverse.

Gates are natural logarithms g <= 0, one a token (GATE 1) or one a token and key channel (GATE 2); GATE 0 is
none. Inside a chunk of C tokens, with sums over gates,

    into_i = exp(g_0 + .. + g_i)        from the chunk's start to token i, what i reads of the state
    out_of_j = exp(g_j+1 + .. + g_C-1)  from token j to the chunk's end, what the state keeps of j
    total = exp(g_0 + .. + g_C-1)       of the state itself
    pair_ij = exp(g_j+1 + .. + g_i)     from token j to token i >= j

Each exponent has the digits of the gates that lie between, whatever came before: a gate of -50 leaves the
-0.001 beside it alone, where the difference of two float32 sums would not. One gate a token is summed in
float64, [C] numbers, and differences are taken of its two float32 halves. A gate a channel is summed over the
very tokens between, for pairs column by column (`earlier`), from the last column on. A gate below -200 counts
as -200, so that -inf gives zeros and no NaN; e^-200 is zero in float32.
"""

import triton
import triton.language as tl

from ...triton_tiles import load_block, load_tokens, product

LOWEST = tl.constexpr(-200.0)


@triton.jit
def load_keys(
    base, first, limit, stride, C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, L2: tl.constexpr
):
    """Rows of q or k in float32, divided by their norm if L2 -> rows, 1 / norm (1 without)."""
    x = load_block(base, first, limit, stride, 0, K, C, K_PAD).to(tl.float32)
    r = tl.full([C], 1.0, tl.float32)
    if L2:
        r = tl.rsqrt(tl.sum(x * x, 1) + 1e-6)
        x = x * r[:, None]
    return x, r


# ---- gates -------------------------------------------------------------------------------------------------


@triton.jit
def summed(decay, first, length, stride, C: tl.constexpr):
    """g_0 + .. + g_i in float64, for one gate a token."""
    return tl.cumsum(tl.maximum(load_tokens(decay, first, length, stride, C), LOWEST).to(tl.float64), 0)


@triton.jit
def gates(
    decay, first, length, stride, GATE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr
):
    """into, out_of ([C, K_PAD], or [C, 1] for one gate a token), total ([K_PAD], or a scalar)."""
    if GATE == 0:
        into = tl.full([C, 1], 1.0, tl.float32)
        out_of = into
        total = 1.0
    elif GATE == 1:
        sums = summed(decay, first, length, stride, C)
        end = tl.sum(tl.where(tl.arange(0, C) == C - 1, sums, 0.0), 0)
        into = tl.exp(sums.to(tl.float32))[:, None]
        out_of = tl.exp((end - sums).to(tl.float32))[:, None]
        total = tl.exp(end.to(tl.float32))
    else:
        end = tl.minimum(length, first + C)
        g = tl.maximum(load_block(decay, first, end, stride, 0, K, C, K_PAD), LOWEST)
        after = tl.maximum(load_block(decay, first + 1, end, stride, 0, K, C, K_PAD), LOWEST)
        into = tl.exp(tl.cumsum(g, 0))
        out_of = tl.exp(tl.cumsum(after, 0, reverse=True))
        total = tl.exp(tl.sum(g, 0))
    return into, out_of, total


@triton.jit
def of_state(total, GATE: tl.constexpr):
    """`total` as a factor of a state's rows."""
    if GATE == 2:
        total = total[:, None]
    return total


@triton.jit
def pairs(decay, first, length, stride, GATE: tl.constexpr, C: tl.constexpr):
    """pair [C, C] of one gate a token; zero for j > i."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    pair = tl.where(i >= j, 1.0, 0.0)
    if GATE == 1:
        sums = summed(decay, first, length, stride, C)
        high = sums.to(tl.float32)
        low = (sums - high.to(tl.float64)).to(tl.float32)
        between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        pair = tl.exp(tl.where(i >= j, between, LOWEST))
    return pair


@triton.jit
def earlier(between, decay, j, first, length, stride, C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr):
    """Gates of every channel from token j to tokens i >= j, [C, K_PAD], out of the same of token j + 1."""
    i, c = tl.arange(0, C)[:, None], tl.arange(0, K_PAD)
    row = decay + tl.cast(first + j + 1, tl.int64) * stride + c
    g = tl.load(row, mask=(c < K) & (j + 1 < C) & (first + j + 1 < length), other=0.0)
    return tl.where(i > j, between + tl.maximum(g, LOWEST)[None, :], 0.0)


@triton.jit
def one_key(base, j, first, length, stride, K: tl.constexpr, K_PAD: tl.constexpr, L2: tl.constexpr):
    """Row j of a chunk's keys, [K_PAD], as `load_keys` gives it."""
    c = tl.arange(0, K_PAD)
    row = base + tl.cast(first + j, tl.int64) * stride + c
    x = tl.load(row, mask=(c < K) & (first + j < length), other=0.0).to(tl.float32)
    if L2:
        x = x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)
    return x


# ---- inverse -----------------------------------------------------------------------------------------------


@triton.jit
def inverse(L, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular L, by doubling its diagonal blocks.

    With the inverses X of the blocks of size s on the diagonal, and B the blocks below them that complete
    blocks of size 2s, those have the inverses X - X B X (the inverse of a 2 x 2 block triangle).
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    X = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -L, 0.0))
    for n in tl.static_range(1, 7):
        if 2**n < C:
            below = (i // 2 ** (n + 1) == j // 2 ** (n + 1)) & (i // 2**n > j // 2**n)
            X -= product(product(X, tl.where(below, L, 0.0), PRECISION), X, PRECISION)
    return X
