// Backward: the blocks of a task in reverse, with the gradient dS of the state in cache.
//
// With den_i the sum of the weights, delta_i = dO_i . O_i and values extended by a column of ones,
// y_i = [dO_i, -delta_i] / den_i, the gradient of the weight of key j is y_i . [v_j, 1], and
//
//     near   dQ, dK, dV (common/softmax_gradient.h); what flows through the shift goes to the key at the
//            maximum, one row of dK and of dQ a query
//     mixed  g_ij = y_i . [v_j, 1]: dphi_q_i += g_ij phi_k_j, dphi_k_j += g_ij phi_q_i, dv_j += a_ij y_i
//     state  dphi_q += y S^T;  before it, for the keys that enter the state after the block,
//            dphi_k = [v, 1] dS^T, dv = phi_k dS;  after it dS += phi_q^T y
//
// A block sees all of its keys, and no query before it sees keys from its first on: dQ and dphi_q are
// stored once a block, dK and dV wait in a ring of scratch rows for as long as the window, dphi_k is done
// with the block after which its key enters the state. Nothing is added to in memory.
//
// The forward keeps a state every `segment` tokens; the states between are computed again and held in cache.
//
// Counted as in forward.inl: near 21.3, mixed 3.1, states 5; in all 29.4. (Apart: 21.3 + 6.9.) Measured as
// there: 1.50 of sliding-window attention's backward, where linear attention's takes 0.44 of it.

template <typename F, typename E, typename P>
struct HybridBackward {
    static constexpr int L = kLanes<F>, W = kBlock<F>;
    using Softmax = SoftmaxGradient<F, E, P, true>;

    const slm::HybridGradient& g;
    const HybridProblem& p;
    const int64_t slots;  // of the ring, a multiple of kGradKeys
    Arena arena;
    Softmax softmax;
    FarKeys<F> far;
    const int64_t V, Vp, Vx, Fp;
    F *states, *dS;  // [held][V + 1][Fp], [V + 1][Fp]
    F *y, *yt;  // y [W][Vx], transposed [V + 1][W]
    F *phi, *phi_t;  // phi_q [W][Fp], transposed [F][W]
    F *dphi, *dphi_k;  // [W][Fp], [kFar][Fp]
    F *at, *gt;  // mixed keys: weights, and their gradients [kFar][W]
    F* rows_q;  // dq [W][D]
    F *kt, *product;  // phi_k transposed [F][kFar]; [V][kFar], dv transposed
    F* dv;  // [kFar][Vp]
    Ahead ahead;

    static int64_t near_keys(const HybridProblem& p) {  // at most, of one block
        const int64_t reach = p.band.block > 0 ? 2 * p.band.block : p.band.left + 1;
        return round_up((reach < p.S ? reach : p.S) + W + 1, kGradKeys);
    }
    static int64_t held(const HybridProblem& p) {  // states of a segment
        const int64_t length = p.segment < p.S ? p.segment : p.S, B = p.band.block;
        return 2 + length / (B >= W ? B : B > 0 ? W / B * B : W);
    }
    static size_t bytes(const HybridProblem& p) {
        const int64_t Fp = round_up(p.F, L), Vx = round_up(p.V + 1, L), d = round_up(p.D, L);
        const int64_t scratch = (held(p) + 1) * (p.V + 1) * Fp + 2 * W * Vx + 3 * W * Fp + kFar * Fp +
                                2 * kFar * W + W * d + kFar * (Fp + 2 * Vx) + W;
        return size_t(Softmax::bytes(p.D, p.V, near_keys(p)) + FarKeys<F>::bytes(p) +
                      int64_t(sizeof(F)) * scratch + 2048);
    }

