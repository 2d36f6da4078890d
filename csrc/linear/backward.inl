// Backward: the chunks of a task in reverse, with the gradient dS of the state in cache.
//
// With y = scale dO (normalised: dO / denominator) for q, dM = dL/dM and everything else as in cpu.inl:
//
//     dU = M^T y + (k e^{G_C - G}) dS                                       without beta dV = dU
//     Y_j = dU_j - sum_{i>j} MK_ij beta_i Y_i,  dX = beta Y = dV,  dbeta_j = W_j . Y_j       with beta
//     y of the readers k is -dX; then for the whole stack x = [q; k]
//     dM = y U^T,   dx = dM k + e^G (y S^T),   dk = dM^T x + e^{G_C - G} (U dS^T)
//     dS <- e^{G_C} dS + (x e^G)^T y
//
// No division by beta or by a gate anywhere. The state before each chunk is needed: the forward keeps one
// every `segment` tokens, and a segment's chunks are run through again (without q), their states held in
// cache. States and dS lie transposed here, [V][K]: they are then B or A operands of every product as they
// lie, and what is transposed in a chunk are rows (keys, values, one product), not states. Denominators are
// computed again, in F: the saved output is rounded to E.
//
// Counted, plain, a chunk of 32 at K = V = 64: 0.9 million multiply-adds, 28 thousand cycles. Tried, on Zen 4
// (T = 4096, 8 heads, forward + backward on two threads, ms):
//   S and dS transposed at each use 24, kept transposed 19 (K = V = 64); 67 and 57 (128)
//   the rows of the results asked for ahead, for writing: within the noise
//   fewer passes over rows between the products: from 19 to 16 % of the samples at 128, the products apart
// At 128 the products take 62 % of the time, zeroing fresh pages of the results 13 %.
//
// Gates: dG_i has the readers' share x_i . dx_i, dG_j loses the keys' k_j . dk_j, and dg_t sums dG from t on.
// The diagonal is left out: no gate scales it. What crosses the chunk's edges is summed so that nothing
// cancels: reads from t on, writes before t, and <dS, e^{G_C} S>; with one gate a head also what stays inside
// (`finish`): the gradient of a constant gate sums over all tokens, and an error that they share would be T
// times as large.

constexpr int64_t kMostRows = 64;  // of a chunk

template <typename F>
struct Backward {
    static constexpr int L = kLanes<F>;
    const slm::LinearGradient& g;
    const LinearProblem& p;
    const int64_t C, K, Kp, width, held;  // held: chunks in a segment
    const int64_t together;  // tasks that walk together

    F *gradients, *dzs, *dS, *dz, *states, *ws, *zs;
    F *y, *dM, *dxr, *dx, *dk, *dkw, *du, *ut, *xt, *product, *dg, *den, *crossing, *inside, *carry;

    static int64_t bytes(const LinearProblem& p) {
        const int64_t C = p.chunk, Kp = round_up(p.K, L), W = round_up(p.columns, L), held = p.segment / C;
        const int64_t state = Kp * W, kept = (held + 1) * state + held * (C * W + Kp);
        const int64_t chunk = C * (2 * W + 2 * C + 7 * Kp + 2 * W + 8) + C * (2 * Kp + W) + 4 * Kp;
        return int64_t(sizeof(F)) * (Forward<F>::walkers(p) * (state + Kp) + kept + chunk) + 64 * 32;
    }

    Backward(const slm::LinearGradient& gradient, Arena& arena)
        : g(gradient),
          p(gradient.problem),
          C(p.chunk),
          K(p.K),
          Kp(round_up(p.K, L)),
          width(round_up(p.columns, L)),
          held(p.segment / p.chunk),
          together(Forward<F>::walkers(p)) {
        gradients = arena.take<F>(together * Kp * width);
        states = arena.take<F>((held + 1) * Kp * width);
        ws = p.beta ? arena.take<F>(held * C * width) : nullptr;
        zs = p.normalize ? arena.take<F>(held * Kp) : nullptr;
        dzs = arena.take<F>(together * Kp);
        y = arena.take<F>(2 * C * width);
        dM = arena.take<F>(2 * C * C);
        dxr = arena.take<F>(2 * C * Kp);
        dkw = arena.take<F>(C * Kp);
        const bool channel = p.decays == Decay::channel;  // else shares from the state are scaled in place
        dx = channel ? arena.take<F>(2 * C * Kp) : dxr;
        dk = channel ? arena.take<F>(C * Kp) : dkw;
        dg = channel ? arena.take<F>(C * Kp) : nullptr;
        du = arena.take<F>(C * width);
        ut = arena.take<F>(width * C);
        xt = arena.take<F>(C * Kp);
        product = arena.take<F>(C * (Kp > width ? Kp : width));
        den = arena.take<F>(C);
        crossing = arena.take<F>(C);
        inside = arena.take<F>(C);
        carry = arena.take<F>(Kp);
    }

