// Activations of a pre-activation h, or of its gate and its up: a = f(h), or f(gate) g(up); f' and g'.
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
    } else if constexpr (A == kSwigluOai) {
        constexpr F limit = F(kLimit), alpha = F(kAlpha);
        const Vec<F> low = vmax<F>(splat<F>(F(-100)), x), bounded = low > limit ? splat<F>(limit) : low;
        Vec<F> s, rest;
        sigmoid<F>(alpha * bounded, s, rest);
        if (slope) *slope = x > limit ? Vec<F>{} : s * (F(1) + alpha * bounded * rest);
        return bounded * s;
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

// g(up): up itself, but of GPT-OSS's SwiGLU; and its derivative if asked.
template <typename F, int A>
SLM_INLINE Vec<F> lift(Vec<F> up, Vec<F>* slope) {
    if constexpr (A == kSwigluOai) {
        constexpr F limit = F(kLimit);
        const Vec<F> low = vmax<F>(splat<F>(-limit), up), bounded = low > limit ? splat<F>(limit) : low;
        if (slope) *slope = up > limit || up < -limit ? Vec<F>{} : splat<F>(F(1));
        return bounded + F(1);
    } else {
        if (slope) *slope = splat<F>(F(1));
        return up;
    }
}

// Calls body<A>() for the activation; gate and non-gate forms of a function share an instance.
#define SLM_ACTIVATION(A, ...)                   \
    switch (A) {                                 \
        case kSwiglu:                            \
            __VA_ARGS__(Constant<kSwiglu>{});    \
            break;                               \
        case kSwigluOai:                         \
            __VA_ARGS__(Constant<kSwigluOai>{}); \
            break;                               \
        case kRelu2:                             \
            __VA_ARGS__(Constant<kRelu2>{});     \
            break;                               \
        case kGeglu:                             \
        case kGelu:                              \
            __VA_ARGS__(Constant<kGelu>{});      \
            break;                               \
        default:                                 \
            __VA_ARGS__(Constant<kGeluTanh>{});  \
    }

template <int A>
struct Constant {
    static constexpr int value = A;
};

}  // namespace
