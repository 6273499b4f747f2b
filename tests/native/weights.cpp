#include "weights.h"

#include <algorithm>

namespace inflight::testing {
namespace {

bool has_four_bits(Format format) {
    return format == Format::kGroup4 || format == Format::kQ4_0 || format == Format::kQ4_1;
}

// Scales of groups of inputs, rounded to float16.
bool has_groups(Format format) { return is_grouped(format) || is_block(format); }

struct Place {
    int64_t panel, lane;
};

Place place(const Weights& w, int64_t output) {
    if (!w.gated) return {output / 32, output % 32};
    int64_t half = w.n / 2, second = output >= half, at = output - second * half;
    return {at / 16, second * 16 + at % 16};
}

Entry lane_entry(const Weights& w, Place at, int64_t input) {
    const char* panel = w.data + at.panel * w.panel_bytes;
    if (w.format == Format::kFloat) return {read<float>(panel + input * 128 + at.lane * 4), 1.0, 0.0};
    if (w.format == Format::kBf16) return {read_bf16(panel + input / 2 * 128 + at.lane * 4 + input % 2 * 2), 1.0, 0.0};
    if (w.format == Format::kInt8) {
        int code = read<uint8_t>(panel + input / 4 * 128 + at.lane * 4 + input % 4);
        return {code - 128.0, w.scales[at.panel * 32 + at.lane], 0.0};
    }
    int64_t head = w.offsets ? 128 : 64, i = input % w.group;
    const char* group = panel + input / w.group * (head + w.group * (has_four_bits(w.format) ? 16 : 32));
    double scale = read_half(group + at.lane * 2);
    double offset = w.offsets ? read_half(group + 64 + at.lane * 2) : 0.0;
    if (!has_four_bits(w.format)) {
        int code = read<uint8_t>(group + head + i / 4 * 128 + at.lane * 4 + i % 4);
        return {w.offsets ? code : code - 128.0, scale, offset};
    }
    if (is_block(w.format)) {  // the first half of the inputs low, the second high
        int both = read<uint8_t>(group + head + i % 16 / 4 * 128 + at.lane * 4 + i % 4),
            code = i < 16 ? both & 15 : both >> 4;
        return {w.offsets ? code : code - 8.0, scale, offset};
    }
    int both = read<uint8_t>(group + head + i / 8 * 128 + at.lane * 4 + i % 4),
        code = i % 8 < 4 ? both & 15 : both >> 4;
    return {w.offsets ? code : code - 8.0, scale, offset};
}

// Floats [n, k] in the type they come in, and their values.
struct Floats {
    Source source;
    Exact<char> bytes;
    std::vector<double> values;
};

Floats random_floats(Random& random, int64_t n, int64_t k) {
    Floats out;
    out.source = random.pick({Source::kFloat, Source::kBf16, Source::kHalf});
    int64_t each = out.source == Source::kFloat ? 4 : 2;
    out.bytes = Exact<char>(n * k * each);
    for (int64_t row = 0; row < n; row++) {
        float size = random.pick({0.0f, 0.02f, 1.0f, 1.0f, 1e-30f, 300.0f});
        for (int64_t i = row * k; i < row * k + k; i++) {
            float value = random.value(size);
            uint32_t bits = read<uint32_t>(&value);
            uint16_t half = static_cast<uint16_t>(random.bits());
            char* to = out.bytes.get() + i * each;
            if (out.source == Source::kFloat) {
                std::memcpy(to, &bits, 4);
                out.values.push_back(value);
            } else if (out.source == Source::kBf16) {
                half = static_cast<uint16_t>(bits >> 16);
                std::memcpy(to, &half, 2);
                out.values.push_back(read_bf16(&half));
            } else {
                half &= random.maybe() ? 0xbbff : 0x83ff;  // below 2, or too small for a leading one
                std::memcpy(to, &half, 2);
                out.values.push_back(read_half(&half));
            }
        }
    }
    return out;
}

void check_floats(const Weights& w, const Floats& from) {
    int64_t size = has_groups(w.format) ? w.group : w.k;
    double levels = has_four_bits(w.format) ? 8.0 : 127.0;
    for (int64_t output = 0; output < w.n; output++)
        for (int64_t input = 0; input < w.k; input++) {
            const double* row = from.values.data() + output * w.k;
            Entry got = entry(w, output, input);
            if (w.format == Format::kFloat) {
                CHECK(got.value() == row[input], "a float was not kept");
            } else if (w.format == Format::kBf16) {
                CHECK(got.value() == as_bf16(row[input]), "a float became another bfloat16");
            } else {
                double peak = 0.0;
                for (int64_t i = input / size * size; i < std::min(w.k, input / size * size + size); i++)
                    peak = std::max(peak, std::fabs(row[i]));
                // A float16 scale is exact to 2 ** -11 of it, or to half of the smallest float16.
                double slack = w.format == Format::kInt8 ? 1e-6 * peak : peak / levels * 0x1p-11 + 0x1p-25;
                CHECK_NEAR(std::fabs(got.scale), peak / levels, slack + 1e-45, "scale of output ", output);
                double least = has_four_bits(w.format) ? -8.0 : -128.0;
                double code = got.scale == 0.0 ? 0.0 : std::min(-1.0 - least, std::max(least, row[input] / got.scale));
                CHECK_NEAR(got.code, code, 0.501, "output ", output, " input ", input);
                // Four bits give the largest value the code that only one sign has.
                if (has_four_bits(w.format) && input % size == 0 && peak > 1e-3) {
                    bool lowest = false;
                    for (int64_t i = input; i < std::min(w.k, input + size); i++)
                        lowest |= std::fabs(row[i]) == peak && entry(w, output, i).code == -8.0;
                    CHECK(lowest, "the largest value of output ", output, " from input ", input, " is not at -8");
                }
            }
        }
}

// Codes with scales and offsets that are floats of 16 bits already, or are not.
void pack_from_codes(Random& random, Packed& p) {
    Weights& w = p.w;
    int most = has_four_bits(w.format) ? 15 : 255;
    Exact<uint8_t> codes(w.n * w.k);
    Exact<float> scales(w.n * w.groups()), offsets(w.n * w.groups());
    for (int64_t i = 0; i < codes.size(); i++)
        codes[i] = static_cast<uint8_t>(random.pick<int64_t>({0, most, random.between(0, most)}));
    for (int64_t i = 0; i < scales.size(); i++) scales[i] = random.value(0.05f), offsets[i] = random.value(0.5f);
    for (int64_t panel = 0; panel < w.panels; panel++)
        pack_codes(w, panel, codes.get(), scales.get(), w.offsets ? offsets.get() : nullptr,
                   p.data.get() + panel * w.panel_bytes, p.scales.get() + panel * kPanel);
    for (int64_t output = 0; output < w.n; output++)
        for (int64_t input = 0; input < w.k; input++) {
            Entry got = entry(w, output, input);
            int64_t group = output * w.groups() + (has_groups(w.format) ? input / w.group : 0);
            int zero = w.offsets ? 0 : has_four_bits(w.format) ? 8 : 128;
            CHECK(got.code == codes[output * w.k + input] - zero, "another code for output ", output, " input ", input);
            bool narrow = w.format != Format::kInt8;
            CHECK_NEAR(got.scale, scales[group], narrow ? std::fabs(scales[group]) * 0x1p-11 + 0x1p-25 : 0.0, "scale");
            CHECK_NEAR(got.offset, w.offsets ? offsets[group] : 0.0, std::fabs(offsets[group]) * 0x1p-11 + 0x1p-25,
                       "offset");
        }
}

void check_padding(const Weights& w) {
    std::vector<int64_t> seen(static_cast<size_t>(w.n), 0);
    for (int64_t panel = 0; panel < w.panels; panel++)
        for (int64_t lane = 0; lane < kPanel; lane++) {
            int64_t output = w.output(panel, lane);
            if (output < w.n) {
                Place at = place(w, output);
                CHECK(at.panel == panel && at.lane == lane, "output ", output, " is at panel ", panel, " lane ", lane);
                seen[static_cast<size_t>(output)]++;
                continue;
            }
            for (int64_t input = 0; input < w.k; input++) {
                Entry got = lane_entry(w, {panel, lane}, input);
                CHECK(is_integer(w.format) ? got.scale == 0.0 && got.offset == 0.0 : got.code == 0.0,
                      "padding is not 0");
            }
        }
    CHECK(std::count(seen.begin(), seen.end(), 1) == w.n, "an output has no lane, or several");
}

}  // namespace

Entry entry(const Weights& w, int64_t output, int64_t input) { return lane_entry(w, place(w, output), input); }

void add_bias(Random& random, Packed& p) {
    p.bias = Exact<float>(p.w.panels * kPanel);
    for (int64_t i = 0; i < p.bias.size(); i++) p.bias[i] = random.value();
    p.w.bias = p.bias.get();
}

Packed pack(Random& random, const Shape& shape, bool bias) {
    Packed p;
    Weights& w = p.w;
    w = describe(shape.format, shape.offsets, shape.gated, shape.n, shape.k, shape.group);
    p.data = Exact<char>(packed_bytes(w), 0x55);
    p.scales = Exact<float>(w.panels * kPanel);
    w.data = p.data.get();
    w.scales = p.scales.get();
    if (w.offsets || (is_integer(w.format) && random.maybe())) {
        pack_from_codes(random, p);
    } else {
        Floats from = random_floats(random, w.n, w.k);
        for (int64_t panel = 0; panel < w.panels; panel++)
            pack_panel(w, panel, from.bytes.get(), from.source, p.data.get() + panel * w.panel_bytes,
                       p.scales.get() + panel * kPanel);
        check_floats(w, from);
    }
    check_padding(w);
    if (bias) add_bias(random, p);
    return p;
}

}  // namespace inflight::testing
