// CUDA kernels on a CPU: what csrc/common/hardware.cuh says of the hardware, done by hand and checked.
//
// A block runs at a time. Its threads are fibers, each running until it must wait for others. What several threads
// do together (shuffles, ldmatrix, mma, barriers) happens when the last of them has arrived. Found and reported, as
// errors of the operator:
//   - addresses outside the shared memory or outside the rows of every tensor, and misaligned ones;
//   - reads of shared memory that nobody has written, or where an asynchronous copy has not been waited for (it
//     arrives no sooner than the wait that must see it);
//   - two threads at the same place, one of them writing, that no barrier orders (vector clocks: Flanagan and
//     Freund 2009, FastTrack); two blocks at the same place in global memory, one of them writing, that no
//     fence and atomic of the first before an atomic and fence of the second order;
//   - lanes of a warp that call different things together, barriers that not all reach, threads that wait for ever.
// Not found: reads of what an earlier tile left in shared memory. One-byte writes to neighbours count as one place.
// SLM_EXECUTOR_ORDER=reverse runs blocks, and the threads of a block, in the opposite order.
// Registers are plain variables; uninitialised ones are the compiler's business (-Wall -Werror).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <utility>
#include <vector>

#define SLM_DEVICE inline
#define SLM_KERNEL(threads, blocks) void
#define __grid_constant__
#define SLM_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(slmkernels_executor, CPU, m)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SLM_VECTORS(X, name)                                   \
    struct alignas(2 * sizeof(X)) name##2 { X x, y; };         \
    struct alignas(4 * sizeof(X)) name##4 { X x, y, z, w; };   \
    inline name##2 make_##name##2(X x, X y) { return {x, y}; } \
    inline name##4 make_##name##4(X x, X y, X z, X w) { return {x, y, z, w}; }
SLM_VECTORS(float, float)
SLM_VECTORS(int, int)
SLM_VECTORS(unsigned, uint)
#undef SLM_VECTORS

using std::max;
using std::min;

namespace slm::executor {

// Set for the thread that runs.
extern dim3 thread_index, block_index, block_size, grid_size;

// Memory that kernels may touch, until the operator's Device goes away: the numbers of a tensor, and not what lies
// between its rows.
struct View {
    const char* data;
    int64_t run, extent;  // bytes side by side, and in all
    std::vector<std::pair<int64_t, int64_t>> steps;  // strides in bytes, the largest first, and sizes
    bool holds(const char* address, int64_t bytes) const;
};
View view(const torch::stable::Tensor& x);
void know(View view);
void run_grid(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel);
int architecture();
int shared_limit();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Checks, and marks, a use of memory by this thread; gives where the bytes are.
const void* read_shared(Shared address, int bytes);
void write_shared(Shared address, const void* from, int bytes);
void read_global(const void* address, int bytes);
void write_global(const void* address, int bytes);

// Runs `all` on what the 32 lanes brought, once the last has come; `what` and `which` must be the same for all.
void together(const char* what, void* mine, const std::function<void(void* const* of_lane)>& all,
              int which = 0);

}  // namespace slm::executor

#define threadIdx slm::executor::thread_index
#define blockIdx slm::executor::block_index
#define blockDim slm::executor::block_size
#define gridDim slm::executor::grid_size

