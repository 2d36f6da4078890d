#include "poison.h"

#include "tensors.h"

namespace slm {

bool get_poisoned() { return poisoned; }
void set_poisoned(bool on) { poisoned = on; }

}  // namespace slm
