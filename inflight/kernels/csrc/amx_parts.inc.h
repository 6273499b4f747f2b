// Products with float32 on AMX. A float has 24 bits: cut off 8 at a time, it is exactly the sum of three bfloat16, and
// a product of two floats is the sum of the products of their parts (Henry, Tang, Heinecke, 2019). Six of the nine are
// summed: what the others would add is below the last bit of a float. Weights are kept as floats and are cut where they
// are used, while the tiles of the block before are summed, which uses other units of the processor: memory gives
// 4 bytes a weight, not 6.
//
// A row's sums are added in the same order beside any other rows: block after block of 32 inputs, six products of parts
// each, each in TDPBF16PS' own order (amx_direct.inc.h). Input i of a block meets input i + 16 in a step.
namespace inflight {
namespace {

constexpr int64_t kPartTile = 16 * 64;             // of weights: 16 steps of 16 outputs
constexpr int64_t kPartBlock = 3 * 2 * kPartTile;  // [part][line of outputs][step]
constexpr int64_t kPartChunk = 4;                  // blocks that stay in the nearest cache while all rows pass

// The parts of two lines, the greatest first: the values of `b` in the upper halves.
INLINE void cut(F a, F b, I (&parts)[3]) {
    const I top = whole(static_cast<int32_t>(0xffff0000u));
    for (int part = 0; part < 3; part++) {
        const I x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
        parts[part] = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(x, 16), y);
        if (part == 2) break;
        a = sub(a, _mm512_castsi512_ps(_mm512_and_si512(x, top)));
        b = sub(b, _mm512_castsi512_ps(_mm512_and_si512(y, top)));
    }
}

// Steps [first, last) of a block of a panel that begins at input `begin`.
INLINE void cut_weights(const Weights& w, const char* panel, int64_t begin, int64_t first, int64_t last, char* to) {
    auto line_of = [&](int64_t input, int j) {
        const char* at = panel + input * kPanel * 4 + j * 64;
        return input < w.depth ? load(reinterpret_cast<const float*>(at)) : zero();
    };
    for (int64_t step = first; step < last; step++)
        for (int j = 0; j < 2; j++) {
            I parts[3];
            cut(line_of(begin + step, j), line_of(begin + step + kLanes, j), parts);
            for (int part = 0; part < 3; part++)
                _mm512_store_si512(to + (part * 2 + j) * kPartTile + step * 64, parts[part]);
        }
}

// The six products of one block for one or two tiles of rows. `meanwhile` is called six times.
template <bool Both, class Meanwhile>
INLINE void sum_parts(const char* const (&x)[2], const int64_t (&rows)[2], const char* weights, Meanwhile meanwhile) {
    auto inputs = [&](int part) {  // activations pass by
        _tile_stream_loadd(4, x[0] + part * rows[0] * 64, 64);
        if (Both) _tile_stream_loadd(5, x[1] + part * rows[1] * 64, 64);
    };
    auto outputs = [&](int part) {
        _tile_loadd(6, weights + part * 2 * kPartTile, 64);
        _tile_loadd(7, weights + (part * 2 + 1) * kPartTile, 64);
    };
    auto multiply = [&](int turn) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (Both) _tile_dpbf16ps(2, 5, 6);
        if (Both) _tile_dpbf16ps(3, 5, 7);
        meanwhile(turn);
    };
    asm volatile("" ::: "memory");  // the compiler does not know what tiles are loaded from
    inputs(2), outputs(0), multiply(0);
    inputs(1), multiply(1);
    outputs(1), multiply(2);
    inputs(0), multiply(3);
    outputs(0), multiply(4);
    outputs(2), multiply(5);
}

// Blocks [first, last) of one or two tiles of rows; `meanwhile(block, turn)`.
template <bool Both, class Meanwhile>
INLINE void pass_parts(const char* const (&x)[2], const int64_t (&rows)[2], char* sums, bool fresh, int64_t first,
                       int64_t last, const char* cuts, Meanwhile meanwhile) {
    char* others = sums + rows[0] * kSumBytes;
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (Both) _tile_zero(2);
        if (Both) _tile_zero(3);
    } else {
        asm volatile("" ::: "memory");
        _tile_loadd(0, sums, kSumBytes);
        _tile_loadd(1, sums + 64, kSumBytes);
        if (Both) _tile_loadd(2, others, kSumBytes);
        if (Both) _tile_loadd(3, others + 64, kSumBytes);
    }
    for (int64_t block = first; block < last; block++) {
        const char* at[2] = {x[0] + block * 3 * rows[0] * 64, x[1] + block * 3 * rows[1] * 64};
        sum_parts<Both>(at, rows, cuts + block % (kPartChunk + 1) * kPartBlock,
                        [&](int turn) { meanwhile(block, turn); });
    }
    _tile_stored(0, sums, kSumBytes);
    _tile_stored(1, sums + 64, kSumBytes);
    if (Both) _tile_stored(2, others, kSumBytes);
    if (Both) _tile_stored(3, others + 64, kSumBytes);
}

