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

// One input of one output: code * scale - offset.
struct Entry {
    double code, scale, offset;
    double value() const { return code * scale - offset; }
};

struct Packed {
    Weights w;
    Exact<char> data;
    Exact<float> scales, bias;
    std::vector<Entry> entries;  // [n][k], of block types
};

constexpr std::initializer_list<Format> kBlockTypes = {
    Format::kQ8_0, Format::kQ4_0, Format::kQ4_1, Format::kQ5_0,  Format::kQ5_1,  Format::kQ2_K, Format::kQ3_K,
    Format::kQ4_K, Format::kQ5_K, Format::kQ6_K, Format::kIq4Nl, Format::kIq4Xs, Format::kMxfp4};

// Random blocks of two tensors, one above the other, packed.
Packed pack_random_blocks(Random& random, Format format, bool gated, int64_t n, int64_t k);

Entry entry(const Weights& w, int64_t output, int64_t input);

void add_bias(Random& random, Packed& p);

// Random weights of a shape, packed from floats or from codes; checked to hold what they were made of.
Packed pack(Random& random, const Shape& shape, bool bias);

}  // namespace inflight::testing
