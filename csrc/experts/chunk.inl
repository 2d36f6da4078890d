// A chunk of rows of one expert: its panels, and products of the expert's matrices with them.
#pragma once

#include "../common/pack.h"
#include "../common/scratch.h"
#include "../common/vectors.h"
#include "mlp.h"

namespace {

using slm::experts::Chunk;
using slm::experts::Gradient;
using slm::experts::kChunk;
using slm::experts::Matrix;
using slm::experts::Problem;
using slm::experts::Queue;
using slm::experts::Sum;

constexpr int64_t kHidden = 64;  // hidden units of a block
constexpr int64_t kRowBlock = 96;  // rows of a matrix used one after another on every panel
constexpr int64_t kDepth = 256;  // steps of a sum; sums of sums round less than one long one
constexpr int64_t kGroup = 1024;  // rows of an expert that a panel of its matrices' gradients takes at once

// Consecutive rows or columns of a matrix that stand at `at` of a block.
struct Part {
    int64_t begin, count, at;
};

// Hidden units [j, j + units) of a problem: their rows of w_up, and where gate and up stand among them.
struct Hidden {
    Part parts[2];
    int count;
    int64_t units, step, up;  // the gate of unit i is row i step of the block, its up is `up` rows on
    int64_t rows() const { return parts[count - 1].at + parts[count - 1].count; }

    Hidden(const Problem& p, int64_t j, int64_t most)
        : count(1), units(p.n - j < most ? p.n - j : most), step(1), up(0) {
        if (!p.gated) {
            parts[0] = {j, units, 0};
        } else if (p.interleaved) {
            parts[0] = {2 * j, 2 * units, 0};
            step = 2, up = 1;
        } else {
            parts[0] = {j, units, 0};
            parts[1] = {p.n + j, units, units};
            count = 2, up = units;
        }
    }
    // The row of the matrix that stands at row r of the block.
    int64_t row(int64_t r) const {
        return count == 2 && r >= units ? parts[1].begin + r - units : parts[0].begin + r;
    }
};

// The A operand of the tile kernel.
template <typename P>
struct Operand {
    const typename P::A* data;
    int64_t row, step;
};

// Rows [0, rows) and some columns of a matrix as the operand of P, in place where that can be.
template <typename P, typename E>
Operand<P> operand(const E* m, int64_t row, int64_t column, int64_t rows, const Part* columns, int count,
                   typename P::A* buffer) {
    using F = typename P::Acc;
    const int64_t K = columns[count - 1].at + columns[count - 1].count;
    if (column == 1) {
        if constexpr (std::is_same_v<E, typename P::A>)
            if (count == 1) return {m + columns[0].begin, row, kPair<P>};
        const int64_t width = round_up(K, kLanes<F>);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < count; ++c) {
                const E* from = m + r * row + columns[c].begin;
                typename P::A* to = buffer + r * width + columns[c].at;
                if constexpr (std::is_same_v<E, typename P::A>)
                    __builtin_memcpy(to, from, size_t(columns[c].count) * sizeof(E));
                else
                    widen_row<F>(from, to, columns[c].count);  // zeros behind it, until the next part
            }
        return {buffer, width, kPair<P>};
    }
    const int64_t width = round_up(rows, kLanes<F>);
    for (int c = 0; c < count; ++c)
        pack_rows<P>(m + columns[c].begin * column, column, columns[c].count, rows, width,
                     reinterpret_cast<typename P::B*>(buffer) + columns[c].at / kPair<P> * width);
    return {buffer, kPair<P>, kPair<P> * width};
}

// Lanes [0, n) at p, the others zero.
template <typename F, typename E>
SLM_INLINE Vec<F> load_lanes(const E* p, int64_t n) {
    constexpr int L = kLanes<F>;
    if (n >= L) return load<F>(p);
    F lanes[L];
    for (int64_t l = 0; l < L; ++l) lanes[l] = l < n ? widen<F>(p[l]) : F(0);
    return loadu<F>(lanes);
}

template <typename P, typename E>
SLM_INLINE void store_lanes(E* p, Vec<typename P::Acc> x, int64_t n) {
    using F = typename P::Acc;
    constexpr int L = kLanes<F>;
    if (n >= L) return P::store(p, x);
    F lanes[L];
    storeu<F>(lanes, x);
    for (int64_t l = 0; l < n; ++l) narrow(lanes[l], p + l);
}

