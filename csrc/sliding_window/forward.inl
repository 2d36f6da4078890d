// Forward. A task is a block of queries of one KV head; the query heads of the group follow one another
// over the same keys. Online softmax (Dao 2023, FlashAttention-2, section 3.1) over blocks of keys:
//
//     S^T = K Q^T            tile kernel, A = K rows as they lie, B = Q^T packed once
//     m, P^T = exp2(c (S^T - m)), l                  down the lanes; c = scale log2(e)
//     O^T += V^T P^T         tile kernel, A = V rows as they lie (read across), B = P^T
//
// Keys before the window's first or after its last are never touched. O^T, l, m stay in cache; scratch is
// some 64 KiB a thread. Useful work: 4 D FLOPs a visible score, one exp2 (14 instructions a register).
//
// Measured on one core of an AMD Zen 4 (float32 peak 97 to 115 GFLOP/s as its clock goes, bfloat16 twice
// that; H = 8, T = 4096, D = 64, W = 256), useful GFLOP/s: float32 75 to 80, bfloat16 120 to 139. The tile
// kernel itself runs at the peak; it is 3/4 of the float32 time, 2/3 of the bfloat16 time. Tried:
//   - prefetching the next block's rows: 74 -> 80 (float32);
//   - rescaling O^T only where m rose by more than 2^8: 8 % of the bfloat16 softmax and packing;
//   - keys and values copied into adjacent rows first: at most 4 %, which the copy costs; not taken;
//   - streaming stores of O: no change.
// Not tried: whole blocks with masks instead of runs; counted, they compute 25 % more at W = 256, runs 6 %.

constexpr int64_t kKeys = 64;  // keys per softmax block

template <typename F, typename E, typename P>
struct ForwardBlock {
    static constexpr int L = kLanes<F>, W = kBlock<F>;
    using B = typename P::B;

    const Problem& p;
    Arena arena;
    B* qt;          // [D / kPair][W]
    F* st;          // S^T, then P^T [kKeys][W]
    B* pt;          // P^T as B operand; st itself for Fma
    F* ot;          // [Dv][W]
    F *m, *l;       // running maximum of S^T and denominator, [W]
    F *kf, *vf;     // widened keys and values
    B* vp;          // V in pairs of keys (Dot)
    const bool rewrite;  // the softmax's first pass turns scores into log2 units
    const F c;           // what turns a score into log2 units in the second

    static size_t bytes(const Problem& p) {
        const int64_t d = round_up(p.D, L), dv = round_up(p.Dv, L);
        return size_t(((d + dv + 2) * W + 2 * kKeys * W + 2 * kKeys * (d + dv)) * int64_t(sizeof(F)) + 1024);
    }

