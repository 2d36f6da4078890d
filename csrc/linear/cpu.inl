// Linear attention on the CPU: what both directions share, and the table of one tier's kernels. forward.inl,
// backward.inl and step.inl tell how each direction works.
//
// A task is one head of one sequence (and, where heads are few, some of its value columns). It walks over
// chunks of C tokens with the state S [K][V] in cache. Inside a chunk, with G the sum of the log gates from
// its start (Yang et al. 2024, GLA, section 4; DeltaNet, section 3.2; Gated DeltaNet, section 3.3):
//
//     M_ij = sum_c x_ic k_jc exp(G_ic - G_jc)                 for the readers x: q, and with beta also k
//     W_i  = v_i - (k e^G)_i S - sum_{j<i} MK_ij U_j,  U = beta W      with beta: a unit triangle is solved
//     U    = V                                                         without
//     O    = scale ((q e^G) S + M U)                           S <- e^{G_C} S + (k e^{G_C - G})^T U
//
// So the delta rule's keys are readers of the state like queries, one stack [q; k] of rows, and every row of
// the table of models is the same few products with some left out. All of it is computed in F (float, or
// double) whatever the storage type E: rows are converted as they are copied into scratch. The copy pays for
// itself: rows of one head lie H D apart, which maps a chunk onto few sets of the first cache.
//
// Triangles are cut into steps of kSub = 16 rows, each as long as its last row needs.
//
// Gates. Exponents are sums over the tokens between two positions, never differences of two long sums: with
// gates of -50 the sums grow to thousands, and their differences would lose the digits of a gate of -0.001.
// One gate a head: the sums j..i run down a vector of lanes j, one addition a row. One a channel: see
// channels.inl. An exponent is never above 0, and -inf gives exact zeros. What decays below the normal numbers
// counts as zero: see common/subnormals.h.

#include "../common/ahead.h"
#include "../common/vectors.h"
#include "linear.h"

namespace {

using slm::Decay;
using slm::LinearProblem;
using slm::Rows;
using slm::Sequence;

constexpr int64_t kSub = 16;

// out[i] = sum of row i's lanes, for one register of rows.
template <typename F>
SLM_INLINE Vec<F> sum_lanes(Vec<F>* rows) {
    transpose<F>(rows);
    Vec<F> sum = rows[0];
#pragma GCC unroll 16
    for (int l = 1; l < kLanes<F>; ++l) sum += rows[l];
    return sum;
}

template <typename F>
SLM_INLINE bool finite(const F* x, int64_t n) {
    Vec<F> sum{};
    for (int64_t d = 0; d < n; d += kLanes<F>) sum += loadu<F>(x + d) * F(0);
    return reduce_add<F>(sum) == F(0);  // 0 times NaN or infinity is NaN
}

template <typename F>
struct Chunk;
template <typename F>
struct ChannelGradient;
struct Readers;
template <typename F>
void read_channel_gates(Chunk<F>& chunk, int64_t b, int64_t t, int64_t h);
template <bool Backward, typename F>
void mix_channels(Chunk<F>& chunk, Readers readers, ChannelGradient<F>* gradient);

// Which readers of a chunk: q alone, k alone (to advance the state under the delta rule), or both.
struct Readers {
    int first, last;
};

// Which sequence, head and value columns a task has.
struct LinearTask {
    int64_t sequence, h, part, column, columns;

    LinearTask(const LinearProblem& p, int64_t task) {
        const int64_t parts = p.parts();
        sequence = task / (p.H * parts), h = task / parts % p.H, part = task % parts;
        column = part * p.columns;
        columns = p.V - column < p.columns ? p.V - column : p.columns;
    }
};

// One chunk of one head in scratch memory. Row arrays have `m` rows, a multiple of kSub; those from n on are
// zeros (gates 1), which changes neither state nor results.
template <typename F>
struct Chunk {
    static constexpr int L = kLanes<F>;
    const LinearProblem& p;
    const int64_t C, K, Kp;  // capacity in rows; channels, and in whole registers
    const bool channel, scalar, gated, delta;
    int64_t V = 0, Vp = 0;  // value columns of the task, and in whole registers
    int64_t n = 0, m = 0;
    Ahead ahead;

