// 16 lanes as two registers of 8.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace inflight {
namespace {

constexpr int kDirectRows = 3;  // 12 sums, a line and a broadcast: of 16 registers
constexpr int kInt8Rows = 3;
constexpr int kGroupedRows = 1;
constexpr int kBlockRows = 2;  // 8 sums of integers; those of floats wait in memory for the end of a group
constexpr int kOpenedRows = kBlockRows;
constexpr int kQueryRows = 3;

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
using Line = I;
struct Quad {
    __m256i even, odd;
};
struct Line2 {
    F even, odd;
};
struct Pair {
    __m256 first, second;
};

INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE F load_part(const float* p, int64_t n) {
    alignas(64) float lanes[16] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n > 16 ? 16 : n) * 4);
    return load(lanes);
}
INLINE void store_part(float* p, F x, int64_t n) {
    if (n >= 16) return store(p, x);
    alignas(64) float lanes[16];
    store(lanes, x);
    std::memcpy(p, lanes, static_cast<size_t>(n) * 4);
}
INLINE F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F absolute(F x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE F keep_lanes(F x, int64_t from, int64_t to, F other) {
    alignas(64) float lanes[16], others[16];
    store(lanes, x);
    store(others, other);
    for (int64_t i = 0; i < 16; i++)
        if (i < from || i >= to) lanes[i] = others[i];
    return load(lanes);
}
INLINE float sum(F x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE float highest(F x) {
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE F rounded(F x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
// x * 2 ** n for whole n in [kLeastPower, 127]; at kLeastPower it is 0.
constexpr float kLeastPower = -127.0f;
INLINE __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE F scaled(F x, F n) { return mul(x, F{power_of_two(n.a), power_of_two(n.b)}); }

INLINE I whole(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE int32_t sum(I x) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(x.a, x.b));
    int32_t total = 0;
    for (int32_t lane : lanes) total += lane;
    return total;
}
INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE Line line(const void* p) {
    const __m256i* at = static_cast<const __m256i*>(p);
    return {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
}
INLINE void halves(const void* p, Line& low, Line& high) {
    Line both = line(p);
    __m256i mask = _mm256_set1_epi8(0x0f);
    low = {_mm256_and_si256(both.a, mask), _mm256_and_si256(both.b, mask)};
    high = {_mm256_and_si256(_mm256_srli_epi16(both.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(both.b, 4), mask)};
}
template <int Right, int Mask>
INLINE __m256i field(__m256i x) {
    if (Right > 0) x = _mm256_srli_epi16(x, Right > 0 ? Right : 0);
    if (Right < 0) x = _mm256_slli_epi16(x, Right < 0 ? -Right : 0);
    return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>(Mask)));
}
template <int Right, int Mask>
INLINE Line field(Line x) {
    return {field<Right, Mask>(x.a), field<Right, Mask>(x.b)};
}
INLINE Line either(Line x, Line y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
INLINE Line entries(const uint8_t* table, Line x) {
    __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(all, x.a), _mm256_shuffle_epi8(all, x.b)};
}
INLINE void put_line(void* p, Line x) {
    _mm256_store_si256(static_cast<__m256i*>(p), x.a);
    _mm256_store_si256(static_cast<__m256i*>(p) + 1, x.b);
}
INLINE F float16(const void* p) {
    const __m128i* at = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_load_si128(at)), _mm256_cvtph_ps(_mm_load_si128(at + 1))};
}
INLINE Quad quad(const void* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    __m256i x = _mm256_set1_epi32(four);
    return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
INLINE __m256i dot4(__m256i sums, __m256i codes, Quad x) {
    __m256i even = _mm256_and_si256(codes, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(codes, 8);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, x.even));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(odd, x.odd));
}
INLINE I dot4(I sums, Line codes, Quad x) { return {dot4(sums.a, codes.a, x), dot4(sums.b, codes.b, x)}; }

