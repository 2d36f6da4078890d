// Rows and states in scratch memory: arithmetic on whole registers, conversion from and to storage.
#pragma once

#include "pack.h"
#include "scratch.h"

namespace {

template <typename F>
SLM_INLINE F dot(const F* a, const F* b, int64_t width) {
    Vec<F> sum{};
    for (int64_t d = 0; d < width; d += kLanes<F>) sum += loadu<F>(a + d) * loadu<F>(b + d);
    return reduce_add<F>(sum);
}

template <typename F>
SLM_INLINE Vec<F> lane_numbers(int64_t first) {
    Vec<F> x;
    for (int l = 0; l < kLanes<F>; ++l) x[l] = F(l);
    return x + F(first);
}

// Row r times factor[r * step].
template <typename F>
SLM_INLINE void scale_rows(F* x, const F* factor, int64_t step, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < width; d += kLanes<F>)
            storeu<F>(x + r * width + d, loadu<F>(x + r * width + d) * factor[r * step]);
}

template <typename F>
SLM_INLINE void multiply(F* to, const F* a, const F* b, int64_t n) {
    for (int64_t d = 0; d < n; d += kLanes<F>) storeu<F>(to + d, loadu<F>(a + d) * loadu<F>(b + d));
}

template <typename F>
SLM_INLINE void add_product(F* to, const F* a, const F* b, int64_t n) {
    for (int64_t d = 0; d < n; d += kLanes<F>)
        storeu<F>(to + d, loadu<F>(to + d) + loadu<F>(a + d) * loadu<F>(b + d));
}

template <typename F>
SLM_INLINE void add(F* to, const F* a, int64_t n) {
    for (int64_t d = 0; d < n; d += kLanes<F>) storeu<F>(to + d, loadu<F>(to + d) + loadu<F>(a + d));
}

// A row from storage times a factor, and back.
template <typename F, typename E>
SLM_INLINE void widen_scaled(const E* from, F* to, F factor, int64_t n) {
    constexpr int L = kLanes<F>;
    int64_t d = 0;
    for (; d + L <= n; d += L) storeu<F>(to + d, load<F>(from + d) * factor);
    if (d == n) return;
    for (int l = 0; l < L; ++l) to[d + l] = d + l < n ? widen<F>(from[d + l]) * factor : F(0);
}

template <typename F, typename E>
SLM_INLINE void narrow_scaled(const F* from, E* to, F factor, int64_t n) {
    constexpr int L = kLanes<F>;
    int64_t d = 0;
    for (; d + L <= n; d += L) store<F>(to + d, loadu<F>(from + d) * factor);
    for (; d < n; ++d) narrow(from[d] * factor, to + d);
}

template <typename F>
SLM_INLINE void fill_zero(F* to, int64_t n) {
    __builtin_memset(to, 0, size_t(n) * sizeof(F));
}

// The state of one task: columns of `from` [K][p.V], or zeros, into [K][Vp]; and back.
template <typename F>
void load_state(const void* from, int64_t K, int64_t stride, int64_t columns, F* to) {
    const int64_t width = round_up(columns, kLanes<F>);
    if (from == nullptr) return fill_zero(to, K * width);
    for (int64_t r = 0; r < K; ++r)
        widen_row<F>(static_cast<const F*>(from) + r * stride, to + r * width, columns);
}

template <typename F>
void store_state(const F* from, int64_t K, int64_t stride, int64_t columns, void* to) {
    const int64_t width = round_up(columns, kLanes<F>);
    for (int64_t r = 0; r < K; ++r)
        narrow_row<F>(from + r * width, static_cast<F*>(to) + r * stride, columns);
}

template <typename F>
const F* shifted(const void* p, int64_t n) {
    return p == nullptr ? nullptr : static_cast<const F*>(p) + n;
}

// columns x [K][V] of a state, transposed, into [columns][Kp]; and back.
template <typename F>
void load_transposed(const F* from, int64_t K, int64_t stride, int64_t columns, F* to) {
    const int64_t width = round_up(K, kLanes<F>);
    if (from == nullptr) return fill_zero(to, columns * width);
    pack_transposed<Fma<F>>(from, stride, K, columns, to, width);
}

template <typename F>
void store_transposed(const F* from, int64_t K, int64_t stride, int64_t columns, F* to) {
    const int64_t width = round_up(K, kLanes<F>);
    for (int64_t d = 0; d < K; ++d)
        for (int64_t e = 0; e < columns; ++e) to[d * stride + e] = from[e * width + d];
}

// to[row][n] = sum over parts of from[row][part][n], for rows [begin, end); parts are stored as X.
template <typename F, typename E, typename X = F>
void sum_part_rows(const void* from, void* to, int64_t parts, int64_t n, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const X* x = static_cast<const X*>(from) + row * parts * n;
        E* y = static_cast<E*>(to) + row * n;
        int64_t d = 0;
        for (; d + kLanes<F> <= n; d += kLanes<F>) {
            Vec<F> sum = load<F>(x + d);
            for (int64_t part = 1; part < parts; ++part) sum += load<F>(x + part * n + d);
            ::store<F>(y + d, sum);
        }
        for (; d < n; ++d) {
            F sum = widen<F>(x[d]);
            for (int64_t part = 1; part < parts; ++part) sum += widen<F>(x[part * n + d]);
            narrow(sum, y + d);
        }
    }
}

}  // namespace