    F* x;  // [2m][Kp] readers: q, then k
    F* xr;  // [2m][Kp] readers as they meet the state: x e^G
    F* kw;  // [m][Kp] keys as they enter the state: k e^{G_C - G}
    F* u;  // [m][Vp] what is written: v, or the solution of the delta rule
    F* w;  // [m][Vp] delta rule: v at first, then u before beta
    F* beta;  // [m]
    F* inverse;  // [2m] 1 / |x| of l2norm
    F* gate;  // e^g: [m][Kp], or log2 gates [m]
    F* into;  // e^G from the chunk's start: [m][Kp] or [m]
    F* out;  // e^{G_C - G}: [m][Kp] or [m]
    F* between;  // [m][C] e^{G_i - G_j}, zeros for j > i; one gate a head only
    F* total;  // [Kp] e^{G_C}
    F* packed;  // [Kp][C] keys transposed
    F* M;  // [2m][C] products, decayed; the half of k is negative, its diagonal 0
    F* sums;  // [C] and partial sums of products

    static int64_t bytes(const LinearProblem& p) {
        const int64_t C = p.chunk, Kp = round_up(p.K, L), Vp = round_up(p.columns, L);
        return int64_t(sizeof(F)) * (C * (Kp * 9 + Vp * 2 + 3 * C + 16) + 3 * Kp + 4096);
    }

    Chunk(const LinearProblem& problem, Arena& arena)
        : p(problem),
          C(problem.chunk),
          K(problem.K),
          Kp(round_up(problem.K, L)),
          channel(problem.decays == Decay::channel),
          scalar(problem.decays == Decay::scalar || problem.decays == Decay::constant),
          gated(problem.decays != Decay::none),
          delta(problem.beta != nullptr) {
        const int64_t width = round_up(p.columns, L);
        x = arena.take<F>(2 * C * Kp);
        xr = gated ? arena.take<F>(2 * C * Kp) : x;
        kw = gated ? arena.take<F>(C * Kp) : nullptr;
        u = arena.take<F>(C * width);
        w = delta ? arena.take<F>(C * width) : nullptr;
        beta = arena.take<F>(C);
        inverse = arena.take<F>(2 * C);
        gate = arena.take<F>(channel ? C * Kp : C);
        into = arena.take<F>(channel ? C * Kp : C);
        out = arena.take<F>(channel ? C * Kp : C);
        between = scalar ? arena.take<F>(C * C) : nullptr;
        total = arena.take<F>(Kp);
        packed = arena.take<F>(C * Kp);
        M = arena.take<F>(2 * C * C);
        sums = arena.take<F>(2 * C + 2 * kSub * L);
    }

    F* q() const { return x; }
    F* k() const { return x + m * Kp; }
    Readers all() const { return {0, delta ? 2 : 1}; }
    // Keys as they enter the state.
    const F* writers() const { return gated ? kw : k(); }

    template <typename E>
    void load(const Rows& from, int64_t b, int64_t t, int64_t h, int64_t column, int64_t count, F* to,
              int64_t width) {
        for (int64_t i = 0; i < n; ++i)
            widen_row<F>(from.at<const E>(b, t + i, h) + column, to + i * width, count);
        fill_zero(to + n * width, (m - n) * width);
    }

    // Divides rows by their norms and keeps the inverses.
    void normalize_rows(F* rows, F* inverses) {
        for (int64_t i = 0; i < m; ++i) {
            F* row = rows + i * Kp;
            const F r = F(1) / std::sqrt(dot(row, row, Kp) + F(1e-6));
            inverses[i] = r;
            for (int64_t d = 0; d < Kp; d += L) storeu<F>(row + d, loadu<F>(row + d) * r);
        }
    }

