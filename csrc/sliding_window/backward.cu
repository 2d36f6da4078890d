// Sliding-window attention, backward, for compute capability 8.0 and later: two kernels, no atomics, the same
// bits every time.
//
// With P = 2^(x u - lse log2 e), recomputed tile by tile (Dao 2023, FlashAttention-2, section 3.1.2):
//
//     delta_i = dO_i . O_i - dlse_i        dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)
//     dQ = scale dS K                      dK = scale dS^T Q
//     with a softcap dS gains the factor 1 - tanh^2; a sink gets - sum of 2^((sink - lse) log2 e) delta
//
// dq_kernel has the forward's split, a warp a head and 32 queries (16 for 128 columns), and walks over the
// keys that they see. It first computes delta, once, and writes it beside lse for the other kernel; a row
// that sees nothing gets lse = +inf, so that its P is 0. dkv_kernel has a block for 128 keys (64 for 128
// columns) of a key-value head, 32 (16) a warp, and walks over the queries that see them, head by head of the
// group: so the sum over the group stays in registers, and GQA costs no memory. Its products are transposed,
// [keys, queries], so that P^T and dS^T go from registers into the second products. Both walk, skip and mask
// as the forward does. sinks_kernel adds up what the warps of dq_kernel left of the sinks' gradient, in one
// order.
//
// That is 7 products where a single pass has 5. A single pass adds dQ to a float32 copy in memory, by atomics
// or in turns, and converts it: with a window each row of dQ meets only W / 64 + 1 tiles, so that the copy
// moves (W / 64 + 3) 4 D bytes a row to save two products: W = 256, D = 64: 1.8 KB, 0.37 ns at 4.8 TB/s (less
// where L2 holds it), for 65 KFLOP, 0.11 ns at 613 TFLOP/s; and turns make blocks wait.
//
// P and dS are rounded to 16 bits for the tensor cores, as they are there in every flash attention; all else
// is float32. Scores outside the window become -inf before exp2.
//
// Count, B = 4, T = 8192, Hq = 16, Hkv = 4, D = 64, W = 512, H200: 7 products are 240 GFLOP in the window,
// 256 computed: 0.42 ms of mma.sync at 0.62 of 989 TFLOP/s, the floor; 0.5 GB are 0.1 ms, 2 x 285 M exp2 0.15
// ms. Two steps of dkv_kernel, 32 keys x 32 queries a warp with 64 columns, are 128 mma, and read by ldmatrix
// 16 KiB of Q and dO (each twice, straight and transposed) and 16 KiB of K and V: 832 and 1024 clocks a block.
//
// ptxas, registers for sm_80 and sm_90a, no spills; shared memory; 2 blocks a multiprocessor are meant:
//     dq, 64 columns: 245, 245; 64.5 KiB.       dq, 128 columns: 172, 177; 64.25 KiB.
//     dkv, 64 columns: 242, 244; 65 KiB.        dkv, 128 columns: 247, 247; 64.5 KiB.
// Considered for dkv with 64 columns: steps of 32 queries, which read K and V half as often, and 16 with K
// held in registers; both spill 1 to 6 registers on one of the architectures. Nothing here has run on a GPU
// yet.
#include <type_traits>

#include "window.cuh"

