// Adapters of low rank (Hu et al., 2021, "LoRA"): y += scale * B (A x) for the tokens of rows that wear one. Sums are
// floats on every instruction set, in an order that depends on nothing else; factors are bfloat16 or floats.
#pragma once

#include <cstdint>

namespace inflight {

constexpr int64_t kLowTokens = 4;  // tokens whose updates are computed together
constexpr int64_t kLowPanel = 64;  // outputs of a panel of a second factor

// The first factors of all modules of an operation, one above the other.
struct LowFirst {
    const char* data = nullptr;  // [rows][depth]
    bool floats = false;
    int64_t rows = 0, k = 0;
    int64_t depth = 0;  // k, rounded up to whole lines; the rest is zeros
};

// The second factor of a module, or some of its rows.
struct LowSecond {
    const char* data;  // [panels][rank][64 outputs]; the rest of the last panel is zeros
    bool floats;
    int64_t rank, hidden;  // inputs, and which of the operation's they begin with
    int64_t n, column;     // outputs, and the column of the product where they begin
    int half;              // of a gated product's panels; -1: the product is not gated, or its halves lie apart
    float scale;

    int64_t panels() const { return (n + kLowPanel - 1) / kLowPanel; }
};

}  // namespace inflight