    explicit HybridBackward(const slm::HybridGradient& gradient)
        : g(gradient),
          p(g.problem),
          slots(near_keys(p)),
          arena(bytes(p)),
          softmax(arena, p.band, p.D, p.V, p.scale, 0, slots),
          far(p, arena),
          V(p.V),
          Vp(round_up(V, L)),
          Vx(far.Vx),
          Fp(far.Fp) {
        states = arena.take<F>(held(p) * (V + 1) * Fp);
        dS = arena.take<F>((V + 1) * Fp);
        y = arena.take<F>(W * Vx);
        yt = arena.take<F>(Vx * W);
        phi = arena.take<F>(W * Fp);
        phi_t = arena.take<F>(Fp * W);
        dphi = arena.take<F>(W * Fp);
        dphi_k = arena.take<F>(kFar * Fp);
        at = arena.take<F>(kFar * W);
        gt = arena.take<F>(kFar * W);
        rows_q = arena.take<F>(W * softmax.d);
        kt = arena.take<F>(Fp * kFar);
        product = arena.take<F>(Vp * kFar);
        dv = arena.take<F>(kFar * Vp);
        softmax.clear_keys(0, slots);
    }

    void walk(const HybridTask& own) {
        const HybridSequence& s = p.sequences[own.sequence];
        const Blocks blocks(p, s, W);
        const int64_t head = own.sequence * p.H + own.h, part = head * p.parts + own.part, S = blocks.S;
        const bool mine = own.part == 0;  // partial sums of one gradient
        load_far_state(mine ? shifted<F>(g.dstate, head * p.F * V) : nullptr,
                       mine ? shifted<F>(g.dz, head * p.F) : nullptr, p, dS);
        if (g.dmix)
            for (int64_t hq = own.heads.begin; hq < own.heads.end; ++hq) g.dmix[own.sequence * p.Hq + hq] = 0;
        for (int64_t end = S; end > 0;) {
            const int64_t begin = (end - 1) / p.segment * p.segment;
            int64_t state = replay(s, own.h, blocks, begin, end);
            while (end > begin) {
                const Range block = blocks.at(end - 1);
                const Range entering = blocks.entering(block);
                if (end < blocks.S && end % p.segment != 0 && entering.size() > 0) --state;
                const bool any = p.state0 != nullptr || entering.begin > 0;
                gradient(s, own, blocks, block, any ? states + state * (V + 1) * Fp : nullptr);
                end = block.begin;
            }
        }
        if (g.dstate0)
            store_far_state(dS, p, static_cast<F*>(g.dstate0) + part * p.F * V,
                            static_cast<F*>(g.dz0) + part * p.F);
    }

    // The states before the blocks of one segment, the first of them kept by the forward -> the last one's
    // index.
    int64_t replay(const HybridSequence& s, int64_t h, const Blocks& blocks, int64_t begin, int64_t end) {
        const int64_t size = (V + 1) * Fp, head = (&s - p.sequences) * p.H + h;
        if (begin == 0)
            load_far_state(shifted<F>(p.state0, head * p.F * V), shifted<F>(p.z0, head * p.F), p, states);
        else
            load_state<F>(static_cast<const F*>(p.kept) + p.place(s, begin, h), V + 1, p.F, p.F, states);
        int64_t state = 0;
        for (int64_t i = begin; i < end;) {
            const Range block = blocks.at(i);
            const Range entering = blocks.entering(block);
            i = block.end;
            if (i >= end || entering.size() == 0) continue;
            F* const to = states + ++state * size;
            __builtin_memcpy(to, to - size, size_t(size) * sizeof(F));
            far.template enter_all<E>(s, h, entering, to);
        }
        return state;
    }

