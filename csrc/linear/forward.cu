// Linear attention, forward, on tensor cores of sm_80 and later: one launch, nothing between it and the
// results in global memory, the state in registers from the first token to the last.
//
// Maths, one head and one chunk of 64 tokens, S the state [K, V] before it; pair_ij, into_i, out_of_j, total
// are exp of the sum of the gates from token j to i, from the chunk's start to i, from j to its end, from
// start to end; with l2norm the factors of 1 / |q|, 1 / |k| go into them, so that tiles stay as they came:
//
//     M_ij = q_i k_j pair_ij, j <= i          L_ij = beta_i k_i k_j pair_ij, j < i
//     u = v                                   without beta
//     u = (I + L)^-1 beta (v - into k S)      with beta: the UT transform (Yang et al. 2024, DeltaNet, 3.2)
//     o = finish (into q S + M u)             S = total S + (out_of k)^T u
//     finish = scale or, with `normalize`, 1 / (sum_j M_ij + into_i q_i z + 1e-6)
//     z = total z + sum_j out_of_j k_j
//
// u = (I + L)^-1 r is found by blocks of 16 tokens in turn: w_b = r_b - sum_(m < b) L_bm u_m and
// u_b = w_b + Z_b w_b, with Z_b = (I + L_bb)^-1 - I by forward substitution in float32. The whole inverse at
// once, by merging blocks in tf32, was built first: more work, and where all keys are the same the roundings
// of 64 tokens added up (error 8.8e-2 in bfloat16, where the rule of the tests allows 6.1e-2), since no token
// saw the rounding of those before it.
//
// Split: a block has one sequence, head and 64 columns of V (32 where blocks of 64 are fewer than
// multiprocessors), and goes through the chunks. Columns do not meet: bits do not depend on the slice. 4 + 4
// warps (4 + 2), one of each a scheduler:
//   - makers (chunk.cuh) begin the copies of the chunk two ahead, and turn one chunk's q, k and gates into M,
//     L, Z and factors, 16 rows a warp, while
//   - states carry 16 columns of V a warp. They hold S^T [16, K] as float32 results of mma, which as operands
//     serve both ways: as `a` of S^T k^T, and as `b` of q S. So does u^T. Neither ever passes shared memory,
//     and no state warp waits for another.
// Named barriers lead from makers to states and back, one of each a stage.
//
// Numbers: operands of products are in the tensors' dtype, the state and u among them, as PyTorch's own would
// be; sums, gates, norms, z, denominators and the inverse in float32. A chunk's share of S is summed apart,
// since tensor cores cut what they add to. Operands that would leave float16's range are stored times powers
// of two (chunk.cuh).
//
// Memory: 3 stages (2 where 3 do not fit) of q, k, v, M, Z and factors: 105 and 153 KiB for K = 64, 128 (135
// and 183 with beta; 2 stages: 70, 102, 92, 124). o leaves through v's tile. 256 threads, one block a
// multiprocessor; registers as ptxas gives them for sm_80, K = 64, 128: 145 and 218, with beta 212 and 228
// (float16: 148, 229, 186, 228); no spills. With a third role for the copies there were 10 warps, three on
// some schedulers, and so 168 registers a thread: the delta rule spilled.
//
// Counted, a chunk and 64 columns, K = 128: 752 products m16n8k16 (1248 with beta), 244 KiB through shared
// memory (344), mostly operands that each state warp reads for its 16 columns. B = 8, T = 2048, H = 8,
// V = 128 on an H200: 134 MB, 28 us at 4.8 TB/s; 12.6 GFLOP (20.9), 21 (35) us at 600 TFLOP/s, about what is
// known of mma.sync there; shared memory at 128 bytes a clock, 36 (50) us; about 2000 (3300) instructions a
// scheduler, options that are not used left out, 36 (58) us: these are the floor. Warps with 32 columns would
// halve the operands, but leave two schedulers without a state warp at 128 blocks; wgmma, which reads them once
// a block, is what would go below both. None of this has been measured.
//
// Missing: gates a channel; a split of long sequences where heads are few (function.py prefers Triton there); a
// backward.
//
// Sources: Yang et al. 2024 (GLA, section 4; DeltaNet), Yang et al. 2025 (Gated DeltaNet, section 3.3), Dao
// and Gu 2024 (Mamba-2, section 6: the chunked form), Arora et al. 2024 and ThunderKittens (the state in
// registers over a sequence).
#include <limits>
#include <tuple>