    // Tasks first .. first + count, all of one sequence, segment by segment (see forward.inl).
    template <typename E>
    void walk(Chunk<F>& chunk, int64_t first, int64_t count) {
        const int64_t T = p.sequences[LinearTask(p, first).sequence].t.size(), parts = p.parts();
        for (int64_t i = 0; i < count; ++i) {
            const LinearTask own(p, first + i);
            const int64_t head = own.sequence * p.H + own.h;
            use(i);
            load_transposed<F>(shifted<F>(g.dstate, head * K * p.V + own.column), K, p.V, own.columns, dS);
            load_state<F>(own.part == 0 ? shifted<F>(g.dz, head * K) : nullptr, 1, K, K, dz);
            if (p.decays == Decay::constant) static_cast<double*>(g.ddecay)[head * parts + own.part] = 0;
        }
        F* const w = chunk.w;
        for (int64_t t0 = T == 0 ? -1 : (T - 1) / p.segment * p.segment; t0 >= 0; t0 -= p.segment)
            for (int64_t i = 0; i < count; ++i) {
                const LinearTask own(p, first + i);
                const int64_t t1 = T - t0 < p.segment ? T : t0 + p.segment;
                use(i);
                replay<E>(chunk, own, t0, t1);
                for (int64_t c = (t1 - t0 - 1) / C; c >= 0; --c) {
                    const int64_t t = t0 + c * C;
                    gradient<E>(chunk, own, t, t1 - t < C ? t1 - t : C, c);
                    chunk.w = w;
                }
            }
        for (int64_t i = 0; i < count; ++i) {
            const LinearTask own(p, first + i);
            const int64_t head = own.sequence * p.H + own.h;
            use(i);
            if (g.dstate0)
                store_transposed<F>(dS, K, p.V, own.columns,
                                    static_cast<F*>(g.dstate0) + head * K * p.V + own.column);
            if (g.dz0) store_state<F>(dz, 1, K, K, static_cast<F*>(g.dz0) + (head * parts + own.part) * K);
        }
    }

    void use(int64_t i) { dS = gradients + i * Kp * width, dz = dzs + i * Kp; }

    // States (and the delta rule's w) of the chunks of one segment, from the one before it.
    template <typename E>
    void replay(Chunk<F>& chunk, const LinearTask& own, int64_t t0, int64_t t1) {
        const Sequence& s = p.sequences[own.sequence];
        const int64_t Vp = round_up(own.columns, L), size = own.columns * Kp,
                      head = own.sequence * p.H + own.h;
        const F *from, *z;
        if (t0 == 0) {
            from = shifted<F>(p.state0, head * K * p.V), z = shifted<F>(p.z0, head * K);
        } else {
            from = static_cast<const F*>(p.kept) + p.place(s, t0, own.h), z = from + K * p.V;
        }
        load_transposed<F>(shifted<F>(from, own.column), K, p.V, own.columns, states);
        if (zs) load_state<F>(z, 1, K, K, zs);
        const Readers readers{1, chunk.delta ? 2 : 1};
        for (int64_t t = t0, c = 0; t < t1; t += C, ++c) {
            const bool last = t + C >= t1;
            if (last && !chunk.delta) break;
            F* state = states + c * size;
            chunk.template read<E>(own, t, last ? t1 - t : C, false);
            if (!last) chunk.template expect<E>(own, t + C, false);
            chunk.mix(readers);
            if (chunk.delta) {
                const int64_t m = chunk.m;
                meet(chunk, state, chunk.xr + m * Kp, own.columns, du);
                chunk.solve_delta(du);
                __builtin_memcpy(ws + c * C * Vp, chunk.w, size_t(m * Vp) * sizeof(F));
            }
            if (last) break;
            __builtin_memcpy(state + size, state, size_t(size) * sizeof(F));
            if (zs) __builtin_memcpy(zs + (c + 1) * Kp, zs + c * Kp, size_t(Kp) * sizeof(F));
            add_to_state(chunk, chunk.u, chunk.writers(), chunk.m, state + size);
            if (zs) chunk.write_normalizer(zs + (c + 1) * Kp);
        }
    }

