// What the decode step asks of its tensors, on any device.
#pragma once

#include <cmath>
#include <optional>

#include "../common/tensors.h"

namespace slm::sliding_window {

struct StepSizes {
    int64_t B, n, Hq, H, D, Dv, W;
};

inline StepSizes check_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_ring,
                            const Tensor& v_ring, const Tensor& position, const std::optional<Tensor>& sinks,
                            double scale, double softcap) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k_ring.dim() == 4 && v_ring.dim() == 4,
                    "q, k, v and the rings must have four dimensions");
    const StepSizes s{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), v.size(3), k_ring.size(2)};
    for (const Tensor* x : {&k, &v, &k_ring, &v_ring})
        STD_TORCH_CHECK(x->scalar_type() == q.scalar_type() && x->size(0) == s.B,
                        "q, k, v and the rings must have one dtype and batch");
    STD_TORCH_CHECK(k.size(1) == s.n && v.size(1) == s.n && v.size(2) == s.H && k.size(3) == s.D &&
                        k_ring.size(1) == s.H && k_ring.size(3) == s.D && v_ring.size(1) == s.H &&
                        v_ring.size(2) == s.W && v_ring.size(3) == s.Dv && s.H > 0 && s.Hq % s.H == 0 &&
                        s.W > 0,
                    "q, k, v and the rings do not fit together");
    STD_TORCH_CHECK(k_ring.is_contiguous() && v_ring.is_contiguous() && position.is_contiguous() &&
                        position.scalar_type() == ScalarType::Long && position.dim() == 2 &&
                        position.size(0) == s.B && position.size(1) == s.H,
                    "rings must be contiguous, position int64 [B, H]");
    STD_TORCH_CHECK(!sinks.has_value() ||
                        (sinks->numel() == s.Hq && sinks->scalar_type() == statistics_type(dtype_of(q))),
                    "sinks must be [Hq], float32 (float64 for float64 inputs)");
    STD_TORCH_CHECK(std::isfinite(scale) && std::isfinite(softcap) && softcap >= 0,
                    "scale and softcap must be finite, softcap >= 0");
    return s;
}

}  // namespace slm::sliding_window
