// Expert MLPs on the CPU, for one tier. A row is a token at one of its experts; rows are sorted by expert
// (cpu.cpp), and a task is a chunk of up to kChunk rows of one expert:
//
//     h = w_up x + b_up      a = f(h), or f(gate) up      y = w (w_down a + b_down)      w: the routing weight
//
// and backward, from h as it was saved:
//
//     da = w_down^T dy       dw = <da, a> + <dy, b_down>       dh = w da df/dh       dx = w_up^T dh
//     d(w_up) = sum over rows of dh x^T         d(w_down) = sum of dy (w a)^T
//
// Rows lie across the lanes: x^T [d][rows] is gathered and transposed once a chunk, in registers, and then
// everything stays transposed. That has four rewards:
//   - matrices are read as they lie in memory, element by element, as the broadcast operand of the tile kernel
//     (tile.h): none is packed that is used as it is stored, and d and n may be anything;
//   - what the activation makes is the second product's operand, as it is;
//   - <da, a> runs down the lanes: no horizontal sum anywhere;
//   - biases, and both layouts of gates and ups, are a matter of row numbers.
// A matrix that is used transposed (those of the backward, as modules store them) is copied, a block at a time,
// rows to rows: for 128 rows that is 1 % of the time.
//
// Matrices' gradients: a task is a panel of 64 columns of one matrix of one expert. Its operand is the panel
// of x or dy, gathered, [rows][64]; dh^T and (w a)^T, which the pass over the chunks left behind, are read as
// they lie. Every element is one sum in the order of the tokens, whatever the number of threads.
//
// Chunks write the rows of y of their own if every token has one expert, else rows of T k, which a last pass
// adds up, in the order of a token's experts. Nothing is added to in memory by two threads.

#include "../common/pack.h"
#include "../common/scratch.h"
#include "../common/vectors.h"
#include "activation.inl"
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

    Hidden(const Problem& p, int64_t j)
        : count(1), units(p.n - j < kHidden ? p.n - j : kHidden), step(1), up(0) {
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

// What forward and backward of a chunk share: panels of its rows, and products with them.
template <typename F, typename E, typename P>
struct Panels {
    using A = typename P::A;
    using B = typename P::B;
    static constexpr int L = kLanes<F>, W = kBlock<F>, Pair = kPair<P>;
    static constexpr int64_t kMost = kChunk / W;  // panels

    const Problem& p;
    Chunk chunk{};

    int64_t panels() const { return (chunk.size + W - 1) / W; }
    int64_t rows(int64_t panel) const { return chunk.size - panel * W < W ? chunk.size - panel * W : W; }
    int64_t vectors(int64_t panel) const { return (rows(panel) + L - 1) / L; }
    int64_t sorted(int64_t panel) const { return chunk.first + panel * W; }  // the panel's first row

    const E* matrix(const Matrix& m) const { return static_cast<const E*>(m.data) + chunk.expert * m.expert; }

    // Rows of x [T, d] -> out [panel][d / Pair][W].
    void gather(const void* x, int64_t row, B* out) const {
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t* token = p.token + sorted(panel);
            const auto at = [&](int64_t i) { return static_cast<const E*>(x) + token[i] * row; };
            pack_transposed<P>(at, rows(panel), p.d, out + panel * (p.d / Pair) * W, W);
        }
    }

    // c [panel][..][W] (+)= a b, b [panel][..][W]; strides of a panel are `bs` and `cs`.
    template <bool Add>
    void product(int64_t M, int64_t K, const Operand<P>& a, const B* b, int64_t bs, F* c, int64_t cs) const {
        for (int64_t panel = 0; panel < panels(); ++panel)
            gemm<P, Add>(M, vectors(panel), K / Pair, a.data, a.row, a.step, b + panel * bs, W,
                         c + panel * cs, W);
    }

    // c [panel][d][W] -> rows of y, or of parts; with a bias and a factor for each row if given.
    void write(F* c, int64_t cs, int64_t r, int64_t count, const F* factor) const {
        for (int64_t panel = 0; panel < panels(); ++panel) {
            const int64_t* to = p.to + sorted(panel);
            const F* times = factor ? factor + panel * W : nullptr;
            if (p.parts) {
                const auto at = [&](int64_t i) { return static_cast<F*>(p.parts) + to[i] * p.d + r; };
                unpack_transposed<P, false>(c + panel * cs, W, times, rows(panel), count, at);
            } else {
                const auto at = [&](int64_t i) { return static_cast<E*>(p.y) + to[i] * p.d + r; };
                unpack_transposed<P, false>(c + panel * cs, W, times, rows(panel), count, at);
            }
        }
    }

    // The routing weights of the chunk's rows, [kChunk], zero behind the last.
    void load_weights(F* to) const {
        for (int64_t i = 0; i < kChunk; ++i)
            to[i] = i >= chunk.size ? F(0)
                    : p.weights     ? static_cast<const F*>(p.weights)[chunk.first + i]
                                    : F(1);
    }

    static int64_t operand_size(const Problem& p) {  // the largest block of a matrix, in elements of A
        const int64_t K = p.d > p.n ? p.d : p.n, most = K > 2 * kHidden ? K : 2 * kHidden;
        return round_up(kRowBlock, L) * round_up(most, L);
    }
};

