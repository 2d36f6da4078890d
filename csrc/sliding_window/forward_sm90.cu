// Sliding-window attention, forward, on sm_90a: bfloat16 and float16, head sizes 64 and 128.
//
// Maths: as forward.cu, whose places, masks and online softmax (window.cuh) this shares. What differs is who
// moves and who multiplies. Warpgroup 0 produces: its first warp has the copy engine (TMA) bring tiles of
// keys and values into two rings of slots, with a pair of mbarriers each: full, when a tile's bytes have
// come, empty, when the consumers' eight warps have arrived. Warpgroups 1 and 2 consume, 64 queries each: two
// heads of a group at the same positions where groups are even, so that tiles are shared and both see the
// same keys, else two runs of one head; each skips tiles that its own 64 queries do not see, so that the work
// is that of 64 x kKeys tiles. Registers move from the producer (24) to the consumers (setmaxnreg).
//
// Per tile a consumer computes S = Q K^T (wgmma, both from shared memory), the softmax in registers, and O +=
// P V with P in registers, as S leaves it, and V read with its columns along memory (Major::mn), as it was
// brought. Scores of the next tile and P V of this one are issued together, and the softmax of the next runs
// beside P V (Shah et al. 2024, FlashAttention-3, section 3.2); tiles of 64 columns of 128 bytes, swizzled,
// are what TMA writes and wgmma reads without bank conflicts. Masks only where a warp's 16 rows meet an edge
// of the window or the end of the keys.
//
// Tiles reach past the end of a sequence. Those keys are masked. Values past a packed sequence's end belong
// to its neighbour and may be infinite, and 0 times that is NaN: the producer waits for that one tile and
// overwrites them.
//
// Counted, for 64 queries and kKeys keys (a multiprocessor: 4096 FLOP and 16 exp2 a cycle):
//   head size 64:  wgmma 4 kKeys cycles, exp2 4 kKeys; head size 128: wgmma 8 kKeys, exp2 4 kKeys.
//   A window of 256 keys costs 320 a query with tiles of 64 (80 %), 384 with tiles of 128 (67 %); of 1024,
//   1088 (94 %) and 1152 (89 %). From L2, 2 kKeys rows of keys and values a tile for 128 queries: at 55 % of
//   the tensor cores' peak 18 bytes a cycle and multiprocessor of the 24 or so there are.
// So narrow windows (below 512) take tiles of 64 keys. Two blocks of head size 64 then share a
// multiprocessor: four consumers fill each other's gaps, also while a block begins or ends, and need not
// overlap with themselves, which 104 registers do not allow (the sums, P and 24 others, as ptxas takes them).
//
// ptxas: no spills, no serialised wgmma; 168 registers at the launch (80 for <64, 64>).
//   <head, kKeys>   slots   shared memory   registers of a consumer   blocks of a multiprocessor
//   <64, 64>        4       80 KB           104                       2
//   <64, 128>       4       144 KB          240                       1
//   <128, 64>       4       160 KB          240                       1
//   <128, 128>      3       224 KB          240                       1
// Not done: barriers that make the consumers take turns (FlashAttention-3, section 3.1), blocks that stay for
// several tiles, clusters that share what they bring. None of it can be judged before it is measured.
#include "../common/hopper.cuh"
#include "forward.cuh"

namespace slm {
namespace {

struct ForwardSm90 {
    Forward forward;
    RowMap q, k, v;
};

constexpr int kConsumers = 2;  // warpgroups of 64 queries each
constexpr int kRows = 64;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

// C: size of a head. kKeys: keys of a tile.
template <int C, int kKeys>
struct Shape {
    static constexpr int kBlocks = C == 64 && kKeys == 64 ? 2 : 1;  // on a multiprocessor
    static constexpr int kStages = C * kKeys <= 64 * 128 ? 4 : 3;
    static constexpr int kQueryBytes = kRows * C * 2, kTileBytes = kKeys * C * 2;
    static constexpr int kTiles = kConsumers * kQueryBytes, kMbarriers = kTiles + 2 * kStages * kTileBytes;
    static constexpr int kBytes = kMbarriers + 8 * (4 * kStages + 2);
};

#if SLM_HOPPER

// One of the two rings of tiles, keys or values, that the producer fills and the consumers empty. Tile n is
// in slot n % kStages; its phase of both mbarriers is n / kStages.
template <int kStages, int kTileBytes>
struct Ring {
    Shared tiles, full, empty;

