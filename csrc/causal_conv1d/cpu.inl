// Short depthwise causal convolution on the CPU, for one tier. Per channel, over tokens:
//
//     z_t = bias + sum_w weight[w] e_{t+w}     e = initial state (W-1 tokens, or zeros), then x
//     y_t = z_t, or silu(z_t) = z_t s_t        s = 1 / (1 + exp(-z))
//
// and backward, with z recomputed (only the inputs are saved):
//
//     dz_t = dy_t, or dy_t s_t (1 + z_t (1 - s_t))           de_u = sum_w weight[w] dz_{u-w}  (+ d(state))
//     d(weight[w]) = sum_t dz_t e_{t+w}                      d(bias) = sum_t dz_t
//
// Channels lie across the lanes. A band of kBand tokens is one pass over a chunk of channels, register by
// register: kBand + W-1 rows are read, each of them as it lies in memory, W taps and the bias stay in
// registers, kBand rows are written. A row of e is a pointer, into x, the initial state or a row of zeros:
// the loops know nothing of where a sequence begins. All sequences together are one long list of rows, cut
// into blocks; a task is a block by a chunk of channels, so packed sequences of any lengths share the work.
//
// Backward walks a block upwards and keeps the last W-1 rows of dz: with dz_t known, de_t is complete, the
// gradient of token t - (W-1). A block first recomputes the W-1 rows of dz before it, and the one that ends a
// sequence also writes the W-1 rows after its last token's. d(weight) and d(bias) are summed over a band in
// registers, over a block in memory, and over the blocks, which follow from the shape, in their order: the
// same bits for any number of threads.
//
// Counted for one core of an AMD Zen 4: copying the tensor costs 0.22 ns an element in float32, 0.08 in
// bfloat16; silu some 20 instructions of 512 bits a register, a cycle each: 0.4. So silu binds, and memory
// beside it beyond the cache. Measured, W = 4, ns an element, least of 40 runs on a shared machine, in cache
// (T = 256, C = 512): forward 0.20, with silu 0.42, backward 0.42 and 0.75; bfloat16 0.17, 0.43, 0.35, 0.79.
// Of 16 MiB float32 tensors (C = 1024): 0.43, 0.52, 0.74, 1.08. Tried, in cache with silu, float32:
//   - e^-|z|, whose reciprocal is never small, and a division: forward 0.54, backward 0.95; a reciprocal's
//     estimate and a Newton step instead of the division: 0.47 and 0.85; the exponent clamped on both sides
//     instead of |z| and its selects: 0.42 and 0.75;
//   - bands of 8 tokens: 0.54 against 0.47 and 1.05 against 0.85; not taken;
//   - chunks of 256 and of 1024 channels instead of 512: within the noise.
// Not tried: streaming stores of y (no change in sliding_window/forward.inl).

#include "../common/sigmoid.h"
#include "causal_conv1d.h"

