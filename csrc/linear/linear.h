// What the operators hand to the kernels of a CPU tier.
#pragma once

#include <cstdint>

#include "../common/band.h"
#include "../common/rows.h"

namespace slm {

// Log gates: none, one a head [H], one a token and head [B, T, H], one a channel besides [B, T, H, K].
enum class Decay : int { none, constant, scalar, channel };

// One sequence: rows t of batch entry b.
struct Sequence {
    int64_t b;
    Range t;
};

// Gates and states are float, or (f64) double, and contiguous.
struct LinearProblem {
    Dtype dtype;
    int64_t T, Hk, H, K, V;
    Rows q, k, v, o;
    Decay decays;
    const void *decay, *beta;             // beta [B, T, H], or null
    const void *state0, *z0;              // [N, H, K, V], [N, H, K], or null for zeros
    void *state, *z;                      // what is left at the end
    void* kept;  // [B, T / segment, H, K * V (+ K)]: state (and z) between segments
    int64_t segment;  // tokens, a multiple of `chunk`; 0: nothing is kept
    int64_t chunk;  // tokens whose products stand in one [chunk, chunk] matrix
    int64_t columns;  // value columns of one task
    const Sequence* sequences;
    int64_t num_sequences;
    double scale;
    bool normalize, l2norm;

    int64_t parts() const { return (V + columns - 1) / columns; }
    int64_t tasks() const { return num_sequences * H * parts(); }
    // The state before token t > 0 of a sequence, a multiple of `segment`. (The segments of the sequences
    // before it in the same row, whole or not, never take more places than this leaves them.)
    int64_t place(const Sequence& s, int64_t t, int64_t h) const {
        const int64_t row = s.b * (T / segment) + s.t.begin / segment + t / segment - 1;
        return (row * H + h) * (K * V + (normalize ? K : 0));
    }
};

// Sums over heads of a group and over `parts` go through `sums`: dq and dk [B, T, Hk, group * parts, K], the
// gates' gradients [B, T, H, parts(, K)]. Where there is one summand they are the results themselves.
struct LinearGradient {
    LinearProblem problem;
    Rows dout, dv;
    const void *dstate, *dz;  // of the final state and z, or null
    void *dq, *dk;  // in the tensors' dtype if there is one summand, else float (f64: double)
    bool summed;  // more than one
    void *ddecay, *dbeta;  // ddecay of constant decays: double [N, H, parts]
    void *dstate0, *dz0;  // dz0 [N, H, parts, K]
};

struct LinearStep {
    Dtype dtype;
    int64_t B, n, Hk, H, K, V;
    Rows q, k, v, o;
    Decay decays;
    const void *decay, *beta;
    void *state, *z;  // [B, H, K, V], [B, H, K] or null
    double scale;
    bool l2norm;
};

// The kernels of one tier; each works on tasks [begin, end).
struct LinearKernels {
    void (*forward)(const LinearProblem&, int64_t begin, int64_t end);
    void (*backward)(const LinearGradient&, int64_t begin, int64_t end);
    void (*step)(const LinearStep&, int64_t begin, int64_t end);
    // to[row][n] = sum over parts of from[row][part][n], for rows [begin, end); `to` has `dtype`, `from` the
    // dtype in which it is computed.
    void (*sum_parts)(Dtype dtype, const void* from, void* to, int64_t parts, int64_t n, int64_t begin,
                      int64_t end);
};

extern const LinearKernels linear_portable, linear_avx2, linear_avx512;

}  // namespace slm