#include "../common/launch.cuh"
#include "checks.h"
#include "chunk.cuh"

namespace slm {
namespace {

// --- States carry the state

// One warp's 16 columns of the state, transposed: results of `multiply` with a row for each of them.
template <int K>
struct State {
    float s[K / 8][4];

    template <typename F>
    SLM_DEVICE void each(const Problem& p, const Work& work, int column, F visit) {
        const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
        const int64_t place = (work.n * p.H + work.h) * p.K;
#pragma unroll
        for (int n = 0; n < K / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int k = 8 * n + 2 * t + e % 2, value = column + g + e / 2 * 8;
                if (k < p.K && value < p.V) visit(s[n][e], (place + k) * p.V + value);
            }
    }
};

// d += the product of 16 tokens `x` and a triangle, which `multiply` makes. The triangle's zeros must not
// meet what is not finite: 0 NaN is NaN, and would reach earlier tokens. Such numbers are multiplied apart, a
// token at a time, and added where `reached`(token, n, e) says.
template <typename E, typename Multiply, typename Reached>
SLM_DEVICE void multiply_triangle(float (&d)[2][4], const uint32_t (&x)[4], Multiply multiply,
                                  Reached reached) {
    constexpr uint32_t kExponent = std::is_same_v<E, Half> ? 0x7c00 : 0x7f80;
    uint32_t finite[4], rest[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const uint32_t low = (x[n] & kExponent) == kExponent ? 0xffffu : 0u;
        const uint32_t high = (x[n] >> 16 & kExponent) == kExponent ? 0xffff0000u : 0u;
        rest[n] = x[n] & (low | high), finite[n] = x[n] & ~(low | high);
    }
    multiply(d, finite);
    if (ballot((rest[0] | rest[1] | rest[2] | rest[3]) != 0) == 0) return;
#pragma unroll 1
    for (int token = 0; token < 16; ++token) {
        const int half = token % 8 - 2 * (lane_of_thread() % 4);  // of a pair that this lane has, if 0 or 1
        const uint32_t mask = half == 0 ? 0xffffu : half == 1 ? 0xffff0000u : 0u;
        const uint32_t low = token < 8 ? mask : 0, high = token < 8 ? 0 : mask;
        const uint32_t one[4] = {rest[0] & low, rest[1] & low, rest[2] & high, rest[3] & high};
        float of_one[2][4] = {};
        multiply(of_one, one);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (reached(token, n, e)) d[n][e] += of_one[n][e];
    }
}

// From S^T k^T in `u`, made with an operand times two to `of_state`, what the delta rule writes: u^T [16 (V),
// 64], as operands, times two to an exponent that is returned. Blocks of 16 tokens in turn, each from those
// before it as they were rounded: the rule takes back an error as it takes back a value, and rounding does
// not add up.
template <typename E, int K>
SLM_DEVICE int correct(Stage<K, true> stage, int column, int of_state, float (&u)[8][4],
                       uint32_t (&values)[4][4]) {
    const int t = lane_of_thread() % 4;
#pragma unroll
    for (int m = 0; m < 4; ++m) {  // beta (v - into (k S))
        uint32_t v[4];
        load_a_transposed(v, stage.v(), 16 * m, column);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int token = 16 * m + 8 * n + 2 * t;
            const float2 into = stage.template get<float2>(kIntoKey, token);
            const float2 rate = stage.template get<float2>(kRate, token);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float &first = u[2 * m + n][2 * half], &second = u[2 * m + n][2 * half + 1];
                first = rate.x * (first_of<E>(v[2 * n + half]) - into.x * two_to(-of_state) * first);
                second = rate.y * (second_of<E>(v[2 * n + half]) - into.y * two_to(-of_state) * second);
            }
        }
    }
    const int exponent = exponent_for<E>(u, 7);  // sums of 64 of them stay in range
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        uint32_t b[4], w[4];
#pragma unroll
        for (int e = 0; e < 8; ++e) u[2 * m + e / 4][e % 4] *= two_to(exponent);
#pragma unroll
        for (int j = 0; j < m; ++j) {
            load_b(b, stage.z(), 16 * m, 16 * j);
            multiply<E>(u[2 * m], values[j], b[0], b[1]);
            multiply<E>(u[2 * m + 1], values[j], b[2], b[3]);
        }
        as_a<E>(w, u[2 * m], u[2 * m + 1]);
        load_b_transposed(b, stage.z(), 16 * m, 16 * m);
        float more[2][4] = {};
        multiply_triangle<E>(
            more, w,
            [&](float(&d)[2][4], const uint32_t(&x)[4]) {
                multiply<E>(d[0], x, b[0], b[1]);
                multiply<E>(d[1], x, b[2], b[3]);
            },
            [=](int token, int n, int e) { return 8 * n + 2 * t + e % 2 > token; });
#pragma unroll
        for (int e = 0; e < 8; ++e) u[2 * m + e / 4][e % 4] += more[e / 4][e % 4];
        as_a<E>(values[m], u[2 * m], u[2 * m + 1]);
    }
    return exponent;
}

