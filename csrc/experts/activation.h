// The activations of experts, as every kernel numbers them, and what their implementations share.
#pragma once

namespace slm::experts {

// In the order of reference.ACTIVATIONS; those before kRelu2 have a gate.
enum Activation { kSwiglu, kGeglu, kGegluTanh, kSwigluOai, kRelu2, kGelu, kGeluTanh };
constexpr int kActivations = 7;
constexpr bool is_gated(int activation) { return activation < kRelu2; }

// q(t) of erfc(z) = exp(-z^2) t q(t), t = 1 / (1 + z / 2), z >= 0: a weighted least-squares fit of degree 8,
// 4.4e-8 of the value. V: float, or a vector of them.
template <typename V>
constexpr V erfc_polynomial(V t) {
    V q = t * -0x1.e64fa8p-5f + 0x1.24e13cp-2f;
    q = q * t - 0x1.f5f26ap-2f;
    q = q * t + 0x1.203be4p-2f;
    q = q * t - 0x1.dab61ep-6f;
    q = q * t + 0x1.a1229ep-3f;
    q = q * t + 0x1.f15d24p-3f;
    q = q * t + 0x1.212ffcp-2f;
    return q * t + 0x1.20dacp-2f;
}

// Twice sqrt(2 / pi), and the cubic part: gelu's tanh form is x sigmoid(kTanh x (1 + kCubic x^2)).
constexpr double kTanh = 1.5957691216057307117597842397375, kCubic = 0.044715;

// GPT-OSS's SwiGLU: gate sigmoid(kAlpha gate) (up + 1), gate at most kLimit, up within -kLimit and kLimit.
constexpr double kAlpha = 1.702, kLimit = 7;

}  // namespace slm::experts
