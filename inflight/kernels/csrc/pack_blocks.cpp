// Packs the blocks of a GGUF file into panels. Codes are moved as they are, scales of 6 bits become bytes; nothing is
// rounded.
#include <cstring>

#include "blocks.h"
#include "pack.h"

namespace inflight {

namespace {

// Writes groups of four bytes of one output to consecutive double lines.
inline void spread(const uint8_t* from, int64_t fours, char* lines) {
    for (int64_t i = 0; i < fours; i++) std::memcpy(lines + i * 128, from + i * 4, 4);
}

inline uint16_t half_at(const uint8_t* from) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    return bits;
}

inline void put_half(uint16_t bits, char* to, int64_t lane) { std::memcpy(to + lane * 2, &bits, 2); }

constexpr uint16_t kSign = 0x8000;  // of a float16: files add their offsets, panels subtract them

// Moves the fifth bits of 32 inputs from bit 4 s + i to bit s of byte i: the transpose of an 8 by 4 matrix of bits.
inline uint32_t transposed(uint32_t x) {
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        uint64_t row = x >> i & 0x11111111u;  // every fourth bit
        row = (row | row >> 3) & 0x0303030303030303u;
        row = (row | row >> 6) & 0x000f000f000f000fu;
        row = (row | row >> 12) & 0x000000ff000000ffu;
        out |= static_cast<uint32_t>(row & 0xff) << 8 * i;
    }
    return out;
}

// Q4_K and Q5_K: eight scales and eight offsets of 6 bits each.
inline void scales_of_6(const uint8_t* from, char* scales, char* offsets) {
    for (int64_t j = 0; j < 4; j++) {
        scales[j * 32] = static_cast<char>(from[j] & 63);
        offsets[j * 32] = static_cast<char>(from[j + 4] & 63);
        scales[(j + 4) * 32] = static_cast<char>((from[j + 8] & 15) | from[j] >> 6 << 4);
        offsets[(j + 4) * 32] = static_cast<char>(from[j + 8] >> 4 | from[j + 4] >> 6 << 4);
    }
}

// Q3_K: sixteen scales of 6 bits, which stand for -32 to 31.
inline void scales_of_q3(const uint8_t* from, char* scales) {
    for (int j = 0; j < 16; j++) {
        int low = j < 8 ? from[j] & 15 : from[j - 8] >> 4, high = from[8 + j % 4] >> 2 * (j / 4) & 3;
        scales[j * 32] = static_cast<char>((low | high << 4) - 32);
    }
}

// IQ4_XS: eight of them, in two places.
inline void scales_of_iq4(const uint8_t* from, char* scales) {
    uint16_t upper = half_at(from + 2);
    for (int j = 0; j < 8; j++) {
        int low = from[4 + j / 2] >> 4 * (j % 2) & 15, high = upper >> 2 * j & 3;
        scales[j * 32] = static_cast<char>((low | high << 4) - 32);
    }
}

// Writes one block of 256 inputs of one output into its lane of a unit.
template <Format T>
inline void place_superblock(const uint8_t* block, char* unit, int64_t lane) {
    char *bytes = unit + lane, *fours = unit + lane * 4;
    switch (T) {
        case Format::kQ2_K:
            put_half(half_at(block + 80), unit, lane);
            put_half(half_at(block + 82), unit + 64, lane);
            for (int64_t j = 0; j < 16; j++) bytes[128 + j * 32] = static_cast<char>(block[j]);
            spread(block + 16, 16, fours + 640);
            break;
        case Format::kQ3_K:
            put_half(half_at(block + 108), unit, lane);
            scales_of_q3(block + 96, bytes + 64);
            spread(block + 32, 16, fours + 576);
            spread(block, 8, fours + 576 + 2048);
            break;
        case Format::kQ4_K:
        case Format::kQ5_K:
            put_half(half_at(block), unit, lane);
            put_half(half_at(block + 2), unit + 64, lane);
            scales_of_6(block + 4, bytes + 128, bytes + 128 + 256);
            spread(block + (T == Format::kQ5_K ? 48 : 16), 32, fours + 640);
            if (T == Format::kQ5_K) spread(block + 16, 8, fours + 640 + 4096);
            break;
        case Format::kQ6_K:
            put_half(half_at(block + 208), unit, lane);
            for (int64_t j = 0; j < 16; j++) bytes[64 + j * 32] = static_cast<char>(block[192 + j]);
            spread(block, 32, fours + 576);
            spread(block + 128, 16, fours + 576 + 4096);
            break;
        case Format::kIq4Xs:
            put_half(half_at(block), unit, lane);
            scales_of_iq4(block, bytes + 64);
            spread(block + 8, 32, fours + 320);
            break;
        default: break;
    }
}

