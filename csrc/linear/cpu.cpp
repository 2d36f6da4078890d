// The CPU operators of linear attention: check tensors, lay out the work, hand it to the kernels of the tier
// in use.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/subnormals.h"
#include "../common/tensors.h"
#include "checks.h"
#include "step.h"

namespace {

using slm::check_options;
using slm::check_tokens;
using slm::Decay;
using slm::dense_rows;
using slm::Dtype;
using slm::dtype_of;
using slm::fresh;
using slm::offsets;
using slm::read_decay;
using slm::rows_of;
using slm::Sequence;
using slm::Sizes;
using slm::statistics;
using slm::statistics_type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

const slm::LinearKernels& kernels() {
#if defined(__x86_64__)
    if (slm::get_isa() == slm::Isa::avx512) return slm::linear_avx512;
    if (slm::get_isa() == slm::Isa::avx2) return slm::linear_avx2;
#endif
    return slm::linear_portable;
}

// Tokens a chunk, whatever the problem. On two Zen 4 cores, one run each on a busy machine and before the
// backward kept its states transposed, forward + backward in ms for chunks of 16, 32, 64 tokens (B = 1, 8
// heads): plain T = 4096, K = V = 64: 29, 24, 36; 128: 94, 73, 68; gated delta T = 2048, 64: 22, 19, 19; T
// = 4096, 128: 118, 102, 116; GLA 19, 14, 19; KDA 26, 21, 29. Short chunks read and write the state more
// often, long ones compute larger triangles.
constexpr int64_t kChunk = 32;

// Value columns a task: cut where heads are fewer than `wanted`, as long as 32 columns are left. A forward's
// bits do not depend on the cut, so it asks for a task a thread. A backward sums over columns, and asks for a
// few in any case: its bits must not know the number of threads.
constexpr int64_t kFewTasks = 4;

int64_t task_columns(int64_t heads, int64_t V, int64_t wanted) {
    int64_t parts = 1;
    while (heads * parts < wanted && V / (2 * parts) >= 32) parts *= 2;
    return std::max<int64_t>(1, (V + parts - 1) / parts);
}

struct Inputs {
    Tensor q, k, v;
    Optional decay, beta, state, z;
    std::vector<Sequence> sequences;
    slm::LinearProblem problem;
    int64_t B;

