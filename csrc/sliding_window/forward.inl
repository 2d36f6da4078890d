// Forward. A task is a block of queries of one KV head; the query heads of the group follow one another
// over the same keys (common/softmax.h). Scratch is some 64 KiB a thread.
//
// Measured on one core of an AMD Zen 4 (float32 peak 97 to 115 GFLOP/s as its clock goes, bfloat16 twice
// that; H = 8, T = 4096, D = 64, W = 256), useful GFLOP/s: float32 75 to 80, bfloat16 120 to 139. The tile
// kernel itself runs at the peak; it is 3/4 of the float32 time, 2/3 of the bfloat16 time. Tried:
//   - prefetching the next block's rows: 74 -> 80 (float32);
//   - rescaling O^T only where m rose by more than 2^8: 8 % of the bfloat16 softmax and packing;
//   - keys and values copied into adjacent rows first: at most 4 %, which the copy costs; not taken;
//   - streaming stores of O: no change.
// Not tried: whole blocks with masks instead of runs; counted, they compute 25 % more at W = 256, runs 6 %.

template <typename F, typename E, typename P>
struct ForwardBlock {
    static constexpr int W = kBlock<F>;
    using Softmax = SoftmaxBlock<F, E, P, false>;

    const Problem& p;
    Arena arena;
    Softmax softmax;

    explicit ForwardBlock(const Problem& problem)
        : p(problem),
          arena(size_t(Softmax::bytes(p.D, p.Dv))),
          softmax(arena, p.band, p.D, p.Dv, p.scale, p.softcap) {}

    // Queries [t0, t0 + rows) of the span's sequence, query head hq.
    void run(const Span& span, int64_t t0, int64_t rows, int64_t h, int64_t hq) {
        const int64_t i0 = t0 + span.offset();
        const F sink = p.sinks ? static_cast<const F*>(p.sinks)[hq] * kLog2e<F> / softmax.c : -kInf<F>;
        softmax.begin(p.q.at<const E>(span.b, span.q.begin + t0, hq), p.q.t, rows, sink);
        const Range keys = p.band.keys({i0, i0 + rows}, span.k.size());
        for (int64_t j = keys.begin; j < keys.end; j += kKeys) {
            const int64_t end = j + kKeys < keys.end ? j + kKeys : keys.end;
            prefetch(span, t0, h, hq, (j - keys.begin) / kKeys);
            softmax.attend(p.k.at<const E>(span.b, span.k.begin + j, h), p.k.t,
                           p.v.at<const E>(span.b, span.k.begin + j, h), p.v.t, {j, end}, i0, rows);
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

    void finish(const Span& span, int64_t t0, int64_t rows, int64_t hq) {
        F *m = softmax.m, *l = softmax.l;
        F* lse = static_cast<F*>(p.lse) + (span.b * p.Hq + hq) * p.T + span.q.begin + t0;
        for (int64_t i = 0; i < rows; ++i)
            lse[i] = l[i] == 0 ? -kInf<F> : m[i] * (softmax.rewrite ? kLn2<F> : F(p.scale)) + std::log(l[i]);
        for (int64_t i = 0; i < W; ++i) l[i] = l[i] == 0 ? F(0) : F(1) / l[i];
        E* o = p.o.at<E>(span.b, span.q.begin + t0, hq);
        unpack_transposed<P, false>(softmax.ot, l, rows, p.Dv, o, p.o.t);
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
