// What the CUDA kernels of sliding-window attention share: the problem as they are given it, where the rows
// of a block stand, which rows of the other side they meet, the mask at the window's edges, products of
// tiles, and the softmax's state.
//
// Packed sequences: tile t of `rows` rows belongs to the sequence n with cu[n] / rows + n <= t < the same of
// n + 1. Those ranges rise strictly and are long enough for every sequence, so that the number of tiles,
// total / rows + N, follows from shapes alone (the host never waits for the device), and a warp finds its n
// by a search, 32 places at a time. Surplus tiles stand past the end of their sequence.
#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "../common/rows.h"
#include "../common/tiles.cuh"
#include "arguments.h"

namespace slm {

// Rows meet columns from `before` before to `after` after their own position: the window, for queries among
// keys and, turned round, for keys among queries. It is the geometry of band.h for tiles; of rows i.. and
// columns j.. only the distance i - j matters.
struct Window {
    int before, after;

    SLM_DEVICE Window turned() const { return {after, before}; }
    // Does no row meet any of the columns? Does every row meet all of them?
    SLM_DEVICE bool misses(int distance, int rows, int columns) const {
        return distance >= columns + before || distance <= -rows - after;
    }
    SLM_DEVICE bool covers(int distance, int rows, int columns) const {
        return distance <= before - rows + 1 && distance >= columns - after - 1;
    }
};

// Queries [B, T, Hq, D], keys [B, S, H, D], values [B, S, H, Dv]. In log2 units a score is `unit` x with x =
// q.k; if `rewrite`, with x = inner q.k, and if `capped`, with x = tanh(inner q.k). unit is positive in these
// two cases.
struct WindowProblem {
    Rows q, k, v;
    const float* sinks;  // [Hq], or null
    const int *cu_q, *cu_k;  // [N + 1], or null: each batch entry is a sequence
    int B, T, S, N, Hq, H, D, Dv;
    Window window;  // of queries among keys; both sides bounded, so that positions stay small
    float scale, inner, unit;
    bool rewrite, capped;
};

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// --- Places -----------------------------------------------------------------------------------------------

// Tiles of `rows` rows along a dimension.
constexpr int tile_count(int length, int rows, int N, bool packed) {
    return packed ? length / rows + N : (length + rows - 1) / rows;
}

// A tile in its sequence: that begins at row `start` of the tensor and has `length` rows, the tile begins at
// its row `first`. other_start, other_length: the same sequence on the other side, keys for queries.
struct Place {
    int start, length, first, other_start, other_length;
};

SLM_DEVICE Place place_of(int tile, int rows, int length, int other_length, const int* cu, const int* other,
                          int N) {
    if (cu == nullptr) return {0, length, tile * rows, 0, other_length};
    int n = 0;
    for (int count = N; count > 1;) {  // n lies in [n, n + count)
        const int step = (count + kWarp - 1) / kWarp, at = lane_of_thread() * step;
        const bool before = at < count && load(cu + n + at) / rows + n + at <= tile;
        const int skipped = (count_bits(ballot(before)) - 1) * step;
        n += skipped;
        count = min(step, count - skipped);
    }
    const int start = load(cu + n), other_start = load(other + n);
    return {start, load(cu + n + 1) - start, (tile - start / rows - n) * rows, other_start,
            load(other + n + 1) - other_start};
}

// Heads of a group that a block of `parts` parts, 2 or 4, over queries takes: so they share what it loads of keys
// and values.
constexpr int heads_of_block(int group, int parts = 4) {
    return group % parts == 0 ? parts : group % 2 == 0 ? 2 : 1;
}

// What a part of a block works on, kRows rows, in a kernel over queries: `heads` heads on the same positions,
// kParts / heads parts a head. A part is a warp or a warpgroup. Positions are those among the keys of the sequence.
template <int kRows, int kParts = 4>
struct QueryTile {
    int b, h, head;  // batch entry, key-value head, the part's query head
    int part;  // which of the `parts` runs of kRows rows of a head
    int row, rows;  // the part's first row in the tensor, and how many there are up to its sequence's end
    int key, count;  // the first key that the block meets, in the tensor, and how many there are
    int rest;  // keys from there to the sequence's end
    int distance;  // of the part's first row after that key

