// Instruction-set tiers of the CPU kernels: what this CPU runs, and which one is in use.
#pragma once

namespace slm {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// "portable", "avx2", "avx512".
__attribute__((visibility("default"))) const char* isa_name(Isa isa);

// Does this CPU (and its operating system) run the tier?
__attribute__((visibility("default"))) bool isa_supported(Isa isa);

// Has this CPU AVX512-BF16 dot products?
__attribute__((visibility("default"))) bool has_bf16_dot();

// The tier in use: the best supported one, unless SLMKERNELS_CPU_ISA or set_isa chose another.
__attribute__((visibility("default"))) Isa get_isa();

// Returns false, and changes nothing, if this CPU does not run the tier.
__attribute__((visibility("default"))) bool set_isa(Isa isa);

// Why SLMKERNELS_CPU_ISA was not followed; empty if it was, or was not set.
__attribute__((visibility("default"))) const char* isa_complaint();

}  // namespace slm
