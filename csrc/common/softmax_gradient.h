// The gradient of softmax scores, for a block of queries against runs of keys (band.h): five products on the
// tile kernel, all of them on operands as they lie, but for Q^T and dO^T, packed once a block:
//
//     S^T  = K Q^T          dP^T = V dO^T            P^T = exp2(c S^T - lse), dS^T = P^T (dP^T - delta)
//     dV  += P^T dO         dK  += dS^T Q            dQ^T += K^T dS^T
//
// Keys, values and their gradients lie in adjacent scratch rows: a head's own lie H D apart, and are read and
// added to for every block of queries.
#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kGradKeys = 64;  // keys per run

// Shift: `lse` is the shift alone, in the units of SoftmaxBlock, with a gradient of its own. P^T is taken
// times `mix` and each query's `factor`, and what flows through the maximum is left for the caller to give to
// the key there: the sums of dS^T as it was multiplied, in `through`, and before scale and mix in `shares`.
template <typename F, typename E, typename P, bool Shift>
struct SoftmaxGradient {
    static constexpr int L = kLanes<F>, W = kBlock<F>, Pair = kPair<P>;
    using A = typename P::A;
    using B = typename P::B;

    const Band band;
    const int64_t D, Dv, d, dv;  // head sizes, and rounded up to registers
    const F scale, softcap;
    const bool rewrite;
    F mix = 1;
    B *qt, *dot;  // Q^T, dO^T [D / Pair][W]
    B *qn, *don;  // Q, dO as B operands with queries as k: [W / Pair][d]
    const B *q_rows, *dout_rows;  // the same, or Q and dO as they lie
    int64_t q_row, dout_row;
    F *st, *dpt;  // S^T then P^T, dP^T then dS^T [kGradKeys][W]
    A *pa, *dsa;  // P^T, dS^T as A operands; st, dpt themselves for Fma
    B* dsb;  // dS^T as B operand
    F* dqt;  // [D][W]
    F *lse, *delta;  // [W]; lse in log2 units, +inf where there is nothing to see
    F *factor, *through, *shares;  // [W]
    A *ka, *va;  // keys and values as A operands [capacity][d]
    B* kp;  // keys in pairs (Dot)
    F *dka, *dva;  // their gradients [capacity][d]

    static int64_t bytes(int64_t D, int64_t Dv, int64_t capacity) {
        const int64_t d = round_up(D, L), dv = round_up(Dv, L);
        const int64_t blocks = 3 * d * W + 2 * dv * W + 5 * kGradKeys * W + 5 * W;
        return (blocks + (2 * capacity + 2) * (d + dv) + (capacity / 2 + 1) * d) * int64_t(sizeof(F)) + 2048;
    }

    SoftmaxGradient(Arena& arena, const Band& window, int64_t d_, int64_t dv_, double scale_, double cap,
                    int64_t capacity)
        : band(window),
          D(d_),
          Dv(dv_),
          d(round_up(d_, L)),
          dv(round_up(dv_, L)),
          scale(F(scale_)),
          softcap(F(cap)),
          rewrite(rewrites(scale_, cap)) {
        qt = arena.take<B>(d * W);
        dot = arena.take<B>(dv * W);
        qn = arena.take<B>(d * W);
        don = arena.take<B>(dv * W);
        st = arena.take<F>(kGradKeys * W);
        dpt = arena.take<F>(kGradKeys * W);
        dqt = arena.take<F>(d * W);
        lse = arena.take<F>(W);
        delta = arena.take<F>(W);
        factor = arena.take<F>(W);
        through = arena.take<F>(W);
        shares = arena.take<F>(W);
        if constexpr (Pair == 2) {
            pa = arena.take<A>(kGradKeys * W);
            dsa = arena.take<A>(kGradKeys * W);
            dsb = arena.take<B>(kGradKeys / 2 * W);
            kp = arena.take<B>((capacity / 2 + 1) * d);
        } else {
            pa = st, dsa = dsb = dpt;
        }
        ka = arena.take<A>(capacity * d);
        va = arena.take<A>(capacity * dv);
        dka = arena.take<F>(capacity * d);
        dva = arena.take<F>(capacity * dv);
    }

    // Rows of keys and values into scratch rows from `at` on; their gradients begin at 0.
    void load_keys(const E* k, int64_t k_row, const E* v, int64_t v_row, int64_t at, int64_t count) {
        for (int64_t j = 0; j < count; ++j) {
            copy_row(k + j * k_row, ka + (at + j) * d, D);
            copy_row(v + j * v_row, va + (at + j) * dv, Dv);
        }
        for (int64_t n = at * d; n < (at + count) * d; ++n) dka[n] = F(0);
        for (int64_t n = at * dv; n < (at + count) * dv; ++n) dva[n] = F(0);
    }

    // Zeros for rows that are multiplied by zeros before they are loaded.
    void clear_keys(int64_t at, int64_t count) {
        __builtin_memset(ka + at * d, 0, size_t(count * d) * sizeof(A));
        __builtin_memset(va + at * dv, 0, size_t(count * dv) * sizeof(A));
    }

    // Scratch rows of keys in pairs, from an even one on.
    void pair_keys(int64_t at, int64_t count) {
        if constexpr (Pair == 2) pack_rows<P>(ka + at * d, d, count, D, d, kp + at / 2 * d);
    }

    void load_queries(const E* q, int64_t q_stride, const E* dout, int64_t dout_stride, int64_t rows) {
        pack_transposed<P>(q, q_stride, rows, D, qt, W);
        pack_transposed<P>(dout, dout_stride, rows, Dv, dot, W);
        q_row = d, dout_row = dv;
        q_rows = as_rows(q, q_stride, rows, D, q_row, qn);
        dout_rows = as_rows(dout, dout_stride, rows, Dv, dout_row, don);
        for (int64_t n = 0; n < d * W; ++n) dqt[n] = F(0);
        if constexpr (Shift)
            for (int64_t n = 0; n < W; ++n) through[n] = shares[n] = F(0);
    }

