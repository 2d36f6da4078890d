// Forward: one pass over the chunks of a task.

template <typename F, typename E>
void forward_tasks(const LinearProblem& p, int64_t begin, int64_t end) {
    constexpr int L = kLanes<F>;
    const int64_t C = p.chunk, K = p.K, Kp = round_up(K, L), width = round_up(p.columns, L);
    Arena arena(
        size_t(Chunk<F>::chunk_bytes(p, p.columns) + int64_t(sizeof(F)) * ((K + 2 * C) * width + Kp) + 1024));
    F* const state = arena.take<F>(K * width);
    F* const z = p.normalize ? arena.take<F>(Kp) : nullptr;
    F* const o = arena.take<F>(2 * C * width);
    const Arena::Mark mark = arena.mark();
    for (int64_t task = begin; task < end; ++task) {
        const LinearTask own(p, task);
        const Sequence& s = p.sequences[own.sequence];
        arena.back_to(mark);
        Chunk<F> chunk(p, own.columns, arena);
        const int64_t Vp = chunk.Vp, head = own.sequence * p.H + own.h;
        load_state<F>(shifted<F>(p.state0, head * K * p.V + own.column), K, p.V, own.columns, state);
        if (z) load_state<F>(shifted<F>(p.z0, head * K), 1, K, K, z);
        for (int64_t t = 0; t < s.t.size(); t += C) {
            if (p.segment > 0 && t > 0 && t % p.segment == 0) {
                F* kept = static_cast<F*>(p.kept) + p.place(s, t, own.h);
                store_state<F>(state, K, p.V, own.columns, kept + own.column);
                if (z && own.part == 0) store_state<F>(z, 1, K, K, kept + K * p.V);
            }
            const int64_t n = s.t.size() - t < C ? s.t.size() - t : C;
            chunk.template read<E>(s, t, n, own.h, own.column, true);
            const int64_t left = s.t.size() - t - n;
            chunk.template expect<E>(s, t + n, left < C ? left : C, own.h, own.column, true);
            if (left > 0)
                chunk.ahead.template add<E>(p.o, s.b, s.t.begin + t + n, own.h, own.column, own.columns,
                                            true);
            const Readers readers = chunk.all();
            const int64_t m = chunk.m;
            chunk.mix(readers);
            for (int64_t i = 0; i < readers.last * m; i += 2 * kSub) {
                const int64_t rows = readers.last * m - i < 2 * kSub ? kSub : 2 * kSub;
                gemm<Fma<F>, false>(rows, Vp / L, K, chunk.xr + i * Kp, Kp, 1, state, Vp, o + i * Vp, Vp);
                chunk.ahead.fetch(6);
            }
            if (chunk.delta) chunk.solve_delta(o + m * Vp);
            for (int64_t i = 0; i < m; i += kSub)
                gemm<Fma<F>, true>(kSub, Vp / L, i + kSub, chunk.M + i * C, C, 1, chunk.u, Vp, o + i * Vp,
                                   Vp);
            for (int64_t i = 0; i < n; ++i) {
                const F factor = z ? F(1) / denominator(chunk, z, i) : F(p.scale);
                narrow_scaled<F>(o + i * Vp, p.o.at<E>(s.b, s.t.begin + t + i, own.h) + own.column, factor,
                                 own.columns);
            }
            chunk.write(state, z);
        }
        if (p.state)
            store_state<F>(state, K, p.V, own.columns,
                           static_cast<F*>(p.state) + head * K * p.V + own.column);
        if (z && own.part == 0) store_state<F>(z, 1, K, K, static_cast<F*>(p.z) + head * K);
    }
}