    // One block of queries, all heads of the task; `state` before it, or null for zeros.
    void gradient(const HybridSequence& s, const HybridTask& own, const Blocks& blocks, Range block,
                  const F* state) {
        const Range mixed = blocks.mixed(block), entering = blocks.entering(block);
        if (block.end == blocks.S) {  // keys that never enter the state
            load_ring(s, own.h, {entering.end, blocks.S});
            fill_zero(dphi_k, kFar * Fp);
            for (int64_t j = entering.end; j < blocks.S; ++j) store_features(s, own, j, dphi_k);
        }
        load_ring(s, own.h, entering);
        // Pieces from the last to the first, which is the one that holds the mixed keys.
        const int64_t pieces = (entering.size() + kFar - 1) / kFar;
        for (int64_t n = pieces - 1; n >= 0; --n) {
            const int64_t j = entering.begin + n * kFar;
            enter(s, own, Band::clip({j, j + kFar}, entering));
            if (n > 0)
                for (int64_t r = 0; r < far.j.size(); ++r)
                    store_features(s, own, far.j.begin + r, dphi_k + r * Fp);
        }
        const Range before = block.begin > blocks.offset ? blocks.at(block.begin - 1) : Range{0, 0};
        for (int64_t hq = own.heads.begin; hq < own.heads.end; ++hq) {
            const bool last = hq + 1 == own.heads.end;
            expect(s, last ? before : block, last ? own.heads.begin : hq + 1, own.h, last);
            query_block(s, block, mixed, hq, state);
        }
        if (pieces > 0)
            for (int64_t r = 0; r < far.j.size(); ++r)
                store_features(s, own, far.j.begin + r, dphi_k + r * Fp);
        for (int64_t j = block.begin; j < block.end; ++j) store_keys(s, own, j);
    }

    void load_ring(const HybridSequence& s, int64_t h, Range keys) {
        for (int64_t j = keys.begin; j < keys.end;) {
            const int64_t at = j % slots, left = slots - at;
            const int64_t count = keys.end - j < left ? keys.end - j : left, row = s.k.begin + j;
            softmax.load_keys(p.k.at<const E>(s.b, row, h), p.k.t, p.v.at<const E>(s.b, row, h), p.v.t, at,
                              count);
            const int64_t even = at / 2 * 2, past = (at + count + 1) / 2 * 2;
            // Halves of pairs that are not of this sequence, or not yet here: multiplied by zeros.
            if (even < at) softmax.clear_keys(even, 1);
            if (j + count == s.k.size() && at + count < past) softmax.clear_keys(at + count, 1);
            softmax.pair_keys(even, past - even);
            j += count;
        }
    }

    // dphi_k and dv, from the state, of keys that enter it after this block.
    void enter(const HybridSequence& s, const HybridTask& own, Range keys) {
        far.template load<E>(s, own.h, keys);
        const int64_t n = keys.size();
        gemm<Fma<F>, false>(n, Fp / L, V + 1, far.v, Vx, 1, dS, Fp, dphi_k, Fp);
        pack_transposed<Fma<F>>(far.phi, Fp, n, p.F, kt, kFar);
        gemm<Fma<F>, false>(V, (n + L - 1) / L, p.F, dS, Fp, 1, kt, kFar, product, kFar);
        pack_transposed<Fma<F>>(product, kFar, V, n, dv, Vp);
        for (int64_t r = 0; r < n; ++r)
            __builtin_memcpy(softmax.dva + (keys.begin + r) % slots * Vp, dv + r * Vp,
                             size_t(Vp) * sizeof(F));
    }

    void expect(const HybridSequence& s, Range block, int64_t hq, int64_t h, bool with_keys) {
        ahead = Ahead{};
        if (block.size() == 0) return;
        const int64_t t = s.q.begin + block.begin;
        ahead.add<E>(p.q, s.b, t, hq, 0, p.D, false);
        ahead.add<E>(p.phi_q, s.b, t, hq, 0, p.F, false);
        ahead.add<E>(p.o, s.b, t, hq, 0, V, false);
        ahead.add<E>(g.dout, s.b, t, hq, 0, V, false);
        ahead.add<E>(g.dq, s.b, t, hq, 0, p.D, true);
        ahead.add<E>(g.dphi_q, s.b, t, hq, 0, p.F, true);
        const int64_t first = p.band.first(block.begin);
        if (with_keys && first >= 0) {
            ahead.add<E>(p.k, s.b, s.k.begin + first, h, 0, p.D, false);
            ahead.add<E>(p.v, s.b, s.k.begin + first, h, 0, V, false);
            ahead.add<E>(p.phi_k, s.b, s.k.begin + first, h, 0, p.F, false);
        }
        ahead.end = block.size();
    }

