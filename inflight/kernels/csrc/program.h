// A decoder as a list of operations over numbered buffers, built once by Python (inflight/kernels/program.py) and run by
// one call a step. All threads go through the list together; within an operation they take units of work from their own
// share first, then from the others'.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "types.h"

namespace inflight {

// Rows of a buffer are tokens; from kGather on, those whose logits are wanted.
enum class Code : int { kEmbed, kProduct, kRotate, kAttend, kNorm, kGather, kCap, kMixture, kGate };

struct Operation {
    Code code;
    int from = -1, to = -1;    // buffers
    std::vector<int> products; // kProduct: their outputs lie side by side; kEmbed: the table
    int layer = -1;            // kRotate, kAttend
    int rope = -1;             // kRotate: -1 turns nothing
    int norm = -1, second = -1;  // weights of norms: of the input, or of queries and keys
    float eps = 0.0f;
    bool centered = false;
    Mode mode = Mode::kStore;  // kProduct (kGate: of one only), kNorm (kStore, kAdd)
    Act act = Act::kSilu;      // also of kGate: `to` = act(first half of `from`) * second half
    float scale = 1.0f;        // of what is added; of an embedding; kCap: the divider
    float softcap = 0.0f;      // kCap
    // kMixture: `from` holds the layer's input and takes the result, `to` the router's logits
    int chosen = 0;
    bool normalise = false;
    std::vector<int> gate_up, down;
};

struct Rope {
    std::vector<float> inverse, far_inverse;  // radians a position; of tokens that reach beyond `original`, where they differ
    float factor;
    int64_t original;
    double theta = 0, stretch = 0;  // base and factor of dynamic NTK, which holds beyond `original`; 0: none
};

struct Step {
    const int64_t* tokens;     // [T]
    const int64_t* positions;  // [T]
    const int64_t* slots;      // [T]
    const int64_t* lengths;    // [R] tokens of each row, sum T
    const int32_t* tables;     // [R, table_width]
    const int64_t* logits_at;  // [S], ascending
    int64_t count, rows, table_width, wanted;
    const int64_t* reach = nullptr;  // [T] length of the sequence that a token turns by; null: up to itself
};

// Rows of a batch that decode, in its own arrays.
struct Rows {
    int32_t* tokens;        // [R, width], known tokens of each row
    int64_t width;
    const int32_t* tables;  // [R, table_width]
    int64_t table_width;
    int64_t* known;         // [R]
    int64_t* computed;      // [R], places of the tokens to compute
    int64_t count;
};

// Where a step's results go.
struct Output {
    float* logits;      // [S, width of the last buffer]
    float* hidden;      // [S, width of hidden_buffer], or null
    int hidden_buffer;
    int64_t* best;      // [S], the first of each row's largest logits; -1 where some are not numbers
};

// What an operation cost since the last reset: for a roofline.
struct Cost {
    double seconds = 0, bytes = 0, operations = 0;
};

class Program {
  public:
    Program(int threads, const std::string& isa);
    ~Program();

    // Each returns the number by which operations name it.
    int add_weights(Weights w, const float* bias);
    int add_norm(const float* values, int64_t n);
    int add_rope(Rope rope);
    int add_layer(const Attention& layer);
    int add_buffer(int64_t width);
    void add(Operation operation);

    // Memory for packed weights and scales that lives as long as the program; aligned to 64.
    char* allocate(int64_t bytes) { return arena_.take(bytes); }
    // Zeroed keys and values of all layers, in place of former ones; returns their bytes. A thread goes on to ask for their
    // first pages.
    int64_t make_caches(int64_t blocks, int64_t block_size, KvType type);

    // Runs the list. Throws std::out_of_range where the step does not fit the program.
    void run(const Step& step, Output output);
    // Runs it for the newest token of each row, which is computed then; `append`: the best ones become known.
    void decode(const Rows& rows, bool append, Output output);

    const char* isa() const { return kernels_->name; }
    Pool& pool() { return *pool_; }
    const Kernels& kernels() const { return *kernels_; }
    const Weights& weights(int product) const { return weights_.at(static_cast<size_t>(product)); }
    int64_t bytes() const { return bytes_; }
    int64_t width(int buffer) const { return widths_.at(static_cast<size_t>(buffer)); }
    const std::vector<Operation>& operations() const { return operations_; }
    void measure(bool on);
    const std::vector<Cost>& costs() const { return costs_; }

  private:
    struct Slice;   // the tokens that go through the list at once
    struct Worker;  // one thread within a run
    struct Routed;  // a mixture's plan

    void check(const Step& step) const;
    void slice_of(const Step& step, int64_t first, int64_t last);
    void reserve(int64_t rows, int64_t logit_rows);
    bool tiled(size_t operation) const;
    int64_t most_tile_rows(const Weights& w) const { return kernels_->tile_rows(w); }
    size_t input_of(const Operation& op, size_t i) const;
    double bytes_of(const Operation& op) const;
    double operations_of(const Operation& op) const;

    std::shared_ptr<Pool> pool_;
    const Kernels* kernels_;
    Arena arena_;
    std::unique_ptr<Arena> caches_;
    std::unique_ptr<Commit> commit_;  // of caches_
    std::vector<Weights> weights_;
    std::vector<std::vector<float>> norms_;
    std::vector<Rope> ropes_;
    std::vector<Attention> layers_;
    std::vector<int64_t> widths_;
    std::vector<Aligned<float>> buffers_;
    std::vector<Operation> operations_;
    std::vector<char> tiled_;  // of each operation, see `tiled`
    std::vector<Cost> costs_;
    bool measured_ = false;
    int64_t bytes_ = 0;

    std::vector<int64_t> decoding_;  // tokens, positions, slots, lengths and numbers of rows that decode

    // Of one run
    std::unique_ptr<Slice> slice_;
    std::unique_ptr<Routed> routed_;
    std::vector<Aligned<float>> turns_;  // by rope: [rows][cosines, sines]
    std::vector<std::unique_ptr<Worker>> workers_;
    Aligned<char> input_;                // of a product, shared by all threads
    Aligned<char> inner_;                // of a product whose input the one before has written as it reads it
    Aligned<float> input_scales_;
    Aligned<int32_t> input_sums_;
    Aligned<float> partial_;             // attention's chunks
};

// The best set of this machine, or the one that is named; "" is the best. Throws std::invalid_argument.
const Kernels* choose(const std::string& name);
std::vector<std::string> available();

}  // namespace inflight
