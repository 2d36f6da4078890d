// Which rows belong to which expert: a stable counting sort of the slots, and the tiles that rows are cut into.
//
// Slot s = t k + j is the assignment of token t to its j-th expert. order = the slots of expert 0, of expert 1, ...,
// and last those of absent experts (range E), each in rising order; a row is a place in it. A tile is up to
// `tile_rows` rows of one range. How many tiles there are is known on the device alone; the host takes their
// upper bound and the kernel fills up with empty ones, so that nobody waits for anybody and a CUDA graph can
// hold the call.
//
// Up to threads x kSlots slots, 16384 at most, one block does all, in one launch. A warp takes consecutive slots,
// 32 at a time: the lanes with the same expert find one another (match), and a slot's rank among those of its
// warp is what the warp has counted before plus the lanes below. Counts are [warps][E + 1] in shared memory, a row
// a warp: no atomics, so ranks are in the order of slots. After one scan over (range, warp) a slot's place is
// known from its rank, which waited in a register. More slots take three launches: blocks count, one block scans
// over (range, block) and cuts tiles, blocks rank again and write. Of 65536 slots those are 4 blocks; all launches
// read 4 bytes a slot twice and write 4: below the microseconds of a launch.
#pragma once

#include "../common/launch.cuh"

namespace slm {
namespace {

constexpr int kSlots = 16;  // of a thread, in registers
constexpr int kSortThreads = 1024;
constexpr int64_t kMostExperts = 16384;  // E << 16 fits an int
constexpr int kMostRows = 1 << 29;  // twice as many fit an int

// Rows [first, first + rows) of one range; expert -1: absent, whose results are 0.
struct RowTile {
    int expert, first, rows;
};

SLM_DEVICE RowTile load_tile(const int4* tiles, int64_t tile) {
    const int4 x = load<int4>(tiles + tile);
    return {x.x, x.y, x.z};
}

// Where a block keeps what its threads tell each other.
struct Board {
    static constexpr int kSums = kWarp * 8;
    static constexpr int bytes(int threads, int64_t counts) { return int(kSums + threads * 16 + counts * 4); }
    SLM_DEVICE static Shared sum(int warp) { return shared_memory() + Shared(warp * 8); }
    SLM_DEVICE static Shared range(int thread) { return shared_memory() + Shared(kSums + thread * 16); }
    SLM_DEVICE static Shared count(int64_t at) {
        return shared_memory() + Shared(kSums + int(blockDim.x) * 16 + int(at) * 4);
    }
};

// Two counts up to kMostRows in the halves of one number. A sum ends there: that of wrong offsets would be more.
SLM_DEVICE uint64_t pair(int high, int low) { return uint64_t(high) << 32 | uint64_t(low); }
SLM_DEVICE int high_of(uint64_t x) { return int(x >> 32); }
SLM_DEVICE int low_of(uint64_t x) { return int(x & 0xffffffffu); }
SLM_DEVICE uint64_t add_pairs(uint64_t a, uint64_t b) {
    return pair(min(high_of(a) + high_of(b), kMostRows), min(low_of(a) + low_of(b), kMostRows));
}

SLM_DEVICE uint64_t prefix_sum(uint64_t x) {  // over the lanes, this one included
#pragma unroll
    for (int delta = 1; delta < kWarp; delta *= 2) {
        const uint64_t below = shuffle_up(x, delta);
        if (lane_of_thread() >= delta) x = add_pairs(x, below);
    }
    return x;
}

// One block cuts ranges that lie one after another into `bound` tiles: count(r) are a range's rows, and
// start(r, row) learns where they begin. Never more than `bound` tiles and `total` rows, whatever the counts.
template <typename Count, typename Start, typename Expert>
SLM_DEVICE void cut(int4* tiles, int bound, int tile_rows, int ranges, int total, Count count, Start start,
                    Expert expert) {
    const int thread = int(threadIdx.x), threads = int(blockDim.x), warps = threads / kWarp;
    const int warp = warp_of_thread(), lane = lane_of_thread();
    uint64_t before = 0;  // tiles and rows of the ranges before, in the high and the low half
    for (int first = 0; first < ranges; first += threads) {
        const int r = first + thread, rows = r < ranges ? min(max(count(r), 0), total) : 0;
        const uint64_t mine = pair((rows + tile_rows - 1) / tile_rows, rows);
        const uint64_t here = prefix_sum(mine);
        if (lane == kWarp - 1) store(Board::sum(warp), here);
        sync_block();
        const uint64_t sums = prefix_sum(lane < warps ? load<uint64_t>(Board::sum(lane)) : 0);
        const uint64_t below = add_pairs(before, warp > 0 ? shuffle(sums, warp - 1) : 0);
        const uint64_t up_to = add_pairs(below, here - mine);
        before = add_pairs(before, shuffle(sums, warps - 1));
        if (r < ranges) start(r, low_of(up_to));
        store(Board::range(thread), make_int4(high_of(up_to), low_of(up_to), rows, 0));
        sync_block();
        for (int n = warp; n < threads && first + n < ranges; n += warps) {
            const int4 range = load<int4>(Board::range(n));  // first tile, first row, rows
            const int e = expert(first + n);
            for (int t = lane; t * tile_rows < range.z && range.x + t < bound; t += kWarp) {
                const int row = range.y + t * tile_rows;
                const int left = min(range.z - t * tile_rows, total - row);
                store(tiles + range.x + t, make_int4(e, row, min(tile_rows, left), 0));
            }
        }
        sync_block();
    }
    for (int64_t t = int64_t(high_of(before)) + thread; t < bound; t += threads)
        store(tiles + t, make_int4(-1, 0, 0, 0));
}

struct Sort {
    const int* indices;  // [slots]
    int slots, E;
    int groups;  // of 32 slots that a warp takes, kSlots at most
    int blocks;
    int* counts;  // [blocks][E + 1], of several blocks
    int* order;  // [slots]
    int4* tiles;
    int bound, tile_rows;