    void query_block(const HybridSequence& s, Range block, Range mixed, int64_t hq, const F* state) {
        const int64_t rows = block.size(), t = s.q.begin + block.begin, i0 = block.begin;
        const E *q = p.q.at<const E>(s.b, t, hq), *dout = g.dout.at<const E>(s.b, t, hq);
        softmax.load_queries(q, p.q.t, dout, g.dout.t, rows);
        softmax.mix = p.mix ? static_cast<const F*>(p.mix)[hq] : F(1);
        statistics(s, t, rows, hq);
        near(s, block);
        shift(s, t, rows, hq, q);

        const int64_t vectors = (rows + L - 1) / L;
        for (int64_t i = 0; i < rows; ++i)
            widen_row<F>(p.phi_q.at<const E>(s.b, t + i, hq), phi + i * Fp, p.F);
        if (state)
            gemm<Fma<F>, false>(rows, Fp / L, V + 1, y, Vx, 1, state, Fp, dphi, Fp);
        else
            fill_zero(dphi, rows * Fp);
        ahead.fetch(8);
        if (mixed.size() > 0) {
            pack_transposed<Fma<F>>(phi, Fp, rows, p.F, phi_t, W);
            pack_transposed<Fma<F>>(y, Vx, rows, V + 1, yt, W);
            far.triangle(p.band, mixed, i0, vectors, [&](int64_t n, int64_t count, int64_t first) {
                triangle(n, count, first, vectors, i0, rows);
            });
        }
        gemm<Fma<F>, true>(V + 1, Fp / L, rows, y, 1, Vx, phi, Fp, dS, Fp);
        for (int64_t i = 0; i < rows; ++i) narrow_row<F>(dphi + i * Fp, g.dphi_q.at<E>(s.b, t + i, hq), p.F);
    }

    // The shift of the near weights, delta, and y.
    void statistics(const HybridSequence& s, int64_t t, int64_t rows, int64_t hq) {
        const int64_t row = (s.b * p.Hq + hq) * p.T + t;
        const F *top = static_cast<const F*>(p.shift) + row,
                *sum = static_cast<const F*>(p.denominator) + row;
        for (int64_t i = 0; i < W; ++i) softmax.lse[i] = kInf<F>, softmax.delta[i] = softmax.factor[i] = F(0);
        for (int64_t i = 0; i < rows; ++i) {
            const E* dout = g.dout.at<const E>(s.b, t + i, hq);
            const F delta = row_dot<F>(p.o.at<const E>(s.b, t + i, hq), dout, V);
            const F inverse = F(1) / sum[i];
            softmax.factor[i] = inverse;
            softmax.delta[i] = delta;
            softmax.lse[i] = top[i];
            widen_scaled<F>(dout, y + i * Vx, inverse, V);
            y[i * Vx + V] = -delta * inverse;
        }
    }

    void near(const HybridSequence& s, Range block) {
        const Range keys = p.band.keys(block, s.k.size());
        constexpr int64_t Pair = Softmax::Pair;
        Run run{{0, keys.begin / Pair * Pair}, {0, 0}, false};
        while (run.j.end < keys.end) {
            const int64_t j = run.j.end, at = j % slots, left = slots - at;
            int64_t cap = j + (left < kGradKeys ? left : kGradKeys);
            if (cap > keys.end) cap = keys.end;
            run = slm::next_run(p.band, block.begin, block.size(), L, Pair, j, cap);
            ahead.fetch(8);
            if (run.v.size() > 0) softmax.attend(run, at, block.begin, block.size());
        }
    }

