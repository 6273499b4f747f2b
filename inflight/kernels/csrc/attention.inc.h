// Attention that reads the paged cache in place. A query takes the keys in blocks of 64, with the running maximum of
// Milakov and Gimelshein (2018). After each chunk of 512 keys the chunk's result is merged into the whole, so that
// threads can share a long context ("flash decoding", Dao et al., 2023). Blocks and chunks begin at multiples of 64 and
// 512 positions, wherever the step begins: a token gets the same bits in a prompt, while decoding, and beside any other
// rows. Keys that a query does not see have weight exactly 0.
namespace inflight {
namespace {

template <int M, bool Wide>
INLINE void score(const Attention& a, const Subs& subs, const Prefetch& next, const Scratch& s) {
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
                F first = load(reinterpret_cast<const float*>(left)),
                  second = load(reinterpret_cast<const float*>(right));
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

template <int M>
INLINE void add_bias(const Queries& q, int64_t block, int64_t count, const Scratch& s) {
    const float* bias = q.bias + q.first * q.bias_stride + block;
    for (int m = 0; m < M; m++, bias += q.bias_stride)
        for (int64_t i = 0; i < count; i++) {
            float* at = s.scores + m * kBlock + i * kSub;
            store(at, add(load(at), load(bias + i * kSub)));
        }
}

// One round of the online softmax: turns a block's scores into probabilities (before they are divided by their sum),
// and gives each row's new maximum and the factor by which its former sums shrink. `Late`: the scale is applied after
// the maximum, which it does not move. `All`: every row sees the whole block.
template <int M, bool Wide, bool Late, bool All>
INLINE void softmax(const Attention& a, const Seen& seen, int64_t block, const Scratch& s, float (&peaks)[16],
                    F (&totals)[M], float (&factors)[16]) {
    F scale = splat(Late ? a.scale * kLog2e : 1.0f), most[M];
    EACH_ROW for (int m = 0; m < M; m++) {
        float* scores = s.scores + m * kBlock;
        F x[kSubs];
        for (int i = 0; i < kSubs; i++) {
            int64_t first = block + i * kSub;
            x[i] = load(scores + i * kSub);
            if (!Late) x[i] = scaled_and_capped(a, s, i, x[i]);
            if (!All) x[i] = keep_lanes(x[i], seen.from[m] - first, seen.to[m] - first, splat(-INFINITY));
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
            F x = fma(load(scores + i * kSub), scale, shift), prob = Wide ? exp2(x) : exp2_short(x);
            total = add(total, prob);
            if (a.type == KvType::kInt8) prob = mul(prob, load(s.value_scales + i * kSub));
            if (Wide)
                store(s.probs_float + m * kBlock + i * kSub, prob);
            else
                to_bf16(prob, s.probs + m * kBlock + i * kSub);
        }
        totals[m] = total;
    }
}

template <int M, bool Wide, int N>
INLINE void weight_values(const Attention& a, const Subs& subs, const Prefetch& next, const Scratch& s,
                          const float (&factors)[16], int64_t d) {
    const int64_t wide = a.value_depth();
    F sums[M][N];
    EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < N; j++) sums[m][j] =
        mul(load(s.sums + m * wide + d + j * kLanes), splat(factors[m]));
    for (int64_t i = 0; i < subs.count; i++) {
        const char* v = subs.values[i] + d * 4;
        const char* ahead = next.values[i] + d * 4;
        for (int64_t p = 0; p < (Wide ? kSub : kSub / 2); p++, v += wide * 4, ahead += wide * 4) {
            for (int j = 0; j < N; j++) __builtin_prefetch(ahead + j * 64, 0, 2);
            if (Wide) {
                F line[N];
                for (int j = 0; j < N; j++) line[j] = load(reinterpret_cast<const float*>(v) + j * kLanes);
                EACH_ROW for (int m = 0; m < M; m++) {
                    F one = splat(s.probs_float[m * kBlock + i * kSub + p]);
                    for (int j = 0; j < N; j++) sums[m][j] = fma(one, line[j], sums[m][j]);
                }
            } else {
                Line2 line[N];
                for (int j = 0; j < N; j++) line[j] = line2(v + j * 64);
                EACH_ROW for (int m = 0; m < M; m++) {
                    Pair two = pair(s.probs + m * kBlock + i * kSub + 2 * p);
                    for (int j = 0; j < N; j++) sums[m][j] = dot2(sums[m][j], line[j], two);
                }
            }
        }
    }
    EACH_ROW for (int m = 0; m < M; m++) for (int j = 0; j < N; j++)
        store(s.sums + m * wide + d + j * kLanes, sums[m][j]);
}

template <int M, bool Wide>
void attend_chunks(const Attention& a, const Queries& q, int64_t first, int64_t last, const Scratch& s, Running& r) {
    const Seen seen(a, q, M);
    const int64_t wide = a.value_depth();
    for (int64_t d = 0; d < a.depth; d += kLanes) {
        alignas(64) char bits[4][64];
        char* at = s.queries + (Wide ? d : d / 2) * M * 4;
        int64_t values = Wide ? kLanes : kLanes / 2;
        EACH_ROW for (int m = 0; m < M; m++) {
            F x = load_part(seen.queries[m] + d, a.dim - d < 0 ? 0 : a.dim - d);
            if (Wide)
                store(reinterpret_cast<float*>(bits[m % 4]), x);
            else
                to_bf16(x, reinterpret_cast<uint16_t*>(bits[m % 4]));
            spread_row<M>(bits, m, values, at);
        }
    }
    prefetch_result(a, q, M);
    bool late = a.type != KvType::kInt8 && a.softcap == 0.0f && a.scale > 0.0f;
    if (first < seen.first_chunk) first = seen.first_chunk;
    if (last > seen.last_chunk) last = seen.last_chunk;
    for (int64_t chunk = first; chunk < last; chunk++) {
        alignas(64) float chunk_peaks[16], factors[16];
        F chunk_totals[M];
        for (float& peak : chunk_peaks) peak = kNever;
        for (int m = 0; m < M; m++) chunk_totals[m] = zero();
        std::memset(s.sums, 0, static_cast<size_t>(M * wide) * 4);
        const int64_t high = seen.high(chunk);
        for (int64_t block = seen.low(chunk); block < high; block += kBlock) {
            Subs subs = find_subs(a, q, block, high, s);
            Prefetch next = prefetch_of(a, q, block + kBlock, seen.end, subs);
            score<M, Wide>(a, subs, next, s);
            if (q.bias) add_bias<M>(q, block, subs.count, s);
            bool all = seen.by_all(block, block + kBlock);
            if (!late)
                softmax<M, Wide, false, false>(a, seen, block, s, chunk_peaks, chunk_totals, factors);
            else if (all)
                softmax<M, Wide, true, true>(a, seen, block, s, chunk_peaks, chunk_totals, factors);
            else
                softmax<M, Wide, true, false>(a, seen, block, s, chunk_peaks, chunk_totals, factors);
            int64_t d = 0;
            for (; d + 2 * kLanes <= wide; d += 2 * kLanes) weight_values<M, Wide, 2>(a, subs, next, s, factors, d);
            if (d < wide) weight_values<M, Wide, 1>(a, subs, next, s, factors, d);
        }
        for (int m = 0; m < M; m++)
            add_chunk(wide, chunk == seen.first_chunk, r.peaks[m], r.totals[m], r.whole + m * wide, chunk_peaks[m],
                      sum(chunk_totals[m]), s.sums + m * wide);
    }
}

template <int M>
struct AttendRows {
    static void run(const Attention& a, const Queries& q, int64_t first, int64_t last, const Scratch& s, Running& r) {
        if (q.count < M) return AttendRows<M - 1>::run(a, q, first, last, s, r);
        if (a.type == KvType::kFloat) return attend_chunks<M, true>(a, q, first, last, s, r);
        attend_chunks<M, false>(a, q, first, last, s, r);
    }
};
template <>
struct AttendRows<0> {
    static void run(const Attention&, const Queries&, int64_t, int64_t, const Scratch&, Running&) {}
};

void attend(const Attention& a, const Queries& all, float* scratch) {
    const Scratch s = carve(a, scratch);
    if (a.latent && a.tiled() && all.count > kQueryRows)
        return attend_shared(a, all, kQueryRows, s.rest,
                             [&](const Queries& q, int64_t chunk, const Turned& turned, Running& r) {
                                 Scratch own = s;
                                 own.turned = turned;
                                 AttendRows<kQueryRows>::run(a, q, chunk, chunk + 1, own, r);
                             });
    each_tile(a, all, kQueryRows, [&](const Queries& q) {
        Running r = started(s.whole);
        AttendRows<kQueryRows>::run(a, q, 0, INT64_MAX, s, r);
        write_rows(a, q, r);
    });
}

// Merges partial results in the order of their chunks: the same sums as if one thread had computed all chunks.
void merge(const Attention& a, int64_t head, const float* const* partial, int64_t stride, int64_t count, float* out) {
    alignas(64) float whole[kMostDepth] = {};
    float peak = kNever, total = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        const float* next = *partial + i * stride;
        merge_into(a.value_depth(), peak, total, whole, next[0], next[1], next + 2);
    }
    F inverse = splat(share_of(a, head, peak, total));
    for (int64_t d = 0, n = a.value_dim(); d < n; d += kLanes)
        store_part(out + d, mul(load(whole + d), inverse), n - d);
}

}  // namespace
}  // namespace inflight
