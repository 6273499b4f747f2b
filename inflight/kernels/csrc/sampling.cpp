#include "sampling.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "program.h"

namespace inflight {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeastLogit = std::numeric_limits<float>::lowest();  // the least logit of a possible token
// Below this temperature a draw always takes the largest logit; a smaller divider would overflow.
constexpr double kColdest = 1e-5;

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

uint64_t mix(uint64_t value) {
    value += 0x9E3779B97F4A7C15u;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

// A number in [0, 1): two rounds of the splitmix64 finaliser over seed and position.
double uniform_of(uint64_t seed, int64_t position) {
    uint64_t mixed = mix(mix(seed) + static_cast<uint64_t>(position) * 0x9E3779B97F4A7C15u);
    return static_cast<double>(mixed >> 11) / 9007199254740992.0;
}

}  // namespace

void Chooser::reserve(int64_t n, bool counts, bool order) {
    scanned_.reserve(pieces(n, kScan));
    masses_.reserve(pieces(n, kMass));
    surprises_.reserve(pieces(n, kMass));
    tokens_.reserve(n);
    values_.reserve(n);
    weights_.reserve(std::max(n, kMass));
    keys_.reserve(n);
    selector_.reserve(n);
    if (counts && static_cast<int64_t>(counts_.size()) < n) counts_.resize(static_cast<size_t>(n));
    if (order && static_cast<int64_t>(order_.size()) < n) order_.resize(static_cast<size_t>(n));
}

void Chooser::choose(float* x, int64_t n, const Known& known, Chosen& chosen) {
    const Sampling& s = *known.sampling;
    x_ = x, n_ = n, count_ = 0, total_ = 0.0, listed_ = weighed_ = false;
    edit(known);
    chosen.sound = scan(static_cast<float>(std::max(s.temperature, kColdest)));
    if (chosen.sound && highest_ == kInfinity) {  // infinite logits share all of the probability
        for (int64_t i = 0; i < n_; i++) x_[i] = x_[i] == kInfinity ? 0.0f : -kInfinity;
        scan(1.0f);
    }
    bool scored = s.logprob || s.top;
    if (!chosen.sound || highest_ == -kInfinity) {  // no token is possible
        chosen.token = 0;
        chosen.logprob = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    // All of these filters but the last keep the most likely token.
    if (s.draw || scored || s.typical_p < 1.0) {
        if (s.top_k > 0) top_k(s.top_k);
        if (s.top_p < 1.0) top_p(s.top_p);
        if (s.min_p > 0.0) min_p(s.min_p);
        if (s.typical_p < 1.0) typical_p(s.typical_p);
    }
    auto [token, value] = s.draw ? draw(uniform_of(s.seed, known.count)) : highest();
    chosen.token = token;
    if (scored) chosen.logprob = static_cast<float>(static_cast<double>(value) - highest_ - std::log(total()));
    if (s.top) top(s.top, chosen);
}

float Chooser::log_softmax_at(const float* x, int64_t n, int64_t token) {
    x_ = const_cast<float*>(x), n_ = n, total_ = 0.0, listed_ = weighed_ = false;  // a divider of 1 changes nothing
    if (!scan(1.0f) || token < 0 || token >= n) return std::numeric_limits<float>::quiet_NaN();
    if (highest_ == kInfinity || highest_ == -kInfinity) return std::numeric_limits<float>::quiet_NaN();
    return static_cast<float>(static_cast<double>(x[token]) - highest_ - std::log(total()));
}

// Divides all logits and finds the largest. False: some logits are not numbers.
bool Chooser::scan(float divider) {
    bool sound = kernels_.scan(x_, n_, divider, scanned_.get());
    highest_ = *std::max_element(scanned_.get(), scanned_.get() + pieces(n_, kScan));
    return sound;
}

// A lower bound of the k largest logits; more than k logits may reach it.
float Chooser::bar_of_most(int64_t k) {
    int64_t blocks = pieces(n_, kScan);
    if (k > blocks) return kLeastLogit;
    for (int64_t i = 0; i < blocks; i++) keys_.get()[i] = key_of(scanned_.get()[i]);
    float found = value_of(selector_.border(keys_.get(), nullptr, blocks, static_cast<double>(k)).key);
    return std::max(found, kLeastLogit);
}

// The logit of a token with e ** `below` times the probability of the most likely token, or a little less.
float Chooser::bar_below(double below) const {
    float found = std::nextafter(static_cast<float>(static_cast<double>(highest_) + below - 1e-4), -kInfinity);
    return std::max(found, kLeastLogit);
}

void Chooser::list(float bar) {
    count_ = kernels_.gather(x_, n_, scanned_.get(), bar, tokens_.get(), values_.get());
    listed_ = true;
    weighed_ = false;
    total_ = 0.0;
}

void Chooser::keep(Border border) {
    int64_t left = 0, ties = border.ties;
    for (int64_t i = 0; i < count_; i++) {
        uint32_t key = keys_.get()[i];
        if (key < border.key || (key == border.key && ties-- <= 0)) continue;
        tokens_.get()[left] = tokens_.get()[i];
        values_.get()[left] = values_.get()[i];
        if (weighed_) weights_.get()[left] = weights_.get()[i];
        left++;
    }
    count_ = left;
    total_ = 0.0;
}

void Chooser::top_k(int64_t k) {
    if (!listed_ && k >= n_) return;
    if (!listed_) list(bar_of_most(k));
    if (k >= count_) return;
    for (int64_t i = 0; i < count_; i++) keys_.get()[i] = key_of(values_.get()[i]);
    Border border = selector_.border(keys_.get(), nullptr, count_, static_cast<double>(k));
    keep({border.key, count_});  // ties with the last one stay
}

// Keeps the smallest set of most likely tokens with probability p (Holtzman et al., 2019); of equal tokens the first.
void Chooser::top_p(double p) {
    double all = total();
    // Tokens below this probability have less than 1 - p together, so they lie outside the set.
    if (!listed_) list(bar_below(std::log(all * (1.0 - p) / static_cast<double>(n_))));
    weigh();
    for (int64_t i = 0; i < count_; i++) keys_.get()[i] = key_of(values_.get()[i]);
    keep(selector_.border(keys_.get(), weights_.get(), count_, p * all));
}

// Keeps tokens that are at least p times as likely as the most likely one (Nguyen et al., 2024).
void Chooser::min_p(double p) {
    float least = std::max(highest_ + std::log(static_cast<float>(p)), kLeastLogit);
    if (!listed_) return list(least);
    for (int64_t i = 0; i < count_; i++) keys_.get()[i] = key_of(values_.get()[i]);
    keep({key_of(least), count_});
}

// Keeps the smallest set of tokens with the most typical surprise and probability p (Meister et al., 2022); of equal
// tokens the first.
void Chooser::typical_p(double p) {
    double all = 0.0, surprise = 0.0;  // of the weights, and of those times the distance from the highest logit
    if (listed_) {
        weigh();
        for (int64_t i = 0; i < count_; i++) {
            all += weights_.get()[i];
            if (weights_.get()[i] > 0.0)
                surprise += weights_.get()[i] * (static_cast<double>(highest_) - values_.get()[i]);
        }
    } else {
        kernels_.masses(x_, n_, highest_, masses_.get(), surprises_.get());
        for (int64_t i = 0; i < pieces(n_, kMass); i++) {
            all += masses_.get()[i];
            surprise += surprises_.get()[i];
        }
    }
    double normal = std::log(all) + static_cast<double>(highest_), entropy = std::log(all) + surprise / all;
    if (!listed_) {
        // Beyond twice the mean surprise tokens are ordered by falling probability, and those below this probability
        // have less than 1 - p together, so they lie outside the set.
        double most = std::max(2.0 * entropy, std::log(static_cast<double>(n_) / (1.0 - p)));
        list(bar_below(std::log(all) - most));
        weigh();
    }
    for (int64_t i = 0; i < count_; i++) {
        double each = normal - values_.get()[i];
        keys_.get()[i] = ~key_of(static_cast<float>(std::fabs(each - entropy)));
    }
    keep(selector_.border(keys_.get(), weights_.get(), count_, p * all));
}

void Chooser::weigh() {
    if (weighed_) return;
    kernels_.weigh(values_.get(), count_, highest_, weights_.get());
    weighed_ = true;
}

// The sum of the remaining tokens' weights.
double Chooser::total() {
    if (total_ > 0.0) return total_;
    if (listed_) {
        weigh();
        for (int64_t i = 0; i < count_; i++) total_ += weights_.get()[i];
    } else {
        kernels_.masses(x_, n_, highest_, masses_.get(), nullptr);
        for (int64_t i = 0; i < pieces(n_, kMass); i++) total_ += masses_.get()[i];
    }
    return total_;
}

// The first of the most likely tokens, and its logit.
std::pair<int64_t, float> Chooser::highest() const {
    if (listed_) {
        const float* found = std::max_element(values_.get(), values_.get() + count_);
        return {tokens_.get()[found - values_.get()], *found};
    }
    int64_t at = std::find(scanned_.get(), scanned_.get() + pieces(n_, kScan), highest_) - scanned_.get();
    return {std::find(x_ + at * kScan, x_ + n_, highest_) - x_, highest_};
}

// Inverse of the cumulative distribution over the tokens in their order; one of probability 0 is never drawn.
std::pair<int64_t, float> Chooser::draw(double uniform) {
    double wanted = uniform * total(), sum = 0.0;
    const double* weights = weights_.get();
    int64_t first = 0, count = count_;
    if (!listed_) {
        int64_t block = 0, blocks = pieces(n_, kMass), last = 0;
        for (; block < blocks; block++) {
            if (masses_.get()[block] > 0.0) last = block;
            if (sum + masses_.get()[block] > wanted) break;
            sum += masses_.get()[block];
        }
        if (block == blocks) sum = -1.0;  // rounding: the last token that is possible
        first = last * kMass;
        count = std::min(n_ - first, kMass);
        kernels_.weigh(x_ + first, count, highest_, weights_.get());
        if (sum < 0.0) wanted = kInfinity;
    }
    int64_t last = 0;
    for (int64_t i = 0; i < count; i++) {
        if (weights[i] <= 0.0) continue;
        last = i;
        sum += weights[i];
        if (sum > wanted) break;
    }
    return listed_ ? std::make_pair(static_cast<int64_t>(tokens_.get()[last]), values_.get()[last])
                   : std::make_pair(first + last, x_[first + last]);
}

// The k most likely tokens, ties with the last one included.
void Chooser::top(int64_t k, Chosen& chosen) {
    double normal = static_cast<double>(highest_) + std::log(total());
    if (!listed_) list(bar_of_most(std::min(k, n_)));
    top_k(k);
    std::vector<int64_t> order(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; i++) order[static_cast<size_t>(i)] = i;
    const float* values = values_.get();
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return values[a] > values[b] || (values[a] == values[b] && a < b); });
    for (int64_t i : order)
        chosen.top.emplace_back(tokens_.get()[i], static_cast<float>(static_cast<double>(values[i]) - normal));
}

