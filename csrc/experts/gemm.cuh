// The grouped product of experts: tiles of rows, each row times the matrix of its expert.
//
//     up:    h = w_gate_up[e] x_token + b,  a = f(gate) up       rows of x are gathered while they are copied
//     down:  weight (w_down[e] a + b)                            rows of results go to their slots
//
// A block makes a tile of kM rows by kN columns, in float32 registers, from steps of kK along the sum that pass
// through a ring of kStages buffers in shared memory (cp.async; a step is used while the next kStages - 1
// arrive; one barrier a step). Eight threads copy the 128 bytes of a row, so that gathered rows are read in whole
// lines, and rows of x are never copied anywhere else. Matrices lie [columns][k] ("rows of w") or, as transposed
// views, [k][columns]: the first are read by ldmatrix as they are, the second by its transposing form. k past the
// end and rows past the tile's are zeros that cost no reading.
//
// Columns. A tile of the up product has whole units. Interleaved gates and ups lie as in w; of two halves the
// tile takes 8 gates, 8 ups, 8 gates, ... Either way 16 columns are 8 units.
//
// When the sum is done, results go through shared memory, a warp's own part of it in float32, rows of 8 numbers
// more than its columns: writes by fragments and reads by rows then lie in different banks. Reading by rows makes
// the rest a short loop over rows, 8 units a lane, whatever the activation, the layout, the biases: 16 bytes
// stored at a time, by runs of 64 or 128. (From fragments, runs would be 16 bytes, and 64 numbers a lane times
// four activations a long program.)
//
// Of large tiles one block fits a multiprocessor, and nobody works while it waits for its first step or stores:
// there as many blocks as multiprocessors stay, for every so many-th tile. Results take all of the ring but one
// stage, half of a warp's rows at a time, and the next tile's first step is on its way to that stage meanwhile.
// Several blocks an SM overlap by themselves.
//
// Order of blocks: the columns of a tile of rows first. The blocks that run at a time, about the GPU's
// multiprocessors, are then a few tiles of rows and the matrices of one or two experts (of d = 1024, n = 512 and
// 132 multiprocessors: 33 tiles or 9 MB, and 4 MB). Both stay in L2, and HBM sees each about once.
//
// Tile sizes, all through the same source:
//
//     |        | rows x columns | of a warp | stages | shared | bytes of L2 a FLOP | blocks an SM, A100 / H200 |
//     | Large  | 128 x 256      | 64 x 64   | 3      | 145 KB | 1 / 85             | 1 / 1 |
//     | Middle | 64 x 128       | 32 x 64   | 3      | 73 KB  | 1 / 43             | 2 / 3 |
//     | Small  | 16 x 64        | 16 x 16   | 4      | 40 KB  | (matrices once)    | 3 / 5 |
//
// Large: ldmatrix reads 1/32 byte a FLOP from shared memory, 64 of 128 bytes a clock at sm_80's full rate, and
// L2's 5.5 TB/s feed 470 TFLOP/s: 128 x 128 would stop at 350. Half of its last tile is empty on average, so it
// wants 1.5 tiles of rows an expert, a block for each SM, and 145 KB; where a block has 99 KB (sm_86, 89, 120)
// Middle takes its place, one block an SM, and Small has two. Small: decoding, where each matrix is read by one
// tile and time is its bytes.
#pragma once

#include "../common/eight.cuh"
#include "../common/tiles.cuh"
#include "activation.cuh"
#include "sort.cuh"

