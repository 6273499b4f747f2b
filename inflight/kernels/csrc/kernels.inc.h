// Included once by each kernels_*.cpp, after its lanes: all of it is compiled for one instruction set. Nothing here may be
// an inline function of the standard library's, whose one copy could come from the wrong instruction set.
#include <math.h>

#include <cstring>

#include "types.h"

#include "math.inc.h"
#include "product.inc.h"
#include "rows.inc.h"
#include "attention.inc.h"

namespace inflight {
namespace {

constexpr Kernels kTable = {
    INFLIGHT_NAME,
    {kDirectRows, kDirectRows, kInt8Rows, kGroupedRows, kGroupedRows},
    prepare, product, unpack, norm_row, rotate, keep, attend, merge, cap, argmax, axpy,
};

}  // namespace
}  // namespace inflight
