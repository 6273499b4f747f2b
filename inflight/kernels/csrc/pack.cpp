#include "pack.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "blocks.h"

namespace inflight {

namespace {

float wide(uint16_t bits) {
    uint32_t all = static_cast<uint32_t>(bits) << 16;
    float out;
    std::memcpy(&out, &all, 4);
    return out;
}

float from_half(uint16_t h) {
    int exponent = h >> 10 & 31, rest = h & 0x3ff;
    float size = exponent == 31 ? (rest ? NAN : INFINITY)
                 : exponent     ? std::ldexp(static_cast<float>(rest + 1024), exponent - 25)
                                : std::ldexp(static_cast<float>(rest), -24);
    return h & 0x8000 ? -size : size;
}

// To the nearest, ties to even; beyond the largest: infinity.
uint16_t to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    float size = std::fabs(x);
    if (std::isnan(x)) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
    if (size < 6.103515625e-5f)
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.0f)));
    std::memcpy(&bits, &size, 4);
    bits += 0x0fff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)));
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

bool of_four_bits(Format format) {
    return format == Format::kGroup4 || format == Format::kQ4_0 || format == Format::kQ4_1;
}

// Codes of one output into its lane. `codes` [depth].
void place_codes(const Weights& w, int64_t lane, const uint8_t* codes, const float* scales, const float* offsets,
                 char* to) {
    int64_t size = w.format == Format::kInt8 ? w.depth : w.group;
    for (int64_t g = 0; g * size < w.depth; g++) {
        if (w.format != Format::kInt8) {
            uint16_t half = to_half(scales[g]);
            std::memcpy(to + lane / kLanes * 32 + lane % kLanes * 2, &half, 2);
            to += 64;
            if (w.offsets) {
                half = to_half(offsets[g]);
                std::memcpy(to + lane / kLanes * 32 + lane % kLanes * 2, &half, 2);
                to += 64;
            }
        }
        const uint8_t* from = codes + g * size;
        if (of_four_bits(w.format)) {
            int64_t apart = w.format == Format::kGroup4 ? 4 : 16;  // the inputs that share bytes
            for (int64_t i = 0; i < size; i += 8, to += 128) {
                int64_t first = w.format == Format::kGroup4 ? i : i / 2;
                uint32_t low, high;
                std::memcpy(&low, from + first, 4);
                std::memcpy(&high, from + first + apart, 4);
                low |= high << 4;
                std::memcpy(to + lane * 4, &low, 4);
            }
        } else {
            for (int64_t i = 0; i < size; i += 4, to += 128) std::memcpy(to + lane * 4, from + i, 4);
        }
    }
}

void quantise(const Weights& w, const float* x, uint8_t* codes, float* scales) {
    bool four = of_four_bits(w.format);
    int64_t size = w.format == Format::kInt8 ? w.depth : w.group;
    float middle = four ? 8.0f : 128.0f, most = four ? 15.0f : 255.0f;
    for (int64_t g = 0; g * size < w.depth; g++) {
        const float* from = x + g * size;
        float peak = 0.0f, extreme = 0.0f;
        for (int64_t i = 0; i < size; i++)
            if (std::fabs(from[i]) > peak) peak = std::fabs(from[i]), extreme = from[i];
        float scale = four ? extreme / -8.0f : peak / 127.0f;
        if (w.format != Format::kInt8) scale = from_half(to_half(scale));
        scales[g] = scale;
        float inverse = std::isnormal(scale) && std::isfinite(1.0f / scale) ? 1.0f / scale : 0.0f;
        for (int64_t i = 0; i < size; i++) {
            float code = std::nearbyint(from[i] * inverse) + middle;
            codes[g * size + i] = static_cast<uint8_t>(code >= most  ? most
                                                       : code > 0.0f ? code
                                                                     : 0.0f);  // what is no number too
        }
    }
}

}  // namespace

void read_floats(const void* from, Source source, int64_t row, int64_t k, float* out) {
    if (source == Source::kFloat) {
        std::memcpy(out, static_cast<const float*>(from) + row * k, static_cast<size_t>(k) * 4);
        return;
    }
    const uint16_t* bits = static_cast<const uint16_t*>(from) + row * k;
    if (source == Source::kBf16)
        for (int64_t i = 0; i < k; i++) out[i] = wide(bits[i]);
    else
        for (int64_t i = 0; i < k; i++) out[i] = from_half(bits[i]);
}

