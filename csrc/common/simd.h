// Vectors of one register, for the tier that includes this file: arithmetic by GCC's vector extensions,
// conversions between storage types, exp2, log and tanh, in-register transposition.
//
// (GCC 12 warns of an uninitialised operand in the unmasked intrinsics; the zero-masked ones with a full
// mask compile to the same instruction.)
//
// Included inside a tier's translation unit after `#pragma GCC target`, so everything sits in an
// anonymous namespace: no symbol of one tier can be taken by the linker for another's. SLM_BYTES is
// the register's width: 64 (AVX-512), 32 (AVX2), 16 (portable).
#pragma once

#include "prelude.h"

namespace {

#define SLM_INLINE inline __attribute__((always_inline))

template <typename E>
struct VectorOf {
    typedef E type __attribute__((vector_size(SLM_BYTES)));
    typedef E loose __attribute__((vector_size(SLM_BYTES), aligned(1), may_alias));
};
template <typename E>
using Vec = typename VectorOf<E>::type;

template <typename F>
constexpr int kLanes = SLM_BYTES / sizeof(F);

template <typename F>
struct IntegerOf;
template <>
struct IntegerOf<float> {
    using type = int32_t;
};
template <>
struct IntegerOf<double> {
    using type = int64_t;
};
template <typename F>
using Int = typename IntegerOf<F>::type;
template <typename F>
using Mask = Vec<Int<F>>;  // all bits of a lane set where true, as comparisons of vectors give it

// Storage types. float and double stand for themselves.
struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

template <typename F>
SLM_INLINE Vec<F> splat(F x) {
    return x - Vec<F>{};  // GCC broadcasts the scalar
}

template <typename F>
SLM_INLINE Vec<F> loadu(const F* p) {
    return *reinterpret_cast<const typename VectorOf<F>::loose*>(p);
}

template <typename F>
SLM_INLINE void storeu(F* p, Vec<F> x) {
    *reinterpret_cast<typename VectorOf<F>::loose*>(p) = x;
}

template <typename F>
SLM_INLINE Vec<F> select(Mask<F> mask, Vec<F> yes, Vec<F> no) {
    return mask ? yes : no;
}

template <typename F>
SLM_INLINE Vec<F> vmax(Vec<F> a, Vec<F> b) {
    return a > b ? a : b;
}

// x as it would be stored: not part of a fused multiply-add. (Before GCC 12 it may be, and costs digits.)
template <typename F>
SLM_INLINE Vec<F> as_stored(Vec<F> x) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
    return __builtin_assoc_barrier(x);
#endif
#endif
    return x;
}

template <typename F, int S = kLanes<F> / 2>
SLM_INLINE F reduce_add(Vec<F> x) {  // halves onto each other
    if constexpr (S == 0) {
        return x[0];
    } else {
        Mask<F> other;
        for (int l = 0; l < kLanes<F>; ++l) other[l] = Int<F>(l ^ S);
        return reduce_add<F, S / 2>(x + __builtin_shuffle(x, other));
    }
}

// ---- conversions of single elements

SLM_INLINE float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}

SLM_INLINE float to_float(Half x) {
    // Exponent and mantissa shifted into place and rescaled by 2^112; infinities and NaN keep all bits.
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    uint32_t bits = magnitude << 13;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    y *= 0x1p112f;
    __builtin_memcpy(&bits, &y, 4);
    if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
    bits |= sign;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}

SLM_INLINE void from_float(float x, BFloat16* y) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y->bits = nan ? uint16_t((bits >> 16) | 0x40u)
                  : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest even
}

SLM_INLINE void from_float(float x, Half* y) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) {
        y->bits = sign | 0x7e00u;
    } else if (bits >= 0x477ff000u) {  // rounds beyond 65504
        y->bits = sign | 0x7c00u;
    } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 aligns the mantissa and rounds it
        float magnitude;
        __builtin_memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        __builtin_memcpy(&bits, &magnitude, 4);
        y->bits = uint16_t(sign | (bits - 0x3f000000u));
    } else {
        bits += 0xfffu + ((bits >> 13) & 1u);  // to nearest even
        y->bits = uint16_t(sign | ((bits - 0x38000000u) >> 13));
    }
}

template <typename F>
SLM_INLINE F widen(F x) {
    return x;
}
template <typename F>
SLM_INLINE F widen(BFloat16 x) {
    return to_float(x);
}
template <typename F>
SLM_INLINE F widen(Half x) {
    return to_float(x);
}
SLM_INLINE void narrow(float x, float* y) { *y = x; }
SLM_INLINE void narrow(double x, double* y) { *y = x; }
SLM_INLINE void narrow(float x, BFloat16* y) { from_float(x, y); }
SLM_INLINE void narrow(float x, Half* y) { from_float(x, y); }

// ---- conversions of a register

template <typename F>
SLM_INLINE Vec<F> load(const F* p) {
    return loadu<F>(p);
}

