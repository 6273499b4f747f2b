// Products with the factors of adapters: against sums in double precision, and the same bits in any tile.
#include <algorithm>

#include "tests.h"

namespace inflight::testing {
namespace {

uint16_t to_bf16(float x) {  // of numbers that are bfloat16 already
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>(bits >> 16);
}

// Values in memory as a factor has them.
struct Stored {
    Exact<float> floats;
    Exact<uint16_t> halves;

    Stored(const std::vector<float>& values, bool wide) {
        const int64_t n = static_cast<int64_t>(values.size());
        if (wide)
            floats = Exact<float>(n);
        else
            halves = Exact<uint16_t>(n);
        for (int64_t i = 0; i < n; i++) {
            if (wide)
                floats[i] = values[static_cast<size_t>(i)];
            else
                halves[i] = to_bf16(values[static_cast<size_t>(i)]);
        }
    }
    const char* get() const {
        return floats.size() ? reinterpret_cast<const char*>(floats.get())
                             : reinterpret_cast<const char*>(halves.get());
    }
};

float cut(float x) { return static_cast<float>(rounded(x, 8)); }

void first_factors(const Kernels& kernels, Random& random) {
    const bool wide = random.maybe();
    const int64_t rows = random.between(1, 40), k = random.between(1, 200), depth = (k + 15) / 16 * 16,
                  tokens = random.between(1, kLowTokens);
    std::vector<float> values(static_cast<size_t>(rows * depth), 0.0f);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < k; i++) values[static_cast<size_t>(row * depth + i)] = cut(random.value());
    const Stored stored(values, wide);
    const LowFirst factors{stored.get(), wide, rows, k, depth};
    std::vector<Exact<float>> x, all, alone;
    for (int64_t token = 0; token < tokens; token++) {
        x.emplace_back(depth);
        for (int64_t i = 0; i < k; i++) x.back()[i] = random.value();
        all.emplace_back(rows, kUnset);
        alone.emplace_back(rows, kUnset);
    }
    const float* from[kLowTokens];
    float *to[kLowTokens], *single[kLowTokens];
    for (size_t i = 0; i < x.size(); i++) from[i] = x[i].get(), to[i] = all[i].get(), single[i] = alone[i].get();
    const int64_t middle = random.between(0, rows);
    kernels.shrink(factors, from, tokens, 0, middle, to);
    kernels.shrink(factors, from, tokens, middle, rows, to);
    for (size_t token = 0; token < x.size(); token++) {
        kernels.shrink(factors, from + token, 1, 0, rows, single + token);
        CHECK(same_bits(to[token], single[token], rows), "a token of ", tokens, " alone");
        for (int64_t row = 0; row < rows; row++) {
            double want = 0, size = 0;
            for (int64_t i = 0; i < k; i++) {
                const double product = static_cast<double>(values[static_cast<size_t>(row * depth + i)]) * x[token][i];
                want += product;
                size += std::fabs(product);
            }
            CHECK_NEAR(to[token][row], want, 2e-6 * size + 1e-30, "row ", row, " of ", rows);
        }
    }
}

void second_factors(const Kernels& kernels, Random& random) {
    const bool wide = random.maybe();
    const int64_t rank = random.between(1, 40), n = random.between(1, 200), panels = (n + kLowPanel - 1) / kLowPanel,
                  tokens = random.between(1, kLowTokens), hidden = random.between(0, 5);
    const int half = static_cast<int>(random.between(-1, 1));
    const int64_t column = half < 0 ? random.between(0, 20) : 0, width = half < 0 ? column + n : (n + 15) / 16 * 32;
    std::vector<float> values(static_cast<size_t>(panels * rank * kLowPanel), 0.0f);
    auto value = [&](int64_t output, int64_t i) -> float& {
        return values[static_cast<size_t>((output / kLowPanel * rank + i) * kLowPanel + output % kLowPanel)];
    };
    for (int64_t output = 0; output < n; output++)
        for (int64_t i = 0; i < rank; i++) value(output, i) = cut(random.value());
    const Stored stored(values, wide);
    const LowSecond factors{stored.get(), wide, rank, hidden, n, column, half, random.value()};
    std::vector<std::vector<float>> h, before;
    std::vector<Exact<float>> all, alone;
    for (int64_t token = 0; token < tokens; token++) {
        h.push_back(random.values(hidden + rank));
        before.push_back(random.values(width));
        all.emplace_back(width);
        alone.emplace_back(width);
        std::copy(before.back().begin(), before.back().end(), all.back().get());
        std::copy(before.back().begin(), before.back().end(), alone.back().get());
    }
    const float* from[kLowTokens];
    float *to[kLowTokens], *single[kLowTokens];
    for (size_t i = 0; i < h.size(); i++) from[i] = h[i].data(), to[i] = all[i].get(), single[i] = alone[i].get();
    kernels.expand(factors, from, tokens, 0, panels, to);
    for (size_t token = 0; token < h.size(); token++) {
        for (int64_t panel = panels; panel-- > 0;)
            kernels.expand(factors, from + token, 1, panel, panel + 1, single + token);
        CHECK(same_bits(to[token], single[token], width), "a token of ", tokens, " alone");
        std::vector<char> written(static_cast<size_t>(width), 0);
        for (int64_t output = 0; output < n; output++) {
            const int64_t at = half < 0 ? column + output : output / 16 * 32 + half * 16 + output % 16;
            written[static_cast<size_t>(at)] = 1;
            double sum = 0, size = 0;
            for (int64_t i = 0; i < rank; i++) {
                const double product =
                    static_cast<double>(value(output, i)) * h[token][static_cast<size_t>(hidden + i)];
                sum += product;
                size += std::fabs(product);
            }
            const double old = before[token][static_cast<size_t>(at)], scale = factors.scale;
            CHECK_NEAR(to[token][at], old + scale * sum, 2e-6 * (std::fabs(old) + std::fabs(scale) * size) + 1e-30,
                       "output ", output, " of ", n);
        }
        for (int64_t at = 0; at < width; at++)
            CHECK(written[static_cast<size_t>(at)] || to[token][at] == before[token][static_cast<size_t>(at)],
                  "column ", at, " is nobody's");
    }
}

void gates(const Kernels& kernels, Random& random) {
    const int64_t n = random.between(1, 100), lines = (n + 15) / 16;
    const Activation act = random.pick(
        {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu, Activation::kSwigluClamped});
    std::vector<float> halves = random.values(2 * n);
    Exact<float> wide(lines * 32), got(n, kUnset), want(n, kUnset);
    for (int64_t i = 0; i < n; i++)
        for (int64_t half = 0; half < 2; half++)
            wide[i / 16 * 32 + half * 16 + i % 16] = halves[static_cast<size_t>(half * n + i)];
    kernels.gate_panels(act, wide.get(), n, got.get());
    kernels.gate(act, halves.data(), 1.0f, halves.data() + n, n, want.get());
    CHECK(same_bits(got.get(), want.get(), n), "a gate of ", n);
}

}  // namespace

void adapters(const Kernels& kernels, Random& random) {
    for (int round = 0; round < 100; round++) {
        first_factors(kernels, random);
        second_factors(kernels, random);
        gates(kernels, random);
    }
}

}  // namespace inflight::testing
