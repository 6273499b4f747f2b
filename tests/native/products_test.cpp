// Packed weights and products with them.
#include <algorithm>

#include "blocks.h"
#include "tests.h"
#include "weights.h"

namespace inflight::testing {
namespace {

using Rows = std::vector<std::vector<float>>;

struct Prepared {
    Exact<char> data;
    Exact<float> scales;
    Exact<int32_t> sums;
    Input in;
};

Prepared prepare(const Kernels& kernels, const Weights& w, const Rows& rows, const Norm& norm, int64_t tiles) {
    Prepared p;
    int64_t count = static_cast<int64_t>(rows.size());
    p.data = Exact<char>(count * w.input_row(), 0x55);
    p.scales = Exact<float>(count * w.input_scales(), kUnset);
    p.sums = Exact<int32_t>(count * w.groups(), 0x55555555);
    p.in = {p.data.get(), p.scales.get(), p.sums.get(), count, tiles};
    for (int64_t tile = 0; tile < tiles; tile++) {
        std::vector<const float*> of_tile;
        for (int64_t row = p.in.start(tile); row < p.in.start(tile + 1); row++)
            of_tile.push_back(rows[static_cast<size_t>(row)].data());
        kernels.prepare(w, of_tile.data(), norm, p.in, tile);
    }
    return p;
}

int64_t least_tiles(const Kernels& kernels, const Weights& w, int64_t rows) {
    int64_t most = kernels.tile_rows(w);
    return (rows + most - 1) / most;
}

// Inputs of a row that lie side by side in its tile of `count` rows.
int64_t inputs_together(const Kernels& kernels, Format format, int64_t group = 0, int64_t count = 0) {
    if (is_block(format)) return kInputBlock;
    if (kernels.lines && is_grouped(format) && group % 64 == 0 && group <= 256 && count > 6) return 64;
    bool lines = kernels.lines && (format == Format::kBf16 || format == Format::kInt8);
    return lines ? 64 / input_bytes(format) : step_of(format);
}

// Where input i of a row lies in a tile of `count` rows, in bytes.
int64_t place_of(int64_t i, int64_t row, int64_t count, int64_t depth, int64_t together, int64_t bytes) {
    int64_t first = i / together * together, width = std::min(together, depth - first);
    return (first * count + row * width + i - first) * bytes;
}

// An input of a split row, from its parts; tiles of rows of `inputs`.
double split_input(const char* data, int64_t inputs, int64_t start, int64_t count, int64_t row, int64_t i) {
    double sum = 0.0;
    for (int64_t part = 0; part < 3; part++)
        sum += read_bf16(data + start * split_row_bytes(inputs) + ((i / 32 * 3 + part) * count + row - start) * 64 +
                         i % 32 * 2);
    return sum;
}

// What a product reads of a row, [depth], and where its group sums are.
struct ReadRow {
    std::vector<double> values, scales;
    std::vector<int32_t> sums;
    int64_t block;  // inputs of one of the scales

