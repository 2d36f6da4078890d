// Gradients of matrices and biases.
#pragma once

#include "chunk.inl"

namespace {

template <typename F, typename E, typename P>
struct Matrices {
    using A = typename P::A;
    using B = typename P::B;
    static constexpr int L = kLanes<F>, W = kBlock<F>, Pair = kPair<P>;

    const Gradient& g;
    const Problem& p;
    Arena arena;
    B* panel;  // [kGroup / Pair][W]
    F* c;  // [lines][W]
    A* wide;  // [kRowBlock][kChunk], where storage is not what P reads

    explicit Matrices(const Gradient& gradient)
        : g(gradient),
          p(g.problem),
          arena(size_t(kGroup / Pair * W + kRowBlock * kChunk + lines(p) * W) * sizeof(F) + 512) {
        panel = arena.take<B>(kGroup / Pair * W);
        c = arena.take<F>(lines(p) * W);
        wide = arena.take<A>(kRowBlock * kChunk);
    }

    static int64_t lines(const Problem& p) { return p.H > kRowBlock ? p.H : kRowBlock; }
    static int64_t columns(const Problem& p) { return (p.d + W - 1) / W; }

    void run(int64_t task) {
        const int64_t column = task % columns(p) * W, e = task / columns(p) % g.experts;
        const bool up = task < columns(p) * g.experts;
        const int64_t lanes = p.d - column < W ? p.d - column : W;
        const int64_t M = up ? p.H : p.n;
        const Chunk *first = p.chunks + g.of_expert[e], *const last = p.chunks + g.of_expert[e + 1];
        if (first == last && column == 0) {
            E* const to = static_cast<E*>(up ? g.dup : g.ddown) + e * M * p.d;
            __builtin_memset(to, 0, size_t(M * p.d) * sizeof(E));
        }
        for (const Chunk *from = first, *to; from < last; from = to) {
            int64_t rows = 0;
            for (to = from; to < last && rows + kChunk <= kGroup; ++to)
                rows += gather(*to, up, column, lanes, rows);
            const bool whole = from == first && to == last;
            for (int64_t r = 0; r < M; r += kRowBlock) {
                const int64_t count = M - r < kRowBlock ? M - r : kRowBlock;
                F* sums = c + (whole ? 0 : r * W);
                int64_t sums_row = W;
                bool in_place = false;
                if constexpr (std::is_same_v<E, F>)
                    if (up && whole && lanes % L == 0) {
                        sums = static_cast<F*>(g.dup) + (e * M + r) * p.d + column;
                        sums_row = p.d, in_place = true;
                    }
                rows = 0;
                for (const Chunk* chunk = from; chunk < to; ++chunk) {
                    const int64_t padded = round_up(chunk->size, L), steps = (chunk->size + Pair - 1) / Pair;
                    const auto a = left(*chunk, up, r, count, padded);
                    const B* b = panel + rows / Pair * W;
                    const int64_t vectors = (lanes + L - 1) / L;
                    if (chunk == first)
                        gemm<P, false>(count, vectors, steps, a.data, a.row, a.step, b, W, sums, sums_row);
                    else
                        gemm<P, true>(count, vectors, steps, a.data, a.row, a.step, b, W, sums, sums_row);
                    rows += padded;
                }
                if (to == last && !in_place) write(up, e, r, M, column, lanes, sums);
            }
        }
        if (up && column == 0 && g.db_up) sum_up(e, first, last);
        if (!up && g.db_down) sum_down(e, first, last, column, lanes);
    }

    // Rows of x or dy at [rows / Pair][W] of the panel; returns how many are taken.
    int64_t gather(const Chunk& chunk, bool up, int64_t column, int64_t lanes, int64_t rows) {
        const E* x = static_cast<const E*>(up ? p.x : g.dy) + column;
        const int64_t row = up ? p.x_row : g.dy_row;
        const int64_t* token = p.token + chunk.first;
        pack_rows<P>([&](int64_t i) { return x + token[i] * row; }, chunk.size, lanes, W,
                     panel + rows / Pair * W);
        return round_up(chunk.size, L);
    }

    // Rows of dh^T or (w a)^T of a chunk.
    Operand<P> left(const Chunk& chunk, bool up, int64_t r, int64_t count, int64_t padded) {
        const E* from = up ? static_cast<const E*>(g.dh) + chunk.padded * p.H
                           : static_cast<const E*>(g.a) + chunk.padded * p.n;
        const Part every{0, padded, 0};
        return operand<P>(from + r * padded, padded, 1, count, &every, 1, wide);
    }

    void write(bool up, int64_t e, int64_t r, int64_t M, int64_t column, int64_t lanes, F* sums) {
        const int64_t count = M - r < kRowBlock ? M - r : kRowBlock;
        if (up) {
            E* to = static_cast<E*>(g.dup) + (e * M + r) * p.d + column;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t v = 0; v < lanes; v += L)
                    store_lanes<P>(to + i * p.d + v, loadu<F>(sums + i * W + v), lanes - v);
        } else {
            E* to = static_cast<E*>(g.ddown) + (e * p.d + column) * p.n + r;
            unpack_transposed<P, false>(sums, W, nullptr, lanes, count,
                                        [&](int64_t i) { return to + i * p.n; });
        }
    }

    void sum_up(int64_t e, const Chunk* first, const Chunk* last) {
        for (int64_t r = 0; r < p.H; ++r) {
            F sum = 0;
            for (const Chunk* chunk = first; chunk < last; ++chunk) {
                const int64_t padded = round_up(chunk->size, L);
                const E* row = static_cast<const E*>(g.dh) + chunk->padded * p.H + r * padded;
                Vec<F> along{};
                for (int64_t i = 0; i < padded; i += L) along += load<F>(row + i);
                sum += reduce_add<F>(along);
            }
            narrow(sum, static_cast<E*>(g.db_up) + e * p.H + r);
        }
    }

    void sum_down(int64_t e, const Chunk* first, const Chunk* last, int64_t column, int64_t lanes) {
        for (int64_t v = 0; v < lanes; v += L) {
            Vec<F> sum{};
            for (const Chunk* chunk = first; chunk < last; ++chunk)
                for (int64_t i = chunk->first; i < chunk->first + chunk->size; ++i) {
                    const E* dy = static_cast<const E*>(g.dy) + p.token[i] * g.dy_row + column + v;
                    sum += load_lanes<F>(dy, lanes - v) *
                           (p.weights ? static_cast<const F*>(p.weights)[i] : F(1));
                }
            store_lanes<P>(static_cast<E*>(g.db_down) + e * p.d + column + v, sum, lanes - v);
        }
    }
};

}  // namespace