    // Rows of a head in a block.
    static constexpr int rows_of(int group) { return kParts / heads_of_block(group, kParts) * kRows; }
    static constexpr int tiles(const WindowProblem& p) {
        return tile_count(p.T, rows_of(p.Hq / p.H), p.N, p.cu_q != nullptr);
    }
    static constexpr int parts(const WindowProblem& p) {
        return tiles(p) * (kParts / heads_of_block(p.Hq / p.H, kParts));
    }
    static constexpr int64_t blocks(const WindowProblem& p) {
        return int64_t(p.B) * tiles(p) * p.Hq / heads_of_block(p.Hq / p.H, kParts);
    }

    // Blocks that share keys are neighbours, then tiles, the last ones first: without a window they take longest.
    SLM_DEVICE explicit QueryTile(const WindowProblem& p) : QueryTile(p, warp_of_thread()) {}
    SLM_DEVICE QueryTile(const WindowProblem& p, int part_of_block) {
        const int group = p.Hq / p.H, heads = heads_of_block(group, kParts);
        const int all = tiles(p), sets = group / heads;
        int x = int(blockIdx.x);
        head = x % sets * heads + part_of_block % heads, x /= sets;
        const int tile = all - 1 - x % all;
        x /= all;
        h = x % p.H, b = x / p.H;
        head += h * group;
        part = tile * (kParts / heads) + part_of_block / heads;
        const Place place = place_of(tile, rows_of(group), p.T, p.S, p.cu_q, p.cu_k, p.N);
        const int first = place.first + part_of_block / heads * kRows,
                  offset = place.other_length - place.length;
        const int begin = max(place.first + offset - p.window.before, 0);
        const int last = min(place.first + rows_of(group), place.length) - 1;
        const int end = min(last + offset + p.window.after + 1, place.other_length);
        row = place.start + first, rows = place.length - first;
        key = place.other_start + begin, count = place.first > last ? 0 : max(end - begin, 0);
        rest = place.other_length - begin;
        constexpr int kNowhere = 1 << 30;  // meets no key
        distance = rows > 0 ? first + offset - begin : kNowhere;
    }
    // Row r of the part in lse [B, Hq, T].
    SLM_DEVICE int64_t at(const WindowProblem& p, int r) const {
        return (int64_t(b) * p.Hq + head) * p.T + row + r;
    }
};

// --- Tiles ------------------------------------------------------------------------------------------------

// Copies rows tile by tile, kRows rows a tile, by kThreads threads. A thread keeps to one piece of the
// rows and steps down, so that one pointer says where it is.
template <int kRows, int kThreads, int C, typename E>
class Copier {
  public:
    SLM_DEVICE Copier(const E* from, int stride, unsigned thread)
        : next_(from + int64_t(thread / kPieces) * stride + thread % kPieces * 8) {}

    // The next tile: only its first `rows` rows and `columns` columns, zeros besides.
    SLM_DEVICE void copy(Tile<C> to, int stride, int rows, int columns, unsigned thread) {
        const int piece = int(thread % kPieces), first = int(thread / kPieces),
                  end = piece * 8 < columns ? rows - first : 0;
#pragma unroll
        for (int row = 0; row < kRows; row += kStep, next_ += int64_t(kStep) * stride)
            copy_async(to.piece(row + first, piece), next_, row < end);
    }

