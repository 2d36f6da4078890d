// Sliding-window attention, forward, for compute capability 8.0 and later.
//
// One query row of one head, in log2 units (x = q.k, u = scale log2 e; softcap: see WindowProblem):
//
//     m = max over visible j of x_j u     p_j = 2^(x_j u - m)     l = sum p_j     o = sum p_j v_j / l
//     lse = (m + log2 l) / log2 e         a sink joins l and lse last, where it can underflow no p
//
// m, l and o grow over the keys (online softmax: Milakov and Gimelshein 2018; queries outside, division last:
// Dao 2023, FlashAttention-2, section 3.1); m lags behind the maximum by up to 2^8, so that o is seldom
// rescaled (FlashAttention-4). x u - m is one fma before exp2.
//
// Split. A warp has 32 rows of one head; the four warps of a block have four heads of one group on the same
// 32 positions, if the group has so many, else two heads on 64 or one on 128. Heads of a group so share what
// is copied of their keys, and every warp of the block needs all of it. Blocks of the same keys are
// neighbours in the grid. Where that makes fewer than two blocks a multiprocessor, warps have 16 rows.
//
// Window and tile. A row of 32 + W - 1 keys is computed where W count, in steps of 32: 89 % of the products
// are useful at W = 256, 94 % at 512, 97 % at 1024. A tile of 128 queries x 128 keys, what full attention
// likes best, has 67, 80, 89 %; 64 x 64 has 80, 89, 94 %. Keys begin where the window of the block's first
// row does, at no multiple of anything. A warp passes over steps that its rows do not see, and masks only
// steps that an edge crosses: a uniform branch, not three loops, since the code between the products is
// short. Masked are 2 steps.
//
// Memory. Tiles of 64 keys and values (32 for 128 columns) come by cp.async into one of two slots while the
// other is multiplied: one barrier a tile. A tile's rows are swizzled (tiles.cuh): no ldmatrix meets a bank
// twice. Queries stay in registers for 64 columns and are read again for 128, where o alone takes 128
// registers. P goes from the scores' registers into the second product as operand a. o leaves through the
// warp's own part of shared memory, 16 bytes a lane. Head sizes below 64 or 128 run in the next tile, with
// columns of zeros.
//
// Count, B = 4, T = 8192, Hq = 16, Hkv = 4, D = 64, W = 512, H200: 68.7 GFLOP in the window, 73.0 computed,
// 168 MB. 69 us at the peak of 989 TFLOP/s, 35 us at 4.8 TB/s, 77 us for 285 M exp2 at 16 a clock and
// multiprocessor. The floor is mma.sync, which has about 0.62 of wgmma's peak there (Luo et al. 2024): 120
// us. For 64 x 64 scores a multiprocessor then takes 413 clocks for products, 256 for exp2, about 280 to
// issue everything else, and reads 32 KiB of shared memory by ldmatrix: 256 clocks with 32 rows a warp, 512
// with 16, which is why warps have 32. With 128 columns: 826 for products, 768 for shared memory, of which a
// third is queries read again.
//
// ptxas, registers for sm_80 and sm_90a, no spills; shared memory; blocks a multiprocessor meant:
//     64 columns, 32 rows: 193, 199; 48 KiB; 2.      64 columns, 16 rows: 124, 126; 40 KiB; 4.
//     128 columns, 32 rows: 241, 255; 64 KiB; 2.     128 columns, 16 rows: 159, 161; 48 KiB; 2.
// Considered: three blocks of 168 registers for 64 columns (spills 9 to 14 registers, with 32 or 48 keys a
// step); steps of 48 or 64 keys for 128 columns, which read queries less often (48 spills 13 registers after
// small changes elsewhere). Nothing here has run on a GPU yet.
#include "forward.cuh"

