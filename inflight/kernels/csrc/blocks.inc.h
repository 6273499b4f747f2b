// Products with llama.cpp's block types. A chunk of a panel (256 inputs of its 32 outputs) is unpacked once to codes of
// 8 bits and float scales, which stay in the first-level cache. All rows are multiplied with it before the next chunk
// is unpacked. So all types share one kind of tile, and memory is read once.
#include <utility>

namespace inflight {
namespace {

constexpr int64_t kChunkInputs = 256, kChunkGroups = 16;
constexpr int64_t kBlockAhead = 8192;  // prefetch distance in the stream of weights, in bytes
constexpr int64_t kBandRows = 96;      // rows whose sums wait beside the chunk

struct Opened {
    alignas(64) uint8_t codes[kChunkInputs * kPanel];  // [step][two lines]
    alignas(64) float scales[kChunkGroups][kPanel];
    alignas(64) float offsets[kChunkGroups][kPanel];
};

template <int N>
struct Constant {
    static constexpr int value = N;
};
template <int... N, class Body>
INLINE void unrolled(std::integer_sequence<int, N...>, Body body) {
    (body(Constant<N>{}), ...);
}
template <int N, class Body>
INLINE void unrolled(Body body) {
    unrolled(std::make_integer_sequence<int, N>{}, body);
}

// Loads a line and prefetches the one `ahead` bytes behind it.
INLINE Line stream(const char* from, int64_t ahead) {
    __builtin_prefetch(from + ahead, 0, 2);
    return line(from);
}

// Prefetches the lines of a later chunk, some at a time, while a chunk is multiplied. All at once, when a chunk is
// unpacked, they would wait for each other, and memory would be idle during the arithmetic.
struct Ahead {
    const char* at;
    int64_t lines;  // that are left
    int64_t each;   // at a time

