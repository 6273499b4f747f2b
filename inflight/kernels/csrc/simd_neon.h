// 16 lanes as four registers of 4. Runs on every 64-bit ARM (8.0); where the compiler may use more, it sums integers
// with the dot products of 8.2 (__ARM_FEATURE_DOTPROD) or 8.6 (__ARM_FEATURE_MATMUL_INT8).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace inflight {
namespace {

constexpr int kDirectRows = 2;  // 16 sums, two lines of 4, a broadcast: of 32 registers
constexpr int kInt8Rows = 2;
constexpr int kGroupedRows = 2;  // 16 sums of integers; those of floats wait in memory for the end of a group
constexpr int kBlockRows = 2;
constexpr int kOpenedRows = kBlockRows;
constexpr int kQueryRows = 2;

struct F {
    float32x4_t a, b, c, d;
};
struct I {
    int32x4_t a, b, c, d;
};
struct Line {
    uint8x16_t a, b, c, d;
};
struct Line2 {
    F even, odd;
};
struct Pair {
    float32x4_t first, second;
};

INLINE F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
INLINE void store(float* p, F x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
INLINE F load_part(const float* p, int64_t n) {
    if (n >= 16) return load(p);
    alignas(64) float lanes[16] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * 4);
    return load(lanes);
}
INLINE void store_part(float* p, F x, int64_t n) {
    if (n >= 16) return store(p, x);
    alignas(64) float lanes[16];
    store(lanes, x);
    std::memcpy(p, lanes, static_cast<size_t>(n) * 4);
}
INLINE F splat(float x) {
    float32x4_t all = vdupq_n_f32(x);
    return {all, all, all, all};
}
INLINE F zero() { return splat(0.0f); }
INLINE F add(F x, F y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)}; }
INLINE F sub(F x, F y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)}; }
INLINE F mul(F x, F y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)}; }
INLINE F div(F x, F y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b), vdivq_f32(x.c, y.c), vdivq_f32(x.d, y.d)}; }
// x > y ? x : y, so that what is not a number gives way as it does elsewhere; FMAX would keep it.
INLINE float32x4_t max(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
INLINE F max(F x, F y) { return {max(x.a, y.a), max(x.b, y.b), max(x.c, y.c), max(x.d, y.d)}; }
INLINE F absolute(F x) { return {vabsq_f32(x.a), vabsq_f32(x.b), vabsq_f32(x.c), vabsq_f32(x.d)}; }
INLINE F fma(F x, F y, F z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
INLINE int32_t within_lanes(int64_t n) { return static_cast<int32_t>(n < 0 ? 0 : n > 16 ? 16 : n); }
INLINE F keep_lanes(F x, int64_t from, int64_t to, F other) {
    const int32_t numbers[4] = {0, 1, 2, 3};
    int32x4_t number = vld1q_s32(numbers), four = vdupq_n_s32(4);
    int32x4_t first = vdupq_n_s32(within_lanes(from)), last = vdupq_n_s32(within_lanes(to));
    auto pick = [&](float32x4_t mine, float32x4_t others) {
        uint32x4_t kept = vandq_u32(vcgeq_s32(number, first), vcltq_s32(number, last));
        number = vaddq_s32(number, four);
        return vbslq_f32(kept, mine, others);
    };
    F out;
    out.a = pick(x.a, other.a);
    out.b = pick(x.b, other.b);
    out.c = pick(x.c, other.c);
    out.d = pick(x.d, other.d);
    return out;
}
INLINE float sum(F x) {
    float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float highest(F x) { return vmaxvq_f32(max(max(x.a, x.b), max(x.c, x.d))); }
INLINE F rounded(F x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b), vrndnq_f32(x.c), vrndnq_f32(x.d)}; }
// x * 2 ** n for whole n in [kLeastPower, 127]; at kLeastPower it is 0.
constexpr float kLeastPower = -127.0f;
INLINE float32x4_t power_of_two(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
INLINE F scaled(F x, F n) {
    return mul(x, F{power_of_two(n.a), power_of_two(n.b), power_of_two(n.c), power_of_two(n.d)});
}

INLINE I whole(int32_t x) {
    int32x4_t all = vdupq_n_s32(x);
    return {all, all, all, all};
}
INLINE I add(I x, I y) { return {vaddq_s32(x.a, y.a), vaddq_s32(x.b, y.b), vaddq_s32(x.c, y.c), vaddq_s32(x.d, y.d)}; }
INLINE int32_t sum(I x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.b), vaddq_s32(x.c, x.d))); }
INLINE F to_float(I x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b), vcvtq_f32_s32(x.c), vcvtq_f32_s32(x.d)}; }
INLINE Line line(const void* p) {
    const uint8_t* at = static_cast<const uint8_t*>(p);
    return {vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)};
}
INLINE void halves(const void* p, Line& low, Line& high) {
    Line both = line(p);
    uint8x16_t mask = vdupq_n_u8(0x0f);
    low = {vandq_u8(both.a, mask), vandq_u8(both.b, mask), vandq_u8(both.c, mask), vandq_u8(both.d, mask)};
    high = {vshrq_n_u8(both.a, 4), vshrq_n_u8(both.b, 4), vshrq_n_u8(both.c, 4), vshrq_n_u8(both.d, 4)};
}
template <int Right, int Mask>
INLINE uint8x16_t field(uint8x16_t x) {
    if constexpr (Right > 0) x = vshrq_n_u8(x, Right);
    if constexpr (Right < 0) x = vshlq_n_u8(x, -Right);
    return vandq_u8(x, vdupq_n_u8(Mask));
}
template <int Right, int Mask>
INLINE Line field(Line x) {
    return {field<Right, Mask>(x.a), field<Right, Mask>(x.b), field<Right, Mask>(x.c), field<Right, Mask>(x.d)};
}
INLINE Line either(Line x, Line y) {
    return {vorrq_u8(x.a, y.a), vorrq_u8(x.b, y.b), vorrq_u8(x.c, y.c), vorrq_u8(x.d, y.d)};
}
INLINE Line entries(const uint8_t* table, Line x) {
    uint8x16_t all = vld1q_u8(table);
    return {vqtbl1q_u8(all, x.a), vqtbl1q_u8(all, x.b), vqtbl1q_u8(all, x.c), vqtbl1q_u8(all, x.d)};
}
INLINE void put_line(void* p, Line x) {
    uint8_t* to = static_cast<uint8_t*>(p);
    vst1q_u8(to, x.a);
    vst1q_u8(to + 16, x.b);
    vst1q_u8(to + 32, x.c);
    vst1q_u8(to + 48, x.d);
}
INLINE float32x4_t four_halves(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
INLINE F float16(const void* p) {
    const uint8_t* at = static_cast<const uint8_t*>(p);
    return {four_halves(at), four_halves(at + 8), four_halves(at + 16), four_halves(at + 24)};
}

// Four bytes with a sign, times four without one, summed for each of four outputs.
#if defined(__ARM_FEATURE_MATMUL_INT8)
using Quad = int8x16_t;
INLINE Quad quad(const void* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_s8_u32(vdupq_n_u32(four));
}
INLINE int32x4_t dot4(int32x4_t sums, uint8x16_t codes, Quad x) { return vusdotq_s32(sums, codes, x); }
#elif defined(__ARM_FEATURE_DOTPROD)
// Both sides have a sign here: codes move down by 128, and what that takes from each sum is added again.
struct Quad {
    int8x16_t x;
    int32x4_t taken;
};
INLINE Quad quad(const void* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(four));
    return {x, vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), x, vdupq_n_s8(64)), 1)};
}
INLINE int32x4_t dot4(int32x4_t sums, uint8x16_t codes, Quad x) {
    int8x16_t moved = vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80)));
    return vdotq_s32(vaddq_s32(sums, x.taken), moved, x.x);
}
#else
using Quad = int16x8_t;  // twice
INLINE Quad quad(const void* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
}
// A product has at most 255 * 127: it fits 16 bits, the sum of two does not.
INLINE int32x4_t dot4(int32x4_t sums, uint8x16_t codes, Quad x) {
    int16x8_t low = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes))), x);
    int16x8_t high = vmulq_s16(vreinterpretq_s16_u16(vmovl_high_u8(codes)), x);
    return vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif
