// The kernels for one instruction set; CMakeLists.txt has its flags.
#define INFLIGHT_NAME "scalar"
#include "simd_scalar.h"

#include "kernels.inc.h"

namespace inflight {
const Kernels* kernels_scalar() { return &kTable; }
}  // namespace inflight