template <typename F, typename E, typename P>
struct Forward : Panels<F, E, P> {
    using Base = Panels<F, E, P>;
    using Base::chunk;
    using Base::p;
    using typename Base::A;
    using typename Base::B;
    static constexpr int L = Base::L, W = Base::W, Pair = Base::Pair;

    Arena arena;
    B *xt, *at;  // [panel][d / Pair][W], [panel][n / Pair][W]
    F* c;  // [panel][rows][W]
    A* block;
    F weights[kChunk];

    static size_t bytes(const Problem& p) {
        const int64_t lines = (p.d + p.n) / Pair + 2 + (kRowBlock > 2 * kHidden ? kRowBlock : 2 * kHidden);
        return size_t(kChunk * lines) * sizeof(F) + size_t(Base::operand_size(p)) * sizeof(A) + 512;
    }
    explicit Forward(const Problem& problem) : Base{problem}, arena(bytes(problem)) {
        xt = arena.take<B>(kChunk * (p.d / Pair));
        at = arena.take<B>(kChunk * (p.n / Pair));
        c = arena.take<F>(kChunk * (kRowBlock > 2 * kHidden ? kRowBlock : 2 * kHidden));
        block = arena.take<A>(Base::operand_size(p));
    }

    void run(const Chunk& of) {
        chunk = of;
        this->gather(p.x, p.x_row, xt);
        const E* up = this->matrix(p.up);
        const Part every_d{0, p.d, 0}, every_n{0, p.n, 0};
        for (int64_t j = 0; j < p.n; j += kHidden) {
            const Hidden hidden(p, j);
            const int64_t stride = hidden.rows() * W;
            for (int i = 0; i < hidden.count; ++i) {
                const Part& part = hidden.parts[i];
                const auto a = operand<P>(up + part.begin * p.up.row, p.up.row, p.up.column, part.count,
                                          &every_d, 1, block);
                this->template product<false>(part.count, p.d, a, xt, p.d / Pair * W, c + part.at * W,
                                              stride);
            }
            SLM_ACTIVATION(p.activation,
                           [&](auto f) { this->template activate<decltype(f)::value>(hidden, j, stride); });
        }
        this->load_weights(weights);
        const E* down = this->matrix(p.down);
        const E* bias = static_cast<const E*>(p.b_down);
        for (int64_t r = 0; r < p.d; r += kRowBlock) {
            const int64_t count = p.d - r < kRowBlock ? p.d - r : kRowBlock;
            const auto a =
                operand<P>(down + r * p.down.row, p.down.row, p.down.column, count, &every_n, 1, block);
            this->template product<false>(count, p.n, a, at, p.n / Pair * W, c, count * W);
            for (int64_t i = 0; bias && i < count * this->panels(); ++i) {
                const F b = widen<F>(bias[chunk.expert * p.d + r + i % count]);
                for (int64_t v = 0; v < W; v += L) storeu<F>(c + i * W + v, loadu<F>(c + i * W + v) + b);
            }
            this->write(c, count * W, r, count, weights);
        }
    }