    // Tokens t .. t + count of a sequence: rows, gates, and the rows that meet the state. Without q if only
    // the state is to advance.
    template <typename E>
    void read(const LinearTask& own, int64_t t, int64_t count, bool with_q) {
        const Sequence& s = p.sequences[own.sequence];
        const int64_t row = s.t.begin + t, h = own.h, hk = h / (p.H / p.Hk);
        n = count, m = round_up(count, kSub);
        V = own.columns, Vp = round_up(V, L);
        if (with_q) load<E>(p.q, s.b, row, hk, 0, K, q(), Kp);
        load<E>(p.k, s.b, row, hk, 0, K, k(), Kp);
        load<E>(p.v, s.b, row, h, own.column, V, delta ? w : u, Vp);
        if (p.l2norm) {
            if (with_q) normalize_rows(q(), inverse);
            normalize_rows(k(), inverse + m);
        }
        if (delta) {
            const F* from = static_cast<const F*>(p.beta) + (s.b * p.T + row) * p.H + h;
            for (int64_t i = 0; i < m; ++i) beta[i] = i < n ? from[i * p.H] : F(0);
        }
        const Readers readers{with_q ? 0 : 1, delta ? 2 : 1};
        if (channel)
            read_channel_gates(*this, s.b, row, h);
        else if (gated)
            read_scalar_gates(s.b, row, h, readers);
    }

    // The chunk that `read` will be asked for next: none if t is outside the sequence.
    template <typename E>
    void expect(const LinearTask& own, int64_t t, bool with_q) {
        const Sequence& s = p.sequences[own.sequence];
        const int64_t left = s.t.size() - t;
        ahead = Ahead{};
        if (t < 0 || left <= 0) return;
        const int64_t row = s.t.begin + t, hk = own.h / (p.H / p.Hk);
        if (with_q) ahead.add<E>(p.q, s.b, row, hk, 0, K, false);
        ahead.add<E>(p.k, s.b, row, hk, 0, K, false);
        ahead.add<E>(p.v, s.b, row, own.h, own.column, own.columns, false);
        ahead.end = left < C ? left : C;
    }

    void read_scalar_gates(int64_t b, int64_t t, int64_t h, Readers readers) {
        const F* from =
            static_cast<const F*>(p.decay) + (p.decays == Decay::constant ? h : (b * p.T + t) * p.H + h);
        const int64_t step = p.decays == Decay::constant ? 0 : p.H;
        for (int64_t i = 0; i < m; ++i) gate[i] = i < n ? from[i * step] * kLog2e<F> : F(0);
        F* sum = sums;  // over the tokens after j and up to i, lanes j
        fill_zero(sum, m);
        F prefix = 0;
        for (int64_t i = 0; i < m; ++i) {
            prefix += gate[i];
            into[i] = prefix;
            const int64_t end = (i / kSub + 1) * kSub;
            for (int64_t j = 0; j < end; j += L) {
                const Vec<F> lane = lane_numbers<F>(j);
                const Vec<F> y = select<F>(lane < F(i), loadu<F>(sum + j) + gate[i], Vec<F>{});
                storeu<F>(sum + j, y);
                storeu<F>(between + i * C + j, select<F>(lane <= F(i), exp2_nonpositive<F>(y), Vec<F>{}));
            }
        }
        for (int64_t i = 0; i < m; i += L) {
            storeu<F>(into + i, exp2_nonpositive<F>(loadu<F>(into + i)));
            storeu<F>(out + i, loadu<F>(between + (m - 1) * C + i));
        }
        for (int64_t d = 0; d < Kp; d += L) storeu<F>(total + d, splat<F>(into[m - 1]));
        for (int half = readers.first; half < readers.last; ++half)
            for (int64_t i = 0; i < m; ++i) scaled(xr, x, half * m + i, into[i]);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t d = 0; d < Kp; d += L)
                storeu<F>(kw + i * Kp + d, loadu<F>(k() + i * Kp + d) * out[i]);
    }

    void scaled(F* to, const F* from, int64_t row, F factor) {
        for (int64_t d = 0; d < Kp; d += L)
            storeu<F>(to + row * Kp + d, loadu<F>(from + row * Kp + d) * factor);
    }

