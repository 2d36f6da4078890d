"""Routing in Triton: scores to experts, their weights and statistics, forward and backward.

Maths: that of `reference.route`, row by row and in float32; without a bias the logits themselves choose, so
that no rounding decides a tie. One row's gradients in closed form, s the softmax over the row, g the
gradient of a weight (times the scale), u that of the mean probabilities over T, w the weights without scale:

    weights of chosen logits or renormalised softmax    dx_j = w_j (g_j - sum w g)
    weights of the plain softmax, probabilities         dx_e = s_e (G_e - sum s G), G = u + g at the chosen
    weights of sigmoids o, S their sum                  do_j = (g_j - sum w g) / S, or g_j; dx = do o (1 - o)
    probabilities p of sigmoids, S the sum of all       do_e = (u_e - sum p u) / S
    mean squared logsumexp                              dx_e = s_e 2 lse dz / T

Layout: a program per block of rows, all E experts of a row side by side, padded to a power of two with -inf.
With groups the columns are [groups, experts of one], both padded, so that a reshape shows the groups; column
numbers rise with the experts', and ties fall to the lower one. The top k are k maxima in turn. What is summed
over tokens is summed in each block and stored, a row a block; `finish_kernel` adds these rows in order.

Split, two launches forward and one backward. Considered: a sort of the row, or the scores' bits with the
index in the lowest ones (SonicMoE): the one is more work for k of at most 16, the other rounds the scores.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-20)  # as the reference's


@triton.jit
def load_logits(logits, mask, t, e, real, T, stride, mask_t, mask_e):
    """Logits of tokens t and experts e, -inf where an expert is forbidden or `real` says there is none."""
    inside = (t < T)[:, None] & real[None, :]
    x = tl.load(logits + t.to(tl.int64)[:, None] * stride + e[None, :], mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    if mask is not None:
        at = mask + t.to(tl.int64)[:, None] * mask_t + e[None, :] * mask_e
        x = tl.where(tl.load(at, mask=inside, other=0) != 0, x, float("-inf"))
    return x


@triton.jit
def logsumexp(x):
    """Over axis 1; NaN where one is, 0 of nothing."""
    top = tl.max(x, 1)
    top = tl.where((top == float("inf")) | (top == float("-inf")), 0.0, top)
    total = tl.sum(tl.exp(x - top[:, None]), 1)
    return top + tl.log(tl.where(total == 0, 1.0, total))


@triton.jit
def ranked(choice, kept):
    """Numbers to compare: NaN is the greatest, what is not kept the least."""
    return tl.where(kept, tl.where(choice == choice, choice, float("inf")), float("-inf"))


@triton.jit
def best_groups(choice, TOP_GROUPS: tl.constexpr, ROWS: tl.constexpr, G_PAD: tl.constexpr, PAD: tl.constexpr):
    """choice [ROWS, G_PAD PAD] -> is this expert in the groups whose two best choices sum highest?"""
    grouped = tl.reshape(choice, (ROWS, G_PAD, PAD))
    best, first = tl.max(grouped, 2), tl.argmax(grouped, 2)
    others = tl.where(tl.arange(0, PAD)[None, None, :] == first[:, :, None], float("-inf"), grouped)
    second = tl.max(others, 2)
    value = best + tl.where(second == float("-inf"), 0.0, second)
    group = tl.arange(0, G_PAD)[None, :]
    kept = tl.zeros([ROWS, G_PAD], tl.int32)
    for _ in range(TOP_GROUPS):
        chosen = group == tl.argmax(value, 1)[:, None]
        kept = tl.where(chosen, 1, kept)
        value = tl.where(chosen, float("-inf"), value)  # what is -inf already has nothing to offer
    kept = tl.broadcast_to(kept[:, :, None], (ROWS, G_PAD, PAD))
    return tl.reshape(kept, (ROWS, G_PAD * PAD)) != 0


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits, bias, mask, indices, weights, lse, sums, counts, T, stride, mask_t, mask_e, scale,
    E: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, K_PAD: tl.constexpr, G_PAD: tl.constexpr,
    PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of rows: indices, weights, logsumexp; its sums of p, lse^2 and entropy, its counts."""
    MEMBERS: tl.constexpr = E // GROUPS
    block = tl.program_id(0)
    t, c = block * ROWS + tl.arange(0, ROWS), tl.arange(0, G_PAD * PAD)
    e = c // PAD * MEMBERS + c % PAD
    real = (c % PAD < MEMBERS) & (c // PAD < GROUPS)
    x = load_logits(logits, mask, t, e, real, T, stride, mask_t, mask_e)
    allowed = x != float("-inf")
    row_lse = logsumexp(x)
    p = tl.exp(x - row_lse[:, None])
    if SCORE == 0:
        s = p
    elif SCORE == 1:
        s = tl.sigmoid(x)
        p = s / (tl.sum(s, 1) + EPS)[:, None]
    else:
        s = x
    kept, choice = allowed, s
    if bias is not None:
        choice += tl.load(bias + e, mask=real, other=0.0)[None, :]
    if GROUPS > 1:
        kept = kept & best_groups(ranked(choice, allowed), TOP_GROUPS, ROWS, G_PAD, PAD)
    if bias is None:
        choice = x  # the order of the scores, without the ties that rounding makes
    choice = ranked(choice, kept)

    # ---- the best, one after the other
    logit: tl.constexpr = SCORE == 2 or (SCORE == 0 and RENORMALIZE)  # weights are a softmax of the chosen
    k = tl.arange(0, K_PAD)[None, :]
    chosen = tl.full([ROWS, K_PAD], float("-inf") if logit else 0.0, tl.float32)
    index = tl.full([ROWS, K_PAD], -1, tl.int32)
    picked = tl.zeros([ROWS, G_PAD * PAD], tl.int32)
    for j in range(TOP_K):
        best, at = tl.max(choice, 1), tl.argmax(choice, 1)
        present = (best != float("-inf"))[:, None]
        this = (c[None, :] == at[:, None]) & present
        value = tl.sum(tl.where(this, x if logit else s, 0.0), 1)[:, None]
        chosen = tl.where((k == j) & present, value, chosen)
        expert = at // PAD * MEMBERS + at % PAD
        index = tl.where((k == j) & present, expert[:, None], index)
        picked += this.to(tl.int32)
        choice = tl.where(this, float("-inf"), choice)
    weight = chosen
    if logit:
        weight = tl.exp(chosen - logsumexp(chosen)[:, None])
    elif RENORMALIZE:
        weight = chosen / (tl.sum(chosen, 1) + EPS)[:, None]
    weight = tl.where(index < 0, 0.0, weight * scale)

    at = t.to(tl.int64)[:, None] * TOP_K + k
    inside = (t < T)[:, None] & (k < TOP_K)
    tl.store(indices + at, index, mask=inside)
    tl.store(weights + at, weight, mask=inside)
    tl.store(lse + t, row_lse, mask=t < T)
    sums += block.to(tl.int64) * (E + 2)
    tl.store(sums + e, tl.sum(p, 0), mask=real)
    tl.store(sums + E, tl.sum(row_lse * row_lse))
    p = tl.where(p == 0, 1.0, p)  # adds nothing to the entropy
    tl.store(sums + E + 1, -tl.sum(p * tl.log(p)))
    tl.store(counts + block.to(tl.int64) * E + e, tl.sum(picked, 0), mask=real)


@triton.jit(do_not_specialize=["T", "blocks"])
def finish_kernel(
    sums, part_counts, counts, probabilities, z, entropy, T, blocks,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums over all blocks: counts, and the means over tokens."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, blocks, ROWS):
        b = first + tl.arange(0, ROWS)
        row, inside = b.to(tl.int64)[:, None], (b < blocks)[:, None]
        acc += tl.sum(tl.load(sums + row * (E + 2) + c, mask=inside & (c < E + 2)[None, :], other=0.0), 0)
        count += tl.sum(tl.load(part_counts + row * E + c, mask=inside & (c < E)[None, :], other=0), 0)
    acc /= tl.maximum(T, 1).to(tl.float32)
    tl.store(counts + c, count, mask=c < E)
    tl.store(probabilities + c, acc, mask=c < E)
    tl.store(z + c * 0, acc, mask=c == E)
    tl.store(entropy + c * 0, acc, mask=c == E + 1)


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    dweights, dprobabilities, dz, logits, mask, indices, lse, dlogits, T, stride, mask_t, mask_e, scale,
    E: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dlogits of a block of rows; a gradient that is None is 0."""
    t, e = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    x = load_logits(logits, mask, t, e, e < E, T, stride, mask_t, mask_e)
    row_lse = tl.load(lse + t, mask=t < T, other=0.0)
    soft = tl.exp(x - row_lse[:, None])
    means = tl.maximum(T, 1).to(tl.float32)
    dx = tl.zeros([ROWS, PAD], tl.float32)
    dsoft = tl.zeros([ROWS, PAD], tl.float32)  # gradients of all the softmax's or the sigmoids' values
    sigmoid = tl.sigmoid(x)

    if dweights is not None:
        g = tl.zeros([ROWS, PAD], tl.float32)  # of the weights, at their experts
        chosen = e[None, :] < tl.zeros([ROWS, 1], tl.int32)
        for j in range(TOP_K):
            at = t.to(tl.int64) * TOP_K + j
            this = e[None, :] == tl.load(indices + at, mask=t < T, other=-1)[:, None]
            g = tl.where(this, tl.load(dweights + at, mask=t < T, other=0.0)[:, None] * scale, g)
            chosen = chosen | this
        if SCORE == 2 or (SCORE == 0 and RENORMALIZE):
            w = tl.where(chosen, x, float("-inf"))
            w = tl.exp(w - logsumexp(w)[:, None])
            dx += w * (g - tl.sum(w * g, 1)[:, None])
        else:
            if SCORE == 1 and RENORMALIZE:
                w = tl.where(chosen, sigmoid, 0.0)
                total = tl.sum(w, 1)[:, None] + EPS
                g = tl.where(chosen, (g - tl.sum(w / total * g, 1)[:, None]) / total, 0.0)
            dsoft += g
    if dprobabilities is not None:
        u = tl.load(dprobabilities + e, mask=e < E, other=0.0)[None, :] / means
        if SCORE == 1:
            total = tl.sum(sigmoid, 1)[:, None] + EPS
            u = (u - tl.sum(sigmoid / total * u, 1)[:, None]) / total
        dsoft += u
    if SCORE == 1:
        dx += dsoft * sigmoid * (1 - sigmoid)
    else:
        dx += soft * (dsoft - tl.sum(soft * dsoft, 1)[:, None])
    if dz is not None:
        dx += soft * (2 / means * tl.load(dz) * row_lse)[:, None]
    dx = tl.where(x == float("-inf"), 0.0, dx)
    at = dlogits + t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(at, dx.to(dlogits.dtype.element_ty), mask=(t < T)[:, None] & (e < E)[None, :])