void product_parts(const Weights& w, const Input& in, int64_t first, int64_t last, int64_t first_tile,
                   int64_t last_tile, const Target& target) {
    constexpr int64_t kTurn = 3;  // steps that are cut beside one of the six products
    const int64_t blocks = w.part_blocks();
    TileState state;
    alignas(64) char sums[2][kBandTiles * 16 * kSumBytes];
    alignas(64) char cuts[(kPartChunk + 1) * kPartBlock];  // a chunk's blocks and the next one's first
    int turn = 0;
    Finishing before;
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t band = first_tile; band < last_tile; band += kBandTiles, turn ^= 1) {
            const char* weights = w.data + panel * w.panel_bytes;
            const int64_t end = band + kBandTiles < last_tile ? band + kBandTiles : last_tile, start = in.start(band);
            const int64_t chunk = end - band > 2 ? kPartChunk : blocks;
            auto cut_some = [&](int64_t block, int64_t step) {
                cut_weights(w, weights, block * 32, step, step + kTurn < 16 ? step + kTurn : 16,
                            cuts + block % (kPartChunk + 1) * kPartBlock);
            };
            for (int64_t step = 0; step < 16; step += kTurn) cut_some(0, step);
            for (int64_t begin = 0; begin < blocks; begin += chunk) {
                const int64_t stop = begin + chunk < blocks ? begin + chunk : blocks;
                for (int64_t t = band; t < end; t += 2) {
                    const bool both = t + 1 < end;
                    const int64_t row = in.start(t), border = in.start(t + 1), behind = both ? in.start(t + 2) : border;
                    const char* const x[2] = {in.data + row * w.input_row(), in.data + border * w.input_row()};
                    const int64_t rows[2] = {border - row, behind - border};
                    char* at = sums[turn] + (row - start) * kSumBytes;
                    state.configure_products(rows[0], both ? rows[1] : rows[0], kTileSteps);
                    const int64_t some = (before.end - before.row + stop - begin - 1) / (stop - begin);
                    if (stop == blocks) prefetch_outputs(panel, row, behind, target);
                    // The first rows have the chunk's blocks cut, the last ones the next chunk's first.
                    auto meanwhile = [&](int64_t block, int part) {
                        const bool wanted = block + 1 < stop ? t == band : block + 1 < blocks && t + 2 >= end;
                        if (wanted) cut_some(block + 1, part * kTurn);
                        if (part == 5 && before.row < before.end)
                            finish_rows<Format::kBf16>(w, in, before, some, target);
                    };
                    if (both)
                        pass_parts<true>(x, rows, at, !begin, begin, stop, cuts, meanwhile);
                    else
                        pass_parts<false>(x, rows, at, !begin, begin, stop, cuts, meanwhile);
                    if (stop == blocks) before = {at, panel, row, behind, row, border};
                }
            }
        }
    finish_rows<Format::kBf16>(w, in, before, before.end - before.row, target);
}

// The rows of one tile: [block of 32 inputs][part][row][16 steps].
void prepare_parts(const Weights& w, const float* const* rows, const Norm& norm, const Input& in, int64_t tile) {
    const int64_t start = in.start(tile), count = in.start(tile + 1) - start, blocks = w.part_blocks();
    for (int64_t row = 0; row < count; row++) {
        const F factor = norm.weight ? splat(norm_factor(rows[row], w.k, norm.eps)) : zero();
        auto value = [&](int64_t i) {
            if (i >= w.k) return zero();
            F x = load_part(rows[row] + i, w.k - i);
            return norm.weight ? normed(x, factor, norm, i, w.k - i) : x;
        };
        char* to = in.data + start * w.input_row() + row * 64;
        for (int64_t block = 0; block < blocks; block++) {
            I parts[3];
            cut(value(block * 32), value(block * 32 + kLanes), parts);
            for (int part = 0; part < 3; part++) _mm512_store_si512(to + (block * 3 + part) * count * 64, parts[part]);
        }
    }
}

}  // namespace
}  // namespace inflight