INLINE I dot4(I sums, Line codes, Quad x) {
    return {dot4(sums.a, codes.a, x), dot4(sums.b, codes.b, x), dot4(sums.c, codes.c, x), dot4(sums.d, codes.d, x)};
}

// Four pairs of bfloat16, taken apart.
INLINE uint32x4_t four_pairs(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
INLINE float32x4_t lower(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
INLINE float32x4_t upper(uint32x4_t pairs) { return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u))); }
INLINE F from_bf16(const uint16_t* p) {
    uint16x8_t low = vld1q_u16(p), high = vld1q_u16(p + 8);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(low), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(low, 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(high), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(high, 16))};
}
INLINE Line2 line2(const void* p) {
    const char* at = static_cast<const char*>(p);
    uint32x4_t a = four_pairs(at), b = four_pairs(at + 16), c = four_pairs(at + 32), d = four_pairs(at + 48);
    return {{lower(a), lower(b), lower(c), lower(d)}, {upper(a), upper(b), upper(c), upper(d)}};
}
INLINE Pair pair(const void* p) {
    uint32_t two;
    std::memcpy(&two, p, 4);
    uint32x4_t bits = vdupq_n_u32(two);
    return {lower(bits), upper(bits)};
}
INLINE float32x4_t dot2(float32x4_t sums, float32x4_t even, float32x4_t odd, Pair x) {
    return vfmaq_f32(vfmaq_f32(sums, x.first, even), x.second, odd);
}
INLINE F dot2(F sums, Line2 line, Pair x) {
    return {dot2(sums.a, line.even.a, line.odd.a, x), dot2(sums.b, line.even.b, line.odd.b, x),
            dot2(sums.c, line.even.c, line.odd.c, x), dot2(sums.d, line.even.d, line.odd.d, x)};
}
INLINE uint16x4_t to_bf16(float32x4_t x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint16x4_t near = vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    return vbsl_u16(vmovn_u32(vceqq_f32(x, x)), near, vdup_n_u16(0x7fc0));
}
INLINE void to_bf16(F x, uint16_t* out) {
    vst1_u16(out, to_bf16(x.a));
    vst1_u16(out + 4, to_bf16(x.b));
    vst1_u16(out + 8, to_bf16(x.c));
    vst1_u16(out + 12, to_bf16(x.d));
}
INLINE int32x4_t to_int8(float32x4_t x) {
    return vminq_s32(vmaxq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(-127)), vdupq_n_s32(127));
}
INLINE I to_int8(F x, int8_t* out) {
    I codes = {to_int8(x.a), to_int8(x.b), to_int8(x.c), to_int8(x.d)};
    vst1_s8(out, vmovn_s16(vcombine_s16(vmovn_s32(codes.a), vmovn_s32(codes.b))));
    vst1_s8(out + 8, vmovn_s16(vcombine_s16(vmovn_s32(codes.c), vmovn_s32(codes.d))));
    return codes;
}
INLINE F from_int8(const int8_t* p) {
    int16x8_t low = vmovl_s8(vld1_s8(p)), high = vmovl_s8(vld1_s8(p + 8));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}

