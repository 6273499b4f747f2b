// Products with bfloat16, and with integers that have one scale an output, on AMX. Tiles sum any number of rows, one
// too, since TDPBF16PS has an order of its own: of 32 inputs the even ones and the odd ones apart, then both together,
// then with what was summed before; and what is below the normal numbers counts as 0.
//
// Up to 16 rows are a tile of a product's input. Two of them go past a panel together, in four tiles of sums, so that
// the tiles are not waited for. A chunk of a panel stays in the nearest cache while all rows pass; sums that wait for
// the next chunk go to memory and come back as they were.
namespace inflight {
namespace {

constexpr int64_t kTileSteps = 16;   // of a panel, in a tile of weights
constexpr int64_t kBandTiles = 16;   // row tiles whose sums wait beside a chunk
constexpr int64_t kChunkTiles = 16;  // tiles of weights of a chunk, about; up to 24 are one
constexpr int64_t kSumBytes = kPanel * 4;

// Rows that are summed and not yet written to the target. They are written while the tiles of the next rows are summed,
// which uses other units of the processor.
struct Finishing {
    char* sums = nullptr;
    int64_t panel = 0, row = 0, end = 0;
    int64_t start = 0, border = 0;  // where the two tiles begin
};

// 16 columns of a row as the next product reads them, see `prepare_direct` and `prepare_split`.
template <Format T>
INLINE void put_row(F values, const Finishing& f, int64_t column, int64_t columns, char* tiles) {
    int64_t start = f.row < f.border ? f.start : f.border, count = (f.row < f.border ? f.border : f.end) - start;
    if (T == Format::kFloat) {
        char* block = tiles + start * split_row_bytes(columns) + column / kSplitInputs * count * kSplitRow;
        return put_parts(values, block + ((f.row - start) * kSplitInputs + column % kSplitInputs) * 2, count);
    }
    int64_t block = column / 32 * 32, width = columns - block < 32 ? columns - block : 32;
    char* at = tiles + (start * columns + block * count + (f.row - start) * width + column - block) * 2;
    alignas(64) uint16_t bits[kLanes];
    to_bf16(values, bits);
    if (columns - column >= kLanes)
        std::memcpy(at, bits, sizeof bits);
    else
        std::memcpy(at, bits, static_cast<size_t>(columns - column) * 2);
}

// What `finish` does, for some of those rows.
template <Format T>
void finish_rows(const Weights& w, const Input& in, Finishing& f, int64_t count, const Target& t) {
    const Biased biased(w, f.panel);
    F scales[2] = {zero(), zero()};
    if (T == Format::kInt8)
        for (int j = 0; j < 2; j++) scales[j] = load(w.scales + f.panel * kPanel + j * kLanes);
    auto value = [&](int j) {
        const char* at = f.sums + j * 64;
        if (T != Format::kInt8) return biased(load(reinterpret_cast<const float*>(at)), j);
        I sum = add(_mm512_load_si512(at), whole(in.sums[f.row]));
        return biased(mul(to_float(sum), mul(splat(in.scales[f.row]), scales[j])), j);
    };
    const int64_t end = f.row + count < f.end ? f.row + count : f.end;
    const int64_t width = t.mode == Mode::kGate ? kLanes : kPanel,
                  left = (width == kPanel ? w.n : w.n / 2) - f.panel * width;
    const __mmask16 first = first_lanes(left), second = first_lanes(left > kLanes ? left - kLanes : 0);
    float* out = t.out + f.row * t.stride + f.panel * width;
    for (; f.row < end; f.row++, f.sums += kSumBytes, out += t.stride) {
        if (t.mode == Mode::kGate) {
            F result = gated(t.act, value(0), value(1));
            if (t.tiles)
                put_row<T>(result, f, f.panel * kLanes, w.n / 2, t.tiles);
            else
                _mm512_mask_storeu_ps(out, first, result);
            continue;
        }
        F y[2] = {value(0), value(1)};
        if (t.mode == Mode::kActivate) {
            for (F& each : y) each = activated(t.act, each);
            if (t.tiles) {
                put_row<T>(y[0], f, f.panel * kPanel, w.n, t.tiles);
                if (left > kLanes) put_row<T>(y[1], f, f.panel * kPanel + kLanes, w.n, t.tiles);
                continue;
            }
        }
        if (t.mode == Mode::kAdd) {
            y[0] = fma(y[0], splat(t.scale), _mm512_maskz_loadu_ps(first, out));
            y[1] = fma(y[1], splat(t.scale), _mm512_maskz_loadu_ps(second, out + kLanes));
        }
        _mm512_mask_storeu_ps(out, first, y[0]);
        _mm512_mask_storeu_ps(out + kLanes, second, y[1]);
    }
}

// Asks for the lines of rows' outputs, to be written, during a pass: all at once they would hold up what tiles load.
struct Outputs {
    const char* at;
    int64_t row, end, stride, some;
    bool two;

