// Online softmax of a block of queries over blocks of keys (Dao 2023, FlashAttention-2, section 3.1):
//
//     S^T = K Q^T            tile kernel, A = K rows as they lie, B = Q^T packed once
//     m, P^T = exp2(c (S^T - m)), l                  down the lanes; c = scale log2(e)
//     O^T += V^T P^T         tile kernel, A = V rows as they lie (read across), B = P^T
//
// Keys outside the window are never touched. O^T, l, m stay in cache. Useful work: 4 D FLOPs a visible
// score, one exp2 (14 instructions a register).
#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kKeys = 64;  // keys per softmax block

// Track: also keep `index`, the first key at each query's true maximum `high` (m may lag behind it).
template <typename F, typename E, typename P, bool Track>
struct SoftmaxBlock {
    static constexpr int L = kLanes<F>, W = kBlock<F>;
    using B = typename P::B;

    const Band band;
    const int64_t D, Dv;
    const F scale, softcap;
    const bool rewrite;  // the softmax's first pass turns scores into log2 units
    const F c;           // what turns a score into log2 units in the second
    B* qt;               // [D / kPair][W]
    F* st;               // S^T, then P^T [kKeys][W]
    B* pt;               // P^T as B operand; st itself for Fma
    F* ot;               // [Dv][W]
    F* l;                // sum of P^T, [W]: one more row of ot
    F *m, *high;         // the shift and the maximum of S^T so far, [W]
    Int<F>* index;       // [W]
    F *kf, *vf;          // widened keys and values
    B* vp;               // V in pairs of keys (Dot)

    static int64_t bytes(int64_t D, int64_t Dv) {
        const int64_t d = round_up(D, L), dv = round_up(Dv, L);
        return ((d + dv + 5) * W + 2 * kKeys * W + 2 * kKeys * (d + dv)) * int64_t(sizeof(F)) + 1024;
    }

    SoftmaxBlock(Arena& arena, const Band& window, int64_t d_, int64_t dv_, double factor, double cap)
        : band(window),
          D(d_),
          Dv(dv_),
          scale(F(factor)),
          softcap(F(cap)),
          rewrite(rewrites(factor, cap)),
          c(rewrite ? F(1) : F(factor) * kLog2e<F>) {
        const int64_t d = round_up(D, L), dv = round_up(Dv, L);
        qt = arena.take<B>(d * W);
        st = arena.take<F>(kKeys * W);
        ot = arena.take<F>((dv + 1) * W);
        l = ot + Dv * W;
        m = arena.take<F>(W);
        high = arena.take<F>(W);
        index = arena.take<Int<F>>(W);
        if constexpr (kPair<P> == 2) {
            pt = arena.take<B>(kKeys / 2 * W);
            vp = arena.take<B>(kKeys / 2 * dv);
        } else {
            pt = reinterpret_cast<B*>(st);
        }
        if constexpr (kPair<P> == 1 && !std::is_same_v<E, F>) {
            kf = arena.take<F>(kKeys * d);
            vf = arena.take<F>(kKeys * dv);
        }
    }

    // A new block of queries. `sink`: a logit, in scores' units, that joins the denominator; or -inf.
    void begin(const E* q, int64_t stride, int64_t rows, F sink) {
        pack_transposed<P>(q, stride, rows, D, qt, W);
        for (int i = 0; i < W; ++i) m[i] = high[i] = sink, l[i] = sink == -kInf<F> ? F(0) : F(1);
        for (int64_t i = 0; i < Dv * W; ++i) ot[i] = F(0);
        if constexpr (Track)
            for (int i = 0; i < W; ++i) index[i] = 0;
    }

    // Up to kKeys keys, whose rows begin at k and v, for queries that stand from i0 on.
    void attend(const E* k, int64_t k_row, const E* v, int64_t v_row, Range keys, int64_t i0, int64_t rows) {
        Run runs[kKeys];
        int count = 0;
        for (int64_t j = keys.begin; j < keys.end; j = runs[count - 1].j.end)
            runs[count++] = slm::next_run(band, i0, rows, L, kPair<P>, j, keys.end);

        const auto scores = [&](const auto* a, int64_t row) {
            for (int r = 0; r < count; ++r) {
                const int64_t at = runs[r].j.begin - keys.begin, lane = runs[r].v.begin * L;
                gemm<P, false>(runs[r].j.size(), runs[r].v.size(), D / kPair<P>, a + at * row, row, kPair<P>,
                               qt + lane, W, st + at * W + lane, W);
            }
        };
        if constexpr (kPair<P> == 2) {
            scores(k, k_row);
        } else {
            const F* a = widened<F>(k, k_row, keys.size(), D, kf);  // sets k_row
            scores(a, k_row);
        }

        softmax(runs, count, keys.begin, i0);

        if constexpr (kPair<P> == 2) {
            const int64_t width = round_up(Dv, L);
            pack_rows<P>(v, v_row, keys.size(), Dv, width, vp);
            const E* a = reinterpret_cast<const E*>(vp);
            values(runs, count, keys.begin, a, 2, 2 * width);
        } else {
            const F* a = widened<F>(v, v_row, keys.size(), Dv, vf);
            values(runs, count, keys.begin, a, 1, v_row);
        }
    }

