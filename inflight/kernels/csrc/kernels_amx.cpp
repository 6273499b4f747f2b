// The kernels for one instruction set; CMakeLists.txt has its flags. Only products with block types differ from avx512_bf16:
// all else is taken from there.
#define INFLIGHT_NAME "amx"
#define INFLIGHT_VNNI 1
#define INFLIGHT_BF16 1
#define INFLIGHT_TILES 1
#include "simd_avx512.h"

#include <math.h>

#include <cstring>

#include "blocks.h"
#include "types.h"

#include "math.inc.h"
#include "norm.inc.h"
#include "product.inc.h"
#include "blocks.inc.h"

namespace inflight {
namespace {

const Kernels& others() { return *kernels_avx512_bf16(); }

void prepare(const Weights& w, const float* const* rows, Norm norm, const Input& in, int64_t tile) {
    if (is_block(w.format)) return prepare_blocks(w, rows, norm, in, tile);
    others().prepare(w, rows, norm, in, tile);
}

void product(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile, int64_t last_tile, Target target) {
    if (is_block(w.format)) return product_blocks(w, in, first, last, first_tile, last_tile, target);
    others().product(w, in, first, last, first_tile, last_tile, target);
}

void unpack(const Weights& w, int64_t row, float scale, float* out) {
    if (is_block(w.format)) return unpack_blocks(w, row, scale, out);
    others().unpack(w, row, scale, out);
}

Kernels table() {
    Kernels out = others();
    out.name = INFLIGHT_NAME;
    for (int format = static_cast<int>(Format::kQ8_0); format < kFormats; format++)
        out.tile_rows[format] = most_rows(block_form(static_cast<Format>(format)));
    out.prepare = prepare;
    out.product = product;
    out.unpack = unpack;
    out.norm = norm_row;
    return out;
}

}  // namespace

const Kernels* kernels_amx() {
    static const Kernels all = table();
    return &all;
}
}  // namespace inflight
