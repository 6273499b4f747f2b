// 16 lanes as one register. INFLIGHT_VNNI and INFLIGHT_BF16 say which dot products the machine has.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace inflight {
namespace {

constexpr int kDirectRows = 12;  // 24 sums, 2 lines, a broadcast: of 32 registers
constexpr int kInt8Rows = 8;     // as quick as 12, which GCC 12 does not keep in registers
constexpr int kGroupedRows = 6;  // 12 sums of integers, 12 of floats
#if INFLIGHT_TILES
constexpr int kBlockRows = 16;  // a tile of AMX
constexpr int kOpenedRows = 8;  // of one tile of dot products: up to so many they are quicker than AMX
#else
constexpr int kBlockRows = 6;   // the same
constexpr int kOpenedRows = 6;  // of one tile of dot products
#endif
constexpr int kQueryRows = 12;

using F = __m512;
using I = __m512i;
using Line = __m512i;
#if !INFLIGHT_VNNI
struct Quad {
    __m512i even, odd;
};
#else
using Quad = __m512i;
#endif

INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
INLINE F load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
INLINE void store_part(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
INLINE F splat(float x) { return _mm512_set1_ps(x); }
INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F absolute(F a) { return _mm512_abs_ps(a); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// Lanes [from, to) as they are, the others `other`.
INLINE F keep_lanes(F x, int64_t from, int64_t to, F other) {
    __mmask16 kept = static_cast<__mmask16>(first_lanes(to < 0 ? 0 : to) & ~first_lanes(from < 0 ? 0 : from));
    return _mm512_mask_blend_ps(kept, other, x);
}
INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
INLINE float highest(F x) { return _mm512_reduce_max_ps(x); }
// Lane m: the highest of x[m], of M rows at most 16; the other lanes are any. Rows are put together by halves, so that
// one comparison serves two, then four, eight and all.
#define INFLIGHT_HIGHEST_OF 1
template <int M>
INLINE F highest_of(const F (&x)[M]) {
    F fours[4];
    for (int i = 0; i < 4; i++) {
        auto pair = [&](int first, int second) {
            F a = x[first < M ? first : M - 1], b = x[second < M ? second : M - 1];
            return _mm512_castps_pd(max(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        };
        __m512d ab = pair(4 * i, 4 * i + 1), cd = pair(4 * i + 2, 4 * i + 3);
        fours[i] = max(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    }
    auto eight = [&](F a, F b) { return max(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); };
    F first = eight(fours[0], fours[1]), second = eight(fours[2], fours[3]);
    return max(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
}
INLINE F rounded(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2 ** n for whole n in [kLeastPower, 127]; at kLeastPower it is 0, for x within [0.5, 2].
constexpr float kLeastPower = -256.0f;
INLINE F scaled(F x, F n) { return _mm512_scalef_ps(x, n); }
// 2 ** x for what is rounded to bfloat16. The whole part is x rounded down, as `scalef` does by itself, and the rest
// within [0, 1) is a sum of degree 4, the least wrong of those with the value 1 at 0 (error 3e-6); of an infinity it is
// 0.
#define INFLIGHT_EXP2_SHORT 1
INLINE F exp2_short(F x) {
    F r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), p;
    p = fma(splat(1.3426702e-2f), r, splat(5.2242445e-2f));
    p = fma(p, r, splat(2.4128022e-1f));
    p = fma(p, r, splat(6.9304484e-1f));
    return scaled(fma(p, r, splat(1.0f)), x);
}

// Four times four values of 4 bytes, rows to columns: column i goes to `to` + i * `stride`.
#define INFLIGHT_TRANSPOSE 1
INLINE void transpose(const char* a, const char* b, const char* c, const char* d, char* to, int64_t stride) {
    auto row = [](const char* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
    __m128i ab = _mm_unpacklo_epi32(row(a), row(b)), cd = _mm_unpacklo_epi32(row(c), row(d));
    __m128i ab_last = _mm_unpackhi_epi32(row(a), row(b)), cd_last = _mm_unpackhi_epi32(row(c), row(d));
    __m128i columns[4] = {_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd), _mm_unpacklo_epi64(ab_last, cd_last),
                          _mm_unpackhi_epi64(ab_last, cd_last)};
    for (int i = 0; i < 4; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * stride), columns[i]);
}

// See math.inc.h. Rows of 64 bits are turned four at a time within lanes, then whole lanes of 128 bits.
#define INFLIGHT_TURN 1
INLINE void turn_wide(const __m512i (&rows)[8], char* to, int64_t stride) {
    for (int odd = 0; odd < 2; odd++) {
        __m512i pairs[4];
        for (int i = 0; i < 4; i++)
            pairs[i] = odd ? _mm512_unpackhi_epi64(rows[2 * i], rows[2 * i + 1])
                           : _mm512_unpacklo_epi64(rows[2 * i], rows[2 * i + 1]);
        const __m512i a = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0x44),
                      b = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0xee),
                      c = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0x44),
                      d = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0xee);
        const __m512i columns[4] = {_mm512_shuffle_i64x2(a, c, 0x88), _mm512_shuffle_i64x2(a, c, 0xdd),
                                    _mm512_shuffle_i64x2(b, d, 0x88), _mm512_shuffle_i64x2(b, d, 0xdd)};
        for (int i = 0; i < 4; i++) _mm512_storeu_si512(to + (2 * i + odd) * stride, columns[i]);
    }
}
INLINE void turn_pairs(const char* from, char* to, int64_t stride) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    __m512i rows[8];
    for (int i = 0; i < 8; i++) rows[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(from + 64 * i), order);
    turn_wide(rows, to, stride);
}
INLINE void turn_floats(const char* from, char* to, int64_t stride) {
    __m512i even[8], odd[8];  // of positions: two components side by side
    for (int i = 0; i < 8; i++) {
        const __m512i first = _mm512_loadu_si512(from + 128 * i), second = _mm512_loadu_si512(from + 128 * i + 64);
        const __m512i low = _mm512_unpacklo_epi32(first, second), high = _mm512_unpackhi_epi32(first, second);
        even[i] = _mm512_unpacklo_epi64(low, high);
        odd[i] = _mm512_unpackhi_epi64(low, high);
    }
    turn_wide(even, to, 2 * stride);
    turn_wide(odd, to + stride, 2 * stride);
}

INLINE I whole(int32_t x) { return _mm512_set1_epi32(x); }
INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE int32_t sum(I x) { return _mm512_reduce_add_epi32(x); }
INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
INLINE Line line(const void* p) { return _mm512_load_si512(p); }
// Two lines of half bytes: inputs 0 to 3 of each output in the low halves, 4 to 7 in the high ones.
INLINE void halves(const void* p, Line& low, Line& high) {
    __m512i both = _mm512_load_si512(p), mask = _mm512_set1_epi8(0x0f);
    low = _mm512_and_si512(both, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
// Bytes moved down by `Right` bits (up where that is below 0), and what `Mask` leaves of them.
template <int Right, int Mask>
INLINE Line field(Line x) {
    if (Right > 0) x = _mm512_srli_epi16(x, Right > 0 ? Right : 0);
    if (Right < 0) x = _mm512_slli_epi16(x, Right < 0 ? -Right : 0);
    return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(Mask)));
}
INLINE Line either(Line a, Line b) { return _mm512_or_si512(a, b); }
// The entry of a table of 16 for each byte, which is below 16.
INLINE Line entries(const uint8_t* table, Line x) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), x);
}
INLINE void put_line(void* p, Line x) { _mm512_store_si512(p, x); }
INLINE F float16(const void* p) { return _mm512_cvtph_ps(_mm256_load_si256(static_cast<const __m256i*>(p))); }

