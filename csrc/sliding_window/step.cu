// Decode step: one new token enters the ring of every key-value head, and its query heads attend to the ring.
//
//     x_j = log2(e) softcap(scale q . k_j),   o = sum_j 2^(x_j - m) v_j / (sum_j 2^(x_j - m) + 2^(sink - m))
//
// The order of the keys does not matter to a softmax, so slots are read as they lie. Rings [B, H, W, D] and
// [B, H, W, Dv], contiguous; token p stands in slot p % W.
//
// Split: a block of 128 threads takes the `keys` slots of one split of one ring, for up to G of the query heads
// that share it, so that the ring is read once (more than 8 heads, 4 in float32, read it again, from L2). Three
// phases over its slots: scores to shared memory, their maximum and exponentials, the sum over values. A row of
// the ring lies across L threads, 8 numbers each, so L = 8, 16, 32 for head sizes up to 64, 128, 256, and a warp
// reads 32 / L rows with one load of 16 bytes a thread. A thread has 8 such loads in flight (float32: 4 of 32
// bytes), 16 KiB a block; four blocks fit into a multiprocessor (three of G = 8) by their registers, 64 KiB in
// flight, where Little's law asks for 30 (36 bytes a ns on an H200, 800 ns). The first values are under way
// during the exponentials. Dot products are partial sums of L threads; 32 of them are summed by the halving
// exchange of a recursive reduce-scatter, about one shuffle a sum instead of log2 L.
//
// Across splits (flash decoding: Dao et al. 2023, "Flash-Decoding for long-context inference"): each block
// leaves its maxima, sums and unnormalised outputs in scratch; the last to finish merges them in the order of the
// splits, so the bits do not depend on who was last. One launch and no counter to be cleared: the ticket is
// taken in the upper 16 bits of `position`, which the last block takes back as it advances it.
//
// The new token: a block that finds its slot among its own takes it from k and v, and writes it to the ring.
// Nobody else looks at that slot, so no block waits for another. Several tokens: one launch each.
//
// Bytes: the ring, 2 W D of 16-bit numbers a head with D = Dv; that over the copy bandwidth is the floor. FLOPs:
// 4 G D W, at G = 4 in bfloat16 4 a byte, where an H200 has 14 in float32, so no tensor cores. Scratch of the
// splits: 4 G (Dv + 2) bytes a split, 2 % of 256 slots at D = 64, G = 4.
// Not run on hardware yet. ptxas, sm_80 and sm_90a: at most 96 registers for G = 1, 128 for 4, 168 for 8; no
// spills. Considered: the online softmax of prefill, one phase instead of three, but a rescaling and an exchange
// of maxima for every few keys; tensor cores, which would take 8 query heads for the price of one, and only the
// 16-bit types; asynchronous copies to shared memory, which registers make do without.
#include "../common/eight.cuh"
#include "../common/launch.cuh"
#include "../common/rows.h"
#include "step.h"

namespace slm {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kMostKeys = 512;  // of a block: its scores stand in shared memory
constexpr int kLeastKeys = 128;  // a split of fewer is not worth its merge
constexpr int kTicketBits = 48;  // of `position`, below the ticket
constexpr float kInfinity = __builtin_huge_valf(), kLog2e = 1.44269504f;

struct StepProblem {
    Rows q, k, v, o;  // of one token: [B, ., H, D]
    void *k_ring, *v_ring;
    int64_t* position;  // [B, H]
    const float* sinks;  // [Hq], or null
    float* part;  // of each ring and split: [group, Dv], not normalised
    float2* statistics;  // of each ring and split: [group], maximum and sum
    int64_t W;
    int D, Dv, H, group;
    int keys, splits, chunks;  // slots of a split; chunks of G query heads
    float scale, softcap;
};

template <int G>
struct Layout {  // shared memory: what each is, [..., G] floats
    static constexpr Shared kTops = 0;  // [warps]
    static constexpr Shared kSums = kTops + kWarps * G * 4;  // [warps]
    static constexpr Shared kMaxima = kSums + kWarps * G * 4;  // []
    static constexpr Shared kLast = kMaxima + G * 4;  // one int
    static constexpr Shared kScores = (kLast + 4 + 15) / 16 * 16;  // [keys]
    static constexpr Shared parts(int keys) { return kScores + Shared((keys * G * 4 + 15) / 16 * 16); }
    static constexpr int bytes(int keys, int Dv) {
        return int(parts(keys)) + kWarps * G * Dv * 4;
    }  // [warps, G, Dv]
};

// Sums each of N numbers over the threads that differ in the bits of `mask` and below.
template <int mask, int N, int S>
SLM_DEVICE void sum_over(float (&x)[S]) {
    if constexpr (mask > 0 && N > 1) {  // this half keeps half of them
        const bool upper = (lane_of_thread() & mask) != 0;
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            const float mine = upper ? x[n + N / 2] : x[n], other = upper ? x[n] : x[n + N / 2];
            x[n] = mine + shuffle_xor(other, mask);
        }
        sum_over<mask / 2, N / 2>(x);
    } else if constexpr (mask > 0) {
        x[0] += shuffle_xor(x[0], mask);
        sum_over<mask / 2, N>(x);
    }
}

