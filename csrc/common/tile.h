// The register-blocked matrix kernel that every CPU operation shares:
//
//     C[r][:] (+)= sum_k  A[r][k] * B[k][:]        r < M rows,  columns in whole registers
//
// A is read element by element and broadcast, so it may lie in memory any way (`row`, `step` strides;
// the transpose of a natural layout costs nothing); B and C have contiguous rows. A block of 6 x 4
// registers of C stays in registers while k runs: 24 accumulators hide the latency of two FMA units,
// and each step needs 4 loads and 6 broadcasts for 24 FMAs. (6 x 2 where there are 16 registers.)
// MKL's sgemm packs both operands first; here the operands are small, in cache, and used once.
#pragma once

#include "simd.h"

namespace {

constexpr int kTileRows = 6;
constexpr int kTileVectors = SLM_BYTES == 64 ? 4 : 2;
template <typename F>
constexpr int kBlock = kTileVectors * kLanes<F>;  // columns of a tile

// A policy multiplies, and stores results with the fastest conversion its CPU has. Plain multiply-add in F:
template <typename F>
struct Fma {
    using Acc = F;
    using A = F;  // one element of A
    using B = F;
    static SLM_INLINE Vec<F> broadcast(const A* a) { return splat<F>(*a); }
    static SLM_INLINE Vec<F> load(const B* b) { return loadu<F>(b); }
    static SLM_INLINE Vec<F> multiply_add(Vec<F> a, Vec<F> b, Vec<F> c) { return a * b + c; }
    template <typename E>
    static SLM_INLINE void store(E* to, Vec<F> x) {
        ::store<F>(to, x);
    }
};

#if SLM_BYTES == 64
// Pairs of bfloat16, products added in float32 (AVX512-BF16). A step is two values of k; A points at
// their two adjacent elements, B at pairs side by side: [k/2][column][2].
struct Dot {
    using Acc = float;
    using A = BFloat16;
    using B = uint32_t;
    static SLM_INLINE Vec<uint32_t> broadcast(const A* a) {
        typedef uint32_t Pair __attribute__((aligned(1), may_alias));
        return *reinterpret_cast<const Pair*>(a) + Vec<uint32_t>{};
    }
    static SLM_INLINE Vec<uint32_t> load(const B* b) { return loadu<uint32_t>(b); }
    static SLM_INLINE Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> c) {
        return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
    static SLM_INLINE void store(float* to, Vec<float> x) { storeu<float>(to, x); }
    static SLM_INLINE void store(BFloat16* to, Vec<float> x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
};
#endif

template <typename P, int M, int N, bool Add>
SLM_INLINE void tile(int64_t K, const typename P::A* a, int64_t a_row, int64_t a_step, const typename P::B* b,
                     int64_t b_step, typename P::Acc* c, int64_t c_row) {
    using F = typename P::Acc;
    constexpr int L = kLanes<F>;
    Vec<F> acc[M][N] = {};  // also for Add: short sums added to the long one round less than one long sum
    for (int64_t k = 0; k < K; ++k) {
        decltype(P::load(b)) column[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) column[n] = P::load(b + k * b_step + n * L);
#pragma GCC unroll 6
        for (int r = 0; r < M; ++r) {
            const auto x = P::broadcast(a + r * a_row + k * a_step);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[r][n] = P::multiply_add(x, column[n], acc[r][n]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            F* to = c + r * c_row + n * L;
            storeu<F>(to, Add ? loadu<F>(to) + acc[r][n] : acc[r][n]);
        }
}

template <typename P, int N, bool Add>
SLM_INLINE void tile_rows(int64_t M, int64_t K, const typename P::A* a, int64_t a_row, int64_t a_step,
                          const typename P::B* b, int64_t b_step, typename P::Acc* c, int64_t c_row) {
    int64_t r = 0;
    for (; r + kTileRows <= M; r += kTileRows)
        tile<P, kTileRows, N, Add>(K, a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row);
    if (r + 4 <= M) {
        tile<P, 4, N, Add>(K, a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row);
        r += 4;
    }
    if (r + 2 <= M) {
        tile<P, 2, N, Add>(K, a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row);
        r += 2;
    }
    if (r < M) tile<P, 1, N, Add>(K, a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row);
}

// C [M rows][N registers]; `K` counts steps of P. Not inlined: one body per policy serves every call.
template <typename P, bool Add>
__attribute__((noinline)) void gemm(int64_t M, int64_t N, int64_t K, const typename P::A* a, int64_t a_row,
                                    int64_t a_step, const typename P::B* b, int64_t b_step,
                                    typename P::Acc* c, int64_t c_row) {
    constexpr int L = kLanes<typename P::Acc>;
    for (; N >= kTileVectors; N -= kTileVectors, b += kTileVectors * L, c += kTileVectors * L)
        tile_rows<P, kTileVectors, Add>(M, K, a, a_row, a_step, b, b_step, c, c_row);
    if constexpr (kTileVectors > 2) {
        if (N == 3) return tile_rows<P, 3, Add>(M, K, a, a_row, a_step, b, b_step, c, c_row);
        if (N == 2) return tile_rows<P, 2, Add>(M, K, a, a_row, a_step, b, b_step, c, c_row);
    }
    if (N == 1) tile_rows<P, 1, Add>(M, K, a, a_row, a_step, b, b_step, c, c_row);
}

// Forward substitution with a unit triangle, one row of registers after another:
//
//     x[r] += sum_{s < r} A[r][s] * u[s]        u[r] = factor[r] * x[r]
//
// Rows of x and u are contiguous, `row` apart; negative strides run from the last row upwards. A block of
// rows first takes in all rows before it, as the tile kernel does, and solves its own corner in registers.
template <typename F, int M, int N>
SLM_INLINE void solve_tile(int64_t r0, const F* a, int64_t a_row, int64_t a_step, const F* factor,
                           int64_t factor_step, F* x, F* u, int64_t row) {
    constexpr int L = kLanes<F>;
    Vec<F> acc[M][N];
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = loadu<F>(x + (r0 + r) * row + n * L);
    for (int64_t s = 0; s < r0; ++s) {
        Vec<F> column[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) column[n] = loadu<F>(u + s * row + n * L);
#pragma GCC unroll 6
        for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[r][n] += a[(r0 + r) * a_row + s * a_step] * column[n];
    }
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 6
        for (int s = 0; s < r; ++s)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[r][n] += a[(r0 + r) * a_row + (r0 + s) * a_step] * acc[s][n];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            storeu<F>(x + (r0 + r) * row + n * L, acc[r][n]);
            acc[r][n] *= factor[(r0 + r) * factor_step];
            storeu<F>(u + (r0 + r) * row + n * L, acc[r][n]);
        }
    }
}

template <typename F, int N>
SLM_INLINE void solve_rows(int64_t M, const F* a, int64_t a_row, int64_t a_step, const F* factor,
                           int64_t factor_step, F* x, F* u, int64_t row) {
    int64_t r = 0;
    for (; r + kTileRows <= M; r += kTileRows)
        solve_tile<F, kTileRows, N>(r, a, a_row, a_step, factor, factor_step, x, u, row);
    for (; r + 2 <= M; r += 2) solve_tile<F, 2, N>(r, a, a_row, a_step, factor, factor_step, x, u, row);
    if (r < M) solve_tile<F, 1, N>(r, a, a_row, a_step, factor, factor_step, x, u, row);
}

// M rows, N registers a row.
template <typename F>
__attribute__((noinline)) void solve(int64_t M, int64_t N, const F* a, int64_t a_row, int64_t a_step,
                                     const F* factor, int64_t factor_step, F* x, F* u, int64_t row) {
    constexpr int L = kLanes<F>;
    for (; N >= kTileVectors; N -= kTileVectors, x += kTileVectors * L, u += kTileVectors * L)
        solve_rows<F, kTileVectors>(M, a, a_row, a_step, factor, factor_step, x, u, row);
    for (; N > 0; --N, x += L, u += L) solve_rows<F, 1>(M, a, a_row, a_step, factor, factor_step, x, u, row);
}

}  // namespace