    double scale(int64_t input) const { return scales[static_cast<size_t>(input / block)]; }
};

ReadRow read_row(const Kernels& kernels, const Weights& w, const Input& in, int64_t row) {
    int64_t tile = 0;
    while (in.start(tile + 1) <= row) tile++;
    int64_t start = in.start(tile), count = in.start(tile + 1) - start, bytes = input_bytes(w.format);
    int64_t together = inputs_together(kernels, w.format, w.group, count);
    ReadRow out;
    out.block = w.depth / w.input_scales();
    for (int64_t i = 0; i < w.depth; i++) {
        if (w.split) {
            out.values.push_back(split_input(in.data, w.depth, start, count, row, i));
            continue;
        }
        const char* at = in.data + start * w.depth * bytes + place_of(i, row - start, count, w.depth, together, bytes);
        out.values.push_back(bytes == 4 ? read<float>(at) : bytes == 2 ? read_bf16(at) : read<int8_t>(at));
    }
    for (int64_t b = 0; b < w.input_scales(); b++)
        out.scales.push_back(is_integer(w.format) ? in.scales[start * w.input_scales() + b * count + row - start]
                                                  : 1.0);
    for (int64_t g = 0; g < w.groups() && is_integer(w.format); g++)
        out.sums.push_back(in.sums[start * w.groups() + g * count + row - start]);
    return out;
}

void check_prepared(const Kernels& kernels, const Weights& w, const Input& in, const Rows& rows, const Norm& norm) {
    for (int64_t row = 0; row < in.rows; row++) {
        ReadRow got = read_row(kernels, w, in, row);
        std::vector<double> want = normed(rows[static_cast<size_t>(row)].data(), w.k, norm);
        want.resize(static_cast<size_t>(w.depth), 0.0);
        double slack = norm.weight ? 2e-6 : 0.0;
        for (int64_t first = 0; first < w.depth && is_integer(w.format); first += got.block) {
            double peak = 0.0;
            for (int64_t i = first; i < first + got.block; i++)
                peak = std::max(peak, std::fabs(want[static_cast<size_t>(i)]));
            CHECK_NEAR(got.scale(first), peak / 127.0, 1e-5 * peak, "scale of row ", row, " at ", first);
        }
        for (size_t i = 0; i < got.values.size(); i++) {
            double value = want[i], scale = got.scale(static_cast<int64_t>(i));
            if (w.format == Format::kFloat) CHECK_NEAR(got.values[i], value, slack * std::fabs(value), "input ", i);
            if (w.format == Format::kBf16 && norm.weight)
                CHECK_NEAR(got.values[i], value, std::fabs(value) * (0x1p-8 + slack), "input ", i);
            if (w.format == Format::kBf16 && !norm.weight) CHECK(got.values[i] == as_bf16(value), "input ", i);
            if (is_integer(w.format)) {
                CHECK(got.values[i] >= -127.0 && got.values[i] <= 127.0, "input ", i);
                CHECK_NEAR(got.values[i] * scale, value, 0.501 * scale, "input ", i);
            }
        }
        int64_t group = w.depth / w.groups(), zero = w.offsets ? 1 : -w.zero;
        for (size_t g = 0; g < got.sums.size(); g++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < group; i++)
                sum += static_cast<int64_t>(got.values[g * static_cast<size_t>(group) + static_cast<size_t>(i)]);
            if (is_block(w.format) && w.offsets) {
                double share = -static_cast<double>(sum) * got.scale(static_cast<int64_t>(g) * group);
                CHECK_NEAR(read<float>(&got.sums[g]), share, 1e-7 * std::fabs(share), "sum of group ", g);
                continue;
            }
            CHECK(got.sums[g] == sum * zero, "sum of group ", g, " is ", got.sums[g], ", not ", sum * zero);
        }
    }
}

// A weight's entries, read once.
struct Table {
    std::vector<Entry> entries;  // [n][k]
    explicit Table(const Packed& p) : entries(p.entries) {
        const Weights& w = p.w;
        if (entries.empty())
            for (int64_t output = 0; output < w.n; output++)
                for (int64_t input = 0; input < w.k; input++) entries.push_back(entry(w, output, input));
    }
};

struct Sum {
    double value, error;
};

// One output of a row: integers are summed without error, so that only scales and sums of groups may be rounded.
Sum expected(const Weights& w, const Table& table, const ReadRow& row, int64_t output) {
    constexpr double kHalfUlp = 6e-8;
    double total = 0.0, size = 0.0;
    int64_t group = w.depth / w.groups();
    for (int64_t g = 0; g * group < w.k; g++) {  // what fills up the last unit has no entries
        double products = 0.0, sizes = 0.0, inputs = 0.0;
        const Entry* of = table.entries.data() + output * w.k;
        for (int64_t i = g * group; i < std::min(w.k, g * group + group); i++) {
            double x = row.values[static_cast<size_t>(i)];
            products += of[i].code * x;
            sizes += std::fabs(of[i].code * x);
            inputs += x;
        }
        const Entry& first = of[g * group];
        double scale = row.scale(g * group);
        total += (first.scale * products - first.offset * inputs) * scale;
        size +=
            (std::fabs(first.scale * (is_integer(w.format) ? products : sizes)) + std::fabs(first.offset * inputs)) *
            scale;
    }
    double steps = is_integer(w.format) ? (is_block(w.format) ? 4.0 : 2.0) * static_cast<double>(w.groups()) + 4.0
                   : w.split            ? 6.0 * static_cast<double>((w.depth + 31) / 32) + 24.0
                                        : static_cast<double>(w.depth) + 4.0;
    Sum out{total, steps * kHalfUlp * size};
    if (w.bias) {
        int64_t half = w.n / 2;
        int64_t at =
            !w.gated ? output : output % half / kLanes * kPanel + output / half * kLanes + output % half % kLanes;
        out.value += w.bias[at];
        out.error += kHalfUlp * (size + std::fabs(w.bias[at]));
    }
    out.error += 1e-37;
    return out;
}

Sum finished(const Weights& w, const Table& table, const ReadRow& row, int64_t column, const Target& target,
             float before) {
    Sum y = expected(w, table, row, column);
    if (target.mode == Mode::kStore) return y;
    if (target.mode == Mode::kAdd) {
        double added = static_cast<double>(target.scale) * y.value;
        return {before + added, std::fabs(target.scale) * y.error + 1.3e-7 * (std::fabs(before) + std::fabs(added))};
    }
    double gate = activated(target.act, y.value);
    double error =
        1.2 * y.error + 2e-6 * std::fabs(gate) + 3e-7 * std::min(1.0, std::fabs(y.value)) + 1e-7 * std::fabs(y.value);
    if (target.mode == Mode::kActivate) return {gate, error + 1e-37};
    Sum up = expected(w, table, row, w.n / 2 + column);
    return {gate * up.value, error * (std::fabs(up.value) + up.error) + std::fabs(gate) * up.error * 1.01 + 1e-37};
}

// Random cuts of [0, n).
std::vector<int64_t> cuts(Random& random, int64_t n) {
    std::vector<int64_t> out = {0, n};
    for (int i = 0; i < 3; i++) out.push_back(random.between(0, n));
    std::sort(out.begin(), out.end());
    return out;
}

// A result as the next product reads it: rounded, or taken apart, in the same tiles.
void check_next(const Kernels& kernels, const Weights& w, const Input& in, Target target, const float* whole) {
    const int64_t columns = w.gated ? w.n / 2 : w.n, count = in.rows;
    Weights next = w;
    if (!w.split) next.format = Format::kBf16;
    if ((target.mode != Mode::kGate && target.mode != Mode::kActivate) || columns % (w.split ? 32 : 2) ||
        is_block(w.format) || (kernels.lines && is_grouped(w.format)) ||
        kernels.tile_rows(w) != kernels.tile_rows(next))
        return;
    Exact<char> read(count * (w.split ? split_row_bytes(columns) : columns * 2));
    target.tiles = read.get();
    kernels.product(w, in, 0, w.panels, 0, in.tiles, target);
    for (int64_t tile = 0; tile < in.tiles; tile++) {
        int64_t start = in.start(tile), height = in.start(tile + 1) - start;
        for (int64_t row = 0; row < height; row++)
            for (int64_t i = 0; i < columns; i++) {
                const double of = whole[(start + row) * target.stride + i];
                if (w.split) {
                    double got = split_input(read.get(), columns, start, height, start + row, i);
                    CHECK(std::fabs(got - of) <= 0x1p-133 || got == of || (std::isnan(got) && std::isnan(of)),
                          "column ", i, " of row ", start + row, " for the next product");
                    continue;
                }
                int64_t at = place_of(i, row, height, columns, inputs_together(kernels, Format::kBf16), 2);
                double got = read_bf16(read.get() + start * columns * 2 + at), want = as_bf16(static_cast<float>(of));
                double slack = std::fabs(want) < 0x1p-126 ? 0x1p-126 : 0.0;  // below the normal numbers
                CHECK(std::fabs(got - want) <= slack || got == want || (std::isnan(got) && std::isnan(want)), "column ",
                      i, " of row ", start + row, " for the next product");
            }
    }
}

void check_product(const Kernels& kernels, Random& random, const Packed& p, const Rows& rows, const Norm& norm,
                   Target target) {
    const Weights& w = p.w;
    int64_t count = static_cast<int64_t>(rows.size()), columns = w.gated ? w.n / 2 : w.n;
    int64_t tiles = random.between(least_tiles(kernels, w, count), count);
    Prepared prepared = prepare(kernels, w, rows, norm, tiles);
    check_prepared(kernels, w, prepared.in, rows, norm);

    target.stride = columns + random.between(0, 3);
    int64_t size = (count - 1) * target.stride + columns;
    Exact<float> before(size, kUnset), whole(size), pieces(size);
    if (target.mode == Mode::kAdd)
        for (int64_t i = 0; i < size; i++) before[i] = random.value();
    std::copy_n(before.get(), size, whole.get());
    std::copy_n(before.get(), size, pieces.get());
    target.out = whole.get();
    kernels.product(w, prepared.in, 0, w.panels, 0, tiles, target);

    Table table(p);
    for (int64_t row = 0; row < count; row++) {
        ReadRow read = read_row(kernels, w, prepared.in, row);
        for (int64_t i = row * target.stride; i < std::min(size, (row + 1) * target.stride); i++) {
            int64_t column = i - row * target.stride;
            Sum want{before[i], 0.0};
            if (column < columns) want = finished(w, table, read, column, target, before[i]);
            CHECK_NEAR(whole[i], want.value, want.error, "row ", row, " of ", count, ", column ", column);
        }
    }

    // In pieces, in any order, the same bits.
    std::vector<int64_t> panel_cuts = cuts(random, w.panels), tile_cuts = cuts(random, tiles);
    std::vector<std::pair<size_t, size_t>> order;
    for (size_t i = 0; i + 1 < panel_cuts.size(); i++)
        for (size_t j = 0; j + 1 < tile_cuts.size(); j++) order.emplace_back(i, j);
    random.shuffle(order);
    target.out = pieces.get();
    for (auto [i, j] : order)
        kernels.product(w, prepared.in, panel_cuts[i], panel_cuts[i + 1], tile_cuts[j], tile_cuts[j + 1], target);
    CHECK(same_bits(whole.get(), pieces.get(), size), "pieces of a product differ from the whole");

    check_next(kernels, w, prepared.in, target, whole.get());

    // Alone, a row gives the same bits.
    for (int i = 0; i < 3; i++) {
        int64_t row = random.between(0, count - 1);
        Prepared one = prepare(kernels, w, {rows[static_cast<size_t>(row)]}, norm, 1);
        Exact<float> alone(columns);
        std::copy_n(before.get() + row * target.stride, columns, alone.get());
        target.out = alone.get();
        kernels.product(w, one.in, 0, w.panels, 0, 1, target);
        CHECK(same_bits(alone.get(), whole.get() + row * target.stride, columns), "row ", row, " of ", count,
              " alone is another");
    }
}

void one_product(const Kernels& kernels, Random& random, Format format, bool offsets, bool gated,
                 bool from_floats = false, bool split = false) {
    Shape shape{format,
                offsets,
                gated,
                random.between(1, 90),
                random.between(1, 300),
                random.pick<int64_t>({8, 24, 32, 40, 64, 128, 192, 256})};
    if (gated) shape.n += shape.n % 2;
    if (random.maybe()) shape.k = random.pick<int64_t>({1, 15, 16, 17, 31, 64, 255, 256, 257});
    if (!is_grouped(format) && !is_block(format) && random.between(0, 3) == 0)
        shape.k = random.between(300, 2500), shape.n = random.between(1, 20) * 2;
    bool blocks = is_block(format) && !from_floats;
    if (blocks)
        shape.k = block_form(format).file_inputs * random.between(1, block_form(format).file_inputs == 256 ? 3 : 20);
    Packed p =
        blocks ? pack_random_blocks(random, format, gated, shape.n, shape.k) : pack(random, shape, random.maybe());
    if (blocks && random.maybe()) add_bias(random, p);
    p.w.split = split;
    Rows rows;
    for (int64_t count = random.between(1, 40); count > 0; count--)
        rows.push_back(random.values(shape.k, random.pick({1.0f, 1.0f, 0.01f, 100.0f, 0.0f})));
    std::vector<float> norm_weight = random.values(shape.k);
    Norm norm{random.maybe() ? norm_weight.data() : nullptr, 1e-5f, random.maybe()};
    Target target{};
    target.mode = gated ? Mode::kGate : random.pick({Mode::kStore, Mode::kAdd, Mode::kActivate});
    target.act = random.pick(
        {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu, Activation::kGeluQuick});
    target.scale = random.value();
    try {
        check_product(kernels, random, p, rows, norm, target);
    } catch (const std::runtime_error& error) {
        fail("format ", static_cast<int>(format), offsets ? " with offsets" : "", ", n ", shape.n, ", k ", shape.k,
             ", group ", p.w.group, ", mode ", static_cast<int>(target.mode), ", act ", static_cast<int>(target.act),
             ": ", error.what());
    }
}

// The largest sums that a format allows: 32 bits must hold them.
void largest(const Kernels& kernels, Random& random, Shape shape) {
    Weights w = describe(shape.format, shape.offsets, false, shape.n, shape.k, shape.group);
    Packed p{w, Exact<char>(packed_bytes(w)), Exact<float>(w.panels * kPanel), {}, {}};
    Exact<uint8_t> codes(shape.n * shape.k);
    for (int64_t i = 0; i < codes.size(); i++)
        codes[i] = i / shape.k % 2 ? 0 : shape.format == Format::kGroup4 ? 15 : 255;
    Exact<float> scales(shape.n * w.groups(), 1.0f), offsets(shape.n * w.groups(), 3.0f);
    for (int64_t panel = 0; panel < w.panels; panel++)
        pack_codes(w, panel, codes.get(), scales.get(), shape.offsets ? offsets.get() : nullptr,
                   p.data.get() + panel * w.panel_bytes, p.scales.get() + panel * kPanel);
    p.w.data = p.data.get();
    p.w.scales = p.scales.get();
    Rows rows(2, std::vector<float>(static_cast<size_t>(shape.k), 1.0f));
    for (float& each : rows[1]) each = -1.0f;
    check_product(kernels, random, p, rows, {nullptr, 0.0f, false},
                  {nullptr, 0, Mode::kStore, Activation::kSilu, 1.0f, nullptr});
}

}  // namespace

