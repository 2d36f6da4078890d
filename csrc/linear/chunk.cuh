// One chunk of linear attention in shared memory, and what its tokens say to one another: M, and with beta Z.
//
// The maths and the roles of the warps stand in forward.cu.
#pragma once

#include <limits>
#include <type_traits>

#include "../common/rows.h"
#include "../common/tiles.cuh"
#include "linear.h"

namespace slm {
namespace {

constexpr int kChunk = 64;  // tokens
constexpr int kSlice = 64;  // value columns of a block, at most
constexpr int kMakers = 4 * kWarp;  // threads of the first role
constexpr int kMaxThreads = kMakers + kSlice / 16 * kWarp;
constexpr int kMaxStages = 3;

struct Problem {
    Rows q, k, v, o;
    const float *decay, *beta, *state0, *z0;
    float *state, *z;
    const int* cu;
    int64_t T;
    int H, group, K, V;
    int columns, slices;  // V in slices of `columns`
    int stages;  // chunks in shared memory
    Decay decays;
    bool normalize, l2norm;
    float scale;

    constexpr int states() const { return columns / 16 * kWarp; }  // threads of the second role
};

// What a block works on: `length` tokens from `begin` of row b, head h, value columns from `column`.
struct Work {
    int64_t n, b, begin, length;
    int h, column, chunks;

    explicit SLM_DEVICE Work(const Problem& p) {
        const int64_t block = blockIdx.x;
        column = int(block % p.slices) * p.columns;
        h = int(block / p.slices % p.H), n = block / p.slices / p.H;
        b = p.cu != nullptr ? 0 : n;
        begin = p.cu != nullptr ? load(p.cu + n) : 0;
        length = p.cu != nullptr ? load(p.cu + n + 1) - begin : p.T;
        chunks = int((length + kChunk - 1) / kChunk);
    }
    SLM_DEVICE int tokens(int chunk) const {
        return int(min(int64_t(kChunk), length - int64_t(chunk) * kChunk));
    }
};

// Barriers; the first two come once a stage.
enum Barrier : int {
    kMade = 1,  // makers tell states: q, k, v, M, Z and the factors are there
    kRead = kMade + kMaxStages,  // states tell makers: the stage may be overwritten
    kAmongMakers = kRead + kMaxStages,
};

// Numbers of a chunk, one a token.
enum Factor : int {
    kHigh,
    kLow,  // log2 of the decay from the chunk's start to the token, itself included: a sum of two
    kRate,  // beta
    kQueryNorm,
    kKeyNorm,  // 1 / |q|, 1 / |k|
    kIntoQuery,
    kIntoKey,  // decay from the chunk's start, times those
    kOutOf,  // decay from the token to the chunk's end, times kKeyNorm
    kFinish,  // what o is multiplied by in the end
    kTotal,  // [0]: decay of the whole chunk
    kExponents,  // [4] integers: M's rows are stored times two to this, a number for every 16
    kFactors,
};

// A stage: one chunk's q, k, v (later o), M, Z, factors.
template <int K, bool DELTA>
struct Stage {
    static constexpr int kKeys = Tile<K>::bytes(kChunk), kSquare = Tile<kChunk>::bytes(kChunk);
    static constexpr int kNumbers = 2 * kKeys + Tile<kSlice>::bytes(kChunk) + (DELTA ? 2 : 1) * kSquare;
    static constexpr int kBytes = kNumbers + kFactors * kChunk * 4;

    Shared base;