    template <int A>
    void activate(const Hidden& hidden, int64_t j, int64_t stride) {
        const E* bias = p.b_up ? static_cast<const E*>(p.b_up) + chunk.expert * p.H : nullptr;
        E* h = p.h ? static_cast<E*>(p.h) + chunk.first * p.H : nullptr;
        for (int64_t panel = 0; panel < this->panels(); ++panel) {
            const int64_t n = this->rows(panel), vectors = this->vectors(panel);
            for (int64_t r = 0; (bias || h) && r < hidden.rows(); ++r) {
                F* row = c + panel * stride + r * W;
                const F b = bias ? widen<F>(bias[hidden.row(r)]) : F(0);
                E* to = h ? h + hidden.row(r) * chunk.size + panel * W : nullptr;
                for (int64_t v = 0; v < vectors; ++v) {
                    const Vec<F> x = loadu<F>(row + v * L) + b;
                    if (bias) storeu<F>(row + v * L, x);
                    if (h) store_lanes<P>(to + v * L, x, n - v * L);
                }
            }
            B* to = at + (panel * p.n + j) / Pair * W;
            for (int64_t i = 0; i < hidden.units; i += Pair)
                for (int64_t v = 0; v < vectors; ++v) {
                    const F* gate = c + panel * stride + i * hidden.step * W + v * L;
                    const auto unit = [&](int64_t u) {
                        const F* g = gate + u * hidden.step * W;
                        const Vec<F> a = bend<F, A>(loadu<F>(g), nullptr);
                        return hidden.up ? a * loadu<F>(g + hidden.up * W) : a;
                    };
                    if constexpr (Pair == 1)
                        storeu<F>(to + i * W + v * L, unit(0));
                    else
                        storeu<B>(to + i / 2 * W + v * L, pair_lanes(unit(0), unit(1)));
                }
        }
    }
};

template <typename F, typename E, typename P>
struct Backward : Panels<F, E, P> {
    using Base = Panels<F, E, P>;
    using Base::chunk;
    using Base::p;
    using typename Base::A;
    using typename Base::B;
    static constexpr int L = Base::L, W = Base::W, Pair = Base::Pair;

    const Gradient& g;
    Arena arena;
    B *dyt, *dht;  // [panel][d / Pair][W], [panel][rows of a block / Pair][W]
    F *da, *dxt;  // [panel][kHidden][W], [panel][d][W]
    A* block;
    F weights[kChunk], dweights[kChunk];

    static size_t bytes(const Problem& p) {
        return size_t(kChunk * (p.d / Pair + 2 * kHidden + kHidden + p.d + 2)) * sizeof(F) +
               size_t(Base::operand_size(p)) * sizeof(A) + 512;
    }
    explicit Backward(const Gradient& gradient)
        : Base{gradient.problem}, g(gradient), arena(bytes(gradient.problem)) {
        dyt = arena.take<B>(kChunk * (p.d / Pair));
        dht = arena.take<B>(kChunk * (2 * kHidden / Pair));
        da = arena.take<F>(kChunk * kHidden);
        dxt = arena.take<F>(kChunk * p.d);
        block = arena.take<A>(Base::operand_size(p));
    }

    void run(const Chunk& of) {
        chunk = of;
        this->gather(g.dy, g.dy_row, dyt);
        this->load_weights(weights);
        for (int64_t i = 0; i < kChunk; ++i) dweights[i] = 0;
        const E *up = this->matrix(p.up), *down = this->matrix(p.down);
        const Part every_d{0, p.d, 0};
        for (int64_t j = 0; j < p.n; j += kHidden) {
            const Hidden hidden(p, j);
            const auto a = operand<P>(down + j * p.down.column, p.down.column, p.down.row, hidden.units,
                                      &every_d, 1, block);
            this->template product<false>(hidden.units, p.d, a, dyt, p.d / Pair * W, da, kHidden * W);
            SLM_ACTIVATION(p.activation,
                           [&](auto f) { this->template activate<decltype(f)::value>(hidden, j); });
            for (int64_t r = 0; g.need_x && r < p.d; r += kRowBlock) {
                const int64_t count = p.d - r < kRowBlock ? p.d - r : kRowBlock;
                const auto b = operand<P>(up + r * p.up.column, p.up.column, p.up.row, count, hidden.parts,
                                          hidden.count, block);
                const int64_t bs = 2 * kHidden / Pair * W;
                if (j == 0)
                    this->template product<false>(count, hidden.rows(), b, dht, bs, dxt + r * W, p.d * W);
                else
                    this->template product<true>(count, hidden.rows(), b, dht, bs, dxt + r * W, p.d * W);
            }
        }
        if (g.need_x) this->write(dxt, p.d * W, 0, p.d, nullptr);
        if (g.dweights) write_weights();
    }