void products(const Kernels& kernels, Random& random) {
    for (int repeat = 0; repeat < 4; repeat++)
        for (bool gated : {false, true}) {
            for (Format format : {Format::kFloat, Format::kBf16, Format::kInt8, Format::kGroup8, Format::kGroup4})
                one_product(kernels, random, format, false, gated);
            if (kernels.splits) one_product(kernels, random, Format::kFloat, false, gated, false, true);
            for (Format format : {Format::kGroup8, Format::kGroup4}) one_product(kernels, random, format, true, gated);
            for (Format format : kBlockTypes) one_product(kernels, random, format, false, gated);
            for (Format format : {Format::kQ8_0, Format::kQ4_0})
                one_product(kernels, random, format, false, gated, true);
            one_product(kernels, random, Format::kQ4_1, true, gated, true);
        }
    largest(kernels, random, {Format::kInt8, false, false, 2, 65536, 0});
    for (bool offsets : {false, true})
        for (Format format : {Format::kGroup8, Format::kGroup4})
            largest(kernels, random, {format, offsets, false, 2, 32768, 32768});
}

void sizes(Random&) {
    auto refuses = [](Format format, bool gated, int64_t n, int64_t k, int64_t group) {
        std::ostringstream what;
        what << "format " << static_cast<int>(format) << ", n " << n << ", k " << k << ", group " << group;
        check_throws<std::invalid_argument>([&] { describe(format, false, gated, n, k, group); }, what.str());
    };
    constexpr int64_t kHuge = INT64_MAX;
    for (Format format : {Format::kFloat, Format::kBf16, Format::kInt8, Format::kGroup8, Format::kGroup4}) {
        for (int64_t bad : {int64_t(0), int64_t(-1), -kHuge - 1, kHuge, int64_t(1) << 32}) {
            refuses(format, false, bad, 64, 32);
            refuses(format, false, 64, bad, 32);
        }
        refuses(format, true, 63, 64, 32);
    }
    // More bytes than 64 bits can count.
    for (Format format : {Format::kFloat, Format::kBf16}) refuses(format, false, INT32_MAX, INT32_MAX, 0);
    for (Format format : {Format::kGroup8, Format::kGroup4})
        for (int64_t group : {int64_t(0), int64_t(7), int64_t(-8), int64_t(12), int64_t(32776), kHuge, -kHuge - 1})
            refuses(format, false, 64, 64, group);
    refuses(Format::kInt8, false, 64, 65537, 0);
}

}  // namespace inflight::testing