    SLM_DEVICE void init() const {
        for (int n = 0; n < kStages; ++n) {
            init_mbarrier(full + 8 * n, 1);
            init_mbarrier(empty + 8 * n, kConsumers * kWarpgroup / kWarp);
        }
    }
    SLM_DEVICE Shared tile(int n) const { return tiles + n % kStages * kTileBytes; }
    SLM_DEVICE Shared filled(int n) const { return full + 8 * (n % kStages); }
    SLM_DEVICE void wait_filled(int n) const { wait_phase(filled(n), n / kStages & 1); }
    SLM_DEVICE void wait_emptied(int n) const {
        wait_phase(empty + 8 * (n % kStages), (n / kStages & 1) ^ 1);
    }
    // By whole warps, that have read the tile or need not. All lanes have waited for it: one left behind could
    // miss the phase.
    SLM_DEVICE void release(int n) const {
        if (lane_of_thread() == 0) arrive(empty + 8 * (n % kStages));
    }
};

template <typename E, int C, int kKeys>
struct Block {
    using Shape = slm::Shape<C, kKeys>;
    using Tiles = Ring<Shape::kStages, Shape::kTileBytes>;
    using Part = QueryTile<kRows, kConsumers>;
    static constexpr int kLoading = 24, kComputing = Shape::kBlocks == 2 ? 104 : 240;  // registers a thread
    static constexpr bool kBeside = Shape::kBlocks == 1;  // the softmax runs beside the product before it
    static constexpr int kPanels = C / 64;  // of 64 columns, that TMA brings and wgmma reads
    // What a block has of them is what its launch takes: more would be waited for until the end of time.
    static_assert(kLoading + kConsumers * kComputing <=
                  (1 + kConsumers) * (65536 / (kThreads * Shape::kBlocks) / 8 * 8));

    const ForwardSm90& p;
    const WindowProblem& w = p.forward.window;
    Shared base = shared_memory(), queries_filled = base + Shape::kMbarriers, landed = queries_filled + 8;
    Tiles keys{base + Shape::kTiles, landed + 8, landed + 8 + 8 * Shape::kStages};
    Tiles values{keys.tiles + Shape::kStages * Shape::kTileBytes, keys.empty + 8 * Shape::kStages,
                 keys.empty + 16 * Shape::kStages};

    SLM_DEVICE Shared queries(int part) const { return base + part * Shape::kQueryBytes; }

    SLM_DEVICE void run() const {
        const int part = shuffle(int(threadIdx.x) / kWarpgroup, 0) - 1;  // the same for the compiler, too
        if (threadIdx.x == 0) {
            prefetch_map(p.q.map), prefetch_map(p.k.map), prefetch_map(p.v.map);
            init_mbarrier(queries_filled, 1);
            init_mbarrier(landed, 1);
            keys.init();
            values.init();
            fence_mbarriers();
        }
        sync_block();
        if (part < 0) {
            give_registers<kLoading>();
            if (warp_of_thread() == 0) load_tiles();
        } else {
            take_registers<kComputing>();
            attend(part);
        }
    }

    // --- The producer, a warp

    SLM_DEVICE void load_panels(const RowMap& map, Shared to, int rows, Shared mbarrier, int row, int head,
                                int b) const {
        for (int n = 0; n < kPanels; ++n) map.load(to + n * rows * 128, mbarrier, 64 * n, row, head, b);
    }

    SLM_DEVICE void load_tiles() const {
        const Part at(w, 0);
        const int tiles = count_tiles(at), heads = heads_of_block(w.Hq / w.H, kConsumers);
        if (tiles > 0 && elect()) {
            arrive_expecting(queries_filled, kConsumers * Shape::kQueryBytes);
            for (int part = 0; part < kConsumers; ++part)
                load_panels(p.q, queries(part), kRows, queries_filled, at.row + part / heads * kRows,
                            at.head + part % heads, at.b);
        }
#pragma unroll 1
        for (int n = 0; n <= tiles; ++n) {  // values one tile behind: that is how tiles are released
            if (n < tiles) {
                keys.wait_emptied(n);
                if (elect()) load_tile(p.k, keys.tile(n), keys.filled(n), at, n);
                sync_warp();
            }
            if (n > 0) load_values(n - 1, at);
        }
    }

