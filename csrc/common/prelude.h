// What a tier's translation unit includes before `#pragma GCC target`: standard headers only, so that
// none of their inline functions is compiled for a CPU that the program may not run on.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
