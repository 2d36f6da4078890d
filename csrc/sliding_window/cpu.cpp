// The CPU operators: check tensors, lay out the work, hand it to the kernels of the tier in use.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensors.h"
#include "arguments.h"
#include "sliding_window.h"
#include "step.h"

namespace {

using slm::dense_rows;
using slm::Dtype;
using slm::dtype_of;
using slm::empty;
using slm::fresh;
using slm::offsets;
using slm::Range;
using slm::Rows;
using slm::rows_of;
using slm::Span;
using slm::statistics_type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kScratchBytes = int64_t(16) << 20;  // of float32 gradients kept for 16-bit tensors

const slm::SlidingWindowKernels& kernels() {
#if defined(__x86_64__)
    if (slm::get_isa() == slm::Isa::avx512) return slm::sliding_window_avx512;
    if (slm::get_isa() == slm::Isa::avx2) return slm::sliding_window_avx2;
#endif
    return slm::sliding_window_portable;
}

std::vector<Span> spans_of(int64_t B, int64_t T, int64_t S, const Optional& cu, const Optional& cu_k) {
    std::vector<Span> spans;
    if (!cu.has_value()) {
        for (int64_t b = 0; b < B; ++b) spans.push_back({b, {0, T}, {0, S}});
        return spans;
    }
    const auto q = offsets(*cu, T, "cu_seqlens");
    const auto k = cu_k.has_value() ? offsets(*cu_k, S, "cu_seqlens_k") : offsets(*cu, S, "cu_seqlens");
    STD_TORCH_CHECK(q.size() == k.size(), "cu_seqlens has ", q.size() - 1, " sequences, cu_seqlens_k ",
                    k.size() - 1);
    for (size_t n = 0; n + 1 < q.size(); ++n) spans.push_back({0, {q[n], q[n + 1]}, {k[n], k[n + 1]}});
    return spans;
}

// Number of tasks before each span, [spans + 1].
template <typename Count>
std::vector<int64_t> tasks_before(const Span* spans, int64_t n, Count count) {
    std::vector<int64_t> first(size_t(n) + 1, 0);
    for (int64_t s = 0; s < n; ++s) first[size_t(s) + 1] = first[size_t(s)] + count(spans[s]);
    return first;
}

struct Inputs {
    Tensor q, k, v;
    Optional sinks;
    std::vector<Span> spans;
    slm::Problem problem;
};

Inputs read_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& sinks,
                   const Optional& cu, const Optional& cu_k, int64_t left, int64_t right, double scale,
                   double softcap) {
    slm::sliding_window::check_forward(q, k, v, sinks, cu, cu_k, left, right, scale, softcap);
    Inputs in{dense_rows(q), dense_rows(k), dense_rows(v), sinks, {}, {}};
    slm::Problem& p = in.problem;
    p.dtype = dtype_of(q);
    p.T = q.size(1), p.Hq = q.size(2), p.H = k.size(2), p.D = q.size(3), p.Dv = v.size(3);
    p.bf16_dot = p.dtype == Dtype::bf16 && slm::get_isa() == slm::Isa::avx512 && slm::has_bf16_dot() &&
                 p.D % 2 == 0 && p.Dv % 2 == 0;  // products take pairs along D
    if (sinks.has_value()) in.sinks = torch::stable::contiguous(*sinks);
    p.q = rows_of(in.q), p.k = rows_of(in.k), p.v = rows_of(in.v);
    p.sinks = in.sinks.has_value() ? in.sinks->data_ptr() : nullptr;
    in.spans = spans_of(q.size(0), p.T, k.size(1), cu, cu_k);
    p.spans = in.spans.data();
    p.num_spans = int64_t(in.spans.size());
    p.heads = {0, p.H};
    constexpr int64_t kNoBound = int64_t(1) << 62;  // position + side must stay below 2^63
    p.band = {left > kNoBound ? -1 : left, right > kNoBound ? -1 : right};
    p.scale = scale, p.softcap = softcap;
    return in;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, Optional sinks,
                                   Optional cu, Optional cu_k, int64_t left, int64_t right, double scale,
                                   double softcap) {
    Inputs in = read_inputs(q, k, v, sinks, cu, cu_k, left, right, scale, softcap);
    slm::Problem& p = in.problem;
    Tensor o = fresh(q, {q.size(0), p.T, p.Hq, p.Dv}, q.scalar_type(), false);
    Tensor lse = empty(q, {q.size(0), p.Hq, p.T}, statistics_type(p.dtype));
    p.o = rows_of(o);
    p.lse = lse.data_ptr();
    const auto& tier = kernels();
    const int64_t block = p.dtype == Dtype::f64 ? tier.lanes_f64 : tier.lanes_f32;
    const auto first = tasks_before(
        p.spans, p.num_spans, [&](const Span& span) { return (span.q.size() + block - 1) / block * p.H; });
    p.first = first.data();
    torch::stable::parallel_for(0, first.back(), 1,
                                [&](int64_t begin, int64_t end) { tier.forward(p, begin, end); });
    return {o, lse};
}

