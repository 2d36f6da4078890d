// One chunk forward.
#pragma once

#include "activation.inl"
#include "chunk.inl"

namespace {

template <typename F, typename E, typename P>
struct Forward : Panels<F, E, P> {
    using Base = Panels<F, E, P>;
    using Base::arena;
    using Base::chunk;
    using Base::few;
    using Base::p;
    using Base::width;
    using typename Base::B;
    static constexpr int L = Base::L, W = Base::W, Pair = Base::Pair;

    B *x, *a, *lanes;  // operands; of few rows, a block of a before it is turned
    F* c;  // a block of results
    F weights[kChunk];

    explicit Forward(const Problem& problem)
        : Base(problem,
               Base::operand_size(problem.d) + Base::operand_size(problem.n) + 2 * Base::kResults + 64) {
        x = arena.template take<B>(Base::operand_size(p.d));
        a = arena.template take<B>(Base::operand_size(p.n));
        lanes = arena.template take<B>(Base::kResults);
        c = arena.template take<F>(Base::kResults);
    }

    void run(const Chunk& of) {
        this->begin(of);
        this->gather(p.x, p.x_row, x);
        const E *up = this->matrix(p.up), *down = this->matrix(p.down);
        const Part every_d{0, p.d, 0}, every_n{0, p.n, 0};
        for (int64_t j = 0; j < p.n; j += this->hidden_block()) {
            const Hidden hidden(p, j, this->hidden_block());
            const int64_t c_stride = hidden.rows() * W;
            for (int i = 0; i < hidden.count; ++i) {
                const Part& part = hidden.parts[i];
                this->template multiply<false>(up + part.begin * p.up.row, p.up.row, p.up.column, part.count,
                                               &every_d, 1, x, this->stride(p.d), c + part.at * width,
                                               c_stride);
            }
            finish(hidden);
            SLM_ACTIVATION(p.activation, [&](auto f) { activate<decltype(f)::value>(hidden, j); });
        }
        this->load_weights(weights);
        const E* bias = p.b_down ? static_cast<const E*>(p.b_down) + chunk.expert * p.d : nullptr;
        for (int64_t r = 0; r < p.d; r += this->row_block()) {
            const int64_t count = p.d - r < this->row_block() ? p.d - r : this->row_block();
            this->template multiply<false>(down + r * p.down.row, p.down.row, p.down.column, count, &every_n,
                                           1, a, this->stride(p.n), c, count * W);
            for (int64_t i = 0; bias && i < count * this->panels(); ++i) {
                const F b = widen<F>(bias[r + i % count]);
                for (int64_t v = 0; v < width; v += L)
                    storeu<F>(c + i * width + v, loadu<F>(c + i * width + v) + b);
            }
            this->write(c, count * W, r, count, weights);
        }
    }

    // Adds the bias to a block of pre-activations, and keeps them for the backward. (On copies of what the
    // loop needs: a store of words could change members.)
    void finish(const Hidden& hidden) {
        const E* bias = p.b_up ? static_cast<const E*>(p.b_up) + chunk.expert * p.H : nullptr;
        E* h = p.h ? static_cast<E*>(p.h) + chunk.first * p.H : nullptr;
        if (!bias && !h) return;
        const int64_t size = chunk.size, across = width;
        for (int64_t panel = 0; panel < this->panels(); ++panel) {
            const int64_t n = this->rows(panel);
            F* const block = c + panel * hidden.rows() * W;
            for (int64_t r = 0; r < hidden.rows(); ++r) {
                const F b = bias ? widen<F>(bias[hidden.row(r)]) : F(0);
                E* to = h ? h + hidden.row(r) * size + panel * W : nullptr;
                for (int64_t lane = 0; lane < n; lane += L) {
                    const Vec<F> y = loadu<F>(block + r * across + lane) + b;
                    if (bias) storeu<F>(block + r * across + lane, y);
                    if (h) store_lanes<P>(to + lane, y, n - lane);
                }
            }
        }
    }

    template <int A>
    void activate(const Hidden& hidden, int64_t j) {
        const int64_t across = width, step = hidden.step, up = hidden.up;
        for (int64_t panel = 0; panel < this->panels(); ++panel) {
            const int64_t n = this->rows(panel);
            const F* const from = c + panel * hidden.rows() * W;
            B* const to = few ? lanes : a + (panel * p.n + j) / Pair * W;
            for (int64_t i = 0; i < hidden.units; i += Pair)
                for (int64_t lane = 0; lane < n; lane += L) {
                    const auto unit = [=](int64_t u) {
                        const F* gate = from + (i + u) * step * across + lane;
                        const Vec<F> y = bend<F, A>(loadu<F>(gate), nullptr);
                        return up ? y * lift<F, A>(loadu<F>(gate + up * across), nullptr) : y;
                    };
                    if constexpr (Pair == 1)
                        storeu<F>(to + i * across + lane, unit(0));
                    else
                        storeu<B>(to + i / 2 * across + lane, pair_lanes(unit(0), unit(1)));
                }
        }
        if (few) this->turn(lanes, hidden.units, a, this->line(p.n), j);
    }
};

}  // namespace
