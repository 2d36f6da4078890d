// What the operators of `route` ask of their tensors, on any device.
#pragma once

#include <optional>

#include "../common/tensors.h"

namespace slm::route {

using Optional = std::optional<Tensor>;

inline void check_logits(const Tensor& logits, const Optional& mask, int64_t score) {
    const ScalarType type = logits.scalar_type();
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1 &&
                        (type == ScalarType::Float || type == ScalarType::Double ||
                         type == ScalarType::BFloat16 || type == ScalarType::Half),
                    "logits must be [T, E], E at least 1, in float32, float64, bfloat16 or float16");
    STD_TORCH_CHECK(score >= 0 && score <= 2, "score must be 0, 1 or 2, got ", score);
    if (!mask.has_value()) return;
    const int64_t dim = mask->dim();
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && (dim == 1 || dim == 2) &&
                        mask->size(dim - 1) == logits.size(1) &&
                        (dim == 1 || mask->size(0) == logits.size(0)),
                    "expert_mask must be bool [E] or [T, E]");
}

inline void check_choice(int64_t E, int64_t k, int64_t groups, int64_t top_groups) {
    STD_TORCH_CHECK(k >= 1 && k <= E, "top_k must be from 1 to E = ", E, ", got ", k);
    STD_TORCH_CHECK(groups >= 1 && E % groups == 0 && top_groups >= 1 && top_groups <= groups,
                    "num_groups must divide E = ", E, ", and top_groups be from 1 to num_groups");
}

// What the backward takes beside the forward's arguments; `high`: the dtype of weights and means.
inline void check_gradients(const Optional& dweights, const Optional& dprobabilities, const Optional& dz,
                            const Tensor& logits, const Tensor& indices, ScalarType high) {
    const int64_t T = logits.size(0);
    STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == T && indices.scalar_type() == ScalarType::Int,
                    "indices must be int32 [T, k] with T = ", T);
    const auto fits = [&](const Optional& x, Sizes shape, const char* name) {
        bool good = !x.has_value() || (x->scalar_type() == high && x->dim() == int64_t(shape.size()));
        for (size_t d = 0; x.has_value() && good && d < shape.size(); ++d)
            good = x->size(int64_t(d)) == *(shape.begin() + d);
        STD_TORCH_CHECK(good, name, " must have the shape and the dtype of what it is the gradient of");
    };
    fits(dweights, {T, indices.size(1)}, "dweights");
    fits(dprobabilities, {logits.size(1)}, "dprobabilities");
    fits(dz, {}, "dz");
}

}  // namespace slm::route