namespace {

using slm::Rows;
using slm::conv::Gradient;
using slm::conv::kWidest;
using slm::conv::Parameters;
using slm::conv::Problem;
using slm::conv::Span;

constexpr int kBand = 4;

// The last, partial register of a row. Not inlined: the loops would triple in size.
template <typename F, typename E>
__attribute__((noinline)) void load_part(const E* from, F* to, int64_t n) {
    for (int64_t l = 0; l < kLanes<F>; ++l) to[l] = l < n ? widen<F>(from[l]) : F(0);
}

template <typename F, typename E>
__attribute__((noinline)) void store_part(const F* from, E* to, int64_t n) {
    for (int64_t l = 0; l < n; ++l) narrow(from[l], to + l);
}

// A register of channels at p; of a partial one `n` lanes, the others zero.
template <typename F, bool Whole, typename E>
SLM_INLINE Vec<F> load_channels(const E* p, int64_t n) {
    if constexpr (Whole) {
        return load<F>(p);
    } else {
        F lanes[kLanes<F>];
        load_part<F>(p, lanes, n);
        return loadu<F>(lanes);
    }
}

template <typename P, bool Whole, typename F, typename E>
SLM_INLINE void store_channels(E* p, Vec<F> x, int64_t n) {
    if constexpr (Whole) {
        P::store(p, x);
    } else {
        F lanes[kLanes<F>];
        storeu<F>(lanes, x);
        store_part<F>(lanes, p, n);
    }
}

// ---- forward

template <typename F, typename E, typename P, int W, int R, bool Whole>
SLM_INLINE void forward_register(const E* const (&in)[R + W - 1], E* const (&out)[R], const F* taps,
                                 int64_t c, int64_t n, bool bend) {
    constexpr int L = kLanes<F>;
    Vec<F> e[R + W - 1], z[R], tap[W];
#pragma GCC unroll 16
    for (int i = 0; i < R + W - 1; ++i) e[i] = load_channels<F, Whole>(in[i] + c, n);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) tap[w] = loadu<F>(taps + w * L);
    const Vec<F> bias = loadu<F>(taps + W * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        z[r] = bias;
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) z[r] += tap[w] * e[r + w];
    }
    if (bend) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) z[r] = silu<F>(z[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store_channels<P, Whole, F>(out[r] + c, z[r], n);
}

// R tokens by `width` channels: rows `in` [R + W-1] -> rows `out` [R].
template <typename F, typename E, typename P, int W, int R>
void forward_band(const E* const* rows_in, E* const* rows_out, const F* taps, int64_t width, bool bend) {
    constexpr int L = kLanes<F>;
    const E* in[R + W - 1];
    E* out[R];
    for (int i = 0; i < R + W - 1; ++i) in[i] = rows_in[i];  // local: a store may not change them
    for (int r = 0; r < R; ++r) out[r] = rows_out[r];
    int64_t c = 0;
    for (; c + L <= width; c += L, taps += (W + 1) * L)
        forward_register<F, E, P, W, R, true>(in, out, taps, c, L, bend);
    if (c < width) forward_register<F, E, P, W, R, false>(in, out, taps, c, width - c, bend);
}

template <typename F, typename E>
using ForwardBand = void (*)(const E* const*, E* const*, const F*, int64_t, bool);

template <typename F, typename E, typename P, int R>
ForwardBand<F, E> forward_band_of(int64_t W) {
    constexpr ForwardBand<F, E> table[kWidest] = {forward_band<F, E, P, 1, R>, forward_band<F, E, P, 2, R>,
                                                  forward_band<F, E, P, 3, R>, forward_band<F, E, P, 4, R>,
                                                  forward_band<F, E, P, 5, R>, forward_band<F, E, P, 6, R>,
                                                  forward_band<F, E, P, 7, R>, forward_band<F, E, P, 8, R>};
    return table[W - 1];
}

// ---- the rows of a problem

// The last span that begins at or before `row`; it holds the row, since the rows of an empty one are none.
inline int64_t find_span(const Problem& p, int64_t row) {
    int64_t low = 0, high = p.num_spans;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (p.spans[middle].row <= row ? low : high) = middle;
    }
    return low;
}

// Rows e_u of one span, from channel c on.
template <typename E>
struct Extended {
    const Problem& p;
    int64_t n, c;  // the span, its first channel
    const E* zeros;

    SLM_INLINE const E* at(int64_t u) const {
        if (u >= p.W - 1) return p.x.at<const E>(p.spans[n].b, p.spans[n].begin + u - (p.W - 1), c);
        return p.initial.data != nullptr ? p.initial.at<const E>(n, u, c) : zeros;
    }
};

// What a task is: rows by channels, whose first is the first of a register.
struct Piece {
    int64_t row, rows_end, c, width, block;
    Piece(const Problem& p, int64_t task) {
        block = task / p.chunks();
        row = block * p.block;
        rows_end = row + p.block < p.rows ? row + p.block : p.rows;
        c = task % p.chunks() * p.chunk;
        width = p.C - c < p.chunk ? p.C - c : p.chunk;
    }
};

