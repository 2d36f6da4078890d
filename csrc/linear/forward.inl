// Forward: one pass over the chunks of a task.
//
// Tasks of one sequence walk together, chunk by chunk, as many as their states fit in cache: the rows of a
// token's heads are neighbours in memory. (One after another, each head touches every page of q, k and v
// again.)
//
// Counted, plain, a chunk of 32 at K = V = 64: 0.36 million multiply-adds, 11 thousand cycles of 32; 32 KiB
// of rows in and out. Tried, on Zen 4 (T = 4096, 8 heads; one thread, ms, on a busy machine):
//   rows asked for ahead             16.9 -> 10.7 (K = V = 64), 39.9 -> 29.8 (128)
//   heads walking together           7.0 -> 5.5 (two threads, 64)
//   state in panels of 64 rows       nothing, at 128 either

constexpr int64_t kTogetherBytes = int64_t(1) << 18;  // of states

template <typename F>
struct Forward {
    static constexpr int L = kLanes<F>;
    const LinearProblem& p;
    const int64_t C, K, Kp, width, together;
    F *states, *zs, *o;

    static int64_t walkers(const LinearProblem& p) {
        const int64_t state = p.K * round_up(p.columns, L) * int64_t(sizeof(F)),
                      n = kTogetherBytes / (state + 1);
        return n < 1 ? 1 : n > 16 ? 16 : n;
    }
    static int64_t bytes(const LinearProblem& p) {
        const int64_t W = round_up(p.columns, L);
        return int64_t(sizeof(F)) * (walkers(p) * (p.K * W + round_up(p.K, L)) + 2 * p.chunk * W) + 256;
    }

    Forward(const LinearProblem& problem, Arena& arena)
        : p(problem),
          C(p.chunk),
          K(p.K),
          Kp(round_up(p.K, L)),
          width(round_up(p.columns, L)),
          together(walkers(p)) {
        states = arena.take<F>(together * K * width);
        zs = p.normalize ? arena.take<F>(together * Kp) : nullptr;
        o = arena.take<F>(2 * C * width);
    }

    // Tasks first .. first + count, all of one sequence.
    template <typename E>
    void walk(Chunk<F>& chunk, int64_t first, int64_t count) {
        const int64_t T = p.sequences[LinearTask(p, first).sequence].t.size();
        for (int64_t i = 0; i < count; ++i) {
            const LinearTask own(p, first + i);
            const int64_t head = own.sequence * p.H + own.h;
            load_state<F>(shifted<F>(p.state0, head * K * p.V + own.column), K, p.V, own.columns, state(i));
            if (zs) load_state<F>(shifted<F>(p.z0, head * K), 1, K, K, z(i));
        }
        for (int64_t t = 0; t < T; t += C)
            for (int64_t i = 0; i < count; ++i) {
                const bool last = i + 1 == count;
                advance<E>(chunk, LinearTask(p, first + i), t, state(i), z(i),
                           LinearTask(p, first + (last ? 0 : i + 1)), last ? t + C : t);
            }
        for (int64_t i = 0; i < count; ++i) {
            const LinearTask own(p, first + i);
            const int64_t head = own.sequence * p.H + own.h;
            store_state<F>(state(i), K, p.V, own.columns,
                           static_cast<F*>(p.state) + head * K * p.V + own.column);
            if (zs && own.part == 0) store_state<F>(z(i), 1, K, K, static_cast<F*>(p.z) + head * K);
        }
    }

    F* state(int64_t i) { return states + i * K * width; }
    F* z(int64_t i) { return zs ? zs + i * Kp : nullptr; }

    // One chunk of one task; `next` at `next_t` comes after it.
    template <typename E>
    void advance(Chunk<F>& chunk, const LinearTask& own, int64_t t, F* state, F* z, const LinearTask& next,
                 int64_t next_t) {
        const Sequence& s = p.sequences[own.sequence];
        if (p.segment > 0 && t > 0 && t % p.segment == 0) {
            F* kept = static_cast<F*>(p.kept) + p.place(s, t, own.h);
            store_state<F>(state, K, p.V, own.columns, kept + own.column);
            if (z && own.part == 0) store_state<F>(z, 1, K, K, kept + K * p.V);
        }
        const int64_t n = s.t.size() - t < C ? s.t.size() - t : C;
        chunk.template read<E>(own, t, n, true);
        chunk.template expect<E>(next, next_t, true);
        if (next_t < s.t.size())
            chunk.ahead.template add<E>(p.o, s.b, s.t.begin + next_t, next.h, next.column, next.columns,
                                        true);
        const Readers readers = chunk.all();
        const int64_t m = chunk.m, Vp = chunk.Vp;
        chunk.mix(readers);
        for (int64_t i = 0; i < readers.last * m; i += 2 * kSub) {
            const int64_t rows = readers.last * m - i < 2 * kSub ? kSub : 2 * kSub;
            gemm<Fma<F>, false>(rows, Vp / L, K, chunk.xr + i * Kp, Kp, 1, state, Vp, o + i * Vp, Vp);
            chunk.ahead.fetch(6);
        }
        if (chunk.delta) chunk.solve_delta(o + m * Vp);
        // Zeros of M times a NaN would carry it to rows before its own: then row by row.
        const int64_t step = finite(chunk.u, m * Vp) ? kSub : 1;
        for (int64_t i = 0; i < m; i += step)
            gemm<Fma<F>, true>(step, Vp / L, i + step, chunk.M + i * C, C, 1, chunk.u, Vp, o + i * Vp, Vp);
        for (int64_t i = 0; i < n; ++i) {
            const F factor = z ? F(1) / denominator(chunk, z, i) : F(p.scale);
            narrow_scaled<F>(o + i * Vp, p.o.at<E>(s.b, s.t.begin + t + i, own.h) + own.column, factor,
                             own.columns);
        }
        chunk.write(state, z);
    }
};

template <typename F, typename E>
void forward_tasks(const LinearProblem& p, int64_t begin, int64_t end) {
    Arena arena(size_t(Chunk<F>::bytes(p) + Forward<F>::bytes(p) + 1024));
    Forward<F> forward(p, arena);
    Chunk<F> chunk(p, arena);
    const int64_t per_sequence = p.H * p.parts();
    for (int64_t task = begin; task < end;) {
        const int64_t left = (task / per_sequence + 1) * per_sequence - task;
        int64_t count = left < forward.together ? left : forward.together;
        count = end - task < count ? end - task : count;
        forward.template walk<E>(chunk, task, count);
        task += count;
    }
}
