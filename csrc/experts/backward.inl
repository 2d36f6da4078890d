// One chunk backward, to the rows of x: what the matrices' gradients need is left behind.
#pragma once

#include "activation.inl"
#include "chunk.inl"

namespace {

template <typename F, typename E, typename P>
struct Backward : Panels<F, E, P> {
    using Base = Panels<F, E, P>;
    using Base::arena;
    using Base::chunk;
    using Base::few;
    using Base::p;
    using Base::width;
    using typename Base::B;
    static constexpr int L = Base::L, W = Base::W, Pair = Base::Pair;

    const Gradient& g;
    B *dy, *dh, *lanes;  // operands: dh of a block; of few rows, before it is turned
    F *da, *dx;  // a block of results, and all of dx
    F weights[kChunk], dweights[kChunk], part[kChunk];  // part: of d(weights), of kHidden units

    static int64_t dx_size(const Problem& p) { return kChunk * p.d; }
    explicit Backward(const Gradient& gradient)
        : Base(gradient.problem,
               Base::operand_size(gradient.problem.d) + 3 * Base::kResults + dx_size(gradient.problem) + 64),
          g(gradient) {
        dy = arena.template take<B>(Base::operand_size(p.d));
        dh = arena.template take<B>(Base::kResults);
        lanes = arena.template take<B>(Base::kResults);
        da = arena.template take<F>(Base::kResults);
        dx = arena.template take<F>(dx_size(p));
    }

    void run(const Chunk& of) {
        this->begin(of);
        this->gather(g.dy, g.dy_row, dy);
        this->load_weights(weights);
        fill_zero(dweights, kChunk);
        const E *up = this->matrix(p.up), *down = this->matrix(p.down);
        const Part every_d{0, p.d, 0};
        for (int64_t j = 0; j < p.n; j += this->hidden_block()) {
            const Hidden hidden(p, j, this->hidden_block());
            this->template multiply<false>(down + j * p.down.column, p.down.column, p.down.row, hidden.units,
                                           &every_d, 1, dy, this->stride(p.d), da, hidden.units * W);
            SLM_ACTIVATION(p.activation, [&](auto f) { activate<decltype(f)::value>(hidden, j); });
            if (!g.need_x) continue;
            if (few) this->turn(lanes, hidden.rows(), dh, this->line(hidden.rows()), 0);
            for (int64_t r = 0; r < p.d; r += this->row_block()) {
                const int64_t count = p.d - r < this->row_block() ? p.d - r : this->row_block();
                const E* rows = up + r * p.up.column;
                const int64_t stride = this->stride(hidden.rows());
                if (j == 0)
                    this->template multiply<false>(rows, p.up.column, p.up.row, count, hidden.parts,
                                                   hidden.count, dh, stride, dx + r * width, p.d * W);
                else
                    this->template multiply<true>(rows, p.up.column, p.up.row, count, hidden.parts,
                                                  hidden.count, dh, stride, dx + r * width, p.d * W);
            }
        }
        if (g.need_x) this->write(dx, p.d * W, 0, p.d, nullptr);
        if (g.dweights) write_weights();
    }

    // dh, w a and d(weights) of a block of hidden units.
    template <int A>
    void activate(const Hidden& hidden, int64_t j) {
        for (int64_t i = 0; i < hidden.units; i += kHidden) {
            fill_zero(part, kChunk);
            const int64_t end = i + kHidden < hidden.units ? i + kHidden : hidden.units;
            activate<A>(hidden, j, i, end);
            add(dweights, part, kChunk);
        }
    }

