// What the operators' arguments must be, on any device.
#pragma once

#include <cmath>
#include <optional>

#include "../common/tensors.h"

namespace slm::sliding_window {

using Optional = std::optional<Tensor>;

inline void check_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& sinks,
                          const Optional& cu, const Optional& cu_k, int64_t left, int64_t right, double scale,
                          double softcap) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v must be [B, T, H, D]");
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "q, k, v must have one dtype");
    STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && v.size(1) == k.size(1) &&
                        v.size(2) == k.size(2) && k.size(3) == q.size(3),
                    "q, k, v do not fit together");
    STD_TORCH_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "k's heads must divide q's heads");
    STD_TORCH_CHECK(q.size(3) > 0, "q must have a head dimension of at least 1");
    STD_TORCH_CHECK(std::isfinite(scale) && std::isfinite(softcap) && softcap >= 0,
                    "scale and softcap must be finite, softcap >= 0");
    STD_TORCH_CHECK(left >= -1 && right >= -1, "left and right must be >= 0, or -1 for no bound");
    STD_TORCH_CHECK(cu.has_value() || !cu_k.has_value(), "cu_seqlens_k needs cu_seqlens");
    STD_TORCH_CHECK(!cu.has_value() || q.size(0) == 1, "packed sequences need batch 1, got ", q.size(0));
    STD_TORCH_CHECK(!sinks.has_value() || (sinks->dim() == 1 && sinks->size(0) == q.size(2) &&
                                           sinks->scalar_type() == statistics_type(dtype_of(q))),
                    "sinks must be [Hq], float32 (float64 for float64 inputs)");
}

// What the backward takes beside the forward's arguments.
inline void check_backward(const Tensor& dout, const Optional& dlse, const Tensor& q, const Tensor& v,
                           const Tensor& o, const Tensor& lse) {
    STD_TORCH_CHECK(dout.scalar_type() == q.scalar_type() && o.scalar_type() == q.scalar_type() &&
                        dout.dim() == 4 && o.dim() == 4,
                    "dout and o must be [B, T, Hq, Dv] of q's dtype");
    for (int d = 0; d < 4; ++d) {
        const int64_t expected = d < 3 ? q.size(d) : v.size(3);
        STD_TORCH_CHECK(dout.size(d) == expected && o.size(d) == expected,
                        "dout and o must be [B, T, Hq, Dv]");
    }
    const auto check = [&](const Tensor& x, const char* name) {
        STD_TORCH_CHECK(x.scalar_type() == statistics_type(dtype_of(q)) && x.dim() == 3 &&
                            x.size(0) == q.size(0) && x.size(1) == q.size(2) && x.size(2) == q.size(1),
                        name, " must be [B, Hq, T], float32 (float64 for float64 inputs)");
    };
    check(lse, "lse");
    if (dlse.has_value()) check(*dlse, "dlse");
}

}  // namespace slm::sliding_window
