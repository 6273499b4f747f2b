// From row-major weights to panels (types.h), for every format.
#pragma once

#include "types.h"

namespace inflight {

enum class Source : int { kFloat, kBf16, kHalf };

// Sizes of a packed weight; `data`, `scales` and `bias` are still missing. Throws std::invalid_argument.
Weights describe(Format format, bool offsets, bool gated, int64_t n, int64_t k, int64_t group);
inline int64_t packed_bytes(const Weights& w) { return w.panels * w.panel_bytes; }

// One panel from floats [n, k] of type `source`: kept (kFloat, kBf16) or rounded to the nearest code, symmetric. `scales`
// are written where the format has one for each output.
void pack_panel(const Weights& w, int64_t panel, const void* from, Source source, char* to, float* scales);

// One panel from codes [n, k] with scales and offsets [n, groups] (offsets null: symmetric).
void pack_codes(const Weights& w, int64_t panel, const uint8_t* codes, const float* from_scales, const float* offsets,
                char* to, float* scales);

// Rows of blocks as they lie in a file, one after the other.
struct Part {
    const void* data;
    int64_t count;
};

// One panel of a block type from the rows of one or more tensors, one above the other, that are w.n together.
void pack_blocks(const Weights& w, int64_t panel, const Part* parts, int64_t count, char* to);

}  // namespace inflight
