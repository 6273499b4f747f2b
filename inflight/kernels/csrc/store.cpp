#include "store.h"

#include <algorithm>

namespace inflight {

Store::Store(int threads, const std::string& isa) : pool_(Pool::shared(std::max(1, threads))), kernels_(choose(isa)) {}

int Store::add_weights(Weights w, const float* bias) {
    w.split = splits_ && kernels_->splits && w.format == Format::kFloat;
    bytes_ += w.panels * w.panel_bytes + (w.scales ? w.panels * kPanel * 4 : 0);
    if (bias) {
        float* lanes = reinterpret_cast<float*>(arena_.take(w.panels * kPanel * 4));
        for (int64_t panel = 0; panel < w.panels; panel++)
            for (int64_t lane = 0; lane < kPanel; lane++) {
                int64_t output = w.output(panel, lane);
                lanes[panel * kPanel + lane] = output < w.n ? bias[output] : 0.0f;
            }
        w.bias = lanes;
        bytes_ += w.panels * kPanel * 4;
    }
    weights_.push_back(w);
    return static_cast<int>(weights_.size()) - 1;
}

int Store::add_norm(const float* values, int64_t n) {
    norms_.emplace_back(values, values + n);
    return static_cast<int>(norms_.size()) - 1;
}

}  // namespace inflight
