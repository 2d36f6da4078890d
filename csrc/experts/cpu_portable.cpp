// Experts, portable tier.
#include "../common/prelude.h"
#define SLM_TIER portable
#define SLM_BYTES 16
#include "mlp.inl"
#include "route.inl"
