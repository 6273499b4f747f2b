// Attention of a short text, whose queries see all of its keys. Lanes are queries: only they are turned, keys and
// values are read where the products left them, and the softmax of 16 queries needs no sum over lanes. A query adds its
// keys in their order, so its bits depend on its own text alone.
namespace inflight {
namespace {

constexpr int kWholeRows = kQueryRows < 8 ? 4 : 8;  // keys, or components of values, that are summed together

// The scores of N keys, [key][16 queries]; returns the largest so far.
template <int N>
INLINE F score_whole(const WholeText& t, const float* queries, int64_t key, float* scores, F peak) {
    F sums[N];
    EACH_ROW for (int i = 0; i < N; i++) sums[i] = zero();
    const float* from = t.keys + key * t.stride;
    for (int64_t d = 0; d < t.dim; d++) {
        const F q = load(queries + d * kLanes);
        EACH_ROW for (int i = 0; i < N; i++) sums[i] = fma(splat(from[i * t.stride + d]), q, sums[i]);
    }
    EACH_ROW for (int i = 0; i < N; i++) {
        store(scores + (key + i) * kLanes, sums[i]);
        peak = max(sums[i], peak);
    }
    return peak;
}

// Turns scores into probabilities, before they are divided by their sum, and returns one over that.
INLINE F softmax_whole(int64_t length, float scale, F peak, float* scores) {
    const F factor = splat(scale * kLog2e), shift = mul(peak, sub(zero(), factor));
    F total = zero();
    for (int64_t key = 0; key < length; key++) {
        const F prob = exp2(fma(load(scores + key * kLanes), factor, shift));
        store(scores + key * kLanes, prob);
        total = add(total, prob);
    }
    return div(splat(1.0f), total);
}

// Components [first, first + kWholeRows) of the sums of weighted values, [component][16 queries].
INLINE void weigh_whole(const WholeText& t, const float* probs, F share, int64_t first, float* to) {
    F sums[kWholeRows];
    EACH_ROW for (int i = 0; i < kWholeRows; i++) sums[i] = zero();
    const float* from = t.values + first;
    for (int64_t key = 0; key < t.length; key++, from += t.stride) {
        const F prob = load(probs + key * kLanes);
        EACH_ROW for (int i = 0; i < kWholeRows; i++) sums[i] = fma(splat(from[i]), prob, sums[i]);
    }
    EACH_ROW for (int i = 0; i < kWholeRows; i++) store(to + i * kLanes, mul(sums[i], share));
}

void attend_whole(const WholeText& t, float* scratch) {
    alignas(64) float lines[16 * kLanes], turned[16 * kLanes];
    float* const queries = scratch;                  // [dim][16]
    float* const scores = scratch + t.dim * kLanes;  // [length][16]
    for (int64_t first = 0; first < t.count; first += kLanes) {
        const int64_t rows = t.count - first < kLanes ? t.count - first : kLanes;
        for (int64_t d = 0; d < t.dim; d += kLanes) {
            for (int64_t m = 0; m < kLanes; m++)
                store(lines + m * kLanes, m < rows ? load(t.queries + (first + m) * t.stride + d) : zero());
            turn_floats(reinterpret_cast<char*>(lines), reinterpret_cast<char*>(queries + d * kLanes), kLanes * 4);
        }
        F peak = splat(kNever);
        int64_t key = 0;
        for (; key + kWholeRows <= t.length; key += kWholeRows)
            peak = score_whole<kWholeRows>(t, queries, key, scores, peak);
        for (; key < t.length; key++) peak = score_whole<1>(t, queries, key, scores, peak);
        const F share = softmax_whole(t.length, t.scale, peak, scores);
        for (int64_t d = 0; d < t.dim; d += kLanes) {
            for (int64_t i = 0; i < kLanes; i += kWholeRows) weigh_whole(t, scores, share, d + i, turned + i * kLanes);
            turn_floats(reinterpret_cast<char*>(turned), reinterpret_cast<char*>(lines), kLanes * 4);
            for (int64_t m = 0; m < rows; m++) store(t.out + (first + m) * t.out_stride + d, load(lines + m * kLanes));
        }
    }
}

}  // namespace
}  // namespace inflight
