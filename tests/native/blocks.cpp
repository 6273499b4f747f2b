// Random blocks of llama.cpp's types, and what they stand for by ggml's own formulas (ggml-quants.c), written anew.
#include "blocks.h"

#include "weights.h"

namespace inflight::testing {
namespace {

constexpr double kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr double kE2m1[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};

// A scale and an offset of 6 bits of Q4_K and Q5_K.
void six_bits(int64_t j, const uint8_t* q, int& scale, int& offset) {
    if (j < 4) {
        scale = q[j] & 63;
        offset = q[j + 4] & 63;
    } else {
        scale = (q[j + 4] & 15) | ((q[j - 4] >> 6) << 4);
        offset = (q[j + 4] >> 4) | ((q[j] >> 6) << 4);
    }
}

int nibble(const uint8_t* q, int64_t i) { return i < 16 ? q[i] & 15 : q[i - 16] >> 4; }

float product(double a, int b) { return static_cast<float>(a) * static_cast<float>(b); }

Entry of_block(Format format, const uint8_t* b, int64_t i) {
    switch (format) {
        case Format::kQ8_0: return {static_cast<double>(static_cast<int8_t>(b[2 + i])), read_half(b), 0.0};
        case Format::kQ4_0: return {nibble(b + 2, i) - 8.0, read_half(b), 0.0};
        case Format::kQ4_1: return {static_cast<double>(nibble(b + 4, i)), read_half(b), -read_half(b + 2)};
        case Format::kQ5_0:
            return {(nibble(b + 6, i) | static_cast<int>(read<uint32_t>(b + 2) >> i & 1) << 4) - 16.0, read_half(b),
                    0.0};
        case Format::kQ5_1:
            return {static_cast<double>(nibble(b + 8, i) | static_cast<int>(read<uint32_t>(b + 4) >> i & 1) << 4),
                    read_half(b), -read_half(b + 2)};
        case Format::kIq4Nl: return {kIq4[nibble(b + 2, i)], read_half(b), 0.0};
        case Format::kMxfp4:  // a scale below the smallest normal float is as good as 0
            return {2 * kE2m1[nibble(b + 1, i)], b[0] > 1 ? std::ldexp(1.0, b[0] - 128) : 0.0, 0.0};
        case Format::kQ2_K: {
            int both = b[i / 16], code = b[16 + i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3;
            return {static_cast<double>(code), product(read_half(b + 80), both & 15),
                    product(read_half(b + 82), both >> 4)};
        }
        case Format::kQ3_K: {
            int64_t j = i / 16;
            const uint8_t* scales = b + 96;
            int scale =
                ((j < 8 ? scales[j] & 15 : scales[j - 8] >> 4) | (scales[8 + j % 4] >> 2 * (j / 4) & 3) << 4) - 32;
            int low = b[32 + i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3, high = b[i % 32] >> i / 32 & 1;
            return {low - (high ? 0.0 : 4.0), product(read_half(b + 108), scale), 0.0};
        }
        case Format::kQ4_K:
        case Format::kQ5_K: {
            int scale, offset;
            six_bits(i / 32, b + 4, scale, offset);
            const uint8_t* q = b + (format == Format::kQ5_K ? 48 : 16) + i / 64 * 32 + i % 32;
            int code = i % 64 < 32 ? *q & 15 : *q >> 4;
            if (format == Format::kQ5_K) code += (b[16 + i % 32] >> i / 32 & 1) * 16;
            return {static_cast<double>(code), product(read_half(b), scale), product(read_half(b + 2), offset)};
        }
        case Format::kQ6_K: {
            int64_t half = i / 128, part = i % 128 / 32, l = i % 32;
            uint8_t low = b[half * 64 + part % 2 * 32 + l], high = b[128 + half * 32 + l];
            int code = (part < 2 ? low & 15 : low >> 4) | (high >> 2 * part & 3) << 4;
            return {code - 32.0, product(read_half(b + 208), static_cast<int8_t>(b[192 + i / 16])), 0.0};
        }
        case Format::kIq4Xs: {
            int64_t j = i / 32;
            int scale = (b[4 + j / 2] >> 4 * (j % 2) & 15) | (read<uint16_t>(b + 2) >> 2 * j & 3) << 4;
            return {kIq4[nibble(b + 8 + j * 16, i % 32)], product(read_half(b), scale - 32), 0.0};
        }
        default: fail("no block type");
    }
}

// Where a block has floats of 16 bits.
std::vector<int64_t> halves(Format format) {
    switch (format) {
        case Format::kQ4_1:
        case Format::kQ5_1:
        case Format::kQ4_K:
        case Format::kQ5_K: return {0, 2};
        case Format::kQ2_K: return {80, 82};
        case Format::kQ3_K: return {108};
        case Format::kQ6_K: return {208};
        case Format::kMxfp4: return {};
        default: return {0};
    }
}

}  // namespace

Packed pack_random_blocks(Random& random, Format format, bool gated, int64_t n, int64_t k) {
    BlockForm form = block_form(format);
    Packed p;
    p.w = describe(format, false, gated, n, k, 0);
    p.data = Exact<char>(packed_bytes(p.w), 0x55);
    int64_t blocks = k / form.file_inputs, first = random.between(1, n);
    Exact<uint8_t> files[2] = {Exact<uint8_t>(first * blocks * form.file_bytes),
                               Exact<uint8_t>(std::max<int64_t>(1, (n - first) * blocks * form.file_bytes))};
    p.entries.reserve(static_cast<size_t>(n * k));
    for (int64_t row = 0; row < n; row++)
        for (int64_t block = 0; block < blocks; block++) {
            uint8_t* at = row < first ? files[0].get() + (row * blocks + block) * form.file_bytes
                                      : files[1].get() + ((row - first) * blocks + block) * form.file_bytes;
            for (int64_t i = 0; i < form.file_bytes; i++)
                at[i] = static_cast<uint8_t>(
                    random.pick<int64_t>({0, 255, random.between(0, 255), random.between(0, 255)}));
            for (int64_t half : halves(format)) {
                uint16_t bits =
                    static_cast<uint16_t>(random.bits()) & (random.maybe() ? 0xafff : 0x83ff);  // small, or tiny
                std::memcpy(at + half, &bits, 2);
            }
            if (format == Format::kMxfp4) at[0] = static_cast<uint8_t>(random.pick<int64_t>({0, 1, 2, 120, 125, 130}));
            for (int64_t i = 0; i < form.file_inputs; i++) p.entries.push_back(of_block(format, at, i));
        }
    BlockRows parts[2] = {{files[0].get(), first}, {files[1].get(), n - first}};
    for (int64_t panel = 0; panel < p.w.panels; panel++)
        pack_blocks(p.w, panel, parts, first < n ? 2 : 1, p.data.get() + panel * p.w.panel_bytes);
    p.w.data = p.data.get();
    return p;
}

}  // namespace inflight::testing
