// What the operators of expert_mlp ask of their tensors, on any device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "activation.h"

namespace slm::experts {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

struct Sizes {
    int64_t T, d, n, H, E, k;  // H = 2n of an activation with a gate, else n; k = 1 of segments
    bool gated;
};

inline void check_bias(const Optional& b, const Tensor& x, int64_t E, int64_t size, const char* name) {
    STD_TORCH_CHECK(!b.has_value() || (b->dim() == 2 && b->size(0) == E && b->size(1) == size &&
                                       b->scalar_type() == x.scalar_type()),
                    name, " must be [E, ", size, "] of x's dtype");
}

// All but the values of cu_seqlens.
inline Sizes check(const Tensor& x, const Tensor& indices, const Optional& weights, const Optional& cu,
                   const Tensor& up, const Tensor& down, const Optional& b_up, const Optional& b_down,
                   int64_t activation) {
    STD_TORCH_CHECK(x.dim() == 2 && up.dim() == 3 && down.dim() == 3, "x must be [T, d], weights [E, ., .]");
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                        type == ScalarType::Half,
                    "x must be float32, float64, bfloat16 or float16");
    STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "unknown activation ", activation);
    const bool gated = is_gated(int(activation));
    const int64_t T = x.size(0), d = x.size(1), n = down.size(2), H = gated ? 2 * n : n, E = down.size(0);
    STD_TORCH_CHECK(E > 0 && d > 0 && n > 0 && down.size(1) == d && up.size(0) == E && up.size(1) == H &&
                        up.size(2) == d && up.scalar_type() == type && down.scalar_type() == type,
                    "weights must be [E, ", H, ", ", d, "] and [E, ", d, ", ", n, "] of x's dtype");
    check_bias(b_up, x, E, H, "b_gate_up");
    check_bias(b_down, x, E, d, "b_down");
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int, "indices must be int32");
    if (cu.has_value()) {
        STD_TORCH_CHECK(cu->dim() == 1 && cu->scalar_type() == ScalarType::Int && cu->size(0) > 0,
                        "cu_seqlens must be an int32 tensor [N+1]");
        STD_TORCH_CHECK(indices.dim() == 1 && indices.size(0) + 1 == cu->size(0),
                        "indices must be [N] with cu_seqlens [N+1]");
        STD_TORCH_CHECK(indices.size(0) > 0 || T == 0, "cu_seqlens must have a segment for x's tokens");
        STD_TORCH_CHECK(!weights.has_value(), "weights must be absent beside cu_seqlens");
        return {T, d, n, H, E, 1, gated};
    }
    STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == T && indices.size(1) > 0,
                    "indices must be [T, k]");
    const int64_t k = indices.size(1);
    const ScalarType real = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(weights.has_value() && weights->dim() == 2 && weights->size(0) == T &&
                        weights->size(1) == k && weights->scalar_type() == real,
                    "weights must be [T, k], float32 (float64 of float64 x)");
    return {T, d, n, H, E, k, gated};
}

}  // namespace slm::experts
