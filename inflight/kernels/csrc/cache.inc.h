// The parts of attention that dot products and tiles share: where keys and values lie, and how chunks are merged.
namespace inflight {
namespace {

constexpr int64_t kMostDepth = 1024;  // of a head; checked where a layer is added
constexpr float kNever = -1e30f;      // below every score: the maximum of nothing

// Bytes from the layer's first key (value) to that of a slot. An extent of positions holds all layers, so that a short
// context touches few pages; within an extent the blocks of one head follow each other, so that they are read as a
// stream.
INLINE int64_t kv_offset(const Attention& a, int64_t kv_head, int64_t slot) {
    uint64_t at = static_cast<uint64_t>(slot), extent = at / kExtent, within = at % kExtent;
    return static_cast<int64_t>(extent) * a.extent +
           (kv_head * kExtent + static_cast<int64_t>(within)) * a.depth * kv_bytes(a.type);
}

INLINE int64_t scale_index(const Attention& a, int64_t kv_head, int64_t slot) {
    return kv_head * a.blocks * a.block_size + slot;
}

// Values of latents, which are turned out of keys, of a chunk that several tiles of queries see; `data` null: every
// tile turns its own.
struct Turned {
    char* data;   // [chunk's sub-blocks][16 * value depth]
    bool* done;   // [chunk's sub-blocks]
    int64_t end;  // of the keys that any of the queries sees
};

struct Scratch {
    float* scores;    // [rows][64]
    uint16_t* probs;  // [rows][64] bfloat16; the same memory as probs_float
    float* probs_float;
    float* sums;    // [rows][value depth] of this chunk
    float* whole;   // [rows][value depth] of all chunks
    char* queries;  // [depth / 2][rows] pairs, or [depth][rows] floats
    char* keys;     // four sub-blocks that cannot be read in place
    char* values;
    float* key_scales;  // [64]
    float* value_scales;
    Turned turned;
    float* rest;  // of the memory
};

// What came of the chunks so far, of a tile of queries.
struct Running {
    float peaks[16], totals[16];
    float* whole;  // [rows][value depth]
};

constexpr int64_t kChunkSubs = kChunk / kSub;

INLINE float* take(float*& from, int64_t floats) {
    float* at = from;
    from += (floats + 15) / 16 * 16;
    return at;
}

INLINE Scratch carve(const Attention& a, float* from) {
    constexpr int64_t most = 12;
    Scratch s;
    s.scores = take(from, most * kBlock);
    s.probs_float = take(from, most * kBlock);
    s.probs = reinterpret_cast<uint16_t*>(s.probs_float);
    s.sums = take(from, most * a.depth);
    s.whole = take(from, most * a.depth);
    s.queries = reinterpret_cast<char*>(take(from, most * a.depth));
    s.keys = reinterpret_cast<char*>(take(from, kBlock * a.depth));
    s.values = reinterpret_cast<char*>(take(from, kBlock * a.depth));
    s.key_scales = take(from, kBlock);
    s.value_scales = take(from, kBlock);
    s.turned = {};
    s.rest = from;
    return s;
}

constexpr int kSubs = kBlock / kSub;
static_assert(kSubs == 4);

// Where sub-blocks of 16 keys lie: in the cache, or copied to scratch.
struct Subs {
    const char* keys[kSubs];
    const char* values[kSubs];
    int64_t count;  // of sub-blocks; no query sees the others of the block
};

INLINE int64_t slot_of(const Attention& a, const int32_t* table, int64_t position) {
    uint32_t at = static_cast<uint32_t>(position), size = static_cast<uint32_t>(a.block_size);  // a short division
    return static_cast<int64_t>(table[at / size]) * a.block_size + at % size;
}

template <class T>
void copy_positions(const Attention& a, const Queries& q, int64_t first, int64_t last, char* keys, char* values) {
    T* k = reinterpret_cast<T*>(keys);
    T* v = reinterpret_cast<T*>(values);
    const int64_t wide = a.value_depth();
    std::memset(keys, 0, static_cast<size_t>(kSub * a.depth) * sizeof(T));
    std::memset(values, 0, static_cast<size_t>(kSub * wide) * sizeof(T));
    for (int64_t p = first; p < last; p++) {
        int64_t at = kv_offset(a, q.kv_head, slot_of(a, q.table, p)), j = p - first;
        const T* key = reinterpret_cast<const T*>(a.keys + at);
        const T* value = a.latent ? key : reinterpret_cast<const T*>(a.values + at);
        if (sizeof(T) == 4) {
            for (int64_t d = 0; d < a.depth; d++) k[d * kSub + j] = key[d];
            std::memcpy(v + j * wide, value, static_cast<size_t>(wide) * sizeof(T));
            continue;
        }
        for (int64_t d = 0; d < a.depth; d++) k[(d / 2 * kSub + j) * 2 + d % 2] = key[d];
        for (int64_t d = 0; d < wide; d++) v[(j / 2 * wide + d) * 2 + j % 2] = value[d];
    }
}

// Integers of one byte are exact in bfloat16.
void widen(const int8_t* from, int64_t n, uint16_t* to) {
    for (int64_t i = 0; i < n; i += kLanes) to_bf16(from_int8(from + i), to + i);
}

// Copies the first `count` values of a sub-block and zeros the rest. The rest may be left of a former request, and 0
// times an infinity or a NaN is not 0.
INLINE void copy_values(const Attention& a, const char* from, int64_t count, char* to) {
    std::memset(to, 0, static_cast<size_t>(kSub * a.depth * (a.type == KvType::kFloat ? 4 : 2)));
    if (a.type == KvType::kFloat) {
        std::memcpy(to, from, static_cast<size_t>(count * a.depth) * 4);
        return;
    }
    int64_t pairs = count / 2 * a.depth * 4;
    std::memcpy(to, from, static_cast<size_t>(pairs));
    if (count % 2)
        for (int64_t d = 0; d < a.depth; d++) std::memcpy(to + pairs + 4 * d, from + pairs + 4 * d, 2);
}

// The values of a sub-block whose keys they are the first components of, of the first `count` keys; the others are
// zeros, as above.
INLINE void values_of_keys(const Attention& a, const char* keys, int64_t count, char* to) {
    const int64_t wide = a.value_depth(), line = wide * 4;  // of one position, or of two in bfloat16
    if (count > kSub) count = kSub;
    if (a.type == KvType::kFloat) {
        for (int64_t d = 0; d < wide; d += kLanes) turn_floats(keys + d * 64, to + d * 4, line);
        std::memset(to + count * line, 0, static_cast<size_t>((kSub - count) * line));
        return;
    }
    for (int64_t d = 0; d < wide; d += kLanes) turn_pairs(keys + d * 32, to + d * 4, line);
    const int64_t pairs = (count + 1) / 2;
    for (int64_t pair = pairs; pair < kSub / 2; pair++) std::memset(to + pair * line, 0, static_cast<size_t>(line));
    if (count % 2)
        for (int64_t d = 0; d < wide; d++) std::memset(to + count / 2 * line + 4 * d + 2, 0, 2);
}

INLINE Subs find_subs(const Attention& a, const Queries& q, int64_t block, int64_t end, const Scratch& s) {
    Subs subs;
    int64_t size = kSub * a.depth;
    subs.count = (end - block + kSub - 1) / kSub;
    if (subs.count > kSubs) subs.count = kSubs;
    for (int64_t i = 0; i < subs.count; i++) {
        int64_t first = block + i * kSub, last = first + kSub < end ? first + kSub : end;
        int64_t wide = (a.type == KvType::kFloat ? 4 : 2) * size;
        char* keys = s.keys + i * wide;
        char* values = s.values + i * wide;
        if (a.type == KvType::kInt8) {
            for (int64_t p = first; p < first + kSub; p++) {
                int64_t at = p < last ? scale_index(a, q.kv_head, slot_of(a, q.table, p)) : 0;
                s.key_scales[p - block] = p < last ? a.key_scales[at] : 0.0f;
                s.value_scales[p - block] = p < last ? a.value_scales[at] : 0.0f;
            }
        }
        if (!a.tiled()) {
            if (a.type == KvType::kFloat) copy_positions<float>(a, q, first, last, keys, values);
            if (a.type == KvType::kBf16) copy_positions<uint16_t>(a, q, first, last, keys, values);
            if (a.type == KvType::kInt8) {
                alignas(64) int8_t narrow[2][kSub * kMostDepth];
                copy_positions<int8_t>(a, q, first, last, reinterpret_cast<char*>(narrow[0]),
                                       reinterpret_cast<char*>(narrow[1]));
                widen(narrow[0], size, reinterpret_cast<uint16_t*>(keys));
                widen(narrow[1], kSub * a.value_depth(), reinterpret_cast<uint16_t*>(values));
            }
            subs.keys[i] = keys;
            subs.values[i] = values;
            continue;
        }
        int64_t offset = kv_offset(a, q.kv_head, slot_of(a, q.table, first));
        if (a.latent) {
            subs.keys[i] = a.keys + offset;
            if (a.type == KvType::kInt8) {
                widen(reinterpret_cast<const int8_t*>(a.keys + offset), size, reinterpret_cast<uint16_t*>(keys));
                subs.keys[i] = keys;
            }
            const int64_t place = first % kChunk / kSub;
            const Turned& t = s.turned;
            if (t.data) values = t.data + place * kSub * a.value_depth() * (a.type == KvType::kFloat ? 4 : 2);
            if (!t.data || !t.done[place])
                values_of_keys(a, subs.keys[i], (t.data && t.end > last ? t.end : last) - first, values);
            if (t.data) t.done[place] = true;
            subs.values[i] = values;
        } else if (a.type == KvType::kInt8) {
            widen(reinterpret_cast<const int8_t*>(a.keys + offset), size, reinterpret_cast<uint16_t*>(keys));
            widen(reinterpret_cast<const int8_t*>(a.values + offset), size, reinterpret_cast<uint16_t*>(values));
            subs.keys[i] = keys;
            subs.values[i] = values;
        } else {
            subs.keys[i] = a.keys + offset;
            subs.values[i] = a.values + offset;
            if (last - first < kSub) {
                copy_values(a, subs.values[i], last - first, values);
                subs.values[i] = values;
            }
        }
    }
    return subs;
}

// The next block of keys and values, after the last block those of the next task. They are prefetched line by line
// while this block is computed: the hardware cannot predict where the next page of the cache lies, and many prefetches
// at once would delay all other loads.
struct Prefetch {
    const char* keys[kSubs];
    const char* values[kSubs];
};

INLINE Prefetch prefetch_of(const Attention& a, const Queries& q, int64_t block, int64_t end, const Subs& now) {
    Keys from{q.table, q.kv_head, block, end};
    if (block >= end) from = q.next;
    Prefetch next;
    for (int64_t i = 0; i < kSubs; i++) {
        int64_t first = from.begin + i * kSub;
        if (!a.tiled() || first >= from.end) {
            next.keys[i] = now.keys[0];
            next.values[i] = now.values[0];
            continue;
        }
        int64_t offset = kv_offset(a, from.kv_head, slot_of(a, from.table, first));
        next.keys[i] = a.keys + offset;
        next.values[i] = a.latent ? now.values[0] : a.values + offset;  // those are made of the keys
    }
    return next;
}

// Scales and caps scores before their maximum is taken, which a scale for each key or a cap may move.
INLINE F scaled_and_capped(const Attention& a, const Scratch& s, int64_t i, F x) {
    x = mul(x, splat(a.softcap != 0.0f ? a.scale / a.softcap : a.scale * kLog2e));
    if (a.type == KvType::kInt8) x = mul(x, load(s.key_scales + i * kSub));
    return a.softcap != 0.0f ? mul(hyperbolic_tangent(x), splat(a.softcap * kLog2e)) : x;
}

// Merges the next chunk's maximum, total and sums into the result so far.
INLINE void merge_into(int64_t depth, float& peak, float& total, float* whole, float next_peak, float next_total,
                       const float* next) {
    float most = peak > next_peak ? peak : next_peak;
    alignas(64) float factors[16] = {peak - most, next_peak - most};
    store(factors, exp2(load(factors)));
    F mine = splat(factors[0]), others = splat(factors[1]);
    for (int64_t d = 0; d < depth; d += kLanes)
        store(whole + d, fma(load(next + d), others, mul(load(whole + d), mine)));
    total = total * factors[0] + next_total * factors[1];
    peak = most;
}

// 1 / total, and 0 for a query that saw no key.
INLINE float reciprocal(float total) { return total > 0.0f ? 1.0f / total : 0.0f; }

// What a query's sums are multiplied with: 1 / total, where a sink adds its own weight to the total.
INLINE float share_of(const Attention& a, int64_t head, float peak, float total) {
    if (!a.sinks) return reciprocal(total);
    const float sink = a.sinks[head] * kLog2e, most = peak > sink ? peak : sink;
    alignas(64) float factors[16] = {peak - most, sink - most};
    store(factors, exp2(load(factors)));
    return factors[0] / (total * factors[0] + factors[1]);
}

// As merge_into, and the first chunk becomes the result so far.
INLINE void add_chunk(int64_t depth, bool first, float& peak, float& total, float* whole, float next_peak,
                      float next_total, const float* next) {
    if (!first) return merge_into(depth, peak, total, whole, next_peak, next_total, next);
    peak = next_peak;
    total = next_total;
    for (int64_t d = 0; d < depth; d += kLanes) store(whole + d, add(load(next + d), zero()));  // as a merge: no -0
}

// The output of query m.
INLINE float* result_of(const Attention& a, const Queries& q, int64_t m) {
    int64_t group = a.heads / a.kv_heads, token = (q.first + m) / group, head = (q.first + m) % group;
    return q.out + token * q.out_stride + head * a.value_dim();
}

// Prefetches the lines of the outputs, which may lie in another processor's cache.
INLINE void prefetch_result(const Attention& a, const Queries& q, int64_t rows) {
    if (q.chunk >= 0) return;
    for (int64_t m = 0; m < rows; m++) {
        const float* out = result_of(a, q, m);
        for (int64_t d = 0; d < a.value_dim(); d += kLanes) __builtin_prefetch(out + d, 1, 2);
    }
}

// Writes query m's result, or the partial result of one chunk.
INLINE void write_row(const Attention& a, const Queries& q, int64_t m, float peak, float total, const float* whole) {
    if (q.chunk >= 0) {
        float* out = q.out + m * (a.value_depth() + 2);
        out[0] = peak;
        out[1] = total;
        std::memcpy(out + 2, whole, static_cast<size_t>(a.value_depth()) * 4);
        return;
    }
    float* out = result_of(a, q, m);
    const int64_t group = a.heads / a.kv_heads, head = q.kv_head * group + (q.first + m) % group;
    F inverse = splat(share_of(a, head, peak, total));
    for (int64_t d = 0, n = a.value_dim(); d < n; d += kLanes)
        store_part(out + d, mul(load(whole + d), inverse), n - d);
}

// The positions [from, to) that each of up to 16 queries sees.
struct Seen {
    int64_t from[16], to[16];
    const float* queries[16];
    int64_t begin = INT64_MAX, last_from = 0, first_to = INT64_MAX, end = 0;
    int64_t first_chunk, last_chunk;