    // dq, and what flows through the shift: to the key at the maximum, and back from it.
    void shift(const HybridSequence& s, int64_t t, int64_t rows, int64_t hq, const E* q) {
        const int64_t d = softmax.d;
        unpack_transposed<Fma<F>, false>(softmax.dqt, static_cast<const F*>(nullptr), rows, p.D, rows_q, d);
        const int32_t* top = p.top + (s.b * p.Hq + hq) * p.T + t;
        double sum = 0;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t slot = (top[i] - s.k.begin) % slots;
            const F factor = -softmax.through[i];
            sum += double(softmax.shares[i]);
            F *to_q = rows_q + i * d, *to_k = softmax.dka + slot * d;
            const E* query = q + i * p.q.t;
            const typename P::A* key = softmax.ka + slot * d;
            int64_t e = 0;
            for (; e + L <= p.D; e += L) {
                storeu<F>(to_q + e, loadu<F>(to_q + e) + factor * load<F>(key + e));
                storeu<F>(to_k + e, loadu<F>(to_k + e) + factor * load<F>(query + e));
            }
            for (; e < p.D; ++e) {
                to_q[e] += factor * widen<F>(key[e]);
                to_k[e] += factor * widen<F>(query[e]);
            }
            narrow_row<F>(to_q, g.dq.at<E>(s.b, t + i, hq), p.D);
        }
        if (g.dmix) g.dmix[(&s - p.sequences) * p.Hq + hq] += sum;
    }

    // Mixed keys n .. n + count of the loaded ones, far from vector `first` on.
    void triangle(int64_t n, int64_t count, int64_t first, int64_t vectors, int64_t i0, int64_t rows) {
        const int64_t lane = first * L, N = vectors - first, past = rows - lane;
        const F* key = far.phi + n * Fp;
        gemm<Fma<F>, false>(count, N, p.F, key, Fp, 1, phi_t + lane, W, at + n * W + lane, W);
        gemm<Fma<F>, false>(count, N, V + 1, far.v + n * Vx, Vx, 1, yt + lane, W, gt + n * W + lane, W);
        for (int64_t r = n; r < n + count; ++r) {
            far.mask(p.band, r, i0, first, at + r * W);
            far.mask(p.band, r, i0, first, gt + r * W);
        }
        gemm<Fma<F>, false>(count, Vp / L, past, at + n * W + lane, W, 1, y + lane * Vx, Vx, dv, Vp);
        for (int64_t r = 0; r < count; ++r)
            add(softmax.dva + (far.j.begin + n + r) % slots * Vp, dv + r * Vp, Vp);
        gemm<Fma<F>, true>(count, Fp / L, past, gt + n * W + lane, W, 1, phi + lane * Fp, Fp, dphi_k + n * Fp,
                           Fp);
        gemm<Fma<F>, true>(past, Fp / L, count, gt + n * W + lane, 1, W, key, Fp, dphi + lane * Fp, Fp);
    }

    // Results of key j of the sequence: rows of this task's own sums, or of the gradients themselves.
    template <typename To>
    void store_row(const F* from, void* to, const HybridSequence& s, const HybridTask& own, int64_t j,
                   int64_t size) {
        const int64_t row = ((s.b * p.S + s.k.begin + j) * p.H + own.h) * p.parts + own.part;
        narrow_row<F>(from, static_cast<To*>(to) + row * size, size);
    }

    void store_features(const HybridSequence& s, const HybridTask& own, int64_t j, const F* from) {
        if (p.parts > 1)
            store_row<F>(from, g.dphi_k, s, own, j, p.F);
        else
            store_row<E>(from, g.dphi_k, s, own, j, p.F);
    }

    void store_keys(const HybridSequence& s, const HybridTask& own, int64_t j) {
        const F *k = softmax.dka + j % slots * softmax.d, *v = softmax.dva + j % slots * Vp;
        if (p.parts > 1) {
            store_row<F>(k, g.dk, s, own, j, p.D);
            store_row<F>(v, g.dv, s, own, j, V);
        } else {
            store_row<E>(k, g.dk, s, own, j, p.D);
            store_row<E>(v, g.dv, s, own, j, V);
        }
    }
};

template <typename F, typename E, typename P>
void backward_tasks(const slm::HybridGradient& g, int64_t begin, int64_t end) {
    HybridBackward<F, E, P> backward(g);
    for (int64_t task = begin; task < end; ++task) backward.walk(HybridTask(g.problem, task));
}