namespace slm {
namespace {

template <int M, int N, int WarpM, int WarpN, int Stages, int Blocks>
struct Shape {
    static constexpr int kM = M, kN = N, kK = 64, kStages = Stages, kBlocks = Blocks;
    static constexpr int kWarpM = WarpM, kWarpN = WarpN, kWarpsN = N / WarpN;
    static constexpr int kThreads = M / WarpM * kWarpsN * kWarp;
    static constexpr int kStage = (M + N) * kK * 2;  // bytes
    static constexpr bool kStays = Blocks == 1;  // for more tiles than one
    static constexpr int kParts = WarpM > 16 ? 2 : 1, kPartRows = WarpM / kParts;
    static constexpr int kResultRow = (WarpN + 8) * 4, kResults = kPartRows * kResultRow;  // bytes, of a warp
    static constexpr int kRing = Stages * kStage;
    static constexpr int kShared = kRing + M * 8;
    static_assert(kThreads / kWarp * kResults <= kRing - kStage && kThreads >= M);
};
using Large = Shape<128, 256, 64, 64, 3, 1>;
using Middle = Shape<64, 128, 32, 64, 3, 3>;
using Small = Shape<16, 64, 16, 16, 4, 5>;

// How rows are kept that are added up: float16's sums might leave its range.
template <typename E>
using Part = std::conditional_t<std::is_same_v<E, Half>, float, E>;

struct Product {
    const int4* tiles;
    int blocks;  // of tiles and of columns
    const int* order;  // row -> slot; null: the same
    int column_blocks;
    bool up;
    int K, columns;  // of the sum and of the product
    const void* from;  // [.., K]: x, up; else a
    int64_t from_row;
    int top_k;  // slot / top_k is the row of x
    const void* w;  // [E, columns, K]; `line`: the stride that is not 1
    int64_t w_expert, w_line;
    const void* bias;  // [E, columns] or null
    int64_t bias_expert;
    int activation, n;  // up: columns are gates and ups
    bool interleaved;
    void *a, *h;  // up: [rows, n]; [rows, columns] or null
    const float* weights;  // down: of slots, or null
    void* out;  // down: [slots, columns]
    bool parts;  // out are rows that are added up: Part<E>

    SLM_DEVICE bool gated() const { return up && experts::is_gated(activation); }
    SLM_DEVICE bool halves() const { return gated() && !interleaved; }

    // Column c of a tile whose first is `first`, both multiples of 8 or with what is past them: where it is in w,
    // h and the bias; columns or more: nowhere.
    SLM_DEVICE int place(int first, int c) const {
        if (!halves()) return first + c;
        const int unit = first / 2 + c / 16 * 8 + c % 8;
        return unit < n ? unit + (c / 8 % 2) * n : columns;
    }
};

// Copies steps of one tile's rows and of the matrix's columns; what a thread copies stays the same from step to
// step but for k.
template <typename E, typename S, bool kTransposed>
struct Source {
    static constexpr int kRows = S::kThreads / 8;  // that the block copies at a time
    static constexpr int kOfA = S::kM / kRows, kOfB = S::kN / kRows;
    static constexpr int kPieces = kTransposed ? S::kN / 8 : 8;  // of a line of w, in a step
    static constexpr int kLines = S::kThreads / kPieces;
    static_assert(kRows % 16 == 0 && kLines % 8 == 0 && (kTransposed ? S::kK : S::kN) / kLines == kOfB);
    using A = Tile<S::kK>;
    using B = Tile<kTransposed ? S::kN : S::kK>;

    const E *a[kOfA], *b;
    int K, k_of_a, k_of_b, lines;  // lines: of w that are there, kLines apart, of those this thread copies
    int64_t step;  // between them

    SLM_DEVICE static A a_of(int stage) { return {shared_memory() + Shared(stage * S::kStage)}; }
    SLM_DEVICE static B b_of(int stage) {
        return {shared_memory() + Shared(stage * S::kStage + A::bytes(S::kM))};
    }

