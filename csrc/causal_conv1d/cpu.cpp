// The CPU operators: check tensors, lay out the work, hand it to the kernels of the tier in use.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensors.h"
#include "causal_conv1d.h"

namespace {

using slm::dense;
using slm::dense_rows;
using slm::Dtype;
using slm::empty;
using slm::fresh;
using slm::Rows;
using slm::rows_of;
using slm::statistics_type;
using slm::conv::Gradient;
using slm::conv::Kernels;
using slm::conv::kWidest;
using slm::conv::Parameters;
using slm::conv::Problem;
using slm::conv::Span;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kBlock = 128;  // rows of a task; the backward's sums are one for each block
constexpr int64_t kChunk = 512;  // channels of a task, a whole number of any tier's registers
constexpr int64_t kGrain = int64_t(1) << 15;  // elements that are worth a thread
constexpr Rows kAbsent{nullptr, 0, 0, 0};

const Kernels& kernels() {
#if defined(__x86_64__)
    if (slm::get_isa() == slm::Isa::avx512) return slm::conv::kernels_avx512;
    if (slm::get_isa() == slm::Isa::avx2) return slm::conv::kernels_avx2;
#endif
    return slm::conv::kernels_portable;
}

int64_t lanes(const Problem& p) { return p.dtype == Dtype::f64 ? kernels().lanes_f64 : kernels().lanes_f32; }

// What one row of a task costs decides how many tasks a thread takes at least.
int64_t grain(const Problem& p) {
    return std::max<int64_t>(1, kGrain / (p.block * std::max<int64_t>(1, std::min(p.chunk, p.C))));
}

bool wide(const Tensor& x, const Problem& p, const char* name) {
    const bool exact = x.scalar_type() == statistics_type(p.dtype);
    STD_TORCH_CHECK(exact || slm::dtype_of(x) == p.dtype, name,
                    " must have x's dtype, or float32 beside a 16-bit x");
    return exact;
}

// Everything a call reads, alive as long as the problem that points into it. Not to be moved.
struct Inputs {
    Tensor x, weight;
    Optional bias, initial;
    std::vector<Span> spans;
    std::unique_ptr<double[]> taps;
    Parameters parameters{};
    Problem problem{};

    Inputs(const Tensor& x_, const Tensor& weight_, const Optional& bias_, const Optional& initial_,
           bool silu)
        : x(dense_rows(x_)), weight(dense(weight_)) {
        Problem& p = problem;
        STD_TORCH_CHECK(x.dim() == 3, "x must be [B, T, C]");
        const ScalarType type = x.scalar_type();
        STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                            type == ScalarType::BFloat16 || type == ScalarType::Half,
                        "x must be float32, float64, bfloat16 or float16");
        p.dtype = slm::dtype_of(x);
        p.bf16_dot = p.dtype == Dtype::bf16 && slm::get_isa() == slm::Isa::avx512 && slm::has_bf16_dot();
        p.silu = silu;
        p.C = x.size(2);
        STD_TORCH_CHECK(
            weight.dim() == 2 && weight.size(0) == p.C && weight.size(1) >= 1 && weight.size(1) <= kWidest,
            "weight must be [C, W] with C = ", p.C, " and W from 1 to ", kWidest);
        p.W = weight.size(1);
        p.x = rows_of(x);
        parameters = {weight.data_ptr(), nullptr, wide(weight, p, "weight"), false};
        if (bias_.has_value()) {
            STD_TORCH_CHECK(bias_->dim() == 1 && bias_->size(0) == p.C, "bias must be [C] with C = ", p.C);
            bias = dense(*bias_);
            parameters.bias = bias->data_ptr(), parameters.bias_wide = wide(*bias, p, "bias");
        }
        p.initial = kAbsent;
        p.block = kBlock, p.chunk = std::min(kChunk, std::max<int64_t>(1, p.C));
        const int64_t count = (p.C + lanes(p) - 1) / lanes(p) * lanes(p) * (p.W + 1);
        taps.reset(new double[size_t(count)]);
        p.taps = taps.get();
        kernels().pack(p, parameters, taps.get());
        if (initial_.has_value()) initial = *initial_;
    }