namespace slm {
namespace {

// C: columns that hold a head. kRows: queries a warp.
template <int C, int kRows>
struct ForwardShape {
    static constexpr int kThreads = 4 * kWarp;
    static constexpr int kTile = C == 64 ? 64 : 32;  // keys copied at a time
    static constexpr int kStep = 32;  // keys multiplied at a time
    static constexpr int kBlocks = C == 64 && kRows == 16 ? 4 : 2;
    static constexpr int kBytes = Tile<C>::bytes(4 * kRows + 4 * kTile);
};

template <typename E, int C, int kRows>
SLM_KERNEL(4 * kWarp, (ForwardShape<C, kRows>::kBlocks))
forward_kernel(const __grid_constant__ Forward p) {
    using Shape = ForwardShape<C, kRows>;
    constexpr int kTile = Shape::kTile, kStep = Shape::kStep, M = kRows / 16, N = kStep / 8;
    const WindowProblem& w = p.window;
    const QueryTile<kRows> at(w);
    const int thread = int(threadIdx.x), lane = lane_of_thread();
    const Tile<C> queries{shared_memory() +
                          Tile<C>::bytes(warp_of_thread() * kRows)};  // of the warp; later its o
    const Shared tiles = shared_memory() + Tile<C>::bytes(4 * kRows);
    const auto keys = [&](int slot) { return Tile<C>{tiles + Tile<C>::bytes(2 * slot * kTile)}; };
    const auto values = [&](int slot) { return Tile<C>{tiles + Tile<C>::bytes((2 * slot + 1) * kTile)}; };
    const E* q = w.q.at<E>(at.b, at.row, at.head);

    Copier<kTile, Shape::kThreads, C, E> k_rows(w.k.at<E>(at.b, at.key, at.h), int(w.k.t), thread);
    Copier<kTile, Shape::kThreads, C, E> v_rows(w.v.at<E>(at.b, at.key, at.h), int(w.v.t), thread);
    const auto fetch = [&](int slot, int rows) {
        k_rows.copy(keys(slot), int(w.k.t), rows, w.D, thread);
        v_rows.copy(values(slot), int(w.v.t), rows, w.Dv, thread);
        commit_copies();
    };
    Copier<kRows, kWarp, C, E>(q, int(w.q.t), lane).copy(queries, int(w.q.t), at.rows, w.D, lane);
    commit_copies();
    fetch(0, at.count);
    wait_copies<1>();
    sync_warp();
    const Operand<C, M, C == 64> operand(queries);

    float o[M][C / 8][4] = {};
    Softmax<M> softmax;
    const auto rescale = [&](int m, int half, float factor) {
#pragma unroll
        for (int n = 0; n < C / 8; ++n) o[m][n][2 * half] *= factor, o[m][n][2 * half + 1] *= factor;
    };
    int distance = at.distance, left = at.count;  // of the keys of a step; keys from there on
    for (int slot = 0; left > 0; slot ^= 1) {
        wait_copies<0>();
        sync_block();
        if (left > kTile) fetch(slot ^ 1, left - kTile);
#pragma unroll 1
        for (int j = 0; j < kTile; j += kStep, distance -= kStep, left -= kStep) {
            if (left <= 0 || w.window.misses(distance, kRows, kStep)) continue;
            float s[M][N][4] = {};
            multiply_transposed<E>(s, operand, keys(slot).from(j));
            rewrite(s, w);
            if (left < kStep || !w.window.covers(distance, kRows, kStep))
                hide(s, w.window, distance, left, -INFINITY);
            softmax.update(s, w.unit, rescale);
            multiply_rounded<E>(o, s, values(slot).from(j));
        }
    }
    wait_copies<0>();

    const float sink = w.sinks != nullptr ? load(w.sinks + at.head) * kLog2E : -INFINITY;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 last = softmax.finish(m, half, sink);
            rescale(m, half, last.x);
            const int r = 16 * m + 8 * half + lane / 4;
            if (lane % 4 == 0 && r < at.rows) store(p.lse + at.at(w, r), last.y);
        }
    write_rows<E>(queries, o, p.o.at<E>(at.b, at.row, at.head), p.o.t, at.rows, w.Dv);
}

template <typename E, int C, int kRows>
void launch_forward(const Device& device, const Forward& p) {
    using Shape = ForwardShape<C, kRows>;
    device.launch(forward_kernel<E, C, kRows>, dim3(unsigned(QueryTile<kRows>::blocks(p.window))),
                  Shape::kThreads, Shape::kBytes, p);
}

template <typename E>
void run_forward(const Device& device, const Forward& p) {
    const bool wide = std::max(p.window.D, p.window.Dv) > 64;
    const bool few = QueryTile<32>::blocks(p.window) < 2 * device.multiprocessors();
    if (wide)
        few ? launch_forward<E, 128, 16>(device, p) : launch_forward<E, 128, 32>(device, p);
    else
        few ? launch_forward<E, 64, 16>(device, p) : launch_forward<E, 64, 32>(device, p);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, Optional sinks,
                                   Optional cu, Optional cu_k, int64_t left, int64_t right, double scale,
                                   double softcap) {
    const Device device(q);
    const WindowArguments in = read_window(q, k, v, sinks, cu, cu_k, left, right, scale, softcap);
    const int64_t B = q.size(0), T = q.size(1), Hq = q.size(2), Dv = v.size(3);
    const Tensor o = torch::stable::new_empty(q, {B, T, Hq, Dv});
    const Tensor lse = torch::stable::new_empty(q, {B, Hq, T}, ScalarType::Float);
    const Forward p{in.problem, kernel_rows(o), pointer<float>(lse)};
    if (!forward_sm90(device, p, in.q, in.k, in.v)) SLM_DISPATCH_16BIT(q, run_forward, device, p);
    return {o, lse};
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) { m.impl("sliding_window_forward", TORCH_BOX(&slm::forward)); }