// o [64, 16] of one chunk to memory, through the warp's own columns of v's tile.
template <typename E>
SLM_DEVICE void write_outputs(const Problem& p, const Work& work, Tile<kSlice> tile, int column, int chunk,
                              const float (&o)[4][2][4]) {
    sync_warp();  // all lanes have read v
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n) store_d<E>(tile, 16 * m, column + 8 * n, o[m][n]);
    sync_warp();
    const int tokens = work.tokens(chunk), piece = lane_of_thread() % 2;
    const int value = work.column + column + 8 * piece;
    E* to = p.o.at<E>(work.b, work.begin + int64_t(chunk) * kChunk, work.h) + value;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const int row = 16 * step + lane_of_thread() / 2;
        const uint4 x = load<uint4>(tile.piece(row, column / 8 + piece));
        if (row < tokens && value < p.V) store(static_cast<void*>(to + row * p.o.t), x);
    }
}

// The second role: carries 16 columns of the state a warp through the sequence, and writes o.
template <typename E, int K, bool DELTA>
SLM_DEVICE void carry_state(const Problem& p, const Work& work) {
    const Layout<K, DELTA> memory{p.stages};
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    const int column = (int(threadIdx.x) - kMakers) / kWarp * 16;
    State<K> state = {};
    float(&s)[K / 8][4] = state.s;
    if (p.state0 != nullptr)
        state.each(p, work, work.column + column, [&](float& x, int64_t at) { x = load(p.state0 + at); });
    for (int chunk = 0, slot = 0; chunk < work.chunks; ++chunk) {
        const Stage<K, DELTA> stage = memory.stage(slot);
        const int of_state = exponent_for<E>(s, 13);  // exponents of two, 0 for bfloat16
        int of_u = 0;
        sync_some(kMade + slot, kMakers + p.states());

        // What queries, and keys, read of the state: its columns serve as operands as they are.
        float o[4][2][4] = {}, u[8][4] = {};
#pragma unroll
        for (int n = 0; n < K / 16; ++n) {
            uint32_t operand[4], a[4];
            float scaled[2][4];
#pragma unroll
            for (int e = 0; e < 8; ++e) scaled[e / 4][e % 4] = s[2 * n + e / 4][e % 4] * two_to(of_state);
            as_a<E>(operand, scaled[0], scaled[1]);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                load_a(a, stage.q(), 16 * m, 16 * n);
                multiply<E>(o[m][0], a, operand[0], operand[2]);
                multiply<E>(o[m][1], a, operand[1], operand[3]);
            }
            if constexpr (DELTA) {
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    load_b(a, stage.k(), 16 * m, 16 * n);
                    multiply<E>(u[2 * m], operand, a[0], a[1]);
                    multiply<E>(u[2 * m + 1], operand, a[2], a[3]);
                }
            }
        }

        // What the tokens write, u^T: v, or what the delta rule makes of it.
        uint32_t values[4][4];
        if constexpr (DELTA) {
            of_u = correct<E>(stage, column, of_state, u, values);
        } else {
#pragma unroll
            for (int m = 0; m < 4; ++m) load_a_transposed(values[m], stage.v(), 16 * m, column);
        }

        // o = finish (into (q S) + M u)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            int exponent = of_u;  // of M u
            if constexpr (std::is_same_v<E, Half>) exponent += stage.template get<int>(kExponents, m);
            float finish[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + g + 8 * half;
                const float into = stage.get(kIntoQuery, row) * two_to(exponent - of_state);
                finish[half] = stage.get(kFinish, row) * two_to(-exponent);
#pragma unroll
                for (int n = 0; n < 2; ++n) o[m][n][2 * half] *= into, o[m][n][2 * half + 1] *= into;
            }