template <typename F, typename E, typename P>
void forward_tasks(const Problem& p, int64_t begin, int64_t end) {
    const ForwardBand<F, E> band = forward_band_of<F, E, P, kBand>(p.W);
    const ForwardBand<F, E> single = forward_band_of<F, E, P, 1>(p.W);
    Arena arena(size_t(p.chunk) * sizeof(E) + 64);
    E* zeros = arena.take<E>(p.chunk);
    __builtin_memset(zeros, 0, size_t(p.chunk) * sizeof(E));
    const E* in[kBand + kWidest - 1];
    E* out[kBand];
    for (int64_t task = begin; task < end; ++task) {
        Piece piece(p, task);
        const F* taps = static_cast<const F*>(p.taps) + piece.c * (p.W + 1);
        for (int64_t n = find_span(p, piece.row); piece.row < piece.rows_end; ++n) {
            const Span& span = p.spans[n];
            const Extended<E> e{p, n, piece.c, zeros};
            const int64_t t1 =
                piece.rows_end - span.row < span.size() ? piece.rows_end - span.row : span.size();
            for (int64_t t = piece.row - span.row; t < t1;) {
                const int64_t rows = t + kBand <= t1 ? kBand : 1;
                for (int64_t i = 0; i < rows + p.W - 1; ++i) in[i] = e.at(t + i);
                for (int64_t i = 0; i < rows; ++i) out[i] = p.y.at<E>(span.b, span.begin + t + i, piece.c);
                (rows == kBand ? band : single)(in, out, taps, piece.width, p.silu);
                t += rows;
            }
            piece.row = span.row + t1;
        }
    }
}

// Of few tokens: one after the other, all channels of a batch entry.
template <typename F, typename E, typename P>
void step_entries(const Problem& p, int64_t begin, int64_t end) {
    const ForwardBand<F, E> single = forward_band_of<F, E, P, 1>(p.W);
    const E* in[kWidest];
    for (int64_t b = begin; b < end; ++b) {
        const Extended<E> e{p, b, 0, nullptr};
        for (int64_t t = 0; t < p.spans[b].size(); ++t) {
            for (int64_t i = 0; i < p.W; ++i) in[i] = e.at(t + i);
            E* out = p.y.at<E>(b, t, 0);
            single(in, &out, static_cast<const F*>(p.taps), p.C, p.silu);
        }
    }
}

// ---- backward

template <typename E>
struct BandRows {
    const E* in[kBand + kWidest - 1];  // e
    const E* dy[kBand];
    E* out[kBand];  // de
    const E* add;  // what else reaches de (bands of one row), or null
};

template <typename F, typename E, typename P, int W, int R, bool Whole>
SLM_INLINE void backward_register(const E* const (&in)[R + W - 1], const E* const (&dy)[R], const E* add,
                                  E* const (&out)[R], const F* taps, F* carry, int64_t stride, F* sums,
                                  int64_t c, int64_t n, bool bend) {
    constexpr int L = kLanes<F>;
    Vec<F> e[R + W - 1], dz[R + W - 1], tap[W];  // dz[W-1 + r] belongs to the band's token r
#pragma GCC unroll 16
    for (int i = 0; i < R + W - 1; ++i) e[i] = load_channels<F, Whole>(in[i] + c, n);
#pragma GCC unroll 8
    for (int i = 0; i < W - 1; ++i) dz[i] = loadu<F>(carry + i * stride + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) dz[W - 1 + r] = load_channels<F, Whole>(dy[r] + c, n);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) tap[w] = loadu<F>(taps + w * L);
    if (bend) {
        const Vec<F> bias = loadu<F>(taps + W * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Vec<F> z = bias;
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) z += tap[w] * e[r + w];
            dz[W - 1 + r] *= silu_slope<F>(z);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        Vec<F> de = tap[0] * dz[W - 1 + r];
#pragma GCC unroll 8
        for (int w = 1; w < W; ++w) de += tap[w] * dz[W - 1 + r - w];
        if (R == 1 && add != nullptr) de += load_channels<F, Whole>(add + c, n);
        store_channels<P, Whole, F>(out[r] + c, de, n);
    }
