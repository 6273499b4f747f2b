// What the native tests share: numbers from a seed, memory without slack, arithmetic in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "types.h"

namespace inflight::testing {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream text;
    text.precision(9);
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

// What follows the condition is only read where it fails.
#define CHECK(condition, ...)                                                                                       \
    do {                                                                                                            \
        if (!(condition)) ::inflight::testing::fail(#condition, " (", __FILE__, ":", __LINE__, "): ", __VA_ARGS__); \
    } while (false)
#define CHECK_NEAR(got, want, tolerance, ...)                                                                      \
    do {                                                                                                           \
        double got_ = (got), want_ = (want), tolerance_ = (tolerance);                                             \
        if (!(std::fabs(got_ - want_) <= tolerance_))                                                              \
            ::inflight::testing::fail(#got, " is ", got_, ", not ", want_, " within ", tolerance_, " (", __FILE__, \
                                      ":", __LINE__, "): ", __VA_ARGS__);                                          \
    } while (false)

template <class Error, class Call>
void check_throws(Call call, const std::string& what) {
    try {
        call();
    } catch (const Error&) {
        return;
    }
    fail("nothing was thrown: ", what);
}

// SplitMix64 (Steele, Lea and Flood, 2014).
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t bits() {
        uint64_t x = state_ += 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    }
    int64_t between(int64_t low, int64_t high) {
        return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
    }
    bool maybe() { return bits() & 1; }
    float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-24f; }
    // About normal.
    float value(float size = 1.0f) {
        float sum = 0.0f;
        for (int i = 0; i < 6; i++) sum += uniform() - 0.5f;
        return sum * 1.4f * size;
    }
    template <class T>
    T pick(std::initializer_list<T> of) {
        return of.begin()[between(0, static_cast<int64_t>(of.size()) - 1)];
    }
    template <class T>
    void shuffle(std::vector<T>& values) {
        for (size_t i = values.size(); i > 1; i--)
            std::swap(values[i - 1], values[static_cast<size_t>(between(0, static_cast<int64_t>(i) - 1))]);
    }
    std::vector<float> values(int64_t n, float size = 1.0f) {
        std::vector<float> out(static_cast<size_t>(n));
        for (float& each : out) each = value(size);
        return out;
    }

  private:
    uint64_t state_;
};

// Memory aligned to lines that ends with its last element: AddressSanitizer sees whoever reads on.
template <class T>
class Exact {
  public:
    Exact() = default;
    explicit Exact(int64_t n, T fill = T()) : size_(n) {
        void* found = nullptr;
        if (posix_memalign(&found, 64, static_cast<size_t>(n) * sizeof(T))) throw std::bad_alloc();
        data_.reset(static_cast<T*>(found));
        this->fill(fill);
    }
    void fill(T value) {
        for (int64_t i = 0; i < size_; i++) data_[i] = value;
    }
    T* get() const { return data_.get(); }
    T& operator[](int64_t i) const { return data_[i]; }
    int64_t size() const { return size_; }

  private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T[], Free> data_;
    int64_t size_ = 0;
};

constexpr float kUnset = -12345.0f;  // what nobody should have written

inline bool same_bits(const float* a, const float* b, int64_t n) {
    return !std::memcmp(a, b, static_cast<size_t>(n) * sizeof(float));
}

// x to the nearest number of `bits` significant bits, ties to even.
inline double rounded(double x, int bits) {
    if (x == 0.0 || !std::isfinite(x)) return x;
    int exponent;
    double fraction = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits);
}
inline double as_bf16(double x) { return rounded(x, 8); }

template <class T>
T read(const void* from) {
    T out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
inline double read_bf16(const void* from) {
    uint32_t bits = static_cast<uint32_t>(read<uint16_t>(from)) << 16;
    return read<float>(&bits);
}
inline double read_half(const void* from) {
    int bits = read<uint16_t>(from), exponent = bits >> 10 & 31, rest = bits & 1023;
    double size = exponent ? std::ldexp(1024 + rest, exponent - 25) : std::ldexp(rest, -24);
    return bits >> 15 ? -size : size;
}

inline double activated(Activation act, double x) {
    switch (act) {
        case Activation::kSilu: return x / (1.0 + std::exp(-x));
        case Activation::kGelu: return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
        case Activation::kGeluTanh:
            return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::kRelu: return x > 0.0 ? x : 0.0;
        case Activation::kReluSquared: return x > 0.0 ? x * x : 0.0;
        case Activation::kGeluQuick:
        case Activation::kSwigluClamped: return x / (1.0 + std::exp(-1.702 * x));
    }
    fail("no such activation");
}

// What a gate and an up give: the factor of the gate, and that of the other, which is clamped too where the gate is.
inline std::pair<double, double> gated(Activation act, double gate, double up) {
    if (act != Activation::kSwigluClamped) return {activated(act, gate), up};
    return {activated(act, std::min(gate, 7.0)), std::max(std::min(up, 7.0), -7.0) + 1.0};
}

inline std::vector<double> normed(const float* x, int64_t n, const Norm& norm) {
    std::vector<double> out(x, x + n);
    if (!norm.weight) return out;
    double squares = 0.0;
    for (double each : out) squares += each * each;
    double factor = 1.0 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(norm.eps));
    for (int64_t i = 0; i < n; i++)
        out[static_cast<size_t>(i)] *= factor * (norm.weight[i] + (norm.centered ? 1.0 : 0.0));
    return out;
}

inline std::vector<double> layer_normed(const float* x, int64_t n, const float* weight, const float* bias, float eps) {
    std::vector<double> out(x, x + n);
    double mean = 0.0, squares = 0.0;
    for (double each : out) mean += each / static_cast<double>(n);
    for (double each : out) squares += (each - mean) * (each - mean);
    double factor = 1.0 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(eps));
    for (int64_t i = 0; i < n; i++) {
        double& each = out[static_cast<size_t>(i)];
        each = (each - mean) * factor * weight[i] + bias[i];
    }
    return out;
}

}  // namespace inflight::testing