// What rows that are added up are stored as: a term may leave float16's range where the sum does not.
template <typename F, typename E>
using PartOf = std::conditional_t<std::is_same_v<E, Half>, F, E>;

// Steps of P along a row of a matrix, a register of them; given n, that many, the others zero.
template <typename P, typename E>
SLM_INLINE Vec<typename P::B> load_steps(const E* p) {
    if constexpr (kPair<P> == 2)
        return loadu<uint32_t>(reinterpret_cast<const uint32_t*>(p));
    else
        return load<typename P::Acc>(p);
}

template <typename P, typename E>
SLM_INLINE Vec<typename P::B> load_steps(const E* p, int64_t n) {
    if constexpr (kPair<P> == 2) {
        uint32_t steps[kLanes<float>] = {};
        __builtin_memcpy(steps, p, size_t(n) * sizeof(uint32_t));
        return loadu<uint32_t>(steps);
    } else {
        return load_lanes<typename P::Acc>(p, n);
    }
}

// c [R][M] (+)= products of R rows of a matrix with M rows of x, each along the lanes, K steps.
template <typename P, int R, int M, bool Add, typename E>
SLM_INLINE void dot_tile(const E* m, int64_t row, int64_t K, const typename P::B* x, int64_t x_row,
                         typename P::Acc* c, int64_t c_row) {
    using F = typename P::Acc;
    constexpr int L = kLanes<F>;
    Vec<F> acc[R * M] = {};
    Vec<typename P::B> a[R], b[M];
    const auto step = [&] {
#pragma GCC unroll 4
        for (int j = 0; j < M; ++j)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r * M + j] = P::multiply_add(a[r], b[j], acc[r * M + j]);
    };
    int64_t k = 0;
    for (; k + L <= K; k += L) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) a[r] = load_steps<P>(m + r * row + k * kPair<P>);
#pragma GCC unroll 4
        for (int j = 0; j < M; ++j) b[j] = P::load(x + j * x_row + k);
        step();
    }
    if (k < K) {  // of x too: behind it may stand the next part or row, and 0 x NaN is not 0
        for (int r = 0; r < R; ++r) a[r] = load_steps<P>(m + r * row + k * kPair<P>, K - k);
        for (int j = 0; j < M; ++j) b[j] = load_steps<P>(x + j * x_row + k, K - k);
        step();
    }
    F sums[R * M];
    if constexpr (R * M == L) {  // all sums at once: lane i of the sum of all rows
        transpose<F>(acc);
        Vec<F> sum = acc[0];
        for (int i = 1; i < L; ++i) sum += acc[i];
        storeu<F>(sums, sum);
    } else {
        for (int i = 0; i < R * M; ++i) sums[i] = reduce_add<F>(acc[i]);
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < M; ++j) c[r * c_row + j] = sums[r * M + j] + (Add ? c[r * c_row + j] : F(0));
}

// c [rows][c_row] (+)= m x^T, x [count][x_row]. A matrix's rows stay in the first cache for all of x.
template <typename P, bool Add, typename E>
__attribute__((noinline)) void dots(const E* m, int64_t row, int64_t rows, int64_t K, const typename P::B* x,
                                    int64_t x_row, int64_t count, typename P::Acc* c, int64_t c_row) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, m += 4 * row, c += 4 * c_row) {
        int64_t j = 0;
        for (; j + 4 <= count; j += 4) dot_tile<P, 4, 4, Add>(m, row, K, x + j * x_row, x_row, c + j, c_row);
        if (j + 2 <= count) {
            dot_tile<P, 4, 2, Add>(m, row, K, x + j * x_row, x_row, c + j, c_row);
            j += 2;
        }
        if (j < count) dot_tile<P, 4, 1, Add>(m, row, K, x + j * x_row, x_row, c + j, c_row);
    }
    for (; r < rows; ++r, m += row, c += c_row)
        for (int64_t j = 0; j < count; ++j)
            dot_tile<P, 1, 1, Add>(m, row, K, x + j * x_row, x_row, c + j, c_row);
}