    // A run of keys in scratch rows from `at` on, for `rows` queries that stand from i0 on.
    void attend(const Run& run, int64_t at, int64_t i0, int64_t rows) {
        const int64_t n = run.j.size(), lane = run.v.begin * L;
        const int64_t past = run.v.end * L < rows ? run.v.end * L : rows;  // lanes in use
        gemm<P, false>(n, run.v.size(), D / Pair, ka + at * d, d, Pair, qt + lane, W, st + lane, W);
        gemm<P, false>(n, run.v.size(), Dv / Pair, va + at * dv, dv, Pair, dot + lane, W, dpt + lane, W);
        differentiate(run, i0);
        const int64_t steps = (past - lane + Pair - 1) / Pair;
        gemm<P, true>(n, dv / L, steps, pa + lane, W, Pair, dout_rows + lane / Pair * dout_row, dout_row,
                      dva + at * dv, dv);
        gemm<P, true>(n, d / L, steps, dsa + lane, W, Pair, q_rows + lane / Pair * q_row, q_row, dka + at * d,
                      d);
        if constexpr (Pair == 2)
            gemm<P, true>(D, run.v.size(), (n + 1) / 2, reinterpret_cast<const A*>(kp + at / 2 * d), 2, 2 * d,
                          dsb + lane, W, dqt + lane, W);
        else
            gemm<P, true>(D, run.v.size(), n, ka + at * d, 1, d, dsb + lane, W, dqt + lane, W);
    }

    static SLM_INLINE void copy_row(const E* from, A* to, int64_t n) {
        if constexpr (std::is_same_v<E, A>)
            __builtin_memcpy(to, from, size_t(n) * sizeof(E));
        else
            widen_row<F>(from, to, n);
    }

    // Rows with queries as k: as they lie if whole registers of F, else packed.
    SLM_INLINE const B* as_rows(const E* x, int64_t stride, int64_t rows, int64_t size, int64_t& width,
                                B* buffer) {
        if constexpr (std::is_same_v<E, B>) {
            if (size % L == 0) {
                width = stride;
                return x;
            }
        }
        pack_rows<P>(x, stride, rows, size, width, buffer);
        return buffer;
    }

    // S^T, dP^T -> P^T, dS^T (times scale, so that dQ and dK need no more).
    void differentiate(const Run& run, int64_t i0) {
        const F cap = softcap, c = cap > 0 ? F(1) : scale * kLog2e<F>;
        const F outer = Shift ? scale * mix : scale;
        for (int64_t v = run.v.begin; v < run.v.end; ++v) {
            const Vec<F> shift = loadu<F>(lse + v * L), mean = loadu<F>(delta + v * L);
            const Vec<F> times = Shift ? loadu<F>(factor + v * L) : Vec<F>{};
            Vec<F> sum{}, rounded{};
            const auto one = [&](int64_t j, Vec<F>& prob, Vec<F>& ds) __attribute__((always_inline)) {
                const int64_t at = (j - run.j.begin) * W + v * L;
                Vec<F> s = loadu<F>(st + at), slope = splat<F>(outer);
                if (cap > 0) {
                    const Vec<F> bent = tanh<F>(s * scale / cap);
                    s = cap * bent * kLog2e<F>;
                    slope *= F(1) - bent * bent;
                }
                if (!Shift)
                    prob = exp2_nonpositive<F>(s * c - shift);
                else if (rewrite)  // as SoftmaxBlock computed the shift: rounded before it is subtracted
                    prob = exp2_nonpositive<F>(as_stored<F>(s * scale * kLog2e<F>) - shift);
                else  // exactly 1 at the maximum
                    prob = exp2_nonpositive<F>((s - shift) * c);
                if (run.masked) prob = select<F>(visible_lanes<F>(band, i0, j, v), prob, Vec<F>{});
                if constexpr (Shift) prob *= times;
                const Vec<F> share = prob * (loadu<F>(dpt + at) - mean);
                ds = share * slope;
                if constexpr (Shift) {
                    sum += share;
                    prob *= mix;
                }
            };
            for (int64_t j = run.j.begin; j < run.j.end; j += Pair) {
                const int64_t at = (j - run.j.begin) * W + v * L;
                Vec<F> p0, ds0;
                one(j, p0, ds0);
                if constexpr (Pair == 1) {
                    storeu<F>(st + at, p0);
                    storeu<F>(dpt + at, ds0);
                } else {
                    Vec<F> p1{}, ds1{};
                    if (j + 1 < run.j.end) one(j + 1, p1, ds1);
                    P::store(pa + at, p0);
                    P::store(dsa + at, ds0);
                    if (j + 1 < run.j.end) P::store(pa + at + W, p1), P::store(dsa + at + W, ds1);
                    if constexpr (Shift) {
                        rounded += load<F>(dsa + at);
                        if (j + 1 < run.j.end) rounded += load<F>(dsa + at + W);
                    }
                    storeu<B>(dsb + (j - run.j.begin) / 2 * W + v * L, pair_lanes(ds0, ds1));
                }
            }
            if constexpr (Shift) {
                if constexpr (Pair == 1) rounded = sum * outer;
                storeu<F>(through + v * L, loadu<F>(through + v * L) + rounded);
                storeu<F>(shares + v * L, loadu<F>(shares + v * L) + sum);
            }
        }
    }
};

}  // namespace
