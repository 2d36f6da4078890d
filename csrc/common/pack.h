// Operands of the tile kernel (tile.h) in the layout that it reads.
#pragma once

#include "tile.h"

namespace {

template <typename P>
constexpr int kPair = std::is_same_v<typename P::B, uint32_t> ? 2 : 1;  // values of k in one step of P

// X^T of `rows` rows, row(i) of D elements each, as the B operand of P: out[D / kPair][width]; columns from
// `rows` to the end of their register are zeros.
template <typename P, typename Row>
SLM_INLINE void pack_transposed(Row&& row_of, int64_t rows, int64_t D, typename P::B* out, int64_t width) {
    using F = typename P::Acc;
    using B = typename P::B;
    constexpr int L = kLanes<F>;
    const int64_t n = D / kPair<P>;
    for (int64_t v = 0; v * L < rows; ++v)
        for (int64_t d = 0; d < n; d += L) {
            Vec<B> square[L];
            for (int l = 0; l < L; ++l) {
                if (v * L + l >= rows) {
                    square[l] = Vec<B>{};
                    continue;
                }
                const auto* row = row_of(v * L + l) + d * kPair<P>;
                if (d + L <= n) {
                    if constexpr (kPair<P> == 2)
                        square[l] = loadu<uint32_t>(reinterpret_cast<const uint32_t*>(row));
                    else
                        square[l] = load<F>(row);
                } else {
                    B tail[L] = {};
                    if constexpr (kPair<P> == 2)
                        __builtin_memcpy(tail, row, size_t(n - d) * sizeof(B));
                    else
                        widen_row<F>(row, tail, n - d);
                    square[l] = loadu<B>(tail);
                }
            }
            transpose<B>(square);
            const int64_t valid = n - d < L ? n - d : L;
            for (int64_t l = 0; l < valid; ++l) storeu<B>(out + (d + l) * width + v * L, square[l]);
        }
}

// The same for rows `stride` apart.
template <typename P, typename E>
SLM_INLINE void pack_transposed(const E* x, int64_t stride, int64_t rows, int64_t D, typename P::B* out,
                                int64_t width) {
    pack_transposed<P>([=](int64_t i) { return x + i * stride; }, rows, D, out, width);
}

// Rows [rows][D] as the B operand of P with the rows as k: out[rows / kPair][width]. Missing rows of
// the last block of lanes are zeros.
template <typename P, typename Row>
SLM_INLINE void pack_rows(Row&& row_of, int64_t rows, int64_t D, int64_t width, typename P::B* out) {
    using F = typename P::Acc;
    if constexpr (kPair<P> == 1) {
        for (int64_t i = 0; i < rows; ++i) widen_row<F>(row_of(i), out + i * width, D);
    } else {
        constexpr int L = kLanes<F>;
        for (int64_t i = 0; i < rows; i += 2) {
            const bool paired = i + 1 < rows;
            const auto *even = row_of(i), *odd = row_of(paired ? i + 1 : i);
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

template <typename P, typename E>
SLM_INLINE void pack_rows(const E* x, int64_t stride, int64_t rows, int64_t D, int64_t width,
                          typename P::B* out) {
    pack_rows<P>([=](int64_t i) { return x + i * stride; }, rows, D, width, out);
}

// Transposes x^T [D][`width` lanes] back into `rows` rows row(i), each lane times factor[lane] if given; adds
// to what is there if Add.
template <typename P, bool Add, typename Row>
SLM_INLINE void unpack_transposed(const typename P::Acc* x, int64_t width, const typename P::Acc* factor,
                                  int64_t rows, int64_t D, Row&& row_of) {
    using F = typename P::Acc;
    constexpr int L = kLanes<F>;
    for (int64_t v = 0; v * L < rows; ++v)
        for (int64_t d = 0; d < D; d += L) {
            Vec<F> square[L];
            const Vec<F> times = factor ? loadu<F>(factor + v * L) : splat<F>(F(1));
            for (int l = 0; l < L; ++l)
                square[l] = d + l < D ? loadu<F>(x + (d + l) * width + v * L) * times : Vec<F>{};
            transpose<F>(square);
            for (int l = 0; l < L && v * L + l < rows; ++l) {
                auto* to = row_of(v * L + l) + d;
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