#if INFLIGHT_VNNI
INLINE Quad quad(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
INLINE I dot4(I sums, Line codes, Quad x) { return _mm512_dpbusd_epi32(sums, codes, x); }
#else
INLINE Quad quad(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    __m512i x = _mm512_set1_epi32(four);
    return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
}
// In 16 bits each, so that nothing saturates.
INLINE I dot4(I sums, Line codes, Quad x) {
    __m512i even = _mm512_and_si512(codes, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(codes, 8);
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(even, x.even));
    return _mm512_add_epi32(sums, _mm512_madd_epi16(odd, x.odd));
}
#endif

INLINE F from_bf16(const uint16_t* p) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#if INFLIGHT_BF16
using Line2 = __m512bh;
using Pair = __m512bh;
INLINE Line2 line2(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE Pair pair(const void* p) {
    int32_t two;
    std::memcpy(&two, p, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}
INLINE F dot2(F sums, Line2 line, Pair x) { return _mm512_dpbf16_ps(sums, x, line); }
INLINE void to_bf16(F x, uint16_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
}
#else
struct Line2 {
    F even, odd;
};
struct Pair {
    F first, second;
};
INLINE Line2 line2(const void* p) {
    __m512i bits = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
INLINE Pair pair(const void* p) {
    uint32_t two;
    std::memcpy(&two, p, 4);
    __m512i bits = _mm512_set1_epi32(static_cast<int>(two));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
INLINE F dot2(F sums, Line2 line, Pair x) {
    return _mm512_fmadd_ps(x.second, line.odd, _mm512_fmadd_ps(x.first, line.even, sums));
}
INLINE void to_bf16(F x, uint16_t* out) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    bits = _mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(bits));
}
#endif
// Rounded to the nearest integer, within [-127, 127].
INLINE I to_int8(F x, int8_t* out) {
    I codes = _mm512_min_epi32(_mm512_max_epi32(_mm512_cvtps_epi32(x), whole(-127)), whole(127));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(codes));
    return codes;
}
INLINE F from_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Bit i: lane i is at least `bar`; what is not a number is not.
INLINE uint32_t at_least(F x, F bar) { return _mm512_cmp_ps_mask(x, bar, _CMP_GE_OQ); }

// 16 lanes in double precision.
struct D {
    __m512d a, b;
};
INLINE D widened(F x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
}
INLINE void store(double* p, D x) {
    _mm512_storeu_pd(p, x.a);
    _mm512_storeu_pd(p + 8, x.b);
}
INLINE D wide(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
INLINE D add(D x, D y) { return {_mm512_add_pd(x.a, y.a), _mm512_add_pd(x.b, y.b)}; }
INLINE D sub(D x, D y) { return {_mm512_sub_pd(x.a, y.a), _mm512_sub_pd(x.b, y.b)}; }
INLINE D mul(D x, D y) { return {_mm512_mul_pd(x.a, y.a), _mm512_mul_pd(x.b, y.b)}; }
INLINE D max(D x, D y) { return {_mm512_max_pd(x.a, y.a), _mm512_max_pd(x.b, y.b)}; }
INLINE D fma(D x, D y, D z) { return {_mm512_fmadd_pd(x.a, y.a, z.a), _mm512_fmadd_pd(x.b, y.b, z.b)}; }
INLINE __m512d rounded(__m512d x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE D rounded(D x) { return {rounded(x.a), rounded(x.b)}; }
// x * 2 ** n for whole n in [-1023, 1023]; at -1023 it is 0.
INLINE __m512d scaled(__m512d x, __m512d n) {
    __m512i power = _mm512_add_epi64(_mm512_cvtpd_epi64(n), _mm512_set1_epi64(1023));
    return _mm512_mul_pd(x, _mm512_castsi512_pd(_mm512_slli_epi64(power, 52)));
}
INLINE D scaled(D x, D n) { return {scaled(x.a, n.a), scaled(x.b, n.b)}; }
INLINE double sum(D x) { return _mm512_reduce_add_pd(_mm512_add_pd(x.a, x.b)); }

}  // namespace
}  // namespace inflight
