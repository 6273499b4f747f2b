// Sampling's loops over a row of logits. Probabilities are in double precision, so that rounding does not decide which
// token a uniform number selects.
namespace inflight {
namespace {

// e ** x for x <= 0, a Taylor sum of degree 11 (error 1e-14); from about -709 down it is exactly 0.
INLINE D exponential(D x) {
    D y = max(mul(x, wide(1.4426950408889634)), wide(-1023.0)), n = rounded(y), r = sub(y, n), p;
    p = fma(wide(4.4455382718708115e-10), r, wide(7.0549116208011233e-9));
    p = fma(p, r, wide(1.0178086009239700e-7));
    p = fma(p, r, wide(1.3215486790144309e-6));
    p = fma(p, r, wide(1.5252733804059840e-5));
    p = fma(p, r, wide(1.5403530393381610e-4));
    p = fma(p, r, wide(1.3333558146428443e-3));
    p = fma(p, r, wide(9.6181291076284772e-3));
    p = fma(p, r, wide(5.5504108664821580e-2));
    p = fma(p, r, wide(0.24022650695910071));
    p = fma(p, r, wide(0.69314718055994531));
    return scaled(fma(p, r, wide(1.0)), n);
}

// Lanes beyond the row's end count as impossible tokens.
INLINE F logits_at(const float* x, int64_t i, int64_t n) {
    return n - i >= kLanes ? load(x + i) : keep_lanes(load_part(x + i, n - i), 0, n - i, splat(-INFINITY));
}

// x /= divider, in place; `highest_of` takes the largest of each kScan. False: some are not numbers.
bool scan(float* x, int64_t n, float divider, float* highest_of) {
    uint32_t numbers = 0xffff;
    F by = splat(divider);
    for (int64_t begin = 0; begin < n; begin += kScan) {
        F most = splat(-INFINITY);
        int64_t end = begin + kScan < n ? begin + kScan : n;
        for (int64_t i = begin; i < end; i += kLanes) {
            F v = logits_at(x, i, n);
            if (divider != 1.0f) {
                v = div(v, by);
                store_part(x + i, v, n - i);
            }
            numbers &= at_least(v, v);
            most = max(v, most);
        }
        highest_of[begin / kScan] = highest(most);
    }
    return numbers == 0xffff;
}

// e ** (x - highest).
void weigh(const float* x, int64_t n, float highest, double* weights) {
    D top = wide(highest);
    alignas(64) double last[kLanes];
    for (int64_t i = 0; i < n; i += kLanes) {
        D weight = exponential(sub(widened(logits_at(x, i, n)), top));
        if (n - i >= kLanes) {
            store(weights + i, weight);
        } else {
            store(last, weight);
            for (int64_t lane = 0; i + lane < n; lane++) weights[i + lane] = last[lane];
        }
    }
}

// Of each kMass tokens: the sum of e ** (x - highest), and, where it is wanted, of that times highest - x.
void masses(const float* x, int64_t n, float highest, double* masses, double* surprises) {
    D top = wide(highest);
    for (int64_t begin = 0; begin < n; begin += kMass) {
        D mass = wide(0.0), surprise = wide(0.0);
        int64_t end = begin + kMass < n ? begin + kMass : n;
        for (int64_t i = begin; i < end; i += kLanes) {
            D below = sub(widened(logits_at(x, i, n)), top), weight = exponential(below);
            mass = add(mass, weight);
            // Where the weight is 0, the distance may be infinite.
            if (surprises) surprise = fma(weight, sub(wide(0.0), max(below, wide(-1e4))), surprise);
        }
        masses[begin / kMass] = sum(mass);
        if (surprises) surprises[begin / kMass] = sum(surprise);
    }
}

// The tokens, and their logits, that are at least `bar`; `highest` of each kScan, as `scan` left it. Returns how many.
int64_t gather(const float* x, int64_t n, const float* highest, float bar, int32_t* tokens, float* values) {
    int64_t count = 0;
    F least = splat(bar);
    for (int64_t begin = 0; begin < n; begin += kScan) {
        if (!(highest[begin / kScan] >= bar)) continue;
        int64_t end = begin + kScan < n ? begin + kScan : n;
        for (int64_t i = begin; i < end; i += kLanes) {
            uint32_t bits = at_least(logits_at(x, i, n), least);
            for (; bits; bits &= bits - 1) {
                int64_t at = i + __builtin_ctz(bits);
                tokens[count] = static_cast<int32_t>(at);
                values[count++] = x[at];
            }
        }
    }
    return count;
}

}  // namespace
}  // namespace inflight
