// llama.cpp's block types (ggml-common.h): their layout in a file and in a panel.
//
// A panel is a sequence of units. A unit is a head with the scales of its 32 outputs, then planes of codes in double
// lines of 128 bytes with 4 bytes of each output. Consecutive groups of four bytes of a block in the file go to
// consecutive double lines, so packing only moves groups of four bytes. The inputs of a byte's bits are therefore in
// the file's order:
// - 4 bits of Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, IQ4_XS, MXFP4: of each 32 inputs the first half low, the second half
// high;
//   of Q4_K and Q5_K: of each 64 the first 32 low; of Q6_K: of each 128 inputs 32 low, the next 32 in the following
//   lines, then the others high in the same order;
// - 2 bits of Q2_K, Q3_K and (the upper ones) of Q6_K: of each 128 inputs 32 in each pair of bits, from the lowest up;
// - 1 bit of Q3_K and Q5_K: of the 256 inputs 32 in each bit; of Q5_0 and Q5_1, which packing transposes: bit s of byte
// i
//   is input 4 s + i.
// Heads: float16 scales [32], then offsets [32] if the type has offsets. K types and IQ4_XS have one such scale for 256
// inputs; 8 bits [group][32] follow for each group, with a sign, then the offsets' [group][32] (Q2_K: both in one byte,
// the scale low). MXFP4 has the exponents of two blocks, less one.
#pragma once

#include "types.h"

namespace inflight {

struct BlockForm {
    int64_t file_inputs, file_bytes;  // of a block in a file
    int64_t inputs, bytes;            // of a unit of a panel
    int64_t group;                    // inputs that share a scale
    bool offsets;
    int zero;  // the code that stands for 0, for types without offsets
};

constexpr BlockForm block_form(Format format) {
    switch (format) {
        case Format::kQ8_0: return {32, 34, 32, 64 + 1024, 32, false, 128};
        case Format::kQ4_0: return {32, 18, 32, 64 + 512, 32, false, 8};
        case Format::kQ4_1: return {32, 20, 32, 128 + 512, 32, true, 0};
        case Format::kQ5_0: return {32, 22, 32, 64 + 512 + 128, 32, false, 16};
        case Format::kQ5_1: return {32, 24, 32, 128 + 512 + 128, 32, true, 0};
        case Format::kQ2_K: return {256, 84, 256, 128 + 512 + 2048, 16, true, 0};
        case Format::kQ3_K: return {256, 110, 256, 64 + 512 + 2048 + 1024, 16, false, 4};
        case Format::kQ4_K: return {256, 144, 256, 128 + 512 + 4096, 32, true, 0};
        case Format::kQ5_K: return {256, 176, 256, 128 + 512 + 4096 + 1024, 32, true, 0};
        case Format::kQ6_K: return {256, 210, 256, 64 + 512 + 4096 + 2048, 16, false, 32};
        case Format::kIq4Nl: return {32, 18, 32, 64 + 512, 32, false, 128};
        case Format::kIq4Xs: return {256, 136, 256, 64 + 256 + 4096, 32, false, 128};
        case Format::kMxfp4: return {32, 17, 64, 64 + 1024, 32, false, 128};
        default: return {};
    }
}

// Values of the types whose codes are numbers of a table, and 128; MXFP4's are doubled, its scales halved.
constexpr uint8_t kIq4Values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
constexpr uint8_t kMxfp4Values[16] = {128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116};

}  // namespace inflight