// Sums each x over L neighbouring threads. Thread c of the L gets sums first, first + 1, ..., in x[0], x[1], ...
// and returns `first`; -1 if it has nothing but another's.
template <int L, int N>
SLM_DEVICE int sums_over(float (&x)[N]) {
    constexpr int kSame = L > N ? L / N : 1, kEach = N > L ? N / L : 1;
    sum_over<L / 2, N>(x);
    const int c = lane_of_thread() % L;
    return c % kSame == 0 ? c / kSame * kEach : -1;
}

// The softmax of `count` parts and a sink: their maxima and sums, and four numbers of their outputs.
template <typename Statistics, typename Part>
SLM_DEVICE float4 merge(int count, float sink, Statistics statistics, Part part) {
    float m = sink;
#pragma unroll 8
    for (int n = 0; n < count; ++n) m = fmaxf(m, statistics(n).x);
    if (m == -kInfinity) m = 0.f;
    float total = exp2(sink - m);
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (int n = 0; n < count; ++n) {
        const float2 of = statistics(n);
        const float4 x = part(n);
        const float factor = exp2(of.x - m);
        total += factor * of.y;
        o.x += factor * x.x, o.y += factor * x.y, o.z += factor * x.z, o.w += factor * x.w;
    }
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    return make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse);
}

template <typename E, int L, int G>
SLM_KERNEL(kThreads, G == 8 ? 3 : 4)
step_kernel(const __grid_constant__ StepProblem p) {
    using Memory = Layout<G>;
    constexpr int kRows = kWarp / L;  // that a warp reads with one load
    constexpr int kLoads = sizeof(E) == 4 ? 4 : 8;  // of a thread in flight
    constexpr int kTogether = kLoads * G > 32 ? 32 / G : kLoads;  // rows whose sums are made together
    constexpr int kStep = kWarps * kRows * kLoads;  // slots of a block at a time
    const int thread = int(threadIdx.x), warp = warp_of_thread(), lane = lane_of_thread();
    const int c = lane % L, row = warp * kRows * kLoads + lane / L;
    const Shared memory = shared_memory();

    const unsigned chunk = blockIdx.x % unsigned(p.chunks), of_ring = blockIdx.x / unsigned(p.chunks);
    const unsigned split = of_ring % unsigned(p.splits);
    const int64_t ring = of_ring / unsigned(p.splits), b = ring / p.H, h = ring % p.H;
    const int g0 = int(chunk) * G, heads = min(G, p.group - g0);  // query heads of this block
    const E* q = p.q.at<const E>(b, 0, h * p.group + g0);
    float x_q[G][8];
#pragma unroll
    for (int g = 0; g < G; ++g)
        widen(g < heads && c * 8 < p.D ? load_eight(q + g * p.q.h + c * 8) : Eight<E>{}, x_q[g]);

    const int64_t position = load_relaxed(p.position + ring) & ((int64_t(1) << kTicketBits) - 1);
    const int64_t first = int64_t(split) * p.keys, filled = min(position + 1, p.W);
    const int count = int(max(int64_t(0), min(filled - first, int64_t(p.keys))));
    const int64_t fresh = position % p.W - first;  // the new token's slot, if among this block's
    E* const k_ring = static_cast<E*>(p.k_ring) + (ring * p.W + first) * p.D;
    E* const v_ring = static_cast<E*>(p.v_ring) + (ring * p.W + first) * p.Dv;
    const E *const new_k = p.k.at<const E>(b, 0, h), *const new_v = p.v.at<const E>(b, 0, h);

    Eight<E> rows[kLoads];
    const auto read = [&](const E* from, const E* new_row, int size, int start) {
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            const int key = start + n * kRows;
            const E* at = key == fresh ? new_row : from + int64_t(key) * size;
            rows[n] = key < count && c * 8 < size ? load_eight(at + c * 8) : Eight<E>{};
        }
    };

    // ---- scores
