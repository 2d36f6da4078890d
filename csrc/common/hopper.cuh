// What sm_90a adds to hardware.cuh: mbarriers, tiles that a copy engine brings (TMA), products of 64 rows
// that run beside the threads that asked for them (wgmma), registers moved between warpgroups.
//
// Only a build for sm_90a has these instructions. SLM_HOPPER says that they may be used; the body of a kernel
// stands under it and is empty in builds for others. The operator launches it where architecture() is 90 and
// has_hopper_body().
//
// Threads use memory through the generic proxy, TMA and wgmma through the asynchronous one. What a thread has
// stored is theirs to see after its fence_async(), then a barrier; what TMA brings is everybody's who waits
// for its mbarrier.
#pragma once

#include "hardware.cuh"
#include "launch.cuh"

#if defined(SLM_EXECUTOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SLM_HOPPER 1
#else
#define SLM_HOPPER 0
#endif

namespace slm {

constexpr int kWarpgroup = 128;  // threads; its first warp's number is a multiple of 4

// How a tile lies in shared memory. With 128-byte swizzle the 16-byte pieces of each 128 bytes are permuted,
// bits 4 to 6 of an address becoming their exclusive or with bits 7 to 9: as in tiles.cuh, if rows have 128
// bytes and the tile begins at a multiple of 1024. The values are those of a descriptor's bits 62 and 63.
enum class Swizzle : int { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

// Which index of a matrix [m or n, k] runs along the 16-byte pieces.
enum class Major : int { k = 0, mn = 1 };

// A matrix in shared memory as wgmma takes it (9.7.15.5.1.2). What `leading` and `stride`, in bytes, step
// over, with a swizzle of P pieces (8 for bytes128), n standing for m too:
//   Major::k:  8 n are 16 P bytes apart each, the next 8 n are `stride` away; 16 k lie in two neighbouring
//   pieces.
//   Major::mn: 8 P n lie side by side, the next 8 P n are `leading` away; 8 k are 16 P bytes apart each, the
//              next 8 k are `stride` away.
constexpr uint64_t matrix_descriptor(Shared start, uint32_t leading, uint32_t stride,
                                     Swizzle swizzle = Swizzle::bytes128) {
    return uint64_t((start & 0x3ffff) >> 4) | uint64_t((leading & 0x3ffff) >> 4) << 16 |
           uint64_t((stride & 0x3ffff) >> 4) << 32 | uint64_t(swizzle) << 62;
}
// The matrix that begins so many bytes later: a later k, by 2 bytes each for Major::k and 16 P for Major::mn.
constexpr uint64_t advance(uint64_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

}  // namespace slm

#ifdef SLM_EXECUTOR
#include <hopper.h>
#else

#include <cuda.h>

#include <type_traits>

namespace slm {

using TensorMap = CUtensorMap;

// --- mbarriers: a phase ends when all its arrivals and all bytes that it expects have come (9.7.13.15) -----

SLM_DEVICE void init_mbarrier(Shared mbarrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}
// By the thread that initialised them, before a barrier of the block.
SLM_DEVICE void fence_mbarriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
SLM_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
SLM_DEVICE void arrive(Shared mbarrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}
SLM_DEVICE void arrive_expecting(Shared mbarrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes)
                 : "memory");
}
// Until the phase of this parity has ended: phases 0, 2, ... have parity 0. Of a new mbarrier, the phase
// before its first, of parity 1, counts as ended.
SLM_DEVICE void wait_phase(Shared mbarrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@ended bra go;\n"
        "bra again;\n"
        "go:\n"
        "}" ::"r"(mbarrier),
        "r"(parity)
        : "memory");
}

// --- Tiles brought by the copy engine (9.7.9.25.5) ---------------------------------------------------------

// Begins to bring the box at x0 (the innermost), ... of a tensor; its bytes count for the mbarrier. Called by
// one thread. What lies outside the tensor becomes zeros, and counts. `to`: a multiple of 1024 with 128-byte
// swizzle.
SLM_DEVICE void load_box(Shared to, const TensorMap& map, Shared mbarrier, int x0, int x1, int x2, int x3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(&map), "r"(mbarrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
        : "memory");
}
SLM_DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// --- Threads -----------------------------------------------------------------------------------------------