Weights describe(Format format, bool offsets, bool gated, int64_t n, int64_t k, int64_t group) {
    constexpr int64_t kMostBytes = int64_t(1) << 48;  // more than any machine has
    if (n < 1 || k < 1 || n > INT32_MAX || k > INT32_MAX || n > kMostBytes / 4 / k || (gated && n % 2))
        throw std::invalid_argument("a weight of " + std::to_string(n) + " by " + std::to_string(k) +
                                    " cannot be packed");
    if (is_grouped(format) && (group < 8 || group % 8 || group > 32768))
        throw std::invalid_argument("groups of " + std::to_string(group) +
                                    " inputs cannot be packed; a multiple of 8 can");
    if (format == Format::kInt8 && k > 65536)
        throw std::invalid_argument("a sum over " + std::to_string(k) + " inputs does not fit 32 bits; use groups");
    Weights w{};
    w.format = format;
    const BlockForm form = block_form(format);
    w.offsets = is_block(format) ? form.offsets : offsets && is_grouped(format);
    w.zero = is_block(format) ? form.zero : w.offsets ? 0 : format == Format::kGroup4 ? 8 : 128;
    w.gated = gated;
    w.n = n;
    w.k = k;
    int64_t unit = is_block(format) ? form.inputs : is_grouped(format) ? group : step_of(format);
    w.depth = (k + unit - 1) / unit * unit;
    w.group = is_block(format) ? form.group : is_grouped(format) ? group : w.depth;
    w.panels = gated ? (n / 2 + kLanes - 1) / kLanes : (n + kPanel - 1) / kPanel;
    switch (format) {
        case Format::kFloat: w.panel_bytes = w.depth * kPanel * 4; break;
        case Format::kBf16: w.panel_bytes = w.depth * kPanel * 2; break;
        case Format::kInt8: w.panel_bytes = w.depth * kPanel; break;
        case Format::kGroup8: w.panel_bytes = w.groups() * (w.offsets ? 128 : 64) + w.depth * kPanel; break;
        case Format::kGroup4: w.panel_bytes = w.groups() * (w.offsets ? 128 : 64) + w.depth * kPanel / 2; break;
        default: w.panel_bytes = w.depth / form.inputs * form.bytes; break;
    }
    return w;
}

void pack_panel(const Weights& w, int64_t panel, const void* from, Source source, char* to, float* scales) {
    std::memset(to, 0, static_cast<size_t>(w.panel_bytes));
    std::vector<float> row(static_cast<size_t>(w.depth));
    std::vector<uint8_t> codes(static_cast<size_t>(w.depth));
    std::vector<float> row_scales(static_cast<size_t>(w.groups()));
    bool whole = w.format == Format::kBf16 && source == Source::kBf16 && w.k % 2 == 0;
    for (int64_t lane = 0; lane < kPanel; lane++) {
        int64_t output = w.output(panel, lane);
        if (output >= w.n) continue;
        if (whole) {  // the common case, without a detour
            const char* pairs = static_cast<const char*>(from) + output * w.k * 2;
            for (int64_t i = 0; i < w.k / 2; i++) std::memcpy(to + i * 128 + lane * 4, pairs + i * 4, 4);
            continue;
        }
        read_floats(from, source, output, w.k, row.data());
        if (w.format == Format::kFloat) {
            for (int64_t i = 0; i < w.k; i++) std::memcpy(to + i * 128 + lane * 4, &row[i], 4);
        } else if (w.format == Format::kBf16) {
            for (int64_t i = 0; i < w.k; i++) {
                uint16_t bits = to_bf16(row[i]);
                std::memcpy(to + i / 2 * 128 + lane * 4 + i % 2 * 2, &bits, 2);
            }
        } else {
            quantise(w, row.data(), codes.data(), row_scales.data());
            if (w.format == Format::kInt8) scales[lane] = row_scales[0];
            place_codes(w, lane, codes.data(), row_scales.data(), nullptr, to);
        }
    }
}

void pack_codes(const Weights& w, int64_t panel, const uint8_t* codes, const float* from_scales, const float* offsets,
                char* to, float* scales) {
    std::memset(to, 0, static_cast<size_t>(w.panel_bytes));
    uint8_t middle = w.offsets ? 0 : of_four_bits(w.format) ? 8 : 128;
    std::vector<uint8_t> row(static_cast<size_t>(w.depth), middle);
    for (int64_t lane = 0; lane < kPanel; lane++) {
        int64_t output = w.output(panel, lane);
        if (output >= w.n) continue;
        std::memcpy(row.data(), codes + output * w.k, static_cast<size_t>(w.k));
        if (w.format == Format::kInt8) scales[lane] = from_scales[output];
        place_codes(w, lane, row.data(), from_scales + output * w.groups(),
                    offsets ? offsets + output * w.groups() : nullptr, to);
    }
}

}  // namespace inflight