#pragma unroll 1
    for (int key = row; key - lane / L < count; key += kStep) {
        read(k_ring, new_k, p.D, key);
#pragma unroll
        for (int begin = 0; begin < kLoads; begin += kTogether) {
            float x[kTogether * G];
#pragma unroll
            for (int n = 0; n < kTogether; ++n) {
                float k[8];
                widen(rows[begin + n], k);
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    float sum = 0.f;
#pragma unroll
                    for (int e = 0; e < 8; ++e) sum += x_q[g][e] * k[e];
                    x[n * G + g] = sum;
                }
            }
            const int mine = sums_over<L>(x);
#pragma unroll
            for (int n = 0; n < max(1, kTogether * G / L); ++n) {
                const int j = key + (begin + (mine + n) / G) * kRows;
                if (mine < 0 || j >= count) continue;
                float y = x[n] * p.scale;
                if (p.softcap > 0.f) y = p.softcap * tanhf(y / p.softcap);
                store(memory + Memory::kScores + Shared(j * G + (mine + n) % G) * 4, y * kLog2e);
            }
        }
    }
    read(v_ring, new_v, p.Dv, row);  // under way meanwhile
    sync_block();

    // ---- their maximum and exponentials
    const auto score = [&](int key, int g) { return memory + Memory::kScores + Shared(key * G + g) * 4; };
    float m[G];
#pragma unroll
    for (int g = 0; g < G; ++g) m[g] = -kInfinity;
#pragma unroll 1
    for (int key = thread; key < count; key += kThreads)
#pragma unroll
        for (int g = 0; g < G; ++g) m[g] = fmaxf(m[g], load<float>(score(key, g)));
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2) m[g] = fmaxf(m[g], shuffle_xor(m[g], mask));
        if (lane == 0) store(memory + Memory::kTops + Shared(warp * G + g) * 4, m[g]);
    }
    sync_block();
#pragma unroll
    for (int g = 0; g < G; ++g) {
        for (int w = 0; w < kWarps; ++w)
            m[g] = fmaxf(m[g], load<float>(memory + Memory::kTops + Shared(w * G + g) * 4));
        if (thread == 0) store(memory + Memory::kMaxima + Shared(g) * 4, m[g]);
        if (m[g] == -kInfinity) m[g] = 0.f;
    }
#pragma unroll 1
    for (int key = thread; key < count; key += kThreads)
#pragma unroll
        for (int g = 0; g < G; ++g) store(score(key, g), exp2(load<float>(score(key, g)) - m[g]));
    sync_block();

    // ---- the sum over values
    float o[G][8] = {}, total[G] = {};
#pragma unroll 1
    for (int key = row; key - lane / L < count; key += kStep) {
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            const int j = key + n * kRows;
            if (j >= count) continue;
            float v[8];
            widen(rows[n], v);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float weight = load<float>(score(j, g));
                total[g] += weight;
#pragma unroll
                for (int e = 0; e < 8; ++e) o[g][e] += weight * v[e];
            }
        }
        read(v_ring, new_v, p.Dv, key + kStep);
    }
    const Shared parts = memory + Memory::parts(p.keys);
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int mask = L; mask < kWarp; mask *= 2) {
            total[g] += shuffle_xor(total[g], mask);
#pragma unroll
            for (int e = 0; e < 8; ++e) o[g][e] += shuffle_xor(o[g][e], mask);
        }
        if (lane == 0) store(memory + Memory::kSums + Shared(warp * G + g) * 4, total[g]);
        if (lane >= L || c * 8 >= p.Dv) continue;
        const Shared to = parts + Shared((warp * G + g) * p.Dv + c * 8) * 4;
        store(to, make_float4(o[g][0], o[g][1], o[g][2], o[g][3]));
        store(to + 16, make_float4(o[g][4], o[g][5], o[g][6], o[g][7]));
    }
    sync_block();

    // ---- the block's results, and the new token into its slot
    const auto statistics_of = [&](int g) {
        float2 of = make_float2(load<float>(memory + Memory::kMaxima + Shared(g) * 4), 0.f);
        for (int w = 0; w < kWarps; ++w) of.y += load<float>(memory + Memory::kSums + Shared(w * G + g) * 4);
        return of;
    };
    const auto sink_of = [&](int g) {
        return p.sinks == nullptr ? -kInfinity : load(p.sinks + h * p.group + g) * kLog2e;
    };
    const int quads = p.Dv / 4;
    const int64_t place = (ring * p.splits + split) * p.group + g0;