  private:
    static constexpr int kPieces = Tile<C>::kPieces, kStep = kThreads / kPieces;
    static_assert(kRows % kStep == 0);
    const E* next_;
};

// The rows of a tile as operand a: read again each time, or held in registers.
template <int C, int M, bool kHeld>
class Operand {
  public:
    SLM_DEVICE explicit Operand(Tile<C> tile) : tile_(tile) {
        if constexpr (kHeld)
#pragma unroll
            for (int n = 0; n < M * C / 16; ++n)
                load_a(held_[n / (C / 16)][n % (C / 16)], tile, n / (C / 16) * 16, n % (C / 16) * 16);
    }
    SLM_DEVICE void operator()(uint32_t (&a)[4], int m, int k) const {
        if constexpr (kHeld)
#pragma unroll
            for (int n = 0; n < 4; ++n) a[n] = held_[m][k][n];
        else
            load_a(a, tile_, 16 * m, 16 * k);
    }

  private:
    Tile<C> tile_;
    uint32_t held_[kHeld ? M : 1][kHeld ? C / 16 : 1][4];
};

// s [16 M, 8 N] += a b^T over C columns: operand(x, m, k) gives rows 16 m, columns 16 k of a; b are rows of a
// tile.
template <typename E, int M, int N, int C, typename Operand>
SLM_DEVICE void multiply_transposed(float (&s)[M][N][4], Operand operand, Tile<C> b) {
#pragma unroll
    for (int k = 0; k < C / 16; ++k) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) operand(x[m], m, k);
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            uint32_t y[4];
            load_b(y, b, 16 * n, 16 * k);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply<E>(s[m][2 * n], x[m], y[0], y[1]);
                multiply<E>(s[m][2 * n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

// o [16 M, C] += p b, b are rows of a tile; p [16 M, 8 N] is rounded to E, or comes so as operands.
template <typename E, int M, int K, int C>
SLM_DEVICE void multiply_rounded(float (&o)[M][C / 8][4], const uint32_t (&p)[M][K][4], Tile<C> b) {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
        for (int n = 0; n < C / 16; ++n) {
            uint32_t y[4];
            load_b_transposed(y, b, 16 * k, 16 * n);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply<E>(o[m][2 * n], p[m][k], y[0], y[1]);
                multiply<E>(o[m][2 * n + 1], p[m][k], y[2], y[3]);
            }
        }
}
template <typename E, int M, int N, int C>
SLM_DEVICE void multiply_rounded(float (&o)[M][C / 8][4], const float (&p)[M][N][4], Tile<C> b) {
    uint32_t x[M][N / 2][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int k = 0; k < N / 2; ++k) as_a<E>(x[m][k], p[m][2 * k], p[m][2 * k + 1]);
    multiply_rounded<E>(o, x, b);
}

// Results [16 M, C] to `rows` rows of global memory, 16 bytes a lane, through a tile that is the warp's own.
template <typename E, int M, int C>
SLM_DEVICE void write_rows(Tile<C> tile, const float (&d)[M][C / 8][4], E* to, int64_t stride, int rows,
                           int columns) {
    sync_warp();
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < C / 8; ++n) store_d<E>(tile, 16 * m, 8 * n, d[m][n]);
    sync_warp();
    for (int n = lane_of_thread(); n < 16 * M * Tile<C>::kPieces; n += kWarp) {
        const int row = n / Tile<C>::kPieces, piece = n % Tile<C>::kPieces;
        if (row < rows && piece * 8 < columns)
            store(static_cast<void*>(to + row * stride + piece * 8), load<uint4>(tile.piece(row, piece)));
    }
}

// --- Scores -----------------------------------------------------------------------------------------------

// To float accuracy: 1 - 2 / (1 + e^2x) loses its digits near 0, where the series takes over.
SLM_DEVICE float tanh(float x) {
    const float y = x * x;
    const float series = 1 + y * (-1 / 3.f + y * (2 / 15.f + y * (-17 / 315.f + y * (62 / 2835.f))));
    return y < 0.0625f ? x * series : 1 - 2 * reciprocal(1 + exp2(2 * kLog2E * x));
}

template <bool kCapped, int M, int N>
SLM_DEVICE void rewrite_all(float (&s)[M][N][4], const WindowProblem& p) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[m][n][e] *= p.inner;
                if constexpr (kCapped) s[m][n][e] = tanh(s[m][n][e]);
            }
}