    SLM_DEVICE Source(const Product& p, const RowTile& tile, int first_column)
        : K(tile.expert < 0 ? 0 : p.K) {  // rows of absent experts are zeros, without a product
        const int thread = int(threadIdx.x);
        k_of_a = thread % 8 * 8;
#pragma unroll
        for (int i = 0; i < kOfA; ++i) {
            const int at = thread / 8 + i * kRows, row = tile.first + at;
            a[i] = nullptr;
            if (at >= tile.rows) continue;
            const int slot = p.up && p.order ? load(p.order + row) / p.top_k : row;
            a[i] = static_cast<const E*>(p.from) + slot * p.from_row + k_of_a;
        }
        const int line = thread / kPieces, piece = thread % kPieces;
        const E* const matrix = static_cast<const E*>(p.w) + tile.expert * p.w_expert;
        if constexpr (kTransposed) {
            const int column = p.place(first_column, piece * 8);
            k_of_b = line, step = kLines * p.w_line;
            lines = column < p.columns ? kOfB : 0;
            b = matrix + column + line * p.w_line;
        } else {
            const int column = p.place(first_column, line), apart = p.halves() ? kRows / 2 : kRows;
            const int end = p.halves() ? (line / 8 % 2 + 1) * p.n : p.columns;
            k_of_b = k_of_a, step = apart * p.w_line;
            lines = column < p.columns ? (end - column + apart - 1) / apart : 0;
            b = matrix + column * p.w_line + k_of_b;
        }
    }

    SLM_DEVICE int steps() const { return (K + S::kK - 1) / S::kK; }

    // A group of copies, empty if the step is past the end.
    SLM_DEVICE void copy(int stage, int step) const {
        if (step < steps()) begin_copy(stage, step * S::kK);
        commit_copies();
    }

  private:
    SLM_DEVICE void begin_copy(int stage, int k) const {
        const int thread = int(threadIdx.x), line = thread / kPieces, piece = thread % kPieces;
        const A to_a = a_of(stage);
        const B to_b = b_of(stage);
        const E* from = b + (kTransposed ? int64_t(k / kLines) * step : k);
#pragma unroll
        for (int i = 0; i < kOfB; ++i, from += step) {
            const int past = kTransposed ? k + k_of_b + i * kLines : k + k_of_b;
            copy_async(to_b.piece(line + i * kLines, piece), from, i < lines && past < K);
        }
#pragma unroll
        for (int i = 0; i < kOfA; ++i)  // after w, while their slots are on their way
            copy_async(to_a.piece(thread / 8 + i * kRows, thread % 8), a[i] + k,
                       a[i] != nullptr && k + k_of_a < K);
    }
};

template <typename S>
struct Sums {  // of a warp
    float of[S::kWarpM / 16][S::kWarpN / 8][4];
    int row, column;  // in the block's tile

    SLM_DEVICE Sums() {
        const int warp = warp_of_thread();
        row = warp / S::kWarpsN * S::kWarpM, column = warp % S::kWarpsN * S::kWarpN;
#pragma unroll
        for (auto& line : of)
#pragma unroll
            for (auto& d : line) d[0] = d[1] = d[2] = d[3] = 0.f;
    }

    template <typename E, bool kTransposed, typename A, typename B>
    SLM_DEVICE void add(A a, B b) {
#pragma unroll
        for (int k = 0; k < S::kK; k += 16) {
            uint32_t x[S::kWarpM / 16][4];
#pragma unroll
            for (int m = 0; m < S::kWarpM / 16; ++m) load_a(x[m], a, row + m * 16, k);
#pragma unroll
            for (int n = 0; n < S::kWarpN / 16; ++n) {
                uint32_t y[4];
                if constexpr (kTransposed)
                    load_b_transposed(y, b, k, column + n * 16);
                else
                    load_b(y, b, column + n * 16, k);
#pragma unroll
                for (int m = 0; m < S::kWarpM / 16; ++m) {
                    multiply<E>(of[m][2 * n], x[m], y[0], y[1]);
                    multiply<E>(of[m][2 * n + 1], x[m], y[2], y[3]);
                }
            }
        }
    }

