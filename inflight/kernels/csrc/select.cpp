#include "select.h"

#include <algorithm>

namespace inflight {

namespace {

constexpr int64_t kBins = 2048;
constexpr int64_t kFew = 32;

Border of_equals(uint32_t key, const double* masses, int64_t n, double before, double limit) {
    int64_t taken = 0;
    for (; taken < n && before < limit; taken++) before += masses ? masses[taken] : 1.0;
    return {key, std::max<int64_t>(1, taken)};
}

}  // namespace

void Selector::reserve(int64_t n) {
    keys_.reserve(n);
    masses_.reserve(n);
}

// Sums masses by ranges of keys and divides the range that holds the border, until it has few items or only equal keys.
Border Selector::border(const uint32_t* keys, const double* masses, int64_t n, double limit) {
    double before = 0.0;
    while (true) {
        uint32_t low = keys[0], high = keys[0];
        for (int64_t i = 1; i < n; i++) {
            low = std::min(low, keys[i]);
            high = std::max(high, keys[i]);
        }
        if (low == high) return of_equals(low, masses, n, before, limit);
        if (n <= kFew) return of_few(keys, masses, n, before, limit);
        int shift = 0;
        while ((high - low) >> shift >= kBins) shift++;
        uint32_t last = (high - low) >> shift, bin = 0;
        double sums[kBins];
        std::fill(sums, sums + last + 1, 0.0);
        for (int64_t i = 0; i < n; i++) sums[(high - keys[i]) >> shift] += masses ? masses[i] : 1.0;
        for (; bin < last && before + sums[bin] < limit; bin++) before += sums[bin];
        int64_t left = 0;
        for (int64_t i = 0; i < n; i++) {
            if ((high - keys[i]) >> shift != bin) continue;
            double mass = masses ? masses[i] : 1.0;
            keys_.get()[left] = keys[i];
            masses_.get()[left++] = mass;
        }
        if (masses) masses = masses_.get();
        keys = keys_.get();
        n = left;
    }
}

Border Selector::of_few(const uint32_t* keys, const double* masses, int64_t n, double before, double limit) const {
    int64_t order[kFew] = {};
    for (int64_t i = 0; i < n; i++) {
        int64_t at = i;
        for (; at > 0 && keys[order[at - 1]] < keys[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    Border border{keys[order[0]], 1};
    before += masses ? masses[order[0]] : 1.0;
    for (int64_t i = 1; i < n && before < limit; i++) {
        uint32_t key = keys[order[i]];
        border = {key, key == border.key ? border.ties + 1 : 1};
        before += masses ? masses[order[i]] : 1.0;
    }
    return border;
}

}  // namespace inflight
