// Included once by each kernels_*.cpp, after its lanes: all of it is compiled for one instruction set. Nothing here may
// call an inline function of the standard library: the linker keeps one copy, perhaps one of the wrong instruction set.
#include <math.h>

#include <cstring>

#include "blocks.h"
#include "types.h"

// clang-format off: each uses what the ones before it define.
#include "math.inc.h"
#include "norm.inc.h"
#include "product.inc.h"
#include "blocks.inc.h"
#include "cache.inc.h"
#include "rows.inc.h"
#include "recurrent.inc.h"
#include "lora.inc.h"
#include "mamba.inc.h"
#include "attention.inc.h"
#include "whole.inc.h"
#include "scores.inc.h"
// clang-format on

namespace inflight {
namespace {

void product(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile, int64_t last_tile,
             Target target) {
    switch (w.format) {
        case Format::kFloat:
            return product_as<Format::kFloat, false, kDirectRows>(w, in, first, last, first_tile, last_tile, target);
        case Format::kBf16:
            return product_as<Format::kBf16, false, kDirectRows>(w, in, first, last, first_tile, last_tile, target);
        case Format::kInt8:
            return product_as<Format::kInt8, false, kInt8Rows>(w, in, first, last, first_tile, last_tile, target);
        case Format::kGroup8:
            if (w.offsets)
                return product_as<Format::kGroup8, true, kGroupedRows>(w, in, first, last, first_tile, last_tile,
                                                                       target);
            return product_as<Format::kGroup8, false, kGroupedRows>(w, in, first, last, first_tile, last_tile, target);
        case Format::kGroup4:
            if (w.offsets)
                return product_as<Format::kGroup4, true, kGroupedRows>(w, in, first, last, first_tile, last_tile,
                                                                       target);
            return product_as<Format::kGroup4, false, kGroupedRows>(w, in, first, last, first_tile, last_tile, target);
        default: return product_blocks(w, in, first, last, first_tile, last_tile, target);
    }
}

int64_t rows_of_tile(const Weights& w) {
    if (is_block(w.format)) return kBlockRows;
    return w.format == Format::kInt8 ? kInt8Rows : is_grouped(w.format) ? kGroupedRows : kDirectRows;
}

constexpr Kernels kTable = {
    INFLIGHT_NAME, rows_of_tile, kQueryRows, false,        false,      prepare,    product,     unpack, norm_row,
    rotate,        store_kv,     attend,     attend_whole, merge,      cap,        argmax,      axpy,   gate,
    layer_norm,    delta,        short_conv, mamba_conv,   mamba_head, mamba_norm, output_gate, xielu,  shrink,
    expand,        gate_panels,  scan,       weigh,        masses,     gather,
};

}  // namespace
}  // namespace inflight
