// Backward. A task is a chunk of keys of one KV head against two chunks of queries (all heads of the
// group); the operator walks parities and distances (Gradient in sliding_window.h), so tasks never share a
// sum and every sum has one order: the same bits for any number of threads, without a second pass over the
// scores.
//
// For a block of queries, run of keys by run of keys (band.h), five products on the tile kernel, all of
// them on operands as they lie, but for Q^T and dO^T, packed once a block:
//
//     S^T  = K Q^T          dP^T = V dO^T            P^T = exp2(c S^T - lse), dS^T = P^T (dP^T - delta)
//     dV  += P^T dO         dK  += dS^T Q            dQ^T += K^T dS^T      (added into dQ at block's end)
//
// delta = rowsum(dO O) - dlse is taken while a block is packed; a row in reach of two tasks pays
// its 2 D FLOPs twice. Two-pass backward (dQ, then dK and dV) would need seven products instead of five.
//
// Measured as in forward.inl, useful GFLOP/s of one core: float32 71 to 82, bfloat16 123 to 144. Tried:
//   - the chunk's rows and gradients in adjacent scratch rows, queries prefetched: 89 -> 76 ms (float32);
//   - one chunk of queries a task instead of two: keys are copied and added twice, and their gradients
//     kept in float32 in between; 51 against 44 ms (bfloat16); not taken;
//   - conversions by AVX512-BF16 and dQ prefetched: 43 -> 38 ms (bfloat16);
//   - sums of a run added to the total, instead of one long sum: error of dv 4.1e-6 -> 1.4e-6, no cost;
//   - the heads of one chunk one after the other, for the sake of shared pages: no change.

constexpr int64_t kGradKeys = 64;  // keys per run

// delta of one row: sum(dO O), less the gradient that reaches lse itself.
template <typename F, typename E>
SLM_INLINE F row_delta(const slm::Gradient& g, int64_t b, int64_t t, int64_t hq) {
    constexpr int L = kLanes<F>;
    const Problem& p = g.problem;
    const E *o = p.o.at<const E>(b, t, hq), *dout = g.dout.at<const E>(b, t, hq);
    Vec<F> sum{};
    int64_t e = 0;
    for (; e + L <= p.Dv; e += L) sum += load<F>(o + e) * load<F>(dout + e);
    F delta = reduce_add<F>(sum);
    for (; e < p.Dv; ++e) delta += widen<F>(o[e]) * widen<F>(dout[e]);
    if (g.dlse != nullptr) delta -= static_cast<const F*>(g.dlse)[(b * p.Hq + hq) * p.T + t];
    return delta;
}

template <typename F, typename E, typename P>
struct BackwardBlock {
    static constexpr int L = kLanes<F>, W = kBlock<F>, Pair = kPair<P>;
    using A = typename P::A;
    using B = typename P::B;

    const slm::Gradient& g;
    const Problem& p;
    const int64_t d, dv;  // head sizes rounded up to registers
    Arena arena;
    B *qt, *dot;      // Q^T, dO^T [D / Pair][W]
    B *qn, *don;      // Q, dO as B operands with queries as k: [W / Pair][d]
    F *st, *dpt;      // S^T then P^T, dP^T then dS^T [kGradKeys][W]
    A *pa, *dsa;      // P^T, dS^T as A operands; st, dpt themselves for Fma
    B* dsb;           // dS^T as B operand
    F* dqt;           // [D][W]
    F *lse, *delta;   // [W]; lse in log2 units, +inf where there is nothing to see
    A *ka, *va;       // the chunk of keys and values as A operands [chunk][d]
    B* kp;            // the chunk of keys in pairs (Dot)
    F *dka, *dva;     // their gradients [chunk][d]

    static size_t bytes(const slm::Gradient& g) {
        const Problem& p = g.problem;
        const int64_t d = round_up(p.D, L), dv = round_up(p.Dv, L);
        const int64_t blocks = 3 * d * W + 2 * dv * W + 5 * kGradKeys * W + 2 * W;
        return size_t((blocks + (2 * g.chunk + 2) * (d + dv)) * int64_t(sizeof(F)) + 2048);
    }

    explicit BackwardBlock(const slm::Gradient& gradient)
        : g(gradient), p(g.problem), d(round_up(p.D, L)), dv(round_up(p.Dv, L)), arena(bytes(gradient)) {
        qt = arena.take<B>(d * W);
        dot = arena.take<B>(dv * W);
        qn = arena.take<B>(d * W);
        don = arena.take<B>(dv * W);
        st = arena.take<F>(kGradKeys * W);
        dpt = arena.take<F>(kGradKeys * W);
        dqt = arena.take<F>(d * W);
        lse = arena.take<F>(W);
        delta = arena.take<F>(W);
        if constexpr (Pair == 2) {
            pa = arena.take<A>(kGradKeys * W);
            dsa = arena.take<A>(kGradKeys * W);
            dsb = arena.take<B>(kGradKeys / 2 * W);
            kp = arena.take<B>((g.chunk / 2 + 1) * d);
        } else {
            pa = st, dsa = dsb = dpt;
        }
        ka = arena.take<A>(g.chunk * d);
        va = arena.take<A>(g.chunk * dv);
        dka = arena.take<F>(g.chunk * d);
        dva = arena.take<F>(g.chunk * dv);
    }

