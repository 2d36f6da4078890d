// What the two forward kernels share.
#pragma once

#include "window.cuh"

namespace slm {

struct Forward {
    WindowProblem window;
    Rows o;      // [B, T, Hq, Dv]
    float* lse;  // [B, Hq, T]
};

// Does the kernel for sm_90a take this? If so it has been launched. q, k, v: the tensors of the problem.
bool forward_sm90(const Device& device, const Forward& p, const Tensor& q, const Tensor& k, const Tensor& v);

}  // namespace slm
