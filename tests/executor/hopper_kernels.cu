// A kernel of sm_90a that is right, and wrong in one way each, for test_hopper_executor.py.
#include "../../csrc/common/hopper.cuh"
#include "../../csrc/common/tiles.cuh"

namespace slm {
namespace {

// o [64, 128] = E(a [64, 128] b [64, 128]^T) c [64, 128], by one block of a warpgroup that loads and one that
// computes, twice over with one buffer for b and c, with `fault` made.
enum Fault : int64_t {
    none,
    no_proxy_fence,
    no_barrier_after_stores,
    no_wait_for_boxes,
    wrong_parity,
    wrong_stride,
    wrong_leading,
    wrong_swizzle,
    wrong_major,
    released_before_wait,
    released_by_one_warp,
    too_few_bytes_expected,
    too_many_bytes_expected,
    sums_read_before_wait,
    sums_written_before_wait,
    sums_written_after_fence,
    a_written_before_wait,
    no_fence_of_products,
    fence_without_a,
    wait_without_sums,
    no_fence_of_mbarriers,
    no_barrier_after_mbarriers,
    arrival_too_many,
    arrival_missing,
    wrong_row,
    box_over_stores,
    products_not_awaited,
    boxes_not_awaited,
    too_many_registers,
};

struct Arguments {
    RowMap b, c;
    const void* a;
    float* o;
    int64_t fault;
};

constexpr int kPanel = 64 * 128;  // bytes of 64 rows of 64 columns

#if SLM_HOPPER
template <typename E>
struct TwoProducts {
    const Arguments& p;
    Shared a = shared_memory(), b = a + 2 * kPanel, c = b + 2 * kPanel, full = c + 2 * kPanel;
    Shared empty = full + 8, spare = full + 16, beyond = full + 1024;

    SLM_DEVICE bool is(Fault fault) const { return p.fault == fault; }

    SLM_DEVICE void load_both() const {
        for (int round = 0; round < 2; ++round) {
            wait_phase(empty, (round + 1) & 1);
            const int wrong = 16 * (is(too_many_bytes_expected) - is(too_few_bytes_expected));
            arrive_expecting(full, 4 * kPanel + wrong);
            for (int n = 0; n < 2; ++n) {
                p.b.load(b + n * kPanel, full, 64 * n, is(wrong_row), 0, 0);
                p.c.load(c + n * kPanel, full, 64 * n, 0, 0, 0);
            }
        }
        if (is(boxes_not_awaited)) p.b.load(beyond, spare, 0, 0, 0, 0);
        if (is(box_over_stores)) p.b.load(a, full, 0, 0, 0, 0);
    }

    SLM_DEVICE void multiply_both() const {
        const int thread = int(threadIdx.x) - kWarpgroup, warp = thread / kWarp, lane = lane_of_thread();
        for (int n = thread; n < 64 * 16; n += kWarpgroup) {
            const int row = n / 16, piece = n % 16;
            const Tile<64> panel{a + piece / 8 * kPanel};
            store(panel.piece(row, piece % 8),
                  load<uint4>(static_cast<const E*>(p.a) + row * 128 + piece * 8));
        }
        if (!is(no_proxy_fence)) fence_async();
        if (!is(no_barrier_after_stores)) sync_some(1, kWarpgroup);
        const Swizzle swizzle = is(wrong_swizzle) ? Swizzle::bytes64 : Swizzle::bytes128;
        for (int round = 0; round < 2; ++round) {
            if (!is(no_wait_for_boxes)) wait_phase(full, (round + is(wrong_parity)) & 1);
            float s[8][4], o[16][4] = {};
            uint32_t x[4][4];
            if (!is(no_fence_of_products)) fence_products(s);
            for (int k = 0; k < 128; k += 16) {
                const int at = k / 64 * kPanel + k % 64 * 2;
                multiply_async<E, Major::k>(
                    s, matrix_descriptor(a + at, 16, 1024),
                    matrix_descriptor(b + at, 16, is(wrong_stride) ? 2048 : 1024, swizzle), k > 0);
            }
            commit_products();
            if (is(sums_written_before_wait)) s[0][0] = 0;
            if (is(wait_without_sums)) wait_products<0>();
            if (!is(sums_read_before_wait)) wait_products<0>(s);
            for (int n = 0; n < 4; ++n) as_a<E>(x[n], s[2 * n], s[2 * n + 1]);
            if (is(sums_read_before_wait)) wait_products<0>(s);
            if (is(fence_without_a))
                fence_products(o);
            else
                fence_products(o, x);
            if (is(sums_written_after_fence)) o[3][0] = 1;
            for (int k = 0; k < 64; k += 16) {
                const uint64_t y = matrix_descriptor(c + k * 128, is(wrong_leading) ? 1024 : kPanel, 1024);
                if (is(wrong_major))
                    multiply_async<E, Major::k>(o, x[k / 16], y, true);
                else
                    multiply_async<E, Major::mn>(o, x[k / 16], y, true);
            }
            commit_products();
            if (is(a_written_before_wait)) x[0][0] = 0;
            if (is(released_before_wait) && lane == 0) arrive(empty);
            if (is(released_by_one_warp) && thread == 0)
                for (int n = 0; n < 4; ++n) wait_products<0>(o, x), arrive(empty);
            if (round == 1 && is(products_not_awaited)) return;
            wait_products<0>(o, x);
            if (!is(released_before_wait) && !is(released_by_one_warp) && lane == 0 &&
                !(is(arrival_missing) && warp == 0))
                arrive(empty);
            if (is(arrival_too_many) && thread == 0) arrive(empty);
            if (round == 0) continue;
            for (int n = 0; n < 16; ++n)
                for (int half = 0; half < 2; ++half)
                    store(p.o + (warp * 16 + lane / 4 + half * 8) * 128 + n * 8 + lane % 4 * 2,
                          make_float2(o[n][2 * half], o[n][2 * half + 1]));
        }
    }