// Bit i: lane i is at least `bar`; what is not a number is not.
INLINE uint32_t at_least(F x, F bar) {
    const uint32_t numbers[4] = {1, 2, 4, 8};
    uint32x4_t number = vld1q_u32(numbers);
    auto bits = [&](float32x4_t a, float32x4_t b) { return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), number)); };
    return bits(x.a, bar.a) | bits(x.b, bar.b) << 4 | bits(x.c, bar.c) << 8 | bits(x.d, bar.d) << 12;
}

// 16 lanes in double precision.
struct D {
    float64x2_t v[8];
};
template <class Op>
INLINE D twos(Op op) {
    return {{op(0), op(1), op(2), op(3), op(4), op(5), op(6), op(7)}};
}
INLINE D widened(F x) {
    const float32x4_t four[4] = {x.a, x.b, x.c, x.d};
    return twos(
        [&](int i) { return i % 2 ? vcvt_high_f64_f32(four[i / 2]) : vcvt_f64_f32(vget_low_f32(four[i / 2])); });
}
INLINE void store(double* p, D x) {
    for (int i = 0; i < 8; i++) vst1q_f64(p + 2 * i, x.v[i]);
}
INLINE D wide(double x) {
    return twos([&](int) { return vdupq_n_f64(x); });
}
INLINE D add(D x, D y) {
    return twos([&](int i) { return vaddq_f64(x.v[i], y.v[i]); });
}
INLINE D sub(D x, D y) {
    return twos([&](int i) { return vsubq_f64(x.v[i], y.v[i]); });
}
INLINE D mul(D x, D y) {
    return twos([&](int i) { return vmulq_f64(x.v[i], y.v[i]); });
}
INLINE D max(D x, D y) {
    return twos([&](int i) { return vbslq_f64(vcgtq_f64(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
INLINE D fma(D x, D y, D z) {
    return twos([&](int i) { return vfmaq_f64(z.v[i], x.v[i], y.v[i]); });
}
INLINE D rounded(D x) {
    return twos([&](int i) { return vrndnq_f64(x.v[i]); });
}
// x * 2 ** n for whole n in [-1023, 1023]; at -1023 it is 0.
INLINE D scaled(D x, D n) {
    return twos([&](int i) {
        int64x2_t power = vaddq_s64(vcvtq_s64_f64(n.v[i]), vdupq_n_s64(1023));
        return vmulq_f64(x.v[i], vreinterpretq_f64_s64(vshlq_n_s64(power, 52)));
    });
}
INLINE double sum(D x) {
    float64x2_t two = vaddq_f64(vaddq_f64(vaddq_f64(x.v[0], x.v[4]), vaddq_f64(x.v[2], x.v[6])),
                                vaddq_f64(vaddq_f64(x.v[1], x.v[5]), vaddq_f64(x.v[3], x.v[7])));
    return vaddvq_f64(two);
}

}  // namespace
}  // namespace inflight
