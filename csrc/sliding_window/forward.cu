// Sliding-window attention, forward.
#include "forward.cuh"

namespace slm {
namespace {

// C: columns that hold a head. kRows: queries a warp.
template <int C, int kRows>
struct ForwardShape {
    static constexpr int kThreads = 4 * kWarp;
    static constexpr int kTile = C == 64 ? 64 : 32;  // keys copied at a time
    static constexpr int kStep = 32;                     // keys multiplied at a time
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
