// Experts, avx512 tier.
#if defined(__x86_64__)
#include "../common/prelude.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2")
#define SLM_TIER avx512
#define SLM_BYTES 64
#include "mlp.inl"
#include "route.inl"
#endif
