// Packed weights for the tests, and what they hold, read from the layout that types.h draws.
#pragma once

#include "pack.h"
#include "testing.h"

namespace inflight::testing {

struct Shape {
    Format format;
    bool offsets, gated;
    int64_t n, k, group;
};

struct Packed {
    Weights w;
    Exact<char> data;
    Exact<float> scales, bias;
};

// One input of one output: code * scale - offset.
struct Entry {
    double code, scale, offset;
    double value() const { return code * scale - offset; }
};

inline bool is_grouped(Format format) { return format == Format::kGroup8 || format == Format::kGroup4; }
inline bool is_integer(Format format) { return format == Format::kInt8 || is_grouped(format); }

Entry entry(const Weights& w, int64_t output, int64_t input);

// Random weights of a shape, packed from floats or from codes; checked to hold what they were made of.
Packed pack(Random& random, const Shape& shape, bool bias);

}  // namespace inflight::testing
