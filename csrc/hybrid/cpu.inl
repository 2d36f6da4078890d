// Hybrid attention on the CPU: what both directions share, and the table of one tier's kernels.
//
// A task is one KV head of one sequence. It walks over blocks of query lanes (common/lanes.h) with the state
// of the far keys in cache, and each query head of the group meets in turn
//   - the near keys, as in sliding-window attention (common/softmax.h, common/softmax_gradient.h);
//   - the mixed keys, far to some queries of the block and near to others: a triangle of phi_q . phi_k;
//   - the state: keys that are far to all of them.
// Then the keys that are far to the next block enter the state. Nothing decays, so the state is a sum, and it
// is kept as the products want it, [V + 1][F]: values get a column of ones, and the normaliser is one more
// row. All of the far part is computed in F; the near part in pairs of bfloat16 where the CPU has them.
//
// Blocks never cross a multiple of the window in block alignment, so that there a block has no mixed keys
// unless the window is shorter than a block, and then fewer than a block.

#include "../common/ahead.h"
#include "../common/decode.h"
#include "../common/softmax.h"
#include "../common/softmax_gradient.h"
#include "../common/vectors.h"
#include "hybrid.h"

namespace {

using slm::HybridProblem;
using slm::HybridSequence;
using slm::Rows;

constexpr int64_t kFar = 64;  // keys that enter the state at a time; at least the mixed keys of a block

// Which sequence, KV head and query heads a task has.
struct HybridTask {
    int64_t sequence, h, part;
    Range heads;

    HybridTask(const HybridProblem& p, int64_t task) {
        sequence = task / (p.H * p.parts), h = task / p.parts % p.H, part = task % p.parts;
        const int64_t heads_here = p.Hq / p.H / p.parts, first = h * (p.Hq / p.H) + part * heads_here;
        heads = {first, first + heads_here};
    }
};

// The blocks of queries of one sequence, and the keys that go with them.
struct Blocks {
    const Band& band;
    int64_t step, unit, offset, S;

    Blocks(const HybridProblem& p, const HybridSequence& s, int64_t lanes)
        : band(p.band), offset(s.offset()), S(s.k.size()) {
        const int64_t W = band.block;
        step = W > 0 && W < lanes ? lanes / W * W : lanes;
        unit = W >= lanes ? W : p.unit;
    }

    // The block that position i is in; empty past the last.
    Range at(int64_t i) const {
        if (i >= S) return {S, S};
        const int64_t start = i / unit * unit, begin = start + (i - start) / step * step;
        const int64_t end = begin + step < start + unit ? begin + step : start + unit;
        return Band::clip({begin, end}, {offset, S});
    }

    int64_t first_near(int64_t i) const {
        const int64_t j = band.first(i);
        return j > 0 ? j : 0;
    }
    // Far to some query of the block, near to another.
    Range mixed(Range block) const { return {first_near(block.begin), first_near(block.end - 1)}; }
    // Keys that enter the state after the block; the last query's far keys are what is left at the end.
    Range entering(Range block) const {
        return {first_near(block.begin), first_near(block.end < S ? block.end : S - 1)};
    }
};

// Features of up to kFar keys, and their values with a column of ones.
template <typename F>
struct FarKeys {
    static constexpr int L = kLanes<F>, W = kBlock<F>;
    const HybridProblem& p;
    const int64_t V, Fp, Vx;  // Vx: values and the one, in whole registers
    F* phi;  // [kFar][Fp]
    F* v;  // [kFar][Vx]
    Range j{0, 0};

    static int64_t bytes(const HybridProblem& p) {
        return int64_t(sizeof(F)) * kFar * (round_up(p.F, L) + round_up(p.V + 1, L)) + 128;
    }

    FarKeys(const HybridProblem& problem, Arena& arena)
        : p(problem), V(p.V), Fp(round_up(p.F, L)), Vx(round_up(p.V + 1, L)) {
        phi = arena.take<F>(kFar * Fp);
        v = arena.take<F>(kFar * Vx);
    }

    template <typename E>
    void load(const HybridSequence& s, int64_t h, Range keys) {
        j = keys;
        for (int64_t n = 0; n < keys.size(); ++n) {
            const int64_t row = s.k.begin + keys.begin + n;
            widen_row<F>(p.phi_k.at<const E>(s.b, row, h), phi + n * Fp, p.F);
            widen_row<F>(p.v.at<const E>(s.b, row, h), v + n * Vx, V);
            v[n * Vx + V] = F(1);
        }
    }

    // state [V + 1][Fp] <- state + v^T phi
    void enter(F* state) const { gemm<Fma<F>, true>(V + 1, Fp / L, j.size(), v, 1, Vx, phi, Fp, state, Fp); }

    // All of a range, loaded a piece after another.
    template <typename E>
    void enter_all(const HybridSequence& s, int64_t h, Range keys, F* state) {
        for (int64_t at = keys.begin; at < keys.end; at += kFar) {
            load<E>(s, h, Band::clip({at, at + kFar}, keys));
            enter(state);
        }
    }

    // Calls body(n, count, first): keys n .. n + count of the loaded ones are far from vector `first` on, of
    // a block of queries that begins at i0; the first vector's lanes need a mask.
    template <typename Body>
    SLM_INLINE void triangle(const Band& band, Range mixed, int64_t i0, int64_t vectors,
                             const Body& body) const {
        const int64_t m = mixed.end - j.begin;
        for (int64_t n = mixed.begin - j.begin; n < m;) {
            const int64_t first = (band.last(j.begin + n) + 1 - i0) / L, start = n;
            while (n < m && (band.last(j.begin + n) + 1 - i0) / L == first) ++n;
            if (first < vectors) body(start, n - start, first);
        }
    }

    // Zero for the lanes of vector `first` to which key n is near.
    SLM_INLINE void mask(const Band& band, int64_t n, int64_t i0, int64_t first, F* row) const {
        const F near = F(band.last(j.begin + n) + 1 - i0);
        F* x = row + first * L;
        storeu<F>(x, select<F>(lane_numbers<F>(first * L) < near, Vec<F>{}, loadu<F>(x)));
    }
};

// The state [V + 1][Fp] of a task from the tensors [F][V] and [F], or zeros; and back.
template <typename F>
void load_far_state(const F* state, const F* z, const HybridProblem& p, F* to) {
    const int64_t Fp = round_up(p.F, kLanes<F>);
    load_transposed(state, p.F, p.V, p.V, to);
    load_state<F>(z, 1, p.F, p.F, to + p.V * Fp);
}

template <typename F>
void store_far_state(const F* from, const HybridProblem& p, F* state, F* z) {
    store_transposed(from, p.F, p.V, p.V, state);
    narrow_row<F>(from + p.V * round_up(p.F, kLanes<F>), z, p.F);
}

#include "forward.inl"
//
#include "backward.inl"
//
#include "step.inl"

void forward(const HybridProblem& p, int64_t begin, int64_t end) {
    SLM_DISPATCH(forward_tasks, p.dtype, p.bf16_dot, p, begin, end);
}

void backward(const slm::HybridGradient& g, int64_t begin, int64_t end) {
    SLM_DISPATCH(backward_tasks, g.problem.dtype, g.problem.bf16_dot, g, begin, end);
}

void step(const slm::HybridStep& s, int64_t begin, int64_t end) {
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
const HybridKernels SLM_NAME(hybrid_, SLM_TIER) = {forward, backward, step, sum_parts};
}  // namespace slm
