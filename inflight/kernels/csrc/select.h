// Selection of the largest items without sorting.
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

// Where a selection ends: it has all items of higher keys, and the first `ties` items of this key.
struct Border {
    uint32_t key;
    int64_t ties;
};

class Selector {
  public:
    void reserve(int64_t n);

    // Selects the items that have less than `limit` mass before them, in falling order of the keys (equal keys: in the
    // items' order), and at least one; n >= 1. `masses` null: each item has mass 1, which selects `limit` items.
    Border border(const uint32_t* keys, const double* masses, int64_t n, double limit);

  private:
    Border of_few(const uint32_t* keys, const double* masses, int64_t n, double before, double limit) const;

    Aligned<uint32_t> keys_;
    Aligned<double> masses_;
};

}  // namespace inflight