#pragma unroll
            for (int j = 0; j <= m; ++j) {
                uint32_t a[4];
                load_a(a, stage.m(), 16 * m, 16 * j);
                const auto multiply_by = [&](float(&d)[2][4], const uint32_t(&x)[4]) {
                    multiply<E>(d[0], a, x[0], x[2]);
                    multiply<E>(d[1], a, x[1], x[3]);
                };
                if (j < m)
                    multiply_by(o[m], values[j]);
                else
                    multiply_triangle<E>(o[m], values[j], multiply_by,
                                         [=](int token, int, int e) { return g + e / 2 * 8 >= token; });
            }
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[m][n][e] *= finish[e / 2];
        }
        write_outputs<E>(p, work, stage.v(), column, chunk, o);

        // S = total S + what was written, as the chunk's end keeps it, divided by |k|. The chunk's sum is taken
        // apart: tensor cores cut what they add to.
        const float total = stage.get(kTotal);
        const auto out_of = [&](int m, int n) {  // of the two tokens in values[m][n]
            return stage.template get<float2>(kOutOf, 16 * m + n / 2 * 8 + 2 * t);
        };
        int of_kept = 0;
        if (std::is_same_v<E, Half> && p.l2norm) {  // 1 / |k| is up to 1000
            float largest = 0;
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const float2 factor = out_of(m, n);
                    largest = fmaxf(largest, finite_size(factor.x * first_of<E>(values[m][n])));
                    largest = fmaxf(largest, finite_size(factor.y * second_of<E>(values[m][n])));
                }
            of_kept = exponent_of(largest, 13);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float2 factor = out_of(m, n);
                values[m][n] = pack<E>(two_to(of_kept) * factor.x * first_of<E>(values[m][n]),
                                       two_to(of_kept) * factor.y * second_of<E>(values[m][n]));
            }
        const float of_added = two_to(-of_u - of_kept);
#pragma unroll
        for (int n = 0; n < K / 16; ++n) {
            float added[2][4] = {};
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                uint32_t b[4];
                load_b_transposed(b, stage.k(), 16 * m, 16 * n);
                multiply<E>(added[0], values[m], b[0], b[1]);
                multiply<E>(added[1], values[m], b[2], b[3]);
            }
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                float& x = s[2 * n + e / 4][e % 4];
                x = x * total + added[e / 4][e % 4] * of_added;
            }
        }
        if (chunk + p.stages < work.chunks) arrive_some(kRead + slot, kMakers + p.states());
        slot = slot + 1 == p.stages ? 0 : slot + 1;
    }
    state.each(p, work, work.column + column, [&](float& x, int64_t at) { store(p.state + at, x); });
}

template <typename E, int K, bool DELTA>
SLM_KERNEL(kMaxThreads, 1)
forward_kernel(const __grid_constant__ Problem p) {
    const Work work(p);
    if (int(threadIdx.x) < kMakers)
        make_chunks<E, K, DELTA>(p, work);
    else
        carry_state<E, K, DELTA>(p, work);
}

// --- The host's side

// Of what two stages take, function.py asks of a GPU.
static_assert(Layout<64, false>::bytes(2) <= 70 << 10 && Layout<64, true>::bytes(2) <= 92 << 10);
static_assert(Layout<128, false>::bytes(2) <= 102 << 10 && Layout<128, true>::bytes(2) <= 124 << 10);

template <typename E, int K, bool DELTA>
void launch_kernel(const Device& device, Problem& p, int64_t blocks) {
    const auto bytes = [](int stages) { return Layout<K, DELTA>::bytes(stages); };
    p.stages = bytes(kMaxStages) <= device.shared_limit() ? kMaxStages : kMaxStages - 1;
    STD_TORCH_CHECK(bytes(p.stages) <= device.shared_limit(), "linear_attention_forward needs ",
                    bytes(p.stages), " bytes of shared memory, the device has ", device.shared_limit());
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too many sequences and heads: ", blocks,
                    " blocks");
    device.launch(forward_kernel<E, K, DELTA>, dim3(unsigned(blocks)), kMakers + p.states(), bytes(p.stages),
                  p);
}

