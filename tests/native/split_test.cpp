// Products of float32 from bfloat16 parts: their errors beside those of plain sums, and values of every kind.
#include <algorithm>

#include "pack.h"
#include "tests.h"

namespace inflight::testing {
namespace {

using Floats = std::vector<float>;

// Rows [rows, k] times a weight [n, k].
Floats multiplied(const Kernels& kernels, const Floats& weight, int64_t n, int64_t k, const Floats& x, bool split) {
    Weights w = describe(Format::kFloat, false, false, n, k, 0);
    w.split = split;
    Exact<char> data(packed_bytes(w));
    for (int64_t panel = 0; panel < w.panels; panel++)
        pack_panel(w, panel, weight.data(), Source::kFloat, data.get() + panel * w.panel_bytes, nullptr);
    w.data = data.get();
    const int64_t rows = static_cast<int64_t>(x.size()) / k, most = kernels.tile_rows(w);
    Exact<char> inputs(rows * w.input_row());
    const Input in{inputs.get(), nullptr, nullptr, rows, (rows + most - 1) / most};
    for (int64_t tile = 0; tile < in.tiles; tile++) {
        std::vector<const float*> at;
        for (int64_t row = in.start(tile); row < in.start(tile + 1); row++) at.push_back(x.data() + row * k);
        kernels.prepare(w, at.data(), {nullptr, 0.0f, false}, in, tile);
    }
    Floats out(static_cast<size_t>(rows * n));
    kernels.product(w, in, 0, w.panels, 0, in.tiles, {out.data(), n, Mode::kStore, Activation::kSilu, 1.0f, nullptr});
    return out;
}

// What a product is in double precision, and the sum of its terms' sizes.
struct Exactly {
    double value = 0.0, size = 0.0;

    Exactly(const float* x, const float* w, int64_t k) {
        for (int64_t i = 0; i < k; i++) {
            const double term = static_cast<double>(x[i]) * w[i];
            value += term;
            size += std::fabs(term);
        }
    }
};

// Squares of errors, as parts of the sizes of the sums.
double squares(const Floats& got, const Floats& weight, int64_t n, int64_t k, const Floats& x, double& most) {
    double total = 0.0;
    for (size_t i = 0; i < got.size(); i++) {
        const int64_t row = static_cast<int64_t>(i) / n, output = static_cast<int64_t>(i) % n;
        const Exactly want(x.data() + row * k, weight.data() + output * k, k);
        const double error = (got[i] - want.value) / want.size;
        total += error * error;
        most = std::max(most, std::fabs(error));
    }
    return total;
}

// Over shapes and scales the error is not above that of a plain sum in float32, and each single one is bounded.
void errors(const Kernels& kernels, Random& random) {
    const int64_t n = 64, rows = 20;
    for (int64_t k : {1, 3, 31, 32, 33, 100, 384, 1536})
        for (float scale : {1.0f, 1e-12f, 1e12f})
            for (bool positive : {false, true}) {
                Floats weight = random.values(n * k, 0.05f * scale), x = random.values(rows * k, 3.0f / scale);
                if (positive)
                    for (Floats* of : {&weight, &x})
                        for (float& each : *of) each = std::fabs(each) + 1e-3f * scale * 1e-30f;
                for (Floats* of : {&weight, &x})
                    for (float& each : *of)
                        if (each == 0.0f) each = of == &weight ? scale : 1.0f / scale;
                double most = 0.0, plain_most = 0.0;
                const double split = squares(multiplied(kernels, weight, n, k, x, true), weight, n, k, x, most),
                             plain = squares(multiplied(kernels, weight, n, k, x, false), weight, n, k, x, plain_most);
                const double blocks = static_cast<double>((k + 31) / 32);
                CHECK(most <= (6.0 * blocks + 20.0) * 0x1p-24, "an error of ", most, " for ", k, " inputs");
                const double allowed = k < 32 ? 2.5 : 1.0;  // a short sum has few roundings
                CHECK(split <= allowed * allowed * plain, "errors of ", std::sqrt(split / plain),
                      " times those of plain sums for ", k, " inputs at ", scale, positive ? ", positive" : "");
            }
}

// Infinities, NaNs and the largest floats give what plain sums give; what is tiny, the same but for 2 ** -126 a term.
void kinds(const Kernels& kernels, Random& random) {
    const int64_t n = 40, k = 70, rows = 19;
    const float infinity = HUGE_VALF, largest = 3.4028235e38f, tiny = 1e-44f;
    for (float odd : {infinity, -infinity, std::nanf(""), largest, -largest, 3.4e38f, tiny, -tiny, 1e-38f, 0.0f, -0.0f})
        for (bool in_weight : {false, true}) {
            Floats weight = random.values(n * k), x = random.values(rows * k);
            Floats& of = in_weight ? weight : x;
            for (int i = 0; i < 6; i++)
                of[static_cast<size_t>(random.between(0, static_cast<int64_t>(of.size()) - 1))] = odd;
            const Floats split = multiplied(kernels, weight, n, k, x, true),
                         plain = multiplied(kernels, weight, n, k, x, false);
            for (size_t i = 0; i < split.size(); i++) {
                const int64_t row = static_cast<int64_t>(i) / n, output = static_cast<int64_t>(i) % n;
                const Exactly want(x.data() + row * k, weight.data() + output * k, k);
                if (std::isnan(plain[i])) CHECK(std::isnan(split[i]), "NaN became ", split[i]);
                if (std::isinf(plain[i]))  // a sum may grow too large on its way in one order and not in the other
                    CHECK(split[i] == plain[i] || std::fabs(want.value) < 3.41e38, plain[i], " became ", split[i]);
                if (!std::isfinite(plain[i])) continue;
                CHECK_NEAR(split[i], want.value, 40 * 0x1p-24 * want.size + 0x1p-120, "with ", odd);
            }
        }
}

}  // namespace

void splits(const Kernels& kernels, Random& random) {
    if (!kernels.splits) return;
    errors(kernels, random);
    kinds(kernels, random);
}

}  // namespace inflight::testing
