// The CPU operators of `route`: check tensors, lay out the work, hand it to the kernels of the tier in use.
#include "route.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/isa.h"
#include "../common/tensors.h"
#include "route_checks.h"

namespace {

using slm::dense_rows;
using slm::Dtype;
using slm::fresh;
using slm::statistics;
using slm::statistics_type;
using slm::route::Choice;
using slm::route::Gradient;
using slm::route::kBlock;
using slm::route::Kernels;
using slm::route::Problem;
using slm::route::Score;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kGrain = int64_t(1) << 15;  // logits that are worth a thread

const Kernels& kernels() {
#if defined(__x86_64__)
    if (slm::get_isa() == slm::Isa::avx512) return slm::route::kernels_avx512;
    if (slm::get_isa() == slm::Isa::avx2) return slm::route::kernels_avx2;
#endif
    return slm::route::kernels_portable;
}

// Everything a call reads, alive as long as the problem that points into it. Not to be moved.
struct Inputs {
    Tensor logits;
    Optional mask;
    ScalarType high;  // of weights and sums
    Problem problem{};

    Inputs(const Tensor& logits_, const Optional& mask_, int64_t score, bool renormalize, double scale)
        : logits(dense_rows(logits_)) {
        slm::route::check_logits(logits, mask_, score);
        Problem& p = problem;
        p.dtype = slm::dtype_of(logits), high = statistics_type(p.dtype);
        p.score = Score(score), p.renormalize = renormalize, p.scale = scale;
        p.T = logits.size(0), p.E = logits.size(1);
        p.logits = logits.data_ptr(), p.logits_row = logits.stride(0);
        if (!mask_.has_value()) return;
        mask = dense_rows(*mask_);
        p.mask = static_cast<const uint8_t*>(mask->data_ptr()),
        p.mask_row = mask->dim() == 1 ? 0 : mask->stride(0);
    }

    template <typename Body>
    void for_blocks(const Body& body) const {
        const int64_t least = std::max<int64_t>(1, kGrain / (kBlock * problem.E));
        torch::stable::parallel_for(0, problem.blocks(), least, body);
    }
};

// Block sums, in their order -> counts and means.
template <typename F>
void reduce(const Choice& c, int32_t* counts, F* probabilities, F* z, F* entropy) {
    const Problem& p = c.problem;
    std::vector<double> sums(size_t(p.E + 2), 0.0);
    std::fill(counts, counts + p.E, 0);
    for (int64_t block = 0; block < p.blocks(); ++block) {
        const F* of = static_cast<const F*>(c.sums) + block * (p.E + 2);
        for (int64_t e = 0; e < p.E + 2; ++e) sums[size_t(e)] += double(of[e]);
        for (int64_t e = 0; e < p.E; ++e) counts[e] += c.counts[block * p.E + e];
    }
    const double n = double(std::max<int64_t>(1, p.T));
    for (int64_t e = 0; e < p.E; ++e) probabilities[e] = F(sums[size_t(e)] / n);
    *z = F(sums[size_t(p.E)] / n), *entropy = F(sums[size_t(p.E + 1)] / n);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results forward(const Tensor& logits, Optional bias, Optional mask, int64_t k, int64_t score,
                bool renormalize, int64_t groups, int64_t top_groups, double scale) {
    Inputs in(logits, mask, score, renormalize, scale);
    Problem& p = in.problem;
    slm::route::check_choice(p.E, k, groups, top_groups);
    p.k = k;
    if (bias.has_value()) bias = statistics(*bias, {p.E}, in.high, "selection_bias");
    const Tensor indices = fresh(logits, {p.T, k}, ScalarType::Int, false);
    const Tensor weights = fresh(logits, {p.T, k}, in.high, false);
    const Tensor counts = fresh(logits, {p.E}, ScalarType::Int, false);
    const Tensor probabilities = fresh(logits, {p.E}, in.high, false);
    const Tensor z = fresh(logits, {}, in.high, false), entropy = fresh(logits, {}, in.high, false);
    const Tensor lse = fresh(logits, {p.T}, in.high, false);
    const std::unique_ptr<int32_t[]> block_counts(new int32_t[size_t(p.blocks() * p.E)]);
    const std::unique_ptr<double[]> sums(new double[size_t(p.blocks() * (p.E + 2))]);
    const Choice c{p,
                   groups,
                   top_groups,
                   bias.has_value() ? bias->data_ptr() : nullptr,
                   static_cast<int32_t*>(indices.data_ptr()),
                   weights.data_ptr(),
                   lse.data_ptr(),
                   block_counts.get(),
                   sums.get()};
    const auto& tier = kernels();
    in.for_blocks([&](int64_t begin, int64_t end) { tier.forward(c, begin, end); });
    const auto finish = [&](auto* mean) {
        using F = std::remove_pointer_t<decltype(mean)>;
        reduce<F>(c, static_cast<int32_t*>(counts.data_ptr()), mean, static_cast<F*>(z.data_ptr()),
                  static_cast<F*>(entropy.data_ptr()));
    };
    if (p.dtype == Dtype::f64)
        finish(static_cast<double*>(probabilities.data_ptr()));
    else
        finish(static_cast<float*>(probabilities.data_ptr()));
    return {indices, weights, counts, probabilities, z, entropy, lse};
}

template <typename F>
F value(const Optional& x) {
    return x.has_value() ? *static_cast<const F*>(x->data_ptr()) : F(0);
}

// d(probabilities) / T, in whole registers.
template <typename F>
void spread(const Optional& from, const Problem& p, double* to) {
    F* dmean = reinterpret_cast<F*>(to);
    for (int64_t e = 0; from.has_value() && e < p.E; ++e)
        dmean[e] = static_cast<const F*>(from->data_ptr())[e * from->stride(0)] / F(p.T);
}

Tensor backward(Optional dweights, Optional dprobabilities, Optional dz, const Tensor& logits, Optional mask,
                const Tensor& indices, const Tensor& lse, int64_t score, bool renormalize, double scale) {
    Inputs in(logits, mask, score, renormalize, scale);
    Problem& p = in.problem;
    const Tensor dlogits = fresh(logits, {p.T, p.E}, logits.scalar_type(), false);
    slm::route::check_gradients(dweights, dprobabilities, dz, logits, indices, in.high);
    p.k = indices.size(1);
    const Tensor index = slm::dense(indices), total = statistics(lse, {p.T}, in.high, "lse");
    Gradient g{};
    g.problem = p;
    g.indices = static_cast<const int32_t*>(index.data_ptr()), g.lse = total.data_ptr();
    g.dlogits = dlogits.data_ptr(), g.dense = dprobabilities.has_value() || dz.has_value();
    if (p.T == 0) return dlogits;
    if (dweights.has_value()) {
        g.dweights = dweights->data_ptr();
        g.dweights_row = dweights->stride(0), g.dweights_column = dweights->stride(1);
    }
    std::vector<double> dmean(size_t(p.E + 64), 0.0);
    g.dmean = dmean.data();
    const bool exact = p.dtype == Dtype::f64;
    (exact ? spread<double> : spread<float>)(dprobabilities, p, dmean.data());
    g.dz = 2 * (exact ? value<double>(dz) : double(value<float>(dz))) / double(p.T);
    const auto& tier = kernels();
    in.for_blocks([&](int64_t begin, int64_t end) { tier.backward(g, begin, end); });
    return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slmkernels, CPU, m) {
    m.impl("route_forward", TORCH_BOX(&forward));
    m.impl("route_backward", TORCH_BOX(&backward));
}