    SLM_DEVICE Tile<K> q() const { return {base}; }
    SLM_DEVICE Tile<K> k() const { return {base + kKeys}; }
    SLM_DEVICE Tile<kSlice> v() const { return {base + 2 * kKeys}; }
    SLM_DEVICE Tile<kChunk> m() const { return {v().base + Tile<kSlice>::bytes(kChunk)}; }
    SLM_DEVICE Tile<kChunk> z() const { return {m().base + kSquare}; }
    SLM_DEVICE Shared factor(Factor which, int token = 0) const {
        return base + Shared(kNumbers + (which * kChunk + token) * 4);
    }
    template <typename X = float>
    SLM_DEVICE X get(Factor which, int token = 0) const {
        return load<X>(factor(which, token));
    }
};

// Behind the stages: the normaliser [K], and with beta the blocks of L on the diagonal, one a maker.
template <int K, bool DELTA>
struct Layout {
    static constexpr int kRow = 24;  // floats: the float2s of neighbouring rows lie in different banks
    static constexpr int bytes(int stages) {
        return stages * Stage<K, DELTA>::kBytes + (K + (DELTA ? kChunk * kRow : 0)) * 4;
    }
    int stages;
    SLM_DEVICE Stage<K, DELTA> stage(int slot) const {
        return {shared_memory() + Shared(slot * Stage<K, DELTA>::kBytes)};
    }
    SLM_DEVICE Shared normalizer(int k) const { return stage(stages).base + Shared(k * 4); }
    SLM_DEVICE Shared diagonal(int i, int j) const { return normalizer(K) + Shared((i * kRow + j) * 4); }
};

// --- Powers of two for float16

// A state, q k, what the delta rule writes or divides by |k| may leave its range, and digits are lost near its
// lower end: operands are stored times a power of two that brings the largest of them near 2^target. bfloat16
// has the range of float; its exponents are 0, known to the compiler.
SLM_DEVICE float two_to(int exponent) { return as_float(uint32_t(127 + exponent) << 23); }

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// |x|, and 0 for an infinity or a NaN, which no power of two could bring near.
SLM_DEVICE float finite_size(float x) { return fabsf(x) < kInfinity ? fabsf(x) : 0.f; }

// Of the power of two that brings the largest size of all lanes near 2^target.
SLM_DEVICE int exponent_of(float largest, int target) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    const int exponent = target + 127 - int(as_bits(largest) >> 23);
    return min(max(exponent, -30), 30);  // products of four powers stay finite
}

template <typename E, int N>
SLM_DEVICE int exponent_for(const float (&x)[N][4], int target) {
    if constexpr (std::is_same_v<E, Half>) {
        float largest = 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) largest = fmaxf(largest, finite_size(x[n][e]));
        return exponent_of(largest, target);
    } else {
        return 0;
    }
}

// --- Makers

// Begins to copy `tokens` rows from `start` on into a tile of a chunk, and zeros into the others: `columns` of
// each, a multiple of 8. A thread has the same 16 bytes of every so many rows: addresses are sums.
template <typename E, int C>
SLM_DEVICE void load_tile(Tile<C> tile, const E* start, int64_t stride, int tokens, int columns) {
    constexpr int kRows = kMakers / Tile<C>::kPieces;  // at a time
    const int first = int(threadIdx.x) / Tile<C>::kPieces, piece = int(threadIdx.x) % Tile<C>::kPieces;
    const int rows = piece * 8 < columns ? tokens : 0;
    start += first * stride + piece * 8;
#pragma unroll
    for (int row = 0; row < kChunk; row += kRows, start += kRows * stride)
        copy_async(tile.from(row).piece(first, piece), start, first + row < rows);
}

// Begins to bring a chunk's q, k and v to its stage.
template <typename E, int K, bool DELTA>
SLM_DEVICE void load_tokens(const Problem& p, const Work& work, Stage<K, DELTA> stage, int chunk) {
    const int tokens = work.tokens(chunk), h = work.h / p.group;
    const auto load_rows = [&](auto tile, const Rows& x, int head, int column, int columns) {
        const E* start = x.at<const E>(work.b, work.begin + int64_t(chunk) * kChunk, head) + column;
        load_tile(tile, start, x.t, tokens, columns);
    };
    load_rows(stage.q(), p.q, h, 0, p.K);
    load_rows(stage.k(), p.k, h, 0, p.K);
    load_rows(stage.v(), p.v, work.h, work.column, min(p.columns, p.V - work.column));
}

// Gates and rates of two neighbouring tokens; of none where the chunk has ended.
struct Gates {
    float gate[2] = {}, rate[2] = {};

    SLM_DEVICE void load_chunk(const Problem& p, const Work& work, int chunk) {
        const int tokens = chunk < work.chunks ? work.tokens(chunk) : 0;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int token = 2 * lane_of_thread() + n;
            const int64_t at = (work.b * p.T + work.begin + int64_t(chunk) * kChunk + token) * p.H + work.h;
            const bool there = token < tokens;
            gate[n] = there && p.decays == Decay::scalar ? load(p.decay + at) : 0;
            if (there && p.decays == Decay::constant) gate[n] = load(p.decay + work.h);
            rate[n] = there && p.beta != nullptr ? load(p.beta + at) : 0;
        }
    }
};