#pragma GCC unroll 8
    for (int i = 0; i < W - 1; ++i) storeu<F>(carry + i * stride + c, dz[R + i]);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
        Vec<F> sum = dz[W - 1] * e[w];
#pragma GCC unroll 8
        for (int r = 1; r < R; ++r) sum += dz[W - 1 + r] * e[r + w];
        storeu<F>(sums + w * L, loadu<F>(sums + w * L) + sum);
    }
    Vec<F> sum = dz[W - 1];
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) sum += dz[W - 1 + r];
    storeu<F>(sums + W * L, loadu<F>(sums + W * L) + sum);
}

// carry [W-1][stride]: the rows of dz before the band, then its last ones; sums: added to.
template <typename F, typename E, typename P, int W, int R>
void backward_band(const BandRows<E>& rows, const F* taps, F* carry, int64_t stride, F* sums, int64_t width,
                   bool bend) {
    constexpr int L = kLanes<F>;
    const E *in[R + W - 1], *dy[R], *add = rows.add;
    E* out[R];
    for (int i = 0; i < R + W - 1; ++i) in[i] = rows.in[i];  // local: a store may not change them
    for (int r = 0; r < R; ++r) dy[r] = rows.dy[r], out[r] = rows.out[r];
    int64_t c = 0;
    for (; c + L <= width; c += L, taps += (W + 1) * L, sums += (W + 1) * L)
        backward_register<F, E, P, W, R, true>(in, dy, add, out, taps, carry, stride, sums, c, L, bend);
    if (c < width)
        backward_register<F, E, P, W, R, false>(in, dy, add, out, taps, carry, stride, sums, c, width - c,
                                                bend);
}

template <typename F, typename E>
using BackwardBand = void (*)(const BandRows<E>&, const F*, F*, int64_t, F*, int64_t, bool);

template <typename F, typename E, typename P, int R>
BackwardBand<F, E> backward_band_of(int64_t W) {
    constexpr BackwardBand<F, E> table[kWidest] = {
        backward_band<F, E, P, 1, R>, backward_band<F, E, P, 2, R>, backward_band<F, E, P, 3, R>,
        backward_band<F, E, P, 4, R>, backward_band<F, E, P, 5, R>, backward_band<F, E, P, 6, R>,
        backward_band<F, E, P, 7, R>, backward_band<F, E, P, 8, R>};
    return table[W - 1];
}

template <typename F, typename E, typename P>
struct BackwardTask {
    const Gradient& g;
    const Problem& p;
    const int64_t stride, count;  // channels and sums of a chunk, in whole registers
    Arena arena;
    E *zeros, *nowhere;
    F *carry, *ignored;  // ignored: sums of rows that another task counts, or that do not exist
    const BackwardBand<F, E> band, single;

    static size_t bytes(int64_t stride, int64_t W) {
        return size_t(stride) * (2 * sizeof(E) + size_t(2 * W) * sizeof(F)) + 512;
    }

    explicit BackwardTask(const Gradient& gradient)
        : g(gradient),
          p(g.problem),
          stride(round_up(p.chunk, kLanes<F>)),
          count(stride * (p.W + 1)),
          arena(bytes(stride, p.W)),
          zeros(arena.take<E>(stride)),
          nowhere(arena.take<E>(stride)),
          carry(arena.take<F>(stride * (p.W - 1))),
          ignored(arena.take<F>(count)),
          band(backward_band_of<F, E, P, kBand>(p.W)),
          single(backward_band_of<F, E, P, 1>(p.W)) {
        __builtin_memset(zeros, 0, size_t(stride) * sizeof(E));
        __builtin_memset(ignored, 0, size_t(count) * sizeof(F));
    }

