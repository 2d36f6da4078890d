// What a decode step is, on any device.
#pragma once

#include "../common/tensors.h"
#include "checks.h"
#include "linear.h"

namespace slm {

// Everything a step reads, alive as long as the problem that points into it.
struct StepInputs {
    Tensor q, k, v, o;
    Optional decay, beta;
    LinearStep step;
};

inline StepInputs read_step(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& decay,
                            const Optional& beta, const Tensor& state, const Optional& normalizer,
                            double scale, bool l2norm) {
    check_tokens(q, k, v);
    check_options(beta, normalizer, scale, normalizer.has_value());
    LinearStep s{};
    s.dtype = dtype_of(q);
    const ScalarType exact = statistics_type(s.dtype);
    s.B = q.size(0), s.n = q.size(1), s.Hk = q.size(2), s.H = v.size(2), s.K = q.size(3), s.V = v.size(3);
    STD_TORCH_CHECK(state.is_contiguous() && (!normalizer.has_value() || normalizer->is_contiguous()),
                    "state must be contiguous: it is updated in place");
    statistics(state, Sizes{s.B, s.H, s.K, s.V}, exact, "state");
    if (normalizer.has_value()) statistics(*normalizer, Sizes{s.B, s.H, s.K}, exact, "normalizer");
    StepInputs in{dense_rows(q),
                  dense_rows(k),
                  dense_rows(v),
                  empty(q, {s.B, s.n, s.H, s.V}, q.scalar_type()),
                  {},
                  {},
                  s};
    in.step.decays = read_decay(decay, s.B, s.n, s.H, s.K, exact, in.decay);
    if (beta.has_value()) in.beta = statistics(*beta, Sizes{s.B, s.n, s.H}, exact, "beta");
    in.step.q = rows_of(in.q), in.step.k = rows_of(in.k), in.step.v = rows_of(in.v);
    in.step.o = rows_of(in.o);
    in.step.scale = scale, in.step.l2norm = l2norm;
    return in;
}

}  // namespace slm
