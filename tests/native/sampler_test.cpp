// Sampling of rows of logits against plain loops that sort.
#include <algorithm>
#include <numeric>

#include "sampling.h"
#include "tests.h"

namespace inflight::testing {
namespace {

constexpr double kNearBorder = 2e-6;  // of a share of probability: sums of other orders may end one token apart

struct Row {
    Sampling sampling;
    std::vector<float> logits;
    Exact<int32_t> tokens;
    int64_t prompt = 0;
    Exact<uint8_t> mask;
};

uint64_t mixed(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The logits after the processors that change single ones.
std::vector<float> edited(const Row& row) {
    std::vector<float> x = row.logits;
    const Sampling& s = row.sampling;
    std::vector<int> seen(x.size()), written(x.size());
    for (int64_t i = 0; i < row.tokens.size(); i++) {
        size_t token = static_cast<size_t>(row.tokens[i]);
        seen[token] = 1;
        written[token] += i >= row.prompt;
    }
    for (size_t i = 0; i < x.size(); i++) {
        float penalty = static_cast<float>(s.repetition);
        if (seen[i] && s.repetition != 1.0) x[i] = x[i] < 0 ? x[i] * penalty : x[i] / penalty;
        if (written[i])
            x[i] -= static_cast<float>(s.frequency) * static_cast<float>(written[i]) + static_cast<float>(s.presence);
    }
    for (const auto& [token, value] : s.bias) x[static_cast<size_t>(token)] += value;
    for (int64_t i = 0; i < static_cast<int64_t>(x.size()) && row.mask.size(); i++)
        if (i / 8 >= row.mask.size() || !(row.mask[i / 8] >> i % 8 & 1)) x[static_cast<size_t>(i)] = -INFINITY;
    for (float& each : x) each /= static_cast<float>(s.temperature);
    return x;
}

// What is left of `tokens`, best first by `order`: the fewest with so much of the mass, in the tokens' own order.
std::vector<int64_t> fewest(std::vector<int64_t> tokens, const std::vector<double>& order,
                            const std::vector<double>& mass, double share) {
    double all = 0.0, before = 0.0;
    for (int64_t token : tokens) all += mass[static_cast<size_t>(token)];
    std::stable_sort(tokens.begin(), tokens.end(), [&](int64_t a, int64_t b) {
        return static_cast<float>(order[static_cast<size_t>(a)]) > static_cast<float>(order[static_cast<size_t>(b)]);
    });
    size_t taken = 0;
    while (taken < tokens.size() && (!taken || before < share * all))
        before += mass[static_cast<size_t>(tokens[taken++])];
    tokens.resize(taken);
    std::sort(tokens.begin(), tokens.end());
    return tokens;
}

// What a row may give, its shares of probability times `nearly`.
Chosen expected(const Row& row, double nearly) {
    const Sampling& s = row.sampling;
    std::vector<float> x = edited(row);
    double highest = *std::max_element(x.begin(), x.end());
    std::vector<double> values(x.begin(), x.end()), mass;
    for (double value : values) mass.push_back(std::exp(value - highest));
    std::vector<int64_t> left;
    for (size_t i = 0; i < x.size(); i++)
        if (x[i] > -INFINITY) left.push_back(static_cast<int64_t>(i));
    auto value = [&](int64_t token) { return values[static_cast<size_t>(token)]; };
    auto keep_from = [&](double bar) {
        left.erase(std::remove_if(left.begin(), left.end(), [&](int64_t token) { return value(token) < bar; }),
                   left.end());
    };
    auto most = [&](int64_t k) {  // with those that are as likely as the last one
        std::vector<double> sorted;
        for (int64_t token : left) sorted.push_back(value(token));
        std::sort(sorted.rbegin(), sorted.rend());
        return sorted[static_cast<size_t>(std::min<int64_t>(k, static_cast<int64_t>(sorted.size())) - 1)];
    };
    if (s.top_k > 0) keep_from(most(s.top_k));
    if (s.top_p < 1.0) left = fewest(left, values, mass, s.top_p * nearly);
    if (s.min_p > 0.0) keep_from(static_cast<float>(highest) + std::log(static_cast<float>(s.min_p)));
    auto sum = [&] {
        double all = 0.0;
        for (int64_t token : left) all += mass[static_cast<size_t>(token)];
        return all;
    };
    if (s.typical_p < 1.0) {
        double all = sum(), entropy = std::log(all);
        for (int64_t token : left) entropy += mass[static_cast<size_t>(token)] * (highest - value(token)) / all;
        std::vector<double> typical;
        for (double each : values) typical.push_back(-std::fabs(std::log(all) + highest - each - entropy));
        left = fewest(left, typical, mass, s.typical_p * nearly);
    }
    Chosen out;
    uint64_t bits = mixed(mixed(s.seed) + static_cast<uint64_t>(row.tokens.size()) * 0x9E3779B97F4A7C15u);
    double wanted = static_cast<double>(bits >> 11) / 9007199254740992.0 * sum(), passed = 0.0;
    out.token = left.back();
    for (size_t i = left.size(); i-- > 0 && !s.draw;)
        if (value(left[i]) >= value(out.token)) out.token = left[i];
    for (int64_t token : left)
        if (s.draw && (passed += mass[static_cast<size_t>(token)]) > wanted) {
            out.token = token;
            break;
        }
    double normal = highest + std::log(sum());
    out.logprob = static_cast<float>(value(out.token) - normal);
    if (s.top) {
        keep_from(most(s.top));
        std::stable_sort(left.begin(), left.end(), [&](int64_t a, int64_t b) { return value(a) > value(b); });
        for (int64_t token : left)
            out.top.emplace_back(static_cast<int32_t>(token), static_cast<float>(value(token) - normal));
    }
    return out;
}

bool alike(const Chosen& a, const Chosen& b, const Sampling& s) {
    auto near = [](float x, float y) { return std::fabs(x - y) <= 1e-5f + 1e-6f * std::fabs(y); };
    bool same =
        a.token == b.token && a.top.size() == b.top.size() && (!(s.logprob || s.top) || near(a.logprob, b.logprob));
    for (size_t i = 0; same && i < a.top.size(); i++)
        same = a.top[i].first == b.top[i].first && near(a.top[i].second, b.top[i].second);
    return same;
}

Row random_row(Random& random, int64_t n) {
    Row row;
    Sampling& s = row.sampling;
    row.logits = random.values(n, random.pick({2.5f, 2.5f, 30.0f, 0.0f}));
    if (random.maybe())
        for (float& each : row.logits) each = std::nearbyint(each);  // ties
    for (int64_t i = random.between(0, 3); i > 0; i--)
        row.logits[static_cast<size_t>(random.between(0, n - 1))] = -INFINITY;
    row.logits[static_cast<size_t>(random.between(0, n - 1))] = 1.0f;
    row.tokens = Exact<int32_t>(random.between(1, 30));
    for (int64_t i = 0; i < row.tokens.size(); i++) row.tokens[i] = static_cast<int32_t>(random.between(0, n - 1));
    row.prompt = random.between(0, row.tokens.size());
    s.draw = random.maybe();
    s.seed = random.bits();
    s.temperature = random.pick({1.0, 0.5, 1.7});
    if (random.maybe()) s.top_k = random.between(1, n + 3);
    if (random.maybe()) s.top_p = random.pick({0.1, 0.5, 0.95});
    if (random.maybe()) s.min_p = random.pick({0.01, 0.3});
    if (random.maybe()) s.typical_p = random.pick({0.2, 0.9});
    if (random.maybe()) s.repetition = random.pick({0.8, 1.3});
    if (random.maybe()) s.frequency = 0.4, s.presence = -0.2;
    if (random.maybe()) s.bias = {{random.between(0, n - 1), 5.0f}, {random.between(0, n - 1), -100.0f}};
    s.logprob = random.maybe();
    if (random.maybe()) s.top = random.between(1, n + 2);
    if (random.between(0, 3) == 0) {
        row.mask = Exact<uint8_t>(random.between(1, (n + 7) / 8), 0);
        for (int64_t i = 0; i < row.mask.size(); i++)
            row.mask[i] = static_cast<uint8_t>(random.pick<int64_t>({0, 255, random.between(0, 255)}));
        row.mask[0] |= 1;
        row.logits[0] = 0.5f;
    }
    return row;
}

std::vector<Chosen> sampled(Sampler& sampler, const std::vector<const Row*>& rows, int64_t n, int64_t stride) {
    int64_t count = static_cast<int64_t>(rows.size());
    Exact<float> logits((count - 1) * stride + n, NAN);
    std::vector<Known> known;
    for (int64_t i = 0; i < count; i++) {
        const Row& row = *rows[static_cast<size_t>(i)];
        std::copy(row.logits.begin(), row.logits.end(), logits.get() + i * stride);
        known.push_back({i, &row.sampling, row.tokens.get(), row.tokens.size(), row.prompt,
                         row.mask.size() ? row.mask.get() : nullptr, row.mask.size()});
    }
    std::vector<Chosen> chosen(rows.size());
    sampler.sample(logits.get(), stride, n, known, chosen.data());
    return chosen;
}

bool same(const Chosen& a, const Chosen& b) {
    bool top = a.top.size() == b.top.size();
    for (size_t i = 0; top && i < a.top.size(); i++)
        top = a.top[i].first == b.top[i].first && same_bits(&a.top[i].second, &b.top[i].second, 1);
    return top && a.token == b.token && a.sound == b.sound && same_bits(&a.logprob, &b.logprob, 1);
}

void crowd(Sampler& one, Sampler& many, Random& random) {
    int64_t n = random.pick<int64_t>({1, 15, 16, 17, 64, 65, 257, random.between(1, 3000)}),
            stride = n + random.between(0, 3);
    std::vector<Row> rows;
    for (int64_t count = random.between(1, 9); count > 0; count--) rows.push_back(random_row(random, n));
    Row& last = rows.back();
    bool broken = random.between(0, 3) == 0, watermarked = !broken && random.between(0, 3) == 0;
    if (broken)
        last.logits[static_cast<size_t>(random.between(0, n - 1))] = NAN, last.sampling.bias.clear(), last.mask = {};
    if (watermarked)
        last.sampling.watermark = true, last.sampling.key = 15485863, last.sampling.gamma = 0.5,
        last.sampling.delta = 2.0f;
    std::vector<const Row*> all;
    for (const Row& row : rows) all.push_back(&row);
    std::vector<Chosen> chosen = sampled(many, all, n, stride);
    for (size_t i = 0; i < rows.size(); i++) {
        CHECK(same(sampled(one, {all[i]}, n, n)[0], chosen[i]), "row ", i, " of ", rows.size(),
              " alone is another, of ", n);
        bool is_last = i + 1 == rows.size();
        CHECK(chosen[i].sound == !(is_last && broken), "row ", i, " of ", n, " and its numbers");
        if (is_last && (broken || watermarked)) continue;
        bool found = false;
        for (double nearly : {1.0, 1.0 - kNearBorder, 1.0 + kNearBorder})
            found |= alike(chosen[i], expected(rows[i], nearly), rows[i].sampling);
        CHECK(found, "row ", i, " of ", n, ": token ", chosen[i].token, ", not ", expected(rows[i], 1.0).token);
        float at = 0.0f;
        std::vector<float> exact = edited(rows[i]);
        one.log_softmax_at(exact.data(), 1, n, n, &chosen[i].token, &at);
        double total = 0.0, highest = *std::max_element(exact.begin(), exact.end());
        for (float each : exact) total += std::exp(each - highest);
        double want = exact[static_cast<size_t>(chosen[i].token)] - highest - std::log(total);
        CHECK_NEAR(at, want, 1e-5 + 1e-6 * std::fabs(want), "log-probability of token ", chosen[i].token, " of ", n);
    }
}

}  // namespace

void samplers(const Kernels& kernels, Random& random) {
    Sampler one(1, kernels.name), many(3, kernels.name);
    for (int repeat = 0; repeat < 60; repeat++) crowd(one, many, random);
}

}  // namespace inflight::testing
