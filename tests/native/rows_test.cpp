// What is done to single rows: norms, rotation, embeddings, logits.
#include <algorithm>

#include "blocks.h"
#include "tests.h"
#include "weights.h"

namespace inflight::testing {
namespace {

void norms(const Kernels& kernels, Random& random) {
    int64_t n = random.pick<int64_t>({1, 15, 16, 17, 33, random.between(1, 200)});
    std::vector<float> x = random.values(n, random.pick({1.0f, 1e-4f, 1000.0f})), weight = random.values(n),
                       before = random.values(n);
    Norm norm{weight.data(), random.pick({1e-6f, 1e-5f, 1.0f}), random.maybe()};
    float scale = random.value();
    std::vector<double> want = normed(x.data(), n, norm);
    std::vector<float> stored(x.size()), added = before, in_place = x;
    kernels.norm(x.data(), n, norm, false, 1.0f, stored.data());
    kernels.norm(x.data(), n, norm, true, scale, added.data());
    kernels.norm(in_place.data(), n, norm, false, 1.0f, in_place.data());
    CHECK(same_bits(in_place.data(), stored.data(), n), "a norm in place");
    for (size_t i = 0; i < x.size(); i++) {
        CHECK_NEAR(stored[i], want[i], 2e-6 * std::fabs(want[i]), "norm of ", n);
        double sum = before[i] + scale * want[i];
        CHECK_NEAR(added[i], sum, 2e-6 * (std::fabs(before[i]) + std::fabs(scale * want[i])), "added norm of ", n);
    }
}

void rotations(const Kernels& kernels, Random& random) {
    int64_t dim = random.pick<int64_t>({16, 20, 64, 80, 128}),
            rotary_dim = random.pick<int64_t>({0, 2, dim / 2, dim, 2 * random.between(0, dim / 2)});
    rotary_dim -= rotary_dim % 2;
    int64_t half = rotary_dim / 2;
    std::vector<float> x = random.values(dim), weight = random.values(dim), cosines, sines;
    for (int64_t i = 0; i < half; i++) {
        float angle = random.value(10.0f);
        cosines.push_back(std::cos(angle));
        sines.push_back(std::sin(angle));
    }
    Norm norm{random.maybe() ? weight.data() : nullptr, 1e-5f, random.maybe()};
    std::vector<double> want = normed(x.data(), dim, norm);
    kernels.rotate(x.data(), dim, norm, cosines.data(), sines.data(), rotary_dim);
    for (int64_t i = 0; i < dim; i++) {
        size_t at = static_cast<size_t>(i), j = static_cast<size_t>(half ? i % half : 0), first = j,
               second = j + static_cast<size_t>(half);
        double value = want[at], size = std::fabs(value);
        if (i < rotary_dim) {
            double c = cosines[j], s = sines[j];
            value = i < half ? want[first] * c - want[second] * s : want[second] * c + want[first] * s;
            size = std::fabs(want[first]) + std::fabs(want[second]);
        }
        CHECK_NEAR(x[at], value,
                   norm.weight      ? 2e-6 * size
                   : i < rotary_dim ? 2e-7 * size
                                    : 0.0,
                   "component ", i, " of ", dim, ", rotary_dim ", rotary_dim);
    }
}

void check_embeddings(const Kernels& kernels, Random& random, const Packed& p) {
    float scale = random.pick({1.0f, random.value()});
    std::vector<float> out(static_cast<size_t>(p.w.k));
    for (int64_t row : {int64_t(0), p.w.n - 1, random.between(0, p.w.n - 1)}) {
        kernels.unpack(p.w, row, scale, out.data());
        for (int64_t i = 0; i < p.w.k; i++) {
            Entry want = p.entries.empty() ? entry(p.w, row, i) : p.entries[static_cast<size_t>(row * p.w.k + i)];
            double size = (std::fabs(want.code * want.scale) + std::fabs(want.offset)) * std::fabs(scale);
            CHECK_NEAR(out[static_cast<size_t>(i)], want.value() * scale, 2e-7 * size + 1e-36, "format ",
                       static_cast<int>(p.w.format), " row ", row, " input ", i);
        }
    }
}

void embeddings(const Kernels& kernels, Random& random) {
    for (Format format : {Format::kFloat, Format::kBf16, Format::kInt8, Format::kGroup8, Format::kGroup4}) {
        Shape shape{format,
                    random.maybe(),
                    false,
                    random.between(1, 70),
                    random.between(1, 200),
                    random.pick<int64_t>({8, 24, 32, 64})};
        check_embeddings(kernels, random, pack(random, shape, false));
    }
    for (Format format : kBlockTypes) {
        int64_t inputs = block_form(format).file_inputs * random.between(1, 3);
        check_embeddings(kernels, random, pack_random_blocks(random, format, false, random.between(1, 70), inputs));
    }
}

void gates(const Kernels& kernels, Random& random) {
    int64_t n = random.pick<int64_t>({1, 15, 16, 17, 33, random.between(1, 200)});
    std::vector<float> wide = random.values(2 * n, random.pick({1.0f, 10.0f})), out(static_cast<size_t>(n) + 1, kUnset);
    Activation act = random.pick({Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu,
                                  Activation::kGeluQuick, Activation::kSwigluClamped});
    kernels.gate(act, wide.data(), 1.0f, wide.data() + n, n, out.data());
    for (size_t i = 0; i < static_cast<size_t>(n); i++) {
        const auto parts = gated(act, wide[i], wide[static_cast<size_t>(n) + i]);
        const double gate = parts.first, up = parts.second;
        double error = 2e-6 * std::fabs(gate) + 3e-7 * std::min(1.0, std::fabs(static_cast<double>(wide[i])));
        CHECK_NEAR(out[i], gate * up, error * std::fabs(up) + 1e-37, "gate ", i, " of ", n);
    }
    CHECK(out.back() == kUnset, "a gate writes too far");
}

void layer_norms(const Kernels& kernels, Random& random) {
    int64_t n = random.pick<int64_t>({1, 15, 16, 17, 33, random.between(1, 200)});
    float far = random.pick({0.0f, 3.0f, -100.0f}), eps = random.pick({1e-6f, 1e-5f});
    std::vector<float> x = random.values(n), weight = random.values(n), bias = random.values(n),
                       out(static_cast<size_t>(n) + 1, kUnset);
    for (float& each : x) each += far;
    std::vector<double> want = layer_normed(x.data(), n, weight.data(), bias.data(), eps);
    kernels.layer_norm(x.data(), n, weight.data(), bias.data(), eps, out.data());
    for (int64_t i = 0; i < n && n > 1; i++)
        CHECK_NEAR(out[static_cast<size_t>(i)], want[static_cast<size_t>(i)],
                   (4e-6 + 1e-6 * std::fabs(far)) * (std::fabs(want[static_cast<size_t>(i)]) + 10.0), "LayerNorm of ",
                   n);
    CHECK(out.back() == kUnset, "a LayerNorm writes too far");
    kernels.layer_norm(x.data(), n, weight.data(), bias.data(), eps, x.data());
    CHECK(same_bits(x.data(), out.data(), n), "a LayerNorm in place");
}

void logits(const Kernels& kernels, Random& random) {
    int64_t n = random.pick<int64_t>({1, 15, 16, 17, 32, random.between(1, 300)});
    std::vector<float> x = random.values(n, random.pick({1.0f, 50.0f})), capped = x, sum = random.values(n),
                       before = sum;
    float divider = random.pick({1.0f, 2.5f}), softcap = random.pick({0.0f, 30.0f, 1.0f}), factor = random.value();
    kernels.cap(capped.data(), n, divider, softcap);
    kernels.axpy(sum.data(), x.data(), factor, n);
    for (size_t i = 0; i < x.size(); i++) {
        double value = static_cast<double>(x[i]) / divider,
               want = softcap != 0.0f ? softcap * std::tanh(value / softcap) : value;
        CHECK_NEAR(capped[i], want,
                   2e-6 * std::max(std::fabs(want), static_cast<double>(softcap)) + 2e-7 * std::fabs(want), "cap ",
                   softcap);
        double added = static_cast<double>(factor) * x[i];
        CHECK_NEAR(sum[i], before[i] + added, 1.3e-7 * (std::fabs(before[i]) + std::fabs(added)), "axpy");
    }
    // The first of the largest, wherever they are.
    int64_t first = random.between(0, n - 1);
    for (int64_t i = 0; i < n; i++) x[static_cast<size_t>(i)] = std::fmin(x[static_cast<size_t>(i)], 1e4f);
    x[static_cast<size_t>(first)] = 1e5f;
    for (int64_t i = random.between(first, n - 1); i > first; i = random.between(first, i - 1))
        x[static_cast<size_t>(i)] = 1e5f;
    CHECK(kernels.argmax(x.data(), n) == first, "argmax of ", n, " is ", kernels.argmax(x.data(), n), ", not ", first);
    std::fill(x.begin(), x.end(), -INFINITY);
    CHECK(kernels.argmax(x.data(), n) == 0, "argmax of nothing but -inf");
    x.back() = -3e38f;
    CHECK(kernels.argmax(x.data(), n) == n - 1, "argmax of one finite value");
    x[static_cast<size_t>(random.between(0, n - 1))] = NAN;
    CHECK(kernels.argmax(x.data(), n) == -1, "argmax of ", n, " with a NaN is ", kernels.argmax(x.data(), n));
}

}  // namespace

void rows(const Kernels& kernels, Random& random) {
    for (int repeat = 0; repeat < 40; repeat++) {
        norms(kernels, random);
        rotations(kernels, random);
        logits(kernels, random);
        gates(kernels, random);
        layer_norms(kernels, random);
    }
    for (int repeat = 0; repeat < 5; repeat++) embeddings(kernels, random);
}

}  // namespace inflight::testing