    SLM_DEVICE void load_tile(const RowMap& map, Shared to, Shared mbarrier, const Part& at, int n) const {
        arrive_expecting(mbarrier, Shape::kTileBytes);
        load_panels(map, to, kKeys, mbarrier, at.key + n * kKeys, at.h, at.b);
    }

    // Values of the next sequence may be infinite or NaN, which a probability of 0 does not make 0: they are
    // overwritten. Beyond the tensor there are zeros.
    SLM_DEVICE void load_values(int n, const Part& at) const {
        values.wait_emptied(n);
        const int length = at.rest - n * kKeys;
        const bool overwrite = w.cu_k != nullptr && length < kKeys;  // the block's last tile
        if (elect()) load_tile(p.v, values.tile(n), overwrite ? landed : values.filled(n), at, n);
        sync_warp();
        if (!overwrite) return;
        wait_phase(landed, 0);
        for (int x = length * 8 + lane_of_thread(); x < kKeys * 8; x += kWarp)
            for (int panel = 0; panel < kPanels; ++panel)
                store(values.tile(n) + (panel * kKeys * 8 + x) * 16, make_uint4(0, 0, 0, 0));
        fence_async();
        sync_warp();
        if (lane_of_thread() == 0) arrive(values.filled(n));
    }

    SLM_DEVICE int count_tiles(const Part& at) const { return (at.count + kKeys - 1) / kKeys; }

    // --- The consumers, warpgroups

    // s = q k^T, begun.
    SLM_DEVICE void begin_scores(float (&s)[1][kKeys / 8][4], int part, int n) const {
        fence_products(s[0]);
        const uint64_t q = matrix_descriptor(queries(part), 16, 1024);
        const uint64_t k = matrix_descriptor(keys.tile(n), 16, 1024);
#pragma unroll
        for (int c = 0; c < C; c += 16)
            multiply_async<E, Major::k>(s[0], advance(q, c / 64 * kRows * 128 + c % 64 * 2),
                                        advance(k, c / 64 * kKeys * 128 + c % 64 * 2), c > 0);
        commit_products();
    }

    // o += p v, begun.
    SLM_DEVICE void begin_outputs(float (&o)[1][C / 8][4], uint32_t (&x)[kKeys / 16][4], int n) const {
        fence_products(o[0], x);
        const uint64_t v = matrix_descriptor(values.tile(n), kKeys * 128, 1024);
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k)
            multiply_async<E, Major::mn>(o[0], x[k], advance(v, k * 16 * 128), true);
        commit_products();
    }