    template <typename A>
    void values(const Run* runs, int count, int64_t j0, const A* a, int64_t a_row, int64_t a_step) {
        for (int r = 0; r < count; ++r) {
            const int64_t at = (runs[r].j.begin - j0) / kPair<P>, lane = runs[r].v.begin * L;
            const int64_t steps = (runs[r].j.size() + kPair<P> - 1) / kPair<P>;
            gemm<P, true>(Dv, runs[r].v.size(), steps, a + at * a_step, a_row, a_step, pt + at * W + lane, W,
                          ot + lane, W);
        }
    }

    // S^T -> P^T in place, with the running maximum and denominator; O^T is rescaled where m rose.
    void softmax(const Run* runs, int count, int64_t j0, int64_t i0) {
        for (int r = 0; r < count; ++r) {
            const Run& run = runs[r];
            for (int64_t v = run.v.begin; v < run.v.end; ++v) {
                Vec<F> top = loadu<F>(high + v * L);
                Mask<F> first = Track ? loadu<Int<F>>(index + v * L) : Mask<F>{};
                F* s = st + (run.j.begin - j0) * W + v * L;
                for (int64_t j = run.j.begin; j < run.j.end; ++j, s += W) {
                    Vec<F> x = loadu<F>(s);
                    if (rewrite) {
                        x *= scale;
                        if (softcap > 0) x = softcap * tanh<F>(x / softcap);
                        x *= kLog2e<F>;
                    }
                    if (run.masked) x = select<F>(visible_lanes<F>(band, i0, j, v), x, splat<F>(-kInf<F>));
                    if (rewrite || run.masked) storeu<F>(s, x);
                    if constexpr (Track) first = x > top ? Mask<F>{} + Int<F>(j) : first;
                    top = vmax<F>(top, x);
                }
                storeu<F>(high + v * L, top);
                if constexpr (Track) storeu<Int<F>>(index + v * L, first);
            }
        }
        for (int i = 0; i < W; i += L) rescale(i, loadu<F>(high + i));
        for (int r = 0; r < count; ++r) {
            const Run& run = runs[r];
            for (int64_t v = run.v.begin; v < run.v.end; ++v) {
                const Vec<F> shift = finite_or_zero(loadu<F>(m + v * L));
                Vec<F> sum{};  // of this run alone: rounds less than one long sum
                F* s = st + (run.j.begin - j0) * W + v * L;
                for (int64_t j = run.j.begin; j < run.j.end; j += kPair<P>, s += kPair<P> * W) {
                    const Vec<F> x = exp2_nonpositive<F>((loadu<F>(s) - shift) * c);
                    sum += x;
                    if constexpr (kPair<P> == 1) {
                        storeu<F>(s, x);
                    } else {
                        Vec<F> y{};
                        if (j + 1 < run.j.end) y = exp2_nonpositive<F>((loadu<F>(s + W) - shift) * c);
                        sum += y;
                        storeu<B>(pt + (j - j0) / 2 * W + v * L, pair_lanes(x, y));
                    }
                }
                storeu<F>(l + v * L, loadu<F>(l + v * L) + sum);
            }
        }
    }

    static SLM_INLINE Vec<F> finite_or_zero(Vec<F> x) {  // -inf - -inf must not become NaN
        return select<F>(x == -kInf<F>, Vec<F>{}, x);
    }

    // A shift that lags behind the maximum by up to 2^8 is as good, and saves rescaling O^T for nearly every
    // block after the first (the lazy rescaling of FlashAttention-4).
    SLM_INLINE void rescale(int i, Vec<F> top) {
        const Vec<F> old = loadu<F>(m + i);
        const Mask<F> rose = (top - old) * c > F(8);  // true from -inf, false between two of them
        Int<F> any = 0, seen = 0;
        for (int n = 0; n < L; ++n) any |= rose[n];
        if (!any) return;
        const Vec<F> shift = select<F>(rose, top, old);
        storeu<F>(m + i, shift);
        const Mask<F> begun = old > -kInf<F>;
        for (int n = 0; n < L; ++n) seen |= begun[n];
        if (!seen) return;  // O^T and l are still zero
        const Vec<F> factor = exp2_nonpositive<F>((old - finite_or_zero(shift)) * c);
        storeu<F>(l + i, loadu<F>(l + i) * factor);
        for (int64_t d = 0; d < Dv; ++d) storeu<F>(ot + d * W + i, loadu<F>(ot + d * W + i) * factor);
    }

    // P^T so far is relative to exp2(c m): makes that exp2(c high) / factor, a shift without lag.
    void settle(F factor) {
        for (int i = 0; i < W; i += L) {
            const Vec<F> times =
                factor * exp2_nonpositive<F>((loadu<F>(m + i) - finite_or_zero(loadu<F>(high + i))) * c);
            for (int64_t d = 0; d <= Dv; ++d) storeu<F>(ot + d * W + i, loadu<F>(ot + d * W + i) * times);
        }
    }
};

}  // namespace