    // M, and for decays per channel also xr and kw.
    void mix(Readers readers) {
        if (channel) return mix_channels<false>(*this, readers, static_cast<ChannelGradient<F>*>(nullptr));
        if (readers.first == readers.last) return;
        pack_transposed<Fma<F>>(k(), Kp, m, Kp, packed, C);
        for (int half = readers.first; half < readers.last; ++half) {
            F* to = M + half * m * C;
            for (int64_t i = 0; i < m; i += kSub) {
                gemm<Fma<F>, false>(kSub, (i + kSub) / L, Kp, x + (half * m + i) * Kp, Kp, 1, packed, C,
                                    to + i * C, C);
                for (int64_t r = i; r < i + kSub; ++r) finish(to + r * C, r, i + kSub, half);
                ahead.fetch(6);
            }
        }
    }

    // Row r of M: decayed, zero beyond the diagonal; of k: negative, and zero on it.
    SLM_INLINE void finish(F* row, int64_t r, int64_t end, int half) {
        for (int64_t j = scalar || half ? 0 : end - kSub; j < end; j += L) {
            Vec<F> y = loadu<F>(row + j);
            if (scalar) y *= loadu<F>(between + r * C + j);  // zero where masked, but not times inf or NaN
            if (half) y = -y;
            const Vec<F> lane = lane_numbers<F>(j);
            storeu<F>(row + j, select<F>(lane < F(half ? r : r + 1), y, Vec<F>{}));
        }
    }

    // w and u of the delta rule, given what k reads from the state in `read`, [m][Vp].
    void solve_delta(const F* read) {
        for (int64_t i = 0; i < m * Vp; i += L) storeu<F>(w + i, loadu<F>(w + i) - loadu<F>(read + i));
        solve<F>(m, Vp / L, M + m * C, C, 1, beta, 1, w, u, Vp);
    }

    // state <- e^{G_C} state + (k e^{G_C - G})^T u, and the normaliser likewise.
    void write(F* state, F* z) {
        if (gated) scale_rows(state, total, 1, K, Vp);
        for (int64_t d = 0; d < K; d += 24) {
            gemm<Fma<F>, true>(K - d < 24 ? K - d : 24, Vp / L, m, writers() + d, 1, Kp, u, Vp,
                               state + d * Vp, Vp);
            ahead.fetch(6);
        }
        if (z) write_normalizer(z);
    }

    void write_normalizer(F* z) {
        if (gated) multiply(z, z, total, Kp);
        for (int64_t i = 0; i < m; ++i) add(z, writers() + i * Kp, Kp);
    }
};

// What a row of queries divides by: z . q + 1e-6, the tokens of its own chunk included.
template <typename F>
SLM_INLINE F denominator(const Chunk<F>& chunk, const F* z, int64_t i) {
    Vec<F> sum{};
    for (int64_t j = 0; j < i + 1; j += kLanes<F>) sum += loadu<F>(chunk.M + i * chunk.C + j);
    return reduce_add<F>(sum) + dot(chunk.xr + i * chunk.Kp, z, chunk.Kp) + F(1e-6);
}

#include "channels.inl"
//
#include "forward.inl"
//
#include "backward.inl"
//
#include "step.inl"

void forward(const LinearProblem& p, int64_t begin, int64_t end) {
    SLM_DISPATCH_STORAGE(forward_tasks, p.dtype, p, begin, end);
}

void backward(const slm::LinearGradient& g, int64_t begin, int64_t end) {
    SLM_DISPATCH_STORAGE(backward_tasks, g.problem.dtype, g, begin, end);
}

void step(const slm::LinearStep& s, int64_t begin, int64_t end) {
    SLM_DISPATCH_STORAGE(step_tasks, s.dtype, s, begin, end);
}

void sum_parts(slm::Dtype dtype, const void* from, void* to, int64_t parts, int64_t n, int64_t begin,
               int64_t end) {
    SLM_DISPATCH_STORAGE(sum_part_rows, dtype, from, to, parts, n, begin, end);
}

}  // namespace

namespace slm {
#define SLM_JOIN(a, b) a##b
#define SLM_NAME(a, b) SLM_JOIN(a, b)
const LinearKernels SLM_NAME(linear_, SLM_TIER) = {forward, backward, step, sum_parts};
}  // namespace slm