    // Units [begin, end) of the block. (Everything a loop needs is a copy: a store of words could change
    // members.)
    template <int A>
    void activate(const Hidden& hidden, int64_t j, int64_t begin, int64_t end) {
        const int64_t size = chunk.size, padded = round_up(size, L), across = width, step = hidden.step;
        const int64_t up = hidden.up, up_row = hidden.row(up) - hidden.row(0);  // from a gate to its up
        const bool keep = g.dh != nullptr;
        for (int64_t panel = 0; panel < this->panels(); ++panel) {
            const int64_t lane0 = panel * W, vectors = this->vectors(panel);
            B* const to = few ? lanes : dh + panel * hidden.rows() / Pair * W;
            const F* const d_a = da + panel * hidden.units * W;
            for (int64_t i = begin; i < end; i += Pair) {
                const int64_t row =
                    hidden.row(i * step);  // of the first unit's gate; the next is `step` rows on
                const E* const h = static_cast<const E*>(p.h) + chunk.first * p.H + row * size + lane0;
                E* const kept =
                    keep ? static_cast<E*>(g.dh) + chunk.padded * p.H + row * padded + lane0 : nullptr;
                E* const wa =
                    keep ? static_cast<E*>(g.a) + chunk.padded * p.n + (j + i) * padded + lane0 : nullptr;
                for (int64_t v = 0; v < vectors; ++v) {
                    const int64_t lane = v * L, n = size - lane0 - lane;
                    const Vec<F> weight = loadu<F>(weights + lane0 + lane);
                    const Mask<F> inside = lane_numbers<F>(0) < F(n);  // elsewhere 0: 0 x inf is not
                    Vec<F> d_gate[Pair], d_up[Pair] = {}, sum = loadu<F>(part + lane0 + lane);
#pragma GCC unroll 2
                    for (int u = 0; u < Pair; ++u) {
                        const int64_t at = u * step * size + lane, to_keep = u * step * padded + lane;
                        Vec<F> slope, a = bend<F, A>(load_lanes<F>(h + at, n), &slope);
                        const Vec<F> d = select<F>(inside, loadu<F>(d_a + (i + u) * across + lane), Vec<F>{});
                        const Vec<F> wd = d * weight;
                        d_gate[u] = wd * slope;
                        if (up) {
                            Vec<F> up_slope;
                            const Vec<F> other =
                                lift<F, A>(load_lanes<F>(h + at + up_row * size, n), &up_slope);
                            d_up[u] = wd * a * up_slope;
                            d_gate[u] *= other;
                            a *= other;
                            if (keep) P::store(kept + to_keep + up_row * padded, d_up[u]);
                        }
                        sum += d * a;
                        if (!keep) continue;
                        P::store(kept + to_keep, d_gate[u]);
                        P::store(wa + u * padded + lane, select<F>(inside, a * weight, Vec<F>{}));
                    }
                    storeu<F>(part + lane0 + lane, sum);
                    if constexpr (Pair == 1) {
                        storeu<F>(to + i * step * across + lane, d_gate[0]);
                        if (up) storeu<F>(to + (i * step + up) * across + lane, d_up[0]);
                    } else if (step == 2) {
                        storeu<B>(to + i * across + lane, pair_lanes(d_gate[0], d_up[0]));
                        storeu<B>(to + (i + 1) * across + lane, pair_lanes(d_gate[1], d_up[1]));
                    } else {
                        storeu<B>(to + i / 2 * across + lane, pair_lanes(d_gate[0], d_gate[1]));
                        if (up) storeu<B>(to + (i + up) / 2 * across + lane, pair_lanes(d_up[0], d_up[1]));
                    }
                }
            }
        }
    }

    void write_weights() {
        const E* bias = p.b_down ? static_cast<const E*>(p.b_down) + chunk.expert * p.d : nullptr;
        for (int64_t i = 0; i < chunk.size; ++i) {
            const E* from = static_cast<const E*>(g.dy) + p.token[chunk.first + i] * g.dy_row;
            Vec<F> sum{};
            for (int64_t e = 0; bias && e < p.d; e += L)
                sum += load_lanes<F>(from + e, p.d - e) * load_lanes<F>(bias + e, p.d - e);
            static_cast<F*>(g.dweights)[p.to[chunk.first + i]] = dweights[i] + reduce_add<F>(sum);
        }
    }
};

}  // namespace