// What forward and backward of a chunk share: its rows as operands, and products with them.
//
// c, the results, is always [panel][rows of a matrix][width], a row of the chunk in each lane. An operand is
// [panel][K / Pair][W], and of `few` rows, which would leave most lanes of a panel empty, [row][line(K)]:
// then every element of a matrix is read into a register's own lane, once. Rows of a matrix are multiplied
// along the lanes where K is contiguous (`dots`); else x is the broadcast operand, and the matrix the other.
template <typename F, typename E, typename P>
struct Panels {
    using A = typename P::A;
    using B = typename P::B;
    static constexpr int L = kLanes<F>, W = kBlock<F>, Pair = kPair<P>;
    static constexpr int64_t kSpread = kChunk / L;  // few rows take blocks as many times as long

    const Problem& p;
    Arena arena;
    A* block;  // of a matrix
    F *sums, *turned;  // of few rows: [L][rows of a block], and transposed
    Chunk chunk{};
    bool few = false;
    int64_t width = W;

    static constexpr int64_t kMostRows = kRowBlock > 2 * kHidden ? kRowBlock : 2 * kHidden;  // of a block
    static int64_t block_size(const Problem& p) {  // in elements of A
        const int64_t K = p.d > p.n ? p.d : p.n, most = K > 2 * kHidden ? K : 2 * kHidden;
        return kMostRows * round_up(most, L) + kSteps * Pair * kMostRows * kSpread;
    }
    static int64_t operand_size(int64_t K) { return kChunk * (K / Pair) + L * L; }  // in elements of B
    static constexpr int64_t kResults = kChunk * kMostRows;  // of a block: in elements of F
    static constexpr int64_t kSteps = 32;  // of K that few rows take at once

    Panels(const Problem& problem, int64_t own)  // `own`: elements of F or B that the direction takes itself
        : p(problem), arena(size_t(own + 2 * kResults + block_size(problem) + 64) * sizeof(F)) {
        block = arena.take<A>(block_size(p));
        sums = arena.take<F>(kResults), turned = arena.take<F>(kResults);
    }

    void begin(const Chunk& of) {
        chunk = of;
        few = chunk.size <= L;
        width = few ? L : W;
    }
    int64_t hidden_block() const { return few ? kHidden * kSpread : kHidden; }
    int64_t row_block() const { return few ? kRowBlock * kSpread : kRowBlock; }
    int64_t line(int64_t K) const { return round_up(K / Pair, L); }
    // From one panel of an operand to the next; from one row of few.
    int64_t stride(int64_t K) const { return few ? line(K) : K / Pair * W; }

    int64_t panels() const { return (chunk.size + W - 1) / W; }
    int64_t rows(int64_t panel) const { return chunk.size - panel * W < W ? chunk.size - panel * W : W; }
    int64_t vectors(int64_t panel) const { return (rows(panel) + L - 1) / L; }
    int64_t sorted(int64_t panel) const { return chunk.first + panel * W; }  // the panel's first row

    const E* matrix(const Matrix& m) const { return static_cast<const E*>(m.data) + chunk.expert * m.expert; }

