// What the operators hand to the kernels of a CPU tier.
#pragma once

#include <cstdint>

#include "../common/band.h"
#include "../common/rows.h"

namespace slm {

// One sequence: rows t of batch entry b for queries and for keys, whose last rows stand at one position.
struct HybridSequence {
    int64_t b;
    Range q, k;
    int64_t offset() const { return k.size() - q.size(); }  // query row t stands at t + offset
};

// mix and states are float, or (f64) double, and contiguous. A state is kept as [V + 1][F]: its last row is
// the normaliser.
struct HybridProblem {
    Dtype dtype;
    bool bf16_dot;  // use AVX512-BF16 dot products for the near keys
    int64_t T, S, Hq, H, D, V, F;
    Rows q, k, v, phi_q, phi_k, o;
    const void* mix;  // [Hq], or null for ones
    const void *state0, *z0;  // [N, H, F, V], [N, H, F], or null for zeros
    void *state, *z;  // of the far keys of the last query
    void *shift, *denominator;  // [B, Hq, T]; shift in SoftmaxBlock's units
    int32_t* top;  // [B, Hq, T], rows of k
    void* kept;  // [B, S / segment, H, V + 1, F]: states between segments
    int64_t segment;  // tokens; 0: nothing is kept
    const HybridSequence* sequences;
    int64_t num_sequences;
    Band band;  // of the near keys
    int64_t unit;  // tokens that no block of queries crosses a multiple of, where blocks are whole windows
    int64_t parts;  // tasks that share the query heads of a KV head
    double scale;

    int64_t tasks() const { return num_sequences * H * parts; }
    // The state before token t > 0 of a sequence, a multiple of `segment`. (The segments of the sequences
    // before it in the same row, whole or not, never take more places than this leaves them.)
    int64_t place(const HybridSequence& s, int64_t t, int64_t h) const {
        const int64_t row = s.b * (S / segment) + s.k.begin / segment + t / segment - 1;
        return (row * H + h) * (V + 1) * F;
    }
};

// Gradients of keys sum over the query heads of a group. Where `parts` > 1 they are partial sums, float (f64:
// double), [B, S, H, parts, ...]; else the results themselves.
struct HybridGradient {
    HybridProblem problem;
    Rows dout, dq, dphi_q;
    const void *dstate, *dz;  // of the returned state, or null
    void *dk, *dv, *dphi_k;  // contiguous
    double* dmix;  // [N, Hq]
    void *dstate0, *dz0;  // [N, H, parts, F, V], [N, H, parts, F], or null
};

struct HybridStep {
    Dtype dtype;
    int64_t B, n, Hq, H, D, V, F, W, R;  // R slots a ring
    bool block;
    Rows q, k, v, phi_q, phi_k, o;
    void *k_ring, *v_ring, *phi_ring;  // [B, H, R, D], [B, H, R, V], [B, H, R, F]
    void *state, *z;  // [B, H, F, V], [B, H, F]
    int64_t* position;  // [B, H]
    const void* mix;  // [Hq] or null
    double scale;
};

// The kernels of one tier; each works on tasks [begin, end).
struct HybridKernels {
    void (*forward)(const HybridProblem&, int64_t begin, int64_t end);
    void (*backward)(const HybridGradient&, int64_t begin, int64_t end);
    void (*step)(const HybridStep&, int64_t begin, int64_t end);
    // to[row][n] = sum over parts of from[row][part][n], for rows [begin, end); `to` has `dtype`, `from` the
    // dtype in which it is computed.
    void (*sum_parts)(Dtype dtype, const void* from, void* to, int64_t parts, int64_t n, int64_t begin,
                      int64_t end);
};

extern const HybridKernels hybrid_portable, hybrid_avx2, hybrid_avx512;

}  // namespace slm