    // to [m][Vp] = rows x [m][Kp] times the state. Rows are the lanes of the product, so that the state is
    // read as it lies; the result is transposed back. `x` is k itself where nothing is gated.
    void meet(Chunk<F>& chunk, const F* state, const F* x, int64_t columns, F* to) {
        const int64_t m = chunk.m;
        const F* lanes = chunk.packed;  // mix has left k there
        if (chunk.gated) pack_transposed<Fma<F>>(x, Kp, m, Kp, xt, C), lanes = xt;
        gemm<Fma<F>, false>(columns, m / L, K, state, Kp, 1, lanes, C, product, C);
        pack_transposed<Fma<F>>(product, C, columns, m, to, chunk.Vp);
    }

    // state <- e^{G_C} state + u^T x, [columns][Kp].
    void add_to_state(Chunk<F>& chunk, const F* u, const F* x, int64_t rows, F* state) {
        const int64_t columns = chunk.V;
        if (chunk.gated)
            for (int64_t e = 0; e < columns; ++e) multiply(state + e * Kp, state + e * Kp, chunk.total, Kp);
        for (int64_t e = 0; e < columns; e += 24) {
            gemm<Fma<F>, true>(columns - e < 24 ? columns - e : 24, Kp / L, rows, u + e, 1, chunk.Vp, x, Kp,
                               state + e * Kp, Kp);
            chunk.ahead.fetch(6);
        }
    }

