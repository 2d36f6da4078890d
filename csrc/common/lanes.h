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

template <typename F>
constexpr int kBlock = kTileVectors * kLanes<F>;

// Scores go through the softmax as they come out of the product, times c at the end: a row's largest
// score then has probability exp2(0), exactly 1. Where that would turn -inf around (scale <= 0) or lose
// the sink (scale near 0), or more than a factor is needed (softcap), the first pass rewrites them and c
// is 1.
inline bool rewrites(double scale, double softcap) { return softcap > 0 || !(scale > 1e-6); }

// Rows [rows][D] as the B operand of P with the rows as k: out[rows / kPair][width]. Missing rows of
// the last block of lanes are zeros.
template <typename P, typename E>
SLM_INLINE void pack_rows(const E* x, int64_t stride, int64_t rows, int64_t D, int64_t width,
                          typename P::B* out) {
    using F = typename P::Acc;
    if constexpr (kPair<P> == 1) {
        for (int64_t i = 0; i < rows; ++i) widen_row<F>(x + i * stride, out + i * width, D);
    } else {
        constexpr int L = kLanes<F>;
        for (int64_t i = 0; i < rows; i += 2) {
            const E *even = x + i * stride, *odd = even + stride;
            const bool paired = i + 1 < rows;
            uint32_t* to = out + i / 2 * width;
            int64_t d = 0;
            for (; d + L <= D; d += L) {
                const Vec<uint32_t> low = load_words(even + d);
                storeu<uint32_t>(to + d, paired ? low | load_words(odd + d) << 16 : low);
            }
            for (; d < D; ++d) to[d] = even[d].bits | (paired ? uint32_t(odd[d].bits) << 16 : 0u);
            for (; d < width; ++d) to[d] = 0;
        }
    }
}

// Transposes x^T [D][kBlock] back into `rows` rows, each lane times factor[lane] if given; adds to what
// is there if Add.
template <typename P, bool Add, typename E>
SLM_INLINE void unpack_transposed(const typename P::Acc* x, const typename P::Acc* factor, int64_t rows,
                                  int64_t D, E* out, int64_t stride) {
    using F = typename P::Acc;
    constexpr int L = kLanes<F>, W = kBlock<F>;
    for (int64_t v = 0; v * L < rows; ++v)
        for (int64_t d = 0; d < D; d += L) {
            Vec<F> square[L];
            const Vec<F> times = factor ? loadu<F>(factor + v * L) : splat<F>(F(1));
            for (int l = 0; l < L; ++l)
                square[l] = d + l < D ? loadu<F>(x + (d + l) * W + v * L) * times : Vec<F>{};
            transpose<F>(square);
            for (int l = 0; l < L && v * L + l < rows; ++l) {
                E* to = out + (v * L + l) * stride + d;
                if (d + L <= D) {
                    if constexpr (Add) square[l] += load<F>(to);
                    P::store(to, square[l]);
                } else {
                    for (int64_t e = 0; e < D - d; ++e)
                        narrow(square[l][e] + (Add ? widen<F>(to[e]) : F(0)), to + e);
                }
            }
        }
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

#if SLM_BYTES == 64
// Two rows of float lanes as bfloat16 pairs side by side: lane l holds (even[l], odd[l]).
SLM_INLINE Vec<uint32_t> pair_lanes(Vec<float> even, Vec<float> odd) {
    typedef uint16_t Words __attribute__((vector_size(64)));
    Words order;
    for (int l = 0; l < 16; ++l) order[2 * l] = uint16_t(l), order[2 * l + 1] = uint16_t(l + 16);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return (Vec<uint32_t>)_mm512_permutexvar_epi16((__m512i)order, both);
}
#endif

}  // namespace