    // Rows of x [T, d] as an operand.
    void gather(const void* x, int64_t row, B* out) const {
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t* token = p.token + sorted(panel);
            const auto at = [&](int64_t i) { return static_cast<const E*>(x) + token[i] * row; };
            if (!few) {
                pack_transposed<P>(at, rows(panel), p.d, out + panel * stride(p.d), W);
                continue;
            }
            for (int64_t i = 0; i < chunk.size; ++i) {
                B* to = out + i * line(p.d);
                for (int64_t k = 0; k < p.d / Pair; k += L)
                    storeu<B>(to + k, k + L <= p.d / Pair ? load_steps<P>(at(i) + k * Pair)
                                                          : load_steps<P>(at(i) + k * Pair, p.d / Pair - k));
            }
        }
    }

    // Of few rows: lanes [K / Pair][L] -> columns [k, k + K) of an operand.
    void turn(const B* lanes, int64_t K, B* out, int64_t line_of, int64_t k) const {
        for (int64_t s = 0; s < K / Pair; s += L) {
            Vec<B> square[L];
            for (int l = 0; l < L; ++l)
                square[l] = s + l < K / Pair ? loadu<B>(lanes + (s + l) * L) : Vec<B>{};
            transpose<B>(square);
            for (int64_t i = 0; i < chunk.size; ++i) storeu<B>(out + i * line_of + k / Pair + s, square[i]);
        }
    }

    // c [panel][rows][width] (+)= rows of a matrix, its columns `parts`, times an operand b of those columns.
    template <bool Add>
    void multiply(const E* m, int64_t row, int64_t column, int64_t count, const Part* parts, int num_parts,
                  const B* b, int64_t b_stride, F* c, int64_t c_stride) {
        if (few) return multiply_few<Add>(m, row, column, count, parts, num_parts, b, b_stride, c);
        const auto a = operand<P>(m, row, column, count, parts, num_parts, block);
        const int64_t K = (parts[num_parts - 1].at + parts[num_parts - 1].count) / Pair;
        for (int64_t panel = 0; panel < panels(); ++panel)
            for (int64_t k = 0; k < K; k += kDepth) {
                const int64_t steps = K - k < kDepth ? K - k : kDepth;
                const A* left = a.data + k * a.step;
                const B* right = b + panel * b_stride + k * W;
                F* sums_of = c + panel * c_stride;
                if (!Add && k == 0)
                    gemm<P, false>(count, vectors(panel), steps, left, a.row, a.step, right, W, sums_of, W);
                else
                    gemm<P, true>(count, vectors(panel), steps, left, a.row, a.step, right, W, sums_of, W);
            }
    }

    template <bool Add>
    void multiply_few(const E* m, int64_t row, int64_t column, int64_t count, const Part* parts,
                      int num_parts, const B* b, int64_t b_stride, F* c) {
        if (column == 1) {
            const Part* part = parts;
            dots<P, Add>(m + part->begin, row, count, part->count / Pair, b + part->at / Pair, b_stride,
                         chunk.size, c, L);
            for (part = parts + 1; part < parts + num_parts; ++part)
                dots<P, true>(m + part->begin, row, count, part->count / Pair, b + part->at / Pair, b_stride,
                              chunk.size, c, L);
            return;
        }
        const int64_t across = round_up(count, L);
        bool first = true;
        for (const Part* part = parts; part < parts + num_parts; ++part)
            for (int64_t k = 0; k < part->count; k += kSteps * Pair, first = false) {
                const int64_t steps = part->count - k < kSteps * Pair ? part->count - k : kSteps * Pair;
                const E* from = m + (part->begin + k) * column;
                const B* right = reinterpret_cast<const B*>(from);
                int64_t right_row = column;
                if (!std::is_same_v<E, F> || across != count) {
                    B* packed = reinterpret_cast<B*>(block);
                    pack_rows<P>(from, column, steps, count, across, packed);
                    right = packed, right_row = across;
                }
                const A* left = reinterpret_cast<const A*>(b + (part->at + k) / Pair);
                if (first)
                    gemm<P, false>(chunk.size, across / L, steps / Pair, left, b_stride * Pair, Pair, right,
                                   right_row, sums, across);
                else
                    gemm<P, true>(chunk.size, across / L, steps / Pair, left, b_stride * Pair, Pair, right,
                                  right_row, sums, across);
            }
        F* const to = Add ? turned : c;
        pack_transposed<Fma<F>>(static_cast<const F*>(sums), across, chunk.size, count, to, L);
        if constexpr (Add) add(c, turned, count * L);
    }

    // c [panel][count][width] -> elements [r, r + count) of the rows; with a factor for each row if given.
    void write(const F* c, int64_t c_stride, int64_t r, int64_t count, const F* factor) const {
        if constexpr (!std::is_same_v<E, PartOf<F, E>>)
            if (p.parts) return write_rows<PartOf<F, E>>(c, c_stride, r, count, factor);
        write_rows<E>(c, c_stride, r, count, factor);
    }

    template <typename X>
    void write_rows(const F* c, int64_t c_stride, int64_t r, int64_t count, const F* factor) const {
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t* to = p.to + sorted(panel);
            const auto at = [&](int64_t i) { return static_cast<X*>(p.y) + to[i] * p.d + r; };
            unpack_transposed<P, false>(c + panel * c_stride, width, factor ? factor + panel * W : nullptr,
                                        rows(panel), count, at);
        }
    }

    // The routing weights of the chunk's rows, [kChunk], zero behind the last.
    void load_weights(F* to) const {
        for (int64_t i = 0; i < kChunk; ++i)
            to[i] = i >= chunk.size ? F(0)
                    : p.weights     ? static_cast<const F*>(p.weights)[chunk.first + i]
                                    : F(1);
    }
};

}  // namespace
