// Functions over lanes, for every instruction set alike.
namespace inflight {
namespace {

// Writes a row's values of 4 bytes `stride` bytes apart, because a tile holds the values of all rows at one step
// together.
INLINE void spread(const char* row, int64_t values, char* to, int64_t stride) {
    for (int64_t i = 0; i < values; i++) std::memcpy(to + i * stride, row + 4 * i, 4);
}

// The same for four rows that follow each other.
INLINE void spread(const char (&rows)[4][64], int64_t values, char* to, int64_t stride) {
    int64_t i = 0;
#if INFLIGHT_TRANSPOSE  // where tiles have so many rows
    for (; i + 4 <= values; i += 4)
        transpose(rows[0] + 4 * i, rows[1] + 4 * i, rows[2] + 4 * i, rows[3] + 4 * i, to + i * stride, stride);
#endif
    for (; i < values; i++)
        for (int row = 0; row < 4; row++) std::memcpy(to + i * stride + 4 * row, rows[row] + 4 * i, 4);
}

// Writes row `m` of M. Four rows are transposed together once the fourth is in `rows`; the last rows are written
// singly.
template <int M>
INLINE void spread_row(const char (&rows)[4][64], int m, int64_t values, char* to) {
    if (m >= M / 4 * 4)
        spread(rows[m % 4], values, to + 4 * m, 4 * M);
    else if (m % 4 == 3)
        spread(rows, values, to + 4 * (m - 3), 4 * M);
}

#if !INFLIGHT_HIGHEST_OF
// Lane m: the highest of x[m], of M rows at most 16; the other lanes are any.
template <int M>
INLINE F highest_of(const F (&x)[M]) {
    alignas(64) float lanes[16] = {};
    for (int m = 0; m < M; m++) lanes[m] = highest(x[m]);
    return load(lanes);
}
#endif

#if !INFLIGHT_TURN
// 16 lines of 16 floats, their columns as rows.
INLINE void turn_floats(const char* from, char* to, int64_t stride) {
    for (int64_t i = 0; i < 16; i++)
        for (int64_t j = 0; j < 16; j++) std::memcpy(to + j * stride + 4 * i, from + 64 * i + 4 * j, 4);
}

// Of eight lines, each two components of 16 positions side by side, eight rows: each two positions of 16 components.
INLINE void turn_pairs(const char* from, char* to, int64_t stride) {
    for (int64_t i = 0; i < 8; i++)
        for (int64_t j = 0; j < 8; j++) {
            uint16_t four[4];
            std::memcpy(four, from + 64 * i + 8 * j, 8);
            const uint16_t turned[4] = {four[0], four[2], four[1], four[3]};
            std::memcpy(to + j * stride + 8 * i, turned, 8);
        }
}
#endif

constexpr float kLog2e = 1.4426950408889634f;

// (2 ** r - 1) / r for r within [-0.5, 0.5]: a Taylor sum, with which that of 2 ** r has degree 6 (error 2e-7).
INLINE F exp2_slope(F r) {
    F p = fma(splat(1.5403530e-4f), r, splat(1.3333558e-3f));
    p = fma(p, r, splat(9.6181291e-3f));
    p = fma(p, r, splat(5.5504109e-2f));
    p = fma(p, r, splat(2.4022651e-1f));
    return fma(p, r, splat(6.9314718e-1f));
}

// 2 ** x: the whole part moves the exponent, the rest is a Taylor sum. The result is exactly 0 from kLeastPower down
// and exactly 1 at 0, so that masked keys do not change a softmax.
INLINE F exp2(F x) {
    x = max(x, splat(kLeastPower));
    const F n = rounded(x), r = sub(x, n);
    return scaled(fma(exp2_slope(r), r, splat(1.0f)), n);
}

#if !INFLIGHT_EXP2_SHORT
// The same for results that are rounded to bfloat16: degree 4, the best such sum with the value 1 at 0 (error 3e-6).
INLINE F exp2_short(F x) {
    x = max(x, splat(kLeastPower));
    F n = rounded(x), r = sub(x, n), p;
    p = fma(splat(9.5828496e-3f), r, splat(5.5906434e-2f));
    p = fma(p, r, splat(2.4024099e-1f));
    p = fma(p, r, splat(6.9312419e-1f));
    return scaled(fma(p, r, splat(1.0f)), n);
}
#endif

INLINE F exponential(F x) { return exp2(mul(x, splat(kLog2e))); }

// e ** x - 1, with the digits of small results: 1 is taken off the power of two alone, which is 0 where x is small.
INLINE F exponential_less_one(F x) {
    x = max(mul(x, splat(kLog2e)), splat(kLeastPower));
    const F n = rounded(x), r = sub(x, n);
    return add(scaled(mul(exp2_slope(r), r), n), sub(scaled(splat(1.0f), n), splat(1.0f)));
}

// At most 80: beyond, e ** x would leave the exponents of a float, and 1 / (1 + e ** 80) is as good as 0.
INLINE F bounded(F x) { return sub(zero(), max(sub(zero(), x), splat(-80.0f))); }

INLINE F hyperbolic_tangent(F x) {
    F e = exponential(bounded(add(x, x)));
    return sub(splat(1.0f), div(splat(2.0f), add(splat(1.0f), e)));
}

// x Φ(x) = max(x, 0) - |x| erfc(|x| / √2) / 2, with erfc(z) = t p(t) e ** -z² for t = 1 / (1 + 0.3 z): the form of
// Abramowitz and Stegun (1964, 7.1.26), p the polynomial of degree 8 with the least relative error (2e-8) up to z = 9.
INLINE F gelu(F x) {
    const F one = splat(1.0f), size = absolute(x), near = bounded(size), z = mul(near, splat(0.7071067811865476f));
    const F t = div(one, fma(splat(0.3f), z, one));
    F p = fma(splat(-0.12925468f), t, splat(0.48415142f));
    p = fma(p, t, splat(-0.5090912f));
    p = fma(p, t, splat(0.5436961f));
    p = fma(p, t, splat(-0.09154697f));
    p = fma(p, t, splat(0.21343069f));
    p = fma(p, t, splat(0.148778f));
    p = fma(p, t, splat(0.17064361f));
    p = fma(p, t, splat(0.16919297f));
    const F tail = mul(mul(t, p), exponential(sub(zero(), mul(z, z))));
    return mul(splat(0.5f), sub(add(x, size), mul(near, tail)));
}

template <Activation A>
INLINE F activated(F x) {
    F one = splat(1.0f);
    if (A == Activation::kRelu) return max(x, zero());
    if (A == Activation::kReluSquared) return mul(max(x, zero()), max(x, zero()));
    if (A == Activation::kSilu) return div(x, add(one, exponential(bounded(sub(zero(), x)))));
    if (A == Activation::kGeluTanh) {
        F inner = mul(splat(0.7978845608028654f), fma(mul(splat(0.044715f), x), mul(x, x), x));
        return mul(mul(splat(0.5f), x), add(one, hyperbolic_tangent(inner)));
    }
    if (A == Activation::kGeluQuick) return div(x, add(one, exponential(bounded(mul(splat(-1.702f), x)))));
    return gelu(x);
}

INLINE F activated(Activation act, F x) {
    switch (act) {
        case Activation::kSilu: return activated<Activation::kSilu>(x);
        case Activation::kGelu: return activated<Activation::kGelu>(x);
        case Activation::kGeluTanh: return activated<Activation::kGeluTanh>(x);
        case Activation::kRelu: return activated<Activation::kRelu>(x);
        case Activation::kGeluQuick:
        case Activation::kSwigluClamped: return activated<Activation::kGeluQuick>(x);
        case Activation::kReluSquared: return activated<Activation::kReluSquared>(x);
    }
    return x;
}

constexpr float kClamp = 7.0f;  // of kSwigluClamped

INLINE F at_most(F x, F limit) { return sub(zero(), max(sub(zero(), x), sub(zero(), limit))); }

// act(gate) * up. kSwigluClamped is gpt-oss's: the gate is at most 7, `up` within ±7, and the result
// (up + 1) * gate * σ(1.702 gate).
INLINE F gated(Activation act, F gate, F up) {
    if (act != Activation::kSwigluClamped) return mul(activated(act, gate), up);
    const F limit = splat(kClamp), within = max(at_most(up, limit), splat(-kClamp));
    return mul(activated<Activation::kGeluQuick>(at_most(gate, limit)), add(within, splat(1.0f)));
}

}  // namespace
}  // namespace inflight
