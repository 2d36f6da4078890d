// Backward. A task is a chunk of keys of one KV head against two chunks of queries (all heads of the
// group); the operator walks parities and distances (Gradient in sliding_window.h), so tasks never share a
// sum and every sum has one order: the same bits for any number of threads, without a second pass over the
// scores.
//
// For a block of queries, run of keys by run of keys, five products (common/softmax_gradient.h); dQ^T is
// added into dQ at the block's end. delta = rowsum(dO O) - dlse is taken while a block is packed; a row in
// reach of two tasks pays its 2 D FLOPs twice. Two-pass backward (dQ, then dK and dV) would need seven
// products instead of five.
//
// Measured as in forward.inl, useful GFLOP/s of one core: float32 71 to 82, bfloat16 123 to 144. Tried:
//   - the chunk's rows and gradients in adjacent scratch rows, queries prefetched: 89 -> 76 ms (float32);
//   - one chunk of queries a task instead of two: keys are copied and added twice, and their gradients
//     kept in float32 in between; 51 against 44 ms (bfloat16); not taken;
//   - conversions by AVX512-BF16 and dQ prefetched: 43 -> 38 ms (bfloat16);
//   - sums of a run added to the total, instead of one long sum: error of dv 4.1e-6 -> 1.4e-6, no cost;
//   - the heads of one chunk one after the other, for the sake of shared pages: no change.

// delta of one row: sum(dO O), less the gradient that reaches lse itself.
template <typename F, typename E>
SLM_INLINE F row_delta(const slm::Gradient& g, int64_t b, int64_t t, int64_t hq) {
    const Problem& p = g.problem;
    F delta = row_dot<F>(p.o.at<const E>(b, t, hq), g.dout.at<const E>(b, t, hq), p.Dv);
    if (g.dlse != nullptr) delta -= static_cast<const F*>(g.dlse)[(b * p.Hq + hq) * p.T + t];
    return delta;
}

template <typename F, typename E, typename P>
struct BackwardBlock {
    static constexpr int L = kLanes<F>, W = kBlock<F>, Pair = kPair<P>;
    using Softmax = SoftmaxGradient<F, E, P, false>;

    const slm::Gradient& g;
    const Problem& p;
    Arena arena;
    Softmax softmax;

    explicit BackwardBlock(const slm::Gradient& gradient)
        : g(gradient),
          p(g.problem),
          arena(size_t(Softmax::bytes(p.D, p.Dv, g.chunk))),
          softmax(arena, p.band, p.D, p.Dv, p.scale, p.softcap, g.chunk) {}

    // Chunk `c` of the keys of a span.
    void run(const Span& span, int64_t h, int64_t c) {
        const int64_t S = span.k.size(), C = g.chunk;
        const Range keys = Band::clip({c * C, (c + 1) * C}, {0, S});
        const Range mine = Band::clip({(c + g.distance) * C, (c + g.distance + 2) * C}, {span.offset(), S});
        const Range queries = p.band.queries(keys, mine);
        if (queries.size() == 0 && !g.whole) return;
        softmax.load_keys(p.k.at<const E>(span.b, span.k.begin + keys.begin, h), p.k.t,
                          p.v.at<const E>(span.b, span.k.begin + keys.begin, h), p.v.t, 0, keys.size());
        softmax.pair_keys(0, keys.size());

        const int64_t group = p.Hq / p.H;
        for (int64_t i = queries.begin; i < queries.end; i += W)
            for (int64_t n = 0; n < group; ++n) {
                const int64_t rows = i + W < queries.end ? W : queries.end - i;
                query_block(span, keys, i, rows, h * group + n, i + 2 * W <= queries.end);
            }
        for (int64_t j = 0; j < keys.size(); ++j) {
            const int64_t row = span.k.begin + keys.begin + j;
            const F *dk = softmax.dka + j * softmax.d, *dv = softmax.dva + j * softmax.dv;
            if (g.whole) {
                narrow_row(dk, g.dk.at<E>(span.b, row, h), p.D);
                narrow_row(dv, g.dv.at<E>(span.b, row, h), p.Dv);
            } else {
                add_row(dk, g.dk.at<F>(span.b, row, h), p.D);
                add_row(dv, g.dv.at<F>(span.b, row, h), p.Dv);
            }
        }
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
        softmax.load_queries(p.q.at<const E>(span.b, t, hq), p.q.t, g.dout.at<const E>(span.b, t, hq),
                             g.dout.t, rows);
        statistics(span, t, rows, hq);

        Range keys = Band::clip(p.band.keys({i0, i0 + rows}, span.k.size()), chunk);
        keys.begin -= (keys.begin - chunk.begin) % Pair;  // kp pairs the keys from the chunk's first on
        Run run{{keys.begin, keys.begin}, {0, 0}, false};
        for (int64_t slice = 0; run.j.end < keys.end; ++slice) {
            if (more) prefetch(span.b, t, hq, slice);
            const int64_t j = run.j.end, cap = j + kGradKeys < keys.end ? j + kGradKeys : keys.end;
            run = slm::next_run(p.band, i0, rows, L, Pair, j, cap);
            if (run.v.size() > 0) softmax.attend(run, j - chunk.begin, i0, rows);
        }
        unpack_transposed<P, true>(softmax.dqt, static_cast<const F*>(nullptr), rows, p.D,
                                   g.dq.at<F>(span.b, t, hq), g.dq.t);
    }

    // lse (log2 units) and delta of each lane; lanes past `rows` see nothing.
    void statistics(const Span& span, int64_t t, int64_t rows, int64_t hq) {
        const int64_t at = (span.b * p.Hq + hq) * p.T + t;
        const F* given = static_cast<const F*>(p.lse) + at;
        for (int64_t n = 0; n < W; ++n) {
            softmax.lse[n] = n < rows && given[n] != -kInf<F> ? given[n] * kLog2e<F> : kInf<F>;  // NaN stays
            softmax.delta[n] = n < rows ? row_delta<F, E>(g, span.b, t + n, hq) : F(0);
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