// log2 of the decay from the chunk's start to each token, by one warp. Sums are taken in float64 and kept as
// two floats: their differences then have the digits of the gates between two tokens, whatever came before. A
// gate below -200 counts as -200, so that -inf gives zeros and no NaN: e^-200 is zero in float32.
template <int K, bool DELTA>
SLM_DEVICE void store_gates(const Problem& p, Stage<K, DELTA> stage, const Gates& gates) {
    const int token = 2 * lane_of_thread();
    double sums[2] = {};
    if (p.decays != Decay::none) {
        for (int n = 0; n < 2; ++n)  // a NaN stays one
            sums[n] = (gates.gate[n] < -200.f ? -200.f : gates.gate[n]) * 1.4426950408889634;
        double sum = sums[0] + sums[1];
#pragma unroll
        for (int delta = 1; delta < kWarp; delta *= 2) {
            const double before = shuffle_up(sum, delta);
            if (lane_of_thread() >= delta) sum += before;
        }
        const double before = shuffle_up(sum, 1);
        if (lane_of_thread() > 0) sums[0] += before;
        sums[1] = sum;
    }
    const float2 high = make_float2(float(sums[0]), float(sums[1]));
    store(stage.factor(kHigh, token), high);
    store(stage.factor(kLow, token), make_float2(float(sums[0] - high.x), float(sums[1] - high.y)));
    if constexpr (DELTA) store(stage.factor(kRate, token), make_float2(gates.rate[0], gates.rate[1]));
}

template <typename E, int K>
SLM_DEVICE float sum_of_squares(Tile<K> tile, int row) {
    float sum = 0;
#pragma unroll 4
    for (int piece = 0; piece < K / 8; ++piece) {
        const uint4 x = load<uint4>(tile.piece(row, piece));
        const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const float a = first_of<E>(pairs[n]), b = second_of<E>(pairs[n]);
            sum += a * a + b * b;
        }
    }
    return sum;
}

// The factors of each token that follow from its gates and norms, by the makers.
template <typename E, int K, bool DELTA>
SLM_DEVICE void make_factors(const Problem& p, Stage<K, DELTA> stage, int thread) {
    const int token = thread % kChunk;
    const bool key = thread / kChunk;  // half of the threads see to queries, half to keys
    float norm = 1;
    if (p.l2norm) {
        norm = reciprocal_root(sum_of_squares<E>(key ? stage.k() : stage.q(), token) + 1e-6f);
        store(stage.factor(key ? kKeyNorm : kQueryNorm, token), norm);
    }
    const float high = stage.get(kHigh, token), low = stage.get(kLow, token);
    const float last_high = stage.get(kHigh, kChunk - 1), last_low = stage.get(kLow, kChunk - 1);
    store(stage.factor(key ? kIntoKey : kIntoQuery, token), norm * exp2(high + low));
    if (key)
        store(stage.factor(kOutOf, token), norm * exp2((last_high - high) + (last_low - low)));
    else
        store(stage.factor(kFinish, token), p.scale);
    if (thread == 0) store(stage.factor(kTotal), exp2(last_high + last_low));
}

// x [16, 64] of the warp's rows, times the decay from token j to token i, and the norms; zero for j > i, or,
// if `strict`, for j >= i. Columns behind the warp's last row are left as they are.
template <int K, bool DELTA>
SLM_DEVICE void fade(const Problem& p, Stage<K, DELTA> stage, int warp, float (&x)[8][4],
                     const float (&rows)[2], bool strict) {
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    float high[2], low[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        high[half] = stage.get(kHigh, 16 * warp + g + 8 * half);
        low[half] = stage.get(kLow, 16 * warp + g + 8 * half);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        if (n >= 2 * warp + 2) continue;
        const int j = 8 * n + 2 * t;
        const float2 highs = stage.template get<float2>(kHigh, j), lows = stage.template get<float2>(kLow, j);
        float2 norms = make_float2(1, 1);
        if (p.l2norm) norms = stage.template get<float2>(kKeyNorm, j);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int half = e / 2, second = e % 2, i = 16 * warp + g + 8 * half;
            float factor = rows[half] * (second ? norms.y : norms.x);
            if (p.decays != Decay::none)
                factor *= exp2((high[half] - (second ? highs.y : highs.x)) +
                               (low[half] - (second ? lows.y : lows.x)));
            x[n][e] = i > j + second || (i == j + second && !strict) ? x[n][e] * factor : 0.f;
        }
    }
}

