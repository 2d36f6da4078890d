// Sliding-window attention, forward.
#include "window.cuh"

namespace slm {
namespace {

struct Forward {
    WindowProblem window;
    Rows o;      // [B, T, Hq, Dv]
    float* lse;  // [B, Hq, T]
};

// C: columns that hold a head. kRows: queries a warp.
template <int C, int kRows>
struct ForwardShape {
    static constexpr int kThreads = 4 * kWarp;
    static constexpr int kTile = C == 64 ? 64 : 48;  // keys copied at a time
    static constexpr int kStep = C == 64 ? 32 : 48;  // keys multiplied at a time
    static constexpr int kBlocks = C == 64 ? (kRows == 32 ? 3 : 4) : 2;
    static constexpr int kBytes = Tile<C>::bytes(4 * kRows + 4 * kTile);
};

template <typename E, int C, int kRows>
SLM_KERNEL(4 * kWarp, (ForwardShape<C, kRows>::kBlocks))
forward_kernel(const __grid_constant__ Forward p) {
    using Shape = ForwardShape<C, kRows>;
    constexpr int kTile = Shape::kTile, kStep = Shape::kStep, M = kRows / 16, N = kStep / 8;
    const WindowProblem& w = p.window;
    const QueryTile<kRows> at(w);
    if (at.empty()) return;
    const int thread = int(threadIdx.x), lane = lane_of_thread(), S = at.place.other_length;
    const Tile<C> queries{shared_memory() +
                          Tile<C>::bytes(warp_of_thread() * kRows)};  // of the warp; later its o
    const Shared tiles = shared_memory() + Tile<C>::bytes(4 * kRows);
    const auto keys = [&](int slot) { return Tile<C>{tiles + Tile<C>::bytes(2 * slot * kTile)}; };
    const auto values = [&](int slot) { return Tile<C>{tiles + Tile<C>::bytes((2 * slot + 1) * kTile)}; };
    const E* q = w.q.at<E>(at.b, at.place.start, at.head);
    const E* k = w.k.at<E>(at.b, at.place.other_start, at.h);
    const E* v = w.v.at<E>(at.b, at.place.other_start, at.h);

    const Range met = w.band.keys(at.block, S);
    const Meeting mine = keys_of(w.band, at.queries, S);
    const int end = int(met.end);
    const auto fetch = [&](int j, int slot) {
        copy_tile(keys(slot), kTile, k, w.k.t, j, end, w.D, thread, Shape::kThreads);
        copy_tile(values(slot), kTile, v, w.v.t, j, end, w.Dv, thread, Shape::kThreads);
        commit_copies();
    };
    copy_tile(queries, kRows, q, w.q.t, at.row, at.place.length, w.D, lane, kWarp);
    commit_copies();
    fetch(int(met.begin), 0);
    wait_copies<1>();
    sync_warp();
    constexpr bool kHeld = C == 64;  // queries stay in registers
    uint32_t held[kHeld ? M : 1][kHeld ? C / 16 : 1][4];
    if constexpr (kHeld)
#pragma unroll
        for (int n = 0; n < M * C / 16; ++n)
            load_a(held[n * 16 / C][n % (C / 16)], queries, n * 16 / C * 16, n % (C / 16) * 16);
    const auto operand = [&](uint32_t(&a)[4], int m, int k) {
        if constexpr (kHeld)
#pragma unroll
            for (int n = 0; n < 4; ++n) a[n] = held[m][k][n];
        else
            load_a(a, queries, 16 * m, 16 * k);
    };

    float o[M][C / 8][4] = {};
    Softmax<M> softmax;
    const auto rescale = [&](int m, int half, float factor) {
#pragma unroll
        for (int n = 0; n < C / 8; ++n) o[m][n][2 * half] *= factor, o[m][n][2 * half + 1] *= factor;
    };
    int slot = 0;
    for (int tile = int(met.begin); tile < end; tile += kTile, slot ^= 1) {
        wait_copies<0>();
        sync_block();
        if (tile + kTile < end) fetch(tile + kTile, slot ^ 1);
#pragma unroll 1
        for (int j = tile; j < tile + kTile; j += kStep) {
            if (mine.misses(j, kStep)) continue;
            float s[M][N][4] = {};
            multiply_transposed<E>(s, operand, keys(slot).from(j - tile));
            if (w.rewrite) rewrite(s, w);
            if (!mine.whole(j, kStep))
                hide(s, int(at.queries.begin), j, int(w.band.left), int(w.band.right), end, -INFINITY);
            softmax.update(s, w.unit, rescale);
            multiply_rounded<E>(o, s, values(slot).from(j - tile));
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
            if (lane % 4 == 0 && at.has(r)) store(p.lse + at.at(w, r), last.y);
        }
    write_rows<E>(queries, o, p.o.at<E>(at.b, at.place.start + at.row, at.head), p.o.t,
                  at.place.length - at.row, w.Dv);
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
    const Forward p{in.problem, {pointer<void>(o), T * Hq * Dv, Hq * Dv, Dv}, pointer<float>(lse)};
    SLM_DISPATCH_16BIT(q, run_forward, device, p);
    return {o, lse};
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) { m.impl("sliding_window_forward", TORCH_BOX(&slm::forward)); }
