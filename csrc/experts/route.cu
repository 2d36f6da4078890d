// Routing: scores, the k best experts of a token, weights, and the means that losses want; and backward.
//
// The maths is that of route.inl, and so are the ways with ties (to the lower index), with NaN (the greatest of
// all, and stays in its token), with -inf and masks (forbidden, exactly).
//
// Split: a token's E logits lie in the registers of L threads, R neighbouring ones each (L = 4, 8, 16, 32 with
// R = 8 for E up to 32, 64, 128, 256; 32 with 16 up to 512), read 16 bytes at a time where rows are aligned. A
// warp does 32 / L tokens at once. The k best are k maxima in turn, each R comparisons and log2 L exchanges of a
// value and its index: about 35 instructions for 8 tokens of 32 experts. (Considered: index bits in the value's
// lowest, as SonicMoE has it, one exchange less: rounds the scores; sorted lists in each thread: more registers.)
// Groups are weighed one after the other. The chosen pass through shared memory, so that weights and indices
// leave as whole lines.
//
// Sums over tokens: of probabilities in registers for all tokens of a thread, then over the threads of a block in
// one order; a column a block in scratch [E + 2, blocks]. The block that takes the last ticket adds the blocks
// up, in their order, in double: same bits every run. Counts are integers: atomics, in shared memory, then once
// a block and expert in global. Blocks go over the tokens in strides, five for every multiprocessor at most, so
// that little is left to the last; a single block needs no ticket, and several need one cleared beforehand.
//
// Backward recomputes the probabilities from logits and lse; a token a group of L threads, no sums over tokens.
//
// Bytes: forward T E logits read, 8 T k written; backward T E read and written, 8 T k read: a few microseconds,
// where instructions count as much: E = 32, k = 4 some 60 a token and warp, 2 us for T = 16384 on an H200.
// Not run on hardware yet. ptxas, sm_80 and sm_90a: forward at most 95 registers (R = 16: 151), backward 63
// (108); no spills.
#include "../common/eight.cuh"
#include "../common/launch.cuh"
#include "route.h"
#include "route_checks.h"

