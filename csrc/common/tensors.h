// Tensors as the CPU operators read, check and make them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "rows.h"

namespace slm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return Dtype::f32;
        case ScalarType::Double:
            return Dtype::f64;
        case ScalarType::BFloat16:
            return Dtype::bf16;
        case ScalarType::Half:
            return Dtype::f16;
        default:
            STD_TORCH_CHECK(false, "q must be float32, float64, bfloat16 or float16");
    }
}

inline ScalarType statistics_type(Dtype dtype) {
    return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

// A call through the dispatcher costs a microsecond, a decode step a few.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Kernels want unit stride along the last dimension; anything else is copied.
inline Tensor dense_rows(const Tensor& x) {
    return x.dim() > 0 && x.numel() > 0 && x.stride(x.dim() - 1) != 1 ? torch::stable::contiguous(x) : x;
}

inline Rows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// Are the CPU's new tensors filled with ones, NaN in every float? See poison.h.
inline bool poisoned = false;

// A new contiguous tensor on the device of another. Not by way of the dispatcher, which takes a microsecond.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
    constexpr size_t kMost = 8;
    STD_TORCH_CHECK(shape.size() <= kMost, "a tensor of ", shape.size(), " dimensions");
    int64_t strides[kMost] = {}, numbers = 1;
    for (size_t d = shape.size(); d-- > 0; numbers *= std::max<int64_t>(1, *(shape.begin() + d)))
        strides[d] = numbers;
    const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    int32_t device, index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.begin(), strides,
                                                           type, device, index, &handle));
    const Tensor x(handle);
    if (poisoned && x.numel() > 0 && device == aoti_torch_device_type_cpu())
        std::memset(x.data_ptr(), 0xff, size_t(x.numel()) * x.element_size());
    return x;
}

// The same, of zeros if asked. Large ones take huge pages where the system grants them on request: their
// first touch would otherwise cost a page fault for every 4 KiB, on every call.
inline Tensor fresh(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype, bool zeros) {
    const Tensor x = empty(like, shape, dtype);
    const int64_t bytes = x.numel() * int64_t(x.element_size());
    char* data = static_cast<char*>(x.data_ptr());
#if defined(__linux__)
    constexpr uintptr_t kHuge = uintptr_t(2) << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHuge * kHuge;
    if (bytes >= int64_t(2 * kHuge) && last > first)
        madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint; may fail
#endif
    if (zeros)
        torch::stable::parallel_for(0, bytes, int64_t(1) << 20, [&](int64_t begin, int64_t end) {
            std::memset(data + begin, 0, size_t(end - begin));
        });
    return x;
}

inline std::vector<int64_t> offsets(const Tensor& x, int64_t total, const char* name) {
    STD_TORCH_CHECK(x.dim() == 1 && x.scalar_type() == ScalarType::Int, name,
                    " must be an int32 tensor [N+1]");
    const Tensor dense = torch::stable::contiguous(x);
    const int32_t* p = static_cast<const int32_t*>(dense.data_ptr());
    std::vector<int64_t> result(p, p + dense.numel());
    STD_TORCH_CHECK(!result.empty() && result.front() == 0 && result.back() == total &&
                        std::is_sorted(result.begin(), result.end()),
                    name, " must start at 0, never fall and end at ", total);
    return result;
}

using Sizes = std::initializer_list<int64_t>;

// Gates, states, sums: of the given shape and dtype, contiguous.
inline Tensor statistics(const Tensor& x, Sizes shape, ScalarType dtype, const char* name) {
    bool fits = x.dim() == int64_t(shape.size()) && x.scalar_type() == dtype;
    for (size_t d = 0; fits && d < shape.size(); ++d) fits = x.size(int64_t(d)) == *(shape.begin() + d);
    STD_TORCH_CHECK(fits, name, " has the wrong shape or dtype (float32, or float64 for float64 inputs)");
    return dense(x);
}

}  // namespace slm
