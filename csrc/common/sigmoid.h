// The sigmoid of a register, silu and its slope, for the tier that includes this file.
#pragma once

#include "scratch.h"

namespace {

// s = 1 / (1 + e^-z) and 1 - s, which is e^-z s: no difference loses digits. The exponent is kept where 2^x
// is a normal number: s and 1 - s stop falling at 2^-126 (double: 2^-1022), so what multiplies them is
// `bounded`. NaN stays.
template <typename F>
SLM_INLINE void sigmoid(Vec<F> z, Vec<F>& s, Vec<F>& rest) {
    const Vec<F> x = z * -kLog2e<F>;
#if SLM_BYTES == 64
    if constexpr (sizeof(F) == 4) {
        const __m512 low = _mm512_maskz_max_ps(0xffff, (__m512)splat<F>(F(-126)), (__m512)x);
        const __m512 clamped = _mm512_maskz_min_ps(0xffff, (__m512)splat<F>(F(126)), low);
        const __m512 n = _mm512_maskz_roundscale_ps(0xffff, clamped, 8);
        const Vec<F> p = exp2m1_reduced((Vec<F>)clamped - (Vec<F>)n) + F(1);
        const Vec<F> power = (Vec<F>)_mm512_maskz_scalef_ps(0xffff, (__m512)p, n);
        // 1 / (1 + power): 14 bits, and a Newton step that doubles them
        const Vec<F> guess = (Vec<F>)_mm512_maskz_rcp14_ps(0xffff, (__m512)(power + F(1)));
        s = guess + guess * (F(1) - (power + F(1)) * guess);
        rest = power * s;
        return;
    }
#endif
    const Vec<F> low = vmax<F>(splat<F>(kMinExponent<F>), x);  // in this order NaN stays
    const Vec<F> clamped = low > -kMinExponent<F> ? splat<F>(-kMinExponent<F>) : low;
    const Vec<F> shifted = clamped + kRound<F>;
    const Mask<F> n = (Mask<F>)shifted << kMantissa<F>;  // the magic number's bits are shifted out
    const Vec<F> p = exp2m1_reduced(clamped - (shifted - kRound<F>)) + F(1);
    const Vec<F> power = (Vec<F>)((Mask<F>)p + n);
    s = F(1) / (F(1) + power);
    rest = power * s;
}

template <typename F>
constexpr F kFar = F(10000);  // e^-z is 0 long before, in double too

template <typename F>
SLM_INLINE Vec<F> silu(Vec<F> z) {
    Vec<F> s, rest;
    sigmoid<F>(z, s, rest);
    return vmax<F>(splat<F>(-kFar<F>), z) * s;
}

template <typename F>
SLM_INLINE Vec<F> silu_slope(Vec<F> z) {
    Vec<F> s, rest;
    sigmoid<F>(z, s, rest);
    const Vec<F> low = vmax<F>(splat<F>(-kFar<F>), z), bounded = low > kFar<F> ? splat<F>(kFar<F>) : low;
    return s * (F(1) + bounded * rest);
}

}  // namespace
