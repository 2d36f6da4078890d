// Expert MLPs, forward, on tensor cores from sm_80 on.
//
//     a_s = f(gate) up,  h_s = w_gate_up[e] x_t + b_gate_up[e]             slot s = t k + j, expert e
//     y_t = sum_j weights_s (w_down[e] a_s + b_down[e])
//
// Four launches, three of segments: the sort (sort.cuh; of more than 16384 slots three kernels), the product with
// w_gate_up and the activation, the product with w_down and the weights (gemm.cuh), the sum of a token's k rows.
// Of k = 1 and of segments the second product stores y itself. Rows that are added up are kept in bfloat16, or in
// float32 of float16, whose range they might leave; the sum is in float32, in the order of j, rounded once. The
// host waits for nothing, grids follow from shapes, no float atomics: same bits from run to run, and CUDA graphs
// can hold a call. h, kept on demand, has a row for each row of the order, columns as rows of w_gate_up, as
// Triton's.
//
// Counted for T = 16384, d = 1024, n = 512, E = 32, k = 4 in bfloat16: 6 T k d n = 206 GFLOP. Bytes of HBM: x 34
// MB, matrices 67 + 34, a 67 written and read, rows of the second product 134 written and read, y 34: 570 MB. An
// H200 (989 TFLOP/s of wgmma, 4.8 TB/s) needs 208 us for the first, its floor, and 119 us for the second. mma.sync
// reaches about two thirds of wgmma's rate there: some 320 us is what this kernel can hope for, and L2, of which
// 128 x 256 tiles read 2.4 GB, takes 440 us at 5.5 TB/s: that, not the tensor cores, binds (multicast over a
// cluster, sm_90's, would halve it). On an A100: 661 us of tensor cores, L2 about 500.
// Rows of the second product could be added up without going through memory only by float atomics, or by a block
// that does all experts of a token; writing them scattered and reading k of them is 268 of the 570 MB, and the
// price of order. In float32 it would be 536.
//
// By ptxas, for sm_80 and sm_90a: 242 to 244 registers a thread (Large), 153 to 164 (Middle), 72 to 80 (Small),
// sorts 55 at most, combination 26; nothing spills. Large's loop over steps is 265 instructions on sm_90a, 128 of
// them mma, 32 ldmatrix, 12 copies. What it does not hide are the stores of a tile, some 4000 clocks of the up
// product's 21000 (activations: two MUFU a unit, 2000) and 2500 of the down product's 10000: another block's
// products would, but two of 128 x 128 would ask L2 for a third more than it gives.
//
// Sources: grouped products of gathered rows and an aggregation of its own, without scatter: SonicMoE (2025); the
// experts of tiles found on the device: vLLM's moe_align_block_size; the multistage pipeline: CUTLASS, "Efficient
// GEMM"; ranks within a warp by match: Ashkiani et al. 2016 (GPU multisplit), with ballots.
#include <algorithm>

#include "checks.h"
#include "gemm.cuh"

namespace slm {
namespace {

using experts::Sizes;

constexpr int kCombineThreads = 256;
constexpr int64_t kMostChannels = int64_t(1) << 28;  // their number, and 2n with a tile beyond, fit an int
constexpr int64_t kMostNumbers = int64_t(1) << 34;  // of y, eight a thread

// y [T, d] = sums of k rows each. A thread makes eight numbers.
struct Combine {
    const void* rows;  // [T k, d]
    void* y;
    uint32_t pieces, of_row;  // of eight numbers: in all, in a row
    int k;
};

template <typename E>
SLM_KERNEL(kCombineThreads, 4)
combine_kernel(const __grid_constant__ Combine p) {
    const uint32_t at = blockIdx.x * kCombineThreads + threadIdx.x;
    if (at >= p.pieces) return;
    const int64_t token = at / p.of_row, d = int64_t(p.of_row) * 8;
    const Part<E>* row = static_cast<const Part<E>*>(p.rows) + token * p.k * d + at % p.of_row * 8;
    float sum[8] = {};
#pragma unroll 4
    for (int j = 0; j < p.k; ++j, row += d) {
        float x[8];
        widen(load_eight(row), x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] += x[i];
    }
    store_eight(static_cast<E*>(p.y) + int64_t(at) * 8, narrow<E>(sum));
}

// Experts' matrices [E, rows, columns], or their transposed view if their columns are contiguous: as they lie.
struct Matrices {
    bool transposed;
    Tensor x;