namespace slm {

// --- Memory -----------------------------------------------------------------------------------------------

Shared shared_memory();

template <typename X>
X load(Shared address) {
    X x;
    std::memcpy(&x, executor::read_shared(address, sizeof(X)), sizeof(X));
    return x;
}
template <typename X>
void store(Shared address, X x) {
    executor::write_shared(address, &x, sizeof(X));
}
template <typename X>
X load(const void* address) {
    executor::read_global(address, sizeof(X));
    X x;
    std::memcpy(&x, address, sizeof(X));
    return x;
}
template <typename X>
X load(const X* address) {
    return load<X>(static_cast<const void*>(address));
}
template <typename X>
void store(void* address, X x) {
    executor::write_global(address, sizeof(X));
    std::memcpy(address, &x, sizeof(X));
}
template <typename X>
void store(X* address, X x) {
    store(static_cast<void*>(address), x);
}

void copy_async(Shared to, const void* from, bool valid);
void copy_async_8(Shared to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int newest);
template <int N>
void wait_copies() {
    wait_for_copies(N);
}

// --- Threads ----------------------------------------------------------------------------------------------

inline int lane_of_thread() { return int(threadIdx.x) % kWarp; }
inline int warp_of_thread() { return int(threadIdx.x) / kWarp; }

void sync_block();
void sync_warp();
void sync_some(int barrier, int threads);
void arrive_some(int barrier, int threads);

template <typename X>
X exchange(const char* what, X x, int from) {
    static_assert(sizeof(X) == 4 || sizeof(X) == 8);
    struct {
        X mine, received;
        int from;
    } lane{x, x, from};
    using Lane = decltype(lane);
    executor::together(what, &lane, [](void* const* of_lane) {
        for (int l = 0; l < kWarp; ++l) {
            Lane& to = *static_cast<Lane*>(of_lane[l]);
            if (to.from >= 0) to.received = static_cast<Lane*>(of_lane[to.from % kWarp])->mine;
        }
    });
    return lane.received;
}
template <typename X>
X shuffle(X x, int from) {
    return exchange("shuffle", x, from & (kWarp - 1));
}
template <typename X>
X shuffle_xor(X x, int mask) {
    return exchange("shuffle_xor", x, lane_of_thread() ^ mask);
}
template <typename X>
X shuffle_up(X x, int delta) {
    return exchange("shuffle_up", x, lane_of_thread() - delta);
}
uint32_t ballot(bool x);
uint32_t match(uint32_t x);
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

int atomic_add(int* address, int x);
int64_t atomic_add(int64_t* address, int64_t x);
int atomic_add(Shared address, int x);
int64_t load_relaxed(const int64_t* address);
void fence();

// --- Arithmetic -------------------------------------------------------------------------------------------

inline float without_denormals(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
inline float exp2(float x) { return without_denormals(std::exp2(x)); }
inline float log2(float x) { return std::log2(without_denormals(x)); }
inline float reciprocal(float x) { return without_denormals(1.f / without_denormals(x)); }
inline float reciprocal_root(float x) { return 1.f / std::sqrt(without_denormals(x)); }
inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
float to_float(Half x);
template <typename E>
uint16_t round_to(float x);
template <typename E>
uint32_t pack(float first, float second) {
    return round_to<E>(first) | uint32_t(round_to<E>(second)) << 16;
}

// --- Tensor cores -----------------------------------------------------------------------------------------

// Lanes call these at the same line: elsewhere it would be another instruction.
void load_matrices(uint32_t (&r)[4], Shared row, int line = __builtin_LINE());
void load_matrices_transposed(uint32_t (&r)[4], Shared row, int line = __builtin_LINE());
template <typename E>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE());

// --- The host's side --------------------------------------------------------------------------------------

template <typename X>
X* pointer(const torch::stable::Tensor& x) {
    if (x.numel() > 0) executor::know(executor::view(x));
    return static_cast<X*>(x.data_ptr());
}

class Device {
  public:
    explicit Device(const torch::stable::Tensor&);
    ~Device();
    int multiprocessors() const { return 4; }
    int architecture() const { return executor::architecture(); }
    int shared_limit() const { return executor::shared_limit(); }
    void clear(void* data, int64_t bytes) const { std::memset(data, 0, size_t(bytes)); }

    template <typename... P, typename... A>
    void launch(void (*kernel)(P...), dim3 grid, int threads, int shared_bytes, const A&... arguments) const {
        if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
        STD_TORCH_CHECK(shared_bytes <= shared_limit(), "launch: ", shared_bytes, " bytes of shared memory");
        STD_TORCH_CHECK(grid.y < 65536 && grid.z < 65536, "launch: grid.y and grid.z are below 65536");
        executor::run_grid(grid, threads, shared_bytes, [&] { kernel(arguments...); });
    }
};

}  // namespace slm
