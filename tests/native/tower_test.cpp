// A layer of a tower: parts of its rows see each other, nothing else sees anything, on any number of threads.
#include "tower.h"

#include <algorithm>

#include "pack.h"
#include "tests.h"

namespace inflight::testing {
namespace {

struct Layer {
    int64_t inputs, heads, dim, hidden;
    std::vector<float> weight, bias, norm, norm_bias;
};

int add_floats(Tower& tower, Format format, const std::vector<float>& weight, int64_t n, int64_t k, const float* bias) {
    Weights w = describe(format, false, false, n, k, 0);
    char* data = tower.allocate(packed_bytes(w));
    float* scales = reinterpret_cast<float*>(tower.allocate(w.panels * kPanel * 4));
    std::fill(scales, scales + w.panels * kPanel, 0.0f);
    for (int64_t panel = 0; panel < w.panels; panel++)
        pack_panel(w, panel, weight.data(), Source::kFloat, data + panel * w.panel_bytes, scales + panel * kPanel);
    w.data = data;
    w.scales = format == Format::kInt8 ? scales : nullptr;
    return tower.add_weights(w, bias);
}

// x -> LayerNorm -> queries, keys and values -> attention, to which pairs of rows are averaged.
std::vector<float> run(const Layer& layer, const Kernels& kernels, int threads, Format format,
                       const std::vector<float>& x, const std::vector<int64_t>& parts, std::vector<float>* averages) {
    Tower tower(threads, kernels.name, format != Format::kFloat);
    const int64_t rows = static_cast<int64_t>(x.size()) / layer.inputs, wide = 3 * layer.hidden;
    int in = tower.add_buffer(layer.inputs, 0), qkv = tower.add_buffer(wide, 0),
        out = tower.add_buffer(layer.hidden, 0), mean = tower.add_buffer(layer.hidden, 1);
    TowerOperation read{}, product{}, attend{}, average{};
    read.code = TowerCode::kInput;
    read.to = read.from = in;
    read.number = 0;
    product.code = TowerCode::kProduct;
    product.from = in;
    product.to = qkv;
    product.products = {add_floats(tower, format, layer.weight, wide, layer.inputs, layer.bias.data())};
    product.norm = {tower.add_norm(layer.norm.data(), layer.inputs),
                    tower.add_norm(layer.norm_bias.data(), layer.inputs), 1e-5f};
    attend.code = TowerCode::kAttend;
    attend.from = qkv;
    attend.to = out;
    attend.heads = layer.heads;
    attend.scale = 0.3f;
    attend.number = 0;
    average.code = TowerCode::kAverage;
    average.from = out;
    average.to = mean;
    average.parts = 2;
    average.number = 0;
    for (const TowerOperation& each : {read, product, attend, average}) tower.add(each);
    tower.add_output(out);
    tower.add_output(mean);
    std::vector<int64_t> table = {0, rows - 1, rows / 2, rows / 2};
    std::vector<float> result(static_cast<size_t>(rows * layer.hidden)), means(static_cast<size_t>(2 * layer.hidden));
    TowerRun arrays{{rows, 2}, {x.data()}, {parts}, {table.data()}, {result.data(), means.data()}};
    for (int repeat = 0; repeat < 2; repeat++) tower.run(arrays);
    if (averages) *averages = means;
    return result;
}

std::vector<double> expected(const Layer& layer, const std::vector<float>& x, const std::vector<int64_t>& parts) {
    const int64_t rows = static_cast<int64_t>(x.size()) / layer.inputs, wide = 3 * layer.hidden;
    std::vector<double> qkv(static_cast<size_t>(rows * wide)), out(static_cast<size_t>(rows * layer.hidden));
    for (int64_t row = 0; row < rows; row++) {
        std::vector<double> in =
            layer_normed(x.data() + row * layer.inputs, layer.inputs, layer.norm.data(), layer.norm_bias.data(), 1e-5f);
        for (int64_t n = 0; n < wide; n++) {
            double sum = layer.bias[static_cast<size_t>(n)];
            for (int64_t k = 0; k < layer.inputs; k++)
                sum += in[static_cast<size_t>(k)] * layer.weight[static_cast<size_t>(n * layer.inputs + k)];
            qkv[static_cast<size_t>(row * wide + n)] = sum;
        }
    }
    auto at = [&](int64_t row, int64_t which, int64_t head, int64_t d) {
        return qkv[static_cast<size_t>(row * wide + (which * layer.heads + head) * layer.dim + d)];
    };
    int64_t begin = 0;
    for (int64_t length : parts) {
        for (int64_t row = begin; row < begin + length; row++)
            for (int64_t head = 0; head < layer.heads; head++) {
                std::vector<double> scores;
                for (int64_t key = begin; key < begin + length; key++) {
                    double score = 0;
                    for (int64_t d = 0; d < layer.dim; d++) score += at(row, 0, head, d) * at(key, 1, head, d);
                    scores.push_back(0.3 * score);
                }
                double most = *std::max_element(scores.begin(), scores.end()), total = 0;
                for (double& score : scores) total += score = std::exp(score - most);
                for (int64_t d = 0; d < layer.dim; d++) {
                    double sum = 0;
                    for (int64_t key = 0; key < length; key++)
                        sum += scores[static_cast<size_t>(key)] / total * at(begin + key, 2, head, d);
                    out[static_cast<size_t>(row * layer.hidden + head * layer.dim + d)] = sum;
                }
            }
        begin += length;
    }
    return out;
}

}  // namespace

void towers(const Kernels& kernels, Random& random) {
    for (int repeat = 0; repeat < 4; repeat++) {
        Layer layer{};
        layer.inputs = random.between(2, 70);
        layer.heads = random.between(1, 3);
        layer.dim = random.pick<int64_t>({4, 16, 20, 32, 40});
        layer.hidden = layer.heads * layer.dim;
        layer.weight = random.values(3 * layer.hidden * layer.inputs, 1.0f / std::sqrt(float(layer.inputs)));
        layer.bias = random.values(3 * layer.hidden);
        layer.norm = random.values(layer.inputs);
        layer.norm_bias = random.values(layer.inputs);
        std::vector<int64_t> parts;
        int64_t rows = 0;
        for (int64_t i = random.between(1, 4); i > 0; i--) {
            parts.push_back(
                random.pick<int64_t>({1, 15, 16, 17, 63, 520, random.between(1, 100), random.between(1, 300)}));
            rows += parts.back();
        }
        std::vector<float> x = random.values(rows * layer.inputs), averages;
        std::vector<float> exact = run(layer, kernels, 1, Format::kFloat, x, parts, &averages);
        std::vector<double> want = expected(layer, x, parts);
        for (size_t i = 0; i < want.size(); i++) CHECK_NEAR(exact[i], want[i], 2e-4, "attention in ", rows, " rows");
        for (int64_t d = 0; d < layer.hidden; d++)
            CHECK_NEAR(averages[static_cast<size_t>(d)],
                       (want[static_cast<size_t>(d)] + want[static_cast<size_t>((rows - 1) * layer.hidden + d)]) / 2,
                       2e-4, "a mean");
        for (Format format : {Format::kFloat, Format::kBf16, Format::kInt8}) {
            std::vector<float> one = run(layer, kernels, 1, format, x, parts, nullptr),
                               three = run(layer, kernels, 3, format, x, parts, nullptr);
            CHECK(same_bits(one.data(), three.data(), rows * layer.hidden), "threads change bits of format ",
                  static_cast<int>(format));
            // The first part alone, before rows of others.
            std::vector<float> first(x.begin(), x.begin() + parts[0] * layer.inputs),
                alone = run(layer, kernels, 1, format, first, {parts[0]}, nullptr);
            CHECK(same_bits(one.data(), alone.data(), parts[0] * layer.hidden), "other parts change bits of format ",
                  static_cast<int>(format));
        }
    }
}

}  // namespace inflight::testing
