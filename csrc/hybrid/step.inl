// Decode step. A task is one KV head of one sequence, token by token: the keys that have become far enter the
// state, the new token takes its slot, and each query head of the group reads the near slots and the state.
// With sliding alignment one key enters a token, in the pass over the state that the first query head reads
// it by: 4 F V FLOPs on F V floats, read and written once.

// o[e..] = phi_q . S[:, e..], N registers of them; before it S += phi_k v^T if Enter.
template <int N, bool Enter, typename F>
SLM_INLINE void far_columns(F* state, int64_t rows, int64_t V, const F* phi_q, const F* phi_k, const F* v,
                            F* o) {
    constexpr int L = kLanes<F>;
    Vec<F> sum[N] = {}, value[N];
    for (int n = 0; n < N; ++n) value[n] = Enter ? loadu<F>(v + n * L) : Vec<F>{};
    for (int64_t f = 0; f < rows; ++f)
        for (int n = 0; n < N; ++n) {
            Vec<F> s = loadu<F>(state + f * V + n * L);
            if constexpr (Enter) {
                s += phi_k[f] * value[n];
                storeu<F>(state + f * V + n * L, s);
            }
            sum[n] += phi_q[f] * s;
        }
    for (int n = 0; n < N; ++n) storeu<F>(o + n * L, sum[n]);
}

template <bool Enter, typename F>
void far_read(F* state, int64_t rows, int64_t V, const F* phi_q, const F* phi_k, const F* v, F* o) {
    constexpr int L = kLanes<F>;
    int64_t e = 0;
    for (; e + 4 * L <= V; e += 4 * L) far_columns<4, Enter>(state + e, rows, V, phi_q, phi_k, v + e, o + e);
    for (; e + L <= V; e += L) far_columns<1, Enter>(state + e, rows, V, phi_q, phi_k, v + e, o + e);
    for (; e < V; ++e) {
        o[e] = 0;
        for (int64_t f = 0; f < rows; ++f) {
            if constexpr (Enter) state[f * V + e] += phi_k[f] * v[e];
            o[e] += phi_q[f] * state[f * V + e];
        }
    }
}

template <typename F, typename E>
struct HybridDecode {
    static constexpr int L = kLanes<F>;
    const slm::HybridStep& s;
    const Band band;
    Arena arena;
    F *q, *phi_q, *phi_k, *v, *near, *more, *far, *x;

    static size_t bytes(const slm::HybridStep& s) {
        return size_t((round_up(s.D, L) + 2 * round_up(s.F, L) + 4 * round_up(s.V, L) + round_up(s.R, L)) *
                          int64_t(sizeof(F)) +
                      1024);
    }

    explicit HybridDecode(const slm::HybridStep& step)
        : s(step), band{s.W - 1, 0, s.block ? s.W : 0}, arena(bytes(step)) {
        q = arena.take<F>(round_up(s.D, L));
        phi_q = arena.take<F>(round_up(s.F, L));
        phi_k = arena.take<F>(round_up(s.F, L));
        v = arena.take<F>(round_up(s.V, L));
        near = arena.take<F>(round_up(s.V, L));
        more = arena.take<F>(round_up(s.V, L));
        far = arena.take<F>(round_up(s.V, L));
        x = arena.take<F>(round_up(s.R, L));
    }

    template <typename X>
    static X* slot(void* ring, int64_t head, int64_t slots, int64_t at, int64_t size) {
        return static_cast<X*>(ring) + (head * slots + at) * size;
    }