template <typename E>
void launch(const Device& device, Problem& p, int64_t blocks) {
    const auto with = [&](auto size) {
        constexpr int K = decltype(size)::value;
        p.beta != nullptr ? launch_kernel<E, K, true>(device, p, blocks)
                          : launch_kernel<E, K, false>(device, p, blocks);
    };
    p.K <= 64 ? with(std::integral_constant<int, 64>()) : with(std::integral_constant<int, 128>());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                   Optional decay, Optional beta, Optional initial_state,
                                                   Optional initial_normalizer, Optional cu, double scale,
                                                   bool normalize, bool l2norm, int64_t segment) {
    const Device device(q);
    check_tokens(q, k, v);
    check_options(beta, initial_normalizer, scale, normalize);
    const int64_t B = q.size(0), T = q.size(1), Hk = q.size(2), K = q.size(3), H = v.size(2), V = v.size(3);
    STD_TORCH_CHECK(is_16bit(q), "q must be bfloat16 or float16 on cuda");
    STD_TORCH_CHECK(K % 8 == 0 && K <= 128, "q's head dimension must be a multiple of 8 up to 128, got ", K);
    STD_TORCH_CHECK(V % 8 == 0, "v's head dimension must be a multiple of 8, got ", V);
    STD_TORCH_CHECK(segment == 0, "segment must be 0 on cuda: no states are kept for a backward");
    int64_t N = B;
    if (cu.has_value()) {
        STD_TORCH_CHECK(cu->dim() == 1 && cu->scalar_type() == ScalarType::Int && cu->size(0) > 0,
                        "cu_seqlens must be an int32 tensor [N+1]");
        STD_TORCH_CHECK(B == 1, "packed sequences need batch 1, got ", B);
        N = cu->size(0) - 1;
        cu = dense(*cu);
    }
    const Tensor queries = aligned_rows(q), keys = aligned_rows(k), values = aligned_rows(v);
    Problem p{};
    Optional gates, rates, states, normalizers;
    p.decays = read_decay(decay, B, T, H, K, ScalarType::Float, gates);
    STD_TORCH_CHECK(p.decays != Decay::channel, "decay must be [H] or [B, T, H] on cuda");
    if (beta.has_value()) rates = statistics(*beta, Sizes{B, T, H}, ScalarType::Float, "beta");
    if (initial_state.has_value())
        states = statistics(*initial_state, Sizes{N, H, K, V}, ScalarType::Float, "initial_state");
    if (initial_normalizer.has_value())
        normalizers =
            statistics(*initial_normalizer, Sizes{N, H, K}, ScalarType::Float, "initial_normalizer");
    const Tensor o = torch::stable::new_empty(q, {B, T, H, V});
    const Tensor state = torch::stable::new_empty(q, {N, H, K, V}, ScalarType::Float);
    const Tensor none = torch::stable::new_empty(q, {0}, ScalarType::Float);
    const Tensor z = normalize ? torch::stable::new_empty(q, {N, H, K}, ScalarType::Float) : none;

    const auto rows = [](const Tensor& x) {
        return Rows{pointer<void>(x), x.stride(0), x.stride(1), x.stride(2)};
    };
    const auto numbers = [](const Optional& x) { return x.has_value() ? pointer<const float>(*x) : nullptr; };
    p.q = rows(queries), p.k = rows(keys), p.v = rows(values), p.o = rows(o);
    p.decay = numbers(gates), p.beta = numbers(rates), p.state0 = numbers(states),
    p.z0 = numbers(normalizers);
    p.state = pointer<float>(state), p.z = pointer<float>(z);
    p.cu = cu.has_value() ? pointer<const int>(*cu) : nullptr;
    p.T = T, p.H = int(H), p.group = int(H / Hk), p.K = int(K), p.V = int(V);
    p.normalize = normalize, p.l2norm = l2norm, p.scale = normalize ? 1.f : float(scale);
    // Columns never meet, so that the bits do not depend on the slices.
    p.columns = kSlice;
    if (V <= 32 || N * H * ((V + 63) / 64) < device.multiprocessors()) p.columns = 32;
    p.slices = int((V + p.columns - 1) / p.columns);
    SLM_DISPATCH_16BIT(q, launch, device, p, N * H * p.slices);
    return {o, state, z, torch::stable::new_empty(q, {0}, ScalarType::Float)};
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) { m.impl("linear_attention_forward", TORCH_BOX(&slm::forward)); }