    void run(int64_t task) {
        Piece piece(p, task);
        const int64_t C = round_up(p.C, kLanes<F>);
        F* sums = static_cast<F*>(g.sums) + piece.block * C * (p.W + 1) + piece.c * (p.W + 1);
        const int64_t size = round_up(piece.width, kLanes<F>) * (p.W + 1);
        __builtin_memset(sums, 0, size_t(size) * sizeof(F));
        for (int64_t n = find_span(p, piece.row); piece.row < piece.rows_end; ++n) {
            const Span& span = p.spans[n];
            const int64_t t0 = piece.row - span.row, last = piece.rows_end - span.row;
            const int64_t t1 = last < span.size() ? last : span.size();
            tokens(piece, n, t0, t1, sums);
            piece.row = span.row + t1;
        }
    }

    // Where de_u belongs.
    SLM_INLINE E* target(int64_t n, int64_t u, int64_t c) {
        if (u >= p.W - 1) return g.dx.at<E>(p.spans[n].b, p.spans[n].begin + u - (p.W - 1), c);
        return g.dinitial.data != nullptr ? g.dinitial.at<E>(n, u, c) : nowhere;
    }

    // Tokens [t0, t1) of span n.
    void tokens(const Piece& piece, int64_t n, int64_t t0, int64_t t1, F* sums) {
        const Span& span = p.spans[n];
        const Extended<E> e{p, n, piece.c, zeros};
        const F* taps = static_cast<const F*>(p.taps) + piece.c * (p.W + 1);
        const int64_t T = span.size();
        BandRows<E> rows;
        rows.add = nullptr;
        __builtin_memset(carry, 0, size_t(stride * (p.W - 1)) * sizeof(F));
        for (int64_t t = t0 > p.W - 1 ? t0 - (p.W - 1) : 0; t < t1;) {
            const bool before = t < t0;
            const int64_t count = before || t + kBand > t1 ? 1 : kBand;
            for (int64_t i = 0; i < count + p.W - 1; ++i) rows.in[i] = e.at(t + i);
            for (int64_t i = 0; i < count; ++i) {
                rows.dy[i] = g.dy.at<const E>(span.b, span.begin + t + i, piece.c);
                rows.out[i] = before ? nowhere : target(n, t + i, piece.c);
            }
            (count == kBand ? band : single)(rows, taps, carry, stride, before ? ignored : sums, piece.width,
                                             p.silu);
            t += count;
        }
        if (t1 < T) return;
        for (int64_t i = 0; i < p.W; ++i) rows.in[i] = zeros;
        rows.dy[0] = zeros;
        for (int64_t i = 0; i < p.W - 1; ++i) {
            rows.add = g.dstate.data != nullptr ? g.dstate.at<const E>(n, i, piece.c) : nullptr;
            rows.out[0] = target(n, T + i, piece.c);
            single(rows, taps, carry, stride, ignored, piece.width, p.silu);
        }
    }
};

template <typename F, typename E, typename P>
void backward_tasks(const Gradient& g, int64_t begin, int64_t end) {
    BackwardTask<F, E, P> work(g);
    for (int64_t task = begin; task < end; ++task) work.run(task);
}

// ---- parameters

// Rows of weight [C, W] and bias [C] -> for each register of channels its W taps and its bias.
template <typename F, typename X>
void pack_weight(const X* weight, int64_t C, int64_t W, F* taps) {
    constexpr int L = kLanes<F>;
    for (int64_t c = 0; c < C; ++c)
        for (int64_t w = 0; w < W; ++w) taps[(c / L * (W + 1) + w) * L + c % L] = widen<F>(weight[c * W + w]);
}

