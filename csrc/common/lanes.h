// Attention with queries across the lanes, for every operation whose scores are softmax scores.
//
// A block is kBlock = 4 registers of queries (64 in AVX-512 float32), and scores are kept transposed,
// S^T [keys][queries]. That has three rewards:
//   - K and V are read as they lie in memory, element by element, as the broadcast operand of the tile
//     kernel (tile.h); only the query block is transposed, once per block, in registers;
//   - the softmax runs down the lanes: no horizontal maximum or sum anywhere;
//   - at the window's edges whole registers of queries drop out of the matrix products (runs, band.h),
//     so the triangles cost little more than their area instead of a full square tile.
//
// Storage type E, arithmetic type F (float, or double for double), and a policy P for the matrix
// products: Fma<F>, or Dot for bfloat16 where the CPU has dot products of pairs.
#pragma once

#include "band.h"
#include "pack.h"
#include "scratch.h"

namespace {

using slm::Band;
using slm::Range;
using slm::Run;

// Scores go through the softmax as they come out of the product, times c at the end: a row's largest
// score then has probability exp2(0), exactly 1. Where that would turn -inf around (scale <= 0) or lose
// the sink (scale near 0), or more than a factor is needed (softcap), the first pass rewrites them and c
// is 1.
inline bool rewrites(double scale, double softcap) { return softcap > 0 || !(scale > 1e-6); }

// Transposes x^T [D][kBlock] back into `rows` rows `stride` apart, as pack.h says.
template <typename P, bool Add, typename E>
SLM_INLINE void unpack_transposed(const typename P::Acc* x, const typename P::Acc* factor, int64_t rows,
                                  int64_t D, E* out, int64_t stride) {
    using F = typename P::Acc;
    unpack_transposed<P, Add>(x, kBlock<F>, factor, rows, D, [=](int64_t i) { return out + i * stride; });
}

// Product of two rows.
template <typename F, typename E>
SLM_INLINE F row_dot(const E* a, const E* b, int64_t n) {
    constexpr int L = kLanes<F>;
    Vec<F> along{};
    int64_t e = 0;
    for (; e + L <= n; e += L) along += load<F>(a + e) * load<F>(b + e);
    F sum = reduce_add<F>(along);
    for (; e < n; ++e) sum += widen<F>(a[e]) * widen<F>(b[e]);
    return sum;
}

// Asks for rows that a later block reads: the rows of one head lie H * D apart, which the hardware's own
// prefetchers do not follow. Issued a few at a time between products.
template <typename E>
SLM_INLINE void prefetch_rows(const E* x, int64_t stride, int64_t rows, int64_t D) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < D; d += int64_t(64 / sizeof(E))) __builtin_prefetch(x + i * stride + d, 0, 2);
}

// Lanes of vector v whose queries see key j, for a block that stands at i0.
template <typename F>
SLM_INLINE Mask<F> visible_lanes(const Band& band, int64_t i0, int64_t j, int64_t v) {
    constexpr int L = kLanes<F>, W = kBlock<F>;
    const Range seen = band.queries({j, j + 1}, {i0, i0 + W});
    Mask<F> lane;
    for (int l = 0; l < L; ++l) lane[l] = Int<F>(l);
    lane += Int<F>(v * L);
    return (lane >= Int<F>(seen.begin - i0)) & (lane < Int<F>(seen.end - i0));
}

// K or V rows as the A operand of Fma: in place where the storage is F already, else widened.
template <typename F, typename E>
SLM_INLINE const F* widened(const E* x, int64_t& stride, int64_t rows, int64_t D, F* buffer) {
    if constexpr (std::is_same_v<E, F>) {
        return x;
    } else {
        const int64_t width = round_up(D, kLanes<F>);
        for (int64_t j = 0; j < rows; ++j) widen_row<F>(x + j * stride, buffer + j * width, D);
        stride = width;
        return buffer;
    }
}

}  // namespace
