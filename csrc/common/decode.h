// What decode steps share: products of one query with rows of keys and values.
#pragma once

#include "scratch.h"

namespace {

template <typename F, typename E>
SLM_INLINE F dot_product(const F* a, const E* b, int64_t n) {
    constexpr int L = kLanes<F>;
    Vec<F> sum{}, more{};
    int64_t e = 0;
    for (; e + 2 * L <= n; e += 2 * L) {
        sum += loadu<F>(a + e) * load<F>(b + e);
        more += loadu<F>(a + e + L) * load<F>(b + e + L);
    }
    sum += more;
    for (; e + L <= n; e += L) sum += loadu<F>(a + e) * load<F>(b + e);
    F total = reduce_add<F>(sum);
    for (; e < n; ++e) total += a[e] * widen<F>(b[e]);
    return total;
}

// o[e..] = sum over rows of weights[j] * v[j][e..], N registers of o at a time; four sums in flight hide the
// latency of the adds.
template <int N, typename F, typename E>
SLM_INLINE void weighted_rows(const F* weights, const E* v, int64_t rows, int64_t size, F* o) {
    constexpr int L = kLanes<F>, M = 4 / N;
    Vec<F> sum[M][N] = {};
    int64_t j = 0;
    for (; j + M <= rows; j += M)
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) sum[m][n] += weights[j + m] * load<F>(v + (j + m) * size + n * L);
    for (; j < rows; ++j)
        for (int n = 0; n < N; ++n) sum[0][n] += weights[j] * load<F>(v + j * size + n * L);
    for (int n = 0; n < N; ++n) {
        for (int m = 1; m < M; ++m) sum[0][n] += sum[m][n];
        storeu<F>(o + n * L, sum[0][n]);
    }
}

template <typename F, typename E>
SLM_INLINE void weighted_sum(const F* weights, const E* v, int64_t rows, int64_t size, F* o) {
    constexpr int L = kLanes<F>;
    int64_t e = 0;
    for (; e + 4 * L <= size; e += 4 * L) weighted_rows<4>(weights, v + e, rows, size, o + e);
    for (; e + L <= size; e += L) weighted_rows<1>(weights, v + e, rows, size, o + e);
    for (; e < size; ++e) {
        F sum = 0;
        for (int64_t j = 0; j < rows; ++j) sum += weights[j] * widen<F>(v[j * size + e]);
        o[e] = sum;
    }
}

}  // namespace