namespace slm {
namespace {

struct Backward {
    WindowProblem window;
    Rows dout, o, dq, dk, dv;
    const float *lse, *dlse;  // [B, Hq, T]; dlse may be null
    float2* statistics;  // [B, Hq, T]: lse in log2 units, +inf for rows that see nothing; delta
    float* parts;  // [Hq, B, parts]: of the sinks' gradient, or null
};

template <int C>
struct QueriesShape {
    static constexpr int kRows = C == 64 ? 32 : 16;  // queries a warp
    static constexpr int kThreads = 4 * kWarp;
    static constexpr int kTile = C == 64 ? 64 : 32, kStep = 32;  // keys copied, keys multiplied at a time
    static constexpr int kBytes = Tile<C>::bytes(8 * kRows + 4 * kTile) + 4 * kRows * int(sizeof(float));
};

template <int C>
struct KeysShape {
    static constexpr int kRows = C == 64 ? 32 : 16;  // keys a warp
    static constexpr int kThreads = 4 * kWarp;
    static constexpr int kTile = C == 64 ? 64 : 32;  // queries copied at a time
    static constexpr int kStep = C == 64 ? 16 : 32;  // queries multiplied at a time
    static constexpr int kBytes = Tile<C>::bytes(8 * kRows + 4 * kTile) + 2 * kTile * int(sizeof(float2));
};

// P from a score x; x becomes what multiplies dP - delta: P, and with a softcap times the derivative of tanh.
// Hidden scores are -inf, or less than -1 with a softcap: both give 0.
template <bool kCapped>
SLM_DEVICE float weigh(float& x, float unit, float lse) {
    const float p = exp2(fmaf(x, unit, -lse)), y = fmaxf(x, -1.f);
    x = kCapped ? p * (1 - y * y) : p;
    return p;
}

// delta = sum do o - dlse of the warp's rows, 16 bytes of a row a lane: kept in `deltas`, written with lse
// for the other kernel. Returns the warp's part of the sink's gradient.
template <typename E, int C, int kRows>
SLM_DEVICE float write_deltas(const Backward& p, const QueryTile<kRows>& at, Tile<C> douts, Shared deltas) {
    constexpr int kPieces = Tile<C>::kPieces;
    const WindowProblem& w = p.window;
    const int lane = lane_of_thread(), piece = lane % kPieces;
    const float sink = w.sinks != nullptr ? load(w.sinks + at.head) : 0.f;
    const E* o = p.o.at<E>(at.b, at.row, at.head) + piece * 8;
    float part = 0;
#pragma unroll 2
    for (int r = lane / kPieces; r < kRows; r += kWarp / kPieces) {
        float delta = 0;
        if (r < at.rows && piece * 8 < w.Dv) {
            const uint4 x = load<uint4>(static_cast<const void*>(o + r * p.o.t));
            const uint4 y = load<uint4>(douts.piece(r, piece));
            delta = first_of<E>(x.x) * first_of<E>(y.x) + second_of<E>(x.x) * second_of<E>(y.x) +
                    first_of<E>(x.y) * first_of<E>(y.y) + second_of<E>(x.y) * second_of<E>(y.y) +
                    first_of<E>(x.z) * first_of<E>(y.z) + second_of<E>(x.z) * second_of<E>(y.z) +
                    first_of<E>(x.w) * first_of<E>(y.w) + second_of<E>(x.w) * second_of<E>(y.w);
        }
#pragma unroll
        for (int mask = 1; mask < kPieces; mask *= 2) delta += shuffle_xor(delta, mask);
        if (piece != 0) continue;
        float lse = INFINITY;
        if (r < at.rows) {
            lse = load(p.lse + at.at(w, r));
            if (p.dlse != nullptr) delta -= load(p.dlse + at.at(w, r));
            if (lse == -INFINITY) lse = INFINITY, delta = 0;  // whatever dlse holds there
            store(p.statistics + at.at(w, r), make_float2(lse * kLog2E, delta));
        }
        store(deltas + Shared(r * int(sizeof(float))), delta);
        part -= exp2((sink - lse) * kLog2E) * delta;
    }
#pragma unroll
    for (int mask = kPieces; mask < kWarp; mask *= 2) part += shuffle_xor(part, mask);
    return part;
}

template <typename E, int C>
SLM_KERNEL(4 * kWarp, 2)
dq_kernel(const __grid_constant__ Backward p) {
    using Shape = QueriesShape<C>;
    constexpr int kRows = Shape::kRows, kTile = Shape::kTile, kStep = Shape::kStep, M = kRows / 16,
                  N = kStep / 8;
    const WindowProblem& w = p.window;
    const QueryTile<kRows> at(w);
    const int thread = int(threadIdx.x), lane = lane_of_thread(), warp = warp_of_thread();
    const Tile<C> queries{shared_memory() + Tile<C>::bytes(2 * warp * kRows)};  // of the warp; later its dq
    const Tile<C> douts = queries.from(kRows);
    const Tile<C> tiles{shared_memory() + Tile<C>::bytes(8 * kRows)};
    const auto keys = [&](int slot) { return tiles.from(2 * slot * kTile); };
    const auto values = [&](int slot) { return tiles.from((2 * slot + 1) * kTile); };
    const Shared deltas = tiles.from(4 * kTile).base + Shared(warp * kRows * int(sizeof(float)));

    Copier<kTile, Shape::kThreads, C, E> k_rows(w.k.at<E>(at.b, at.key, at.h), int(w.k.t), thread);
    Copier<kTile, Shape::kThreads, C, E> v_rows(w.v.at<E>(at.b, at.key, at.h), int(w.v.t), thread);
    const auto fetch = [&](int slot, int rows) {
        k_rows.copy(keys(slot), int(w.k.t), rows, w.D, thread);
        v_rows.copy(values(slot), int(w.v.t), rows, w.Dv, thread);
        commit_copies();
    };
    const int q_row = int(w.q.t), do_row = int(p.dout.t);
    Copier<kRows, kWarp, C, E>(w.q.at<E>(at.b, at.row, at.head), q_row, lane)
        .copy(queries, q_row, at.rows, w.D, lane);
    Copier<kRows, kWarp, C, E>(p.dout.at<E>(at.b, at.row, at.head), do_row, lane)
        .copy(douts, do_row, at.rows, w.Dv, lane);
    commit_copies();
    fetch(0, at.count);
    wait_copies<1>();
    sync_warp();
    const float part = write_deltas<E>(p, at, douts, deltas);
    if (p.parts != nullptr && lane == 0)
        store(p.parts + (int64_t(at.head) * w.B + at.b) * QueryTile<kRows>::parts(w) + at.part, part);
    sync_warp();
    float lse[2 * M], delta[2 * M];
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
        const int row = 8 * r + lane / 4;
        const float x = row < at.rows ? load(p.lse + at.at(w, row)) : -INFINITY;
        lse[r] = x == -INFINITY ? INFINITY : x * kLog2E;
        delta[r] = load<float>(deltas + Shared(row * int(sizeof(float))));
    }
    const Operand<C, M, C == 64> q_operand(queries), do_operand(douts);