    SLM_DEVICE int expert(int range) const { return range < E ? range : -1; }
};

// The slots of this thread, with the range of each and its rank among the warp's slots of that range. Leaves the
// warp's counts on the board.
struct Ranked {
    int first;  // slots first, first + 32, ...
    int found[kSlots];  // range << 16 | rank, or -1: no slot

    SLM_DEVICE explicit Ranked(const Sort& p) {
        const int ranges = p.E + 1, warp = warp_of_thread(), warps = int(blockDim.x) / kWarp;
        const int lane = lane_of_thread();
        first = (int(blockIdx.x) * warps + warp) * p.groups * kWarp + lane;
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            const int slot = first + i * kWarp;
            found[i] = -1;
            if (i >= p.groups || slot >= p.slots) continue;
            const int e = load(p.indices + slot);
            found[i] = e >= 0 && e < p.E ? e : p.E;
        }
        for (int r = lane; r < ranges; r += kWarp) store(Board::count(int64_t(warp) * ranges + r), 0);
        sync_warp();
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            if (i >= p.groups) continue;  // of all lanes
            const int range = found[i];
            const uint32_t same = match(uint32_t(range)), below = same & ((1u << lane) - 1);
            const Shared count = Board::count(int64_t(warp) * ranges + max(range, 0));
            const int before = range >= 0 ? load<int>(count) : 0;
            if (range >= 0) found[i] = range << 16 | (before + count_bits(below));
            sync_warp();
            if (range >= 0 && below == 0) store(count, before + count_bits(same));
            sync_warp();
        }
    }

    // Each warp's count of a range becomes its first place there; they begin at `row`.
    SLM_DEVICE static void spread(int ranges, int r, int row) {
        for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
            const Shared count = Board::count(int64_t(w) * ranges + r);
            const int rows = load<int>(count);
            store(count, row);
            row += rows;
        }
    }
    SLM_DEVICE static int sum(int ranges, int r) {
        int rows = 0;
        for (int w = 0; w < int(blockDim.x) / kWarp; ++w)
            rows += load<int>(Board::count(int64_t(w) * ranges + r));
        return rows;
    }

    SLM_DEVICE void write(const Sort& p) const {
        const int64_t counts = int64_t(warp_of_thread()) * (p.E + 1);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            if (found[i] < 0) continue;
            const int row = load<int>(Board::count(counts + (found[i] >> 16))) + (found[i] & 0xffff);
            store(p.order + row, first + i * kWarp);
        }
    }
};

SLM_KERNEL(kSortThreads, 1) sort_kernel(const __grid_constant__ Sort p) {
    const Ranked ranked(p);
    const int ranges = p.E + 1;
    sync_block();
    cut(
        p.tiles, p.bound, p.tile_rows, ranges, p.slots, [&](int r) { return Ranked::sum(ranges, r); },
        [&](int r, int row) { Ranked::spread(ranges, r, row); }, [&](int r) { return p.expert(r); });
    ranked.write(p);
}

SLM_KERNEL(kSortThreads, 1) count_kernel(const __grid_constant__ Sort p) {
    const Ranked ranked(p);
    const int ranges = p.E + 1;
    sync_block();
    for (int r = int(threadIdx.x); r < ranges; r += int(blockDim.x))
        store(p.counts + int64_t(blockIdx.x) * ranges + r, Ranked::sum(ranges, r));
}

