// The kernels for one instruction set; CMakeLists.txt has its flags. Only products with bfloat16, with integers of one
// scale an output, with floats' parts and with block types differ from avx512_bf16: everything else is taken from
// there.
#define INFLIGHT_NAME "amx"
#define INFLIGHT_VNNI 1
#define INFLIGHT_BF16 1
#define INFLIGHT_TILES 1
#include "simd_avx512.h"

#include <math.h>

#include <cstring>

#include "blocks.h"
#include "types.h"

// clang-format off: each uses what the ones before it define.
#include "math.inc.h"
#include "norm.inc.h"
#include "product.inc.h"
#include "blocks.inc.h"
#include "amx_parts.inc.h"
#include "amx_direct.inc.h"
#include "amx_split.inc.h"
#include "amx_grouped.inc.h"
#include "cache.inc.h"
#include "amx_attention.inc.h"
// clang-format on

namespace inflight {
namespace {

const Kernels& others() { return *kernels_avx512_bf16(); }

void prepare(const Weights& w, const float* const* rows, Norm norm, const Input& in, int64_t tile) {
    if (is_block(w.format)) return prepare_blocks(w, rows, norm, in, tile);
    if (w.split) return prepare_split(w, rows, norm, in, tile);
    if (w.format == Format::kBf16) return prepare_direct<Format::kBf16>(w, rows, norm, in, tile);
    if (w.format == Format::kInt8) return prepare_direct<Format::kInt8>(w, rows, norm, in, tile);
    if (tiled_groups(w) && in.start(tile + 1) - in.start(tile) > kGroupedRows)
        return prepare_grouped(w, rows, norm, in, tile);
    others().prepare(w, rows, norm, in, tile);
}

// Larger row tiles come first and go to AMX's tiles; the last ones, of few rows, go to dot products.
void product_groups(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile,
                    int64_t last_tile, const Target& target) {
    int64_t few = first_tile;
    while (tiled_groups(w) && few < last_tile && in.start(few + 1) - in.start(few) > kGroupedRows) few++;
    if (few > first_tile) {
        bool four = w.format == Format::kGroup4;
        auto run = four        ? w.offsets ? product_grouped<true, true> : product_grouped<true, false>
                          : w.offsets ? product_grouped<false, true>
                               : product_grouped<false, false>;
        run(w, in, first, last, first_tile, few, target);
    }
    if (few < last_tile) others().product(w, in, first, last, few, last_tile, target);
}

void product(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile, int64_t last_tile,
             Target target) {
    if (is_block(w.format)) return product_blocks(w, in, first, last, first_tile, last_tile, target);
    if (w.split) return product_split(w, in, first, last, first_tile, last_tile, target);
    if (w.format == Format::kBf16)
        return product_direct<Format::kBf16>(w, in, first, last, first_tile, last_tile, target);
    if (w.format == Format::kInt8)
        return product_direct<Format::kInt8>(w, in, first, last, first_tile, last_tile, target);
    if (is_grouped(w.format)) return product_groups(w, in, first, last, first_tile, last_tile, target);
    others().product(w, in, first, last, first_tile, last_tile, target);
}

void unpack(const Weights& w, int64_t row, float scale, float* out) {
    if (is_block(w.format)) return unpack_blocks(w, row, scale, out);
    others().unpack(w, row, scale, out);
}

int64_t rows_of_tile(const Weights& w) {
    if (is_block(w.format)) return most_rows(block_form(w.format));
    bool tiles = w.format == Format::kBf16 || w.format == Format::kInt8 || tiled_groups(w) || w.split;
    return tiles ? kBlockRows : others().tile_rows(w);
}

void attend_any(const Attention& a, const Queries& q, float* scratch) {
    if (a.type == KvType::kFloat) return others().attend(a, q, scratch);
    attend(a, q, scratch);
}

Kernels table() {
    Kernels out = others();
    out.name = INFLIGHT_NAME;
    out.tile_rows = rows_of_tile;
    out.query_rows = 16;
    out.lines = true;
    out.splits = true;
    out.prepare = prepare;
    out.product = product;
    out.unpack = unpack;
    out.norm = norm_row;
    out.attend = attend_any;
    return out;
}

}  // namespace

const Kernels* kernels_amx() {
    static const Kernels all = table();
    return &all;
}
}  // namespace inflight