    Seen(const Attention& a, const Queries& q, int64_t rows) {
        int64_t group = a.heads / a.kv_heads;
        for (int64_t m = 0; m < rows; m++) {
            int64_t token = (q.first + m) / group, head = (q.first + m) % group;
            queries[m] = q.q + token * q.q_stride + head * a.dim;
            const int64_t own = q.positions[token] + 1;
            to[m] = q.until ? q.until[token] + 1 : own;
            from[m] = a.window && own > a.window ? own - a.window : 0;
            begin = from[m] < begin ? from[m] : begin;
            last_from = from[m] > last_from ? from[m] : last_from;
            first_to = to[m] < first_to ? to[m] : first_to;
            end = to[m] > end ? to[m] : end;
        }
        first_chunk = q.chunk < 0 ? begin / kChunk : q.chunk;
        last_chunk = q.chunk < 0 ? (end + kChunk - 1) / kChunk : q.chunk + 1;
    }
    // The part of a chunk that some query sees.
    int64_t low(int64_t chunk) const { return chunk * kChunk > begin ? chunk * kChunk : begin / kBlock * kBlock; }
    int64_t high(int64_t chunk) const { return (chunk + 1) * kChunk < end ? (chunk + 1) * kChunk : end; }
    // Whether every query sees all of [first, last).
    bool by_all(int64_t first, int64_t last) const { return first >= last_from && last <= first_to; }
};

INLINE Running started(float* whole) {
    Running r;
    r.whole = whole;
    for (int m = 0; m < 16; m++) r.peaks[m] = kNever, r.totals[m] = 0.0f;
    return r;
}

INLINE void write_rows(const Attention& a, const Queries& q, const Running& r) {
    for (int64_t m = 0; m < q.count; m++) write_row(a, q, m, r.peaks[m], r.totals[m], r.whole + m * a.value_depth());
}

// Calls work(queries) for tiles of at most `rows` queries.
template <class Work>
INLINE void each_tile(const Attention& a, const Queries& all, int64_t rows, Work work) {
    Queries q = all;
    for (int64_t done = 0; done < all.count; done += q.count) {
        q.first = all.first + done;
        q.count = all.count - done < rows ? all.count - done : rows;
        if (all.chunk >= 0) q.out = all.out + done * (a.value_depth() + 2);
        work(q);
    }
}

// Attention to latents: chunk by chunk, so that several tiles share values that were turned once. Calls work(queries,
// chunk, turned, running) for each tile.
template <class Work>
INLINE void attend_shared(const Attention& a, const Queries& all, int64_t rows, float* memory, Work work) {
    const int64_t wide = a.value_depth();
    bool done[kChunkSubs];
    Turned turned{reinterpret_cast<char*>(take(memory, kChunk * wide)), done, 0};
    float* wholes = take(memory, kSharedTiles * rows * wide);
    each_tile(a, all, kSharedTiles * rows, [&](const Queries& some) {
        Running running[kSharedTiles];
        int64_t first = INT64_MAX, last = 0, tile = 0;
        turned.end = 0;
        each_tile(a, some, rows, [&](const Queries& q) {
            const Seen seen(a, q, q.count);
            first = seen.first_chunk < first ? seen.first_chunk : first;
            last = seen.last_chunk > last ? seen.last_chunk : last;
            turned.end = seen.end > turned.end ? seen.end : turned.end;
            running[tile] = started(wholes + tile * rows * wide);
            tile++;
        });
        for (int64_t chunk = first; chunk < last; chunk++) {
            tile = 0;
            for (bool& each : done) each = false;
            each_tile(a, some, rows, [&](const Queries& q) { work(q, chunk, turned, running[tile++]); });
        }
        tile = 0;
        each_tile(a, some, rows, [&](const Queries& q) { write_rows(a, q, running[tile++]); });
    });
}

}  // namespace
}  // namespace inflight
