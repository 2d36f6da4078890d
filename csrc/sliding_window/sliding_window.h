// What the operators hand to the kernels of a CPU tier.
#pragma once

#include <cstdint>

#include "../common/band.h"
#include "../common/rows.h"

namespace slm {

// One sequence: rows of batch entry b.
struct Span {
    int64_t b;
    Range q, k;  // rows t and s
    int64_t offset() const { return k.size() - q.size(); }  // query row t stands at t + offset
};

struct Problem {
    Dtype dtype;
    bool bf16_dot;  // use AVX512-BF16 dot products
    int64_t T, Hq, H, D, Dv;
    Rows q, k, v, o;
    void* lse;          // [B, Hq, T], float or (f64) double
    const void* sinks;  // [Hq], same type as lse, or null
    const Span* spans;
    const int64_t* first;  // [num_spans + 1], tasks before each span
    int64_t num_spans;
    Range heads;  // KV heads of this call
    Band band;
    double scale, softcap;  // softcap 0: none
};

// Backward: dk and dv of a chunk of keys against dq of two neighbouring chunks of queries, those
// `distance` and `distance + 1` chunks further on. Tasks of one parity touch neither the same queries nor
// the same keys, so they add into dq, dk, dv without conflict; parities and distances follow one another.
// Sums have a fixed order. A window that reaches no further than a chunk takes one distance: then a task
// has all of its keys' gradient and stores it (`whole`), in the tensors' own dtype.
struct Gradient {
    Problem problem;
    Rows dout, dq, dk, dv;  // dq, and unless `whole` dk and dv, accumulate: float (f64: double)
    const void* dlse;       // [B, Hq, T] like lse, or null
    int64_t chunk;          // positions per chunk
    int64_t distance, parity;
    bool whole;

    // Key chunks of a span, and how many of them have this parity.
    int64_t tasks(const Span& span) const { return ((span.k.size() + chunk - 1) / chunk + 1 - parity) / 2; }
};

struct Step {
    Dtype dtype;
    int64_t B, n, Hq, H, D, Dv, W;
    Rows q, o;
    const void *k_ring, *v_ring;  // [B, H, W, D], [B, H, W, Dv]
    const int64_t* position;      // [B, H], after this token
    const void* sinks;
    int64_t token;  // which of the n new ones
    double scale, softcap;
};

// The kernels of one tier; each works on tasks [begin, end) of its problem.
struct SlidingWindowKernels {
    int lanes_f32, lanes_f64;  // queries per block
    void (*forward)(const Problem&, int64_t begin, int64_t end);
    void (*backward)(const Gradient&, int64_t begin, int64_t end);
    void (*sink_gradient)(const Gradient&, void* dsinks, int64_t begin, int64_t end);
    void (*step)(const Step&, int64_t begin, int64_t end);
};

extern const SlidingWindowKernels sliding_window_portable, sliding_window_avx2, sliding_window_avx512;

}  // namespace slm
