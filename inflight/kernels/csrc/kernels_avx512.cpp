// The kernels for one instruction set; CMakeLists.txt has its flags.
#define INFLIGHT_NAME "avx512"
#define INFLIGHT_VNNI 0
#define INFLIGHT_BF16 0
#include "simd_avx512.h"

#include "kernels.inc.h"

namespace inflight {
const Kernels* kernels_avx512() { return &kTable; }
}  // namespace inflight