// 16-bit words, each in the low half of a 32-bit lane. (GCC 12 splits the conversion of 16 in two.)
SLM_INLINE Vec<uint32_t> load_words(const void* p) {
#if SLM_BYTES == 64
    const __m256i words = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, words);
#else
    typedef uint16_t Words __attribute__((vector_size(SLM_BYTES / 2), aligned(1), may_alias));
    return __builtin_convertvector(*static_cast<const Words*>(p), Vec<uint32_t>);
#endif
}

template <typename F>
SLM_INLINE Vec<F> load(const BFloat16* p) {
    return (Vec<F>)(load_words(p) << 16);
}

template <typename F>
SLM_INLINE Vec<F> load(const Half* p) {
#if SLM_BYTES == 64
    return (Vec<F>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif SLM_BYTES == 32
    return (Vec<F>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<F> x;
    for (int l = 0; l < kLanes<F>; ++l) x[l] = to_float(p[l]);
    return x;
#endif
}

template <typename F>
SLM_INLINE void store(F* p, Vec<F> x) {
    storeu<F>(p, x);
}

template <typename F>
SLM_INLINE void store(BFloat16* p, Vec<F> x) {
    typedef uint16_t Short __attribute__((vector_size(SLM_BYTES / 2), aligned(1), may_alias));
    const Vec<uint32_t> bits = (Vec<uint32_t>)x;
    const Vec<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Vec<uint32_t> quiet = (bits >> 16) | 0x40u;
    const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const Vec<uint32_t> half = nan ? quiet : rounded;
    *reinterpret_cast<Short*>(p) = __builtin_convertvector(half, Short);
}

template <typename F>
SLM_INLINE void store(Half* p, Vec<F> x) {
#if SLM_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0));
#elif SLM_BYTES == 32
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
    for (int l = 0; l < kLanes<F>; ++l) from_float(x[l], p + l);
#endif
}

// Row of n elements, converted, padded with zeros to a whole number of registers.
template <typename F, typename E>
SLM_INLINE void widen_row(const E* from, F* to, int64_t n) {
    constexpr int L = kLanes<F>;
    int64_t d = 0;
    for (; d + L <= n; d += L) storeu<F>(to + d, load<F>(from + d));
    if (d == n) return;
    for (int l = 0; l < L; ++l) to[d + l] = d + l < n ? widen<F>(from[d + l]) : F(0);
}

template <typename F, typename E>
SLM_INLINE void narrow_row(const F* from, E* to, int64_t n) {
    constexpr int L = kLanes<F>;
    int64_t d = 0;
    for (; d + L <= n; d += L) store<F>(to + d, loadu<F>(from + d));
    for (; d < n; ++d) narrow(from[d], to + d);
}

// ---- exp2, expm1, tanh. 2^x = 2^n * 2^f with n = round(x), |f| <= 1/2, and 2^f = 1 + f * q(f), q by
// Remez for the relative error: 2.6e-9 (float, degree 6 in all), 1.8e-17 (double, degree 11).

SLM_INLINE Vec<float> exp2m1_reduced(Vec<float> f) {
    Vec<float> q = splat(0x1.470b52p-13f);
    q = q * f + 0x1.5f7278p-10f;
    q = q * f + 0x1.3b270ep-7f;
    q = q * f + 0x1.c6ae72p-5f;
    q = q * f + 0x1.ebfbe2p-3f;
    q = q * f + 0x1.62e432p-1f;
    return q * f;
}

SLM_INLINE Vec<double> exp2m1_reduced(Vec<double> f) {
    Vec<double> q = splat(0x1.c062c3e8122dfp-32);
    q = q * f + 0x1.e605f89c37da9p-28;
    q = q * f + 0x1.b54168266b234p-24;
    q = q * f + 0x1.62bfd49f5dcf5p-20;
    q = q * f + 0x1.ffcbee3ac9a25p-17;
    q = q * f + 0x1.4309130960d86p-13;
    q = q * f + 0x1.5d87fe7bbbed8p-10;
    q = q * f + 0x1.3b2ab6fba1e1dp-7;
    q = q * f + 0x1.c6b08d7048f31p-5;
    q = q * f + 0x1.ebfbdff82c598p-3;
    q = q * f + 0x1.62e42fefa39f3p-1;
    return q * f;
}

template <typename F>
constexpr F kRound = F(1.5) * F(int64_t(1) << (sizeof(F) == 4 ? 23 : 52));  // adding it rounds
template <typename F>
constexpr int kMantissa = sizeof(F) == 4 ? 23 : 52;
template <typename F>
constexpr F kMinExponent = sizeof(F) == 4 ? F(-126) : F(-1022);

// 2^x for x <= about 1; 0 below the smallest normal number, so that 2^-inf is exactly 0.
template <typename F>
SLM_INLINE Vec<F> exp2_nonpositive(Vec<F> x) {
    const Vec<F> clamped = vmax<F>(splat<F>(kMinExponent<F>), x);  // in this order NaN stays
#if SLM_BYTES == 64
    if constexpr (sizeof(F) == 4) {  // two instructions instead of five around the polynomial
        const __m512 n = _mm512_maskz_roundscale_ps(0xffff, (__m512)clamped, 8);
        const Vec<F> p = exp2m1_reduced(clamped - (Vec<F>)n) + F(1);
        return select<F>(x < kMinExponent<F>, Vec<F>{}, (Vec<F>)_mm512_maskz_scalef_ps(0xffff, (__m512)p, n));
    }
#endif
    const Vec<F> shifted = clamped + kRound<F>;
    const Mask<F> n = (Mask<F>)shifted << kMantissa<F>;  // the magic number's bits are shifted out
    const Vec<F> p = exp2m1_reduced(clamped - (shifted - kRound<F>)) + F(1);
    return select<F>(x < kMinExponent<F>, Vec<F>{}, (Vec<F>)((Mask<F>)p + n));
}

// log(x) of a positive normal number; NaN and inf stay. x = 2^n m, sqrt(1/2) <= m < sqrt(2), and log(m) =
// 2 atanh(f) = 2 (f + f^3/3 + f^5/5 + ...), f = (m - 1) / (m + 1), |f| < 0.172: 6 terms in float, 12 in double.
template <typename F>
SLM_INLINE Vec<F> log(Vec<F> x) {
    constexpr int kTerms = sizeof(F) == 4 ? 6 : 12;
    constexpr Int<F> kRootHalf = sizeof(F) == 4 ? Int<F>(0x3f3504f3) : Int<F>(0x3fe6a09e667f3bcd);
    const Mask<F> n = ((Mask<F>)x - kRootHalf) >> kMantissa<F>;
    const Vec<F> m = (Vec<F>)((Mask<F>)x - (n << kMantissa<F>));
    const Vec<F> f = (m - F(1)) / (m + F(1)), square = f * f;
    Vec<F> q = splat<F>(F(2) / F(2 * kTerms - 1));
#pragma GCC unroll 16
    for (int i = kTerms - 2; i >= 0; --i) q = q * square + F(2) / F(2 * i + 1);
    const Vec<F> exponent = (Vec<F>)((Mask<F>)splat<F>(kRound<F>) + n) - kRound<F>;
    const Vec<F> y = exponent * F(0.693147180559945309417232121458176568) + f * q;
    return select<F>(x < F(__builtin_inf()), y, x);
}

// tanh(x) = (e^2|x| - 1) / (e^2|x| + 1) with the sign of x; exact to a few ulp down to 0, because
// e^2|x| - 1 = 2^n (2^f - 1) + (2^n - 1) loses nothing when n = 0.
template <typename F>
SLM_INLINE Vec<F> tanh(Vec<F> x) {
    const Mask<F> sign = (Mask<F>)x & ((Mask<F>)splat<F>(F(-0.0)));
    Vec<F> y = (Vec<F>)((Mask<F>)x ^ sign);
    y = y > F(22) ? splat<F>(F(22)) : y;  // tanh(22) is 1 in double too; keeps NaN
    y *= F(2.885390081777926814719849362003784069);  // 2 log2(e)
    const Vec<F> shifted = y + kRound<F>;
    const Vec<F> rounded = shifted - kRound<F>;
    const Vec<F> power = (Vec<F>)((Mask<F>)splat<F>(F(1)) + ((Mask<F>)shifted << kMantissa<F>));
    const Vec<F> expm1 = power * exp2m1_reduced(y - rounded) + (power - F(1));
    return (Vec<F>)((Mask<F>)(expm1 / (expm1 + F(2))) | sign);
}

// ---- transposition of a square of registers, in place: log2(lanes) rounds of two-input shuffles.

template <typename E, int S, int... L>
SLM_INLINE void swap_blocks(Vec<E>& a, Vec<E>& b, std::integer_sequence<int, L...>) {
    using I = std::conditional_t<sizeof(E) == 4, int32_t, int64_t>;
    constexpr int N = sizeof...(L);
    constexpr Vec<I> low = {((L & S) ? L - S + N : L)...};
    constexpr Vec<I> high = {((L & S) ? L + N : L + S)...};
    const Vec<E> x = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = x;
}

template <typename E, int S = SLM_BYTES / int(sizeof(E)) / 2>
SLM_INLINE void transpose(Vec<E>* rows) {
    constexpr int N = SLM_BYTES / int(sizeof(E));
    if constexpr (S > 0) {
#pragma GCC unroll 16
        for (int r = 0; r < N; ++r)
            if (!(r & S)) swap_blocks<E, S>(rows[r], rows[r + S], std::make_integer_sequence<int, N>{});
        transpose<E, S / 2>(rows);
    }
}

}  // namespace