namespace slm::route {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kResident = 5;  // blocks of a multiprocessor
constexpr float kInfinity = __builtin_huge_valf(), kLog2e = 1.44269504f, kEps = 1e-20f;  // reference.EPS

struct Forward {
    Problem problem;
    bool aligned;  // rows of logits, to 16 bytes
    int groups, top_groups;
    const float* bias;  // [E], or null
    int* indices;  // [T, k]
    float *weights, *lse, *probabilities, *z, *entropy;
    float* sums;  // [E + 2, blocks]
    int* counts;  // [E]
    int* ticket;
};

struct Backward {
    Problem problem;
    bool aligned;
    const int* indices;
    const float *lse, *dweights, *dprobabilities, *dz;  // the latter three or null
    int64_t dweights_row, dweights_column, dprobabilities_stride;
    void* dlogits;
};

SLM_DEVICE float exponential(float x) { return exp2(x * kLog2e); }

// Over L neighbouring threads; passes over NaN.
template <int L>
SLM_DEVICE float max_over(float x) {
#pragma unroll
    for (int mask = L / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}
template <int L>
SLM_DEVICE float sum_over(float x) {
#pragma unroll
    for (int mask = L / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

SLM_DEVICE float shift_of(float top) { return top == -kInfinity ? 0.f : top; }
// 0 where no expert is allowed and where the greatest logit is inf (which leaves NaN and zeros).
SLM_DEVICE float reciprocal_of(float sum, float top) {
    return sum == 0.f || top == kInfinity ? 0.f : 1.f / sum;
}

// The sigmoid, exactly 0 of a forbidden expert, and 1 - sigmoid.
SLM_DEVICE float sigmoid(float x, float& rest) {
    const float power = exponential(-fabsf(x)), large = 1.f / (1.f + power), small = power * large;
    rest = x >= 0.f ? small : large;
    return x == -kInfinity ? 0.f : x >= 0.f ? large : x < 0.f ? small : x;
}

template <typename Body>
SLM_DEVICE void with_type(Dtype dtype, Body body) {
    if (dtype == Dtype::bf16)
        body(BFloat16{});
    else if (dtype == Dtype::f16)
        body(Half{});
    else
        body(0.f);
}

// Logits of experts e0 to e0 + R of token t; -inf where forbidden, past the last expert and past the last token.
template <int R>
SLM_DEVICE void load_logits(const Problem& p, bool aligned, int64_t t, int e0, float (&x)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = -kInfinity;
    if (t >= p.T) return;
    const int E = int(p.E);
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const S* from = static_cast<const S*>(p.logits) + t * p.logits_row + e0;
#pragma unroll
        for (int i = 0; i < R; i += 8) {
            if (aligned && e0 + i + 8 <= E) {
                float eight[8];
                widen(load_eight(from + i), eight);
#pragma unroll
                for (int n = 0; n < 8; ++n) x[i + n] = eight[n];
            } else {
#pragma unroll
                for (int n = i; n < i + 8; ++n)
                    if (e0 + n < E) x[n] = to_float(load(from + n));
            }
        }
    });
    if (p.mask == nullptr) return;
    const uint8_t* allowed = p.mask + t * p.mask_row + e0;
#pragma unroll
    for (int i = 0; i < R; ++i)
        if (e0 + i < E && load(allowed + i) == 0) x[i] = -kInfinity;
}

struct Best {
    float value;  // -inf: there is none
    int index;
};

// The greatest of what L threads hold, R each, thread c from c R on; of equal ones that of the lowest index.
template <int L, int R>
SLM_DEVICE Best best_of(const float (&x)[R]) {
    const int first = lane_of_thread() % L * R;
    Best best{-kInfinity, first};
#pragma unroll
    for (int i = 0; i < R; ++i)
        if (x[i] > best.value) best = {x[i], first + i};
#pragma unroll
    for (int mask = L / 2; mask > 0; mask /= 2) {
        const Best other{shuffle_xor(best.value, mask), shuffle_xor(best.index, mask)};
        if (other.value > best.value || (other.value == best.value && other.index < best.index)) best = other;
    }
    return best;
}

// -inf to those outside the groups whose two best sum highest. `choice`: what groups are weighed by.
template <int L, int R>
SLM_DEVICE void keep_best_groups(int E, int groups, int top_groups, const float (&choice)[R],
                                 float (&candidate)[R]) {
    const int first = lane_of_thread() % L * R, size = E / groups;
    float value[R];  // of group `first + i`
#pragma unroll
    for (int i = 0; i < R; ++i) value[i] = -kInfinity;
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
        float one = -kInfinity, two = -kInfinity;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const float x = unsigned(first + i - g * size) < unsigned(size) ? choice[i] : -kInfinity;
            two = fmaxf(two, fminf(one, x)), one = fmaxf(one, x);
        }
#pragma unroll
        for (int mask = L / 2; mask > 0; mask /= 2) {
            const float other = shuffle_xor(one, mask), second = shuffle_xor(two, mask);
            two = fmaxf(fmaxf(two, second), fminf(one, other)), one = fmaxf(one, other);
        }
#pragma unroll
        for (int i = 0; i < R; ++i)
            if (first + i == g) value[i] = one + shift_of(two);
    }
    unsigned kept = 0;
#pragma unroll 1
    for (int n = 0; n < top_groups; ++n) {
        const Best best = best_of<L, R>(value);
#pragma unroll
        for (int i = 0; i < R; ++i) {
            if (first + i == best.index) value[i] = -kInfinity;
            if (best.value != -kInfinity && unsigned(first + i - best.index * size) < unsigned(size))
                kept |= 1u << i;
        }
    }
#pragma unroll
    for (int i = 0; i < R; ++i)
        if ((kept >> i & 1) == 0) candidate[i] = -kInfinity;
}