    template <typename E>
    void gradient(Chunk<F>& chunk, const LinearTask& own, int64_t t, int64_t n, int64_t c) {
        const Sequence& s = p.sequences[own.sequence];
        const int64_t Vp = round_up(own.columns, L);
        const F* state = states + c * own.columns * Kp;
        const F* z = zs ? zs + c * Kp : nullptr;
        chunk.template read<E>(own, t, n, true);
        chunk.template expect<E>(own, c > 0 ? t - C : -1, true);
        if (c > 0) {
            const int64_t before = s.t.begin + t - C, hk = own.h / (p.H / p.Hk);
            chunk.ahead.template add<E>(g.dout, s.b, before, own.h, own.column, own.columns, false);
            chunk.ahead.template add<E>(g.dv, s.b, before, own.h, own.column, own.columns, true);
            if (!g.summed) {
                const Rows like{nullptr, p.T * p.Hk * K, p.Hk * K, K};
                for (void* to : {g.dq, g.dk})
                    chunk.ahead.template add<E>({to, like.b, like.t, like.h}, s.b, before, hk, 0, K, true);
            }
        }
        const Readers readers = chunk.all();
        const int64_t m = chunk.m, both = readers.last * m, row = s.t.begin + t;
        if (chunk.delta) {  // u again
            chunk.w = ws + c * C * Vp;
            for (int64_t i = 0; i < m; ++i)
                for (int64_t e = 0; e < Vp; e += L)
                    storeu<F>(chunk.u + i * Vp + e, loadu<F>(chunk.w + i * Vp + e) * chunk.beta[i]);
        }
        chunk.mix(readers);

        for (int64_t i = 0; i < n; ++i) {
            if (z) den[i] = denominator(chunk, z, i);
            const F factor = z ? F(1) / den[i] : F(p.scale);
            widen_scaled<F>(g.dout.at<const E>(s.b, row + i, own.h) + own.column, y + i * Vp, factor,
                            own.columns);
        }
        for (int64_t i = n; i < m; ++i) den[i] = 1;
        fill_zero(y + n * Vp, (m - n) * Vp);

        // du, and through the triangle
        meet(chunk, dS, chunk.writers(), own.columns, du);
        for (int64_t j = 0; j < m; j += kSub)
            gemm<Fma<F>, true>(kSub, Vp / L, m - j, chunk.M + j * C + j, 1, C, y + j * Vp, Vp, du + j * Vp,
                               Vp);
        F* dv = du;
        if (chunk.delta) {
            F* const last = du + (m - 1) * Vp;
            dv = y + m * Vp;
            solve<F>(m, Vp / L, chunk.M + (2 * m - 1) * C + m - 1, -1, -C, chunk.beta + m - 1, -1, last,
                     dv + (m - 1) * Vp, -Vp);
            F* dbeta = static_cast<F*>(g.dbeta);
            for (int64_t i = 0; i < n; ++i)
                dbeta[((s.b * p.T + row + i) * p.H + own.h) * p.parts() + own.part] =
                    dot(chunk.w + i * Vp, du + i * Vp, Vp);
        }
        for (int64_t i = 0; i < n; ++i)
            narrow_row<F>(dv + i * Vp, g.dv.at<E>(s.b, row + i, own.h) + own.column, own.columns);
        if (chunk.delta)
            for (int64_t e = 0; e < m * Vp; e += L) storeu<F>(dv + e, -loadu<F>(dv + e));

        // dM, and what readers and keys have from the state
        pack_transposed<Fma<F>>(chunk.u, Vp, m, Vp, ut, C);
        for (int half = 0; half < readers.last; ++half)
            for (int64_t i = 0; i < m; i += kSub)
                gemm<Fma<F>, false>(kSub, (i + kSub) / L, own.columns, y + (half * m + i) * Vp, Vp, 1, ut, C,
                                    dM + (half * m + i) * C, C);
        chunk.ahead.fetch(6);
        gemm<Fma<F>, false>(both, Kp / L, own.columns, y, Vp, 1, state, Kp, dxr, Kp);
        chunk.ahead.fetch(6);
        gemm<Fma<F>, false>(m, Kp / L, own.columns, chunk.u, Vp, 1, dS, Kp, dkw, Kp);
        chunk.ahead.fetch(6);
        if (z) normalizer_gradient(chunk, z);

        // gates' shares inside the chunk, dM of the undecayed products
        fill_zero(crossing, m);
        for (int64_t i = m - 1; i >= 0; --i) finish(chunk, i, readers.last);
        chunk.ahead.fetch(6);
        if (chunk.channel) {
            fill_zero(dx, both * Kp);
            fill_zero(dk, m * Kp);
            ChannelGradient<F> channel{dM, dx, dk, product};
            mix_channels<true>(chunk, readers, &channel);
            gate_gradient(chunk, s, own, row, state, z);
            for (int64_t i = 0; i < m; ++i) {  // the diagonal
                const Vec<F> share = splat<F>(dM[i * C + i]);
                for (int64_t d = 0; d < Kp; d += L) {
                    F *to_q = dx + i * Kp + d, *to_k = dk + i * Kp + d;
                    storeu<F>(to_q, loadu<F>(to_q) + share * loadu<F>(chunk.k() + i * Kp + d));
                    storeu<F>(to_k, loadu<F>(to_k) + share * loadu<F>(chunk.q() + i * Kp + d));
                }
            }
            for (int half = 0; half < readers.last; ++half)
                add_product(dx + half * m * Kp, dxr + half * m * Kp, chunk.into, m * Kp);
            add_product(dk, dkw, chunk.out, m * Kp);
        } else {
            if (chunk.gated) {
                gate_gradient(chunk, s, own, row, state, z);
                for (int half = 0; half < readers.last; ++half)
                    scale_rows(dx + half * m * Kp, chunk.into, 1, m, Kp);
                scale_rows(dk, chunk.out, 1, m, Kp);
            }
            for (int half = 0; half < readers.last; ++half)
                for (int64_t i = 0; i < m; i += kSub)
                    gemm<Fma<F>, true>(kSub, Kp / L, i + kSub, dM + (half * m + i) * C, C, 1, chunk.k(), Kp,
                                       dx + (half * m + i) * Kp, Kp);
            for (int half = 0; half < readers.last; ++half)
                for (int64_t j = 0; j < m; j += kSub)
                    gemm<Fma<F>, true>(kSub, Kp / L, m - j, dM + (half * m + j) * C + j, 1, C,
                                       chunk.x + (half * m + j) * Kp, Kp, dk + j * Kp, Kp);
        }

        // dS and dz before this chunk
        add_to_state(chunk, y, chunk.xr, both, dS);
        if (z) {
            if (chunk.gated) multiply(dz, dz, chunk.total, Kp);
            for (int64_t i = 0; i < m; ++i)
                for (int64_t d = 0; d < Kp; d += L)
                    storeu<F>(dz + d, loadu<F>(dz + d) + loadu<F>(chunk.xr + i * Kp + d) * den[i]);
        }
        store<E>(chunk, s, own, row);
    }

