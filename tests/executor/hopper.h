// csrc/common/hopper.cuh on a CPU, in the manner of executor.h. Beyond what is found there, reported are:
//   - shared memory stored by threads and then used by TMA or wgmma without a proxy fence on the way;
//   - boxes that nobody has waited for (they arrive no sooner than a thread waits for their mbarrier and
//     nothing else can go on), bytes that a mbarrier does not expect, arrivals beyond its count, mbarriers
//     used before they are initialised and fenced;
//   - products: shared memory written while it is read, registers written after the fence or touched before
//     the wait (sums are NaN until then, and are computed no sooner), registers that a fence or a wait does
//     not name;
//   - warpgroups that ask for more registers than a multiprocessor has.
// It takes descriptors apart and swizzles absolute addresses, as the hardware does.
#pragma once

#include <initializer_list>
#include <type_traits>

namespace slm::executor {

struct Registers {
    void* data;
    size_t bytes;
};

void fence_registers(std::initializer_list<Registers> named);
void wait_for_products(int newest, std::initializer_list<Registers> named);
void set_registers(int count, bool more);

// One lane's part in a product of its warpgroup.
struct ProductLane {
    float* d;
    int tiles;  // of 8 columns
    const uint32_t* a;  // null: in shared memory
    uint64_t a_matrix, b_matrix;
    Major b_major;
    bool accumulate, bf16;
};
void issue_product(ProductLane lane);

}  // namespace slm::executor

namespace slm {

// A tensor as the copy engine knows it: the innermost dimension first, strides in bytes.
struct TensorMap {
    const char* data;
    uint64_t sizes[4], strides[4];
    uint32_t box[4];
};
template <typename... P>
bool has_hopper_body(void (*)(P...)) {
    return true;
}
TensorMap tensor_map(void* data, bool bf16, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                     const uint32_t (&box)[4]);

void init_mbarrier(Shared mbarrier, int arrivals);
void fence_mbarriers();
void fence_async();
void arrive(Shared mbarrier);
void arrive_expecting(Shared mbarrier, int bytes);
void wait_phase(Shared mbarrier, int parity);

void load_box(Shared to, const TensorMap& map, Shared mbarrier, int x0, int x1, int x2, int x3);
inline void prefetch_map(const TensorMap&) {}

bool elect();
template <int N>
void give_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    executor::set_registers(N, false);
}
template <int N>
void take_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
    executor::set_registers(N, true);
}

template <typename... X>
void fence_products(X&... registers) {
    executor::fence_registers({{registers, sizeof(registers)}...});
}
void commit_products();
template <int N, typename... X>
void wait_products(X&... registers) {
    executor::wait_for_products(N, {{registers, sizeof(registers)}...});
}

template <typename E, Major major, int J>
void multiply_async(float (&d)[J][4], uint64_t x, uint64_t y, bool accumulate) {
    static_assert(J == 8 || J == 16);
    executor::issue_product({d[0], J, nullptr, x, y, major, accumulate, std::is_same_v<E, BFloat16>});
}
template <typename E, Major major, int J>
void multiply_async(float (&d)[J][4], const uint32_t (&x)[4], uint64_t y, bool accumulate) {
    static_assert(J == 8 || J == 16);
    executor::issue_product({d[0], J, x, 0, y, major, accumulate, std::is_same_v<E, BFloat16>});
}

}  // namespace slm
