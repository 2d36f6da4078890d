#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

namespace slm {
namespace {

constexpr Isa kAll[] = {Isa::avx512, Isa::avx2, Isa::portable};

struct Choice {
    std::atomic<Isa> isa{Isa::portable};
    std::string complaint;

    Choice() {
        for (Isa candidate : kAll)
            if (isa_supported(candidate)) {
                isa = candidate;
                break;
            }
        const char* wanted = std::getenv("SLMKERNELS_CPU_ISA");
        if (wanted == nullptr || *wanted == '\0') return;
        for (Isa candidate : kAll)
            if (std::strcmp(wanted, isa_name(candidate)) == 0) {
                if (isa_supported(candidate))
                    isa = candidate;
                else
                    complaint = std::string("this CPU does not run ") + wanted;
                return;
            }
        complaint = std::string("unknown tier ") + wanted + "; expected portable, avx2 or avx512";
    }
};

Choice& choice() {
    static Choice instance;
    return instance;
}

}  // namespace

const char* isa_name(Isa isa) {
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

bool isa_supported(Isa isa) {
    if (isa == Isa::portable) return true;
#if defined(__x86_64__)
    // The builtin asks XGETBV too: the operating system must save the wide registers.
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx2) return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

bool has_bf16_dot() {
#if defined(__x86_64__)
    return isa_supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

Isa get_isa() { return choice().isa; }

bool set_isa(Isa isa) {
    if (!isa_supported(isa)) return false;
    choice().isa = isa;
    return true;
}

const char* isa_complaint() { return choice().complaint.c_str(); }

}  // namespace slm