    float dq[M][C / 8][4] = {};
    int distance = at.distance, left = at.count;  // of the keys of a step; keys from there on
    for (int slot = 0; left > 0; slot ^= 1) {
        wait_copies<0>();
        sync_block();
        if (left > kTile) fetch(slot ^ 1, left - kTile);
#pragma unroll 1
        for (int j = 0; j < kTile; j += kStep, distance -= kStep, left -= kStep) {
            if (left <= 0 || w.window.misses(distance, kRows, kStep)) continue;
            float s[M][N][4] = {}, dp[M][N][4] = {};
            multiply_transposed<E>(s, q_operand, keys(slot).from(j));
            rewrite(s, w);
            if (left < kStep || !w.window.covers(distance, kRows, kStep))
                hide(s, w.window, distance, left, -INFINITY);
            const auto weigh_all = [&](auto capped) {
#pragma unroll
                for (int n = 0; n < M * N * 4; ++n)
                    weigh<decltype(capped)::value>(s[n / 4 / N][n / 4 % N][n % 4], w.unit,
                                                   lse[n / 4 / N * 2 + n % 4 / 2]);
            };
            w.capped ? weigh_all(std::true_type{}) : weigh_all(std::false_type{});
            multiply_transposed<E>(dp, do_operand, values(slot).from(j));
#pragma unroll
            for (int n = 0; n < M * N * 4; ++n)
                s[n / 4 / N][n / 4 % N][n % 4] *=
                    dp[n / 4 / N][n / 4 % N][n % 4] - delta[n / 4 / N * 2 + n % 4 / 2];
            multiply_rounded<E>(dq, s, keys(slot).from(j));
        }
    }
    wait_copies<0>();
#pragma unroll
    for (int n = 0; n < M * C / 8 * 4; ++n) dq[n / 4 / (C / 8)][n / 4 % (C / 8)][n % 4] *= w.scale;
    write_rows<E>(queries, dq, p.dq.at<E>(at.b, at.row, at.head), p.dq.t, at.rows, w.D);
}

template <typename E, int C>
SLM_KERNEL(4 * kWarp, 2)
dkv_kernel(const __grid_constant__ Backward p) {
    using Shape = KeysShape<C>;
    constexpr int kRows = Shape::kRows, kTile = Shape::kTile, kStep = Shape::kStep, M = kRows / 16,
                  N = kStep / 8;
    const WindowProblem& w = p.window;
    const int thread = int(threadIdx.x), lane = lane_of_thread(), warp = warp_of_thread(), group = w.Hq / w.H;
    const int all = tile_count(w.S, 4 * kRows, w.N, w.cu_k != nullptr);
    const int h = int(blockIdx.y), b = int(blockIdx.x) / all;
    const Place place = place_of(int(blockIdx.x) % all, 4 * kRows, w.S, w.T, w.cu_k, w.cu_q, w.N);
    const int offset = place.length - place.other_length;  // query row t stands at position t + offset
    const int row = place.start + place.first + warp * kRows,
              rows = place.length - place.first - warp * kRows;
    // The queries that the block's keys meet: `count` rows from `start`; none if it has no keys.
    const int last = min(place.first + 4 * kRows, place.length) - 1;
    const int begin = max(place.first - w.window.after - offset, 0), start = place.other_start + begin;
    const int end = min(last + w.window.before + 1 - offset, place.other_length);
    const int count = place.first > last ? 0 : max(end - begin, 0);
    constexpr int kNowhere = 1 << 30;  // meets no query
    const int first = rows > 0 ? place.first + warp * kRows - offset - begin : kNowhere;
    const Window window = w.window.turned();

    const Tile<C> keys{shared_memory() + Tile<C>::bytes(2 * warp * kRows)};  // of the warp; later its dk
    const Tile<C> values = keys.from(kRows);  // later its dv
    const Tile<C> tiles{shared_memory() + Tile<C>::bytes(8 * kRows)};
    const auto queries = [&](int slot) { return tiles.from(2 * slot * kTile); };
    const auto douts = [&](int slot) { return tiles.from((2 * slot + 1) * kTile); };
    const auto statistics = [&](int slot) {
        return tiles.from(4 * kTile).base + Shared(slot * kTile * int(sizeof(float2)));
    };

    using Queries = Copier<kTile, Shape::kThreads, C, E>;
    const auto queries_of = [&](int head) { return Queries(w.q.at<E>(b, start, head), int(w.q.t), thread); };
    const auto douts_of = [&](int head) {
        return Queries(p.dout.at<E>(b, start, head), int(p.dout.t), thread);
    };
    Queries q_rows = queries_of(h * group), do_rows = douts_of(h * group);
    const auto fetch = [&](int slot, int g, int left) {
        if (g > 0 && left == count) q_rows = queries_of(h * group + g), do_rows = douts_of(h * group + g);
        q_rows.copy(queries(slot), int(w.q.t), left, w.D, thread);
        do_rows.copy(douts(slot), int(p.dout.t), left, w.Dv, thread);
        const int64_t first = (int64_t(b) * w.Hq + h * group + g) * w.T + (start + count - left);
        if (thread < kTile)
            copy_async_8(statistics(slot) + Shared(thread * int(sizeof(float2))),
                         p.statistics + first + thread, thread < left);
        commit_copies();
    };
    float dk[M][C / 8][4] = {}, dv[M][C / 8][4] = {};
    if (count > 0) {
        const int k_row = int(w.k.t), v_row = int(w.v.t);
        Copier<kRows, kWarp, C, E>(w.k.at<E>(b, row, h), k_row, lane).copy(keys, k_row, rows, w.D, lane);
        Copier<kRows, kWarp, C, E>(w.v.at<E>(b, row, h), v_row, lane).copy(values, v_row, rows, w.Dv, lane);
        fetch(0, 0, count);
    }
    const Operand<C, M, false> k_operand(keys), v_operand(values);
    int slot = 0;
    for (int g = 0; g < group; ++g) {
        int distance = first, left = count;
        for (; left > 0; slot ^= 1) {
            wait_copies<0>();
            sync_block();
            if (left > kTile || g + 1 < group)
                fetch(slot ^ 1, left > kTile ? g : g + 1, left > kTile ? left - kTile : count);
#pragma unroll 1
            for (int j = 0; j < kTile; j += kStep, distance -= kStep, left -= kStep) {
                if (left <= 0 || window.misses(distance, kRows, kStep)) continue;
                float s[M][N][4] = {};
                multiply_transposed<E>(s, k_operand, queries(slot).from(j));
                rewrite(s, w);
                if (left < kStep || !window.covers(distance, kRows, kStep))
                    hide(s, window, distance, left, -INFINITY);
                const Shared at = statistics(slot) + Shared((j + 2 * (lane % 4)) * int(sizeof(float2)));
                const auto two_of = [&](int n) {
                    return load<float4>(at + Shared(8 * n * int(sizeof(float2))));
                };
                uint32_t rounded[M][N / 2][4];
                const auto weigh_all = [&](auto capped) {
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        const float4 two = two_of(n);  // lse and delta of a query, and of the next
#pragma unroll
                        for (int m = 0; m < M; ++m) {
                            float d[4];
#pragma unroll
                            for (int e = 0; e < 4; ++e)
                                d[e] =
                                    weigh<decltype(capped)::value>(s[m][n][e], w.unit, e % 2 ? two.z : two.x);
                            rounded[m][n / 2][n % 2 * 2] = pack<E>(d[0], d[1]);
                            rounded[m][n / 2][n % 2 * 2 + 1] = pack<E>(d[2], d[3]);
                        }
                    }
                };
                w.capped ? weigh_all(std::true_type{}) : weigh_all(std::false_type{});
                multiply_rounded<E>(dv, rounded, douts(slot).from(j));
                float dp[M][N][4] = {};
                multiply_transposed<E>(dp, v_operand, douts(slot).from(j));
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const float4 two = two_of(n);
#pragma unroll
                    for (int m = 0; m < M; ++m)
#pragma unroll
                        for (int e = 0; e < 4; ++e) s[m][n][e] *= dp[m][n][e] - (e % 2 ? two.w : two.y);
                }
                multiply_rounded<E>(dk, s, queries(slot).from(j));
            }
        }
    }
