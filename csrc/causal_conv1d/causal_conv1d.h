// What the operators hand to the kernels of a CPU tier.
#pragma once

#include <cstdint>

#include "../common/rows.h"

namespace slm::conv {

constexpr int64_t kWidest = 8;  // taps; one instance of the kernels for each width

// One sequence: tokens [begin, end) of batch entry b. `row` counts the tokens of all sequences before it.
struct Span {
    int64_t b, begin, end, row;
    int64_t size() const { return end - begin; }
};

// Tensors [B, T, C] as Rows, whose last stride, over channels, is 1. A Rows without data is absent.
struct Problem {
    Dtype dtype;
    bool bf16_dot;  // the CPU converts to bfloat16 in one instruction
    bool silu;
    int64_t C, W;
    Rows x, y;
    Rows initial;      // [N, W-1, C]
    const void* taps;  // as `pack` writes them: for each register of channels W taps and the bias
    const Span* spans;
    int64_t num_spans, rows;  // rows = tokens of all spans
    int64_t block, chunk;     // a task is `block` rows by `chunk` channels
    int64_t chunks() const { return (C + chunk - 1) / chunk; }
    int64_t tasks() const { return (rows + block - 1) / block * chunks(); }
};

struct Gradient {
    Problem problem;
    Rows dy, dstate, dx, dinitial;  // dstate and dinitial [N, W-1, C]
    void* sums;  // d(taps), as `pack` writes taps, of each block of rows: float (f64: double)
};

// Weight [C, W] and bias [C], in the tensors' dtype or in the arithmetic type (`wide`).
struct Parameters {
    void *weight, *bias;
    bool weight_wide, bias_wide;
};

// The kernels of one tier; forward and backward work on tasks [begin, end) of their problem.
struct Kernels {
    int lanes_f32, lanes_f64;
    void (*pack)(const Problem&, const Parameters&, void* taps);
    void (*forward)(const Problem&, int64_t begin, int64_t end);
    void (*backward)(const Gradient&, int64_t begin, int64_t end);
    // Sums over all blocks in their order -> d(weight), d(bias), for registers of channels [begin, end).
    void (*reduce)(const Gradient&, const Parameters&, int64_t begin, int64_t end);
    void (*step)(const Problem&, int64_t begin,
                 int64_t end);  // batch entries; `initial` is the state, only read
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;

}  // namespace slm::conv
