// Operands of the tile kernel (tile.h) in the layout that it reads.
#pragma once

#include "tile.h"

namespace {

template <typename P>
constexpr int kPair = std::is_same_v<typename P::B, uint32_t> ? 2 : 1;  // values of k in one step of P

// X^T of `rows` rows x [rows][D], as the B operand of P: out[D / kPair][width]; columns from `rows` to the
// end of their register are zeros.
template <typename P, typename E>
SLM_INLINE void pack_transposed(const E* x, int64_t stride, int64_t rows, int64_t D, typename P::B* out,
                                int64_t width) {
    using F = typename P::Acc;
    using B = typename P::B;
    constexpr int L = kLanes<F>;
    const int64_t n = D / kPair<P>;
    for (int64_t v = 0; v * L < rows; ++v)
        for (int64_t d = 0; d < n; d += L) {
            Vec<B> square[L];
            for (int l = 0; l < L; ++l) {
                const E* row = x + (v * L + l) * stride + d * kPair<P>;
                if (v * L + l >= rows) {
                    square[l] = Vec<B>{};
                } else if (d + L <= n) {
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

}  // namespace
