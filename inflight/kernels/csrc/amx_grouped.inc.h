// Products with groups of 64, 128, 192 or 256 inputs on AMX. Smaller groups have so many sums to add up that tiles gain
// nothing, and few rows are quicker with dot products. A chunk of a panel is unpacked once for all rows, as for block
// types: to codes less the zero point, and float scales. Sums of integers are exact and are added up in the same order,
// so the bits are those of dot products.
namespace inflight {
namespace {

constexpr int64_t kGroupedBand = 8;  // row tiles whose sums wait beside a chunk
constexpr int64_t kGroupedMost = 4;  // groups of a chunk
constexpr int64_t kPart = 64;        // inputs of one sum of tiles

INLINE bool tiled_groups(const Weights& w) {
    return is_grouped(w.format) && w.group % kPart == 0 && w.group <= kChunkInputs;
}

struct OpenedGroups {
    alignas(64) uint8_t codes[kChunkInputs * kPanel];  // [step][two lines]
    alignas(64) float scales[kGroupedMost][kPanel];
    alignas(64) float offsets[kGroupedMost][kPanel];
};

struct GroupDots {
    alignas(64) int32_t of[kGroupedMost][kBlockRows][kPanel];
};

// The next groups of a panel; returns what follows them.
template <bool Four, bool Offsets>
const char* open_groups(const Weights& w, const char* from, int64_t groups, OpenedGroups& to) {
    uint8_t* codes = to.codes;
    auto put = [&](Line x, int64_t at) {
        if (!Offsets) x = Four ? _mm512_sub_epi8(x, _mm512_set1_epi8(8)) : _mm512_xor_si512(x, _mm512_set1_epi8(-128));
        put_line(codes + at, x);
    };
    for (int64_t g = 0; g < groups; g++) {
        for (int j = 0; j < 2; j++) {
            store(to.scales[g] + j * kLanes, float16(from + j * 32));
            if (Offsets) store(to.offsets[g] + j * kLanes, float16(from + 64 + j * 32));
        }
        from += Offsets ? 128 : 64;
        for (int64_t i = 0; i < w.group; i += Four ? 8 : 4, from += 128, codes += Four ? 256 : 128)
            for (int64_t j = 0; j < 128; j += 64) {
                Line both = line(from + j);
                if (Four)
                    put(field<0, 15>(both), j), put(field<4, 15>(both), 128 + j);
                else
                    put(both, j);
            }
    }
    return from;
}

template <bool Offsets>
INLINE void sum_group(int64_t parts, const uint8_t* codes, const char* x, int64_t rows, bool odd, Ahead& ahead) {
    asm volatile("" ::: "memory");
    if (odd) {
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int64_t p = 0; p < parts; p++, codes += kPart * kPanel, x += kPart * rows) {
        ahead.some();
        _tile_loadd(6, codes, 128);
        _tile_loadd(7, codes + 64, 128);
        if (odd) {
            _tile_loadd(5, x, kPart);
            if (Offsets)
                _tile_dpbsud(2, 5, 6);
            else
                _tile_dpbssd(2, 5, 6);
            if (Offsets)
                _tile_dpbsud(3, 5, 7);
            else
                _tile_dpbssd(3, 5, 7);
        } else {
            _tile_loadd(4, x, kPart);
            if (Offsets)
                _tile_dpbsud(0, 4, 6);
            else
                _tile_dpbssd(0, 4, 6);
            if (Offsets)
                _tile_dpbsud(1, 4, 7);
            else
                _tile_dpbssd(1, 4, 7);
        }
    }
}

// A tile whose groups are summed, on the way to the rows' own sums.
struct Adding {
    const GroupDots* dots = nullptr;
    const int32_t* starts = nullptr;
    float* sums = nullptr;
    int64_t rows = 0, done = 0;
};

template <bool Offsets>
INLINE void add_rows(Adding& a, int64_t count, int64_t groups, const OpenedGroups& chunk) {
    for (int64_t end = a.done + count < a.rows ? a.done + count : a.rows; a.done < end; a.done++) {
        float* out = a.sums + a.done * kPanel;
        F totals[2] = {load(out), load(out + kLanes)};
        for (int64_t g = 0; g < groups; g++) {
            F share = Offsets ? splat(-static_cast<float>(a.starts[g * a.rows + a.done])) : zero();
            for (int j = 0; j < 2; j++) {
                I dots = _mm512_load_si512(a.dots->of[g][a.done] + j * kLanes);
                totals[j] = fma(to_float(dots), load(chunk.scales[g] + j * kLanes), totals[j]);
                if (Offsets) totals[j] = fma(load(chunk.offsets[g] + j * kLanes), share, totals[j]);
            }
        }
        store(out, totals[0]);
        store(out + kLanes, totals[1]);
    }
}

// The tiles of [first_tile, last_tile) have more than kGroupedRows rows each.
template <bool Four, bool Offsets>
void product_grouped(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile,
                     int64_t last_tile, const Target& target) {
    const int64_t all = w.groups(), most = kChunkInputs / w.group, parts = w.group / kPart;
    TileState state;
    OpenedGroups chunk;
    GroupDots dots[2];
    alignas(64) float sums[kGroupedBand * kBlockRows * kPanel];
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t band = first_tile; band < last_tile; band += kGroupedBand) {
            const int64_t end = band + kGroupedBand < last_tile ? band + kGroupedBand : last_tile,
                          start = in.start(band);
            std::memset(sums, 0, static_cast<size_t>(in.start(end) - start) * kPanel * sizeof(float));
            const char* from = w.data + panel * w.panel_bytes;
            for (int64_t group = 0, groups; group < all; group += groups) {
                groups = all - group < most ? all - group : most;
                const char* next = open_groups<Four, Offsets>(w, from, groups, chunk);
                const int64_t lines = (next - from) / 64, turns = (end - band) * groups * parts;
                Ahead ahead{from + kBlockAhead, lines, (lines + turns - 1) / turns};
                from = next;
                Adding before;
                for (int64_t t = band; t < end; t++) {
                    const int64_t row = in.start(t), rows = in.start(t + 1) - row;
                    GroupDots& to = dots[t % 2];
                    const char* x = in.data + row * w.depth + group * w.group * rows;
                    const int64_t some = (before.rows + groups - 1) / groups;
                    state.configure_products(rows, rows, kPart / 4);
                    for (int64_t g = 0; g < groups; g++) {
                        sum_group<Offsets>(parts, chunk.codes + g * w.group * kPanel, x + g * w.group * rows, rows,
                                           g % 2, ahead);
                        if (before.rows) add_rows<Offsets>(before, some, groups, chunk);
                        if (g % 2) {
                            _tile_stored(2, to.of[g], kPanel * 4);
                            _tile_stored(3, to.of[g][0] + kLanes, kPanel * 4);
                        } else {
                            _tile_stored(0, to.of[g], kPanel * 4);
                            _tile_stored(1, to.of[g][0] + kLanes, kPanel * 4);
                        }
                    }
                    before = {&to, in.sums + row * all + group * rows, sums + (row - start) * kPanel, rows, 0};
                }
                add_rows<Offsets>(before, before.rows, groups, chunk);
            }
            for (int64_t row = start; row < in.start(end); row++) {
                F y[1][2];
                for (int j = 0; j < 2; j++)
                    y[0][j] = mul(load(sums + (row - start) * kPanel + j * kLanes), splat(in.scales[row]));
                finish<1>(w, y, panel, row, target);
            }
        }
}

// The rows of one tile of more than kGroupedRows: [part of a group][row][inputs of a part].
void prepare_grouped(const Weights& w, const float* const* rows, const Norm& norm, const Input& in, int64_t tile) {
    const int64_t start = in.start(tile), count = in.start(tile + 1) - start;
    int8_t* to = reinterpret_cast<int8_t*>(in.data + start * w.depth);
    int32_t* sums = in.sums + start * w.groups();
    const uint32_t zero_point = static_cast<uint32_t>(w.offsets ? 1 : -w.zero);
    for (int64_t row = 0; row < count; row++) {
        F factor = norm.weight ? splat(norm_factor(rows[row], w.k, norm.eps)) : zero();
        auto value = [&](int64_t i) {
            if (i >= w.k) return zero();
            F x = load_part(rows[row] + i, w.k - i);
            return norm.weight ? normed(x, factor, norm, i, w.k - i) : x;
        };
        F most = zero();
        for (int64_t i = 0; i < w.k; i += kLanes) most = max(most, absolute(value(i)));
        float peak = highest(most);
        in.scales[start + row] = peak / 127.0f;
        F inverse = splat(peak > 0.0f ? 127.0f / peak : 0.0f);
        for (int64_t g = 0; g < w.groups(); g++) {
            I total = whole(0);
            for (int64_t i = g * w.group; i < (g + 1) * w.group; i += kLanes)
                total = add(total, to_int8(mul(value(i), inverse), to + (i / kPart * count + row) * kPart + i % kPart));
            sums[g * count + row] = static_cast<int32_t>(static_cast<uint32_t>(sum(total)) * zero_point);
        }
    }
}

}  // namespace
}  // namespace inflight
