// Decode step: tokens one after the other through the states [B, H, K, V], in place.
//
//     S' = diag(e^g) S;   r_x = S'^T x  for x = q and k;   u = beta (v - r_k), or v
//     o  = scale (r_q + (q . k) u), or with a normaliser z <- e^g z + k:  (r_q + (q . k) u) / (z . q + 1e-6)
//     S <- S' + k u^T
//
// so that the output needs the state only before the token enters it.
//
// Split: a block of 128 threads takes 32 columns of one state, all of its K rows: a column's products need
// nothing of the others. Eight threads lie across a row's 128 bytes, a thread holds four columns of every 16th
// row, R rows for K up to 16 R, in registers, from the first token to the last. So each number is read once
// and written once whatever the number of tokens, 16 bytes at a time, and all of a block's loads are in
// flight together: 2 R KiB, 16 to 48 KiB a multiprocessor by its registers and more than Little's law asks for
// (30 on an H200) from K = 64 on. q, k and e^g of a token stand in shared memory as one float4 a row. Sums over
// rows go over the lanes, then over the warps through shared memory, in one order: the same bits every time.
// With a normaliser one block takes all columns of a state, 32 after the other: z is read until its last
// columns are done, and nobody may advance it before.
//
// l2norm_qk: all is linear in q and in k, so their lengths divide the sums, not the elements.
//
// Bytes: 8 K V a head, the floor, and 2 (2 K + 2 V) of a token in 16 bits. FLOPs: 7 K V, one a byte, of
// which an H200 does 14. Not run on hardware yet. ptxas, sm_80 and sm_90a: 66, 78, 126, 217 registers for R = 2,
// 4, 8, 16; no spills.
#include "../common/eight.cuh"
#include "../common/launch.cuh"
#include "step.h"