template <int M, int N>
SLM_DEVICE void rewrite(float (&s)[M][N][4], const WindowProblem& p) {
    if (!p.rewrite) return;
    p.capped ? rewrite_all<true>(s, p) : rewrite_all<false>(s, p);
}

// Sets to `value` what lies outside the window, or in columns from `end` on: the rows of s [16 M, 8 N] stand
// `distance` after its columns.
template <int M, int N>
SLM_DEVICE void hide(float (&s)[M][N][4], Window window, int distance, int end, float value) {
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
        const int row = distance + 8 * r + g - 2 * t;
        const int low = row - window.before, high = min(row + window.after + 1, end - 2 * t);
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (8 * n + e < low || 8 * n + e >= high) s[r / 2][n][r % 2 * 2 + e] = value;
    }
}

// The online softmax of a thread's rows 16 m + 8 half + lane / 4 (Dao 2023, FlashAttention-2, section 3.1).
// The shift m may lag behind the maximum by up to 2^8: that is as good, and o is rescaled only at a row's
// first keys and rarely after (the lazy rescaling of FlashAttention-4). A row's bits do not depend on other
// rows.
template <int M>
struct Softmax {
    static constexpr float kNone = -INFINITY, kLag = 8;
    float m[M][2], l[M][2];  // in log2 units; sum of this thread's columns of P

    SLM_DEVICE Softmax() {
#pragma unroll
        for (int n = 0; n < 2 * M; ++n) m[n / 2][n % 2] = kNone, l[n / 2][n % 2] = 0;
    }

    // s, times `unit` in log2 units and -inf where hidden, becomes P; rescale(m, half, factor) where the
    // shift rose.
    template <int N, typename Rescale>
    SLM_DEVICE void update(float (&s)[M][N][4], float unit, Rescale rescale) {
        float top[M][2];
        bool rose = false;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            float x = kNone;
#pragma unroll
            for (int n = 0; n < N; ++n)
                x = fmaxf(x, fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
            top[r / 2][r % 2] = max_of_row(x) * unit;
            rose |= top[r / 2][r % 2] > m[r / 2][r % 2] + kLag;
        }
        if (ballot(rose)) {
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                const float before = m[r / 2][r % 2], now = top[r / 2][r % 2];
                if (!(now > before + kLag)) continue;
                const float factor = exp2(before - now);
                m[r / 2][r % 2] = now;
                l[r / 2][r % 2] *= factor;
                rescale(r / 2, r % 2, factor);
            }
        }
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const float shift = m[r / 2][r % 2] == kNone ? 0.f : m[r / 2][r % 2];
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& x = s[r / 2][n][r % 2 * 2 + e];
                    x = exp2(fmaf(x, unit, -shift));
                    l[r / 2][r % 2] += x;
                }
        }
    }

    // A row's sum of P, with a sink (log2 units, or -inf) in it: what o is to be multiplied by, and lse.
    SLM_DEVICE float2 finish(int row, int half, float sink) const {
        const float before = m[row][half], now = fmaxf(before, sink), shift = now == kNone ? 0.f : now;
        const float keep = exp2(before - shift), sum = sum_of_row(l[row][half]) * keep + exp2(sink - shift);
        return make_float2(sum == 0 ? 0.f : keep * reciprocal(sum),
                           (now + log2(sum == 0 ? 1.f : sum)) * kLn2);
    }
};

// --- The host's side --------------------------------------------------------------------------------------