    // The denominators' gradient (into `den`) joins dM, dxr and dkw.
    void normalizer_gradient(Chunk<F>& chunk, const F* z) {
        for (int64_t i = 0; i < chunk.m; ++i) {
            const int64_t end = (i / kSub + 1) * kSub;
            F* row = dM + i * C;
            Vec<F> sum{};
            for (int64_t j = 0; j < end; j += L) sum += loadu<F>(row + j) * loadu<F>(chunk.M + i * C + j);
            den[i] = -(reduce_add<F>(sum) + dot(chunk.xr + i * Kp, dxr + i * Kp, Kp)) / den[i];
            for (int64_t j = 0; j < end; j += L) storeu<F>(row + j, loadu<F>(row + j) + den[i]);
            for (int64_t d = 0; d < Kp; d += L) {
                F *read = dxr + i * Kp + d, *write = dkw + i * Kp + d;
                storeu<F>(read, loadu<F>(read) + loadu<F>(z + d) * den[i]);
                storeu<F>(write, loadu<F>(write) + loadu<F>(dz + d));
            }
        }
    }

    // Row i of dM: masked and, with one gate a head, decayed, after its share of the gates' gradient is
    // taken. Rows come from the last to the first: `crossing` sums over the rows so far the products with key
    // j (lanes), so that those with j < i are the pairs whose decay has gate i in it. Nothing cancels.
    SLM_INLINE void finish(const Chunk<F>& chunk, int64_t i, int halves) {
        const int64_t end = (i / kSub + 1) * kSub;
        Vec<F> share{};
        for (int64_t j = chunk.scalar ? 0 : end - kSub; j < end; j += L) {
            const Vec<F> lane = lane_numbers<F>(j);
            Vec<F> sum = loadu<F>(crossing + j);
            for (int half = 0; half < halves; ++half) {
                const int64_t at = (half * chunk.m + i) * C + j;
                Vec<F> x = loadu<F>(dM + at);
                if (chunk.scalar) {
                    const Vec<F> pair = select<F>(lane < F(i), x * loadu<F>(chunk.M + at), Vec<F>{});
                    sum = half ? sum - pair : sum + pair;
                    x *= loadu<F>(chunk.between + i * C + j);
                }
                storeu<F>(dM + at, select<F>(lane < F(half ? i : i + 1), x, Vec<F>{}));
            }
            storeu<F>(crossing + j, sum);
            share += select<F>(lane < F(i), sum, Vec<F>{});
        }
        if (chunk.scalar) inside[i] = reduce_add<F>(share);
    }

