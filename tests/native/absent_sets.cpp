// Stands for the instruction sets that a build leaves out (CMakeLists.txt, INFLIGHT_SETS): the test passes over a set
// that has another name.
#include "types.h"

namespace inflight {
#if defined(INFLIGHT_ABSENT_avx2)
const Kernels* kernels_avx2() { return kernels_scalar(); }
#endif
#if defined(INFLIGHT_ABSENT_avx512)
const Kernels* kernels_avx512() { return kernels_scalar(); }
#endif
#if defined(INFLIGHT_ABSENT_avx512_vnni)
const Kernels* kernels_avx512_vnni() { return kernels_scalar(); }
#endif
#if defined(INFLIGHT_ABSENT_avx512_bf16)
const Kernels* kernels_avx512_bf16() { return kernels_scalar(); }
#endif
#if defined(INFLIGHT_ABSENT_amx)
const Kernels* kernels_amx() { return kernels_scalar(); }
#endif
#if defined(INFLIGHT_ABSENT_neon)
const Kernels* kernels_neon() { return kernels_scalar(); }
#endif
}  // namespace inflight
