// All that a CUDA kernel takes from the hardware, each thing wrapped once: memory, warps, barriers, tensor cores.
//
// Kernels are written over these functions alone. tests/executor puts others of the same names in their place, so
// that the same sources compile with a C++ compiler and run, checked, on a CPU. What sm_90a adds is in hopper.cuh.
// Numbers of sections are those of NVIDIA's PTX ISA 8.x.
#pragma once

#include <cstdint>

namespace slm {

constexpr int kWarp = 32;

// 16-bit storage. Arithmetic is float.
struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// An address in the shared memory of the block, in bytes.
using Shared = uint32_t;

}  // namespace slm

#ifdef SLM_EXECUTOR
#include <executor.h>
#else

#define SLM_DEVICE __device__ __forceinline__
#define SLM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace slm {

// --- Memory -----------------------------------------------------------------------------------------------

// The block's dynamic shared memory, the only kind that kernels use; a multiple of 1024.
SLM_DEVICE Shared shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

template <typename X>
SLM_DEVICE X load(Shared address) {
    return *static_cast<const X*>(__cvta_shared_to_generic(address));
}
template <typename X>
SLM_DEVICE void store(Shared address, X x) {
    *static_cast<X*>(__cvta_shared_to_generic(address)) = x;
}

// Global memory. X may be a vector of what is there: load<float4>(x). Then the address is a multiple of its size.
template <typename X>
SLM_DEVICE X load(const X* address) {
    return *address;
}
template <typename X>
SLM_DEVICE X load(const void* address) {
    return *static_cast<const X*>(address);
}
template <typename X>
SLM_DEVICE void store(X* address, X x) {
    *address = x;
}
template <typename X>
SLM_DEVICE void store(void* address, X x) {
    *static_cast<X*>(address) = x;
}

// 16 bytes from global to shared memory, without passing registers; zeros if not `valid` (nothing is read then).
SLM_DEVICE void copy_async(Shared to, const void* from, bool valid) {  // 9.7.9.25
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
                 : "memory");
}
// The same of 8 bytes; these pass the L1 cache.
SLM_DEVICE void copy_async_8(Shared to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(valid ? 8 : 0)
                 : "memory");
}
// Copies since the last commit become a group; wait until all but the N newest groups of this thread have arrived.
SLM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
SLM_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- Threads ----------------------------------------------------------------------------------------------

SLM_DEVICE int lane_of_thread() { return int(threadIdx.x) % kWarp; }
SLM_DEVICE int warp_of_thread() { return int(threadIdx.x) / kWarp; }

SLM_DEVICE void sync_block() { __syncthreads(); }
SLM_DEVICE void sync_warp() { __syncwarp(); }
// Barrier 1 to 15 of `threads` threads, whole warps: all of them wait, or some only arrive.
SLM_DEVICE void sync_some(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
SLM_DEVICE void arrive_some(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// All 32 lanes of a warp call these together. X: 32 or 64 bits.
template <typename X>
SLM_DEVICE X shuffle(X x, int from) {
    return __shfl_sync(~0u, x, from);
}
template <typename X>
SLM_DEVICE X shuffle_xor(X x, int mask) {
    return __shfl_xor_sync(~0u, x, mask);
}
// From `delta` lanes below; a lane with none there keeps its own.
template <typename X>
SLM_DEVICE X shuffle_up(X x, int delta) {
    return __shfl_up_sync(~0u, x, delta);
}
SLM_DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }
// The lanes whose x equals this lane's.
SLM_DEVICE uint32_t match(uint32_t x) { return __match_any_sync(~0u, x); }
SLM_DEVICE int count_bits(uint32_t x) { return __popc(x); }

// Integers only: sums of floats would depend on the order. Returns what was there. Orders nothing else: a block
// hands its results to another by writing them, a barrier, and fence and atomic by one thread; the other reads
// them after atomic and fence by one thread, and a barrier (PTX ISA 8.x, section 8.8, morally strong).
SLM_DEVICE int atomic_add(int* address, int x) { return atomicAdd(address, x); }
SLM_DEVICE int64_t atomic_add(int64_t* address, int64_t x) {
    return int64_t(
        atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(x)));
}
SLM_DEVICE int atomic_add(Shared address, int x) {
    return atomicAdd(static_cast<int*>(__cvta_shared_to_generic(address)), x);
}

// What is where other blocks add to by atomics in the meantime.
SLM_DEVICE int64_t load_relaxed(const int64_t* address) {  // 9.7.9.8
    int64_t x;
    asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];"
                 : "=l"(x)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return x;
}
SLM_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }  // 9.7.13.4

// --- Arithmetic -------------------------------------------------------------------------------------------

// Approximations of about 2 units in the last place (log2 near 1: of 2^-22, absolute); denormals count as 0.
SLM_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
SLM_DEVICE float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
SLM_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
SLM_DEVICE float reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
SLM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
SLM_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// Two numbers of storage type E in a register, the first in the low half; rounded to nearest even.
template <typename E>
SLM_DEVICE uint32_t pack(float first, float second);
template <>
SLM_DEVICE uint32_t pack<BFloat16>(float first, float second) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
    return x;
}
template <>
SLM_DEVICE uint32_t pack<Half>(float first, float second) {
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
    return x;
}

SLM_DEVICE float to_float(float x) { return x; }
SLM_DEVICE float to_float(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
SLM_DEVICE float to_float(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// --- Tensor cores -----------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit numbers; the rows of matrix m, 16 bytes each, are where lanes 8 m to 8 m + 7 say.
// Lane l gets the two numbers of row l / 4, columns 2 (l % 4) and the next, of matrix m in r[m]. (9.7.14.5.15)
SLM_DEVICE void load_matrices(uint32_t (&r)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
// The same of the matrices transposed.
SLM_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], sums in float32. With g = lane / 4, t = lane % 4 (9.7.14.5.8):
//   d[0], d[1]: row g, columns 2 t, 2 t + 1; d[2], d[3]: row g + 8.
//   a[0]: row g, columns 2 t, 2 t + 1; a[1]: row g + 8; a[2], a[3]: the same, columns + 8.
//   b0: rows 2 t, 2 t + 1, column g; b1: rows + 8.
// Volatile, or the compiler may move it to where the sums are used, past a branch that only some lanes take.
template <typename E>
SLM_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define SLM_MULTIPLY(E, name)                                                                    \
    template <>                                                                                  \
    SLM_DEVICE void multiply<E>(float(&d)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                      \
                     ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));            \
    }
SLM_MULTIPLY(BFloat16, "bf16")
SLM_MULTIPLY(Half, "f16")
#undef SLM_MULTIPLY

}  // namespace slm
#endif  // SLM_EXECUTOR

namespace slm {

template <typename E>
SLM_DEVICE float first_of(uint32_t pair);
template <typename E>
SLM_DEVICE float second_of(uint32_t pair);
template <>
SLM_DEVICE float first_of<BFloat16>(uint32_t pair) {
    return as_float(pair << 16);
}
template <>
SLM_DEVICE float second_of<BFloat16>(uint32_t pair) {
    return as_float(pair & 0xffff0000u);
}
template <>
SLM_DEVICE float first_of<Half>(uint32_t pair) {
    return to_float(Half{uint16_t(pair)});
}
template <>
SLM_DEVICE float second_of<Half>(uint32_t pair) {
    return to_float(Half{uint16_t(pair >> 16)});
}

template <typename E>
SLM_DEVICE E from_float(float x) {
    return E{uint16_t(pack<E>(x, 0.f))};
}
template <>
SLM_DEVICE float from_float<float>(float x) {
    return x;
}

}  // namespace slm