    void some() {
        for (int64_t i = lines < each ? lines : each; i > 0; i--, lines--, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

INLINE void put_step(Opened& to, int64_t step, int j, Line codes) { put_line(to.codes + (step * 2 + j) * 64, codes); }

// Unpacks 32 inputs of 4 bits from step `first` on; `upper` has the fifth bits, if any.
template <Format T>
INLINE void open_32(const char* codes, const char* upper, int64_t first, int64_t ahead, Opened& to) {
    constexpr bool five = T == Format::kQ5_0 || T == Format::kQ5_1;
    constexpr bool iq4 = T == Format::kIq4Nl || T == Format::kIq4Xs, table = iq4 || T == Format::kMxfp4;
    constexpr const uint8_t* values = iq4 ? kIq4Values : kMxfp4Values;
    for (int j = 0; j < 2; j++) {
        Line fifth = five ? stream(upper + j * 64, ahead) : Line{};
        unrolled<4>([&](auto step) {
            constexpr int s = decltype(step)::value;
            Line both = stream(codes + (2 * s + j) * 64, ahead);
            Line low = field<0, 15>(both), high = field<4, 15>(both);
            if (five) low = either(low, field<s - 4, 16>(fifth)), high = either(high, field<s, 16>(fifth));
            if (table) low = entries(values, low), high = entries(values, high);
            put_step(to, first + s, j, low);
            put_step(to, first + s + 4, j, high);
        });
    }
}

// The codes of a unit of 256 inputs.
template <Format T>
INLINE void open_256(const char* codes, int64_t ahead, Opened& to) {
    if (T == Format::kIq4Xs) {
        for (int64_t block = 0; block < 8; block++) open_32<T>(codes + block * 512, nullptr, block * 8, ahead, to);
        return;
    }
    for (int64_t s = 0; s < 8; s++)
        for (int j = 0; j < 2; j++) {
            auto at = [&](const char* plane, int64_t part) {
                return stream(plane + ((part * 8 + s) * 2 + j) * 64, ahead);
            };
            auto put = [&](int64_t block, Line x) { put_step(to, block * 8 + s, j, x); };
            if (T == Format::kQ4_K || T == Format::kQ5_K) {
                Line fifth = T == Format::kQ5_K ? at(codes + 4096, 0) : Line{};
                unrolled<4>([&](auto pair) {
                    constexpr int q = decltype(pair)::value;
                    Line both = at(codes, q), low = field<0, 15>(both), high = field<4, 15>(both);
                    if (T == Format::kQ5_K)
                        low = either(low, field<2 * q - 4, 16>(fifth)),
                        high = either(high, field<2 * q - 3, 16>(fifth));
                    put(2 * q, low);
                    put(2 * q + 1, high);
                });
            } else if (T == Format::kQ6_K) {
                unrolled<2>([&](auto half) {
                    constexpr int h = decltype(half)::value;
                    Line upper = at(codes + 4096, h);
                    unrolled<2>([&](auto part) {
                        constexpr int a = decltype(part)::value;
                        Line both = at(codes, 2 * h + a);
                        put(4 * h + a, either(field<0, 15>(both), field<2 * a - 4, 48>(upper)));
                        put(4 * h + 2 + a, either(field<4, 15>(both), field<2 * a, 48>(upper)));
                    });
                });
            } else {
                Line third = T == Format::kQ3_K ? at(codes + 2048, 0) : Line{};
                unrolled<2>([&](auto half) {
                    constexpr int h = decltype(half)::value;
                    Line four = at(codes, h);
                    unrolled<4>([&](auto pair) {
                        constexpr int b = decltype(pair)::value;
                        Line x = field<2 * b, 3>(four);
                        put(4 * h + b, T == Format::kQ3_K ? either(x, field<4 * h + b - 2, 4>(third)) : x);
                    });
                });
            }
        }
}

// 2 ** (exponent - 127) of 16 bytes; 0 for 0.
INLINE F powers(const char* from) {
    alignas(64) uint32_t bits[16];
    for (int i = 0; i < 16; i++) bits[i] = static_cast<uint32_t>(static_cast<uint8_t>(from[i])) << 23;
    alignas(64) float out[16];
    std::memcpy(out, bits, sizeof out);
    return load(out);
}

// The scales and offsets of a unit of 256 inputs.
template <Format T>
INLINE void open_scales(const char* unit, int64_t ahead, Opened& to) {
    constexpr BlockForm form = block_form(T);
    constexpr int64_t groups = form.inputs / form.group;
    const char* bytes = unit + (form.offsets ? 128 : 64);
    for (int64_t at = 0; at < 128 + groups * 64; at += 64) __builtin_prefetch(unit + ahead + at, 0, 2);
    for (int j = 0; j < 2; j++) {
        F scale = float16(unit + j * 32), offset = form.offsets ? float16(unit + 64 + j * 32) : zero();
        for (int64_t g = 0; g < groups; g++) {
            const int8_t* of = reinterpret_cast<const int8_t*>(bytes) + g * kPanel + j * kLanes;
            if (T == Format::kQ2_K) {
                int8_t low[kLanes], high[kLanes];
                for (int i = 0; i < kLanes; i++)
                    low[i] = of[i] & 15, high[i] = static_cast<int8_t>(static_cast<uint8_t>(of[i]) >> 4);
                store(to.scales[g] + j * kLanes, mul(from_int8(low), scale));
                store(to.offsets[g] + j * kLanes, mul(from_int8(high), offset));
            } else {
                store(to.scales[g] + j * kLanes, mul(from_int8(of), scale));
                if (form.offsets) store(to.offsets[g] + j * kLanes, mul(from_int8(of + groups * kPanel), offset));
            }
        }
    }
}

// `inputs` of them, at most a chunk, from the beginning of a unit on; `ahead`: the prefetch distance in bytes.
template <Format T>
void open(const char* unit, int64_t inputs, int64_t ahead, Opened& to) {
    constexpr BlockForm form = block_form(T);
    if (form.inputs == kChunkInputs) {
        open_scales<T>(unit, ahead, to);
        return open_256<T>(unit + (form.offsets ? 128 : 64) +
                               form.inputs / form.group * (form.offsets && T != Format::kQ2_K ? 64 : 32),
                           ahead, to);
    }
    for (int64_t block = 0; block * kInputBlock < inputs; block += form.inputs / kInputBlock, unit += form.bytes) {
        if (T == Format::kMxfp4) {
            __builtin_prefetch(unit + ahead, 0, 2);
            for (int c = 0; c < 2; c++) {
                for (int j = 0; j < 2; j++)
                    store(to.scales[block + c] + j * kLanes, powers(unit + c * kPanel + j * kLanes));
                open_32<T>(unit + 64 + c * 512, nullptr, (block + c) * 8, ahead, to);
            }
            continue;
        }
        __builtin_prefetch(unit + ahead, 0, 2);
        if (form.offsets) __builtin_prefetch(unit + ahead + 64, 0, 2);
        for (int j = 0; j < 2; j++) {
            store(to.scales[block] + j * kLanes, float16(unit + j * 32));
            if (form.offsets) store(to.offsets[block] + j * kLanes, float16(unit + 64 + j * 32));
        }
        const char* codes = unit + (form.offsets ? 128 : 64);
        if (T == Format::kQ8_0)
            for (int64_t s = 0; s < 8; s++)
                for (int j = 0; j < 2; j++) put_step(to, block * 8 + s, j, stream(codes + (2 * s + j) * 64, ahead));
        else
            open_32<T>(codes, codes + 512, block * 8, ahead, to);
    }
}

using Open = void (*)(const char*, int64_t, int64_t, Opened&);

Open open_of(Format format) {
    switch (format) {
        case Format::kQ8_0: return open<Format::kQ8_0>;
        case Format::kQ4_0: return open<Format::kQ4_0>;
        case Format::kQ4_1: return open<Format::kQ4_1>;
        case Format::kQ5_0: return open<Format::kQ5_0>;
        case Format::kQ5_1: return open<Format::kQ5_1>;
        case Format::kQ2_K: return open<Format::kQ2_K>;
        case Format::kQ3_K: return open<Format::kQ3_K>;
        case Format::kQ4_K: return open<Format::kQ4_K>;
        case Format::kQ5_K: return open<Format::kQ5_K>;
        case Format::kQ6_K: return open<Format::kQ6_K>;
        case Format::kIq4Nl: return open<Format::kIq4Nl>;
        case Format::kIq4Xs: return open<Format::kIq4Xs>;
        default: return open<Format::kMxfp4>;
    }
}

// Multiplies a chunk with M rows: groups of `Steps` steps are summed as integers, then added up in their order. `x`,
// `scales` and `sums` begin at the chunk, see Input.
template <int M, int Steps, bool Offsets>
void tile_opened(const Opened& chunk, int64_t blocks, const char* x, const float* scales, const int32_t* sums,
                 float* out, Ahead& ahead) {
    F totals[M][2];
    EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < 2; j++) totals[m][j] = load(out + m * kPanel + j * kLanes);
    const uint8_t* codes = chunk.codes;
    constexpr int kGroups = 8 / Steps;
    for (int64_t g = 0; g < blocks * kGroups; g++, sums += M) {
        I dots[M][2];
        EACH_ROW for (int m = 0; m < M; m++) dots[m][0] = dots[m][1] = whole(Offsets ? 0 : sums[m]);
        ahead.some();
        const char* at = x + g / kGroups * kInputBlock * M + g % kGroups * Steps * 4;
        for (int s = 0; s < Steps; s++, codes += 128, at += 4) {
            Line first = line(codes), second = line(codes + 64);
            EACH_ROW for (int m = 0; m < M; m++) {
                Quad four = quad(at + m * kInputBlock);
                dots[m][0] = dot4(dots[m][0], first, four);
                dots[m][1] = dot4(dots[m][1], second, four);
            }
        }
        const float* of = scales + g / kGroups * M;
        F scale[2] = {load(chunk.scales[g]), load(chunk.scales[g] + kLanes)};
        EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < 2; j++) totals[m][j] =
            fma(mul(to_float(dots[m][j]), splat(of[m])), scale[j], totals[m][j]);
        if (!Offsets) continue;
        F offset[2] = {load(chunk.offsets[g]), load(chunk.offsets[g] + kLanes)};
        EACH_ROW for (int m = 0; m < M; m++) {
            float share;
            std::memcpy(&share, sums + m, 4);
            for (int j = 0; j < 2; j++) totals[m][j] = fma(offset[j], splat(share), totals[m][j]);
        }
    }
    EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < 2; j++) store(out + m * kPanel + j * kLanes, totals[m][j]);
}

using TileOpened = void (*)(const Opened&, int64_t, const char*, const float*, const int32_t*, float*, Ahead&);
using Sizes = std::make_integer_sequence<int, kOpenedRows>;

template <int Steps, bool Offsets, int... M>
TileOpened tile_of(int64_t rows, std::integer_sequence<int, M...>) {
    constexpr TileOpened all[] = {tile_opened<M + 1, Steps, Offsets>...};
    return all[rows - 1];
}

#if INFLIGHT_TILES
}  // namespace
}  // namespace inflight

