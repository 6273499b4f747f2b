// An encoder of images as a list of operations over numbered buffers. Python builds it once (inflight/kernels/tower.py)
// and runs it with one call per tile of an image. Unlike a Program it has no tokens and keeps no cache: every row of
// its input takes part in one run, and attention goes both ways within parts of the rows.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "store.h"
#include "types.h"

namespace inflight {

enum class TowerCode : int { kInput, kProduct, kNorm, kRotate, kAttend, kGather, kAverage, kAdjust, kGate };

// A LayerNorm, or without `bias` an RMSNorm; numbers of weights. -1: none.
struct TowerNorm {
    int weight = -1, bias = -1;
    float eps = 0.0f;
};

struct TowerOperation {
    TowerCode code;
    int from = -1, to = -1;     // buffers
    std::vector<int> products;  // kProduct: of one format; their outputs lie side by side
    Mode mode = Mode::kStore;
    float scale = 1.0f;                  // of what is added
    TowerNorm norm;                      // of the input's rows
    Activation act = Activation::kSilu;  // kGate, kActivate
    int64_t heads = 0;                   // kRotate, kAttend: `from` has their queries, keys and values side by side
    int64_t kv_heads = 0;                // kRotate, kAttend: of keys and values; 0: `heads`
    int key_norm = -1;                   // kRotate: an RMSNorm of each head of keys; `norm` is that of queries
    int value_norm = -1;                 // kRotate: one of each head of values
    bool sliced = false;                 // kProduct: each product reads columns of its own, as many as it has inputs,
    int64_t column = 0;                  // from here on; kAdjust: the first column of `to`
    int64_t from_column = 0;             // kAdjust: that of `from`
    int64_t columns = 0;                 // kAdjust: how many
    float low = 0.0f, high = 0.0f;       // kAdjust: limits; `norm` has what is multiplied and added before
    int64_t window = 0;                  // kAttend: rows before and behind that a row sees; 0: its whole part
    // kAttend: what is added to scores by the distance of query and key, of which `reach` - 1 is the largest.
    int64_t reach = 0;
    int relative = -1;               // a weight [heads][2 * reach + 16]: by key - query + reach - 1, divided by `scale`
    int by_query = -1, by_key = -1;  // or buffers [rows, heads * places]: of the query's row and of the key's,
    std::vector<int32_t> places;     // in the column that this has at query - key + reach - 1; [2 * reach - 1]
    int64_t parts = 0;               // kGather, kAverage: columns of the table
    int number = -1;  // of the run's arrays (kInput, kRotate), partitions (kAttend) or tables (kGather, kAverage)

    int64_t key_heads() const { return kv_heads ? kv_heads : heads; }
};

// What a run reads.
struct TowerRun {
    std::vector<int64_t> rows;                     // of each group of buffers
    std::vector<const float*> arrays;              // kInput: [rows, width]; kRotate: [rows, cosines and sines]
    std::vector<std::vector<int64_t>> partitions;  // lengths of the parts whose rows see each other
    std::vector<const int64_t*> tables;            // [rows of `to`, columns]: rows of `from`
    std::vector<float*> results;                   // of each buffer that is an output, [rows, width]
};

class Tower : public Store {
  public:
    // `half`: keys, values and queries are rounded to bfloat16, but for short texts.
    Tower(int threads, const std::string& isa, bool half);
    ~Tower();

    // `group`: which number of rows the buffer has.
    int add_buffer(int64_t width, int group);
    void add(TowerOperation operation);
    void add_output(int buffer) { outputs_.push_back(buffer); }

    // Carries out the list. Python has checked the sizes.
    void run(const TowerRun& run);

    // Whether its float32 products are computed from bfloat16 parts.
    bool splits() const { return splits_ && kernels_->splits; }

    // From now on runs take the time of each operation.
    void measure() { seconds_.assign(operations_.size(), 0.0); }
    // Processor seconds of the calling thread in each operation of the last run.
    const std::vector<double>& seconds() const { return seconds_; }

  private:
    struct Thread;  // one thread within a run
    // Of attention: queries [first, first + count) of the part that begins at row `begin` and in slot `place`.
    struct Task {
        int64_t begin, place, head, first, count;
    };
    struct Buffer {
        int64_t width;
        int group;
        Aligned<float> data;
    };
    // Of one stage of a run: units taken of each thread's share, and behind those counters the units that are done.
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };
    // A partition of the rows: where their keys lie, and what of attention is one unit of work.
    struct Parts {
        // [rows] place in the cache; position in the row's part, and the last one of that part
        std::vector<int64_t> slots, positions, lasts;
        std::vector<Task> tasks;
    };

    void reserve(const TowerRun& run);
    void divide(const std::vector<int64_t>& lengths, int64_t heads, Parts& parts) const;
    Attention attention_of(const TowerOperation& op) const;
    bool tiled(size_t operation) const;
    // Whether a part of so many rows is a WholeText: no key is stored then.
    bool whole(const TowerOperation& op, int64_t length) const;

    const bool half_;
    std::vector<Buffer> buffers_;
    std::vector<TowerOperation> operations_;
    std::vector<int> outputs_;
    std::vector<char> tiled_;      // whether each operation writes `inner_` instead of its buffer
    std::vector<double> seconds_;  // of each operation; empty: nobody asks
    std::vector<std::unique_ptr<Thread>> crew_;

    // Of one run
    const TowerRun* run_ = nullptr;
    std::vector<Parts> parts_;
    std::unique_ptr<Counter[]> counters_;  // [stages][threads + 1]
    size_t counters_size_ = 0;
    std::vector<int32_t> blocks_;  // 0, 1, 2, …: a table of the cache's blocks
    Aligned<char> keys_, values_;  // of one layer at a time
    Aligned<char> input_;          // of a product
    Aligned<char> inner_;          // of the next product, written by the one in front of it
    Aligned<float> input_scales_;
    Aligned<int32_t> input_sums_;
};

}  // namespace inflight
