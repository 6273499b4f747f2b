// How a mixture chooses a token's experts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace inflight {

struct Routing {
    int chosen = 0;
    bool sigmoid = false;  // an expert's score is σ of its logit; else the softmax over all
    bool normalise = false;
    int bias = -1;  // norm's number [experts] of what is added to the scores for the choice only; -1: nothing
    int groups = 1, kept = 1;  // experts lie in groups; only those of the `kept` best ones are chosen from
    bool single = false;       // a group's score is its best expert's; else the sum of its two best ones'
    float floor = 0.0f;        // added to the sum by which scores are divided
    float scale = 1.0f;        // of the weights
};

// The scores of the experts that may be chosen; the others have the least number.
inline void keep_groups(const Routing& r, std::vector<float>& scores) {
    if (r.kept >= r.groups) return;
    const float least = -std::numeric_limits<float>::infinity();
    const size_t groups = static_cast<size_t>(r.groups), size = scores.size() / groups;
    std::vector<float> sums(groups);
    for (size_t g = 0; g < groups; g++) {
        float first = least, second = least;
        for (size_t i = g * size; i < (g + 1) * size; i++) {
            if (scores[i] > first)
                second = first, first = scores[i];
            else
                second = std::max(second, scores[i]);
        }
        sums[g] = size > 1 && !r.single ? first + second : first;
    }
    std::vector<char> kept(groups, 0);
    for (int k = 0; k < r.kept; k++) {
        size_t best = groups;
        for (size_t g = 0; g < groups; g++)
            if (!kept[g] && (best == groups || sums[g] > sums[best])) best = g;
        kept[best] = 1;
    }
    for (size_t g = 0; g < groups; g++)
        if (!kept[g]) std::fill(scores.begin() + g * size, scores.begin() + (g + 1) * size, least);
}

// A row's experts and their weights, the best first; of equal ones the first.
inline void choose_experts(const Routing& r, const float* logits, size_t experts, const float* bias, int* best,
                           float* weights) {
    const size_t chosen = static_cast<size_t>(r.chosen);
    const float peak = *std::max_element(logits, logits + experts);
    float total = 0.0f, sum = 0.0f;
    if (!r.sigmoid)
        for (size_t e = 0; e < experts; e++) total += std::exp(logits[e] - peak);
    // A softmax keeps the order of the logits, which are compared in its place unless something is added.
    std::vector<float> ranks(logits, logits + experts);
    if (r.sigmoid)
        for (float& each : ranks) each = 1.0f / (1.0f + std::exp(-each));
    else if (bias)
        for (float& each : ranks) each = std::exp(each - peak) / total;
    const std::vector<float> scores = ranks;
    if (bias)
        for (size_t e = 0; e < experts; e++) ranks[e] += bias[e];
    keep_groups(r, ranks);
    std::vector<char> used(experts, 0);
    for (size_t c = 0; c < chosen; c++) {
        size_t next = experts;
        for (size_t e = 0; e < experts; e++)
            if (!used[e] && (next == experts || ranks[e] > ranks[next])) next = e;
        used[next] = 1;
        best[c] = static_cast<int>(next);
        weights[c] = r.sigmoid ? scores[next] : std::exp(logits[next] - peak) / total;
        sum += weights[c];
    }
    if (r.normalise)
        for (size_t c = 0; c < chosen; c++) weights[c] /= sum + r.floor;
    if (r.scale != 1.0f)
        for (size_t c = 0; c < chosen; c++) weights[c] *= r.scale;
}

}  // namespace inflight