Sampler::Sampler(int threads, const std::string& isa)
    : kernels_(choose(isa)), pool_(Pool::shared(std::max(1, threads))) {
    for (int thread = 0; thread < pool_->size(); thread++) choosers_.push_back(std::make_unique<Chooser>(*kernels_));
}

template <class Work>
void Sampler::each(int64_t rows, Work work) {
    if (rows < 2 || pool_->size() < 2) {
        for (int64_t row = 0; row < rows; row++) work(*choosers_[0], row);
        return;
    }
    std::atomic<int64_t> next{0};
    pool_->run([&](int thread) {
        for (int64_t row; (row = next.fetch_add(1)) < rows;) work(*choosers_[static_cast<size_t>(thread)], row);
    });
}

void Sampler::sample(float* logits, int64_t stride, int64_t n, const std::vector<Known>& known, Chosen* chosen) {
    std::lock_guard<std::mutex> lock(mutex_);
    bool counts = false, order = false;
    for (const Known& each : known) {
        const Sampling& s = *each.sampling;
        counts |= s.repetition != 1.0 || s.frequency != 0.0 || s.presence != 0.0;
        order |= s.watermark;
    }
    for (auto& chooser : choosers_) chooser->reserve(n, counts, order);
    each(static_cast<int64_t>(known.size()), [&](Chooser& chooser, int64_t row) {
        const Known& each = known[static_cast<size_t>(row)];
        chooser.choose(logits + each.row * stride, n, each, chosen[row]);
    });
}

void Sampler::log_softmax_at(const float* logits, int64_t rows, int64_t stride, int64_t n, const int64_t* tokens,
                             float* out) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& chooser : choosers_) chooser->reserve(n, false, false);
    each(rows, [&](Chooser& chooser, int64_t row) {
        out[row] = chooser.log_softmax_at(logits + row * stride, n, tokens[row]);
    });
}

}  // namespace inflight
