// The CPU operators of expert_mlp: check tensors, sort rows by expert, hand chunks of them to the kernels of
// the tier in use.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensors.h"
#include "checks.h"
#include "mlp.h"

namespace {

using slm::dense;
using slm::dense_rows;
using slm::Dtype;
using slm::fresh;
using slm::statistics_type;
using slm::experts::Chunk;
using slm::experts::Gradient;
using slm::experts::kChunk;
using slm::experts::Kernels;
using slm::experts::Matrix;
using slm::experts::Optional;
using slm::experts::Problem;
using slm::experts::Queue;
using slm::experts::Sizes;
using slm::experts::Sum;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = int64_t(1) << 15;  // elements that are worth a thread

const Kernels& kernels() {
#if defined(__x86_64__)
    if (slm::get_isa() == slm::Isa::avx512) return slm::experts::kernels_avx512;
    if (slm::get_isa() == slm::Isa::avx2) return slm::experts::kernels_avx2;
#endif
    return slm::experts::kernels_portable;
}

// Experts' matrices [E, rows, columns] as they lie, if rows or columns are contiguous; else a copy.
Tensor readable(const Tensor& x) {
    const bool by_rows = x.stride(2) == 1 || x.size(2) == 1, by_columns = x.stride(1) == 1 || x.size(1) == 1;
    return by_rows || by_columns ? x : torch::stable::contiguous(x);
}

Matrix matrix_of(const Tensor& x) {  // a dimension of size 1 has any stride
    const bool by_rows = x.stride(2) == 1 || x.size(2) == 1;
    return {x.data_ptr(), x.stride(0), by_rows ? x.stride(1) : 1, by_rows ? 1 : x.stride(2)};
}

template <typename Body>
void run(int64_t tasks, Body&& body) {
    Queue queue{0, tasks};
    // Tasks cost as much as they have rows: a thread takes the next one when it is done, whatever its share.
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) { body(queue); });
}

// Everything a call reads, alive as long as the problem that points into it, and its rows in order.
struct Call {
    Tensor x, indices, up, down;
    Optional weights, b_up, b_down;
    int64_t E, k;
    bool parts;  // rows of a token are added up
    std::vector<int64_t> token, to, absent;  // `absent`: rows that no expert writes
    std::vector<double> sorted;  // weights, as float or double
    std::vector<Chunk> chunks;
    std::vector<int64_t> of_expert;  // [E + 1], into chunks
    int64_t padded = 0;
    Problem problem{};

    Call(const Tensor& x_, const Tensor& indices_, const Optional& weights_, const Optional& cu,
         const Tensor& up_, const Tensor& down_, const Optional& b_up_, const Optional& b_down_,
         int64_t activation, bool interleaved)
        : x(dense_rows(x_)), indices(dense(indices_)), up(readable(up_)), down(readable(down_)) {
        const Sizes size =
            slm::experts::check(x, indices, weights_, cu, up, down, b_up_, b_down_, activation);
        E = size.E, k = size.k, parts = k > 1;
        Problem& p = problem;
        p.dtype = slm::dtype_of(x);
        p.activation = int(activation), p.gated = size.gated, p.interleaved = interleaved;
        p.T = size.T, p.d = size.d, p.n = size.n, p.H = size.H;
        p.dot = p.dtype == Dtype::bf16 && slm::get_isa() == slm::Isa::avx512 && slm::has_bf16_dot() &&
                p.d % 2 == 0 && p.n % 2 == 0;
        p.x = x.data_ptr(), p.x_row = x.stride(0);
        p.up = matrix_of(up), p.down = matrix_of(down);
        if (b_up_.has_value()) b_up = dense(*b_up_);
        if (b_down_.has_value()) b_down = dense(*b_down_);
        p.b_up = b_up.has_value() ? b_up->data_ptr() : nullptr;
        p.b_down = b_down.has_value() ? b_down->data_ptr() : nullptr;
        if (cu.has_value())
            segments(slm::offsets(*cu, p.T, "cu_seqlens"));
        else
            rows(weights_);
        p.token = token.data(), p.to = to.data();
        p.chunks = chunks.data(), p.num_chunks = int64_t(chunks.size());
    }

    bool present(int32_t e) const { return e >= 0 && e < E; }