namespace {

// A tensor whose row stride fits an int, as kernels take it.
inline Rows kernel_rows(const Tensor& x) {
    STD_TORCH_CHECK(x.numel() == 0 || x.stride(1) < int64_t(1) << 31, "rows must lie within 2^31 numbers");
    return {pointer<void>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// Arguments of the forward, checked and laid out; keeps the tensors alive. The device is made current before.
struct WindowArguments {
    Tensor q, k, v;
    Optional sinks, cu_q, cu_k;
    WindowProblem problem;
};

inline WindowArguments read_window(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& sinks,
                                   const Optional& cu, const Optional& cu_k, int64_t left, int64_t right,
                                   double scale, double softcap) {
    sliding_window::check_forward(q, k, v, sinks, cu, cu_k, left, right, scale, softcap);
    const int64_t T = q.size(1), S = k.size(1), D = q.size(3), Dv = v.size(3);
    STD_TORCH_CHECK(is_16bit(q), "q must be bfloat16 or float16");
    STD_TORCH_CHECK(D % 8 == 0 && D <= 128 && Dv % 8 == 0 && Dv >= 8 && Dv <= 128,
                    "head sizes must be multiples of 8 from 8 to 128, got ", D, " and ", Dv);
    STD_TORCH_CHECK(T + S < int64_t(1) << 29, "T + S must be below 2^29");
    STD_TORCH_CHECK(!cu.has_value() || cu_k.has_value() || S == T, "k must have q's length, or cu_seqlens_k");
    const auto offsets_of = [](const Tensor& x, const char* name) {
        STD_TORCH_CHECK(x.dim() == 1 && x.scalar_type() == ScalarType::Int && x.numel() > 0, name,
                        " must be an int32 tensor [N+1]");
        return torch::stable::contiguous(x);
    };
    WindowArguments in{aligned_rows(q), aligned_rows(k), aligned_rows(v), {}, {}, {}, {}};
    WindowProblem& p = in.problem;
    if (sinks.has_value()) in.sinks = torch::stable::contiguous(*sinks);
    p.sinks = in.sinks.has_value() ? pointer<float>(*in.sinks) : nullptr;
    if (cu.has_value()) {
        in.cu_q = offsets_of(*cu, "cu_seqlens");
        in.cu_k = cu_k.has_value() ? offsets_of(*cu_k, "cu_seqlens_k") : in.cu_q;
        STD_TORCH_CHECK(in.cu_k->numel() == in.cu_q->numel(), "cu_seqlens has ", in.cu_q->numel() - 1,
                        " sequences, cu_seqlens_k ", in.cu_k->numel() - 1);
    }
    p.cu_q = cu.has_value() ? pointer<int>(*in.cu_q) : nullptr;
    p.cu_k = cu.has_value() ? pointer<int>(*in.cu_k) : nullptr;
    p.N = cu.has_value() ? int(in.cu_q->numel()) - 1 : 0;
    STD_TORCH_CHECK(!cu.has_value() || p.N > 0 || T + S == 0,
                    "cu_seqlens holds no sequence, but q or k has rows");
    STD_TORCH_CHECK(
        q.size(0) <= INT32_MAX / (std::max(q.size(2), int64_t(1)) * (std::max(T, S) / 16 + p.N + 1)),
        "batch x heads x length / 16 must be below 2^31");
    p.B = int(q.size(0)), p.T = int(T), p.S = int(S), p.Hq = int(q.size(2)), p.H = int(k.size(2));
    p.D = int(D), p.Dv = int(Dv);
    p.q = kernel_rows(in.q), p.k = kernel_rows(in.k), p.v = kernel_rows(in.v);
    p.window = {int(left < 0 ? S : std::min(left, S)), int(right < 0 ? T : std::min(right, T))};
    p.scale = float(scale);
    p.capped = softcap > 0;
    p.rewrite = p.capped || scale < 1e-30;  // -inf times unit must be -inf
    p.inner = float(p.capped ? scale / softcap : scale);
    p.unit = kLog2E * float(p.capped ? softcap : p.rewrite ? 1. : scale);
    return in;
}

}  // namespace
}  // namespace slm