    // dh, w a and d(weights) of a block of hidden units.
    template <int A>
    void activate(const Hidden& hidden, int64_t j) {
        const int64_t padded = round_up(chunk.size, L);
        const E* h = static_cast<const E*>(p.h) + chunk.first * p.H;
        E* dh = g.dh ? static_cast<E*>(g.dh) + chunk.padded * p.H : nullptr;
        E* wa = g.a ? static_cast<E*>(g.a) + chunk.padded * p.n + j * padded : nullptr;
        for (int64_t panel = 0; panel < this->panels(); ++panel) {
            B* to = dht + panel * (2 * kHidden / Pair) * W;
            for (int64_t v = 0; v < this->vectors(panel); ++v) {
                const int64_t lane = panel * W + v * L, n = chunk.size - lane;
                const Vec<F> weight = loadu<F>(weights + lane);
                const Mask<F> inside = lane_numbers<F>(0) < F(n);  // elsewhere 0: 0 x inf is not
                Vec<F> sum{};
                const auto unit = [&](int64_t i, Vec<F>& d_gate, Vec<F>& d_up) {
                    const int64_t row = hidden.row(i * hidden.step);
                    Vec<F> slope, a = bend<F, A>(load_lanes<F>(h + row * chunk.size + lane, n), &slope);
                    const Vec<F> d =
                        select<F>(inside, loadu<F>(da + (panel * kHidden + i) * W + v * L), Vec<F>{});
                    const Vec<F> wd = d * weight;
                    d_gate = wd * slope;
                    if (hidden.up) {
                        const int64_t up = hidden.row(i * hidden.step + hidden.up);
                        const Vec<F> u = load_lanes<F>(h + up * chunk.size + lane, n);
                        d_up = wd * a;
                        d_gate *= u;
                        a *= u;
                        if (dh) P::store(dh + up * padded + lane, d_up);
                    }
                    sum += d * a;
                    if (dh) P::store(dh + row * padded + lane, d_gate);
                    if (wa) P::store(wa + i * padded + lane, select<F>(inside, a * weight, Vec<F>{}));
                };
                for (int64_t i = 0; i < hidden.units; i += Pair) {
                    if constexpr (Pair == 1) {
                        Vec<F> d_gate, d_up{};
                        unit(i, d_gate, d_up);
                        storeu<F>(to + i * hidden.step * W + v * L, d_gate);
                        if (hidden.up) storeu<F>(to + (i * hidden.step + hidden.up) * W + v * L, d_up);
                    } else {
                        Vec<F> d_gate[2], d_up[2] = {};
                        unit(i, d_gate[0], d_up[0]);
                        unit(i + 1, d_gate[1], d_up[1]);
                        if (hidden.step == 2) {
                            storeu<B>(to + i * W + v * L, pair_lanes(d_gate[0], d_up[0]));
                            storeu<B>(to + (i + 1) * W + v * L, pair_lanes(d_gate[1], d_up[1]));
                        } else {
                            storeu<B>(to + i / 2 * W + v * L, pair_lanes(d_gate[0], d_gate[1]));
                            if (hidden.up)
                                storeu<B>(to + (i + hidden.up) / 2 * W + v * L, pair_lanes(d_up[0], d_up[1]));
                        }
                    }
                }
                storeu<F>(dweights + lane, loadu<F>(dweights + lane) + sum);
            }
        }
    }

    void write_weights() {
        const E* bias = p.b_down ? static_cast<const E*>(p.b_down) + chunk.expert * p.d : nullptr;
        for (int64_t i = 0; i < chunk.size; ++i) {
            const E* dy = static_cast<const E*>(g.dy) + p.token[chunk.first + i] * g.dy_row;
            Vec<F> sum{};
            for (int64_t e = 0; bias && e < p.d; e += L)
                sum += load_lanes<F>(dy + e, p.d - e) * load_lanes<F>(bias + e, p.d - e);
            static_cast<F*>(g.dweights)[p.to[chunk.first + i]] = dweights[i] + reduce_add<F>(sum);
        }
    }
};

