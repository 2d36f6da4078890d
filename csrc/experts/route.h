// What the operators of `route` hand to their kernels.
#pragma once

#include <cstdint>

#include "../common/rows.h"

namespace slm::route {

constexpr int64_t kBlock = 256;  // tokens of a task; the sums over tokens are one for each block

enum class Score : int { softmax, sigmoid, softmax_after_topk };  // as in reference.SCORES

// T tokens, E experts, k of them for a token. F is the arithmetic type: float, or double for float64.
struct Problem {
    Dtype dtype;
    Score score;
    bool renormalize;
    int64_t T, E, k;
    double scale;
    const void* logits;   // [T, E]
    int64_t logits_row;   // elements from token to token
    const uint8_t* mask;  // [T, E], 0 forbids; or null
    int64_t mask_row;     // 0 where one row is for all tokens

    int64_t blocks() const { return (T + kBlock - 1) / kBlock; }
    // Are the weights a softmax over the chosen experts?
    constexpr bool among_chosen() const {
        return score != Score::sigmoid && (renormalize || score != Score::softmax);
    }
};

struct Choice {
    Problem problem;
    int64_t groups, top_groups;
    const void* bias;  // F [E], or null
    int32_t* indices;  // [T, k]
    void* weights;     // F [T, k]
    void* lse;         // F [T]
    int32_t* counts;   // of each block [E]
    void* sums;        // of each block F [E + 2]: probabilities, lse^2, entropy
};

struct Gradient {
    Problem problem;
    const int32_t* indices;  // [T, k]
    const void* lse;         // F [T]
    const void* dweights;    // F [T, k], any strides; or null
    int64_t dweights_row, dweights_column;
    const void* dmean;  // F [E], d(probabilities) / T, zeros where absent
    bool dense;         // is any of the gradients of probabilities and z there?
    double dz;          // 2 d(z) / T
    void* dlogits;      // [T, E]
};

// The kernels of one tier; they work on blocks [begin, end) of tokens.
struct Kernels {
    void (*forward)(const Choice&, int64_t begin, int64_t end);
    void (*backward)(const Gradient&, int64_t begin, int64_t end);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;

}  // namespace slm::route
