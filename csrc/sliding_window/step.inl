// Decode step. A task is one query head of one sequence over the filled slots of its ring; their order
// does not matter to a softmax, so nothing is gathered or rotated. One pass of dot products, one softmax,
// one pass over the values: 4 D W FLOPs on 2 D W elements, bound by reading the ring.

template <typename F, typename E, typename P>
void step_heads(const slm::Step& s, int64_t begin, int64_t end) {
    constexpr int L = kLanes<F>;
    Arena arena(size_t((round_up(s.D, L) + round_up(s.Dv, L) + round_up(s.W, L)) * int64_t(sizeof(F)) + 256));
    F* q = arena.take<F>(round_up(s.D, L));
    F* o = arena.take<F>(round_up(s.Dv, L));
    F* x = arena.take<F>(round_up(s.W, L));
    for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / s.Hq, hq = task % s.Hq, ring = b * s.H + hq / (s.Hq / s.H);
        const int64_t n = s.position[ring] < s.W ? s.position[ring] : s.W;
        const E* k = static_cast<const E*>(s.k_ring) + ring * s.W * s.D;
        const E* v = static_cast<const E*>(s.v_ring) + ring * s.W * s.Dv;
        widen_row<F>(s.q.at<const E>(b, s.token, hq), q, s.D);
        F m = s.sinks ? static_cast<const F*>(s.sinks)[hq] * kLog2e<F> : -kInf<F>;
        const F sink = m;
        for (int64_t j = 0; j < n; ++j) x[j] = dot_product<F>(q, k + j * s.D, s.D) * F(s.scale);
        for (int64_t j = n; j < round_up(n, L); ++j) x[j] = -kInf<F>;
        Vec<F> top = splat<F>(m);
        for (int64_t j = 0; j < n; j += L) {
            Vec<F> y = loadu<F>(x + j);
            if (s.softcap > 0) y = F(s.softcap) * tanh<F>(y / F(s.softcap));
            for (int l = 0; l < L; ++l)
                if (j + l >= n) y[l] = -kInf<F>;
            storeu<F>(x + j, y * kLog2e<F>);
            top = vmax<F>(top, y * kLog2e<F>);
        }
        for (int l = 0; l < L; ++l) m = top[l] > m || top[l] != top[l] ? top[l] : m;
        Vec<F> sum{};
        for (int64_t j = 0; j < n; j += L) {
            const Vec<F> y = exp2_nonpositive<F>(loadu<F>(x + j) - m);
            storeu<F>(x + j, y);
            sum += y;
        }
        F total = reduce_add<F>(sum);
        if (sink != -kInf<F>) total += std::exp2(sink - m);
        weighted_sum<F>(x, v, n, s.Dv, o);
        for (int64_t e = 0; e < s.Dv; ++e) o[e] /= total;
        narrow_row<F>(o, s.o.at<E>(b, s.token, hq), s.Dv);
    }
}
