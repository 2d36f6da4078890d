// Kernels that are right, and kernels that are wrong in one way each, for test_executor.py.
#include "../../csrc/common/launch.cuh"
#include "../../csrc/common/tiles.cuh"

namespace slm {
namespace {

// o [M, N] = a [M, K] b [N, K]^T for one block of M = N = 64, K = 64, with `fault` made.
enum Fault : int64_t {
    none,
    no_barrier_after_copies,
    no_wait_for_copies,
    no_barrier_before_reuse,
    one_row_too_many,
    one_row_too_few,
    swapped_fragment,
    row_outside_tile,
    barrier_in_one_warp,
    shuffle_in_half_a_warp,
    misaligned_copy,
    write_outside_result,
    two_blocks_one_result,
    arrival_missing,
};

template <typename E>
SLM_KERNEL(128, 1)
product_kernel(const E* a, const E* b, float* o, int64_t fault) {
    constexpr int kSize = 64;
    const Tile<kSize> rows{shared_memory()}, columns{rows.base + Tile<kSize>::bytes(kSize)};
    const int thread = int(threadIdx.x), warp = warp_of_thread(), lane = lane_of_thread();
    const int size = kSize + (fault == one_row_too_many) - (fault == one_row_too_few);
    const auto from = [&](const E* x) {
        return [=](int row) { return x + row * kSize + (fault == misaligned_copy); };
    };
    const auto all = [](int) { return true; };
    for (int round = 0; round < 2; ++round) {
        if (round > 0 && fault != no_barrier_before_reuse) sync_block();
        copy_rows<kSize, E>(rows, kSize, kSize, thread, 128, from(a), all);
        copy_rows<kSize, E>(columns, size, kSize, thread, 128, from(b), all);
        commit_copies();
        if (fault != no_wait_for_copies) wait_copies<0>();
        if (fault != no_barrier_after_copies) sync_block();
        float d[kSize / 8][4] = {};
        for (int k = 0; k < kSize; k += 16) {
            uint32_t x[4], y[4];
            load_a(x, rows, warp * 16, k);
            for (int n = 0; n < kSize; n += 16) {
                load_b(y, columns, n + (fault == row_outside_tile ? kSize : 0), k);
                const int first = fault == swapped_fragment;
                multiply<E>(d[n / 8], x, y[first], y[1 - first]);
                multiply<E>(d[n / 8 + 1], x, y[2], y[3]);
            }
        }
        if (round == 0) continue;
        if (fault == barrier_in_one_warp && warp == 0) sync_block();
        if (fault == arrival_missing) sync_some(1, 128), (warp > 0 ? sync_some(2, 128) : void());
        for (int n = 0; n < kSize / 8; ++n)
            for (int half = 0; half < 2; ++half) {
                const int row = warp * 16 + lane / 4 + half * 8, column = n * 8 + lane % 4 * 2;
                const int past = fault == write_outside_result && row == kSize - 1 ? kSize : 0;
                store(o + (row + past) * kSize + column, make_float2(d[n][2 * half], d[n][2 * half + 1]));
            }
        if (fault == shuffle_in_half_a_warp && lane < 16) shuffle(lane, 0);
    }
}

Tensor product(const Tensor& a, const Tensor& b, int64_t fault) {
    const Device device(a);
    Tensor o = torch::stable::new_empty(a, {64, 64}, ScalarType::Float);
    const auto run = [&](auto* x) {
        using E = std::remove_pointer_t<decltype(x)>;
        device.launch(product_kernel<E>, dim3(fault == two_blocks_one_result ? 2 : 1), 128, 2 * 64 * 64 * 2,
                      static_cast<const E*>(pointer<E>(a)), static_cast<const E*>(pointer<E>(b)),
                      pointer<float>(o), fault);
    };
    a.scalar_type() == ScalarType::BFloat16 ? run(static_cast<BFloat16*>(nullptr))
                                            : run(static_cast<Half*>(nullptr));
    return o;
}

// o[thread] = sums over the warp, in four ways; all of a warp's collectives and atomics.
SLM_KERNEL(64, 1)
warp_kernel(const int* x, int* o) {
    const int thread = int(threadIdx.x), lane = lane_of_thread();
    const Shared total = shared_memory();
    if (thread == 0) store(total, 0);
    sync_block();
    int sum = load(x + thread), prefix = sum;
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    for (int delta = 1; delta < kWarp; delta *= 2) {
        const int below = shuffle_up(prefix, delta);
        if (lane >= delta) prefix += below;
    }
    atomic_add(total, load(x + thread));
    sync_block();
    store(o + thread, sum);
    store(o + 64 + thread, prefix);
    store(o + 128 + thread, count_bits(ballot(load(x + thread) % 2 == 1)));
    store(o + 192 + thread, count_bits(match(uint32_t(load(x + thread)))));
    store(o + 256 + thread, load<int>(total));
    store(o + 320 + thread, shuffle(load(x + thread), lane / 8));
}

Tensor warps(const Tensor& x) {
    const Device device(x);
    Tensor o = torch::stable::new_empty(x, {6, 64}, ScalarType::Int);
    device.launch(warp_kernel, dim3(1), 64, 16, static_cast<const int*>(pointer<int>(x)), pointer<int>(o));
    return o;
}

// o = the sum over all blocks of the sums of 64 numbers each; the block that takes the last ticket adds them up.
enum TicketFault : int64_t {
    whole = 0,
    no_fence_before,
    no_fence_after,
    no_ticket,
    no_barrier_before_ticket
};

SLM_KERNEL(64, 1)
ticket_kernel(const int* x, int* sums, int64_t* ticket, int* o, int64_t fault) {
    const int thread = int(threadIdx.x), block = int(blockIdx.x), blocks = int(gridDim.x);
    const Shared total = shared_memory(), last = total + 4;
    if (thread == 0) store(total, 0);
    sync_block();
    atomic_add(total, load(x + block * 64 + thread));
    sync_block();
    if (thread == 32) store(sums + block, load<int>(total));
    if (fault != no_barrier_before_ticket) sync_block();
    if (thread == 0) {
        if (fault != no_fence_before) fence();
        store(last, int((fault == no_ticket ? block : atomic_add(ticket, 1)) == blocks - 1));
        if (fault != no_fence_after) fence();
    }
    sync_block();
    if (load<int>(last) == 0 || thread != 1) return;
    int sum = 0;
    for (int b = 0; b < blocks; ++b) sum += load(sums + b);
    store(o, sum), store(o + 1, int(load_relaxed(ticket)));
}

Tensor tickets(const Tensor& x, int64_t fault) {
    const Device device(x);
    const int64_t blocks = x.size(0);
    Tensor o = torch::stable::new_empty(x, {2}), sums = torch::stable::new_empty(x, {blocks});
    Tensor ticket = torch::stable::new_empty(x, {1}, ScalarType::Long);
    device.clear(pointer<int64_t>(ticket), 8);
    device.launch(ticket_kernel, dim3(unsigned(blocks)), 64, 16, static_cast<const int*>(pointer<int>(x)),
                  pointer<int>(sums), pointer<int64_t>(ticket), pointer<int>(o), fault);
    return o;
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) {
    m.impl("product", TORCH_BOX(&slm::product));
    m.impl("warps", TORCH_BOX(&slm::warps));
    m.impl("tickets", TORCH_BOX(&slm::tickets));
}
