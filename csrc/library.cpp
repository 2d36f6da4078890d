// The operators' schemas. Kernels are registered where they are written; autograd is in Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(slmkernels, m) {
    m.def(
        "sliding_window_forward(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens, "
        "Tensor? cu_seqlens_k, int left, int right, float scale, float softcap) -> (Tensor, Tensor)");
    m.def(
        "sliding_window_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, "
        "Tensor lse, Tensor? sinks, Tensor? cu_seqlens, Tensor? cu_seqlens_k, int left, int right, "
        "float scale, float softcap) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "sliding_window_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_ring, Tensor(b!) v_ring, "
        "Tensor(c!) position, Tensor? sinks, float scale, float softcap) -> Tensor");
}
