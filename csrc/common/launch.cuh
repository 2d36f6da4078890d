// The host's side of the CUDA operators: tensors as kernels take them, the device, the launch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "hardware.cuh"

#ifndef SLM_EXECUTOR
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// Registers the CUDA kernels of operators whose schemas are in library.cpp.
#define SLM_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(slmkernels, CUDA, m)

namespace slm {

// Where a kernel finds a tensor's numbers.
template <typename X>
X* pointer(const torch::stable::Tensor& x) {
    return static_cast<X*>(x.data_ptr());
}

#define SLM_CUDA_CHECK(call)                                                                      \
    do {                                                                                          \
        const cudaError_t error = (call);                                                         \
        STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error), " in " #call); \
    } while (0)

// The device of a tensor, made current for as long as this lives, and its current stream.
class Device {
  public:
    explicit Device(const torch::stable::Tensor& like) : index_(like.get_device_index()), guard_(index_) {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }

    int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
    // 80, 86, 90, ...
    int architecture() const {
        return 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
               attribute(cudaDevAttrComputeCapabilityMinor);
    }
    // Bytes of shared memory that a block may ask for.
    int shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

    template <typename... P, typename... A>
    void launch(void (*kernel)(P...), dim3 grid, int threads, int shared_bytes, const A&... arguments) const {
        if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
        if (shared_bytes > 48 * 1024)
            SLM_CUDA_CHECK(
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
        kernel<<<grid, threads, shared_bytes, stream_>>>(arguments...);
        SLM_CUDA_CHECK(cudaGetLastError());
    }

  private:
    int attribute(cudaDeviceAttr which) const {
        int value = 0;
        SLM_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index_));
        return value;
    }
    int index_;
    torch::stable::accelerator::DeviceGuard guard_;
    cudaStream_t stream_;
};

}  // namespace slm
#endif  // SLM_EXECUTOR

namespace slm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Calls body<E>(...) for a tensor's storage type.
#define SLM_DISPATCH_16BIT(tensor, body, ...)                                               \
    ((tensor).scalar_type() == slm::ScalarType::BFloat16 ? body<slm::BFloat16>(__VA_ARGS__) \
                                                         : body<slm::Half>(__VA_ARGS__))

inline bool is_16bit(const Tensor& x) {
    return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
}

// x, or a copy of it, whose rows along the last dimension can be read 16 bytes at a time.
inline Tensor aligned_rows(const Tensor& x) {
    if (x.numel() == 0) return x;
    bool aligned = x.stride(x.dim() - 1) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
    for (int64_t d = 0; d + 1 < x.dim(); ++d)
        aligned &= x.size(d) == 1 || x.stride(d) * int64_t(x.element_size()) % 16 == 0;
    if (aligned) return x;
    return x.is_contiguous() ? torch::stable::clone(x) : torch::stable::contiguous(x);
}

}  // namespace slm