    // Chunk `c` of the keys of a span.
    void run(const Span& span, int64_t h, int64_t c) {
        const int64_t S = span.k.size(), C = g.chunk;
        const Range keys = Band::clip({c * C, (c + 1) * C}, {0, S});
        const Range mine = Band::clip({(c + g.distance) * C, (c + g.distance + 2) * C}, {span.offset(), S});
        const Range queries = p.band.queries(keys, mine);
        if (queries.size() == 0 && !g.whole) return;

        // The chunk is copied: its rows lie H * D apart and are read again for every block of queries.
        const E* k = p.k.at<const E>(span.b, span.k.begin + keys.begin, h);
        const E* v = p.v.at<const E>(span.b, span.k.begin + keys.begin, h);
        for (int64_t j = 0; j < keys.size(); ++j) {
            copy_row(k + j * p.k.t, ka + j * d, p.D);
            copy_row(v + j * p.v.t, va + j * dv, p.Dv);
        }
        if constexpr (Pair == 2) pack_rows<P>(k, p.k.t, keys.size(), p.D, d, kp);
        for (int64_t n = 0; n < keys.size() * d; ++n) dka[n] = F(0);
        for (int64_t n = 0; n < keys.size() * dv; ++n) dva[n] = F(0);

        const int64_t group = p.Hq / p.H;
        for (int64_t i = queries.begin; i < queries.end; i += W)
            for (int64_t n = 0; n < group; ++n) {
                const int64_t rows = i + W < queries.end ? W : queries.end - i;
                query_block(span, keys, i, rows, h * group + n, i + 2 * W <= queries.end);
            }
        for (int64_t j = 0; j < keys.size(); ++j) {
            const int64_t row = span.k.begin + keys.begin + j;
            if (g.whole) {
                narrow_row(dka + j * d, g.dk.at<E>(span.b, row, h), p.D);
                narrow_row(dva + j * dv, g.dv.at<E>(span.b, row, h), p.Dv);
            } else {
                add_row(dka + j * d, g.dk.at<F>(span.b, row, h), p.D);
                add_row(dva + j * dv, g.dv.at<F>(span.b, row, h), p.Dv);
            }
        }
    }

    static SLM_INLINE void copy_row(const E* from, A* to, int64_t n) {
        if constexpr (std::is_same_v<E, A>)
            __builtin_memcpy(to, from, size_t(n) * sizeof(E));
        else
            widen_row<F>(from, to, n);
    }

    static SLM_INLINE void add_row(const F* from, F* to, int64_t n) {
        int64_t e = 0;
        for (; e + L <= n; e += L) storeu<F>(to + e, loadu<F>(to + e) + loadu<F>(from + e));
        for (; e < n; ++e) to[e] += from[e];
    }

    // Quarter n of the rows that the next block of queries reads.
    SLM_INLINE void prefetch(int64_t b, int64_t t, int64_t hq, int64_t n) {
        if (n >= 4) return;
        const int64_t first = t + W + n * W / 4;
        prefetch_rows(p.q.at<const E>(b, first, hq), p.q.t, W / 4, p.D);
        prefetch_rows(p.o.at<const E>(b, first, hq), p.o.t, W / 4, p.Dv);
        prefetch_rows(g.dout.at<const E>(b, first, hq), g.dout.t, W / 4, p.Dv);
        prefetch_rows(g.dq.at<const F>(b, first - W, hq), g.dq.t, W / 4, p.D);  // of this block
    }