    // Results in shared memory. Halves of 8 columns change places from column 32 on, for the banks of `take`.
    SLM_DEVICE static Shared at(int row, int column) {
        return shared_memory() + Shared(warp_of_thread() * S::kResults + row * S::kResultRow +
                                        (column ^ (column >> 3 & 4)) * 4);
    }
    template <int kPart>
    SLM_DEVICE void put() const {
        const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
#pragma unroll
        for (int m = 0; m < S::kPartRows / 16; ++m)
#pragma unroll
            for (int n = 0; n < S::kWarpN / 8; ++n) {
                const auto& d = of[kPart * S::kPartRows / 16 + m][n];
                store(at(m * 16 + g, n * 8 + 2 * t), make_float2(d[0], d[1]));
                store(at(m * 16 + g + 8, n * 8 + 2 * t), make_float2(d[2], d[3]));
            }
    }
    SLM_DEVICE static void take(float (&x)[8], int row, int column) {
        widen(Eight<float>{load<float4>(at(row, column)), load<float4>(at(row, column + 4))}, x);
    }
};

// What a row of the block's tile needs at the end; a thread loads it for one row.
template <typename S>
struct Ends {
    int slot = 0;
    float weight = 1.f;

    SLM_DEVICE Ends(const Product& p, const RowTile& tile) {
        const int row = int(threadIdx.x);
        if (row >= tile.rows) return;
        slot = p.order ? load(p.order + tile.first + row) : tile.first + row;
        if (p.weights && tile.expert >= 0) weight = load(p.weights + slot);
    }
    SLM_DEVICE void keep() const {
        const int row = int(threadIdx.x);
        if (row >= S::kM) return;
        store(slot_of(row), slot);
        store(weight_of(row), weight);
    }
    SLM_DEVICE static Shared slot_of(int row) { return shared_memory() + Shared(S::kRing + row * 4); }
    SLM_DEVICE static Shared weight_of(int row) { return slot_of(S::kM + row); }
};

// Results of rows from `above` in the block's tile -> h and a.
template <typename E, typename S>
SLM_DEVICE void finish_up(const Product& p, const RowTile& tile, int above, int column, int first_column) {
    const bool gated = p.gated();
    const int width = gated ? 16 : 8;  // columns of 8 units
    const int pieces = S::kWarpN / width, piece = lane_of_thread() % pieces, c = piece * width;
    const int unit = (first_column + column + c) / (gated ? 2 : 1);
    if (unit >= p.n) return;
    const int first = p.place(first_column, column + c);
    const int second = p.place(first_column, column + c + 8);
    float b_first[8] = {}, b_second[8] = {};
    if (p.bias && tile.expert >= 0) {
        const E* const bias = static_cast<const E*>(p.bias) + tile.expert * p.bias_expert;
        widen(load_eight(bias + first), b_first);
        if (gated) widen(load_eight(bias + second), b_second);
    }
    for (int r = lane_of_thread() / pieces; r < S::kPartRows; r += kWarp / pieces) {
        if (above + r >= tile.rows) return;
        const int64_t row = tile.first + above + r;
        E* const h = p.h ? static_cast<E*>(p.h) + row * p.columns : nullptr;
        float x[8], y[8];
        Sums<S>::take(x, r, c);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] += b_first[i];
        if (h) store_eight(h + first, narrow<E>(x));
        if (gated) {
            Sums<S>::take(y, r, c + 8);
#pragma unroll
            for (int i = 0; i < 8; ++i) y[i] += b_second[i];
            if (h) store_eight(h + second, narrow<E>(y));
            if (p.interleaved) {
                const float z[8] = {x[1], x[3], x[5], x[7], y[1], y[3], y[5], y[7]};
                x[1] = x[2], x[2] = x[4], x[3] = x[6], x[4] = y[0], x[5] = y[2], x[6] = y[4], x[7] = y[6];
#pragma unroll
                for (int i = 0; i < 8; ++i) y[i] = z[i];
            }
        }
        bend_all(x, p.activation);
#pragma unroll
        for (int i = 0; gated && i < 8; ++i) x[i] *= lift(y[i], p.activation);
        store_eight(static_cast<E*>(p.a) + row * p.n + unit, narrow<E>(x));
    }
}

// Results, times their weights -> the slots' rows of out.
template <typename E, typename S>
SLM_DEVICE void finish_down(const Product& p, const RowTile& tile, int above, int first, int first_column) {
    constexpr int kPieces = S::kWarpN / 8;
    const int c = lane_of_thread() % kPieces * 8, column = first_column + first + c;
    if (column >= p.columns) return;
    float bias[8] = {};
    if (p.bias && tile.expert >= 0)
        widen(load_eight(static_cast<const E*>(p.bias) + tile.expert * p.bias_expert + column), bias);
    for (int r = lane_of_thread() / kPieces; r < S::kPartRows; r += kWarp / kPieces) {
        if (above + r >= tile.rows) return;
        float x[8];
        Sums<S>::take(x, r, c);
        const float weight = load<float>(Ends<S>::weight_of(above + r));
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = weight * (x[i] + bias[i]);
        const int64_t at = int64_t(load<int>(Ends<S>::slot_of(above + r))) * p.columns + column;
        if (p.parts)
            store_eight(static_cast<Part<E>*>(p.out) + at, narrow<Part<E>>(x));
        else
            store_eight(static_cast<E*>(p.out) + at, narrow<E>(x));
    }
}

template <int kPart, typename E, typename S>
SLM_DEVICE void finish(const Product& p, const RowTile& tile, const Sums<S>& sums, int first_column) {
    sums.template put<kPart>();
    sync_warp();
    const int above = sums.row + kPart * S::kPartRows;
    if (p.up)
        finish_up<E, S>(p, tile, above, sums.column, first_column);
    else
        finish_down<E, S>(p, tile, above, sums.column, first_column);
    sync_warp();
    if constexpr (kPart + 1 < S::kParts) finish<kPart + 1, E>(p, tile, sums, first_column);
}

template <typename E, typename S, bool kTransposed>
SLM_KERNEL(S::kThreads, S::kBlocks)
product_kernel(const __grid_constant__ Product p) {
    constexpr int kLast = S::kStages - 1;
    const auto tile_at = [&](int block) {
        return block < p.blocks ? load_tile(p.tiles, block / p.column_blocks) : RowTile{-1, 0, 0};
    };
    const auto column_at = [&](int block) { return block % p.column_blocks * S::kN; };
    const auto after = [](int stage) { return stage < kLast ? stage + 1 : 0; };
    int block = int(blockIdx.x), stage = 0;
    RowTile tile = tile_at(block);
    if (tile.rows <= 0) return;  // tiles without rows come last
    Source<E, S, kTransposed> source(p, tile, column_at(block));
    source.copy(stage, 0);
    Ends<S> ends(p, tile);
    for (;;) {
        // The first step is on its way.
        int next = stage;
#pragma unroll
        for (int step = 1; step < kLast; ++step) source.copy(next = after(next), step);
        ends.keep();
        const int next_block = block + int(gridDim.x);
        const RowTile next_tile = S::kStays ? tile_at(next_block) : RowTile{-1, 0, 0};
        const int steps = source.steps();
        Sums<S> sums;
        for (int step = 0; step < steps; ++step) {
            wait_copies<kLast - 1>();
            sync_block();  // the step has arrived for all, and the stage before it has been read by all
            source.copy(next = after(next), step + kLast);
            sums.template add<E, kTransposed>(source.a_of(stage), source.b_of(stage));
            stage = after(stage);
        }
        sync_block();  // results take the ring's place, but for the last stage: the next tile's first step
        const bool more = next_tile.rows > 0;
        if (more) {
            source = Source<E, S, kTransposed>(p, next_tile, column_at(next_block));
            source.copy(kLast, 0);
            ends = Ends<S>(p, next_tile);
        }
        finish<0, E>(p, tile, sums, column_at(block));
        if (!more) return;
        sync_block();
        block = next_block, tile = next_tile, stage = kLast;
    }
}

}  // namespace
}  // namespace slm