#pragma unroll 1
    for (int n = thread; n < heads * quads; n += kThreads) {
        const int g = n / quads, e = n % quads * 4;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int w = 0; w < kWarps; ++w) {
            const float4 x = load<float4>(parts + Shared((w * G + g) * p.Dv + e) * 4);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        if (p.splits > 1)
            store(static_cast<void*>(p.part + (place + g) * p.Dv + e), sum);
        else
            store_four(
                p.o.at<E>(b, 0, h * p.group + g0 + g) + e,
                merge(1, sink_of(g0 + g), [&](int) { return statistics_of(g); }, [&](int) { return sum; }));
    }
    if (p.splits > 1 && thread < heads)
        store(static_cast<void*>(p.statistics + place + thread), statistics_of(thread));
    if (chunk == 0 && fresh >= 0 && fresh < count) {
        for (int e = thread * 8; e < p.D; e += kThreads * 8)
            store_eight(k_ring + fresh * p.D + e, load_eight(new_k + e));
        for (int e = thread * 8; e < p.Dv; e += kThreads * 8)
            store_eight(v_ring + fresh * p.Dv + e, load_eight(new_v + e));
    }

    // ---- the last block of a ring merges the splits and advances the position
    const int64_t blocks = int64_t(p.splits) * p.chunks;
    if (blocks == 1) {
        if (thread == 0) store(p.position + ring, position + 1);
        return;
    }
    sync_block();
    if (thread == 0) {
        fence();
        const int64_t ticket = atomic_add(p.position + ring, int64_t(1) << kTicketBits) >> kTicketBits;
        store(memory + Memory::kLast, int(ticket == blocks - 1));
        fence();
    }
    sync_block();
    if (load<int>(memory + Memory::kLast) == 0) return;
    if (thread == 0) atomic_add(p.position + ring, 1 - (blocks << kTicketBits));
    if (p.splits == 1) return;
#pragma unroll 1
    for (int n = thread; n < p.group * quads; n += kThreads) {
        const int g = n / quads, e = n % quads * 4;
        const int64_t at = ring * p.splits * p.group + g;
        const auto statistics = [&](int s) {
            return load<float2>(static_cast<const void*>(p.statistics + at + int64_t(s) * p.group));
        };
        const auto part = [&](int s) {
            return load<float4>(static_cast<const void*>(p.part + (at + int64_t(s) * p.group) * p.Dv + e));
        };
        store_four(p.o.at<E>(b, 0, h * p.group + g) + e, merge(p.splits, sink_of(g), statistics, part));
    }
}

// Rows of token t.
Rows token(const Tensor& x, int64_t t, void* data) {
    char* const first = static_cast<char*>(data) + t * x.stride(1) * int64_t(x.element_size());
    return {first, x.stride(0), x.stride(1), x.stride(2)};
}

// Splits of a ring: four blocks for every multiprocessor if that leaves them kLeastKeys, and kMostKeys at most.
int splits_of(int64_t rings, int64_t W, const Device& device) {
    const int64_t wanted = (4 * device.multiprocessors() + rings / 2) / max(rings, int64_t(1));
    const int64_t most = max(W / kLeastKeys, int64_t(1)), least = (W + kMostKeys - 1) / kMostKeys;
    return int(max(least, min(wanted, most)));
}