template <typename F, typename X>
void pack_bias(const X* bias, int64_t C, int64_t W, F* taps) {
    constexpr int L = kLanes<F>;
    for (int64_t c = 0; c < C; ++c) taps[(c / L * (W + 1) + W) * L + c % L] = widen<F>(bias[c]);
}

template <typename F, typename E>
SLM_INLINE void set_element(void* data, int64_t i, bool wide, F x) {
    if (wide)
        static_cast<F*>(data)[i] = x;
    else
        narrow(x, static_cast<E*>(data) + i);
}

template <typename F, typename E, typename P>
void pack_taps(const Problem& p, const Parameters& from, void* to) {
    constexpr int L = kLanes<F>;
    F* taps = static_cast<F*>(to);
    const int64_t registers = (p.C + L - 1) / L, row = (p.W + 1) * L;
    for (int64_t v = from.bias ? p.C / L : 0; v < registers; ++v)  // no bias, or lanes past the last channel
        __builtin_memset(taps + v * row, 0, size_t(row) * sizeof(F));
    if (from.weight_wide)
        pack_weight<F>(static_cast<const F*>(from.weight), p.C, p.W, taps);
    else
        pack_weight<F>(static_cast<const E*>(from.weight), p.C, p.W, taps);
    if (from.bias == nullptr) return;
    if (from.bias_wide)
        pack_bias<F>(static_cast<const F*>(from.bias), p.C, p.W, taps);
    else
        pack_bias<F>(static_cast<const E*>(from.bias), p.C, p.W, taps);
}

template <typename F, typename E, typename P>
void reduce_sums(const Gradient& g, const Parameters& to, int64_t begin, int64_t end) {
    constexpr int L = kLanes<F>;
    const Problem& p = g.problem;
    const int64_t row = (p.W + 1) * L, step = (p.C + L - 1) / L * row;
    const int64_t blocks = (p.rows + p.block - 1) / p.block;
    for (int64_t v = begin; v < end; ++v)
        for (int64_t w = 0; w <= p.W; ++w) {
            const F* from = static_cast<const F*>(g.sums) + v * row + w * L;
            Vec<F> sum{};
            for (int64_t n = 0; n < blocks; ++n) sum += loadu<F>(from + n * step);
            for (int64_t l = 0, c = v * L; l < L && c < p.C; ++l, ++c) {
                if (w < p.W)
                    set_element<F, E>(to.weight, c * p.W + w, to.weight_wide, sum[l]);
                else if (to.bias != nullptr)
                    set_element<F, E>(to.bias, c, to.bias_wide, sum[l]);
            }
        }
}

// ---- by dtype

void pack(const Problem& p, const Parameters& from, void* taps) {
    SLM_DISPATCH(pack_taps, p.dtype, false, p, from, taps);
}

void forward(const Problem& p, int64_t begin, int64_t end) {
    SLM_DISPATCH(forward_tasks, p.dtype, p.bf16_dot, p, begin, end);
}

void backward(const Gradient& g, int64_t begin, int64_t end) {
    SLM_DISPATCH(backward_tasks, g.problem.dtype, g.problem.bf16_dot, g, begin, end);
}

void reduce(const Gradient& g, const Parameters& to, int64_t begin, int64_t end) {
    SLM_DISPATCH(reduce_sums, g.problem.dtype, false, g, to, begin, end);
}

void step(const Problem& p, int64_t begin, int64_t end) {
    SLM_DISPATCH(step_entries, p.dtype, p.bf16_dot, p, begin, end);
}

}  // namespace

namespace slm::conv {
#define SLM_JOIN(a, b) a##b
#define SLM_NAME(a, b) SLM_JOIN(a, b)
const Kernels SLM_NAME(kernels_, SLM_TIER) = {
    kLanes<float>, kLanes<double>, pack, forward, backward, reduce, step,
};
}  // namespace slm::conv