    // Scores go through the softmax as they come out of the product, times c at the end: a row's largest
    // score then has probability exp2(0), exactly 1. Where that would turn -inf around (scale <= 0) or lose
    // the sink (scale near 0), or more than a factor is needed (softcap), the first pass rewrites them and c
    // is 1.
    explicit ForwardBlock(const Problem& problem)
        : p(problem),
          arena(bytes(problem)),
          rewrite(p.softcap > 0 || !(p.scale > 1e-6)),
          c(rewrite ? F(1) : F(p.scale) * kLog2e<F>) {
        const int64_t d = round_up(p.D, L), dv = round_up(p.Dv, L);
        qt = arena.take<B>(d * W);
        st = arena.take<F>(kKeys * W);
        ot = arena.take<F>(dv * W);
        m = arena.take<F>(W);
        l = arena.take<F>(W);
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

    // Queries [t0, t0 + rows) of the span's sequence, query head hq.
    void run(const Span& span, int64_t t0, int64_t rows, int64_t h, int64_t hq) {
        const int64_t i0 = t0 + span.offset();
        pack_transposed<P>(p.q.at<const E>(span.b, span.q.begin + t0, hq), p.q.t, rows, p.D, qt, W);
        const F sink = p.sinks ? static_cast<const F*>(p.sinks)[hq] * kLog2e<F> / c : -kInf<F>;
        for (int i = 0; i < W; ++i) m[i] = sink, l[i] = sink == -kInf<F> ? F(0) : F(1);
        for (int64_t i = 0; i < p.Dv * W; ++i) ot[i] = F(0);

        const Range keys = p.band.keys({i0, i0 + rows}, span.k.size());
        for (int64_t j = keys.begin; j < keys.end; j += kKeys) {
            const int64_t end = j + kKeys < keys.end ? j + kKeys : keys.end;
            prefetch(span, t0, h, hq, (j - keys.begin) / kKeys);
            key_block(span, h, {j, end}, i0, rows);
        }
        finish(span, t0, rows, hq);
    }

    // Quarter n of the rows that the next block of queries reads first.
    SLM_INLINE void prefetch(const Span& span, int64_t t0, int64_t h, int64_t hq, int64_t n) {
        const int64_t t = t0 + W + n * W / 4, T = span.q.size(), s = t + span.offset();
        if (n >= 4 || t + W / 4 > T || s < 0) return;
        prefetch_rows(p.q.at<const E>(span.b, span.q.begin + t, hq), p.q.t, W / 4, p.D);
        prefetch_rows(p.k.at<const E>(span.b, span.k.begin + s, h), p.k.t, W / 4, p.D);
        prefetch_rows(p.v.at<const E>(span.b, span.k.begin + s, h), p.v.t, W / 4, p.Dv);
    }

    void key_block(const Span& span, int64_t h, Range keys, int64_t i0, int64_t rows) {
        int64_t k_row = p.k.t, v_row = p.v.t;
        const E* k = p.k.at<const E>(span.b, span.k.begin + keys.begin, h);
        const E* v = p.v.at<const E>(span.b, span.k.begin + keys.begin, h);
        Run runs[kKeys];
        int count = 0;
        for (int64_t j = keys.begin; j < keys.end; j = runs[count - 1].j.end)
            runs[count++] = slm::next_run(p.band, i0, rows, L, kPair<P>, j, keys.end);

        const auto scores = [&](const auto* a, int64_t row) {
            for (int r = 0; r < count; ++r) {
                const int64_t at = runs[r].j.begin - keys.begin, lane = runs[r].v.begin * L;
                gemm<P, false>(runs[r].j.size(), runs[r].v.size(), p.D / kPair<P>, a + at * row, row,
                               kPair<P>, qt + lane, W, st + at * W + lane, W);
            }
        };
        if constexpr (kPair<P> == 2) {
            scores(k, k_row);
        } else {
            const F* a = widened<F>(k, k_row, keys.size(), p.D, kf);  // sets k_row
            scores(a, k_row);
        }

        softmax(runs, count, keys.begin, i0);

        if constexpr (kPair<P> == 2) {
            const int64_t width = round_up(p.Dv, L);
            pack_rows<P>(v, v_row, keys.size(), p.Dv, width, vp);
            const E* a = reinterpret_cast<const E*>(vp);
            values(runs, count, keys.begin, a, 2, 2 * width);
        } else {
            const F* a = widened<F>(v, v_row, keys.size(), p.Dv, vf);
            values(runs, count, keys.begin, a, 1, v_row);
        }
    }

    template <typename A>
    void values(const Run* runs, int count, int64_t j0, const A* a, int64_t a_row, int64_t a_step) {
        for (int r = 0; r < count; ++r) {
            const int64_t at = (runs[r].j.begin - j0) / kPair<P>, lane = runs[r].v.begin * L;
            const int64_t steps = (runs[r].j.size() + kPair<P> - 1) / kPair<P>;
            gemm<P, true>(p.Dv, runs[r].v.size(), steps, a + at * a_step, a_row, a_step, pt + at * W + lane,
                          W, ot + lane, W);
        }
    }

    // S^T -> P^T in place, with the running maximum and denominator; O^T is rescaled where m rose.
    void softmax(const Run* runs, int count, int64_t j0, int64_t i0) {
        const F scale = F(p.scale), cap = F(p.softcap);
        F top[W];
        for (int i = 0; i < W; i += L) storeu<F>(top + i, loadu<F>(m + i));
        for (int r = 0; r < count; ++r) {
            const Run& run = runs[r];
            for (int64_t v = run.v.begin; v < run.v.end; ++v) {
                Vec<F> high = loadu<F>(top + v * L);
                F* s = st + (run.j.begin - j0) * W + v * L;
                for (int64_t j = run.j.begin; j < run.j.end; ++j, s += W) {
                    Vec<F> x = loadu<F>(s);
                    if (rewrite) {
                        x *= scale;
                        if (cap > 0) x = cap * tanh<F>(x / cap);
                        x *= kLog2e<F>;
                    }
                    if (run.masked) x = select<F>(visible_lanes<F>(p.band, i0, j, v), x, splat<F>(-kInf<F>));
                    if (rewrite || run.masked) storeu<F>(s, x);
                    high = vmax<F>(high, x);
                }
                storeu<F>(top + v * L, high);
            }
        }
        for (int i = 0; i < W; i += L) rescale(i, loadu<F>(top + i));
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
    SLM_INLINE void rescale(int i, Vec<F> high) {
        const Vec<F> old = loadu<F>(m + i);
        const Mask<F> rose = (high - old) * c > F(8);  // true from -inf, false between two of them
        Int<F> any = 0, seen = 0;
        for (int n = 0; n < L; ++n) any |= rose[n];
        if (!any) return;
        const Vec<F> shift = select<F>(rose, high, old);
        storeu<F>(m + i, shift);
        const Mask<F> begun = old > -kInf<F>;
        for (int n = 0; n < L; ++n) seen |= begun[n];
        if (!seen) return;  // O^T and l are still zero
        const Vec<F> factor = exp2_nonpositive<F>((old - finite_or_zero(shift)) * c);
        storeu<F>(l + i, loadu<F>(l + i) * factor);
        for (int64_t d = 0; d < p.Dv; ++d) storeu<F>(ot + d * W + i, loadu<F>(ot + d * W + i) * factor);
    }

    void finish(const Span& span, int64_t t0, int64_t rows, int64_t hq) {
        F* lse = static_cast<F*>(p.lse) + (span.b * p.Hq + hq) * p.T + span.q.begin + t0;
        for (int64_t i = 0; i < rows; ++i)
            lse[i] = l[i] == 0 ? -kInf<F> : m[i] * (rewrite ? kLn2<F> : F(p.scale)) + std::log(l[i]);
        for (int64_t i = 0; i < W; ++i) l[i] = l[i] == 0 ? F(0) : F(1) / l[i];
        E* o = p.o.at<E>(span.b, span.q.begin + t0, hq);
        unpack_transposed<P, false>(ot, l, rows, p.Dv, o, p.o.t);
    }
};

template <typename F, typename E, typename P>
void forward_tasks(const Problem& p, int64_t begin, int64_t end) {
    constexpr int W = kBlock<F>;
    ForwardBlock<F, E, P> block(p);
    const int64_t group = p.Hq / p.H;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t s = find_span(p, task);
        const Span& span = p.spans[s];
        const int64_t T = span.q.size(), blocks = (T + W - 1) / W;
        const int64_t h = (task - p.first[s]) / blocks, t0 = (task - p.first[s]) % blocks * W;
        const int64_t rows = t0 + W < T ? W : T - t0;
        for (int64_t g = 0; g < group; ++g) block.run(span, t0, rows, h, h * group + g);
    }
}