SLM_KERNEL(kSortThreads, 1) cut_kernel(const __grid_constant__ Sort p) {
    const int ranges = p.E + 1;
    const auto count = [&](int b, int r) { return p.counts + int64_t(b) * ranges + r; };
    const auto sum = [&](int r) {
        int rows = 0;
        for (int b = 0; b < p.blocks; ++b) rows += load(count(b, r));
        return rows;
    };
    const auto spread = [&](int r, int row) {  // counts become first places
        for (int b = 0; b < p.blocks; ++b) {
            const int rows = load(count(b, r));
            store(count(b, r), row);
            row += rows;
        }
    };
    cut(p.tiles, p.bound, p.tile_rows, ranges, p.slots, sum, spread, [&](int r) { return p.expert(r); });
}

SLM_KERNEL(kSortThreads, 1) order_kernel(const __grid_constant__ Sort p) {
    const Ranked ranked(p);
    const int ranges = p.E + 1;
    sync_block();
    for (int r = int(threadIdx.x); r < ranges; r += int(blockDim.x))
        Ranked::spread(ranges, r, load(p.counts + int64_t(blockIdx.x) * ranges + r));
    sync_block();
    ranked.write(p);
}

// Segments lie in order: their tiles alone.
struct Segments {
    const int *offsets, *experts;  // [N + 1], [N]
    int N, T, E;
    int4* tiles;
    int bound, tile_rows;
};

SLM_KERNEL(kSortThreads, 1) segments_kernel(const __grid_constant__ Segments p) {
    cut(
        p.tiles, p.bound, p.tile_rows, p.N, p.T,
        [&](int r) { return load(p.offsets + r + 1) - load(p.offsets + r); }, [](int, int) {},
        [&](int r) {
            const int e = load(p.experts + r);
            return e >= 0 && e < p.E ? e : -1;
        });
}

// Tiles of a call and the rows' order, made on the device.
struct Order {
    Tensor tiles, slots;  // [bound, 4]; [rows], of no element for segments
    int bound;

    // Tiles of `rows` rows in `ranges` ranges: at most one a range is not full.
    static int most(int64_t rows, int64_t ranges, int tile_rows) {
        const int64_t tiles = (rows + ranges * (tile_rows - 1)) / tile_rows;
        return int(tiles < rows ? tiles : rows);
    }

    Order(const Device& device, const Tensor& indices, const Optional& cu, int64_t rows, int64_t E,
          int tile_rows) {
        const auto integers = [&](std::initializer_list<int64_t> shape) {
            return torch::stable::new_empty(indices, shape, ScalarType::Int);
        };
        const int64_t ranges = cu.has_value() ? indices.size(0) : E + 1;
        bound = most(rows, ranges, tile_rows);
        tiles = integers({bound, 4}), slots = integers({cu.has_value() ? 0 : rows});
        int4* const into = pointer<int4>(tiles);
        if (cu.has_value()) {
            const int threads = ranges > 128 ? kSortThreads : 128;
            const Segments p{
                pointer<int>(*cu), pointer<int>(indices), int(ranges), int(rows), int(E), into, bound,
                tile_rows};
            device.launch(segments_kernel, dim3(1), threads, Board::bytes(threads, 0), p);
            return;
        }
        // Few slots take few threads, and many experts leave room for the counts of few warps.
        int threads = 128;
        while (threads < kSortThreads && threads * 4 < rows) threads *= 2;
        const auto shared = [&] { return Board::bytes(threads, threads / kWarp * ranges); };
        while (threads > kWarp && shared() > device.shared_limit()) threads /= 2;
        const int64_t of_block = threads * kSlots;
        const int blocks = int((rows + of_block - 1) / of_block);
        const int groups = blocks > 1 ? kSlots : int((rows + threads - 1) / threads);
        const Tensor counts = integers({blocks > 1 ? blocks * ranges : 0});
        const Sort p{pointer<int>(indices), int(rows),           int(E), groups, blocks,
                     pointer<int>(counts),  pointer<int>(slots), into,   bound,  tile_rows};
        if (blocks == 1) {
            device.launch(sort_kernel, dim3(1), threads, shared(), p);
            return;
        }
        device.launch(count_kernel, dim3(unsigned(blocks)), threads, shared(), p);
        device.launch(cut_kernel, dim3(1), kSortThreads, Board::bytes(kSortThreads, 0), p);
        device.launch(order_kernel, dim3(unsigned(blocks)), threads, shared(), p);
    }
};

}  // namespace
}  // namespace slm
