// Products of float32 on AMX. A float is the sum of three bfloat16: hi, mid and lo, 8 bits of it each. Of the nine
// products of two floats' parts the six largest are summed, in float32; the three that are left out are together below
// 2 ** -23 of the product (Henry, Tang and Heinecke, 2019, "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations").
//
// The weight stays as it is packed for dot products. Its parts are made for a stretch of a panel while the tiles sum
// the stretch before, which other units of the processor do; so a weight is read from memory with 4 bytes. Inputs are
// taken apart once. All products of a block of 32 inputs go to one sum, in one order, for any number of rows.
namespace inflight {
namespace {

constexpr int64_t kPartBytes = kSplitInputs / 2 * 128;  // of a block of a panel
constexpr int64_t kSplitBytes = 3 * kPartBytes;         // its parts: hi, mid, lo
constexpr int64_t kProducts = 6;                        // of a block's parts
constexpr int64_t kStretch = 4;                         // most blocks of a stretch
constexpr int64_t kSplitAhead = 16384;                  // bytes of a panel that are asked for beforehand

// bfloat16 of two registers' lanes, side by side by pairs: a tile's weights.
INLINE I paired(I even, I odd) {
    constexpr int kAOrBAndC = 0xf8;
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, whole(static_cast<int32_t>(0xffff0000u)),
                                     kAOrBAndC);
}

// Takes apart a pair of a panel's steps.
INLINE void split_steps(const char* panel, int64_t step, int64_t depth, char* to) {
    const char* from = panel + step * 128;
    for (int j = 0; j < 2; j++, from += 64, to += 64) {
        __builtin_prefetch(from + kSplitAhead, 0, 2);
        __builtin_prefetch(from + kSplitAhead + 128, 0, 2);
        const F zeros = zero();
        const Parts even = parts_of<false>(step < depth ? load(reinterpret_cast<const float*>(from)) : zeros),
                    odd = parts_of<false>(step + 1 < depth ? load(reinterpret_cast<const float*>(from + 128)) : zeros);
        _mm512_store_si512(to, paired(even.hi, odd.hi));
        _mm512_store_si512(to + kPartBytes, paired(even.mid, odd.mid));
        _mm512_store_si512(to + 2 * kPartBytes, paired(even.lo, odd.lo));
    }
}

// A stretch of a panel on its way into parts.
struct Splitting {
    const char* panel = nullptr;
    int64_t depth = 0, step = 0, end = 0;  // steps of the panel, by pairs
    char* to = nullptr;

    void some(int64_t pairs) {
        for (; pairs > 0 && step < end; pairs--) {
            split_steps(panel, step, depth, to);
            step += 2;
            to += step % kSplitInputs ? 128 : 128 + kSplitBytes - kPartBytes;
        }
    }
};

// The products of two parts of a block, of one tile of rows or of two.
template <bool Both>
INLINE void sum_parts() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!Both) return;
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// A block of 32 inputs: where its parts lie.
struct Block {
    const char* x[2];
    int64_t rows[2];
    const char* weights;

    template <bool Both>
    inline __attribute__((always_inline)) void load_rows(int64_t part) const {
        _tile_loadd(4, x[0] + part * rows[0] * 64, 64);
        if (Both) _tile_loadd(5, x[1] + part * rows[1] * 64, 64);
    }
    inline __attribute__((always_inline)) void load_weights(int64_t part) const {
        _tile_loadd(6, weights + part * kPartBytes, 128);
        _tile_loadd(7, weights + part * kPartBytes + 64, 128);
    }
};

// The six products of a block, the largest last. Between them `meanwhile` keeps the processor's other units busy.
template <bool Both, class Meanwhile>
INLINE void sum_block(const Block& block, Meanwhile meanwhile) {
    asm volatile("" ::: "memory");  // the compiler does not know what tiles are loaded from
    block.load_rows<Both>(0);
    block.load_weights(2);
    sum_parts<Both>();
    meanwhile();
    block.load_weights(1);
    sum_parts<Both>();
    meanwhile();
    block.load_rows<Both>(1);
    sum_parts<Both>();
    meanwhile();
    block.load_weights(0);
    sum_parts<Both>();
    meanwhile();
    block.load_rows<Both>(2);
    sum_parts<Both>();
    meanwhile();
    block.load_rows<Both>(0);
    sum_parts<Both>();
    meanwhile();
}

