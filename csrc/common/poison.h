// For tests: whether the CPU operators fill new memory with ones (NaN in every float dtype, -1 in integers), so
// that an element nobody wrote is seen. They do not allocate by way of PyTorch's operator that would.
#pragma once

namespace slm {

__attribute__((visibility("default"))) bool get_poisoned();
__attribute__((visibility("default"))) void set_poisoned(bool on);

}  // namespace slm
