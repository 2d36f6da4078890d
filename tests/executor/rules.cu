// The rules of the machine, each kept or broken, for test_executor.py.
#include "../../csrc/common/launch.cuh"

namespace slm {
namespace {

enum Rule : int64_t {
    lanes_meet,
    shuffles_order_nothing,
    the_last_at_a_barrier_waits_too,
    a_buffer_is_free_before_it_is_filled,
    the_newest_copy_is_waited_for,
    the_source_of_a_copy_stays,
    counts_of_a_barrier_agree,
    a_consumer_waits,
    warps_come_as_a_whole,
    blocks_return_as_a_whole,
    lanes_multiply_together,
    rows_end,
    vectors_are_aligned,
    writes_are_seen_after_a_barrier,
    reads_end_before_a_write,
    blocks_read_their_own,
    launches_follow_one_another,
    atomics_begin_after_a_barrier,
    atomics_end_at_a_barrier,
    halves_of_words_are_disjoint,
    broadcasts_end_before_a_write,
    shared_memory_dies_with_its_block,
};

constexpr int kThreads = 128, kRow = 64;  // x: [128, 32], rows kRow apart

struct Problem {
    const float* x;
    float* w;  // [1024], zeros
    float* o;  // [2, 128]
    int64_t rule;
    bool broken;
    int launch;
};

SLM_KERNEL(kThreads, 1)
rule_kernel(const __grid_constant__ Problem p) {
    const int t = int(threadIdx.x), b = int(blockIdx.x), me = b * kThreads + t;
    const bool kept = !p.broken;
    const Shared base = shared_memory(), mine = base + Shared(4 * t), other = base + Shared(4 * (t ^ 1));
    const float* row = p.x + t * kRow;
    float result = 0, d[4] = {};
    const uint32_t a[4] = {};
    switch (p.rule) {
        case lanes_meet:
            store(mine, float(t));
            if (kept) sync_warp();
            result = load<float>(other);
            break;
        case shuffles_order_nothing:
            store(mine, float(t));
            if (kept) sync_block();
            result = shuffle(float(t), 3) + load<float>(other);
            break;
        case the_last_at_a_barrier_waits_too:
            store(mine, 0.f);
            sync_block();
            if (t == kThreads - 1) store(base, 1.f);
            if (kept) sync_block();
            result = load<float>(base);
            sync_block();
            break;
        case a_buffer_is_free_before_it_is_filled: {
            const auto stage = [&](int k, int thread) {
                return base + Shared(k % 2 * 16 * kThreads + 16 * thread);
            };
            for (int k = 0; k < 2; ++k) copy_async(stage(k, t), row + 4 * k, true), commit_copies();
            for (int k = 0; k < 4; ++k) {
                wait_copies<1>();
                sync_block();
                result += load<float>(stage(k, t ^ 64));
                if (kept) sync_block();
                if (k < 2) copy_async(stage(k, t), row + 4 * (k + 2), k == 0);
                commit_copies();
            }
            break;
        }
        case the_newest_copy_is_waited_for:
            for (int k = 0; k < 2; ++k)
                copy_async(base + Shared(16 * (k * kThreads + t)), row + 4 * k, true), commit_copies();
            kept ? wait_copies<0>() : wait_copies<1>();
            sync_block();
            result = load<float>(base + Shared(16 * (kThreads + (t ^ 64))));
            wait_copies<0>();
            break;
        case the_source_of_a_copy_stays:
            copy_async(base + Shared(16 * t), p.w + 4 * me, true);
            commit_copies();
            if (kept) wait_copies<0>();
            sync_block();
            store(p.w + 4 * (me ^ 1), 1.f);
            wait_copies<0>();
            result = load<float>(base + Shared(16 * t));
            break;
        case counts_of_a_barrier_agree:
            sync_some(1, kept || t < 64 ? 128 : 64);
            break;
        case a_consumer_waits:
            if (t < 64) store(mine, float(t));
            t < 64 || p.broken ? arrive_some(1, 128) : sync_some(1, 128);
            if (t >= 64) result = load<float>(base + Shared(4 * (t - 64)));
            break;
        case warps_come_as_a_whole:
            if (kept || t % kWarp < 16) sync_some(1, kept ? 128 : 64);
            break;
        case blocks_return_as_a_whole:
            store(p.o + me, 0.f);
            if (kept ? b == 1 : t < 64) return;
            sync_block();
            break;
        case lanes_multiply_together:
            if (kept || t % kWarp < 16)
                multiply<Half>(d, a, 0, 0);
            else
                multiply<Half>(d, a, 0, 0);
            result = d[0];
            break;
        case rows_end:
            result = load(row + (kept ? kRow / 2 - 1 : kRow / 2));
            break;
        case vectors_are_aligned:
            result = load<float4>(row + (kept ? 4 : 6)).y;
            break;
        case writes_are_seen_after_a_barrier:
            store(p.w + me, float(t));
            if (kept) sync_block();
            result = load(p.w + (me ^ 1));
            break;
        case reads_end_before_a_write:
            result = load(p.w + (me ^ 1));
            if (kept) sync_block();
            store(p.w + me, 1.f);
            break;
        case blocks_read_their_own:
            result = load(p.w + (kept ? me : me ^ kThreads));
            if (b == 1) store(p.w + me, 1.f);
            break;
        case launches_follow_one_another:
            if (p.launch == 0 || p.broken) store(p.w + me, float(me));
            if (p.launch == 1 || p.broken) result = load(p.w + (me ^ kThreads));
            break;
        case atomics_begin_after_a_barrier:
        case atomics_end_at_a_barrier:
            if (t == 0) store(base, 0);
            if (kept || p.rule != atomics_begin_after_a_barrier) sync_block();
            atomic_add(base, t);
            if (kept || p.rule != atomics_end_at_a_barrier) sync_block();
            result = float(load<int>(base));
            break;
        case halves_of_words_are_disjoint:
            store(base + Shared(kept ? 2 * t : 2 * (t / 2)), Half{uint16_t(t)});
            sync_block();
            result = float(load<uint32_t>(base + Shared(t / 2 * 4)));
            break;
        case broadcasts_end_before_a_write:
            for (int k = 0; k < 3; ++k) {
                if (t == 5) store(base, float(k));
                sync_block();
                result += load<float>(base);
                if (kept) sync_block();
            }
            break;
        case shared_memory_dies_with_its_block:
            if (kept || b == int(gridDim.x) / 2) store(mine, float(t));
            result = load<float>(mine);
            break;
    }
    store(p.o + me, result);
}

// `beside` shares x's memory.
Tensor rules(const Tensor& x, const Tensor& beside, int64_t rule, bool broken) {
    const Device device(x);
    Tensor o = torch::stable::new_empty(x, {2, kThreads}), w = torch::stable::new_empty(x, {1024});
    device.clear(pointer<float>(w), 4096);
    pointer<float>(beside);
    for (int launch = 0; launch < (rule == launches_follow_one_another ? 2 : 1); ++launch)
        device.launch(rule_kernel, dim3(2), kThreads, 2 * 16 * kThreads,
                      Problem{pointer<float>(x), pointer<float>(w), pointer<float>(o), rule, broken, launch});
    return o;
}

}  // namespace
}  // namespace slm

SLM_CUDA_OPERATORS(m) { m.impl("rules", TORCH_BOX(&slm::rules)); }