// Gradients of matrices.
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
        if (first == last) {
            for (int64_t r = 0; r < kRowBlock * W; ++r) c[r] = 0;
            for (int64_t r = 0; r < M; r += kRowBlock) write(up, e, r, M, column, lanes, c);
        }
        for (const Chunk *from = first, *to; from < last; from = to) {
            int64_t rows = 0;
            for (to = from; to < last && rows + kChunk <= kGroup; ++to)
                rows += gather(*to, up, column, lanes, rows);
            const bool whole = from == first && to == last;
            for (int64_t r = 0; r < M; r += kRowBlock) {
                const int64_t count = M - r < kRowBlock ? M - r : kRowBlock;
                F* sums = c + (whole ? 0 : r * W);
                rows = 0;
                for (const Chunk* chunk = from; chunk < to; ++chunk) {
                    const int64_t padded = round_up(chunk->size, L);
                    const auto a = left(*chunk, up, r, count, padded);
                    const B* b = panel + rows / Pair * W;
                    if (chunk == first)
                        gemm<P, false>(count, (lanes + L - 1) / L, padded / Pair, a.data, a.row, a.step, b, W,
                                       sums, W);
                    else
                        gemm<P, true>(count, (lanes + L - 1) / L, padded / Pair, a.data, a.row, a.step, b, W,
                                      sums, W);
                    rows += padded;
                }
                if (to == last) write(up, e, r, M, column, lanes, sums);
            }
        }
        if (up && column == 0 && g.db_up) sum_up(e, first, last);
        if (!up && g.db_down) sum_down(e, first, last, column, lanes);
    }

    // Rows of x or dy at [rows / Pair][W] of the panel, padded with zeros; returns how many.
    int64_t gather(const Chunk& chunk, bool up, int64_t column, int64_t lanes, int64_t rows) {
        const E* x = static_cast<const E*>(up ? p.x : g.dy) + column;
        const int64_t row = up ? p.x_row : g.dy_row, padded = round_up(chunk.size, L);
        const int64_t* token = p.token + chunk.first;
        B* to = panel + rows / Pair * W;
        pack_rows<P>([&](int64_t i) { return x + token[i] * row; }, chunk.size, lanes, W, to);
        const int64_t steps = (chunk.size + Pair - 1) / Pair;
        __builtin_memset(to + steps * W, 0, size_t((padded / Pair - steps) * W) * sizeof(B));
        return padded;
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

template <typename F, typename E, typename P>
void forward_chunks(const Problem& p, Queue& queue) {
    Forward<F, E, P> work(p);
    for (int64_t task; (task = queue.take()) < queue.end;) work.run(p.chunks[task]);
}

template <typename F, typename E, typename P>
void backward_chunks(const Gradient& g, Queue& queue) {
    Backward<F, E, P> work(g);
    for (int64_t task; (task = queue.take()) < queue.end;) work.run(g.problem.chunks[task]);
}

template <typename F, typename E, typename P>
void matrix_tasks(const Gradient& g, Queue& queue) {
    Matrices<F, E, P> work(g);
    for (int64_t task; (task = queue.take()) < queue.end;) work.run(task);
}

template <typename F, typename E, typename P>
void sum_rows(const Sum& s, int64_t begin, int64_t end) {
    sum_part_rows<F, E>(s.parts, s.y, s.k, s.d, begin, end);
}

void expert_forward(const Problem& p, Queue& queue) {
    SLM_DISPATCH(forward_chunks, p.dtype, p.dot, p, queue);
}
void expert_backward(const Gradient& g, Queue& queue) {
    SLM_DISPATCH(backward_chunks, g.problem.dtype, g.problem.dot, g, queue);
}
void expert_matrices(const Gradient& g, Queue& queue) {
    SLM_DISPATCH(matrix_tasks, g.problem.dtype, g.problem.dot, g, queue);
}
void expert_sum(const Sum& s, int64_t begin, int64_t end) {
    SLM_DISPATCH(sum_rows, s.dtype, s.dot, s, begin, end);
}

}  // namespace

namespace slm::experts {
#define SLM_JOIN(a, b) a##b
#define SLM_NAME(a, b) SLM_JOIN(a, b)
const Kernels SLM_NAME(kernels_, SLM_TIER) = {
    kLanes<float>, kLanes<double>, kTileVectors, expert_forward, expert_backward, expert_matrices, expert_sum,
};
#undef SLM_NAME
#undef SLM_JOIN
}  // namespace slm::experts