    SLM_DEVICE void run() const {
        if (threadIdx.x == 0) {
            init_mbarrier(full, 1);
            init_mbarrier(empty, 4);
            init_mbarrier(spare, 1);
            if (!is(no_fence_of_mbarriers)) fence_mbarriers();
        }
        if (!is(no_barrier_after_mbarriers)) sync_block();
        if (threadIdx.x < kWarpgroup) {
            give_registers<24>();
            if (warp_of_thread() == 0 && elect()) load_both();
        } else {
            if (threadIdx.x >= 2 * kWarpgroup) return take_registers<256>();
            take_registers<240>();
            multiply_both();
        }
    }
};
#endif

template <typename E>
SLM_KERNEL(384, 1)
two_products_kernel(const __grid_constant__ Arguments p) {
#if SLM_HOPPER
    TwoProducts<E>{p}.run();
#endif
}

Tensor two_products(const Tensor& a, const Tensor& b, const Tensor& c, int64_t fault) {
    const Device device(a);
    STD_TORCH_CHECK(fits_row_map(b) && fits_row_map(c), "b and c do not suit the copy engine");
    Tensor o = torch::stable::new_empty(a, {64, 128}, ScalarType::Float);
    const auto run = [&](auto e) {
        using E = decltype(e);
        const Arguments p{row_map<E>(b, 64), row_map<E>(c, 64), pointer<E>(a), pointer<float>(o), fault};
        device.launch(two_products_kernel<E>, dim3(1), fault == too_many_registers ? 384 : 256,
                      7 * kPanel + 1024, p);
    };
    a.scalar_type() == ScalarType::BFloat16 ? run(BFloat16{}) : run(Half{});
    return o;
}

// o [2, rows, 64]: the box that begins at `row` of head 0 and of head 1 of x [1, T, 2, 64], as it lies in
// memory.
template <typename E>
SLM_KERNEL(32, 1)
boxes_kernel(const __grid_constant__ RowMap map, E* o, int row, int rows) {
#if SLM_HOPPER
    const Shared tile = shared_memory(), mbarrier = tile + 2 * rows * 128;
    if (threadIdx.x == 0) {
        init_mbarrier(mbarrier, 1);
        fence_mbarriers();
        arrive_expecting(mbarrier, 2 * rows * 128);
        for (int head = 0; head < 2; ++head) map.load(tile + head * rows * 128, mbarrier, 0, row, head, 0);
    }
    sync_block();
    wait_phase(mbarrier, 0);
    for (int n = int(threadIdx.x); n < 2 * rows * 8; n += kWarp)
        store(o + n * 8, load<uint4>(Tile<64>{tile}.piece(n / 8, n % 8)));
#endif
}

Tensor boxes(const Tensor& x, int64_t row, int64_t rows) {
    const Device device(x);
    STD_TORCH_CHECK(fits_row_map(x), "x does not suit the copy engine");
    Tensor o = torch::stable::new_empty(x, {2, rows, 64});
    device.launch(boxes_kernel<BFloat16>, dim3(1), 32, int(2 * rows * 128 + 8),
                  row_map<BFloat16>(x, int(rows)), pointer<BFloat16>(o), int(row), int(rows));
    return o;
}

// o [64, 64] = a [64, 16] b [64, 16]^T in bfloat16, both lying somehow in `bytes` bytes of shared memory:
// descriptors as if these began at 0.
SLM_KERNEL(128, 1)
matrices_kernel(const void* image, int bytes, uint64_t a, uint64_t b, bool b_is_mn, float* o) {
#if SLM_HOPPER
    const Shared base = shared_memory();
    for (int n = int(threadIdx.x) * 16; n < bytes; n += kWarpgroup * 16)
        store(base + n, load<uint4>(static_cast<const char*>(image) + n));
    fence_async();
    sync_block();
    float d[8][4];
    fence_products(d);
    if (b_is_mn)
        multiply_async<BFloat16, Major::mn>(d, advance(a, base), advance(b, base), false);
    else
        multiply_async<BFloat16, Major::k>(d, advance(a, base), advance(b, base), false);
    commit_products();
    wait_products<0>(d);
    const int lane = lane_of_thread(), row = warp_of_thread() * 16 + lane / 4;
    for (int n = 0; n < 8; ++n)
        for (int half = 0; half < 2; ++half)
            store(o + (row + half * 8) * 64 + n * 8 + lane % 4 * 2,
                  make_float2(d[n][2 * half], d[n][2 * half + 1]));
#endif
}

Tensor matrices(const Tensor& image, int64_t a, int64_t b, bool b_is_mn) {
    const Device device(image);
    Tensor o = torch::stable::new_empty(image, {64, 64}, ScalarType::Float);
    const int bytes = int(image.numel() * 2);
    device.launch(matrices_kernel, dim3(1), kWarpgroup, bytes, pointer<const void>(image), bytes, uint64_t(a),
                  uint64_t(b), b_is_mn, pointer<float>(o));
    return o;
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) {
    m.impl("two_products", TORCH_BOX(&slm::two_products));
    m.impl("matrices", TORCH_BOX(&slm::matrices));
    m.impl("boxes", TORCH_BOX(&slm::boxes));
}