#include "amx.inc.h"

namespace inflight {
namespace {
#else
struct TileState {};  // state from tile to tile; only AMX has any

INLINE int64_t most_rows(const BlockForm&) { return kBlockRows; }

// A tile of so many rows, at most those.
template <int Steps, bool Offsets>
void tile_rows(int64_t rows, const Opened& chunk, int64_t blocks, const char* x, const float* scales,
               const int32_t* sums, float* out, Ahead& ahead, TileState&) {
    tile_of<Steps, Offsets>(rows, Sizes{})(chunk, blocks, x, scales, sums, out, ahead);
}
#endif

using TileRows = void (*)(int64_t, const Opened&, int64_t, const char*, const float*, const int32_t*, float*, Ahead&,
                          TileState&);

TileRows tile_rows_of(const BlockForm& form) {
    if (form.group == 16) return form.offsets ? tile_rows<4, true> : tile_rows<4, false>;
    return form.offsets ? tile_rows<8, true> : tile_rows<8, false>;
}

template <int M>
void finish_opened(const Weights& w, const float* from, int64_t panel, int64_t row, const Target& target) {
    F sums[M][2];
    EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < 2; j++) sums[m][j] = load(from + m * kPanel + j * kLanes);
    finish<M>(w, sums, panel, row, target);
}

using FinishOpened = void (*)(const Weights&, const float*, int64_t, int64_t, const Target&);

template <int... M>
FinishOpened finish_of(int64_t rows, std::integer_sequence<int, M...>) {
    constexpr FinishOpened all[] = {finish_opened<M + 1>...};
    return all[rows - 1];
}

void product_blocks(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile,
                    int64_t last_tile, const Target& target) {
    const BlockForm form = block_form(w.format);
    const int64_t tiles = kBandRows / most_rows(form), bytes = kChunkInputs / form.inputs * form.bytes;
    const Open opened = open_of(w.format);
    const TileRows tile = tile_rows_of(form);
    TileState state;
    Opened chunk;
    alignas(64) float sums[kBandRows * kPanel];
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t band = first_tile; band < last_tile; band += tiles) {
            int64_t end = band + tiles < last_tile ? band + tiles : last_tile, start = in.start(band);
            std::memset(sums, 0, static_cast<size_t>(in.start(end) - start) * kPanel * sizeof(float));
            const char* from = w.data + panel * w.panel_bytes;
            const bool few = in.start(end) - start <= kFewRows;
            for (int64_t k = 0; k < w.depth; k += kChunkInputs, from += bytes) {
                int64_t inputs = w.depth - k < kChunkInputs ? w.depth - k : kChunkInputs;
                opened(from, inputs, few ? kBlockAhead : 0, chunk);
                const int64_t lines = few ? 0 : bytes / 64, turns = (end - band) * inputs / form.group;
                Ahead ahead{from + kBlockAhead, lines, (lines + turns - 1) / turns};
                for (int64_t t = band; t < end; t++) {
                    int64_t row = in.start(t), rows = in.start(t + 1) - row;
                    tile(rows, chunk, inputs / kInputBlock, in.data + row * w.depth + k * rows,
                         in.scales + row * w.input_scales() + k / kInputBlock * rows,
                         in.sums + row * w.groups() + k / form.group * rows, sums + (row - start) * kPanel, ahead,
                         state);
                }
            }
            for (int64_t row = start, rows; row < in.start(end);
                 row += rows) {  // never into tiles: those are of other sizes
                rows = in.start(end) - row < kOpenedRows ? in.start(end) - row : kOpenedRows;
                finish_of(rows, Sizes{})(w, sums + (row - start) * kPanel, panel, row, target);
            }
        }
}