template <int L, int R>
SLM_KERNEL(kThreads, R == 8 ? kResident : 3)
forward_kernel(const __grid_constant__ Forward f) {
    constexpr int kTokens = kWarp / L;  // of a warp at a time
    const Problem& p = f.problem;
    const int thread = int(threadIdx.x), warp = warp_of_thread(), lane = lane_of_thread(), c = lane % L;
    const int E = int(p.E), k = int(p.k), e0 = c * R;
    const bool sigmoids = p.score == Score::sigmoid, among = p.among_chosen();
    const Shared counts = shared_memory(), last = counts + Shared(E) * 4;
    const Shared block_sums = last + 4;  // [warps, E + 2]
    const Shared all_picks = (block_sums + Shared(kWarps * (E + 2)) * 4 + 7) / 8 * 8;
    const Shared picks = all_picks + Shared((warp * kTokens + lane / L) * k) * 8;  // float2 [k]: value, index
    for (int e = thread; e < E; e += kThreads) store(counts + Shared(e) * 4, 0);
    sync_block();

    float mean[R] = {}, z = 0.f, entropy = 0.f;
    const int64_t stride = int64_t(gridDim.x) * kWarps * kTokens;
#pragma unroll 1
    for (int64_t t0 = (int64_t(blockIdx.x) * kWarps + warp) * kTokens; t0 < p.T; t0 += stride) {
        const int64_t t = t0 + lane / L;
        float x[R], s[R];
        load_logits(p, f.aligned, t, e0, x);

        // ---- probabilities
        float top = -kInfinity, sum = 0.f, total = 0.f, spread = 0.f;
#pragma unroll
        for (int i = 0; i < R; ++i) top = fmaxf(top, x[i]);
        top = max_over<L>(top);
        const float shift = shift_of(top);
#pragma unroll
        for (int i = 0; i < R; ++i) {
            s[i] = exponential(x[i] - shift), sum += s[i];
            if (sigmoids) {
                float rest;
                s[i] = sigmoid(x[i], rest), total += s[i];
            } else if (s[i] != 0.f) {
                spread += s[i] * (x[i] - shift);
            }
        }
        sum = sum_over<L>(sum);
        const bool none = sum == 0.f;
        const float log_sum = logf(sum);
        const float lse = none ? 0.f : top == kInfinity ? top : shift + log_sum;
        const float factor =
            sigmoids ? 1.f / (sum_over<L>(total) + kEps) : reciprocal_of(sum, top);  // p = factor s
        float spent = 0.f;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const float q = s[i] * factor;
            mean[i] += q;
            if (sigmoids && q != 0.f) spent -= q * logf(q);
        }
        spent = sum_over<L>(sigmoids ? spent : spread);
        z += lse * lse;
        entropy += sigmoids ? spent : none ? 0.f : log_sum - spent * factor;
        if (c == 0 && t < p.T) store(f.lse + t, lse);

        // ---- the k best: by the logits, or by scores and biases
        float candidate[R];
#pragma unroll
        for (int i = 0; i < R; ++i) candidate[i] = x[i] == x[i] ? x[i] : kInfinity;
        if (f.bias != nullptr || f.groups > 1) {
            float choice[R];
#pragma unroll
            for (int i = 0; i < R; ++i) {
                choice[i] = p.score == Score::softmax ? s[i] * factor : sigmoids ? s[i] : x[i];
                if (f.bias != nullptr && e0 + i < E) choice[i] += load(f.bias + e0 + i);
                if (choice[i] != choice[i]) choice[i] = kInfinity;
                if (x[i] == -kInfinity) choice[i] = x[i];
                if (f.bias != nullptr) candidate[i] = choice[i];
            }
            if (f.groups > 1) keep_best_groups<L, R>(E, f.groups, f.top_groups, choice, candidate);
        }
#pragma unroll 1
        for (int j = 0; j < k; ++j) {
            Best best = best_of<L, R>(candidate);
            float value = among ? -kInfinity : 0.f;  // of none
            if (best.value == -kInfinity) best.index = -1;
#pragma unroll
            for (int i = 0; i < R; ++i)
                if (e0 + i == best.index) value = among ? x[i] : s[i], candidate[i] = -kInfinity;
            if (best.index < 0 ? c == 0 : best.index / R == c)
                store(picks + Shared(j) * 8, make_float2(value, as_float(uint32_t(best.index))));
        }
        sync_warp();

        // ---- their weights
        float chosen_top = -kInfinity, chosen_sum = 0.f, by = factor;
        for (int j = c; j < k; j += L) {
            const float value = load<float2>(picks + Shared(j) * 8).x;
            chosen_top = fmaxf(chosen_top, value), chosen_sum += value;
        }
        chosen_top = max_over<L>(chosen_top), chosen_sum = sum_over<L>(chosen_sum);
        const float chosen_shift = shift_of(chosen_top);
        if (among) {
            chosen_sum = 0.f;
            for (int j = c; j < k; j += L)
                chosen_sum += exponential(load<float2>(picks + Shared(j) * 8).x - chosen_shift);
            by = reciprocal_of(sum_over<L>(chosen_sum), chosen_top);
        } else if (sigmoids) {
            by = p.renormalize ? 1.f / (chosen_sum + kEps) : 1.f;
        }
        for (int j = c; j < k && t < p.T; j += L) {
            const float2 pick = load<float2>(picks + Shared(j) * 8);
            const int e = int(as_bits(pick.y));
            const float weight = among ? exponential(pick.x - chosen_shift) : pick.x;
            store(f.indices + t * k + j, e);
            store(f.weights + t * k + j, e < 0 ? 0.f : weight * by * float(p.scale));  // 0 beside NaN too
            if (e >= 0) atomic_add(counts + Shared(e) * 4, 1);
        }
        sync_warp();
    }

    // ---- sums over the block's tokens