    void cut(const Optional& cu) {
        Problem& p = problem;
        const int64_t B = x.size(0), T = x.size(1);
        if (cu.has_value()) {
            STD_TORCH_CHECK(B == 1, "packed sequences need batch 1, got ", B);
            const auto at = slm::offsets(*cu, T, "cu_seqlens");
            for (size_t n = 0; n + 1 < at.size(); ++n) spans.push_back({0, at[n], at[n + 1], at[n]});
        } else {
            for (int64_t b = 0; b < B; ++b) spans.push_back({b, 0, T, b * T});
        }
        p.spans = spans.data(), p.num_spans = int64_t(spans.size()), p.rows = p.num_spans == 0 ? 0 : B * T;
        if (initial.has_value()) {
            initial = dense_rows(*initial);
            check_state(*initial, "initial_state");
            p.initial = rows_of(*initial);
        }
    }

    void check_state(const Tensor& state, const char* name) const {
        STD_TORCH_CHECK(state.dim() == 3 && state.size(0) == problem.num_spans &&
                            state.size(1) == problem.W - 1 && state.size(2) == problem.C &&
                            state.scalar_type() == x.scalar_type(),
                        name, " must be [N, W-1, C] of x's dtype, N = ", problem.num_spans);
    }
};

char* address(const Rows& rows, size_t element, int64_t b, int64_t t) {
    return static_cast<char*>(rows.data) + size_t(b * rows.b + t * rows.t) * element;
}

// Rows e_T .. e_{T+W-2} of each span -> state [N, W-1, C], which may be the initial state itself.
void copy_last(const Problem& p, size_t element, const Rows& state) {
    const size_t bytes = size_t(p.C) * element;
    if (bytes == 0) return;  // null pointers are no rows
    const auto copy = [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
            for (int64_t j = 0; j < p.W - 1; ++j) {
                const Span& span = p.spans[n];
                const int64_t u = span.size() + j;
                char* to = address(state, element, n, j);
                if (u >= p.W - 1)
                    std::memcpy(to, address(p.x, element, span.b, span.begin + u - (p.W - 1)), bytes);
                else if (p.initial.data != nullptr)
                    std::memmove(to, address(p.initial, element, n, u), bytes);
                else
                    std::memset(to, 0, bytes);
            }
    };
    const int64_t least = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.W * p.C));
    torch::stable::parallel_for(0, p.num_spans, least, copy);
}

