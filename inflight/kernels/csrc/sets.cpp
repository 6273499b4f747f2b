// Instruction sets: which this machine has, and the best of them.
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "store.h"

namespace inflight {

namespace {

#if defined(__x86_64__)
// AMX: the processor has tiles and their sums of integers and of bfloat16, and the system lets this process use them.
bool tiles() {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return !syscall(SYS_arch_prctl, kRequest, kTileData);
#else
    return false;
#endif
}
#endif

bool supported(const std::string& name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool dots = wide && __builtin_cpu_supports("avx512vnni");
    if (name == "amx") return dots && __builtin_cpu_supports("avx512bf16") && tiles();
    if (name == "avx512_bf16") return dots && __builtin_cpu_supports("avx512bf16");
    if (name == "avx512_vnni") return dots;
    if (name == "avx512") return wide;
    if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
    if (name == "neon") return true;
#endif
    return name == "scalar";
}

struct Set {
    const char* name;
    const Kernels* (*get)();
};

const std::vector<Set>& sets() {
    static const std::vector<Set> all = {
#if defined(__x86_64__)
        {"amx", kernels_amx},
        {"avx512_bf16", kernels_avx512_bf16},
        {"avx512_vnni", kernels_avx512_vnni},
        {"avx512", kernels_avx512},
        {"avx2", kernels_avx2},
#elif defined(__aarch64__)
        {"neon", kernels_neon},
#endif
        {"scalar", kernels_scalar},
    };
    return all;
}

}  // namespace

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Set& set : sets())
        if (supported(set.name)) names.push_back(set.name);
    return names;
}

const Kernels* choose(const std::string& name) {
    std::string known;
    for (const Set& set : sets()) {
        if ((name.empty() || name == set.name) && supported(set.name)) return set.get();
        if (supported(set.name)) known += std::string(known.empty() ? "" : ", ") + set.name;
    }
    throw std::invalid_argument("the instruction set '" + name + "' is not to be had on this machine; it has " + known);
}

}  // namespace inflight