#pragma unroll
    for (int mask = L; mask < kWarp; mask *= 2) {
#pragma unroll
        for (int i = 0; i < R; ++i) mean[i] += shuffle_xor(mean[i], mask);
        z += shuffle_xor(z, mask), entropy += shuffle_xor(entropy, mask);
    }
    const Shared of_warp = block_sums + Shared(warp * (E + 2)) * 4;
#pragma unroll
    for (int i = 0; i < R; ++i)
        if (lane < L && e0 + i < E) store(of_warp + Shared(e0 + i) * 4, mean[i]);
    if (lane == 0) store(of_warp + Shared(E) * 4, z), store(of_warp + Shared(E + 1) * 4, entropy);
    sync_block();
    const int blocks = int(gridDim.x);
    const auto finish = [&](int column, float mean) {
        store(column < E ? f.probabilities + column : column == E ? f.z : f.entropy, mean);
    };
    const float tokens = float(max(p.T, int64_t(1)));
    for (int e = thread; e < E + 2; e += kThreads) {
        float sum = 0.f;
        for (int w = 0; w < kWarps; ++w) sum += load<float>(block_sums + Shared(w * (E + 2) + e) * 4);
        if (blocks == 1)
            finish(e, sum / tokens);
        else
            store(f.sums + int64_t(e) * blocks + blockIdx.x, sum);
    }
    for (int e = thread; e < E; e += kThreads) {
        const int count = load<int>(counts + Shared(e) * 4);
        if (blocks == 1)
            store(f.counts + e, count);
        else if (count > 0)
            atomic_add(f.counts + e, count);
    }
    if (blocks == 1) return;

    // ---- sums over blocks, by the last
    sync_block();
    if (thread == 0) {
        fence();
        store(last, int(atomic_add(f.ticket, 1) == blocks - 1));
        fence();
    }
    sync_block();
    if (load<int>(last) == 0) return;
#pragma unroll 1
    for (int column = warp; column < E + 2; column += kWarps) {
        double sum = 0;
        for (int block = lane; block < blocks; block += kWarp)
            sum += double(load(f.sums + int64_t(column) * blocks + block));
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane == 0) finish(column, float(sum / double(tokens)));
    }
}

