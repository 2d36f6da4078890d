// The activations of experts, of one number.
#pragma once

#include "../common/hardware.cuh"
#include "activation.h"

namespace slm {
namespace {

// f(x). Where x is far out f is x or 0: `low` keeps -inf * 0 away, and NaN stays.
template <experts::Activation A>
SLM_DEVICE float bend(float x) {
    constexpr float kLog2e = 1.44269504f;
    if constexpr (A == experts::kRelu2) {
        const float positive = x < 0.f ? 0.f : x;
        return positive * positive;
    }
    const float low = x < -100.f ? -100.f : x;
    if constexpr (A == experts::kSwigluOai) {
        constexpr float limit = float(experts::kLimit), alpha = float(experts::kAlpha);
        const float bounded = low > limit ? limit : low;
        return bounded * reciprocal(1.f + exp2(bounded * -(alpha * kLog2e)));
    }
    if constexpr (A == experts::kGelu) {  // x Phi(x), by erfc
        const float z = fabsf(x) * 0.70710678f, t = reciprocal(1.f + 0.5f * z);
        const float tail = 0.5f * exp2(z * z * -kLog2e) * (t * experts::erfc_polynomial(t));
        return low * (x > 0.f ? 1.f - tail : tail);
    } else if constexpr (A == experts::kGeluTanh) {
        const float near = low > 100.f ? 100.f : low;
        const float u = float(experts::kTanh) * near * (1.f + float(experts::kCubic) * near * near);
        return low * reciprocal(1.f + exp2(u * -kLog2e));
    } else {
        return low * reciprocal(1.f + exp2(low * -kLog2e));
    }
}

// x = f(x) of eight numbers; forms with a gate and without share their curve.
template <experts::Activation A>
SLM_DEVICE void bend_all(float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = bend<A>(x[i]);
}
SLM_DEVICE void bend_all(float (&x)[8], int activation) {
    switch (activation) {
        case experts::kSwiglu:
            return bend_all<experts::kSwiglu>(x);
        case experts::kSwigluOai:
            return bend_all<experts::kSwigluOai>(x);
        case experts::kRelu2:
            return bend_all<experts::kRelu2>(x);
        case experts::kGeglu:
        case experts::kGelu:
            return bend_all<experts::kGelu>(x);
        default:
            return bend_all<experts::kGeluTanh>(x);
    }
}

// What the curve of a gate is multiplied by: up itself, but of GPT-OSS's SwiGLU. NaN stays.
SLM_DEVICE float lift(float up, int activation) {
    if (activation != experts::kSwigluOai) return up;
    constexpr float limit = float(experts::kLimit);
    return 1.f + (up > limit ? limit : up < -limit ? -limit : up);
}

}  // namespace
}  // namespace slm
