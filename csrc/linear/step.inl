// Decode step. A task is one head of one sequence; its state is read twice and written once a token:
//
//     r_x = (e^g S)^T x  for x = q and k;   u = beta (v - r_k), or v;   o = r_q + (q . k) u
//     S <- e^g S + k u^T
//
// so that the second pass over S needs nothing of the first but u. 6 K V FLOPs on 2 K V floats, in cache.

// Columns e .. of r_q and r_k, N registers of them; the gates are in q and k already.
template <int N, typename F>
SLM_INLINE void read_columns(const F* state, int64_t K, int64_t V, const F* q, const F* k, F* to_q, F* to_k) {
    constexpr int L = kLanes<F>;
    Vec<F> by_q[N] = {}, by_k[N] = {};
    for (int64_t d = 0; d < K; ++d)
        for (int n = 0; n < N; ++n) {
            const Vec<F> s = loadu<F>(state + d * V + n * L);
            by_q[n] += q[d] * s;
            by_k[n] += k[d] * s;
        }
    for (int n = 0; n < N; ++n) storeu<F>(to_q + n * L, by_q[n]), storeu<F>(to_k + n * L, by_k[n]);
}

template <typename F, typename E>
void step_tasks(const slm::LinearStep& s, int64_t begin, int64_t end) {
    constexpr int L = kLanes<F>;
    const int64_t K = s.K, V = s.V, Kp = round_up(K, L), Vp = round_up(V, L);
    Arena arena(size_t((5 * Kp + 4 * Vp) * int64_t(sizeof(F)) + 1024));
    F *q = arena.take<F>(Kp), *k = arena.take<F>(Kp), *gate = arena.take<F>(Kp);
    F *gated_q = arena.take<F>(Kp), *gated_k = arena.take<F>(Kp);
    F *u = arena.take<F>(Vp), *o = arena.take<F>(Vp), *known = arena.take<F>(Vp);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / s.H, h = task % s.H, hk = h / (s.H / s.Hk);
        F* state = static_cast<F*>(s.state) + task * K * V;
        for (int64_t t = 0; t < s.n; ++t) {
            const int64_t token = (b * s.n + t) * s.H + h;
            widen_row<F>(s.q.at<const E>(b, t, hk), q, K);
            widen_row<F>(s.k.at<const E>(b, t, hk), k, K);
            widen_row<F>(s.v.at<const E>(b, t, h), u, V);
            if (s.l2norm)
                for (F* x : {q, k}) {
                    const F inverse = F(1) / std::sqrt(dot(x, x, Kp) + F(1e-6));
                    for (int64_t d = 0; d < Kp; d += L) storeu<F>(x + d, loadu<F>(x + d) * inverse);
                }
            if (s.decays == Decay::channel) {
                widen_row<F>(static_cast<const F*>(s.decay) + token * K, gate, K);
            } else {
                const F g = s.decays == Decay::none
                                ? F(0)
                                : static_cast<const F*>(s.decay)[s.decays == Decay::constant ? h : token];
                for (int64_t d = 0; d < Kp; ++d) gate[d] = g;
            }
            for (int64_t d = 0; d < Kp; d += L) {
                const Vec<F> factor = exp2_nonpositive<F>(loadu<F>(gate + d) * kLog2e<F>);
                storeu<F>(gate + d, factor);
                storeu<F>(gated_q + d, loadu<F>(q + d) * factor);
                storeu<F>(gated_k + d, loadu<F>(k + d) * factor);
            }
            int64_t e = 0;
            for (; e + 4 * L <= V; e += 4 * L)
                read_columns<4>(state + e, K, V, gated_q, gated_k, o + e, known + e);
            for (; e + L <= V; e += L) read_columns<1>(state + e, K, V, gated_q, gated_k, o + e, known + e);
            for (; e < V; ++e) {
                o[e] = known[e] = 0;
                for (int64_t d = 0; d < K; ++d)
                    o[e] += gated_q[d] * state[d * V + e], known[e] += gated_k[d] * state[d * V + e];
            }
            if (s.beta) {
                const F rate = static_cast<const F*>(s.beta)[token];
                for (int64_t c = 0; c < V; ++c) u[c] = rate * (u[c] - known[c]);
            }
            const F along = dot(q, k, Kp);
            F factor = F(s.scale);
            if (s.z) {
                F* z = static_cast<F*>(s.z) + task * K;
                F sum = 0;
                for (int64_t d = 0; d < K; ++d) z[d] = gate[d] * z[d] + k[d], sum += z[d] * q[d];
                factor = F(1) / (sum + F(1e-6));
            }
            for (int64_t c = 0; c < V; ++c) o[c] = factor * (o[c] + along * u[c]);
            narrow_row<F>(o, s.o.at<E>(b, t, h), V);
            for (int64_t d = 0; d < K; ++d) {
                F* row = state + d * V;
                int64_t c = 0;
                for (; c + L <= V; c += L)
                    storeu<F>(row + c, gate[d] * loadu<F>(row + c) + k[d] * loadu<F>(u + c));
                for (; c < V; ++c) row[c] = gate[d] * row[c] + k[d] * u[c];
            }
        }
    }
}