// Writes one block of one output into its lane of a unit.
template <Format T>
inline void place(const uint8_t* block, char* unit, int64_t lane) {
    char* fours = unit + lane * 4;
    switch (T) {
        case Format::kQ8_0: {
            put_half(half_at(block), unit, lane);
            for (int64_t i = 0; i < 8; i++) {
                uint32_t codes;
                std::memcpy(&codes, block + 2 + 4 * i, 4);
                codes ^= 0x80808080u;
                std::memcpy(fours + 64 + i * 128, &codes, 4);
            }
            break;
        }
        case Format::kQ4_0:
        case Format::kIq4Nl:
            put_half(half_at(block), unit, lane);
            spread(block + 2, 4, fours + 64);
            break;
        case Format::kQ4_1:
            put_half(half_at(block), unit, lane);
            put_half(half_at(block + 2) ^ kSign, unit + 64, lane);
            spread(block + 4, 4, fours + 128);
            break;
        case Format::kQ5_0:
        case Format::kQ5_1: {
            constexpr int64_t head = T == Format::kQ5_1 ? 4 : 2, wide = T == Format::kQ5_1 ? 128 : 64;
            put_half(half_at(block), unit, lane);
            if (T == Format::kQ5_1) put_half(half_at(block + 2) ^ kSign, unit + 64, lane);
            uint32_t upper;
            std::memcpy(&upper, block + head, 4);
            upper = transposed(upper);
            spread(block + head + 4, 4, fours + wide);
            std::memcpy(fours + wide + 512, &upper, 4);
            break;
        }
        case Format::kMxfp4: break;  // two blocks of a file are one unit, see below
        default: place_superblock<T>(block, unit, lane);
    }
}

constexpr int64_t kAhead = 512;  // prefetch distance in each row, in bytes

template <Format T>
void pack(const Weights& w, const uint8_t* const (&lanes)[kPanel], char* to) {
    constexpr BlockForm form = block_form(T);
    int64_t blocks = w.k / form.file_inputs;
    for (int64_t block = 0; block < blocks; block++) {
        char* unit = to + block * form.file_inputs / form.inputs * form.bytes;
        for (int64_t lane = 0; lane < kPanel; lane++) {
            if (!lanes[lane]) continue;
            const uint8_t* from = lanes[lane] + block * form.file_bytes;
            for (int64_t line = 0; line < form.file_bytes; line += 64) __builtin_prefetch(from + kAhead + line);
            if (T == Format::kMxfp4) {
                int64_t second = block % 2;
                unit[second * 32 + lane] = static_cast<char>(from[0] ? from[0] - 1 : 0);
                spread(from + 1, 4, unit + 64 + second * 512 + lane * 4);
            } else {
                place<T>(from, unit, lane);
            }
        }
    }
}

}  // namespace

void pack_blocks(const Weights& w, int64_t panel, const BlockRows* tensors, int64_t count, char* to) {
    int64_t row_bytes = w.k / block_form(w.format).file_inputs * block_form(w.format).file_bytes;
    const uint8_t* lanes[kPanel] = {};
    bool whole = w.k == w.depth;
    for (int64_t lane = 0; lane < kPanel; lane++) {
        int64_t output = w.output(panel, lane);
        for (int64_t tensor = 0; tensor < count && output < w.n; output -= tensors[tensor++].count)
            if (output < tensors[tensor].count) {
                lanes[lane] = static_cast<const uint8_t*>(tensors[tensor].data) + output * row_bytes;
                break;
            }
        whole &= lanes[lane] != nullptr;
    }
    if (!whole) std::memset(to, 0, static_cast<size_t>(w.panel_bytes));
    switch (w.format) {
        case Format::kQ8_0: return pack<Format::kQ8_0>(w, lanes, to);
        case Format::kQ4_0: return pack<Format::kQ4_0>(w, lanes, to);
        case Format::kQ4_1: return pack<Format::kQ4_1>(w, lanes, to);
        case Format::kQ5_0: return pack<Format::kQ5_0>(w, lanes, to);
        case Format::kQ5_1: return pack<Format::kQ5_1>(w, lanes, to);
        case Format::kQ2_K: return pack<Format::kQ2_K>(w, lanes, to);
        case Format::kQ3_K: return pack<Format::kQ3_K>(w, lanes, to);
        case Format::kQ4_K: return pack<Format::kQ4_K>(w, lanes, to);
        case Format::kQ5_K: return pack<Format::kQ5_K>(w, lanes, to);
        case Format::kQ6_K: return pack<Format::kQ6_K>(w, lanes, to);
        case Format::kIq4Nl: return pack<Format::kIq4Nl>(w, lanes, to);
        case Format::kIq4Xs: return pack<Format::kIq4Xs>(w, lanes, to);
        case Format::kMxfp4: return pack<Format::kMxfp4>(w, lanes, to);
        default: return;
    }
}

}  // namespace inflight