// One or two tiles of rows and a stretch of a panel. Sums stay in the tiles where nothing else passes between this
// stretch and the one before (`fresh` is false and `load` too) or behind it (`keep`).
struct SplitPass {
    const char* x[2];
    int64_t rows[2];
    const char* parts;
    int64_t blocks;
    bool fresh, load, keep;
    char* sums;
};

template <bool Both, class Meanwhile>
INLINE void pass_split(const SplitPass& p, Meanwhile meanwhile) {
    char* others = p.sums + p.rows[0] * kSumBytes;
    if (p.fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (Both) _tile_zero(2);
        if (Both) _tile_zero(3);
    } else if (p.load) {
        asm volatile("" ::: "memory");
        _tile_loadd(0, p.sums, kSumBytes);
        _tile_loadd(1, p.sums + 64, kSumBytes);
        if (Both) _tile_loadd(2, others, kSumBytes);
        if (Both) _tile_loadd(3, others + 64, kSumBytes);
    }
    for (int64_t b = 0; b < p.blocks; b++) {
        const Block block{{p.x[0] + b * p.rows[0] * kSplitRow, p.x[1] + b * p.rows[1] * kSplitRow},
                          {p.rows[0], p.rows[1]},
                          p.parts + b * kSplitBytes};
        sum_block<Both>(block, meanwhile);
    }
    if (p.keep) return;
    _tile_stored(0, p.sums, kSumBytes);
    _tile_stored(1, p.sums + 64, kSumBytes);
    if (Both) _tile_stored(2, others, kSumBytes);
    if (Both) _tile_stored(3, others + 64, kSumBytes);
}

// Input `at` of a row, from its parts.
INLINE float split_input(const Weights& w, const Input& in, const Finishing& f, int64_t row, int64_t at) {
    const int64_t start = row < f.border ? f.start : f.border, count = (row < f.border ? f.border : f.end) - start;
    const char* block = in.data + start * w.input_row() + at / kSplitInputs * count * kSplitRow +
                        (row - start) * kSplitInputs * 2 + at % kSplitInputs * 2;
    float parts[3];
    for (int part = 0; part < 3; part++) {
        uint16_t half;
        std::memcpy(&half, block + part * count * kSplitInputs * 2, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&parts[part], &bits, 4);
    }
    return parts[0] + (parts[1] + parts[2]);  // hi + mid may be too large
}

// A sum that is no number, or too large, is computed again from the floats: parts of infinities and of the largest
// floats give NaNs where the floats do not.
INLINE void correct_rows(const Weights& w, const Input& in, const Finishing& f, int64_t count) {
    const int64_t end = f.row + count < f.end ? f.row + count : f.end;
    float* sums = reinterpret_cast<float*>(f.sums);
    for (int64_t row = f.row; row < end; row++, sums += kPanel) {
        if (!(_mm512_fpclass_ps_mask(load(sums), kNotNumbers) |
              _mm512_fpclass_ps_mask(load(sums + kLanes), kNotNumbers)))
            continue;
        const float* line = reinterpret_cast<const float*>(w.data + f.panel * w.panel_bytes);
        F of[2] = {zero(), zero()};
        for (int64_t k = 0; k < w.k; k++, line += kPanel) {
            const F x = splat(split_input(w, in, f, row, k));
            of[0] = fma(x, load(line), of[0]);
            of[1] = fma(x, load(line + kLanes), of[1]);
        }
        store(sums, of[0]);
        store(sums + kLanes, of[1]);
    }
}