template <typename E, int L, int G>
void launch_step(const Device& device, const StepProblem& p, int64_t rings) {
    const unsigned blocks = unsigned(rings * p.splits * p.chunks);
    device.launch(step_kernel<E, L, G>, dim3(blocks), kThreads, Layout<G>::bytes(p.keys, p.Dv), p);
}

template <typename E, int L>
void launch_group(const Device& device, const StepProblem& p, int64_t rings) {
    if constexpr (sizeof(E) == 4)
        launch_step<E, L, 4>(device, p, rings);
    else
        (p.group == 1   ? launch_step<E, L, 1>
         : p.group <= 4 ? launch_step<E, L, 4>
                        : launch_step<E, L, 8>)(device, p, rings);
}

template <typename E>
void launch_size(const Device& device, const StepProblem& p, int64_t rings) {
    const int size = max(p.D, p.Dv);
    (size <= 64    ? launch_group<E, 8>
     : size <= 128 ? launch_group<E, 16>
                   : launch_group<E, 32>)(device, p, rings);
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_ring, Tensor v_ring, Tensor position,
            Optional sinks, double scale, double softcap) {
    const Device device(q);
    const auto s = sliding_window::check_step(q, k, v, k_ring, v_ring, position, sinks, scale, softcap);
    STD_TORCH_CHECK(is_16bit(q) || q.scalar_type() == ScalarType::Float,
                    "q must be bfloat16, float16 or float32");
    STD_TORCH_CHECK(s.D % 8 == 0 && s.Dv % 8 == 0 && s.D > 0 && s.Dv > 0 && s.D <= 256 && s.Dv <= 256,
                    "head sizes must be multiples of 8 up to 256, got ", s.D, " and ", s.Dv);
    for (const Tensor* ring : {&k_ring, &v_ring})
        STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(ring->data_ptr()) % 16 == 0,
                        "rings must be 16-byte aligned");
    const Tensor queries = aligned_rows(q), keys = aligned_rows(k), values = aligned_rows(v);
    if (sinks.has_value()) sinks = dense(*sinks);
    Tensor o = torch::stable::new_empty(q, {s.B, s.n, s.Hq, s.Dv});
    const int64_t rings = s.B * s.H;
    if (o.numel() == 0) return o;

    StepProblem p{};
    p.k_ring = pointer<void>(k_ring), p.v_ring = pointer<void>(v_ring),
    p.position = pointer<int64_t>(position);
    p.sinks = sinks.has_value() ? pointer<float>(*sinks) : nullptr;
    p.W = s.W, p.D = int(s.D), p.Dv = int(s.Dv), p.H = int(s.H), p.group = int(s.Hq / s.H);
    const int most = is_16bit(q) ? 8 : 4;  // query heads of a block
    p.chunks = (p.group + most - 1) / most;
    p.splits = splits_of(rings * p.chunks, s.W, device);
    p.keys = int((s.W + p.splits - 1) / p.splits);
    p.splits = int((s.W + p.keys - 1) / p.keys);
    p.scale = float(scale), p.softcap = float(softcap);
    STD_TORCH_CHECK(int64_t(p.splits) * p.chunks < 1 << (63 - kTicketBits) &&
                        rings * p.splits * p.chunks < int64_t(1) << 31,
                    "the rings are too many or too long");
    Optional part, statistics;
    if (p.splits > 1) {
        part = torch::stable::new_empty(q, {rings, p.splits, p.group, s.Dv}, ScalarType::Float);
        statistics = torch::stable::new_empty(q, {rings, p.splits, p.group, 2}, ScalarType::Float);
        p.part = pointer<float>(*part), p.statistics = pointer<float2>(*statistics);
    }
    void *const q0 = pointer<void>(queries), *const k0 = pointer<void>(keys),
                *const v0 = pointer<void>(values), *const o0 = pointer<void>(o);
    for (int64_t t = 0; t < s.n; ++t) {
        p.q = token(queries, t, q0), p.k = token(keys, t, k0), p.v = token(values, t, v0),
        p.o = token(o, t, o0);
        if (is_16bit(q))
            SLM_DISPATCH_16BIT(q, launch_size, device, p, rings);
        else
            launch_size<float>(device, p, rings);
    }
    return o;
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) { m.impl("sliding_window_step", TORCH_BOX(&slm::step)); }