    const void* data(const Optional& x) const { return x.has_value() ? x->data_ptr() : nullptr; }
};

Inputs read_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& decay,
                   const Optional& beta, const Optional& state, const Optional& z, const Optional& cu,
                   double scale, bool normalize, bool l2norm, int64_t segment) {
    check_tokens(q, k, v);
    check_options(beta, z, scale, normalize);
    STD_TORCH_CHECK(segment >= 0 && segment % 64 == 0, "segment must be a multiple of 64, or 0");
    Inputs in{dense_rows(q), dense_rows(k), dense_rows(v), {}, {}, {}, {}, {}, {}, q.size(0)};
    slm::LinearProblem& p = in.problem;
    p.dtype = dtype_of(q);
    const ScalarType exact = statistics_type(p.dtype);
    p.T = q.size(1), p.Hk = q.size(2), p.H = v.size(2), p.K = q.size(3), p.V = v.size(3);
    p.q = rows_of(in.q), p.k = rows_of(in.k), p.v = rows_of(in.v);
    p.decays = read_decay(decay, in.B, p.T, p.H, p.K, exact, in.decay);
    if (beta.has_value()) in.beta = statistics(*beta, Sizes{in.B, p.T, p.H}, exact, "beta");
    if (cu.has_value()) {
        STD_TORCH_CHECK(in.B == 1, "packed sequences need batch 1, got ", in.B);
        const auto starts = offsets(*cu, p.T, "cu_seqlens");
        for (size_t n = 0; n + 1 < starts.size(); ++n)
            in.sequences.push_back({0, {starts[n], starts[n + 1]}});
    } else {
        for (int64_t b = 0; b < in.B; ++b) in.sequences.push_back({b, {0, p.T}});
    }
    const int64_t N = int64_t(in.sequences.size());
    if (state.has_value()) in.state = statistics(*state, Sizes{N, p.H, p.K, p.V}, exact, "initial_state");
    if (z.has_value()) in.z = statistics(*z, Sizes{N, p.H, p.K}, exact, "initial_normalizer");
    p.decay = in.data(in.decay), p.beta = in.data(in.beta);
    p.state0 = in.data(in.state), p.z0 = in.data(in.z);
    p.sequences = in.sequences.data(), p.num_sequences = N;
    p.segment = segment;
    p.chunk = kChunk;
    p.columns = task_columns(N * p.H, p.V, kFewTasks);
    p.scale = scale, p.normalize = normalize, p.l2norm = l2norm;
    return in;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                   Optional decay, Optional beta, Optional initial_state,
                                                   Optional initial_normalizer, Optional cu, double scale,
                                                   bool normalize, bool l2norm, int64_t segment) {
    Inputs in = read_inputs(q, k, v, decay, beta, initial_state, initial_normalizer, cu, scale, normalize,
                            l2norm, segment);
    slm::LinearProblem& p = in.problem;
    const ScalarType exact = statistics_type(p.dtype);
    const int64_t N = p.num_sequences;
    p.columns = task_columns(N * p.H, p.V, std::max<int64_t>(kFewTasks, torch::stable::get_num_threads()));
    Tensor o = fresh(q, {in.B, p.T, p.H, p.V}, q.scalar_type(), false);
    Tensor state = fresh(q, {N, p.H, p.K, p.V}, exact, false);
    Tensor z = normalize ? fresh(q, {N, p.H, p.K}, exact, false) : slm::empty(q, {0}, exact);
    Tensor kept = segment
                      ? fresh(q, {in.B, p.T / segment, p.H, p.K * p.V + (normalize ? p.K : 0)}, exact, false)
                      : slm::empty(q, {0}, exact);
    p.o = rows_of(o), p.state = state.data_ptr(), p.z = z.data_ptr(), p.kept = kept.data_ptr();
    const auto& tier = kernels();
    torch::stable::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
        const slm::WithoutSubnormals here;
        tier.forward(p, begin, end);
    });
    return {o, state, z, kept};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dout, Optional dstate, Optional dz, const Tensor& q, const Tensor& k,
                   const Tensor& v, Optional decay, Optional beta, Optional initial_state,
                   Optional initial_normalizer, Optional cu, const Tensor& kept, double scale, bool normalize,
                   bool l2norm, int64_t segment) {
    Inputs in = read_inputs(q, k, v, decay, beta, initial_state, initial_normalizer, cu, scale, normalize,
                            l2norm, segment);
    slm::LinearGradient g{};
    g.problem = in.problem;
    slm::LinearProblem& p = g.problem;
    const ScalarType exact = statistics_type(p.dtype);
    const int64_t B = in.B, N = p.num_sequences, parts = p.parts(), group = p.H / p.Hk;
    STD_TORCH_CHECK(segment > 0, "segment must be that of a forward that kept its states");
    const Tensor states = statistics(kept, Sizes{B, p.T / segment, p.H, p.K * p.V + (normalize ? p.K : 0)},
                                     exact, "checkpoints");
    p.kept = states.data_ptr();
    STD_TORCH_CHECK(dout.dim() == 4 && dout.scalar_type() == q.scalar_type(),
                    "dout must be [B, T, H, V] of q's dtype");
    for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(dout.size(d) == v.size(d), "dout must have v's shape");
    const Tensor douts = dense_rows(dout);
    Optional dstates, dzs;
    if (dstate.has_value()) dstates = statistics(*dstate, Sizes{N, p.H, p.K, p.V}, exact, "dstate");
    if (dz.has_value()) dzs = statistics(*dz, Sizes{N, p.H, p.K}, exact, "dnormalizer");
    g.dout = rows_of(douts), g.dstate = in.data(dstates), g.dz = in.data(dzs);

    const auto empty = [&](bool there, Sizes shape) {
        return there ? fresh(q, shape, exact, false) : slm::empty(q, {0}, exact);
    };
    const auto& tier = kernels();
    const auto sum_parts = [&](const Tensor& from, const Tensor& to, int64_t rows, int64_t count, int64_t n) {
        const Dtype dtype = dtype_of(to);
        torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 65536 / std::max<int64_t>(count * n, 1)),
                                    [&](int64_t begin, int64_t end) {
                                        tier.sum_parts(dtype, from.data_ptr(), to.data_ptr(), count, n, begin,
                                                       end);
                                    });
    };
    const Tensor dq = fresh(q, {B, p.T, p.Hk, p.K}, q.scalar_type(), false);
    const Tensor dk = fresh(q, {B, p.T, p.Hk, p.K}, q.scalar_type(), false);
    const Tensor dv = fresh(q, {B, p.T, p.H, p.V}, q.scalar_type(), false);
    g.dv = rows_of(dv);
    const int64_t summands = group * parts;
    g.summed = summands > 1;
    const Tensor dqs = g.summed ? empty(true, {B, p.T, p.Hk, summands, p.K}) : dq;
    const Tensor dks = g.summed ? empty(true, {B, p.T, p.Hk, summands, p.K}) : dk;
    g.dq = dqs.data_ptr(), g.dk = dks.data_ptr();

    const bool gated = p.decays != Decay::none, channel = p.decays == Decay::channel;
    const bool constant = p.decays == Decay::constant;
    const int64_t gates = channel ? p.K : 1;
    const Tensor ddecay = constant  ? empty(true, {p.H})
                          : channel ? empty(true, {B, p.T, p.H, p.K})
                                    : empty(gated, {B, p.T, p.H});
    const Tensor dbeta = empty(beta.has_value(), {B, p.T, p.H});
    const Tensor ddecays = constant    ? slm::empty(q, {N, p.H, parts}, ScalarType::Double)
                           : parts > 1 ? empty(gated, {B, p.T, p.H, parts, gates})
                                       : ddecay;
    const Tensor dbetas = parts > 1 ? empty(beta.has_value(), {B, p.T, p.H, parts}) : dbeta;
    const Tensor dstate0 = empty(initial_state.has_value(), {N, p.H, p.K, p.V});
    const Tensor dz0 = empty(initial_normalizer.has_value(), {N, p.H, p.K});
    const Tensor dz0s = parts > 1 ? empty(initial_normalizer.has_value(), {N, p.H, parts, p.K}) : dz0;
    g.ddecay = ddecays.data_ptr(), g.dbeta = dbetas.data_ptr();
    g.dstate0 = initial_state.has_value() ? dstate0.data_ptr() : nullptr;
    g.dz0 = initial_normalizer.has_value() ? dz0s.data_ptr() : nullptr;
    torch::stable::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
        const slm::WithoutSubnormals here;
        tier.backward(g, begin, end);
    });

    if (g.summed) {
        sum_parts(dqs, dq, B * p.T * p.Hk, summands, p.K);
        sum_parts(dks, dk, B * p.T * p.Hk, summands, p.K);
    }
    if (constant) {
        const double* from = static_cast<const double*>(ddecays.data_ptr());
        for (int64_t h = 0; h < p.H; ++h) {
            double sum = 0;  // in the order of the sequences
            for (int64_t n = 0; n < N; ++n)
                for (int64_t part = 0; part < parts; ++part) sum += from[(n * p.H + h) * parts + part];
            if (p.dtype == Dtype::f64)
                static_cast<double*>(ddecay.data_ptr())[h] = sum;
            else
                static_cast<float*>(ddecay.data_ptr())[h] = float(sum);
        }
    } else if (gated && parts > 1) {
        sum_parts(ddecays, ddecay, B * p.T * p.H, parts, gates);
    }
    if (beta.has_value() && parts > 1) sum_parts(dbetas, dbeta, B * p.T * p.H, parts, 1);
    if (initial_normalizer.has_value() && parts > 1) sum_parts(dz0s, dz0, N * p.H, parts, p.K);
    return {dq, dk, dv, ddecay, dbeta, dstate0, dz0};
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, Optional decay, Optional beta, Tensor state,
            Optional normalizer, double scale, bool l2norm) {
    slm::StepInputs in = slm::read_step(q, k, v, decay, beta, state, normalizer, scale, l2norm);
    slm::LinearStep& s = in.step;
    s.decay = in.decay.has_value() ? in.decay->data_ptr() : nullptr;
    s.beta = in.beta.has_value() ? in.beta->data_ptr() : nullptr;
    s.state = state.data_ptr(), s.z = normalizer.has_value() ? normalizer->data_ptr() : nullptr;
    const auto& tier = kernels();
    const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(1, s.n * s.K * s.V));
    torch::stable::parallel_for(0, s.B * s.H, grain, [&](int64_t begin, int64_t end) {
        const slm::WithoutSubnormals here;
        tier.step(s, begin, end);
    });
    return in.o;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slmkernels, CPU, m) {
    m.impl("linear_attention_forward", TORCH_BOX(&forward));
    m.impl("linear_attention_backward", TORCH_BOX(&backward));
    m.impl("linear_attention_step", TORCH_BOX(&step));
}
