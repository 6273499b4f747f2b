// Which of many come first, without sorting them.
#pragma once

#include <cstdint>
#include <cstring>

#include "memory.h"

namespace inflight {

// Unsigned integers in the order of floats; both zeros are one.
inline uint32_t key_of(float x) {
    uint32_t bits;
    x += 0.0f;
    std::memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline float value_of(uint32_t key) {
    uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// The last one that is taken: those of higher keys are, and the first `ties` of the same key.
struct Border {
    uint32_t key;
    int64_t ties;
};

class Selector {
  public:
    void reserve(int64_t n);

    // Of n >= 1 items in falling order of their keys, equal ones in their own order, those with less than `limit` mass
    // before them; at least one. `masses` null: each has 1, so that `limit` of them are taken.
    Border border(const uint32_t* keys, const double* masses, int64_t n, double limit);

  private:
    Border of_few(const uint32_t* keys, const double* masses, int64_t n, double before, double limit) const;

    Aligned<uint32_t> keys_;
    Aligned<double> masses_;
};

}  // namespace inflight
