// How the operators hand tensors to their kernels.
#pragma once

#include <cstdint>

namespace slm {

enum class Dtype : int { f32, f64, bf16, f16 };

// A tensor [B, T, H, D] with unit stride along D. Strides in elements.
struct Rows {
    void* data;
    int64_t b, t, h;

    template <typename E>
    constexpr E* at(int64_t ib, int64_t it, int64_t ih) const {
        return static_cast<E*>(data) + ib * b + it * t + ih * h;
    }
};

}  // namespace slm
