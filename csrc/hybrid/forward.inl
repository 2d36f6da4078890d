// Forward. Near keys first, by the online softmax; its shift may lag behind the maximum, so the sums are
// brought to the maximum itself, times mix, before the far part joins them: nothing rescales that.
//
// Counted for W = 256, D = V = F = 64 in products of 64^3 a block of 64 queries: scores and values 4.25 each,
// the triangle 0.6 + 0.6, the state read 1 and written 1; in all 11.7. (Sliding-window and linear attention
// apart: 8.5 + 2.8.)
//
// Measured on two cores of a Zen 4 (T = 4096, 8 heads, float32), in times of sliding-window attention alone,
// where linear attention takes 0.38: 1.45 to 1.51. Of that, by leaving it out: the triangle 0.11, reading the
// state 0.09, writing it 0.09, copying its keys 0.06; the first maximum and the step to it 0.01 each. Tried:
//   - rows not asked for ahead: 1.51 -> 1.56; the rows of O too: nothing.
// Not tried: keys entering every 32 queries; counted, it halves the triangle, 4 % of all products.

template <typename F, typename E, typename P>
struct HybridForward {
    static constexpr int L = kLanes<F>, W = kBlock<F>;
    using Softmax = SoftmaxBlock<F, E, P, true>;

    const HybridProblem& p;
    Arena arena;
    Softmax softmax;
    FarKeys<F> far;
    const int64_t Fp;
    F* state;  // [V + 1][Fp]
    F* phi_t;  // phi_q^T [F][W]
    F* at;  // weights of the mixed keys [kFar][W]
    Ahead ahead;

    static size_t bytes(const HybridProblem& p) {
        const int64_t Fp = round_up(p.F, L);
        return size_t(Softmax::bytes(p.D, p.V) + FarKeys<F>::bytes(p) +
                      int64_t(sizeof(F)) * ((p.V + 1) * Fp + Fp * W + kFar * W) + 512);
    }

    explicit HybridForward(const HybridProblem& problem)
        : p(problem),
          arena(bytes(p)),
          softmax(arena, p.band, p.D, p.V, p.scale, 0),
          far(p, arena),
          Fp(round_up(p.F, L)) {
        state = arena.take<F>((p.V + 1) * Fp);
        phi_t = arena.take<F>(Fp * W);
        at = arena.take<F>(kFar * W);
    }

    void walk(const HybridTask& own) {
        const HybridSequence& s = p.sequences[own.sequence];
        const Blocks blocks(p, s, W);
        const int64_t head = own.sequence * p.H + own.h;
        load_far_state(shifted<F>(p.state0, head * p.F * p.V), shifted<F>(p.z0, head * p.F), p, state);
        const bool none = blocks.offset == blocks.S;  // no queries
        const Range before{0, none ? 0 : blocks.first_near(blocks.offset)};  // far to all of them
        far.template enter_all<E>(s, own.h, before, state);
        bool any = p.state0 != nullptr || before.size() > 0;  // the state is not zero
        for (int64_t i = blocks.offset; i < blocks.S;) {
            const Range block = blocks.at(i), mixed = blocks.mixed(block);
            const Range entering = blocks.entering(block);
            far.template load<E>(s, own.h, Band::clip({entering.begin, entering.begin + kFar}, entering));
            for (int64_t hq = own.heads.begin; hq < own.heads.end; ++hq) {
                const bool last = hq + 1 == own.heads.end;
                expect(s, last ? blocks.at(block.end) : block, last ? own.heads.begin : hq + 1, own.h, last);
                query_block(s, block, mixed, own.h, hq, any);
            }
            if (entering.size() > 0) {
                any = true;
                far.enter(state);
                far.template enter_all<E>(s, own.h, {far.j.end, entering.end}, state);
            }
            i = block.end;
            if (own.part == 0 && p.segment > 0 && i < blocks.S && i % p.segment == 0)
                store_state<F>(state, p.V + 1, p.F, p.F, static_cast<F*>(p.kept) + p.place(s, i, own.h));
        }
        if (own.part == 0)
            store_far_state(state, p, static_cast<F*>(p.state) + head * p.F * p.V,
                            static_cast<F*>(p.z) + head * p.F);
    }

