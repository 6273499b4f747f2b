// The kernels for one instruction set; CMakeLists.txt has its flags.
#define INFLIGHT_NAME "neon"
#include "simd_neon.h"

#include "kernels.inc.h"

namespace inflight {
const Kernels* kernels_neon() { return &kTable; }
}  // namespace inflight