    SLM_DEVICE static void rescale(float (&o)[1][C / 8][4], const float (&factor)[2]) {
#pragma unroll
        for (int n = 0; n < C / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[0][n][e] *= factor[e / 2];
    }

    SLM_DEVICE void attend(int part) const {
        const Part at(w, part);
        const int tiles = count_tiles(at), warp = warp_of_thread() % 4;
        float s[1][kKeys / 8][4] = {}, o[1][C / 8][4] = {}, factor[2];
        uint32_t x[kKeys / 16][4];  // P
        Softmax<1> softmax;

        const auto misses = [&](int n) { return w.window.misses(at.distance - n * kKeys, kRows, kKeys); };
        const auto pass = [&](int n) {
            keys.wait_filled(n);
            sync_warp();
            keys.release(n);
            values.wait_filled(n);
            sync_warp();
            values.release(n);
        };
        const auto normalize = [&](int n) {  // s becomes P, times 2 to the shift
            const int distance = at.distance + 16 * warp - n * kKeys, left = at.count - n * kKeys;
            rewrite(s, w);
            if (left < kKeys || !w.window.covers(distance, 16, kKeys))
                hide(s, w.window, distance, left, -INFINITY);
            factor[0] = factor[1] = 1;
            softmax.update(s, w.unit, [&](int, int half, float rise) { factor[half] = rise; });
        };
        const auto round = [&] {
            if (ballot(factor[0] != 1 || factor[1] != 1)) rescale(o, factor);
#pragma unroll
            for (int k = 0; k < kKeys / 16; ++k) as_a<E>(x[k], s[0][2 * k], s[0][2 * k + 1]);
        };
        const auto score = [&](int n) {
            keys.wait_filled(n);
            begin_scores(s, part, n);
            wait_products<0>(s[0]);
            keys.release(n);
            normalize(n);
            round();
        };
        const auto output = [&](int n) {
            values.wait_filled(n);
            begin_outputs(o, x, n);
            wait_products<0>(o[0], x);
            values.release(n);
        };

        if (tiles > 0) wait_phase(queries_filled, 0);
        int n = 0;
#pragma unroll 1
        for (; n < tiles && misses(n); ++n) pass(n);
        if constexpr (!kBeside) {
#pragma unroll 1
            for (; n < tiles && !misses(n); ++n) score(n), output(n);
        } else if (n < tiles) {
            score(n);
            values.wait_filled(n);
#pragma unroll 1
            for (++n; n < tiles && !misses(n); ++n) {
                keys.wait_filled(n);
                begin_scores(s, part, n);
                begin_outputs(o, x, n - 1);
                wait_products<1>(s[0]);
                keys.release(n);
                normalize(n);
                values.wait_filled(n);  // its loop keeps ptxas from putting the softmax after the next wait
                wait_products<0>(o[0], x);
                values.release(n - 1);
                round();
            }
            output(n - 1);
        }
#pragma unroll 1
        for (; n < tiles; ++n) pass(n);
        finish(part, at, softmax, o);
    }

    SLM_DEVICE void finish(int part, const Part& at, const Softmax<1>& softmax,
                           float (&o)[1][C / 8][4]) const {
        const int warp = warp_of_thread() % 4, lane = lane_of_thread();
        float factor[2];
        const float sink = w.sinks != nullptr ? load(w.sinks + at.head) * kLog2E : -INFINITY;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 last = softmax.finish(0, half, sink);
            factor[half] = last.x;
            const int r = 16 * warp + 8 * half + lane / 4;
            if (lane % 4 == 0 && r < at.rows) store(p.forward.lse + at.at(w, r), last.y);
        }
        rescale(o, factor);
        // All have read the queries, whose place o takes.
        part == 0 ? sync_some(1, kWarpgroup) : sync_some(2, kWarpgroup);
        write_rows<E>(Tile<C>{queries(part) + 16 * warp * C * 2}, o,
                      p.forward.o.at<E>(at.b, at.row + 16 * warp, at.head), p.forward.o.t,
                      at.rows - 16 * warp, C);
    }
};
#endif  // SLM_HOPPER

template <typename E, int C, int kKeys>
SLM_KERNEL(kThreads, (Shape<C, kKeys>::kBlocks))
forward_sm90_kernel(const __grid_constant__ ForwardSm90 p) {
#if SLM_HOPPER
    Block<E, C, kKeys>{p}.run();
#endif
}

template <typename E, int C, int kKeys>
bool launch_forward(const Device& device, const Forward& p, const Tensor& q, const Tensor& k,
                    const Tensor& v) {
    using Part = QueryTile<kRows, kConsumers>;
    const auto kernel = forward_sm90_kernel<E, C, kKeys>;
    static const bool built = has_hopper_body(kernel);
    if (!built) return false;
    device.launch(kernel, dim3(unsigned(Part::blocks(p.window))), kThreads, Shape<C, kKeys>::kBytes,
                  ForwardSm90{p, row_map<E>(q, kRows), row_map<E>(k, kKeys), row_map<E>(v, kKeys)});
    return true;
}

template <typename E>
bool run_forward(const Device& device, const Forward& p, const Tensor& q, const Tensor& k, const Tensor& v) {
    const bool narrow = p.window.window.before + p.window.window.after < 512;
    if (p.window.D == 64)
        return narrow ? launch_forward<E, 64, 64>(device, p, q, k, v)
                      : launch_forward<E, 64, 128>(device, p, q, k, v);
    return narrow ? launch_forward<E, 128, 64>(device, p, q, k, v)
                  : launch_forward<E, 128, 128>(device, p, q, k, v);
}

}  // namespace

bool forward_sm90(const Device& device, const Forward& p, const Tensor& q, const Tensor& k, const Tensor& v) {
    const WindowProblem& w = p.window;
    if (device.architecture() != 90 || w.D != w.Dv || (w.D != 64 && w.D != 128)) return false;
    if (!fits_row_map(q) || !fits_row_map(k) || !fits_row_map(v)) return false;
    return SLM_DISPATCH_16BIT(q, run_forward, device, p, q, k, v);
}

}  // namespace slm