    // Rows of every expert -> chunks.
    void cut(const std::vector<int64_t>& first) {
        const bool f64 = problem.dtype == Dtype::f64;
        const int64_t lanes = f64 ? kernels().lanes_f64 : kernels().lanes_f32;
        for (int64_t e = 0; e < E; ++e) {
            of_expert.push_back(int64_t(chunks.size()));
            for (int64_t at = first[size_t(e)]; at < first[size_t(e) + 1]; at += kChunk) {
                const int64_t size = std::min(kChunk, first[size_t(e) + 1] - at);
                chunks.push_back({e, at, size, padded});
                padded += (size + lanes - 1) / lanes * lanes;
            }
        }
        of_expert.push_back(int64_t(chunks.size()));
    }

    void rows(const Optional& weights_) {
        const int64_t T = problem.T;
        weights = dense(*weights_);
        const int32_t* expert = static_cast<const int32_t*>(indices.data_ptr());
        std::vector<int64_t> first(size_t(E) + 1, 0);
        for (int64_t slot = 0; slot < T * k; ++slot)
            if (present(expert[slot])) ++first[size_t(expert[slot]) + 1];
        for (int64_t e = 0; e < E; ++e) first[size_t(e) + 1] += first[size_t(e)];
        cut(first);
        const int64_t count = first[size_t(E)];
        token.resize(size_t(count)), to.resize(size_t(count)), sorted.resize(size_t(count));
        for (int64_t t = 0, slot = 0; t < T; ++t)
            for (int64_t j = 0; j < k; ++j, ++slot) {
                if (!present(expert[slot])) {
                    absent.push_back(slot);
                    continue;
                }
                const int64_t row = first[size_t(expert[slot])]++;
                token[size_t(row)] = t, to[size_t(row)] = slot;
                if (problem.dtype == Dtype::f64)
                    sorted[size_t(row)] = static_cast<const double*>(weights->data_ptr())[slot];
                else
                    reinterpret_cast<float*>(sorted.data())[row] =
                        static_cast<const float*>(weights->data_ptr())[slot];
            }
        problem.weights = sorted.data();
    }

    void segments(const std::vector<int64_t>& at) {
        const int32_t* expert = static_cast<const int32_t*>(indices.data_ptr());
        std::vector<int64_t> first(size_t(E) + 1, 0);
        for (size_t s = 0; s + 1 < at.size(); ++s)
            if (present(expert[s])) first[size_t(expert[s]) + 1] += at[s + 1] - at[s];
        for (int64_t e = 0; e < E; ++e) first[size_t(e) + 1] += first[size_t(e)];
        cut(first);
        token.resize(size_t(first[size_t(E)]));
        for (size_t s = 0; s + 1 < at.size(); ++s)
            for (int64_t t = at[s]; t < at[s + 1]; ++t) {
                if (present(expert[s]))
                    token[size_t(first[size_t(expert[s])]++)] = t;
                else
                    absent.push_back(t);
            }
        to = token;
        problem.weights = nullptr;
    }

    size_t element() const { return size_t(x.element_size()); }
    size_t wide() const { return problem.dtype == Dtype::f64 ? sizeof(double) : sizeof(float); }

