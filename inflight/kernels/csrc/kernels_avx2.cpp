// The kernels for one instruction set; CMakeLists.txt has its flags.
#define INFLIGHT_NAME "avx2"
#include "simd_avx2.h"

#include "kernels.inc.h"

namespace inflight {
const Kernels* kernels_avx2() { return &kTable; }
}  // namespace inflight