    void run(int64_t task) {
        const int64_t b = task / s.H, h = task % s.H, group = s.Hq / s.H;
        F *state = static_cast<F*>(s.state) + task * s.F * s.V, *z = static_cast<F*>(s.z) + task * s.F;
        for (int64_t t = 0; t < s.n; ++t) {
            const int64_t position = s.position[task]++;
            const int64_t now = near_from(position);
            bool entered = true;  // all keys that are far now are in the state
            for (int64_t j = position == 0 ? 0 : near_from(position - 1); j < now; ++j) {
                if (!entered) far_read<true>(state, s.F, s.V, phi_k, phi_k, v, far);
                widen_row<F>(slot<E>(s.phi_ring, task, s.R, j % s.R, s.F), phi_k, s.F);
                widen_row<F>(slot<E>(s.v_ring, task, s.R, j % s.R, s.V), v, s.V);
                for (int64_t f = 0; f < s.F; ++f) z[f] += phi_k[f];
                entered = false;
            }
            const int64_t at = position % s.R;
            copy(s.k.at<const E>(b, t, h), slot<E>(s.k_ring, task, s.R, at, s.D), s.D);
            copy(s.v.at<const E>(b, t, h), slot<E>(s.v_ring, task, s.R, at, s.V), s.V);
            copy(s.phi_k.at<const E>(b, t, h), slot<E>(s.phi_ring, task, s.R, at, s.F), s.F);
            for (int64_t n = 0; n < group; ++n, entered = true)
                attend(b, t, h * group + n, task, {now, position + 1}, state, z, entered);
        }
    }

    int64_t near_from(int64_t position) const {
        const int64_t j = band.first(position);
        return j > 0 ? j : 0;
    }

    static void copy(const E* from, E* to, int64_t n) { __builtin_memcpy(to, from, size_t(n) * sizeof(E)); }

    // One query over near keys and the state; unless `entered`, a last key (phi_k, v) enters it on the way.
    void attend(int64_t b, int64_t t, int64_t hq, int64_t head, Range keys, F* state, const F* z,
                bool entered) {
        widen_row<F>(s.q.at<const E>(b, t, hq), q, s.D);
        widen_row<F>(s.phi_q.at<const E>(b, t, hq), phi_q, s.F);
        const int64_t count = keys.size(), first = keys.begin % s.R;
        const int64_t head_rows = first + count < s.R ? count : s.R - first;  // up to the ring's end
        const E *k = slot<E>(s.k_ring, head, s.R, first, s.D),
                *values = slot<E>(s.v_ring, head, s.R, first, s.V);
        const E *k0 = slot<E>(s.k_ring, head, s.R, 0, s.D), *v0 = slot<E>(s.v_ring, head, s.R, 0, s.V);
        for (int64_t j = 0; j < head_rows; ++j) x[j] = dot_product<F>(q, k + j * s.D, s.D);
        for (int64_t j = head_rows; j < count; ++j) x[j] = dot_product<F>(q, k0 + (j - head_rows) * s.D, s.D);
        const F c = F(s.scale) * kLog2e<F>;
        F m = -kInf<F>;
        for (int64_t j = 0; j < count; ++j) {
            x[j] *= c;
            m = x[j] > m || x[j] != x[j] ? x[j] : m;
        }
        for (int64_t j = count; j < round_up(count, L); ++j) x[j] = -kInf<F>;
        Vec<F> sum{};
        for (int64_t j = 0; j < count; j += L) {
            const Vec<F> p = exp2_nonpositive<F>(loadu<F>(x + j) - m);
            storeu<F>(x + j, p);
            sum += p;
        }
        weighted_sum<F>(x, values, head_rows, s.V, near);
        if (head_rows < count) {
            weighted_sum<F>(x + head_rows, v0, count - head_rows, s.V, more);
            for (int64_t e = 0; e < s.V; ++e) near[e] += more[e];
        }
        if (entered)
            far_read<false>(state, s.F, s.V, phi_q, phi_k, v, far);
        else
            far_read<true>(state, s.F, s.V, phi_q, phi_k, v, far);
        const F mix = s.mix ? static_cast<const F*>(s.mix)[hq] : F(1);
        const F inverse = F(1) / (mix * reduce_add<F>(sum) + dot_product<F>(phi_q, z, s.F) + F(1e-6));
        for (int64_t e = 0; e < s.V; ++e) near[e] = (mix * near[e] + far[e]) * inverse;
        narrow_row<F>(near, s.o.at<E>(b, t, hq), s.V);
    }
};

template <typename F, typename E>
void step_tasks(const slm::HybridStep& s, int64_t begin, int64_t end) {
    HybridDecode<F, E> decode(s);
    for (int64_t task = begin; task < end; ++task) decode.run(task);
}
