// Activations of a pre-activation h, or of its gate and its up: a = f(h), or f(gate) up; and f'.
#pragma once

#include "../common/sigmoid.h"
#include "activation.h"

namespace {

using namespace slm::experts;

// Phi(x), the normal distribution, and its density. In double by the C library.
SLM_INLINE void normal(Vec<float> x, Vec<float>& cdf, Vec<float>& density) {
    const Vec<float> z = (Vec<float>)((Mask<float>)x & 0x7fffffff) * 0.70710678f;
    const Vec<float> t = 1.0f / (1.0f + 0.5f * z);
    const Vec<float> power = exp2_nonpositive<float>(z * z * -kLog2e<float>);
    const Vec<float> tail = 0.5f * power * (t * erfc_polynomial(t));
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
            constexpr F c = F(kTanh), cubic = F(kCubic);
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