template <int L, int R>
SLM_KERNEL(kThreads, 4)
backward_kernel(const __grid_constant__ Backward g) {
    const Problem& p = g.problem;
    const int64_t t = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / L;
    const int E = int(p.E), k = int(p.k), e0 = lane_of_thread() % L * R;
    const bool sigmoids = p.score == Score::sigmoid, among = p.among_chosen();
    float x[R], dx[R] = {};
    load_logits(p, g.aligned, t, e0, x);
    const float lse = t < p.T ? load(g.lse + t) : 0.f;

    // ---- by way of the weights
    float through = 0.f;  // what a softmax over all experts takes from every one
    if (g.dweights != nullptr) {
        float dw[R] = {};
        unsigned chosen = 0;
#pragma unroll 1
        for (int j = 0; j < k && t < p.T; ++j) {
            const int e = load(g.indices + t * k + j);
            if (unsigned(e - e0) >= unsigned(R) || e >= E) continue;
            const float d = load(g.dweights + t * g.dweights_row + j * g.dweights_column) * float(p.scale);
#pragma unroll
            for (int i = 0; i < R; ++i)
                if (e0 + i == e) dw[i] = d, chosen |= 1u << i;
        }
        float shift = -kInfinity, sum = 0.f, product = 0.f, w[R];
#pragma unroll
        for (int i = 0; i < R; ++i)
            if (chosen >> i & 1) shift = fmaxf(shift, x[i]);
        shift = max_over<L>(shift);
        shift = among ? shift_of(shift) : lse;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            dx[i] = 1.f, w[i] = 0.f;
            if ((chosen >> i & 1) == 0) continue;
            w[i] = sigmoids ? sigmoid(x[i], dx[i]) : exponential(x[i] - shift);
            sum += w[i], product += w[i] * dw[i];
        }
        sum = sum_over<L>(sum), product = sum_over<L>(product);
        const bool divided = among || (sigmoids && p.renormalize);
        const float factor = divided ? 1.f / (sum + (sigmoids ? kEps : 0.f)) : 1.f;
        product *= factor;
        if (!sigmoids && !among) through = product;
#pragma unroll
        for (int i = 0; i < R; ++i)
            dx[i] = chosen >> i & 1 ? dx[i] * (w[i] * factor) * (divided ? dw[i] - product : dw[i]) : 0.f;
    }

    // ---- by way of the means, and of a softmax over all
    if (g.dprobabilities != nullptr || g.dz != nullptr || (g.dweights != nullptr && !sigmoids && !among)) {
        const float tokens = float(p.T);
        const float dlse = g.dz != nullptr ? 2.f * load(g.dz) / tokens * lse : 0.f;
        float s[R], d[R], rest[R], total = 0.f, product = 0.f;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            d[i] = rest[i] = 0.f;
            if (g.dprobabilities != nullptr && e0 + i < E)
                d[i] = load(g.dprobabilities + (e0 + i) * g.dprobabilities_stride) / tokens;
            s[i] = sigmoids ? sigmoid(x[i], rest[i]) : exponential(x[i] - lse);
            total += s[i], product += s[i] * d[i];
        }
        total = sum_over<L>(total), product = sum_over<L>(product);
        const float factor = sigmoids ? 1.f / (total + kEps) : 1.f, mean = product * factor;
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const float part = sigmoids
                                   ? s[i] * factor * (d[i] - mean) * rest[i] + exponential(x[i] - lse) * dlse
                                   : s[i] * (d[i] - mean + (dlse - through));
            if (x[i] != -kInfinity) dx[i] += part;  // forbidden: 0 beside NaN too
        }
    }

    if (t >= p.T) return;
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        S* const to = static_cast<S*>(g.dlogits) + t * E + e0;
#pragma unroll
        for (int i = 0; i < R; i += 8) {
            if (E % 8 == 0 && e0 + i + 8 <= E) {
                float eight[8];
#pragma unroll
                for (int n = 0; n < 8; ++n) eight[n] = dx[i + n];
                store_eight(to + i, narrow<S>(eight));
            } else {
#pragma unroll
                for (int n = i; n < i + 8; ++n)
                    if (e0 + n < E) store(to + n, from_float<S>(dx[n]));
            }
        }
    });
}

// ---- the host's side

constexpr int64_t kMostExperts = 512;

// Everything a call reads, alive as long as the problem that points into it.
struct Inputs {
    Tensor logits;
    Optional mask;
    Problem problem{};
    bool aligned;

    Inputs(const Tensor& logits_, const Optional& mask_, int64_t score, bool renormalize, double scale)
        : logits(dense_rows(logits_)) {
        check_logits(logits, mask_, score);
        STD_TORCH_CHECK(is_16bit(logits) || logits.scalar_type() == ScalarType::Float,
                        "logits must be bfloat16, float16 or float32");
        STD_TORCH_CHECK(logits.size(1) <= kMostExperts, "logits must have at most ", kMostExperts,
                        " experts, got ", logits.size(1));
        Problem& p = problem;
        p.dtype = dtype_of(logits), p.score = Score(score), p.renormalize = renormalize, p.scale = scale;
        p.T = logits.size(0), p.E = logits.size(1), p.logits_row = logits.stride(0);
        p.logits = pointer<void>(logits);
        aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
                  p.logits_row * int64_t(logits.element_size()) % 16 == 0;
        if (!mask_.has_value()) return;
        mask = dense_rows(*mask_);
        p.mask = pointer<uint8_t>(*mask), p.mask_row = mask->dim() == 1 ? 0 : mask->stride(0);
    }
};

template <int L, int R>
void launch_forward(const Device& device, const Forward& f, int64_t blocks) {
    const int64_t E = f.problem.E, picks = kWarps * (kWarp / L) * f.problem.k;
    const int bytes = int(E * 4 + 4 + kWarps * (E + 2) * 4 + 8 + picks * 8);
    device.launch(forward_kernel<L, R>, dim3(unsigned(blocks)), kThreads, bytes, f);
}

template <int L, int R>
void launch_backward(const Device& device, const Backward& g, int64_t) {
    const int64_t tokens = kThreads / L, blocks = (g.problem.T + tokens - 1) / tokens;
    STD_TORCH_CHECK(blocks < int64_t(1) << 31, "logits must be of fewer tokens");
    device.launch(backward_kernel<L, R>, dim3(unsigned(blocks)), kThreads, 0, g);
}