namespace slm {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp, kColumns = 32, kRows = 16;
constexpr float kEps = 1e-6f;

SLM_DEVICE float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
SLM_DEVICE float4 add_scaled(float4 a, float s, float4 b) {
    return make_float4(a.x + s * b.x, a.y + s * b.y, a.z + s * b.z, a.w + s * b.w);
}
SLM_DEVICE float4 scaled(float s, float4 a) { return make_float4(s * a.x, s * a.y, s * a.z, s * a.w); }

// Over the lanes that differ in the bits from `least` on.
SLM_DEVICE float4 sum_over_lanes(float4 x, int least) {
    for (int mask = kWarp / 2; mask >= least; mask /= 2)
        x = add(x, make_float4(shuffle_xor(x.x, mask), shuffle_xor(x.y, mask), shuffle_xor(x.z, mask),
                               shuffle_xor(x.w, mask)));
    return x;
}

template <int R>
struct Layout {  // shared memory, in bytes
    static constexpr Shared kVectors = 0;  // float4 [K]: q, k, e^g
    static constexpr Shared kProducts = kVectors + R * kRows * 16;  // float4 [warps]: sums over K
    static constexpr Shared kByQ = kProducts + kWarps * 16;  // [warps, columns]
    static constexpr Shared kByK = kByQ + kWarps * kColumns * 4;  // [warps, columns]
    static constexpr Shared kValues = kByK + kWarps * kColumns * 4;  // [columns]
    static constexpr Shared kBytes = kValues + kColumns * 4;
};

// That share a multiprocessor.
constexpr int blocks_of(int R) { return R == 16 ? 2 : R == 8 ? 4 : 6; }

template <typename E, int R>
SLM_KERNEL(kThreads, blocks_of(R))
step_kernel(const __grid_constant__ LinearStep p, int slabs) {
    using Memory = Layout<R>;
    constexpr int kOwn = (R * kRows + kThreads - 1) / kThreads;  // channels of a thread
    const int thread = int(threadIdx.x), warp = warp_of_thread(), lane = lane_of_thread();
    const int K = int(p.K), V = int(p.V), row = thread / 8;
    const Shared memory = shared_memory();
    const int64_t head = blockIdx.x / unsigned(slabs), b = head / p.H, h = head % p.H, hk = h / (p.H / p.Hk);
    float* const z = p.z == nullptr ? nullptr : static_cast<float*>(p.z) + head * K;
    float own_z[kOwn] = {};

#pragma unroll 1
    for (int slab = int(blockIdx.x) % slabs; slab * kColumns < V; slab += slabs) {
        const int column = slab * kColumns + thread % 8 * 4;
        float* const state = static_cast<float*>(p.state) + head * K * V + column;
        float4 S[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int d = r * kRows + row;
            S[r] = d < K && column < V ? load<float4>(static_cast<const void*>(state + int64_t(d) * V))
                                       : make_float4(0.f, 0.f, 0.f, 0.f);
        }
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            const int d = thread + j * kThreads;
            own_z[j] = z != nullptr && d < K ? load(z + d) : 0.f;
        }
#pragma unroll 1
        for (int t = 0; t < int(p.n); ++t) {
            const int64_t token = (b * p.n + t) * p.H + h;
            // ---- vectors, and products of them: |q|^2, |k|^2, q . k, e^g z . q
            float own_k[kOwn], own_gate[kOwn];
            float4 products = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int j = 0; j < kOwn; ++j) {
                const int d = thread + j * kThreads;
                float q = 0.f;
                own_k[j] = own_gate[j] = 0.f;
                if (d < K) {
                    q = to_float(load(p.q.at<const E>(b, t, hk) + d));
                    own_k[j] = to_float(load(p.k.at<const E>(b, t, hk) + d));
                    const int64_t at = p.decays == Decay::constant ? h
                                       : p.decays == Decay::scalar ? token
                                                                   : token * K + d;
                    own_gate[j] =
                        p.decays == Decay::none ? 1.f : expf(load(static_cast<const float*>(p.decay) + at));
                }
                if (d < R * kRows)
                    store(memory + Memory::kVectors + Shared(d) * 16,
                          make_float4(q, own_k[j], own_gate[j], 0.f));
                products = add(products, make_float4(q * q, own_k[j] * own_k[j], q * own_k[j],
                                                     own_gate[j] * own_z[j] * q));
            }
            if (thread < kColumns) {
                const int c = slab * kColumns + thread;
                store(memory + Memory::kValues + Shared(thread) * 4,
                      c < V ? to_float(load(p.v.at<const E>(b, t, h) + c)) : 0.f);
            }
            products = sum_over_lanes(products, 1);
            if (lane == 0) store(memory + Memory::kProducts + Shared(warp) * 16, products);
            sync_block();

            // ---- decay, and the state's products with q and k
            float4 by_q = make_float4(0.f, 0.f, 0.f, 0.f), by_k = by_q;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float4 of = load<float4>(memory + Memory::kVectors + Shared(r * kRows + row) * 16);
                S[r] = scaled(of.z, S[r]);
                by_q = add_scaled(by_q, of.x, S[r]);
                by_k = add_scaled(by_k, of.y, S[r]);
            }
            by_q = sum_over_lanes(by_q, 8), by_k = sum_over_lanes(by_k, 8);
            const Shared mine = Shared(warp * kColumns + thread % 8 * 4) * 4;
            if (lane < 8)
                store(memory + Memory::kByQ + mine, by_q), store(memory + Memory::kByK + mine, by_k);
            sync_block();
            products = by_q = by_k = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
            for (int w = 0; w < kWarps; ++w) {
                const Shared at = Shared(w * kColumns + thread % 8 * 4) * 4;
                products = add(products, load<float4>(memory + Memory::kProducts + Shared(w) * 16));
                by_q = add(by_q, load<float4>(memory + Memory::kByQ + at));
                by_k = add(by_k, load<float4>(memory + Memory::kByK + at));
            }