    // Has `body` write its rows into y [T, d], by way of [T, k, d] where a token has several.
    template <typename Body>
    void into(const Tensor& y, Problem& p, Body&& body) const {
        const ScalarType type = p.dtype == Dtype::f16 ? ScalarType::Float : x.scalar_type();
        const Tensor rows = parts ? fresh(x, {p.T * k, p.d}, type, false) : y;
        p.y = rows.data_ptr(), p.parts = parts;
        const size_t bytes = size_t(p.d) * size_t(rows.element_size());
        for (const int64_t row : absent) std::memset(static_cast<char*>(p.y) + size_t(row) * bytes, 0, bytes);
        body();
        if (!parts) return;
        const auto& tier = kernels();
        const Sum sum{p.dtype, p.y, y.data_ptr(), k, p.d};
        torch::stable::parallel_for(0, p.T, std::max<int64_t>(1, kGrain / (k * p.d)),
                                    [&](int64_t begin, int64_t end) { tier.sum(sum, begin, end); });
    }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& indices, Optional weights, Optional cu,
                                   const Tensor& up, const Tensor& down, Optional b_up, Optional b_down,
                                   int64_t activation, bool interleaved, bool save) {
    Call call(x, indices, weights, cu, up, down, b_up, b_down, activation, interleaved);
    Problem& p = call.problem;
    const Tensor y = fresh(x, {p.T, p.d}, x.scalar_type(), false);
    const Tensor h = fresh(x, {save ? p.T * call.k * p.H : 0}, x.scalar_type(), false);
    p.h = save ? h.data_ptr() : nullptr;
    if (save && !call.absent.empty()) {  // its rows stand last: nothing leaves an operator unwritten
        const size_t row = size_t(p.H) * call.element();
        std::memset(static_cast<char*>(p.h) + call.token.size() * row, 0, call.absent.size() * row);
    }
    call.into(y, p, [&] { run(p.num_chunks, [&](Queue& queue) { kernels().forward(p, queue); }); });
    return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const Tensor& x, const Tensor& indices, Optional weights, Optional cu,
    const Tensor& up, const Tensor& down, Optional b_up, Optional b_down, const Tensor& h, int64_t activation,
    bool interleaved, bool need_x, bool need_w) {
    Call call(x, indices, weights, cu, up, down, b_up, b_down, activation, interleaved);
    Gradient g{};
    Problem& p = g.problem = call.problem;
    STD_TORCH_CHECK(dout.dim() == 2 && dout.size(0) == p.T && dout.size(1) == p.d &&
                        dout.scalar_type() == x.scalar_type(),
                    "dout must be [T, d] of x's dtype");
    STD_TORCH_CHECK(h.dim() == 1 && h.scalar_type() == x.scalar_type() && h.numel() == p.T * call.k * p.H,
                    "h must be what the forward saved");
    const Tensor dy = dense_rows(dout), saved = dense(h);
    g.dy = dy.data_ptr(), g.dy_row = dy.stride(0), p.h = saved.data_ptr();
    g.need_x = need_x, g.of_expert = call.of_expert.data(), g.experts = call.E;

    const ScalarType type = x.scalar_type();
    const auto none = [&] { return slm::empty(x, {0}, type); };
    const Tensor dx = need_x ? fresh(x, {p.T, p.d}, type, false) : none();
    const bool routed = call.weights.has_value();
    const Tensor dweights = routed ? slm::empty(x, {p.T, call.k}, statistics_type(p.dtype)) : none();
    if (routed) {
        g.dweights = dweights.data_ptr();
        for (const int64_t slot : call.absent)
            std::memset(static_cast<char*>(g.dweights) + size_t(slot) * call.wide(), 0, call.wide());
    }
    const Tensor dup = need_w ? fresh(x, {call.E, p.H, p.d}, type, false) : none();
    const Tensor ddown = need_w ? fresh(x, {call.E, p.d, p.n}, type, false) : none();
    const Tensor db_up = need_w && p.b_up ? slm::empty(x, {call.E, p.H}, type) : none();
    const Tensor db_down = need_w && p.b_down ? slm::empty(x, {call.E, p.d}, type) : none();
    const Tensor dh = need_w ? fresh(x, {call.padded, p.H}, type, false) : none();
    const Tensor a = need_w ? fresh(x, {call.padded, p.n}, type, false) : none();
    if (need_w) {
        g.dh = dh.data_ptr(), g.a = a.data_ptr(), g.dup = dup.data_ptr(), g.ddown = ddown.data_ptr();
        g.db_up = p.b_up ? db_up.data_ptr() : nullptr, g.db_down = p.b_down ? db_down.data_ptr() : nullptr;
    }
    const auto& tier = kernels();
    const auto pass = [&] { run(p.num_chunks, [&](Queue& queue) { tier.backward(g, queue); }); };
    if (need_x)
        call.into(dx, p, pass);
    else
        pass();
    const int64_t width = tier.vectors * (p.dtype == Dtype::f64 ? tier.lanes_f64 : tier.lanes_f32);
    if (need_w) run(2 * call.E * ((p.d + width - 1) / width), [&](Queue& queue) { tier.matrices(g, queue); });
    return {dx, dweights, dup, ddown, db_up, db_down};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slmkernels, CPU, m) {
    m.impl("expert_mlp_forward", TORCH_BOX(&forward));
    m.impl("expert_mlp_backward", TORCH_BOX(&backward));
}
