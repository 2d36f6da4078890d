// What the operators of expert_mlp hand to the kernels of a CPU tier.
#pragma once

#include <cstdint>

#include "../common/rows.h"

namespace slm::experts {

constexpr int64_t kChunk = 128;  // rows of a task, at most; the pre-activation is laid out by it

// One matrix an expert. `row` or `column` is 1; strides in elements.
struct Matrix {
    const void* data;
    int64_t expert, row, column;
};

// Rows [first, first + size) of the sorted order, all of one expert. `padded`: the first one where rows of
// every chunk are padded to whole registers.
struct Chunk {
    int64_t expert, first, size, padded;
};

// Sorted rows stand expert after expert, and inside an expert in the order of their tokens.
struct Problem {
    Dtype dtype;
    bool dot;  // AVX512-BF16 dot products; d and n are even
    int activation;
    bool gated, interleaved;
    int64_t T, d, n, H;  // H = 2n if gated, else n
    const void* x;       // [T, d]
    int64_t x_row;
    Matrix up, down;
    const void *b_up, *b_down;  // [E, H], [E, d], or null
    const void* weights;        // of each sorted row, float (f64: double), or null: 1
    const int64_t *token, *to;  // of each sorted row: its token, and the row of y it writes
    const Chunk* chunks;
    int64_t num_chunks;
    void* h;  // of each chunk [H][size], in the storage type, or null
    bool parts;  // y are rows of T k to be added up, of float16 in float
    void* y;     // rows of d elements
};

struct Gradient {
    Problem problem;  // y is dx
    bool need_x;
    const void* dy;  // [T, d]
    int64_t dy_row;
    void* dweights;  // [T, k], float
    void *dh,
        *a;  // or null; transposed: of each chunk [H][padded size] and w a [n][padded size], storage type
    // Of the weights: rows of one expert are chunks [of_expert[e], of_expert[e + 1]).
    const int64_t* of_expert;
    int64_t experts;
    void *dup, *ddown, *db_up, *db_down;  // contiguous; the biases' may be null
};

// Sums of rows: y_t = sum of parts [t k, t k + k).
struct Sum {
    Dtype dtype;
    const void* parts;
    void* y;
    int64_t k, d;
};

// Tasks [next, end), handed out one by one to the threads.
struct Queue {
    int64_t next, end;
    int64_t take() { return __atomic_fetch_add(&next, int64_t(1), __ATOMIC_RELAXED); }
};

struct Kernels {
    int lanes_f32, lanes_f64, vectors;
    void (*forward)(const Problem&, Queue&);
    void (*backward)(const Gradient&, Queue&);  // of rows: dx, dweights, dh, a
    // Of matrices: tasks are (matrix, expert, panel of `vectors` registers of columns).
    void (*matrices)(const Gradient&, Queue&);
    void (*sum)(const Sum&, int64_t begin, int64_t end);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;

}  // namespace slm::experts
