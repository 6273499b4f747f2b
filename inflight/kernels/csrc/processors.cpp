// Processors that change single logits; those that take tokens away are in sampling.cpp.
#include <algorithm>
#include <limits>
#include <random>

#include "sampling.h"

namespace inflight {

namespace {

constexpr float kImpossible = -std::numeric_limits<float>::infinity();

}  // namespace

void Chooser::edit(const Known& known) {
    const Sampling& s = *known.sampling;
    if (s.watermark && known.count) watermark(s, known.tokens[known.count - 1]);
    if (s.repetition != 1.0) repetition(known, static_cast<float>(s.repetition));
    if (s.frequency != 0.0 || s.presence != 0.0)
        frequency(known, static_cast<float>(s.frequency), static_cast<float>(s.presence));
    for (const auto& [token, value] : s.bias)
        if (token >= 0 && token < n_) x_[token] += value;
    if (known.mask) mask(known.mask, known.mask_bytes);
}

// The green list of Kirchenbauer et al. (2023) as TGI draws it: the first of a permutation that torch.randperm makes on
// a CPU, which is Fisher and Yates' with a Mersenne twister whose numbers are reduced by a division.
void Chooser::watermark(const Sampling& s, int64_t before) {
    std::mt19937 generator(static_cast<uint32_t>(s.key * static_cast<uint64_t>(before)));
    int64_t green = std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(n_) * s.gamma), 0, n_);
    for (int64_t i = 0; i < n_; i++) order_[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < green; i++) {
        if (i < n_ - 1) {
            uint32_t other = static_cast<uint32_t>(generator()) % static_cast<uint32_t>(n_ - i);
            std::swap(order_[static_cast<size_t>(i)], order_[static_cast<size_t>(i + other)]);
        }
        x_[order_[static_cast<size_t>(i)]] += s.delta;
    }
}

// Every token seen, once: positive scores are divided, negative ones multiplied (Keskar et al., 2019).
void Chooser::repetition(const Known& known, float penalty) {
    auto seen = [&](int64_t i) { return known.tokens[i] >= 0 && known.tokens[i] < n_; };
    for (int64_t i = 0; i < known.count; i++) {
        if (!seen(i) || counts_[static_cast<size_t>(known.tokens[i])]++) continue;
        float& score = x_[known.tokens[i]];
        score = score < 0 ? score * penalty : score / penalty;
    }
    for (int64_t i = 0; i < known.count; i++)
        if (seen(i)) counts_[static_cast<size_t>(known.tokens[i])] = 0;
}

void Chooser::frequency(const Known& known, float frequency, float presence) {
    auto seen = [&](int64_t i) { return known.tokens[i] >= 0 && known.tokens[i] < n_; };
    for (int64_t i = known.prompt; i < known.count; i++)
        if (seen(i)) counts_[static_cast<size_t>(known.tokens[i])]++;
    for (int64_t i = known.prompt; i < known.count; i++) {
        if (!seen(i)) continue;
        int32_t& count = counts_[static_cast<size_t>(known.tokens[i])];
        if (count) x_[known.tokens[i]] -= frequency * static_cast<float>(count) + presence;
        count = 0;
    }
}

void Chooser::mask(const uint8_t* bits, int64_t bytes) {
    int64_t whole = std::min(bytes, n_ / 8);
    for (int64_t byte = 0; byte < whole; byte++) {
        uint8_t allowed = bits[byte];
        if (allowed == 0xff) continue;
        if (allowed == 0) std::fill_n(x_ + byte * 8, 8, kImpossible);
        for (int64_t bit = 0; allowed && bit < 8; bit++)
            if (!(allowed >> bit & 1)) x_[byte * 8 + bit] = kImpossible;
    }
    for (int64_t token = whole * 8; token < n_; token++)
        if (token / 8 >= bytes || !(bits[token / 8] >> token % 8 & 1)) x_[token] = kImpossible;
}

}  // namespace inflight
