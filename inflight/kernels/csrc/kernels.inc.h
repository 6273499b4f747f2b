// Included once by each kernels_*.cpp, after its lanes: all of it is compiled for one instruction set. Nothing here may be
// an inline function of the standard library's, whose one copy could come from the wrong instruction set.
#include <math.h>

#include <cstring>

#include "blocks.h"
#include "types.h"

#include "math.inc.h"
#include "norm.inc.h"
#include "product.inc.h"
#include "blocks.inc.h"
#include "rows.inc.h"
#include "attention.inc.h"

namespace inflight {
namespace {

constexpr Kernels kTable = {
    INFLIGHT_NAME,
    {kDirectRows, kDirectRows, kInt8Rows, kGroupedRows, kGroupedRows,
     kBlockRows, kBlockRows, kBlockRows, kBlockRows, kBlockRows, kBlockRows, kBlockRows,
     kBlockRows, kBlockRows, kBlockRows, kBlockRows, kBlockRows, kBlockRows},
    prepare, product, unpack, norm_row, rotate, keep, attend, merge, cap, argmax, axpy, gate,
};

}  // namespace
}  // namespace inflight