    void gate_gradient(Chunk<F>& chunk, const Sequence& s, const LinearTask& own, int64_t row, const F* state,
                       const F* z) {
        const int64_t m = chunk.m, halves = chunk.all().last;
        fill_zero(carry, Kp);
        for (int64_t e = 0; e < own.columns; ++e) add_product(carry, state + e * Kp, dS + e * Kp, Kp);
        if (z) add_product(carry, dz, z, Kp);
        multiply(carry, carry, chunk.total, Kp);
        const int64_t parts = p.parts();
        if (!chunk.channel) {
            // In double: an error of these sums would be the same for all tokens after or before, and add up
            // in the gradient of a constant gate.
            double sum = 0, shares[kMostRows];
            for (int64_t d = 0; d < Kp; ++d) sum += double(carry[d]);
            for (int64_t i = 0; i < m; ++i) {  // writes before i
                shares[i] = sum;
                sum += double(dot(chunk.kw + i * Kp, dkw + i * Kp, Kp));
            }
            sum = 0;
            for (int64_t i = m - 1; i >= 0; --i) {
                shares[i] += double(inside[i]);
                for (int64_t half = 0; half < halves; ++half)
                    sum += double(dot(chunk.xr + (half * m + i) * Kp, dxr + (half * m + i) * Kp, Kp));
                shares[i] += sum;
            }
            if (p.decays == Decay::constant) {  // one sum over the whole sequence
                double& total =
                    static_cast<double*>(g.ddecay)[(own.sequence * p.H + own.h) * parts + own.part];
                for (int64_t i = 0; i < chunk.n; ++i) total += shares[i];
            } else {
                F* to = static_cast<F*>(g.ddecay);
                for (int64_t i = 0; i < chunk.n; ++i)
                    to[((s.b * p.T + row + i) * p.H + own.h) * parts + own.part] = F(shares[i]);
            }
            return;
        }
        for (int64_t d = 0; d < Kp; d += L) {
            Vec<F> sum = loadu<F>(carry + d);
            for (int64_t i = 0; i < m; ++i) {
                const int64_t at = i * Kp + d;
                storeu<F>(dg + at, sum);
                sum += loadu<F>(chunk.kw + at) * loadu<F>(dkw + at);
            }
            sum = Vec<F>{};
            for (int64_t i = m - 1; i >= 0; --i) {
                const int64_t at = i * Kp + d;
                sum -= loadu<F>(chunk.k() + at) * loadu<F>(dk + at);
                for (int64_t half = 0; half < halves; ++half) {
                    const int64_t by = half * m * Kp + at;
                    sum += loadu<F>(chunk.x + by) * loadu<F>(dx + by);
                    sum += loadu<F>(chunk.xr + by) * loadu<F>(dxr + by);
                }
                storeu<F>(dg + at, loadu<F>(dg + at) + sum);
            }
        }
        for (int64_t i = 0; i < chunk.n; ++i)
            narrow_row<F>(
                dg + i * Kp,
                static_cast<F*>(g.ddecay) + (((s.b * p.T + row + i) * p.H + own.h) * parts + own.part) * K,
                K);
    }

    template <typename E>
    void store(Chunk<F>& chunk, const Sequence& s, const LinearTask& own, int64_t row) {
        const int64_t group = p.H / p.Hk, hk = own.h / group, m = chunk.m;
        const int64_t part = (own.h % group) * p.parts() + own.part;
        for (int which = 0; which < 2; ++which) {
            F* from = which ? dk : dx;
            void* to = which ? g.dk : g.dq;
            const F *unit = which ? chunk.k() : chunk.q(), *inverse = chunk.inverse + which * m;
            for (int64_t i = 0; i < chunk.n; ++i) {
                F* x = from + i * Kp;
                if (which && chunk.delta) add(x, dx + (m + i) * Kp, Kp);
                if (p.l2norm) {
                    const F along = dot(x, unit + i * Kp, Kp);
                    for (int64_t d = 0; d < Kp; d += L)
                        storeu<F>(x + d,
                                  (loadu<F>(x + d) - loadu<F>(unit + i * Kp + d) * along) * inverse[i]);
                }
                const int64_t at = (s.b * p.T + row + i) * p.Hk + hk;
                if (g.summed)
                    narrow_row<F>(x, static_cast<F*>(to) + (at * group * p.parts() + part) * K, K);
                else
                    narrow_row<F>(x, static_cast<E*>(to) + at * K, K);
            }
        }
    }
};

template <typename F, typename E>
void backward_tasks(const slm::LinearGradient& g, int64_t begin, int64_t end) {
    const LinearProblem& p = g.problem;
    Arena arena(size_t(Chunk<F>::bytes(p) + Backward<F>::bytes(p) + 1024));
    Backward<F> backward(g, arena);
    Chunk<F> chunk(p, arena);
    const int64_t per_sequence = p.H * p.parts(), together = backward.together;
    for (int64_t task = begin; task < end;) {
        const int64_t left = (task / per_sequence + 1) * per_sequence - task;
        int64_t count = left < together ? left : together;
        count = end - task < count ? end - task : count;
        backward.template walk<E>(chunk, task, count);
        task += count;
    }
}
