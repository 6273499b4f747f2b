// The kernels for one instruction set; CMakeLists.txt has its flags.
#define INFLIGHT_NAME "avx512_bf16"
#define INFLIGHT_VNNI 1
#define INFLIGHT_BF16 1
#include "simd_avx512.h"

#include "kernels.inc.h"

namespace inflight {
const Kernels* kernels_avx512_bf16() { return &kTable; }
}  // namespace inflight
