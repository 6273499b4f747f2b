// 16 lanes as an array: the reference, and what runs where no instruction set fits. Sums and products are rounded
// apart.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace inflight {
namespace {

constexpr int kDirectRows = 2;
constexpr int kInt8Rows = 2;
constexpr int kGroupedRows = 2;
constexpr int kBlockRows = 2;
constexpr int kOpenedRows = kBlockRows;
constexpr int kQueryRows = 2;

struct F {
    float v[16];
};
struct I {
    int32_t v[16];
};
struct Line {
    uint8_t v[64];
};
struct Quad {
    int32_t v[4];
};
struct Line2 {
    F even, odd;
};
struct Pair {
    float first, second;
};

template <class Op>
INLINE F lanes(Op op) {
    F out;
    for (int i = 0; i < 16; i++) out.v[i] = op(i);
    return out;
}
INLINE F load(const float* p) {
    return lanes([&](int i) { return p[i]; });
}
INLINE void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
INLINE F load_part(const float* p, int64_t n) {
    return lanes([&](int i) { return i < n ? p[i] : 0.0f; });
}
INLINE void store_part(float* p, F x, int64_t n) { std::memcpy(p, x.v, static_cast<size_t>(n > 16 ? 16 : n) * 4); }
INLINE F splat(float x) {
    return lanes([&](int) { return x; });
}
INLINE F zero() { return splat(0.0f); }
INLINE F add(F a, F b) {
    return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
INLINE F sub(F a, F b) {
    return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
INLINE F mul(F a, F b) {
    return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
INLINE F div(F a, F b) {
    return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
INLINE F max(F a, F b) {
    return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
INLINE F absolute(F a) {
    return lanes([&](int i) { return std::fabs(a.v[i]); });
}
INLINE F fma(F a, F b, F c) {
    return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
INLINE F keep_lanes(F x, int64_t from, int64_t to, F other) {
    return lanes([&](int i) { return i >= from && i < to ? x.v[i] : other.v[i]; });
}
INLINE float sum(F x) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) x.v[i] += x.v[i + width];
    return x.v[0];
}
INLINE float highest(F x) {
    float most = x.v[0];
    for (int i = 1; i < 16; i++) most = x.v[i] > most ? x.v[i] : most;
    return most;
}
INLINE F rounded(F x) {
    return lanes([&](int i) { return std::nearbyint(x.v[i]); });
}
// x * 2 ** n for whole n in [kLeastPower, 127]; at kLeastPower it is 0.
constexpr float kLeastPower = -127.0f;
INLINE F scaled(F x, F n) {
    return lanes([&](int i) {
        uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
        float power;
        std::memcpy(&power, &bits, 4);
        return x.v[i] * power;
    });
}

INLINE I whole(int32_t x) {
    I out;
    for (int32_t& lane : out.v) lane = x;
    return out;
}
INLINE I add(I a, I b) {
    for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
    return a;
}
INLINE int32_t sum(I x) {
    int32_t total = 0;
    for (int32_t lane : x.v) total += lane;
    return total;
}
INLINE F to_float(I x) {
    return lanes([&](int i) { return static_cast<float>(x.v[i]); });
}
INLINE Line line(const void* p) {
    Line out;
    std::memcpy(out.v, p, 64);
    return out;
}
INLINE void halves(const void* p, Line& low, Line& high) {
    Line both = line(p);
    for (int i = 0; i < 64; i++) low.v[i] = both.v[i] & 0x0f, high.v[i] = both.v[i] >> 4;
}
template <int Right, int Mask>
INLINE Line field(Line x) {
    for (uint8_t& byte : x.v)
        byte = static_cast<uint8_t>((Right < 0 ? byte << (Right < 0 ? -Right : 0) : byte >> (Right > 0 ? Right : 0)) &
                                    Mask);
    return x;
}
INLINE Line either(Line a, Line b) {
    for (int i = 0; i < 64; i++) a.v[i] |= b.v[i];
    return a;
}
INLINE Line entries(const uint8_t* table, Line x) {
    for (uint8_t& byte : x.v) byte = table[byte];
    return x;
}
INLINE void put_line(void* p, Line x) { std::memcpy(p, x.v, 64); }
INLINE float from_half(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    float out;
    if (rest >= 0x7c00) {  // infinite or not a number
        uint32_t bits = sign | 0x7f800000u | (rest & 0x3ff) << 13;
        std::memcpy(&out, &bits, 4);
        return out;
    }
    if (rest < 0x400) {  // zero or subnormal
        out = static_cast<float>(rest) * 5.9604644775390625e-8f;
        return sign ? -out : out;
    }
    uint32_t bits = sign | ((rest << 13) + 0x38000000u);
    std::memcpy(&out, &bits, 4);
    return out;
}
INLINE F float16(const void* p) {
    uint16_t bits[16];
    std::memcpy(bits, p, sizeof bits);
    return lanes([&](int i) { return from_half(bits[i]); });
}
INLINE Quad quad(const void* p) {
    const int8_t* x = static_cast<const int8_t*>(p);
    return {{x[0], x[1], x[2], x[3]}};
}
INLINE I dot4(I sums, Line codes, Quad x) {
    // Unsigned, since a symmetric scheme's sums wrap around on their way.
    for (int i = 0; i < 16; i++) {
        int32_t four = 0;
        for (int j = 0; j < 4; j++) four += codes.v[4 * i + j] * x.v[j];
        sums.v[i] = static_cast<int32_t>(static_cast<uint32_t>(sums.v[i]) + static_cast<uint32_t>(four));
    }
    return sums;
}

INLINE float wide(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
INLINE F from_bf16(const uint16_t* p) {
    return lanes([&](int i) { return wide(p[i]); });
}
INLINE Line2 line2(const void* p) {
    uint16_t bits[32];
    std::memcpy(bits, p, 64);
    return {lanes([&](int i) { return wide(bits[2 * i]); }), lanes([&](int i) { return wide(bits[2 * i + 1]); })};
}
INLINE Pair pair(const void* p) {
    uint16_t two[2];
    std::memcpy(two, p, 4);
    return {wide(two[0]), wide(two[1])};
}
INLINE F dot2(F sums, Line2 line, Pair x) {
    return lanes([&](int i) { return x.second * line.odd.v[i] + (x.first * line.even.v[i] + sums.v[i]); });
}
INLINE void to_bf16(F x, uint16_t* out) {
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        std::memcpy(&bits, &x.v[i], 4);
        out[i] = x.v[i] != x.v[i] ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
    }
}
INLINE I to_int8(F x, int8_t* out) {
    I codes;
    for (int i = 0; i < 16; i++) {
        float r = std::nearbyint(x.v[i]);
        codes.v[i] = r >= 127.0f ? 127 : r > -127.0f ? static_cast<int>(r) : -127;
        out[i] = static_cast<int8_t>(codes.v[i]);
    }
    return codes;
}
INLINE F from_int8(const int8_t* p) {
    return lanes([&](int i) { return static_cast<float>(p[i]); });
}

// Bit i: lane i is at least `bar`; what is not a number is not.
INLINE uint32_t at_least(F x, F bar) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; i++) bits |= static_cast<uint32_t>(x.v[i] >= bar.v[i]) << i;
    return bits;
}

// 16 lanes in double precision.
struct D {
    double v[16];
};
template <class Op>
INLINE D wide_lanes(Op op) {
    D out;
    for (int i = 0; i < 16; i++) out.v[i] = op(i);
    return out;
}
INLINE D widened(F x) {
    return wide_lanes([&](int i) { return static_cast<double>(x.v[i]); });
}
INLINE void store(double* p, D x) { std::memcpy(p, x.v, sizeof x.v); }
INLINE D wide(double x) {
    return wide_lanes([&](int) { return x; });
}
INLINE D add(D a, D b) {
    return wide_lanes([&](int i) { return a.v[i] + b.v[i]; });
}
INLINE D sub(D a, D b) {
    return wide_lanes([&](int i) { return a.v[i] - b.v[i]; });
}
INLINE D mul(D a, D b) {
    return wide_lanes([&](int i) { return a.v[i] * b.v[i]; });
}
INLINE D max(D a, D b) {
    return wide_lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
INLINE D fma(D a, D b, D c) {
    return wide_lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
INLINE D rounded(D x) {
    return wide_lanes([&](int i) { return std::nearbyint(x.v[i]); });
}
// x * 2 ** n for whole n in [-1023, 1023]; at -1023 it is 0.
INLINE D scaled(D x, D n) {
    return wide_lanes([&](int i) {
        uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(n.v[i]) + 1023) << 52;
        double power;
        std::memcpy(&power, &bits, 8);
        return x.v[i] * power;
    });
}
INLINE double sum(D x) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) x.v[i] += x.v[i + width];
    return x.v[0];
}

}  // namespace
}  // namespace inflight
