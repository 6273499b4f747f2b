// Packs row-major weights into panels (types.h), for every format.
#pragma once

#include "types.h"

namespace inflight {

enum class Source : int { kFloat, kBf16, kHalf };

// A packed weight's sizes; `data`, `scales` and `bias` are null. Throws std::invalid_argument.
Weights describe(Format format, bool offsets, bool gated, int64_t n, int64_t k, int64_t group);
inline int64_t packed_bytes(const Weights& w) { return w.panels * w.panel_bytes; }

// A row of floats [n, k] of type `source`, as float32.
void read_floats(const void* from, Source source, int64_t row, int64_t k, float* out);

// Packs one panel from floats [n, k] of type `source`. The formats of floats keep them; the others round to the nearest
// code, symmetric. Writes `scales` for the format that has one for each output.
void pack_panel(const Weights& w, int64_t panel, const void* from, Source source, char* to, float* scales);

// Packs one panel from codes [n, k] with scales and offsets [n, groups] (offsets null: symmetric).
void pack_codes(const Weights& w, int64_t panel, const uint8_t* codes, const float* from_scales, const float* offsets,
                char* to, float* scales);

// Consecutive rows of blocks of one tensor, as a GGUF file holds them.
struct BlockRows {
    const void* data;
    int64_t count;
};

// Packs one panel of a block type from the rows of tensors that are stacked: w.n rows in all.
void pack_blocks(const Weights& w, int64_t panel, const BlockRows* tensors, int64_t count, char* to);

}  // namespace inflight