#pragma unroll
    for (int n = 0; n < M * C / 8 * 4; ++n) dk[n / 4 / (C / 8)][n / 4 % (C / 8)][n % 4] *= w.scale;
    write_rows<E>(keys, dk, p.dk.at<E>(b, row, h), p.dk.t, rows, w.D);
    write_rows<E>(values, dv, p.dv.at<E>(b, row, h), p.dv.t, rows, w.Dv);
}

// Sums the parts [Hq, n] of each head, in one order.
SLM_KERNEL(kWarp, 1)
sinks_kernel(const float* parts, int n, float* dsinks) {
    float sum = 0;
    for (int x = lane_of_thread(); x < n; x += kWarp) sum += load(parts + int64_t(blockIdx.x) * n + x);
    for (int mask = 1; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane_of_thread() == 0) store(dsinks + blockIdx.x, sum);
}

template <typename E, int C>
void launch_backward(const Device& device, const Backward& p) {
    const WindowProblem& w = p.window;
    using Queries = QueriesShape<C>;
    using Keys = KeysShape<C>;
    device.launch(dq_kernel<E, C>, dim3(unsigned(QueryTile<Queries::kRows>::blocks(w))), Queries::kThreads,
                  Queries::kBytes, p);
    const int64_t tiles = tile_count(w.S, 4 * Keys::kRows, w.N, w.cu_k != nullptr);
    device.launch(dkv_kernel<E, C>, dim3(unsigned(tiles * w.B), unsigned(w.H)), Keys::kThreads, Keys::kBytes,
                  p);
}