#define SLM_LAUNCH(launch, E, ...)             \
    ((E) <= 32    ? launch<4, 8>(__VA_ARGS__)  \
     : (E) <= 64  ? launch<8, 8>(__VA_ARGS__)  \
     : (E) <= 128 ? launch<16, 8>(__VA_ARGS__) \
     : (E) <= 256 ? launch<32, 8>(__VA_ARGS__) \
                  : launch<32, 16>(__VA_ARGS__))

// Threads of a token.
int64_t threads_of(int64_t E) { return E <= 32 ? 4 : E <= 64 ? 8 : E <= 128 ? 16 : 32; }

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results forward(const Tensor& logits, Optional bias, Optional mask, int64_t k, int64_t score,
                bool renormalize, int64_t groups, int64_t top_groups, double scale) {
    const Device device(logits);
    Inputs in(logits, mask, score, renormalize, scale);
    Problem& p = in.problem;
    check_choice(p.E, k, groups, top_groups);
    p.k = k;
    if (bias.has_value()) bias = statistics(*bias, {p.E}, ScalarType::Float, "selection_bias");
    const auto floats = [&](Sizes shape) {
        return torch::stable::new_empty(logits, shape, ScalarType::Float);
    };
    const auto ints = [&](Sizes shape) { return torch::stable::new_empty(logits, shape, ScalarType::Int); };
    const int64_t tokens = kThreads / threads_of(p.E);
    const int64_t blocks =
        max(int64_t(1), min((p.T + tokens - 1) / tokens, int64_t(kResident) * device.multiprocessors()));
    Tensor counting = ints({p.E + 1});  // and the ticket
    const Tensor indices = ints({p.T, k}), weights = floats({p.T, k}), probabilities = floats({p.E});
    const Tensor z = floats({}), entropy = floats({}), lse = floats({p.T});
    const Tensor sums = floats({blocks > 1 ? p.E + 2 : 0, blocks});
    Forward f{};
    f.problem = p, f.aligned = in.aligned, f.groups = int(groups), f.top_groups = int(top_groups);
    f.bias = bias.has_value() ? pointer<float>(*bias) : nullptr;
    f.indices = pointer<int>(indices), f.weights = pointer<float>(weights), f.lse = pointer<float>(lse);
    f.probabilities = pointer<float>(probabilities), f.z = pointer<float>(z);
    f.entropy = pointer<float>(entropy), f.sums = pointer<float>(sums);
    f.counts = pointer<int>(counting), f.ticket = f.counts + p.E;
    if (blocks > 1) device.clear(f.counts, (p.E + 1) * 4);
    SLM_LAUNCH(launch_forward, p.E, device, f, blocks);
    return {indices, weights, torch::stable::narrow(counting, 0, 0, p.E), probabilities, z, entropy, lse};
}

Tensor backward(Optional dweights, Optional dprobabilities, Optional dz, const Tensor& logits, Optional mask,
                const Tensor& indices, const Tensor& lse, int64_t score, bool renormalize, double scale) {
    const Device device(logits);
    Inputs in(logits, mask, score, renormalize, scale);
    Problem& p = in.problem;
    check_gradients(dweights, dprobabilities, dz, logits, indices, ScalarType::Float);
    p.k = indices.size(1);
    const Tensor index = dense(indices), total = statistics(lse, {p.T}, ScalarType::Float, "lse");
    const Tensor dlogits = torch::stable::new_empty(logits, {p.T, p.E});
    if (p.T == 0) return dlogits;
    Backward g{};
    g.problem = p, g.aligned = in.aligned;
    g.indices = pointer<int>(index), g.lse = pointer<float>(total), g.dlogits = pointer<void>(dlogits);
    if (dweights.has_value()) {
        g.dweights = pointer<float>(*dweights);
        g.dweights_row = dweights->stride(0), g.dweights_column = dweights->stride(1);
    }
    if (dprobabilities.has_value()) {
        g.dprobabilities = pointer<float>(*dprobabilities);
        g.dprobabilities_stride = dprobabilities->stride(0);
    }
    if (dz.has_value()) g.dz = pointer<float>(*dz);
    SLM_LAUNCH(launch_backward, p.E, device, g, 0);
    return dlogits;
}

}  // namespace
}  // namespace slm::route

SLM_CUDA_OPERATORS(m) {
    m.impl("route_forward", TORCH_BOX(&slm::route::forward));
    m.impl("route_backward", TORCH_BOX(&slm::route::backward));
}