    explicit Matrices(const Tensor& given)
        : transposed(given.stride(2) != 1 && given.stride(1) == 1),
          x(aligned_rows(transposed ? torch::stable::transpose(given, 1, 2) : given)) {}
};

Optional aligned(const Optional& x) { return x.has_value() ? Optional(aligned_rows(*x)) : x; }
Optional dense(const Optional& x) { return x.has_value() ? Optional(torch::stable::contiguous(*x)) : x; }

template <typename E, typename S>
void multiply_all(const Device& device, Product p, const Order& order, const Matrices& w) {
    p.column_blocks = (p.columns + S::kN - 1) / S::kN;
    const int64_t blocks = int64_t(order.bound) * p.column_blocks;
    STD_TORCH_CHECK(blocks < (int64_t(1) << 30), "too many tiles for one launch: ", blocks);
    p.w = pointer<E>(w.x), p.w_expert = w.x.stride(0), p.w_line = w.x.stride(1);
    p.blocks = int(blocks);
    const int64_t together = S::kStays ? device.multiprocessors() : blocks;
    const auto kernel = w.transposed ? product_kernel<E, S, true> : product_kernel<E, S, false>;
    device.launch(kernel, dim3(unsigned(std::min(blocks, together))), S::kThreads, S::kShared, p);
}

struct Call {
    Tensor x, indices;
    Optional weights, cu, b_up, b_down;
    Matrices up, down;
    Sizes size;
    int activation;
    bool interleaved;
    Tensor y, h;
};

template <typename E, typename S>
void run_tiles(const Device& device, const Call& c) {
    const Sizes& size = c.size;
    const int64_t slots = size.T * size.k;
    const Order order(device, c.indices, c.cu, slots, size.E, S::kM);
    const bool parts = size.k > 1;
    const auto part = std::is_same_v<Part<E>, float> ? ScalarType::Float : c.x.scalar_type();
    const Tensor a = torch::stable::new_empty(c.x, {slots, size.n});
    const Tensor out = parts ? torch::stable::new_empty(c.x, {slots, size.d}, part) : c.y;
    Product p{};
    p.tiles = pointer<int4>(order.tiles), p.order = c.cu.has_value() ? nullptr : pointer<int>(order.slots);
    p.top_k = int(size.k), p.n = int(size.n);

    Product first = p;
    first.up = true, first.K = int(size.d), first.columns = int(size.H);
    first.from = pointer<E>(c.x), first.from_row = c.x.stride(0);
    if (c.b_up.has_value()) first.bias = pointer<E>(*c.b_up), first.bias_expert = c.b_up->stride(0);
    first.activation = c.activation, first.interleaved = c.interleaved;
    first.a = pointer<E>(a), first.h = c.h.numel() > 0 ? pointer<E>(c.h) : nullptr;
    multiply_all<E, S>(device, first, order, c.up);

    Product second = p;
    second.K = int(size.n), second.columns = int(size.d);
    second.from = first.a, second.from_row = size.n;
    if (c.b_down.has_value()) second.bias = pointer<E>(*c.b_down), second.bias_expert = c.b_down->stride(0);
    second.weights = c.weights.has_value() ? pointer<float>(*c.weights) : nullptr;
    second.out = pointer<void>(out), second.parts = parts;
    multiply_all<E, S>(device, second, order, c.down);
    if (!parts) return;

    const int64_t pieces = size.T * size.d / 8;
    const Combine sum{second.out, pointer<E>(c.y), uint32_t(pieces), uint32_t(size.d / 8), int(size.k)};
    const dim3 grid(unsigned((pieces + kCombineThreads - 1) / kCombineThreads));
    device.launch(combine_kernel<E>, grid, kCombineThreads, 0, sum);
}

template <typename E>
void run(const Device& device, const Call& c) {
    // Tiles that most experts fill, if they are enough for the GPU (gemm.cuh).
    const int64_t slots = c.size.T * c.size.k;
    const int64_t mean = slots / (c.cu.has_value() ? c.indices.size(0) : c.size.E);
    const int64_t large = (slots / Large::kM) * ((c.size.H + Large::kN - 1) / Large::kN);
    if (2 * mean >= 3 * Large::kM && large >= device.multiprocessors() &&
        device.shared_limit() >= Large::kShared)
        run_tiles<E, Large>(device, c);
    else if (mean > Small::kM)
        run_tiles<E, Middle>(device, c);
    else
        run_tiles<E, Small>(device, c);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& indices, Optional weights, Optional cu,
                                   const Tensor& up, const Tensor& down, Optional b_up, Optional b_down,
                                   int64_t activation, bool interleaved, bool save) {
    const Device device(x);
    const Sizes size = experts::check(x, indices, weights, cu, up, down, b_up, b_down, activation);
    STD_TORCH_CHECK(is_16bit(x), "x must be bfloat16 or float16");
    STD_TORCH_CHECK(size.d % 8 == 0 && size.n % 8 == 0 && std::max(size.d, size.n) <= kMostChannels,
                    "d and n must be multiples of 8 up to ", kMostChannels, ", not ", size.d, " and ",
                    size.n);
    STD_TORCH_CHECK(size.E <= kMostExperts, "at most ", kMostExperts, " experts, not ", size.E);
    const int64_t slots = size.T * size.k;
    STD_TORCH_CHECK(slots <= kMostRows && size.T * size.d < kMostNumbers, "too many tokens: ", size.T);
    const Tensor y = torch::stable::new_empty(x, {size.T, size.d});
    const Tensor h = torch::stable::new_empty(x, {save ? slots * size.H : 0});
    if (slots == 0) return {y, h};
    const Call call{aligned_rows(x),
                    torch::stable::contiguous(indices),
                    dense(weights),
                    dense(cu),
                    aligned(b_up),
                    aligned(b_down),
                    Matrices(up),
                    Matrices(down),
                    size,
                    int(activation),
                    interleaved,
                    y,
                    h};
    SLM_DISPATCH_16BIT(x, run, device, call);
    return {y, h};
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) { m.impl("expert_mlp_forward", TORCH_BOX(&slm::forward)); }
