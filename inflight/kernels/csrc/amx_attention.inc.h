// Attention on AMX over caches of bfloat16 and of 8 bits, with up to 16 queries in a tile. As attention.inc.h, except
// that all scores of a chunk of 512 keys are computed before its softmax: a chunk has one maximum, and its sums are not
// rescaled. A single query goes through tiles too, so that its bits are the same.
namespace inflight {
namespace {

constexpr int64_t kChunkBlocks = kChunk / kBlock;

struct TileScratch {
    char* scores;   // [sub-block][rows][16]; then, from the start of each sub-block, the probabilities in bfloat16
    float* sums;    // [rows][value depth] of this chunk
    float* whole;   // [rows][value depth] of all chunks
    char* queries;  // [depth / 32][rows][32], of the last 16 [rows][16]
    Scratch of[kChunkBlocks];  // of the chunk's blocks: copies of keys and values that cannot be read in place
    float* rest;               // of the memory
};

TileScratch carve_tiles(const Attention& a, float* from) {
    constexpr int64_t most = 16;
    TileScratch s;
    s.scores = reinterpret_cast<char*>(take(from, most * kChunk));
    s.sums = take(from, most * a.depth);
    s.whole = take(from, most * a.depth);
    s.queries = reinterpret_cast<char*>(take(from, most * a.depth / 2));
    char* keys = reinterpret_cast<char*>(take(from, kBlock * a.depth / 2));
    for (Scratch& block : s.of) {
        block = {};
        block.keys = keys;  // of one block at a time
        block.values = reinterpret_cast<char*>(take(from, kBlock * a.depth / 2));
        block.key_scales = take(from, kBlock);
        block.value_scales = take(from, kBlock);
    }
    s.rest = from;
    return s;
}

void tile_queries(const Attention& a, const Seen& seen, int64_t rows, char* to) {
    for (int64_t d = 0; d < a.depth; d += kLanes) {
        int64_t block = d / 32 * 32, width = a.depth - block < 32 ? 16 : 32;
        for (int64_t m = 0; m < rows; m++)
            to_bf16(load_part(seen.queries[m] + d, a.dim - d < 0 ? 0 : a.dim - d),
                    reinterpret_cast<uint16_t*>(to + (block * rows + m * width + d - block) * 2));
    }
}

// The scores of up to four sub-blocks, [16 keys][rows of queries] each. A query alone asks for what comes next
// meanwhile.
INLINE void score_tiles(const Attention& a, const Subs& subs, const Prefetch* next, const char* queries, int64_t rows,
                        char* scores) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    asm volatile("" ::: "memory");
    const int64_t count = subs.count;
    int64_t d = 0;
    for (; d + 32 <= a.depth; d += 32) {
        const int64_t at = d * 32;
        _tile_loadd(4, queries + d * rows * 2, 64);
        _tile_loadd(6, subs.keys[0] + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (count > 1) {
            _tile_loadd(6, subs.keys[1] + at, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (count > 2) {
            _tile_loadd(6, subs.keys[2] + at, 64);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (count > 3) {
            _tile_loadd(6, subs.keys[3] + at, 64);
            _tile_dpbf16ps(3, 4, 6);
        }
        if (next)
            for (int64_t i = 0; i < kSubs; i++)
                for (int64_t line = 0; line < 16 * 64; line += 64) {
                    __builtin_prefetch(next->keys[i] + at + line, 0, 2);
                    __builtin_prefetch(next->values[i] + at + line, 0, 2);
                }
    }
    if (d < a.depth) {
        _tile_loadd(5, queries + d * rows * 2, 32);
        _tile_loadd(7, subs.keys[0] + d * 32, 64);
        _tile_dpbf16ps(0, 5, 7);
        if (count > 1) {
            _tile_loadd(7, subs.keys[1] + d * 32, 64);
            _tile_dpbf16ps(1, 5, 7);
        }
        if (count > 2) {
            _tile_loadd(7, subs.keys[2] + d * 32, 64);
            _tile_dpbf16ps(2, 5, 7);
        }
        if (count > 3) {
            _tile_loadd(7, subs.keys[3] + d * 32, 64);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, scores, 64);
    if (count > 1) _tile_stored(1, scores + rows * 64, 64);
    if (count > 2) _tile_stored(2, scores + 2 * rows * 64, 64);
    if (count > 3) _tile_stored(3, scores + 3 * rows * 64, 64);
}

// Updates each row's largest scores, lane by lane, with the scores of the block at `first`. Keys that a row does not
// see become minus infinity.
INLINE void update_maxima(const Attention& a, const Queries& q, const Seen& seen, int64_t first, int64_t count,
                          const Scratch& s, bool late, int64_t rows, char* scores, float* most) {
    const bool plain = late && !q.bias && seen.by_all(first, first + count * kSub);
    for (int64_t m = 0; m < rows; m++) {
        F highest = load(most + m * kLanes);
        for (int64_t i = 0; i < count; i++) {
            float* at = reinterpret_cast<float*>(scores + (i * rows + m) * 64);
            F x = load(at);
            if (!plain) {
                if (q.bias) x = add(x, load(q.bias + (q.first + m) * q.bias_stride + first + i * kSub));
                if (!late) x = scaled_and_capped(a, s, i, x);
                x = keep_lanes(x, seen.from[m] - first - i * kSub, seen.to[m] - first - i * kSub, splat(-INFINITY));
                store(at, x);
            }
            highest = max(highest, x);
        }
        store(most + m * kLanes, highest);
    }
}

// Turns a sub-block's scores into probabilities (before they are divided by their sum).
INLINE void softmax_tile(const Attention& a, const float* value_scales, float scale, const float (&peaks)[16],
                         int64_t rows, char* scores, float* totals) {
    for (int64_t m = 0; m < rows; m++) {
        F x = fma(load(reinterpret_cast<const float*>(scores + m * 64)), splat(scale), splat(-peaks[m]));
        F prob = exp2_short(x);
        store(totals + m * kLanes, add(load(totals + m * kLanes), prob));
        if (a.type == KvType::kInt8) prob = mul(prob, load(value_scales));
        to_bf16(prob, reinterpret_cast<uint16_t*>(scores + m * 32));  // overwrites only scores that have been read
    }
}

// Up to four times 16 components of values, weighted by a sub-block's probabilities.
INLINE void weight_values_tile(const Attention& a, const char* probs, const char* values, int64_t count) {
    const int64_t line = a.value_depth() * 4;
    asm volatile("" ::: "memory");
    _tile_loadd(5, probs, 32);
    _tile_loadd(7, values, line);
    _tile_dpbf16ps(0, 5, 7);
    if (count > 1) {
        _tile_loadd(7, values + 64, line);
        _tile_dpbf16ps(1, 5, 7);
    }
    if (count > 2) {
        _tile_loadd(7, values + 128, line);
        _tile_dpbf16ps(2, 5, 7);
    }
    if (count > 3) {
        _tile_loadd(7, values + 192, line);
        _tile_dpbf16ps(3, 5, 7);
    }
}

void attend_tiles(const Attention& a, const Queries& q, int64_t first, int64_t last, const TileScratch& s,
                  TileState& state, Running& r) {
    const int64_t rows = q.count, wide = a.value_depth();
    const Seen seen(a, q, rows);
    tile_queries(a, seen, rows, s.queries);
    prefetch_result(a, q, rows);
    state.configure_attention(rows);
    const bool late = a.type != KvType::kInt8 && a.softcap == 0.0f && a.scale > 0.0f,
               few = rows <= a.heads / a.kv_heads;
    const float scale = late ? a.scale * kLog2e : 1.0f;
    if (first < seen.first_chunk) first = seen.first_chunk;
    if (last > seen.last_chunk) last = seen.last_chunk;
    for (int64_t chunk = first; chunk < last; chunk++) {
        alignas(64) float chunk_peaks[16], chunk_totals[16][kLanes], most[16][kLanes];
        for (int m = 0; m < 16; m++) store(most[m], splat(-INFINITY)), store(chunk_totals[m], zero());
        const int64_t low = seen.low(chunk), high = seen.high(chunk), sub_bytes = rows * 64;
        const char* values[kChunkSubs];
        int64_t all = 0;  // sub-blocks
        for (int64_t block = low; block < high; block += kBlock) {
            const Scratch& of = s.of[(block - low) / kBlock];
            asm volatile("" ::: "memory");
            const Subs subs = find_subs(a, q, block, high, of);
            const Prefetch next = few ? prefetch_of(a, q, block + kBlock, seen.end, subs) : Prefetch{};
            score_tiles(a, subs, few ? &next : nullptr, s.queries, rows, s.scores + all * sub_bytes);
            update_maxima(a, q, seen, block, subs.count, of, late, rows, s.scores + all * sub_bytes, most[0]);
            for (int64_t i = 0; i < subs.count; i++) values[all++] = subs.values[i];
        }
        F highest[16];
        for (int m = 0; m < 16; m++) highest[m] = load(most[m]);
        store(chunk_peaks, max(mul(highest_of(highest), splat(scale)), splat(kNever)));
        for (int64_t d = 0; d < wide || !d; d += 4 * kLanes) {
            const int64_t count = (wide - d) / kLanes < 4 ? (wide - d) / kLanes : 4;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t i = 0; i < all; i++) {
                char* of = s.scores + i * sub_bytes;
                const float* value_scales = s.of[i / kSubs].value_scales + i % kSubs * kSub;
                if (!d) softmax_tile(a, value_scales, scale, chunk_peaks, rows, of, chunk_totals[0]);
                weight_values_tile(a, of, values[i] + d * 4, count);
            }
            char* sums = reinterpret_cast<char*>(s.sums + d);
            _tile_stored(0, sums, wide * 4);
            if (count > 1) _tile_stored(1, sums + 64, wide * 4);
            if (count > 2) _tile_stored(2, sums + 128, wide * 4);
            if (count > 3) _tile_stored(3, sums + 192, wide * 4);
        }
        for (int64_t m = 0; m < rows; m++)
            add_chunk(wide, chunk == seen.first_chunk, r.peaks[m], r.totals[m], r.whole + m * wide, chunk_peaks[m],
                      sum(load(chunk_totals[m])), s.sums + m * wide);
    }
}

void attend(const Attention& a, const Queries& all, float* scratch) {
    const TileScratch s = carve_tiles(a, scratch);
    TileState state;
    if (a.latent && a.tiled() && all.count > 16)
        return attend_shared(a, all, 16, s.rest,
                             [&](const Queries& q, int64_t chunk, const Turned& turned, Running& r) {
                                 TileScratch own = s;
                                 for (Scratch& block : own.of) block.turned = turned;
                                 attend_tiles(a, q, chunk, chunk + 1, own, state, r);
                             });
    each_tile(a, all, 16, [&](const Queries& q) {
        Running r = started(s.whole);
        attend_tiles(a, q, 0, INT64_MAX, s, state, r);
        write_rows(a, q, r);
    });
}

}  // namespace
}  // namespace inflight