void product_split(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile,
                   int64_t last_tile, const Target& target) {
    if (first == last) return;  // no panel lies there that could be taken apart beforehand
    const int64_t blocks = (w.depth + kSplitInputs - 1) / kSplitInputs;
    const bool single = last_tile - first_tile <= 2;  // sums stay in their tiles
    const int64_t most = single ? 1 : kStretch, stretches = (blocks + most - 1) / most;
    TileState state;
    alignas(64) char parts[2][kStretch * kSplitBytes];
    alignas(64) char sums[2][kBandTiles * 16 * kSumBytes];
    auto begin_of = [&](int64_t stretch) { return blocks * stretch / stretches; };
    auto splitting = [&](int64_t panel, int64_t stretch, char* to) {
        return Splitting{w.data + panel * w.panel_bytes, w.depth, begin_of(stretch) * kSplitInputs,
                         begin_of(stretch + 1) * kSplitInputs, to};
    };
    int turn = 0, side = 0;
    Finishing before;
    auto finish_some = [&](int64_t count) {
        correct_rows(w, in, before, count);
        finish_rows<Format::kFloat>(w, in, before, count, target);
    };
    splitting(first, 0, parts[0]).some(INT64_MAX);
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t band = first_tile; band < last_tile; band += kBandTiles, turn ^= 1) {
            const int64_t end = band + kBandTiles < last_tile ? band + kBandTiles : last_tile, start = in.start(band);
            const int64_t pairs = (end - band + 1) / 2;
            for (int64_t stretch = 0; stretch < stretches; stretch++, side ^= 1) {
                const bool ends = stretch + 1 == stretches, same = ends && end < last_tile;
                Splitting next;  // the last one has none
                if (!ends || same || panel + 1 < last)
                    next = splitting(ends && !same ? panel + 1 : panel, ends ? 0 : stretch + 1, parts[side ^ 1]);
                const int64_t begin = begin_of(stretch), count = begin_of(stretch + 1) - begin;
                const int64_t turns = kProducts * count, slots = 2 * turns * pairs;
                const int64_t share = (next.end - next.step + slots - 1) / slots;
                for (int64_t t = band; t < end; t += 2) {
                    const bool both = t + 1 < end;
                    const int64_t row = in.start(t), border = in.start(t + 1), behind = both ? in.start(t + 2) : border;
                    auto input = [&](int64_t at, int64_t rows) {
                        return in.data + at * w.input_row() + begin * rows * kSplitRow;
                    };
                    const SplitPass p{{input(row, border - row), input(border, behind - border)},
                                      {border - row, behind - border},
                                      parts[side],
                                      count,
                                      !stretch,
                                      !single,
                                      single && !ends,
                                      sums[turn] + (row - start) * kSumBytes};
                    state.configure_products(p.rows[0], both ? p.rows[1] : p.rows[0], kTileSteps);
                    const int64_t some = (before.end - before.row + turns - 1) / turns;
                    if (ends && !target.tiles) outputs_of(panel, row, behind, target, 1).next();
                    auto meanwhile = [&]() __attribute__((noinline)) {
                        next.some(share);
                        if (before.row < before.end) finish_some(some);
                    };
                    if (both)
                        pass_split<true>(p, meanwhile);
                    else
                        pass_split<false>(p, meanwhile);
                    if (before.row < before.end) finish_some(before.end - before.row);
                    if (ends) before = {p.sums, panel, row, behind, row, border};
                }
                next.some(INT64_MAX);
            }
        }
    finish_some(before.end - before.row);
}

// The rows of one tile: [block of 32 inputs][part][row][32].
void prepare_split(const Weights& w, const float* const* rows, const Norm& norm, const Input& in, int64_t tile) {
    const int64_t start = in.start(tile), count = in.start(tile + 1) - start;
    char* to = in.data + start * w.input_row();
    for (int64_t row = 0; row < count; row++) {
        const F factor = norm.weight ? splat(norm_factor(rows[row], w.k, norm.eps)) : zero();
        auto value = [&](int64_t i) {
            if (i >= w.k) return zero();
            F x = load_part(rows[row] + i, w.k - i);
            return norm.weight ? normed(x, factor, norm, i, w.k - i) : x;
        };
        char* at = to + row * kSplitInputs * 2;
        for (int64_t i = 0; i < w.k; i += kSplitInputs, at += count * kSplitRow) {
            put_parts(value(i), at, count);
            put_parts(value(i + kLanes), at + 2 * kLanes, count);
        }
    }
}

}  // namespace
}  // namespace inflight