            // ---- the token's output, and the token into the state
            const float unit_q = p.l2norm ? 1.f / sqrtf(products.x + kEps) : 1.f;
            const float unit_k = p.l2norm ? 1.f / sqrtf(products.y + kEps) : 1.f;
            float factor = float(p.scale);
            if (z != nullptr) factor = 1.f / (unit_q * (products.w + unit_k * products.z) + kEps);
            float4 u = load<float4>(memory + Memory::kValues + Shared(thread % 8) * 16);
            if (p.beta != nullptr)
                u = scaled(load(static_cast<const float*>(p.beta) + token), add_scaled(u, -unit_k, by_k));
            const float4 o = add_scaled(scaled(unit_q, by_q), unit_q * unit_k * products.z, u);
            if (thread < 8 && column < V) store_four(p.o.at<E>(b, t, h) + column, scaled(factor, o));
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float4 of = load<float4>(memory + Memory::kVectors + Shared(r * kRows + row) * 16);
                S[r] = add_scaled(S[r], unit_k * of.y, u);
            }
#pragma unroll
            for (int j = 0; j < kOwn; ++j) own_z[j] = own_gate[j] * own_z[j] + unit_k * own_k[j];
            sync_block();  // the next token's vectors go where this one's are
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int d = r * kRows + row;
            if (d < K && column < V) store(static_cast<void*>(state + int64_t(d) * V), S[r]);
        }
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        const int d = thread + j * kThreads;
        if (z != nullptr && d < K) store(z + d, own_z[j]);
    }
}

template <typename E, int R>
void launch_step(const Device& device, const LinearStep& p) {
    const int slabs = p.z != nullptr ? 1 : int((p.V + kColumns - 1) / kColumns);
    const int64_t blocks = p.B * p.H * slabs;
    STD_TORCH_CHECK(blocks < int64_t(1) << 31, "the states are too many");
    device.launch(step_kernel<E, R>, dim3(unsigned(blocks)), kThreads, int(Layout<R>::kBytes), p, slabs);
}

template <typename E>
void launch_size(const Device& device, const LinearStep& p) {
    (p.K <= 2 * kRows   ? launch_step<E, 2>
     : p.K <= 4 * kRows ? launch_step<E, 4>
     : p.K <= 8 * kRows ? launch_step<E, 8>
                        : launch_step<E, 16>)(device, p);
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, Optional decay, Optional beta, Tensor state,
            Optional normalizer, double scale, bool l2norm) {
    const Device device(q);
    STD_TORCH_CHECK(is_16bit(q) || q.scalar_type() == ScalarType::Float,
                    "q must be bfloat16, float16 or float32");
    StepInputs in = read_step(q, k, v, decay, beta, state, normalizer, scale, l2norm);
    LinearStep& p = in.step;
    STD_TORCH_CHECK(p.K <= 16 * kRows, "q's head size must be at most 256, got ", p.K);
    STD_TORCH_CHECK(p.V % 4 == 0, "v's head size must be a multiple of 4, got ", p.V);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(state.data_ptr()) % 16 == 0, "state must be 16-byte aligned");
    if (in.o.numel() == 0) return in.o;
    p.q.data = pointer<void>(in.q), p.k.data = pointer<void>(in.k), p.v.data = pointer<void>(in.v);
    p.o.data = pointer<void>(in.o), p.state = pointer<float>(state);
    p.decay = in.decay.has_value() ? pointer<float>(*in.decay) : nullptr;
    p.beta = in.beta.has_value() ? pointer<float>(*in.beta) : nullptr;
    p.z = normalizer.has_value() ? pointer<float>(*normalizer) : nullptr;
    if (is_16bit(q))
        SLM_DISPATCH_16BIT(q, launch_size, device, p);
    else
        launch_size<float>(device, p);
    return in.o;
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) { m.impl("linear_attention_step", TORCH_BOX(&slm::step)); }
