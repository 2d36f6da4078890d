// The CPU operators of hybrid attention: check tensors, lay out the work, hand it to the kernels of the tier
// in use.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensors.h"
#include "hybrid.h"

namespace {

using slm::dense_rows;
using slm::Dtype;
using slm::dtype_of;
using slm::empty;
using slm::fresh;
using slm::HybridSequence;
using slm::offsets;
using slm::rows_of;
using slm::Sizes;
using slm::statistics;
using slm::statistics_type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kUnit = 512;  // tokens between kept states are a multiple of it, or of the window's blocks
constexpr int64_t kFewTasks = 4;  // a backward's tasks; not the number of threads, which bits must not know

const slm::HybridKernels& kernels() {
#if defined(__x86_64__)
    if (slm::get_isa() == slm::Isa::avx512) return slm::hybrid_avx512;
    if (slm::get_isa() == slm::Isa::avx2) return slm::hybrid_avx2;
#endif
    return slm::hybrid_portable;
}

void check_tokens(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi_q,
                  const Tensor& phi_k) {
    for (const Tensor* x : {&q, &k, &v, &phi_q, &phi_k}) {
        STD_TORCH_CHECK(x->dim() == 4, "q, k, v, phi_q, phi_k must be [B, T, H, D]");
        STD_TORCH_CHECK(x->scalar_type() == q.scalar_type(), "q, k, v, phi_q, phi_k must have one dtype");
        STD_TORCH_CHECK(x->size(0) == q.size(0), "q, k, v, phi_q, phi_k must have one batch");
        STD_TORCH_CHECK(x->size(2) > 0 && x->size(3) > 0, "heads and head dimensions must be at least 1");
    }
    for (int64_t d = 1; d < 3; ++d)
        STD_TORCH_CHECK(v.size(d) == k.size(d) && phi_k.size(d) == k.size(d) && phi_q.size(d) == q.size(d),
                        "v and phi_k must have k's length and heads, phi_q those of q");
    STD_TORCH_CHECK(k.size(3) == q.size(3) && phi_k.size(3) == phi_q.size(3),
                    "k must have q's head dimension, phi_k that of phi_q");
    STD_TORCH_CHECK(q.size(2) % k.size(2) == 0, "k's heads must divide q's heads");
}

// The fewest parts of a group of query heads that make `wanted` tasks of `heads`, or as many as there are.
int64_t parts_of(int64_t heads, int64_t group, int64_t wanted) {
    int64_t parts = 1;
    while (heads > 0 && parts < group && heads * parts < wanted) {
        ++parts;
        while (group % parts != 0) ++parts;
    }
    return parts;
}

struct Inputs {
    Tensor q, k, v, phi_q, phi_k;
    Optional mix, state, z;
    std::vector<HybridSequence> sequences;
    slm::HybridProblem problem;
    int64_t B;
};

const void* data(const Optional& x) { return x.has_value() ? x->data_ptr() : nullptr; }

Inputs read_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi_q,
                   const Tensor& phi_k, const Optional& mix, const Optional& state, const Optional& z,
                   const Optional& cu, int64_t window, bool block, double scale, int64_t segment) {
    check_tokens(q, k, v, phi_q, phi_k);
    STD_TORCH_CHECK(std::isfinite(scale), "scale must be finite");
    STD_TORCH_CHECK(window >= 1, "window must be at least 1");
    STD_TORCH_CHECK(state.has_value() == z.has_value(), "initial_state needs initial_normalizer beside it");
    Inputs in{
        dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(phi_q), dense_rows(phi_k), {}, {}, {}, {}, {},
        q.size(0)};
    slm::HybridProblem& p = in.problem;
    p.dtype = dtype_of(q);
    const ScalarType exact = statistics_type(p.dtype);
    p.T = q.size(1), p.S = k.size(1), p.Hq = q.size(2), p.H = k.size(2);
    p.D = q.size(3), p.V = v.size(3), p.F = phi_q.size(3);
    STD_TORCH_CHECK(p.S >= p.T && p.S <= INT32_MAX, "k must have at least q's length, and less than 2^31");
    p.bf16_dot = p.dtype == Dtype::bf16 && slm::get_isa() == slm::Isa::avx512 && slm::has_bf16_dot() &&
                 p.D % 2 == 0 && p.V % 2 == 0;  // products take pairs along D
    p.q = rows_of(in.q), p.k = rows_of(in.k), p.v = rows_of(in.v);
    p.phi_q = rows_of(in.phi_q), p.phi_k = rows_of(in.phi_k);
    if (cu.has_value()) {
        STD_TORCH_CHECK(in.B == 1 && p.S == p.T, "packed sequences need batch 1 and k as long as q");
        const auto starts = offsets(*cu, p.T, "cu_seqlens");
        for (size_t n = 0; n + 1 < starts.size(); ++n)
            in.sequences.push_back({0, {starts[n], starts[n + 1]}, {starts[n], starts[n + 1]}});
    } else {
        for (int64_t b = 0; b < in.B; ++b) in.sequences.push_back({b, {0, p.T}, {0, p.S}});
    }
    p.sequences = in.sequences.data(), p.num_sequences = int64_t(in.sequences.size());
    const int64_t N = p.num_sequences;
    if (mix.has_value()) in.mix = statistics(*mix, Sizes{p.Hq}, exact, "mix");
    if (state.has_value()) in.state = statistics(*state, Sizes{N, p.H, p.F, p.V}, exact, "initial_state");
    if (z.has_value()) in.z = statistics(*z, Sizes{N, p.H, p.F}, exact, "initial_normalizer");
    p.mix = data(in.mix), p.state0 = data(in.state), p.z0 = data(in.z);
    // A window past the sequence is as good as the sequence, and cannot overflow.
    const int64_t W = std::min(window, std::max<int64_t>(p.S, 1));
    p.band = {W - 1, 0, block ? W : 0};
    p.unit = block ? W * std::max<int64_t>(1, kUnit / W) : kUnit;
    STD_TORCH_CHECK(segment >= 0 && (segment == 0 || segment % p.unit == 0 || segment >= p.S),
                    "segment must be a multiple of ", p.unit, ", or 0");
    p.segment = segment;
    p.parts = 1;
    p.scale = scale;
    return in;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi_q, const Tensor& phi_k,
                Optional mix, Optional initial_state, Optional initial_normalizer, Optional cu,
                int64_t window, bool block, double scale, int64_t segment) {
    Inputs in = read_inputs(q, k, v, phi_q, phi_k, mix, initial_state, initial_normalizer, cu, window, block,
                            scale, segment);
    slm::HybridProblem& p = in.problem;
    const ScalarType exact = statistics_type(p.dtype);
    const int64_t N = p.num_sequences;
    // Parts compute the state again; a forward's bits do not depend on them.
    p.parts = parts_of(N * p.H, p.Hq / p.H, torch::stable::get_num_threads());
    Tensor o = fresh(q, {in.B, p.T, p.Hq, p.V}, q.scalar_type(), false);
    Tensor state = fresh(q, {N, p.H, p.F, p.V}, exact, false);
    Tensor z = fresh(q, {N, p.H, p.F}, exact, false);
    Tensor shift = fresh(q, {in.B, p.Hq, p.T}, exact, false);
    Tensor top = fresh(q, {in.B, p.Hq, p.T}, ScalarType::Int, false);
    Tensor denominator = fresh(q, {in.B, p.Hq, p.T}, exact, false);
    Tensor kept =
        segment ? fresh(q, {in.B, p.S / segment, p.H, p.F * (p.V + 1)}, exact, false) : empty(q, {0}, exact);
    p.o = rows_of(o), p.state = state.data_ptr(), p.z = z.data_ptr(), p.kept = kept.data_ptr();
    p.shift = shift.data_ptr(), p.denominator = denominator.data_ptr();
    p.top = static_cast<int32_t*>(top.data_ptr());
    const auto& tier = kernels();
    torch::stable::parallel_for(0, p.tasks(), 1,
                                [&](int64_t begin, int64_t end) { tier.forward(p, begin, end); });
    return {o, state, z, shift, top, denominator, kept};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dout, Optional dstate, Optional dz, const Tensor& q, const Tensor& k,
                   const Tensor& v, const Tensor& phi_q, const Tensor& phi_k, Optional mix,
                   Optional initial_state, Optional initial_normalizer, Optional cu, const Tensor& o,
                   const Tensor& shift, const Tensor& top, const Tensor& denominator, const Tensor& kept,
                   int64_t window, bool block, double scale, int64_t segment) {
    Inputs in = read_inputs(q, k, v, phi_q, phi_k, mix, initial_state, initial_normalizer, cu, window, block,
                            scale, segment);
    slm::HybridGradient g{};
    g.problem = in.problem;
    slm::HybridProblem& p = g.problem;
    const ScalarType exact = statistics_type(p.dtype);
    const int64_t B = in.B, N = p.num_sequences;
    STD_TORCH_CHECK(segment > 0, "segment must be that of a forward that kept its states");
    STD_TORCH_CHECK(p.S == p.T, "k must have q's length in the backward");
    for (const Tensor* x : {&dout, &o}) {
        bool fits = x->dim() == 4 && x->scalar_type() == q.scalar_type();
        const int64_t shape[] = {B, p.T, p.Hq, p.V};
        for (int d = 0; fits && d < 4; ++d) fits = x->size(d) == shape[d];
        STD_TORCH_CHECK(fits, "dout and o must be [B, T, Hq, V] of q's dtype");
    }
    const Sizes per_row{B, p.Hq, p.T};
    const Tensor shifts = statistics(shift, per_row, exact, "shift");
    const Tensor sums = statistics(denominator, per_row, exact, "denominator");
    const Tensor tops = statistics(top, per_row, ScalarType::Int, "top");
    const Tensor states =
        statistics(kept, Sizes{B, p.S / segment, p.H, p.F * (p.V + 1)}, exact, "checkpoints");
    const Tensor douts = dense_rows(dout), outs = dense_rows(o);
    Optional dstates, dzs;
    if (dstate.has_value()) dstates = statistics(*dstate, Sizes{N, p.H, p.F, p.V}, exact, "dstate");
    if (dz.has_value()) dzs = statistics(*dz, Sizes{N, p.H, p.F}, exact, "dnormalizer");
    g.dout = rows_of(douts), p.o = rows_of(outs), p.kept = states.data_ptr();
    g.dstate = data(dstates), g.dz = data(dzs);
    p.shift = shifts.data_ptr(), p.denominator = sums.data_ptr();
    p.top = static_cast<int32_t*>(tops.data_ptr());
    const int32_t* rows = p.top;
    for (int64_t n = 0; n < tops.numel(); ++n)
        STD_TORCH_CHECK(rows[n] >= 0 && rows[n] < p.S, "top must hold rows of k");
    p.parts = parts_of(N * p.H, p.Hq / p.H, kFewTasks);

    const int64_t parts = p.parts;
    const ScalarType dtype = q.scalar_type();
    const Tensor dq = fresh(q, {B, p.T, p.Hq, p.D}, dtype, false);
    const Tensor dphi_q = fresh(q, {B, p.T, p.Hq, p.F}, dtype, false);
    g.dq = rows_of(dq), g.dphi_q = rows_of(dphi_q);
    const auto of_keys = [&](int64_t size) { return fresh(q, {B, p.S, p.H, size}, dtype, false); };
    const Tensor dk = of_keys(p.D), dv = of_keys(p.V), dphi_k = of_keys(p.F);
    const auto partial = [&](const Tensor& x, int64_t size) {
        return parts > 1 ? fresh(q, {B, p.S, p.H, parts, size}, exact, false) : x;
    };
    const Tensor dks = partial(dk, p.D), dvs = partial(dv, p.V), dphi_ks = partial(dphi_k, p.F);
    g.dk = dks.data_ptr(), g.dv = dvs.data_ptr(), g.dphi_k = dphi_ks.data_ptr();

    const bool with_state = initial_state.has_value();
    const auto none = [&] { return empty(q, {0}, exact); };  // results must not alias
    const Tensor dstate0 = with_state ? fresh(q, {N, p.H, p.F, p.V}, exact, false) : none();
    const Tensor dz0 = with_state ? fresh(q, {N, p.H, p.F}, exact, false) : none();
    const Tensor dstate0s =
        with_state && parts > 1 ? fresh(q, {N, p.H, parts, p.F, p.V}, exact, false) : dstate0;
    const Tensor dz0s = with_state && parts > 1 ? fresh(q, {N, p.H, parts, p.F}, exact, false) : dz0;
    if (with_state) g.dstate0 = dstate0s.data_ptr(), g.dz0 = dz0s.data_ptr();
    std::vector<double> dmixes(size_t(mix.has_value() ? N * p.Hq : 0));
    g.dmix = mix.has_value() ? dmixes.data() : nullptr;
    const auto& tier = kernels();
    torch::stable::parallel_for(0, p.tasks(), 1,
                                [&](int64_t begin, int64_t end) { tier.backward(g, begin, end); });

    const auto sum_parts = [&](const Tensor& from, const Tensor& to, int64_t count, int64_t n) {
        const Dtype result = dtype_of(to);
        torch::stable::parallel_for(
            0, count, std::max<int64_t>(1, 65536 / (parts * n)), [&](int64_t begin, int64_t end) {
                tier.sum_parts(result, from.data_ptr(), to.data_ptr(), parts, n, begin, end);
            });
    };
    if (parts > 1) {
        sum_parts(dks, dk, B * p.S * p.H, p.D);
        sum_parts(dvs, dv, B * p.S * p.H, p.V);
        sum_parts(dphi_ks, dphi_k, B * p.S * p.H, p.F);
        if (with_state) {
            sum_parts(dstate0s, dstate0, N * p.H, p.F * p.V);
            sum_parts(dz0s, dz0, N * p.H, p.F);
        }
    }
    const Tensor dmix = empty(q, {mix.has_value() ? p.Hq : 0}, exact);
    for (int64_t h = 0; mix.has_value() && h < p.Hq; ++h) {
        double sum = 0;  // in the order of the sequences
        for (int64_t n = 0; n < N; ++n) sum += dmixes[size_t(n * p.Hq + h)];
        if (p.dtype == Dtype::f64)
            static_cast<double*>(dmix.data_ptr())[h] = sum;
        else
            static_cast<float*>(dmix.data_ptr())[h] = float(sum);
    }
    return {dq, dk, dv, dphi_q, dphi_k, dmix, dstate0, dz0};
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi_q, const Tensor& phi_k,
            Tensor k_ring, Tensor v_ring, Tensor phi_ring, Tensor state, Tensor normalizer, Tensor position,
            Optional mix, int64_t window, bool block, double scale) {
    check_tokens(q, k, v, phi_q, phi_k);
    STD_TORCH_CHECK(std::isfinite(scale), "scale must be finite");
    slm::HybridStep s{};
    s.dtype = dtype_of(q);
    const ScalarType exact = statistics_type(s.dtype);
    s.B = q.size(0), s.n = q.size(1), s.Hq = q.size(2), s.H = k.size(2);
    s.D = q.size(3), s.V = v.size(3), s.F = phi_q.size(3);
    STD_TORCH_CHECK(k.size(1) == s.n, "k must have q's length");
    STD_TORCH_CHECK(k_ring.dim() == 4, "k_ring must be [B, H, R, D]");
    s.W = window, s.R = k_ring.size(2), s.block = block;
    STD_TORCH_CHECK(window >= 1 && s.R == (block ? 2 : 1) * window,
                    "the rings must have as many slots as the window (twice as many in block alignment)");
    const auto in_place = [&](const Tensor& x, Sizes shape, ScalarType dtype, const char* name) {
        STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous: it is updated in place");
        statistics(x, shape, dtype, name);
        return x.data_ptr();
    };
    s.k_ring = in_place(k_ring, {s.B, s.H, s.R, s.D}, q.scalar_type(), "k_ring");
    s.v_ring = in_place(v_ring, {s.B, s.H, s.R, s.V}, q.scalar_type(), "v_ring");
    s.phi_ring = in_place(phi_ring, {s.B, s.H, s.R, s.F}, q.scalar_type(), "phi_ring");
    s.state = in_place(state, {s.B, s.H, s.F, s.V}, exact, "state");
    s.z = in_place(normalizer, {s.B, s.H, s.F}, exact, "normalizer");
    s.position = static_cast<int64_t*>(in_place(position, {s.B, s.H}, ScalarType::Long, "position"));
    for (int64_t n = 0; n < s.B * s.H; ++n)
        STD_TORCH_CHECK(s.position[n] >= 0, "position must be >= 0, got ", s.position[n]);
    Optional factors;
    if (mix.has_value()) factors = statistics(*mix, Sizes{s.Hq}, exact, "mix");
    s.mix = data(factors);
    const Tensor queries = dense_rows(q), keys = dense_rows(k), values = dense_rows(v);
    const Tensor features_q = dense_rows(phi_q), features_k = dense_rows(phi_k);
    Tensor o = empty(q, {s.B, s.n, s.Hq, s.V}, q.scalar_type());
    s.q = rows_of(queries), s.k = rows_of(keys), s.v = rows_of(values), s.o = rows_of(o);
    s.phi_q = rows_of(features_q), s.phi_k = rows_of(features_k);
    s.scale = scale;
    const auto& tier = kernels();
    const int64_t work = s.n * (s.Hq / s.H) * (s.R * (s.D + s.V) + s.F * s.V);
    torch::stable::parallel_for(0, s.B * s.H,
                                std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(1, work)),
                                [&](int64_t begin, int64_t end) { tier.step(s, begin, end); });
    return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slmkernels, CPU, m) {
    m.impl("hybrid_attention_forward", TORCH_BOX(&forward));
    m.impl("hybrid_attention_backward", TORCH_BOX(&backward));
    m.impl("hybrid_attention_step", TORCH_BOX(&step));
}