// den = row sums of M + q z, and then z of the next chunk.
template <typename E, int K, bool DELTA>
SLM_DEVICE void normalize(Layout<K, DELTA> memory, Stage<K, DELTA> stage, int thread,
                          const float (&m)[8][4]) {
    const int warp = thread / kWarp, g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    sync_some(kAmongMakers, kMakers);  // the factors are there
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = 16 * warp + g + 8 * half;
        float near = 0, far = 0;
#pragma unroll
        for (int n = 0; n < 8; ++n)
            if (n < 2 * warp + 2) near += m[n][2 * half] + m[n][2 * half + 1];
#pragma unroll
        for (int piece = t; piece < K / 8; piece += 4) {
            const uint4 x = load<uint4>(stage.q().piece(row, piece));
            const float4 a = load<float4>(memory.normalizer(8 * piece));
            const float4 b = load<float4>(memory.normalizer(8 * piece + 4));
            far += first_of<E>(x.x) * a.x + second_of<E>(x.x) * a.y + first_of<E>(x.y) * a.z +
                   second_of<E>(x.y) * a.w + first_of<E>(x.z) * b.x + second_of<E>(x.z) * b.y +
                   first_of<E>(x.w) * b.z + second_of<E>(x.w) * b.w;
        }
        const float den = sum_of_row(near) + stage.get(kIntoQuery, row) * sum_of_row(far) + 1e-6f;
        if (t == 0) store(stage.factor(kFinish, row), 1.f / den);
    }
    sync_some(kAmongMakers, kMakers);  // z has been read
    if (thread < K) {
        float z = 0;
#pragma unroll 8
        for (int j = 0; j < kChunk; ++j)
            z += stage.get(kOutOf, j) * to_float(load<E>(stage.k().at(j, thread)));
        z += stage.get(kTotal) * load<float>(memory.normalizer(thread));
        store(memory.normalizer(thread), z);
    }
}

// Z out of L = beta N. Below the diagonal blocks of 16, -L. On the diagonal the inverse of I + L, less I,
// transposed: by forward substitution in float32, a block a warp and a column a lane.
template <typename E, int K>
SLM_DEVICE void invert(Layout<K, true> memory, Stage<K, true> stage, int warp, const float (&l)[8][4]) {
    const int lane = lane_of_thread(), g = lane / 4, t = lane % 4, first = 16 * warp;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        if (n < 2 * warp) {
            const float minus[4] = {-l[n][0], -l[n][1], -l[n][2], -l[n][3]};
            store_d<E>(stage.z(), first, 8 * n, minus);
        } else if (n < 2 * warp + 2) {
            const int column = 8 * (n - 2 * warp) + 2 * t;
            store(memory.diagonal(first + g, column), make_float2(l[n][0], l[n][1]));
            store(memory.diagonal(first + g + 8, column), make_float2(l[n][2], l[n][3]));
        }
    }
    sync_warp();
    const int c = lane % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < i; j += 4) {
            const float4 row = load<float4>(memory.diagonal(first + i, j));
            sum += row.x * x[j];
            if (j + 1 < i) sum += row.y * x[j + 1];
            if (j + 2 < i) sum += row.z * x[j + 2];
            if (j + 3 < i) sum += row.w * x[j + 3];
        }
        x[i] = i > c ? -sum : i == c ? 1.f : 0.f;
    }
    if (lane < 16) {
        uint32_t z[8];
#pragma unroll
        for (int i = 0; i < 16; i += 2) z[i / 2] = pack<E>(i > c ? x[i] : 0.f, i + 1 > c ? x[i + 1] : 0.f);
        store(stage.z().piece(first + c, 2 * warp), make_uint4(z[0], z[1], z[2], z[3]));
        store(stage.z().piece(first + c, 2 * warp + 1), make_uint4(z[4], z[5], z[6], z[7]));
    }
    sync_warp();  // the next chunk's L comes to the same place
}

