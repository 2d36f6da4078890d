// Experts, avx2 tier.
#if defined(__x86_64__)
#include "../common/prelude.h"
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define SLM_TIER avx2
#define SLM_BYTES 32
#include "mlp.inl"
#include "route.inl"
#endif