INLINE F from_bf16(const uint16_t* p) {
    const __m128i* at = reinterpret_cast<const __m128i*>(p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1)), 16))};
}
INLINE Line2 line2(const void* p) {
    const __m256i* at = static_cast<const __m256i*>(p);
    __m256i a = _mm256_loadu_si256(at), b = _mm256_loadu_si256(at + 1),
            upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))}};
}
INLINE Pair pair(const void* p) {
    uint32_t two;
    std::memcpy(&two, p, 4);
    __m256i bits = _mm256_set1_epi32(static_cast<int>(two));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
INLINE F dot2(F sums, Line2 line, Pair x) {
    return {_mm256_fmadd_ps(x.second, line.odd.a, _mm256_fmadd_ps(x.first, line.even.a, sums.a)),
            _mm256_fmadd_ps(x.second, line.odd.b, _mm256_fmadd_ps(x.first, line.even.b, sums.b))};
}
INLINE __m128i to_bf16(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
INLINE void to_bf16(F x, uint16_t* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), to_bf16(x.a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), to_bf16(x.b));
}
INLINE I to_int8(F x, int8_t* out) {
    __m256i low = _mm256_set1_epi32(-127), high = _mm256_set1_epi32(127);
    I codes = {_mm256_min_epi32(_mm256_max_epi32(_mm256_cvtps_epi32(x.a), low), high),
               _mm256_min_epi32(_mm256_max_epi32(_mm256_cvtps_epi32(x.b), low), high)};
    __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes.a, codes.b), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    return codes;
}
INLINE F from_int8(const int8_t* p) {
    const __m128i* at = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}

// Bit i: lane i is at least `bar`; what is not a number is not.
INLINE uint32_t at_least(F x, F bar) {
    auto bits = [](__m256 a, __m256 b) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
    };
    return bits(x.a, bar.a) | bits(x.b, bar.b) << 8;
}

// 16 lanes in double precision.
struct D {
    __m256d v[4];
};
template <class Op>
INLINE D fours(Op op) {
    return {{op(0), op(1), op(2), op(3)}};
}
INLINE D widened(F x) {
    return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.a)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)),
             _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1))}};
}
INLINE void store(double* p, D x) {
    for (int i = 0; i < 4; i++) _mm256_storeu_pd(p + 4 * i, x.v[i]);
}
INLINE D wide(double x) {
    return fours([&](int) { return _mm256_set1_pd(x); });
}
INLINE D add(D x, D y) {
    return fours([&](int i) { return _mm256_add_pd(x.v[i], y.v[i]); });
}
INLINE D sub(D x, D y) {
    return fours([&](int i) { return _mm256_sub_pd(x.v[i], y.v[i]); });
}
INLINE D mul(D x, D y) {
    return fours([&](int i) { return _mm256_mul_pd(x.v[i], y.v[i]); });
}
INLINE D max(D x, D y) {
    return fours([&](int i) { return _mm256_max_pd(x.v[i], y.v[i]); });
}
INLINE D fma(D x, D y, D z) {
    return fours([&](int i) { return _mm256_fmadd_pd(x.v[i], y.v[i], z.v[i]); });
}
INLINE D rounded(D x) {
    return fours([&](int i) { return _mm256_round_pd(x.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); });
}
// x * 2 ** n for whole n in [-1023, 1023]; at -1023 it is 0.
INLINE D scaled(D x, D n) {
    return fours([&](int i) {
        __m256i power = _mm256_cvtepi32_epi64(_mm_add_epi32(_mm256_cvtpd_epi32(n.v[i]), _mm_set1_epi32(1023)));
        return _mm256_mul_pd(x.v[i], _mm256_castsi256_pd(_mm256_slli_epi64(power, 52)));
    });
}
INLINE double sum(D x) {
    __m256d four = _mm256_add_pd(_mm256_add_pd(x.v[0], x.v[2]), _mm256_add_pd(x.v[1], x.v[3]));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

}  // namespace
}  // namespace inflight
