// Activations of a pre-activation h, or of its gate and its up: a = f(h), or f(gate) up; and f'.
#pragma once

#include "../common/sigmoid.h"

namespace {

enum Activation { kSwiglu, kGeglu, kGegluTanh, kRelu2, kGelu, kGeluTanh };  // as reference.ACTIVATIONS

// Phi(x), the normal distribution, and its density. erfc(z) = exp(-z^2) t q(t), t = 1 / (1 + z / 2), z >= 0,
// q by a weighted least-squares fit of degree 8: 4.4e-8 of the value. In double by the C library.
SLM_INLINE void normal(Vec<float> x, Vec<float>& cdf, Vec<float>& density) {
    const Vec<float> z = (Vec<float>)((Mask<float>)x & 0x7fffffff) * 0.70710678f;
    const Vec<float> t = 1.0f / (1.0f + 0.5f * z);
    Vec<float> q = splat(-0x1.e64fa8p-5f);
    q = q * t + 0x1.24e13cp-2f;
    q = q * t - 0x1.f5f26ap-2f;
    q = q * t + 0x1.203be4p-2f;
    q = q * t - 0x1.dab61ep-6f;
    q = q * t + 0x1.a1229ep-3f;
    q = q * t + 0x1.f15d24p-3f;
    q = q * t + 0x1.212ffcp-2f;
    q = q * t + 0x1.20dacp-2f;
    const Vec<float> power = exp2_nonpositive<float>(z * z * -kLog2e<float>);
    const Vec<float> tail = 0.5f * power * (t * q);
    cdf = x > 0.0f ? 1.0f - tail : tail;
    cdf = x == x ? cdf : x;
    density = 0.39894228f * power;
}

SLM_INLINE void normal(Vec<double> x, Vec<double>& cdf, Vec<double>& density) {
    for (int l = 0; l < kLanes<double>; ++l) cdf[l] = 0.5 * std::erfc(-x[l] * 0.70710678118654752440);
    density = 0.39894228040143267794 * exp2_nonpositive<double>(x * x * (-0.5 * kLog2e<double>));
}

// f(x), and its derivative if asked.
template <typename F, int A>
SLM_INLINE Vec<F> bend(Vec<F> x, Vec<F>* slope) {
    if constexpr (A == kRelu2) {
        const Vec<F> positive = vmax<F>(Vec<F>{}, x);  // in this order NaN stays
        if (slope) *slope = positive + positive;
        return positive * positive;
    } else {
        // Where x is far out, f is x or 0 and its slope 1 or 0: `bounded` keeps inf * 0 away.
        const Vec<F> low = vmax<F>(splat<F>(F(-100)), x), bounded = low > F(100) ? splat<F>(F(100)) : low;
        if constexpr (A == kGeglu || A == kGelu) {
            Vec<F> cdf, density;
            normal(x, cdf, density);
            if (slope) *slope = cdf + bounded * density;
            return low * cdf;
        } else {
            constexpr bool tanh_form = A == kGegluTanh || A == kGeluTanh;  // x sigmoid(2 u(x)); silu: of x
            constexpr F c = F(1.5957691216057307117597842397375), cubic = F(0.044715);  // 2 sqrt(2 / pi)
            const Vec<F> square = bounded * bounded;
            Vec<F> s, rest;
            sigmoid<F>(tanh_form ? c * bounded * (F(1) + cubic * square) : x, s, rest);
            const Vec<F> inner = tanh_form ? c * (F(1) + F(3) * cubic * square) : splat<F>(F(1));
            if (slope) *slope = s * (F(1) + bounded * rest * inner);
            return low * s;
        }
    }
}

// Calls body<A>() for the activation; gate and non-gate forms of a function share an instance.
#define SLM_ACTIVATION(A, ...)                  \
    switch (A) {                                \
        case kSwiglu:                           \
            __VA_ARGS__(Constant<kSwiglu>{});   \
            break;                              \
        case kRelu2:                            \
            __VA_ARGS__(Constant<kRelu2>{});    \
            break;                              \
        case kGeglu:                            \
        case kGelu:                             \
            __VA_ARGS__(Constant<kGelu>{});     \
            break;                              \
        default:                                \
            __VA_ARGS__(Constant<kGeluTanh>{}); \
    }

template <int A>
struct Constant {
    static constexpr int value = A;
};

}  // namespace