// No task has the rows of an empty sequence: its initial state is its final one, and so are the gradients.
void copy_gradient_of_empty(const Gradient& g, size_t element) {
    const Problem& p = g.problem;
    const size_t bytes = size_t(p.C) * element;
    if (bytes == 0) return;  // null pointers are no rows
    for (int64_t n = 0; n < p.num_spans; ++n)
        for (int64_t j = 0; p.spans[n].size() == 0 && j < p.W - 1; ++j) {
            char* to = address(g.dinitial, element, n, j);
            if (g.dstate.data != nullptr)
                std::memcpy(to, address(g.dstate, element, n, j), bytes);
            else
                std::memset(to, 0, bytes);
        }
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, Optional bias, Optional initial,
                                   Optional cu, bool silu, bool return_state) {
    Inputs in(x, weight, bias, initial, silu);
    in.cut(cu);
    Problem& p = in.problem;
    Tensor y = fresh(x, {x.size(0), x.size(1), p.C}, x.scalar_type(), false);
    p.y = rows_of(y);
    Tensor state = empty(x, {return_state ? p.num_spans : 0, p.W - 1, p.C}, x.scalar_type());
    const auto& tier = kernels();
    if (p.C > 0)
        torch::stable::parallel_for(0, p.tasks(), grain(p),
                                    [&](int64_t begin, int64_t end) { tier.forward(p, begin, end); });
    if (return_state) copy_last(p, size_t(x.element_size()), rows_of(state));
    return {y, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout, Optional dstate, const Tensor& x,
                                                    const Tensor& weight, Optional bias, Optional initial,
                                                    Optional cu, bool silu) {
    Inputs in(x, weight, bias, initial, silu);
    in.cut(cu);
    Gradient g{in.problem, kAbsent, kAbsent, kAbsent, kAbsent, nullptr};
    const Problem& p = g.problem;
    STD_TORCH_CHECK(dout.dim() == 3 && dout.scalar_type() == x.scalar_type() && dout.size(0) == x.size(0) &&
                        dout.size(1) == x.size(1) && dout.size(2) == p.C,
                    "dout must be [B, T, C] of x's dtype");
    const Tensor douts = dense_rows(dout);
    g.dy = rows_of(douts);
    Optional dstates;
    if (dstate.has_value()) {
        dstates = dense_rows(*dstate);
        in.check_state(*dstates, "dstate");
        g.dstate = rows_of(*dstates);
    }
    const Tensor dx = fresh(x, {x.size(0), x.size(1), p.C}, x.scalar_type(), false);
    const Tensor dweight = empty(in.weight, {p.C, p.W}, weight.scalar_type());
    const Tensor& like = bias.has_value() ? *bias : in.weight;
    const Tensor dbias = empty(like, {bias.has_value() ? p.C : 0}, like.scalar_type());
    const Tensor dinitial = empty(x, {initial.has_value() ? p.num_spans : 0, p.W - 1, p.C}, x.scalar_type());
    g.dx = rows_of(dx);
    if (initial.has_value()) g.dinitial = rows_of(dinitial);
    if (p.C == 0) return {dx, dweight, dbias, dinitial};

    const auto& tier = kernels();
    const int64_t registers = (p.C + lanes(p) - 1) / lanes(p), blocks = (p.rows + p.block - 1) / p.block;
    const Tensor sums = fresh(x, {blocks, registers, p.W + 1, lanes(p)}, statistics_type(p.dtype), false);
    g.sums = sums.data_ptr();
    torch::stable::parallel_for(0, p.tasks(), grain(p),
                                [&](int64_t begin, int64_t end) { tier.backward(g, begin, end); });
    const Parameters to{dweight.data_ptr(), bias.has_value() ? dbias.data_ptr() : nullptr,
                        in.parameters.weight_wide, in.parameters.bias_wide};
    const int64_t work = (p.W + 1) * lanes(p) * std::max<int64_t>(1, blocks);
    torch::stable::parallel_for(0, registers, std::max<int64_t>(1, kGrain / work),
                                [&](int64_t begin, int64_t end) { tier.reduce(g, to, begin, end); });
    if (initial.has_value()) copy_gradient_of_empty(g, size_t(x.element_size()));
    return {dx, dweight, dbias, dinitial};
}

Tensor step(const Tensor& x, Tensor state, const Tensor& weight, Optional bias, bool silu) {
    Inputs in(x, weight, bias, state, silu);
    Problem& p = in.problem;
    STD_TORCH_CHECK(p.C < 2 || p.W < 2 || state.numel() == 0 || state.stride(2) == 1,
                    "state must have a stride of 1 along its last dimension: it is updated in place");
    in.cut(std::nullopt);
    Tensor y = empty(x, {x.size(0), x.size(1), p.C}, x.scalar_type());
    p.y = rows_of(y);
    const auto& tier = kernels();
    const int64_t least = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, x.size(1) * p.C));
    torch::stable::parallel_for(0, p.num_spans, least,
                                [&](int64_t begin, int64_t end) { tier.step(p, begin, end); });
    copy_last(p, size_t(x.element_size()), rows_of(state));
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slmkernels, CPU, m) {
    m.impl("causal_conv1d_forward", TORCH_BOX(&forward));
    m.impl("causal_conv1d_backward", TORCH_BOX(&backward));
    m.impl("causal_conv1d_step", TORCH_BOX(&step));
}