// How far the window reaches on a side, in a sequence of `longest` positions.
int64_t reach(int64_t side, int64_t longest) { return side < 0 ? longest : std::min(side, longest); }

// Positions per chunk of the backward. A block of queries is packed once for each chunk of keys it sees, so
// long chunks are best: four times the window's reach, but no longer than the greater of kLongest and the
// reach itself, and halved (to the lesser of the two at least) while that makes too few tasks. A thread keeps
// 2 (D + Dv) numbers a position of its chunk. Depends on nothing but the shape: so do the bits.
int64_t chunk_length(const slm::Problem& p, int64_t B, int64_t longest) {
    constexpr int64_t kShortest = 128, kLongest = 512, kTasks = 32;
    const int64_t side = std::max(reach(p.band.left, longest), reach(p.band.right, longest));
    int64_t chunk = std::min(std::max(4 * side, kShortest), std::max(side, kLongest));
    const int64_t least = std::min(std::max(side, kShortest), kLongest);
    while (chunk / 2 >= least && B * p.H * longest / (2 * chunk) < kTasks) chunk /= 2;
    return (std::min(chunk, std::max(longest, kShortest)) + 63) / 64 * 64;
}

// Runs all tasks over one slab of spans and KV heads.
void run_tasks(slm::Gradient& g, const Span* spans, int64_t num_spans, Range heads, Range distances) {
    slm::Problem& p = g.problem;
    p.spans = spans, p.num_spans = num_spans, p.heads = heads;
    const auto& tier = kernels();
    for (g.parity = 0; g.parity < 2; ++g.parity) {
        const auto first =
            tasks_before(spans, num_spans, [&](const Span& span) { return g.tasks(span) * heads.size(); });
        p.first = first.data();
        for (g.distance = distances.begin; g.distance < distances.end; g.distance += 2)
            torch::stable::parallel_for(0, first.back(), 1,
                                        [&](int64_t begin, int64_t end) { tier.backward(g, begin, end); });
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout, Optional dlse, const Tensor& q,
                                                    const Tensor& k, const Tensor& v, const Tensor& o,
                                                    const Tensor& lse, Optional sinks, Optional cu,
                                                    Optional cu_k, int64_t left, int64_t right, double scale,
                                                    double softcap) {
    Inputs in = read_inputs(q, k, v, sinks, cu, cu_k, left, right, scale, softcap);
    const int64_t B = q.size(0), S = k.size(1);
    slm::Gradient g{};
    g.problem = in.problem;
    slm::Problem& p = g.problem;
    const ScalarType exact = statistics_type(p.dtype);
    slm::sliding_window::check_backward(dout, dlse, q, v, o, lse);
    const Tensor douts = dense_rows(dout), outs = dense_rows(o), lses = torch::stable::contiguous(lse);
    Optional dlses;
    if (dlse.has_value()) dlses = torch::stable::contiguous(*dlse);
    g.dout = rows_of(douts), p.o = rows_of(outs), p.lse = lses.data_ptr();
    g.dlse = dlses.has_value() ? dlses->data_ptr() : nullptr;
    int64_t longest = 1;
    for (const Span& span : in.spans) longest = std::max({longest, span.q.size(), span.k.size()});
    g.chunk = chunk_length(p, int64_t(in.spans.size()), longest);
    const auto chunks = [&](int64_t side) {  // a query may stand `longest` before the first key
        return (reach(side, 2 * longest) + g.chunk - 1) / g.chunk;
    };
    const Range distances{-chunks(p.band.right), chunks(p.band.left) + 1};
    g.whole = distances.size() <= 2;

    Tensor dsinks = empty(lses, {sinks.has_value() ? p.Hq : 0}, lses.scalar_type());
    if (sinks.has_value()) {
        const auto& tier = kernels();
        torch::stable::parallel_for(0, p.Hq, 1, [&](int64_t begin, int64_t end) {
            tier.sink_gradient(g, dsinks.data_ptr(), begin, end);
        });
    }

    const bool in_place = exact == q.scalar_type();  // accumulate where the results belong
    const auto result = [&](std::initializer_list<int64_t> shape, bool added) {
        return fresh(q, shape, q.scalar_type(), added);
    };
    const Tensor dq = result({B, p.T, p.Hq, p.D}, in_place);
    const Tensor dk = result({B, S, p.H, p.D}, in_place && !g.whole);
    const Tensor dv = result({B, S, p.H, p.Dv}, in_place && !g.whole);
    g.dq = rows_of(dq), g.dk = rows_of(dk), g.dv = rows_of(dv);
    if (in_place) {
        run_tasks(g, in.spans.data(), int64_t(in.spans.size()), {0, p.H}, distances);
        return {dq, dk, dv, dsinks};
    }

    // 16-bit tensors: accumulate in a bounded slab of batch entries and KV heads, then convert.
    const int64_t group = p.Hq / p.H;
    const int64_t per_head = p.T * group * p.D + (g.whole ? 0 : S * (p.D + p.Dv));
    const int64_t units = std::max<int64_t>(1, kScratchBytes / std::max<int64_t>(4 * per_head, 1));
    const int64_t heads = std::min(p.H, units);
    const int64_t batches = heads == p.H ? std::clamp<int64_t>(units / p.H, 1, std::max<int64_t>(B, 1)) : 1;
    for (int64_t b = 0; b < B; b += batches)
        for (int64_t h = 0; h < p.H; h += heads) {
            const int64_t nb = std::min(batches, B - b), nh = std::min(heads, p.H - h);
            std::vector<std::tuple<Tensor, Tensor, int64_t>> conversions;  // to, from, first head
            const auto accumulate = [&](const Tensor& to, int64_t head, int64_t count) {
                const Tensor sum = fresh(lses, {nb, to.size(1), count, to.size(3)}, exact, true);
                conversions.emplace_back(to, sum, head);
                Rows rows = rows_of(sum);  // b and h stay absolute
                rows.data = static_cast<float*>(rows.data) - (b * rows.b + head * rows.h);
                return rows;
            };
            g.dq = accumulate(dq, h * group, nh * group);
            if (!g.whole) g.dk = accumulate(dk, h, nh), g.dv = accumulate(dv, h, nh);
            const bool packed = cu.has_value();
            run_tasks(g, in.spans.data() + (packed ? 0 : b), packed ? int64_t(in.spans.size()) : nb,
                      {h, h + nh}, distances);
            for (auto& [to, from, head] : conversions) {
                Tensor target = to;
                target = torch::stable::narrow(target, 0, b, nb);
                target = torch::stable::narrow(target, 2, head, from.size(2));
                torch::stable::copy_(target, from);
            }
        }
    return {dq, dk, dv, dsinks};
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_ring, Tensor v_ring, Tensor position,
            Optional sinks, double scale, double softcap) {
    const auto sizes =
        slm::sliding_window::check_step(q, k, v, k_ring, v_ring, position, sinks, scale, softcap);
    slm::Step s{};
    s.dtype = dtype_of(q);
    s.B = sizes.B, s.n = sizes.n, s.Hq = sizes.Hq, s.D = sizes.D;
    s.H = sizes.H, s.Dv = sizes.Dv, s.W = sizes.W;
    const Tensor queries = dense_rows(q), keys = dense_rows(k), values = dense_rows(v);
    Optional logits;
    if (sinks.has_value()) logits = torch::stable::contiguous(*sinks);
    Tensor o = empty(q, {s.B, s.n, s.Hq, s.Dv}, q.scalar_type());
    s.q = rows_of(queries), s.o = rows_of(o);
    s.k_ring = k_ring.data_ptr(), s.v_ring = v_ring.data_ptr();
    int64_t* positions = static_cast<int64_t*>(position.data_ptr());
    for (int64_t n = 0; n < s.B * s.H; ++n)
        STD_TORCH_CHECK(positions[n] >= 0, "position must be >= 0, got ", positions[n]);
    s.position = positions;
    s.sinks = logits.has_value() ? logits->data_ptr() : nullptr;
    s.scale = scale, s.softcap = softcap;
    const size_t bytes = q.element_size();
    const auto append = [&](const Tensor& from, void* ring, int64_t b, int64_t h, int64_t size) {
        const int64_t slot = positions[b * s.H + h] % s.W;
        const char* source =
            static_cast<const char*>(from.data_ptr()) +
            size_t(b * from.stride(0) + s.token * from.stride(1) + h * from.stride(2)) * bytes;
        std::memcpy(static_cast<char*>(ring) + size_t(((b * s.H + h) * s.W + slot) * size) * bytes, source,
                    size_t(size) * bytes);
    };
    const auto& tier = kernels();
    const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(1, s.W * (s.D + s.Dv)));
    for (s.token = 0; s.token < s.n; ++s.token) {
        for (int64_t b = 0; b < s.B; ++b)
            for (int64_t h = 0; h < s.H; ++h) {
                append(keys, k_ring.data_ptr(), b, h, s.D);
                append(values, v_ring.data_ptr(), b, h, s.Dv);
                ++positions[b * s.H + h];
            }
        torch::stable::parallel_for(0, s.B * s.Hq, grain,
                                    [&](int64_t begin, int64_t end) { tier.step(s, begin, end); });
    }
    return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slmkernels, CPU, m) {
    m.impl("sliding_window_forward", TORCH_BOX(&forward));
    m.impl("sliding_window_backward", TORCH_BOX(&backward));
    m.impl("sliding_window_step", TORCH_BOX(&step));
}
