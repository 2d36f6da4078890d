// What the operators of every device check in a call.
#pragma once

#include <cmath>
#include <optional>

#include "../common/tensors.h"
#include "linear.h"

namespace slm {

using Optional = std::optional<Tensor>;

inline void check_tokens(const Tensor& q, const Tensor& k, const Tensor& v) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v must be [B, T, H, D]");
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "q, k, v must have one dtype");
    for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(k.size(d) == q.size(d), "k must have q's shape");
    STD_TORCH_CHECK(v.size(0) == q.size(0) && v.size(1) == q.size(1), "v must have q's batch and length");
    STD_TORCH_CHECK(q.size(2) > 0 && v.size(2) % q.size(2) == 0, "q's heads must divide v's heads");
    STD_TORCH_CHECK(q.size(3) > 0 && v.size(2) > 0 && v.size(3) > 0,
                    "heads and head dimensions must be at least 1");
}

inline void check_options(const Optional& beta, const Optional& z, double scale, bool normalize) {
    STD_TORCH_CHECK(std::isfinite(scale), "scale must be finite");
    STD_TORCH_CHECK(!(normalize && beta.has_value()), "normalize must be False with beta");
    STD_TORCH_CHECK(normalize || !z.has_value(), "initial_normalizer needs normalize");
}

// The kind of gates, and the gates, contiguous.
inline Decay read_decay(const Optional& decay, int64_t B, int64_t T, int64_t H, int64_t K, ScalarType dtype,
                        Optional& to) {
    if (!decay.has_value()) return Decay::none;
    if (decay->dim() == 1) {
        to = statistics(*decay, Sizes{H}, dtype, "decay");
        return Decay::constant;
    }
    if (decay->dim() == 3) {
        to = statistics(*decay, Sizes{B, T, H}, dtype, "decay");
        return Decay::scalar;
    }
    to = statistics(*decay, Sizes{B, T, H, K}, dtype, "decay");
    return Decay::channel;
}

}  // namespace slm