    void next() {
        const int64_t stop = row + some < end ? row + some : end;
        for (; row < stop; row++, at += stride) {
            __builtin_prefetch(at, 1, 3);
            if (two) __builtin_prefetch(at + 64, 1, 3);
        }
    }
};

INLINE Outputs outputs_of(int64_t panel, int64_t row, int64_t end, const Target& t, int64_t blocks) {
    const bool gate = t.mode == Mode::kGate;
    const float* out = t.out + row * t.stride + panel * (gate ? kLanes : kPanel);
    return {reinterpret_cast<const char*>(out),
            row,
            end,
            t.stride * 4,
            (end - row + blocks - 1) / (blocks ? blocks : 1),
            !gate};
}

// Prefetches into the second-level cache during a pass, as Fetch does: the first pair of tiles the rest of its own
// chunk, each other pair a share of the next chunk.
struct Stream {
    const char* at;
    int64_t lines;  // while a tile of weights is read

    void next() {
        for (int64_t i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

INLINE Stream stream_of(const char* chunk, int64_t blocks, int64_t pair, int64_t pairs, int64_t rows) {
    constexpr int64_t kLines = kTileSteps * 2;
    if (!pair) return {chunk + (rows <= kFewRows ? kAheadOfFew : kAheadOfMany), kLines};
    int64_t lines = (kLines + pairs - 2) / (pairs - 1);
    return {chunk + (kLines + (pair - 1) * lines) * blocks * 64, lines};
}

// One or two tiles of rows and a chunk of a panel.
struct Pass {
    const char* x[2];
    int64_t rows[2];
    const char* weights;
    int64_t blocks;  // whole tiles of weights
    int64_t tail;    // steps behind them
    bool fresh;      // the sums begin with zero
    char* sums;
};

// A tile that is padded with zeros.
struct Tail {
    alignas(64) char x[2][16 * 64];
    alignas(64) char weights[kTileSteps * 128];

    Tail(const Pass& p, const char* const (&x_at)[2], const char* weights_at, int tiles) {
        std::memset(this, 0, sizeof *this);
        std::memcpy(weights, weights_at, static_cast<size_t>(p.tail) * 128);
        for (int i = 0; i < tiles; i++)
            for (int64_t row = 0; row < p.rows[i]; row++)
                std::memcpy(x[i] + row * 64, x_at[i] + row * p.tail * 4, static_cast<size_t>(p.tail) * 4);
    }
};

template <bool Integers, bool Both>
INLINE void sum_tiles(const char* first, const char* second, const char* weights) {
    asm volatile("" ::: "memory");  // the compiler does not know what tiles are loaded from
    // Activations pass by; a chunk of the panel is to stay in the nearest cache.
    _tile_stream_loadd(4, first, 64);
    _tile_loadd(6, weights, 128);
    if (Integers)
        _tile_dpbsud(0, 4, 6);
    else
        _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + 64, 128);
    if (Integers)
        _tile_dpbsud(1, 4, 7);
    else
        _tile_dpbf16ps(1, 4, 7);
    if (!Both) return;
    _tile_stream_loadd(5, second, 64);
    if (Integers)
        _tile_dpbsud(2, 5, 6);
    else
        _tile_dpbf16ps(2, 5, 6);
    if (Integers)
        _tile_dpbsud(3, 5, 7);
    else
        _tile_dpbf16ps(3, 5, 7);
}

template <bool Integers, bool Both, class Meanwhile>
INLINE void pass(const Pass& p, Meanwhile meanwhile) {
    char* others = p.sums + p.rows[0] * kSumBytes;
    if (p.fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (Both) _tile_zero(2);
        if (Both) _tile_zero(3);
    } else {
        asm volatile("" ::: "memory");
        _tile_loadd(0, p.sums, kSumBytes);
        _tile_loadd(1, p.sums + 64, kSumBytes);
        if (Both) _tile_loadd(2, others, kSumBytes);
        if (Both) _tile_loadd(3, others + 64, kSumBytes);
    }
    const char* x[2] = {p.x[0], p.x[1]};
    const char* weights = p.weights;
    for (int64_t b = 0; b < p.blocks; b++) {
        sum_tiles<Integers, Both>(x[0], x[1], weights);
        x[0] += p.rows[0] * 64;
        x[1] += p.rows[1] * 64;
        weights += kTileSteps * 128;
        meanwhile();
    }
    if (p.tail) {
        Tail tail(p, x, weights, Both ? 2 : 1);
        sum_tiles<Integers, Both>(tail.x[0], tail.x[1], tail.weights);
    }
    _tile_stored(0, p.sums, kSumBytes);
    _tile_stored(1, p.sums + 64, kSumBytes);
    if (Both) _tile_stored(2, others, kSumBytes);
    if (Both) _tile_stored(3, others + 64, kSumBytes);
}

template <Format T>
void product_direct(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile,
                    int64_t last_tile, const Target& target) {
    constexpr bool integers = T == Format::kInt8;
    const int64_t steps = w.depth / step_of(T), blocks = steps / kTileSteps, tail = steps % kTileSteps;
    const int64_t chunks =
        last_tile - first_tile > 2 && blocks > kChunkTiles ? (blocks + kChunkTiles / 2 - 1) / kChunkTiles : 1;
    TileState state;
    alignas(64) char sums[2][kBandTiles * 16 * kSumBytes];
    int turn = 0;
    Finishing before;
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t band = first_tile; band < last_tile; band += kBandTiles, turn ^= 1) {
            const int64_t end = band + kBandTiles < last_tile ? band + kBandTiles : last_tile, start = in.start(band);
            const int64_t pairs = (end - band + 1) / 2;
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const int64_t begin = blocks * chunk / chunks, stop = blocks * (chunk + 1) / chunks;
                for (int64_t t = band; t < end; t += 2) {
                    const bool both = t + 1 < end;
                    const int64_t row = in.start(t), border = in.start(t + 1), behind = both ? in.start(t + 2) : border;
                    auto input = [&](int64_t at, int64_t rows) {
                        return in.data + (at * steps + begin * kTileSteps * rows) * 4;
                    };
                    Pass p{{input(row, border - row), input(border, behind - border)},
                           {border - row, behind - border},
                           w.data + panel * w.panel_bytes + begin * kTileSteps * 128,
                           stop - begin,
                           chunk + 1 == chunks ? tail : 0,
                           !chunk,
                           sums[turn] + (row - start) * kSumBytes};
                    state.configure_products(p.rows[0], both ? p.rows[1] : p.rows[0], kTileSteps);
                    Stream stream = stream_of(p.weights, p.blocks, (t - band) / 2, pairs, in.rows);
                    const int64_t each = (before.end - before.row + p.blocks - 1) / (p.blocks ? p.blocks : 1),
                                  some = each < 2 ? 2 : each;
                    const bool ends = chunk + 1 == chunks;
                    Outputs outputs = outputs_of(panel, row, ends && !target.tiles ? behind : row, target, p.blocks);
                    auto meanwhile = [&] {
                        stream.next();
                        outputs.next();
                        if (before.row < before.end) finish_rows<T>(w, in, before, some, target);
                    };
                    if (both)
                        pass<integers, true>(p, meanwhile);
                    else
                        pass<integers, false>(p, meanwhile);
                    if (before.row < before.end) finish_rows<T>(w, in, before, before.end - before.row, target);
                    if (ends) before = {p.sums, panel, row, behind, row, border};
                }
            }
        }
    finish_rows<T>(w, in, before, before.end - before.row, target);
}

// The rows of one tile: [block of 16 steps][row][16 steps].
template <Format T>
void prepare_direct(const Weights& w, const float* const* rows, const Norm& norm, const Input& in, int64_t tile) {
    constexpr int64_t bytes = input_bytes(T), block = 64 / bytes;
    int64_t start = in.start(tile), count = in.start(tile + 1) - start;
    char* to = in.data + start * w.depth * bytes;
    for (int64_t row = 0; row < count; row++) {
        F factor = norm.weight ? splat(norm_factor(rows[row], w.k, norm.eps)) : zero(), inverse = zero();
        auto value = [&](int64_t i) {
            F x = load_part(rows[row] + i, w.k - i);
            return norm.weight ? normed(x, factor, norm, i, w.k - i) : x;
        };
        I total = whole(0);
        if (T == Format::kInt8) {
            F most = zero();
            for (int64_t i = 0; i < w.k; i += kLanes) most = max(most, absolute(value(i)));
            float peak = highest(most);
            in.scales[start + row] = peak / 127.0f;
            inverse = splat(peak > 0.0f ? 127.0f / peak : 0.0f);
        }
        for (int64_t begin = 0; begin < w.depth; begin += block) {
            int64_t inputs = w.depth - begin < block ? w.depth - begin : block;
            char* at = to + (begin * count + row * inputs) * bytes;
            alignas(64) char part[64];
            char* into = inputs == block ? at : part;
            for (int64_t i = 0; i < inputs; i += kLanes) {
                F x = begin + i < w.k ? value(begin + i) : zero();
                if (T == Format::kBf16)
                    to_bf16(x, reinterpret_cast<uint16_t*>(into + i * bytes));
                else
                    total = add(total, to_int8(mul(x, inverse), reinterpret_cast<int8_t*>(into + i * bytes)));
            }
            if (into == part) std::memcpy(at, part, static_cast<size_t>(inputs * bytes));
        }
        if (T == Format::kInt8)
            in.sums[start + row] = static_cast<int32_t>(static_cast<uint32_t>(sum(total)) *
                                                        static_cast<uint32_t>(w.offsets ? 1 : -w.zero));
    }
}

}  // namespace
}  // namespace inflight