    // Queries at positions [i0, i0 + rows) against the chunk; `more`: another whole block follows.
    void query_block(const Span& span, Range chunk, int64_t i0, int64_t rows, int64_t hq, bool more) {
        const int64_t t = span.q.begin + i0 - span.offset();
        const E* q = p.q.at<const E>(span.b, t, hq);
        const E* dout = g.dout.at<const E>(span.b, t, hq);
        pack_transposed<P>(q, p.q.t, rows, p.D, qt, W);
        pack_transposed<P>(dout, g.dout.t, rows, p.Dv, dot, W);
        int64_t q_row = d, dout_row = dv;
        const B* q_rows = as_rows(q, p.q.t, rows, p.D, q_row, qn);
        const B* dout_rows = as_rows(dout, g.dout.t, rows, p.Dv, dout_row, don);
        statistics(span, t, rows, hq);
        for (int64_t n = 0; n < d * W; ++n) dqt[n] = F(0);

        Range keys = Band::clip(p.band.keys({i0, i0 + rows}, span.k.size()), chunk);
        keys.begin -= (keys.begin - chunk.begin) % Pair;  // kp pairs the keys from the chunk's first on
        Run run{{keys.begin, keys.begin}, {0, 0}, false};
        for (int64_t slice = 0; run.j.end < keys.end; ++slice) {
            if (more) prefetch(span.b, t, hq, slice);
            const int64_t j = run.j.end, cap = j + kGradKeys < keys.end ? j + kGradKeys : keys.end;
            run = slm::next_run(p.band, i0, rows, L, Pair, j, cap);
            if (run.v.size() == 0) continue;
            const int64_t at = j - chunk.begin, n = run.j.size(), lane = run.v.begin * L;
            const int64_t past = run.v.end * L < rows ? run.v.end * L : rows;  // lanes in use
            gemm<P, false>(n, run.v.size(), p.D / Pair, ka + at * d, d, Pair, qt + lane, W, st + lane, W);
            gemm<P, false>(n, run.v.size(), p.Dv / Pair, va + at * dv, dv, Pair, dot + lane, W, dpt + lane,
                           W);
            differentiate(run, i0);
            const int64_t steps = (past - lane + Pair - 1) / Pair;
            gemm<P, true>(n, dv / L, steps, pa + lane, W, Pair, dout_rows + lane / Pair * dout_row, dout_row,
                          dva + at * dv, dv);
            gemm<P, true>(n, d / L, steps, dsa + lane, W, Pair, q_rows + lane / Pair * q_row, q_row,
                          dka + at * d, d);
            if constexpr (Pair == 2)
                gemm<P, true>(p.D, run.v.size(), (n + 1) / 2, reinterpret_cast<const A*>(kp + at / 2 * d), 2,
                              2 * d, dsb + lane, W, dqt + lane, W);
            else
                gemm<P, true>(p.D, run.v.size(), n, ka + at * d, 1, d, dsb + lane, W, dqt + lane, W);
        }
        unpack_transposed<P, true>(dqt, static_cast<const F*>(nullptr), rows, p.D, g.dq.at<F>(span.b, t, hq),
                                   g.dq.t);
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

    // lse (log2 units) and delta of each lane; lanes past `rows` see nothing.
    void statistics(const Span& span, int64_t t, int64_t rows, int64_t hq) {
        const int64_t at = (span.b * p.Hq + hq) * p.T + t;
        const F* given = static_cast<const F*>(p.lse) + at;
        for (int64_t n = 0; n < W; ++n) {
            lse[n] = n < rows && given[n] != -kInf<F> ? given[n] * kLog2e<F> : kInf<F>;  // NaN stays
            delta[n] = n < rows ? row_delta<F, E>(g, span.b, t + n, hq) : F(0);
        }
    }

    // S^T, dP^T -> P^T, dS^T (times scale, so that dQ and dK need no more).
    void differentiate(const Run& run, int64_t i0) {
        const F scale = F(p.scale), cap = F(p.softcap);
        const F c = cap > 0 ? F(1) : scale * kLog2e<F>;
        for (int64_t v = run.v.begin; v < run.v.end; ++v) {
            const Vec<F> shift = loadu<F>(lse + v * L), mean = loadu<F>(delta + v * L);
            const auto one = [&](int64_t j, Vec<F>& prob, Vec<F>& ds) __attribute__((always_inline)) {
                const int64_t at = (j - run.j.begin) * W + v * L;
                Vec<F> s = loadu<F>(st + at), slope = splat<F>(scale);
                if (cap > 0) {
                    const Vec<F> bent = tanh<F>(s * scale / cap);
                    s = cap * bent * kLog2e<F>;
                    slope *= F(1) - bent * bent;
                }
                prob = exp2_nonpositive<F>(s * c - shift);
                if (run.masked) prob = select<F>(visible_lanes<F>(p.band, i0, j, v), prob, Vec<F>{});
                ds = prob * (loadu<F>(dpt + at) - mean) * slope;
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
                    storeu<B>(dsb + (j - run.j.begin) / 2 * W + v * L, pair_lanes(ds0, ds1));
                }
            }
        }
    }
};

template <typename F, typename E, typename P>
void backward_tasks(const slm::Gradient& g, int64_t begin, int64_t end) {
    const Problem& p = g.problem;
    BackwardBlock<F, E, P> block(g);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t s = find_span(p, task);
        const int64_t chunks = g.tasks(p.spans[s]), n = task - p.first[s];
        block.run(p.spans[s], p.heads.begin + n / chunks, n % chunks * 2 + g.parity);
    }
}

// dsinks[h] = -sum over rows of exp(sink - lse) * delta, for query heads [begin, end).
template <typename F, typename E, typename P>
void sink_gradient_heads(const slm::Gradient& g, void* dsinks, int64_t begin, int64_t end) {
    const Problem& p = g.problem;
    for (int64_t hq = begin; hq < end; ++hq) {
        const F sink = static_cast<const F*>(p.sinks)[hq];
        double sum = 0;
        for (int64_t s = 0; s < p.num_spans; ++s) {
            const Span& span = p.spans[s];
            for (int64_t t = span.q.begin; t < span.q.end; ++t) {
                const F lse = static_cast<const F*>(p.lse)[(span.b * p.Hq + hq) * p.T + t];
                if (lse != -kInf<F>) sum -= std::exp(sink - lse) * row_delta<F, E>(g, span.b, t, hq);
            }
        }
        static_cast<F*>(dsinks)[hq] = F(sum);
    }
}
