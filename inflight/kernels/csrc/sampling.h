// Chooses tokens from logits, each row by itself. `Sampling` in inflight/contract/plan.py describes the processors and
// their order.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "select.h"
#include "types.h"

namespace inflight {

// How the next token of a row is chosen; the defaults change nothing.
struct Sampling {
    bool draw = false;
    double temperature = 1.0;
    int64_t top_k = 0;
    double top_p = 1.0, min_p = 0.0, typical_p = 1.0;
    double repetition = 1.0, frequency = 0.0, presence = 0.0;
    std::vector<std::pair<int64_t, float>> bias;
    uint64_t seed = 0;
    bool logprob = false;
    int64_t top = 0;
    // The share of the vocabulary that the token before makes green, and what is added to it; `key` times that token is
    // the seed.
    bool watermark = false;
    uint64_t key = 0;
    double gamma = 0.0;
    float delta = 0.0f;
};

// A row's state beside its logits.
struct Known {
    int64_t row;  // of the logits
    const Sampling* sampling;
    const int32_t* tokens;  // null if no processor needs them
    int64_t count, prompt;  // how many there are, and how many of them are the prompt
    // Bit i % 8 of byte i / 8 allows token i; tokens beyond the mask are forbidden. Null: all are allowed.
    const uint8_t* mask;
    int64_t mask_bytes;
};

struct Chosen {
    int64_t token = 0;
    float logprob = 0.0f;                        // after all processors; if it or `top` was asked for
    std::vector<std::pair<int32_t, float>> top;  // the most likely tokens, best first, and their log-probabilities
    bool sound = true;                           // false: logits were not numbers
};

// One thread's work on one row after the other.
class Chooser {
  public:
    explicit Chooser(const Kernels& kernels) : kernels_(kernels) {}

    // Memory for rows of n logits, so that `choose` does not fail.
    void reserve(int64_t n, bool counts, bool order);
    // Changes the logits.
    void choose(float* x, int64_t n, const Known& known, Chosen& chosen);
    float log_softmax_at(const float* x, int64_t n, int64_t token);

  private:
    // Processors that change single logits: processors.cpp.
    void edit(const Known& known);
    void watermark(const Sampling& sampling, int64_t before);
    void repetition(const Known& known, float penalty);
    void frequency(const Known& known, float frequency, float presence);
    void mask(const uint8_t* bits, int64_t bytes);

    // Processors that take tokens away.
    bool scan(float divider);
    void top_k(int64_t k);
    void top_p(double p);
    void min_p(double p);
    void typical_p(double p);
    float bar_of_most(int64_t k);
    float bar_below(double below) const;
    void list(float bar);
    void keep(Border border);
    void weigh();

    double total();
    std::pair<int64_t, float> highest() const;
    std::pair<int64_t, float> draw(double uniform);
    void top(int64_t k, Chosen& chosen);

    const Kernels& kernels_;
    Selector selector_;
    float* x_ = nullptr;
    int64_t n_ = 0;
    float highest_ = 0.0f;                // logit, from which probabilities are measured
    Aligned<float> scanned_;              // the highest of each kScan
    Aligned<double> masses_, surprises_;  // of each kMass, where nothing is listed
    double total_ = 0.0;                  // of the weights of what is left; 0: not known
    // What is left, in the order of the tokens, once a processor has taken tokens away.
    bool listed_ = false, weighed_ = false;
    int64_t count_ = 0;
    Aligned<int32_t> tokens_;
    Aligned<float> values_;
    Aligned<double> weights_;
    Aligned<uint32_t> keys_;
    std::vector<int32_t> counts_, order_;
};

class Sampler {
  public:
    Sampler(int threads, const std::string& isa);

    // Of rows of n logits, `stride` apart, which are changed; the results are aligned with `known`. A row's result does
    // not depend on the others, nor on the threads.
    void sample(float* logits, int64_t stride, int64_t n, const std::vector<Known>& known, Chosen* chosen);
    // log(softmax(row))[token] of each row.
    void log_softmax_at(const float* logits, int64_t rows, int64_t stride, int64_t n, const int64_t* tokens,
                        float* out);

  private:
    // Calls work(chooser, row) for every row.
    template <class Work>
    void each(int64_t rows, Work work);

    const Kernels* kernels_;
    std::shared_ptr<Pool> pool_;
    std::mutex mutex_;  // of the choosers
    std::vector<std::unique_ptr<Chooser>> choosers_;
};

}  // namespace inflight