template <typename E>
void run_backward(const Device& device, const Backward& p, bool wide) {
    wide ? launch_backward<E, 128>(device, p) : launch_backward<E, 64>(device, p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout, Optional dlse, const Tensor& q,
                                                    const Tensor& k, const Tensor& v, const Tensor& o,
                                                    const Tensor& lse, Optional sinks, Optional cu,
                                                    Optional cu_k, int64_t left, int64_t right, double scale,
                                                    double softcap) {
    const Device device(q);
    const WindowArguments in = read_window(q, k, v, sinks, cu, cu_k, left, right, scale, softcap);
    sliding_window::check_backward(dout, dlse, q, v, o, lse);
    const WindowProblem& w = in.problem;
    const Tensor douts = aligned_rows(dout), outs = aligned_rows(o), lses = torch::stable::contiguous(lse);
    Optional dlses;
    if (dlse.has_value()) dlses = torch::stable::contiguous(*dlse);
    const Tensor dq = torch::stable::new_empty(q, {w.B, w.T, w.Hq, w.D});
    const Tensor dk = torch::stable::new_empty(q, {w.B, w.S, w.H, w.D});
    const Tensor dv = torch::stable::new_empty(q, {w.B, w.S, w.H, w.Dv});
    const Tensor dsinks = torch::stable::new_empty(lses, {w.sinks != nullptr ? w.Hq : 0});
    const bool wide = std::max(w.D, w.Dv) > 64;
    const int parts = w.B * (wide ? QueryTile<QueriesShape<128>::kRows>::parts(w)
                                  : QueryTile<QueriesShape<64>::kRows>::parts(w));
    const Tensor sums = torch::stable::new_empty(lses, {w.sinks != nullptr ? w.Hq : 0, parts});
    const Tensor statistics = torch::stable::new_empty(lses, {w.B, w.Hq, w.T, 2});
    const Backward p{w,
                     kernel_rows(douts),
                     kernel_rows(outs),
                     kernel_rows(dq),
                     kernel_rows(dk),
                     kernel_rows(dv),
                     pointer<float>(lses),
                     dlses.has_value() ? pointer<float>(*dlses) : nullptr,
                     pointer<float2>(statistics),
                     w.sinks != nullptr ? pointer<float>(sums) : nullptr};
    SLM_DISPATCH_16BIT(q, run_backward, device, p, wide);
    if (w.sinks != nullptr)
        device.launch(sinks_kernel, dim3(unsigned(w.Hq)), kWarp, 0,
                      static_cast<const float*>(pointer<float>(sums)), parts, pointer<float>(dsinks));
    return {dq, dk, dv, dsinks};
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) { m.impl("sliding_window_backward", TORCH_BOX(&slm::backward)); }
