// Attention over the paged cache, in place. A query takes the keys in blocks of 64 that begin at multiples of 64, with the
// running maximum of Milakov and Gimelshein (2018); after every 512 keys the result is merged into the whole, so that
// threads can share a long context (Dao et al., 2023, "flash decoding"). Both borders belong to the position, not to the
// step: a decoding token and a token of a prompt, in whatever company, are computed alike. Keys that a query does not see
// have weight exactly 0.
namespace inflight {
namespace {

constexpr float kNever = -1e30f;  // below every score: the maximum of nothing

struct Scratch {
    float* scores;        // [rows][64]
    uint16_t* chances;    // [rows][64], or floats
    float* chances_float;
    float* sums;          // [rows][depth] of this chunk
    float* whole;         // [rows][depth] of all chunks
    char* queries;        // [depth / 2][rows] pairs, or [depth][rows] floats
    char* keys;           // four sub-blocks, where they cannot be read in place
    char* values;
    float* key_scales;    // [64]
    float* value_scales;
};

INLINE float* take(float*& from, int64_t floats) {
    float* at = from;
    from += (floats + 15) / 16 * 16;
    return at;
}

Scratch cut(const Attention& a, float* from) {
    constexpr int64_t most = 12;
    Scratch s;
    s.scores = take(from, most * kBlock);
    s.chances_float = take(from, most * kBlock);
    s.chances = reinterpret_cast<uint16_t*>(s.chances_float);
    s.sums = take(from, most * a.depth);
    s.whole = take(from, most * a.depth);
    s.queries = reinterpret_cast<char*>(take(from, most * a.depth));
    s.keys = reinterpret_cast<char*>(take(from, kBlock * a.depth));
    s.values = reinterpret_cast<char*>(take(from, kBlock * a.depth));
    s.key_scales = take(from, kBlock);
    s.value_scales = take(from, kBlock);
    return s;
}

constexpr int kSubs = kBlock / kSub;
static_assert(kSubs == 4);

// Where sub-blocks of 16 keys lie: in the cache, or copied to scratch.
struct Subs {
    const char* keys[kSubs];
    const char* values[kSubs];
    int64_t count;  // of them; the others of the block are seen by nobody
};

INLINE int64_t slot_of(const Attention& a, const int32_t* table, int64_t position) {
    uint32_t at = static_cast<uint32_t>(position), size = static_cast<uint32_t>(a.block_size);  // a short division
    return static_cast<int64_t>(table[at / size]) * a.block_size + at % size;
}

template <class T>
void copy_positions(const Attention& a, const Queries& q, int64_t first, int64_t last, char* keys, char* values) {
    T* k = reinterpret_cast<T*>(keys);
    T* v = reinterpret_cast<T*>(values);
    std::memset(keys, 0, static_cast<size_t>(kSub * a.depth) * sizeof(T));
    std::memset(values, 0, static_cast<size_t>(kSub * a.depth) * sizeof(T));
    for (int64_t p = first; p < last; p++) {
        int64_t at = place(a, q.kv_head, slot_of(a, q.table, p)), j = p - first;
        const T* key = reinterpret_cast<const T*>(a.keys + at);
        const T* value = reinterpret_cast<const T*>(a.values + at);
        if (sizeof(T) == 4) {
            for (int64_t d = 0; d < a.depth; d++) k[d * kSub + j] = key[d];
            std::memcpy(v + j * a.depth, value, static_cast<size_t>(a.depth) * sizeof(T));
            continue;
        }
        for (int64_t d = 0; d < a.depth; d++) k[(d / 2 * kSub + j) * 2 + d % 2] = key[d];
        for (int64_t d = 0; d < a.depth; d++) v[(j / 2 * a.depth + d) * 2 + j % 2] = value[d];
    }
}

// Integers of one byte are exact in bfloat16.
void widen(const int8_t* from, int64_t n, uint16_t* to) {
    for (int64_t i = 0; i < n; i += kLanes) to_bf16(from_int8(from + i), to + i);
}

// The first `count` values of a sub-block. What a former request left behind them must not reach anybody: a product of 0
// and infinity is not 0.
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

INLINE Subs find(const Attention& a, const Queries& q, int64_t block, int64_t end, const Scratch& s) {
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
                int64_t at = p < last ? scale_place(a, q.kv_head, slot_of(a, q.table, p)) : 0;
                s.key_scales[p - block] = p < last ? a.key_scales[at] : 0.0f;
                s.value_scales[p - block] = p < last ? a.value_scales[at] : 0.0f;
            }
        }
        if (!a.tiled()) {
            if (a.type == KvType::kFloat) copy_positions<float>(a, q, first, last, keys, values);
            if (a.type == KvType::kBf16) copy_positions<uint16_t>(a, q, first, last, keys, values);
            if (a.type == KvType::kInt8) {
                alignas(64) int8_t narrow[2][kSub * kMostDepth];
                copy_positions<int8_t>(a, q, first, last, reinterpret_cast<char*>(narrow[0]), reinterpret_cast<char*>(narrow[1]));
                widen(narrow[0], size, reinterpret_cast<uint16_t*>(keys));
                widen(narrow[1], size, reinterpret_cast<uint16_t*>(values));
            }
            subs.keys[i] = keys;
            subs.values[i] = values;
            continue;
        }
        int64_t offset = place(a, q.kv_head, slot_of(a, q.table, first));
        if (a.type == KvType::kInt8) {
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

// Where the next block's bytes lie, after the last one those of what follows. They are asked for line by line while this
// block is computed: pages of the cache lie anywhere, which no prefetcher foresees, and asked for all at once they would
// keep everything else waiting.
struct Ahead {
    const char* keys[kSubs];
    const char* values[kSubs];
};

INLINE Ahead foresee(const Attention& a, const Queries& q, int64_t block, int64_t end, const Subs& now) {
    Keys from{q.table, q.kv_head, block, end};
    if (block >= end) from = q.next;
    Ahead next;
    for (int64_t i = 0; i < kSubs; i++) {
        int64_t first = from.begin + i * kSub;
        if (!a.tiled() || first >= from.end) {
            next.keys[i] = now.keys[0];
            next.values[i] = now.values[0];
            continue;
        }
        int64_t offset = place(a, from.kv_head, slot_of(a, from.table, first));
        next.keys[i] = a.keys + offset;
        next.values[i] = a.values + offset;
    }
    return next;
}

template <int M, bool Wide>
INLINE void score(const Attention& a, const Subs& subs, const Ahead& next, const Scratch& s) {
    for (int64_t i = 0; i < subs.count; i += 2) {
        const char* left = subs.keys[i];
        const char* right = i + 1 < subs.count ? subs.keys[i + 1] : left;
        F sums[M][2];
        EACH_ROW for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = zero();
        const char* q = s.queries;
        const char* left_ahead = next.keys[i];
        const char* right_ahead = next.keys[i + 1];
        for (int64_t d = 0; d < a.depth; d += Wide ? 1 : 2, left += 64, right += 64, q += 4 * M) {
            __builtin_prefetch(left_ahead + (left - subs.keys[i]), 0, 2);
            __builtin_prefetch(right_ahead + (left - subs.keys[i]), 0, 2);
            if (Wide) {
                F first = load(reinterpret_cast<const float*>(left)), second = load(reinterpret_cast<const float*>(right));
                EACH_ROW for (int m = 0; m < M; m++) {
                    F one = splat(reinterpret_cast<const float*>(q)[m]);
                    sums[m][0] = fma(one, first, sums[m][0]);
                    sums[m][1] = fma(one, second, sums[m][1]);
                }
            } else {
                Line2 first = line2(left), second = line2(right);
                EACH_ROW for (int m = 0; m < M; m++) {
                    Pair two = pair(q + 4 * m);
                    sums[m][0] = dot2(sums[m][0], first, two);
                    sums[m][1] = dot2(sums[m][1], second, two);
                }
            }
        }
        EACH_ROW for (int m = 0; m < M; m++) {
            store(s.scores + m * kBlock + i * kSub, sums[m][0]);
            store(s.scores + m * kBlock + (i + 1) * kSub, sums[m][1]);
        }
    }
}

// What is done to scores before their maximum: with a scale of each key, or a cap, the scale of all is not left to the end.
INLINE F early(const Attention& a, const Scratch& s, int64_t i, F x) {
    x = mul(x, splat(a.softcap != 0.0f ? a.scale / a.softcap : a.scale * kLog2e));
    if (a.type == KvType::kInt8) x = mul(x, load(s.key_scales + i * kSub));
    return a.softcap != 0.0f ? mul(hyperbolic_tangent(x), splat(a.softcap * kLog2e)) : x;
}

// Scores to chances: the maximum of each row first, then the factors that former sums take, all rows' in one go. `Late`:
// nothing is done early, and the largest score stays the largest times the scale; `All`: every row sees the whole block.
template <int M, bool Wide, bool Late, bool All>
INLINE void soften(const Attention& a, const int64_t (&from)[M], const int64_t (&to)[M], int64_t block, const Scratch& s,
                   float (&peaks)[16], F (&totals)[M], float (&factors)[16]) {
    F scale = splat(Late ? a.scale * kLog2e : 1.0f), most[M];
    EACH_ROW for (int m = 0; m < M; m++) {
        float* scores = s.scores + m * kBlock;
        F x[kSubs];
        for (int i = 0; i < kSubs; i++) {
            int64_t first = block + i * kSub;
            x[i] = load(scores + i * kSub);
            if (!Late) x[i] = early(a, s, i, x[i]);
            if (!All) x[i] = keep_lanes(x[i], from[m] - first, to[m] - first, splat(-INFINITY));
            if (!Late || !All) store(scores + i * kSub, x[i]);
        }
        most[m] = max(max(x[0], x[1]), max(x[2], x[3]));
    }
    F before = load(peaks), fresh = max(mul(highest_of(most), scale), before);
    store(factors, exp2(sub(before, fresh)));
    store(peaks, fresh);
    EACH_ROW for (int m = 0; m < M; m++) {
        const float* scores = s.scores + m * kBlock;
        F shift = splat(-peaks[m]), total = mul(totals[m], splat(factors[m]));
        for (int i = 0; i < kSubs; i++) {
            F x = fma(load(scores + i * kSub), scale, shift), chance = Wide ? exp2(x) : exp2_short(x);
            total = add(total, chance);
            if (a.type == KvType::kInt8) chance = mul(chance, load(s.value_scales + i * kSub));
            if (Wide) store(s.chances_float + m * kBlock + i * kSub, chance);
            else to_bf16(chance, s.chances + m * kBlock + i * kSub);
        }
        totals[m] = total;
    }
}

template <int M, bool Wide, int N>
INLINE void weigh(const Attention& a, const Subs& subs, const Ahead& next, const Scratch& s, const float (&factors)[16],
                  int64_t d) {
    F sums[M][N];
    EACH_ROW for (int m = 0; m < M; m++)
        for (int j = 0; j < N; j++) sums[m][j] = mul(load(s.sums + m * a.depth + d + j * kLanes), splat(factors[m]));
    for (int64_t i = 0; i < subs.count; i++) {
        const char* v = subs.values[i] + d * 4;
        const char* ahead = next.values[i] + d * 4;
        for (int64_t p = 0; p < (Wide ? kSub : kSub / 2); p++, v += a.depth * 4, ahead += a.depth * 4) {
            for (int j = 0; j < N; j++) __builtin_prefetch(ahead + j * 64, 0, 2);
            if (Wide) {
                F line[N];
                for (int j = 0; j < N; j++) line[j] = load(reinterpret_cast<const float*>(v) + j * kLanes);
                EACH_ROW for (int m = 0; m < M; m++) {
                    F one = splat(s.chances_float[m * kBlock + i * kSub + p]);
                    for (int j = 0; j < N; j++) sums[m][j] = fma(one, line[j], sums[m][j]);
                }
            } else {
                Line2 line[N];
                for (int j = 0; j < N; j++) line[j] = line2(v + j * 64);
                EACH_ROW for (int m = 0; m < M; m++) {
                    Pair two = pair(s.chances + m * kBlock + i * kSub + 2 * p);
                    for (int j = 0; j < N; j++) sums[m][j] = dot2(sums[m][j], line[j], two);
                }
            }
        }
    }
    EACH_ROW for (int m = 0; m < M; m++)
        for (int j = 0; j < N; j++) store(s.sums + m * a.depth + d + j * kLanes, sums[m][j]);
}

// A result so far (maximum, total, sums) with the next chunk's.
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

// 1 / total; a query that saw nothing at all gives zeros.
INLINE float share(float total) { return total > 0.0f ? 1.0f / total : 0.0f; }

template <int M, bool Wide>
void attend_rows(const Attention& a, const Queries& q, const Scratch& s) {
    int64_t group = a.heads / a.kv_heads;
    int64_t from[M], to[M];  // positions that a row sees
    const float* queries[M];
    int64_t begin = INT64_MAX, last_from = 0, first_to = INT64_MAX, end = 0;
    for (int m = 0; m < M; m++) {
        int64_t token = (q.first + m) / group, head = (q.first + m) % group;
        queries[m] = q.q + token * q.q_stride + head * a.dim;
        to[m] = q.positions[token] + 1;
        from[m] = a.window && to[m] > a.window ? to[m] - a.window : 0;
        begin = from[m] < begin ? from[m] : begin;
        last_from = from[m] > last_from ? from[m] : last_from;
        first_to = to[m] < first_to ? to[m] : first_to;
        end = to[m] > end ? to[m] : end;
    }
    for (int64_t d = 0; d < a.depth; d += kLanes) {
        alignas(64) char bits[4][64];
        char* at = s.queries + (Wide ? d : d / 2) * M * 4;
        int64_t values = Wide ? kLanes : kLanes / 2;
        EACH_ROW for (int m = 0; m < M; m++) {
            F x = load_part(queries[m] + d, a.dim - d < 0 ? 0 : a.dim - d);
            if (Wide) store(reinterpret_cast<float*>(bits[m % 4]), x);
            else to_bf16(x, reinterpret_cast<uint16_t*>(bits[m % 4]));
            spread_row<M>(bits, m, values, at);
        }
    }
    if (q.chunk < 0)  // lines of the result, which another thread may hold
        for (int m = 0; m < M; m++) {
            const float* out = q.out + (q.first + m) / group * q.out_stride + (q.first + m) % group * a.dim;
            for (int64_t d = 0; d < a.dim; d += kLanes) __builtin_prefetch(out + d, 1, 2);
        }
    bool late = a.type != KvType::kInt8 && a.softcap == 0.0f && a.scale > 0.0f;
    float peaks[M], totals[M];
    for (int m = 0; m < M; m++) peaks[m] = kNever, totals[m] = 0.0f;
    int64_t first_chunk = q.chunk < 0 ? begin / kChunk : q.chunk;
    int64_t last_chunk = q.chunk < 0 ? (end + kChunk - 1) / kChunk : q.chunk + 1;
    for (int64_t chunk = first_chunk; chunk < last_chunk; chunk++) {
        alignas(64) float chunk_peaks[16], factors[16];
        F chunk_totals[M];
        for (float& peak : chunk_peaks) peak = kNever;
        for (int m = 0; m < M; m++) chunk_totals[m] = zero();
        std::memset(s.sums, 0, static_cast<size_t>(M * a.depth) * 4);
        int64_t low = chunk * kChunk > begin ? chunk * kChunk : begin / kBlock * kBlock;
        int64_t high = (chunk + 1) * kChunk < end ? (chunk + 1) * kChunk : end;
        for (int64_t block = low; block < high; block += kBlock) {
            Subs subs = find(a, q, block, high, s);
            Ahead next = foresee(a, q, block + kBlock, end, subs);
            score<M, Wide>(a, subs, next, s);
            bool all = block >= last_from && block + kBlock <= first_to;
            if (!late) soften<M, Wide, false, false>(a, from, to, block, s, chunk_peaks, chunk_totals, factors);
            else if (all) soften<M, Wide, true, true>(a, from, to, block, s, chunk_peaks, chunk_totals, factors);
            else soften<M, Wide, true, false>(a, from, to, block, s, chunk_peaks, chunk_totals, factors);
            int64_t d = 0;
            for (; d + 2 * kLanes <= a.depth; d += 2 * kLanes) weigh<M, Wide, 2>(a, subs, next, s, factors, d);
            if (d < a.depth) weigh<M, Wide, 1>(a, subs, next, s, factors, d);
        }
        for (int m = 0; m < M; m++) {
            float* whole = s.whole + m * a.depth;
            const float* sums = s.sums + m * a.depth;
            if (chunk != first_chunk) {
                merge_into(a.depth, peaks[m], totals[m], whole, chunk_peaks[m], sum(chunk_totals[m]), sums);
                continue;
            }
            peaks[m] = chunk_peaks[m];
            totals[m] = sum(chunk_totals[m]);
            for (int64_t d = 0; d < a.depth; d += kLanes) store(whole + d, add(load(sums + d), zero()));  // as a merge: no -0
        }
    }
    for (int m = 0; m < M; m++) {
        float* whole = s.whole + m * a.depth;
        if (q.chunk >= 0) {
            float* out = q.out + m * (a.depth + 2);
            out[0] = peaks[m];
            out[1] = totals[m];
            std::memcpy(out + 2, whole, static_cast<size_t>(a.depth) * 4);
            continue;
        }
        int64_t token = (q.first + m) / group, head = (q.first + m) % group;
        float* out = q.out + token * q.out_stride + head * a.dim;
        F inverse = splat(share(totals[m]));
        for (int64_t d = 0; d < a.dim; d += kLanes) store_part(out + d, mul(load(whole + d), inverse), a.dim - d);
    }
}

template <int M>
struct Rows {
    static void run(const Attention& a, const Queries& q, const Scratch& s) {
        if (q.count < M) return Rows<M - 1>::run(a, q, s);
        if (a.type == KvType::kFloat) return attend_rows<M, true>(a, q, s);
        attend_rows<M, false>(a, q, s);
    }
};
template <>
struct Rows<0> {
    static void run(const Attention&, const Queries&, const Scratch&) {}
};

void attend(const Attention& a, const Queries& all, float* scratch) {
    Scratch s = cut(a, scratch);
    Queries q = all;
    for (int64_t done = 0; done < all.count; done += q.count) {
        q.first = all.first + done;
        q.count = all.count - done < kQueryRows ? all.count - done : kQueryRows;
        if (all.chunk >= 0) q.out = all.out + done * (a.depth + 2);
        Rows<kQueryRows>::run(a, q, s);
    }
}

// Partial results of chunks in their order: the same sums as where one thread computed them all.
void merge(const Attention& a, const float* const* partial, int64_t stride, int64_t count, float* out) {
    alignas(64) float whole[kMostDepth] = {};
    float peak = kNever, total = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        const float* next = *partial + i * stride;
        merge_into(a.depth, peak, total, whole, next[0], next[1], next + 2);
    }
    F inverse = splat(share(total));
    for (int64_t d = 0; d < a.dim; d += kLanes) store_part(out + d, mul(load(whole + d), inverse), a.dim - d);
}

}  // namespace
}  // namespace inflight