// True in one lane of the warp.
SLM_DEVICE bool elect() {
    uint32_t chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(chosen));
    return chosen != 0;
}
// A warpgroup goes on with N registers a thread, fewer or more than it has; more are waited for. (9.7.19.5)
template <int N>
SLM_DEVICE void give_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
SLM_DEVICE void take_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// --- Products beside the threads (9.7.15) ------------------------------------------------------------------

// Keeps the compiler from moving uses of registers across this point.
template <int J>
SLM_DEVICE void pin(float (&x)[J][4]) {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n) asm volatile("" : "+f"(x[j][n])::"memory");
}
template <int J>
SLM_DEVICE void pin(uint32_t (&x)[J][4]) {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n) asm volatile("" : "+r"(x[j][n])::"memory");
}

// A warpgroup's products: after their registers (sums and a) were written, a fence that names them; then
// multiply_async, as often as wanted; then a commit, which makes a group of them. Until a wait that leaves
// the group done nobody may touch these registers, or write the shared memory that is read. The wait names
// the registers too.
template <typename... X>
SLM_DEVICE void fence_products(X&... registers) {
    (pin(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
SLM_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the N newest groups.
template <int N, typename... X>
SLM_DEVICE void wait_products(X&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    (pin(registers), ...);
}

#define SLM_NUMBERS_32                                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SLM_NUMBERS_64                                                                                       \
    SLM_NUMBERS_32                                                                                           \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SLM_SUMS_4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SLM_SUMS_16(j) SLM_SUMS_4(j), SLM_SUMS_4(j + 1), SLM_SUMS_4(j + 2), SLM_SUMS_4(j + 3)
#define SLM_SUMS_32 SLM_SUMS_16(0), SLM_SUMS_16(4)
#define SLM_SUMS_64 SLM_SUMS_32, SLM_SUMS_16(8), SLM_SUMS_16(12)

// One instruction: sums d, a in shared memory (a descriptor) or in registers, b in shared memory, whether to
// add to what is in d, b's major. The numbers are those of the operands that follow the sums.
#define SLM_WGMMA(n, sums, type, a, b, add, immediates)                                                 \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type \
    "." type " {" sums "}, " a ", " b ", p, 1, 1, " immediates ";\n}"
#define SLM_WGMMA_SHARED(n, sums, type, a, b, add, major_b)                       \
    asm volatile(SLM_WGMMA(n, SLM_NUMBERS_##sums, type, a, b, add, "0, " major_b) \
                 : SLM_SUMS_##sums                                                \
                 : "l"(x), "l"(y), "r"(int(accumulate)), "n"(int(major)))
#define SLM_WGMMA_REGISTERS(n, sums, type, a, b, add, major_b)                               \
    asm volatile(SLM_WGMMA(n, SLM_NUMBERS_##sums, type, a, b, add, major_b)                  \
                 : SLM_SUMS_##sums                                                           \
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(y), "r"(int(accumulate)), \
                   "n"(int(major)))

// d [64, 8 J] = x [64, 16] y [16, 8 J], or += if `accumulate`; warp w of the warpgroup holds rows 16 w to 16
// w + 15 in d and x, laid out there as by `multiply`, d[j] being columns 8 j to 8 j + 7. A matrix in shared
// memory is given by its descriptor; x there is Major::k.
template <typename E, Major major, int J>
SLM_DEVICE void multiply_async(float (&d)[J][4], uint64_t x, uint64_t y, bool accumulate) {
    static_assert(J == 8 || J == 16);
    if constexpr (J == 8 && std::is_same_v<E, BFloat16>)
        SLM_WGMMA_SHARED("64", 32, "bf16", "%32", "%33", "%34", "%35");
    else if constexpr (J == 8)
        SLM_WGMMA_SHARED("64", 32, "f16", "%32", "%33", "%34", "%35");
    else if constexpr (std::is_same_v<E, BFloat16>)
        SLM_WGMMA_SHARED("128", 64, "bf16", "%64", "%65", "%66", "%67");
    else
        SLM_WGMMA_SHARED("128", 64, "f16", "%64", "%65", "%66", "%67");
}
template <typename E, Major major, int J>
SLM_DEVICE void multiply_async(float (&d)[J][4], const uint32_t (&x)[4], uint64_t y, bool accumulate) {
    static_assert(J == 8 || J == 16);
    if constexpr (J == 8 && std::is_same_v<E, BFloat16>)
        SLM_WGMMA_REGISTERS("64", 32, "bf16", "{%32, %33, %34, %35}", "%36", "%37", "%38");
    else if constexpr (J == 8)
        SLM_WGMMA_REGISTERS("64", 32, "f16", "{%32, %33, %34, %35}", "%36", "%37", "%38");
    else if constexpr (std::is_same_v<E, BFloat16>)
        SLM_WGMMA_REGISTERS("128", 64, "bf16", "{%64, %65, %66, %67}", "%68", "%69", "%70");
    else
        SLM_WGMMA_REGISTERS("128", 64, "f16", "{%64, %65, %66, %67}", "%68", "%69", "%70");
}
#undef SLM_NUMBERS_32
#undef SLM_NUMBERS_64
#undef SLM_SUMS_4
#undef SLM_SUMS_16
#undef SLM_SUMS_32
#undef SLM_SUMS_64
#undef SLM_WGMMA
#undef SLM_WGMMA_SHARED
#undef SLM_WGMMA_REGISTERS

// --- The host's side ---------------------------------------------------------------------------------------

// Was this kernel built for sm_90a? Where it was not its body is empty, which takes a handful of registers.
template <typename... P>
bool has_hopper_body(void (*kernel)(P...)) {
    cudaFuncAttributes attributes;
    SLM_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.numRegs > 32;
}

// A tensor of 16-bit numbers, sizes and the strides of all but the innermost dimension in bytes, and a box of
// it. The driver's function is asked of the runtime, so that libcuda need not be linked.
inline TensorMap tensor_map(void* data, bool bf16, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                            const uint32_t (&box)[4]) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        SLM_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                        cudaEnableDefault, &found));
#else
        SLM_CUDA_CHECK(
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
        STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess,
                        "the CUDA driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    TensorMap map;
    const uint32_t every[4] = {1, 1, 1, 1};
    const CUresult result =
        encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, data,
               sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int(result));
    return map;
}

}  // namespace slm
#endif  // SLM_EXECUTOR

namespace slm {

// Rows of heads of a 16-bit tensor [B, T, H, D], D a multiple of 64, brought 64 columns at a time as a tile
// [rows, 64] with 128-byte swizzle. The copy engine's manual wants strides that grow, each a multiple of the
// one before: so T or H is its second dimension, whichever has the smaller stride.
struct RowMap {
    TensorMap map;
    int32_t rows_first;

    SLM_DEVICE void load(Shared to, Shared mbarrier, int column, int64_t row, int head, int64_t batch) const {
        const int t = int(row);
        load_box(to, map, mbarrier, column, rows_first ? t : head, rows_first ? head : t, int(batch));
    }
};

// Strides in bytes of T, H and B as the copy engine gets them: a dimension of size 1 is never stepped along.
struct RowStrides {
    bool rows_first;
    uint64_t size[4], stride[3];

    explicit RowStrides(const Tensor& x) {
        rows_first = x.size(1) > 1 && x.size(2) > 1 && x.stride(1) < x.stride(2);
        const int order[3] = {rows_first ? 1 : 2, rows_first ? 2 : 1, 0};
        size[0] = uint64_t(x.size(3));
        uint64_t least = size[0] * 2;
        for (int n = 0; n < 3; ++n) {
            size[n + 1] = uint64_t(x.size(order[n]));
            stride[n] = size[n + 1] == 1 ? least : uint64_t(x.stride(order[n]) * 2);
            least = stride[n] * size[n + 1];
        }
    }
    // Is this a tensor that it takes?
    bool fit() const {
        for (int n = 0; n < 3; ++n)
            if (stride[n] % 16 != 0 || stride[n] >> 40 != 0 || size[n + 1] == 0 || size[n + 1] >> 31 != 0 ||
                stride[n] < (n > 0 ? stride[n - 1] * size[n] : size[0] * 2) ||
                (n > 0 && stride[n] % stride[n - 1] != 0))
                return false;
        return true;
    }
};

inline bool fits_row_map(const Tensor& x) {
    return is_16bit(x) && x.dim() == 4 && x.stride(3) == 1 && x.size(3) % 64 == 0 &&
           reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && RowStrides(x).fit();
}

template <typename E>
RowMap row_map(const Tensor& x, int rows) {
    const RowStrides s(x);
    const uint32_t box[4] = {64, s.rows_first ? uint32_t(rows) : 1, s.rows_first ? 1 : uint32_t(rows), 1};
    return {tensor_map(pointer<E>(x), x.scalar_type() == ScalarType::BFloat16, s.size, s.stride, box),
            s.rows_first};
}

}  // namespace slm