// The first role: brings the chunks to shared memory and makes M, Z and the factors of each.
template <typename E, int K, bool DELTA>
SLM_DEVICE void make_chunks(const Problem& p, const Work& work) {
    const Layout<K, DELTA> memory{p.stages};
    const int thread = int(threadIdx.x), g = lane_of_thread() / 4;
    const int warp = shuffle(warp_of_thread(), 0);  // now the compiler knows that it is one for all lanes
    const int64_t place = (work.n * p.H + work.h) * p.K + thread;
    if (p.normalize && thread < K)
        store(memory.normalizer(thread), thread < p.K && p.z0 != nullptr ? load(p.z0 + place) : 0.f);
    for (int chunk = 0; chunk < p.stages - 1; ++chunk) {
        if (chunk < work.chunks) load_tokens<E>(p, work, memory.stage(chunk), chunk);
        commit_copies();
    }
    Gates gates;
    if (warp == 0) gates.load_chunk(p, work, 0);
    for (int chunk = 0, slot = 0; chunk < work.chunks; ++chunk) {
        const Stage<K, DELTA> stage = memory.stage(slot);
        if (warp == 0) {
            store_gates(p, stage, gates);
            gates.load_chunk(p, work, chunk + 1);  // they arrive while this chunk is made
        }
        p.stages == kMaxStages ? wait_copies<kMaxStages - 2>() : wait_copies<0>();
        sync_some(kAmongMakers, kMakers);
        make_factors<E>(p, stage, thread);
        if (p.l2norm) sync_some(kAmongMakers, kMakers);

        float m[8][4] = {}, l[8][4] = {};
#pragma unroll
        for (int column = 0; column < K; column += 16) {
            uint32_t a[4], rows[4], b[4];
            load_a(a, stage.q(), 16 * warp, column);
            if constexpr (DELTA) load_a(rows, stage.k(), 16 * warp, column);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (j > warp) continue;
                load_b(b, stage.k(), 16 * j, column);
                multiply<E>(m[2 * j], a, b[0], b[1]);
                multiply<E>(m[2 * j + 1], a, b[2], b[3]);
                if constexpr (DELTA) {
                    multiply<E>(l[2 * j], rows, b[0], b[1]);
                    multiply<E>(l[2 * j + 1], rows, b[2], b[3]);
                }
            }
        }
        float norms[2] = {1, 1};
        if (p.l2norm)
            for (int half = 0; half < 2; ++half)
                norms[half] = stage.get(kQueryNorm, 16 * warp + g + 8 * half);
        fade(p, stage, warp, m, norms, false);
        const int exponent = exponent_for<E>(m, 13);
        if (std::is_same_v<E, Half> && lane_of_thread() == 0) store(stage.factor(kExponents, warp), exponent);
#pragma unroll
        for (int n = 0; n < 8; ++n)
            if (n < 2 * warp + 2) {
                float row[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) row[e] = m[n][e] * two_to(exponent);
                store_d<E>(stage.m(), 16 * warp, 8 * n, row);
            }
        if constexpr (DELTA) {
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * warp + g + 8 * half;
                norms[half] = stage.get(kRate, row) * (p.l2norm ? stage.get(kKeyNorm, row) : 1.f);
            }
            fade(p, stage, warp, l, norms, true);
            invert<E>(memory, stage, warp, l);
        } else if (p.normalize) {
            normalize<E>(memory, stage, thread, m);
        }
        arrive_some(kMade + slot, kMakers + p.states());

        const int next = chunk + p.stages - 1, before = slot == 0 ? p.stages - 1 : slot - 1;  // its slot
        if (next < work.chunks) {
            if (chunk > 0) sync_some(kRead + before, kMakers + p.states());
            load_tokens<E>(p, work, memory.stage(before), next);
        }
        commit_copies();
        slot = slot + 1 == p.stages ? 0 : slot + 1;
    }
    if (p.normalize && work.column == 0 && thread < p.K)
        store(p.z + place, load<float>(memory.normalizer(thread)));
}

}  // namespace
}  // namespace slm