// The rows of one tile: each block of 32 inputs is rounded by itself.
void prepare_blocks(const Weights& w, const float* const* rows, const Norm& norm, const Input& in, int64_t tile) {
    constexpr float kLeast = 1e-30f;  // a block with a smaller maximum counts as 0: the inverse would overflow
    int64_t start = in.start(tile), count = in.start(tile + 1) - start, groups = kInputBlock / w.group;
    char* to = in.data + start * w.depth;
    float* scales = in.scales + start * w.input_scales();
    int32_t* sums = in.sums + start * w.groups();
    for (int64_t row = 0; row < count; row++) {
        F factor = norm.weight ? splat(norm_factor(rows[row], w.k, norm.eps)) : zero();
        for (int64_t block = 0; block * kInputBlock < w.depth; block++) {
            F x[2];
            for (int j = 0; j < 2; j++) {
                int64_t i = block * kInputBlock + j * kLanes, left = w.k - i;
                x[j] = left > 0 ? load_part(rows[row] + i, left) : zero();
                if (left > 0 && norm.weight) x[j] = normed(x[j], factor, norm, i, left);
            }
            float peak = highest(max(absolute(x[0]), absolute(x[1])));
            float scale = peak >= kLeast ? peak / 127.0f : 0.0f;
            F inverse = splat(peak >= kLeast ? 127.0f / peak : 0.0f);
            int8_t* codes = reinterpret_cast<int8_t*>(to + (block * count + row) * kInputBlock);
            I halves[2] = {to_int8(mul(x[0], inverse), codes), to_int8(mul(x[1], inverse), codes + kLanes)};
            scales[block * count + row] = scale;
            for (int64_t g = 0; g < groups; g++) {
                int32_t total = sum(groups == 2 ? halves[g] : add(halves[0], halves[1]));
                int32_t* at = sums + (block * groups + g) * count + row;
                float share = -static_cast<float>(total) * scale;
                if (w.offsets)
                    std::memcpy(at, &share, 4);
                else
                    *at = -w.zero * total;
            }
        }
    }
}

// One output's inputs as floats. Its neighbours are opened with it: they come from memory in the same lines.
void unpack_blocks(const Weights& w, int64_t row, float scale, float* out) {
    const BlockForm form = block_form(w.format);
    const Open opened = open_of(w.format);
    int64_t lane = row % kPanel;
    const char* from = w.data + row / kPanel * w.panel_bytes;
    Opened chunk;
    for (int64_t k = 0; k < w.k; k += kChunkInputs, from += kChunkInputs / form.inputs * form.bytes) {
        int64_t inputs = w.depth - k < kChunkInputs ? w.depth - k : kChunkInputs,
                left = w.k - k < inputs ? w.k - k : inputs;
        opened(from, inputs, kBlockAhead, chunk);
        for (int64_t i = 0; i < left; i++) {
            float of = chunk.scales[i / form.group][lane];
            float code = static_cast<float>(chunk.codes[i / 4 * 128 + lane * 4 + i % 4]);
            float value = form.offsets ? code * of - chunk.offsets[i / form.group][lane]
                                       : (code - static_cast<float>(w.zero)) * of;
            out[k + i] = value * scale;
        }
    }
}

}  // namespace
}  // namespace inflight