    // Asks for the rows of the block of queries to come; `with_keys`: and of the keys that it is the first to
    // read.
    void expect(const HybridSequence& s, Range block, int64_t hq, int64_t h, bool with_keys) {
        ahead = Ahead{};
        if (block.size() == 0) return;
        const int64_t offset = s.offset(), t = s.q.begin + block.begin - offset;
        ahead.add<E>(p.q, s.b, t, hq, 0, p.D, false);
        ahead.add<E>(p.phi_q, s.b, t, hq, 0, p.F, false);
        if (with_keys) {
            const int64_t row = s.k.begin + block.begin, before = p.band.first(block.begin);
            ahead.add<E>(p.k, s.b, row, h, 0, p.D, false);
            ahead.add<E>(p.v, s.b, row, h, 0, p.V, false);
            if (before >= 0) ahead.add<E>(p.phi_k, s.b, s.k.begin + before, h, 0, p.F, false);
        }
        ahead.end = block.size();
    }

    void query_block(const HybridSequence& s, Range block, Range mixed, int64_t h, int64_t hq, bool any) {
        const int64_t rows = block.size(), t = s.q.begin + block.begin - s.offset();
        softmax.begin(p.q.at<const E>(s.b, t, hq), p.q.t, rows, -kInf<F>);
        const Range keys = p.band.keys(block, s.k.size());
        for (int64_t j = keys.begin; j < keys.end; j += kKeys) {
            const int64_t end = j + kKeys < keys.end ? j + kKeys : keys.end;
            softmax.attend(p.k.at<const E>(s.b, s.k.begin + j, h), p.k.t,
                           p.v.at<const E>(s.b, s.k.begin + j, h), p.v.t, {j, end}, block.begin, rows);
            ahead.fetch(16);
        }
        softmax.settle(p.mix ? static_cast<const F*>(p.mix)[hq] : F(1));
        if (any || mixed.size() > 0) {
            const int64_t vectors = (rows + L - 1) / L;
            pack_transposed<Fma<F>>(p.phi_q.at<const E>(s.b, t, hq), p.phi_q.t, rows, p.F, phi_t, W);
            far.triangle(p.band, mixed, block.begin, vectors, [&](int64_t n, int64_t count, int64_t first) {
                const int64_t lane = first * L;
                gemm<Fma<F>, false>(count, vectors - first, p.F, far.phi + n * Fp, Fp, 1, phi_t + lane, W,
                                    at + n * W + lane, W);
                for (int64_t r = n; r < n + count; ++r) far.mask(p.band, r, block.begin, first, at + r * W);
                gemm<Fma<F>, true>(p.V + 1, vectors - first, count, far.v + n * far.Vx, 1, far.Vx,
                                   at + n * W + lane, W, softmax.ot + lane, W);
            });
            if (any) gemm<Fma<F>, true>(p.V + 1, vectors, p.F, state, Fp, 1, phi_t, W, softmax.ot, W);
        }
        finish(s, t, rows, hq);
    }

    void finish(const HybridSequence& s, int64_t t, int64_t rows, int64_t hq) {
        const int64_t row = (s.b * p.Hq + hq) * p.T + t;
        F *shift = static_cast<F*>(p.shift) + row, *sum = static_cast<F*>(p.denominator) + row,
          *l = softmax.l;
        for (int64_t i = 0; i < rows; ++i) {
            shift[i] = softmax.high[i];
            p.top[row + i] = int32_t(s.k.begin + softmax.index[i]);
            sum[i] = l[i] += F(1e-6);
        }
        for (int64_t i = 0; i < W; i += L) storeu<F>(l + i, F(1) / loadu<F>(l + i));
        unpack_transposed<P, false>(softmax.ot, l, rows, p.V, p.o.at<E>(s.b, t, hq), p.o.t);
    }
};

template <typename F, typename E, typename P>
void forward_tasks(const HybridProblem& p, int64_t begin, int64_t end) {
    HybridForward<F, E, P> forward(p);
    for (int64_t task = begin; task < end; ++task) forward.walk(HybridTask(p, task));
}
