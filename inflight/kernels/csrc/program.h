// A decoder as a list of operations over numbered buffers. Python builds it once (inflight/kernels/program.py) and runs
// it with one call per step. All threads go through the list together; within an operation a thread takes the units of
// work of its own share first, then units of the others'.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "memory.h"
#include "pack.h"
#include "routing.h"
#include "store.h"
#include "types.h"

namespace inflight {

// A buffer has a row for each token; from kGather on, a row for each token whose logits are wanted.
enum class OpCode : int {
    kEmbed,
    kProduct,
    kRotate,
    kAttend,
    kNorm,
    kGather,
    kCap,
    kMixture,
    kGate,
    kAddRows,
    kRecur,
    kOutputGate,
    kScale,
    kAddTable,
    kGateBy,
    kXielu,
    kEndUnwanted,  // what follows writes no cache: tokens without wanted logits end here
    kHeads,        // products of heads: a part of `from` and of `to` for each
    kLatent        // the rotated parts of `from`'s heads go to `to`; what `into` holds of a token is stored
};

struct Operation {
    OpCode code;
    int from = -1, to = -1;     // buffers
    std::vector<int> products;  // kProduct: their outputs lie side by side; kHeads: one a head; kEmbed: the table
    int layer = -1;             // kRotate, kAttend; kAddRows: of `Step::added`; kRecur: the recurrent layer; kAddTable:
                                // the table
    int rope = -1;              // kRotate; -1: no rotation
    int norm = -1, second = -1;  // weights of norms: of the input, or of queries and keys; kScale: the one factor;
                                 // kXielu: the factors of squares and of exponentials
    int third = -1;              // kRotate: of values; kMixture: factors of the experts' weights; -1: none; kXielu: the
                                 // factor of all
    float eps = 0.0f;
    bool centered = false;
    bool layered = false;  // kNorm, kGather: the mean is taken off first
    bool rotated = false;  // kRotate: norms come behind the rotation
    float growth = 0.0f;   // kRotate: queries are multiplied by 1 + growth * ln(1 + ⌊position / period⌋)
    int64_t period = 0;
    Mode mode = Mode::kStore;            // kProduct (kGate: of one only), kNorm (kStore, kAdd)
    Activation act = Activation::kSilu;  // also of kGate: `to` = act(first half of `from`) * second half
    float scale = 1.0f;                  // of what is added; of an embedding; kCap: the divider
    float softcap = 0.0f;                // kCap
    float factor = 1.0f;                 // kAddTable: of the sum
    int64_t column =
        0;  // kOutputGate, kGateBy: of `from`, where what gates begins; kNorm: of both, where the part begins
    // kMixture: `from` holds the layer's input, `to` the router's logits; the result is added to `into`, or where that
    // is -1 to `from`; another buffer is zeroed first
    int into = -1;
    Routing routing;
    bool gated = true;  // the experts' first products are; else `act` is of all their outputs
    std::vector<int> gate_up, down;
};

struct Rope {
    std::vector<float> inverse,
        far_inverse;  // radians a position; of tokens that reach beyond `original`, where they differ
    float factor;
    int64_t original;
    double theta = 0, stretch = 0;  // base and factor of dynamic NTK, which holds beyond `original`; 0: none
    std::vector<int> axes = {};     // of each pair of components, see Step::places; empty: tokens have one position
};

struct Step {
    const int64_t* tokens;     // [T]
    const int64_t* positions;  // [T]
    const int64_t* slots;      // [T]
    const int64_t* lengths;    // [R] tokens of each row, sum T
    const int32_t* tables;     // [R, table_width]
    const int64_t* logits_at;  // [S], ascending
    int64_t count, rows, table_width, wanted;
    const int64_t* reach = nullptr;  // [T] length of the sequence by which a token is rotated; null: up to itself
    // Of images, null or 0 in a step without any.
    const int64_t* places = nullptr;  // [3, place_stride] positions by axis, by which a token is rotated
    int64_t place_stride = 0;
    const int64_t* until = nullptr;     // [T] position of the last key that a token sees; null: itself
    const int64_t* image_at = nullptr;  // [images] tokens whose embeddings are given, ascending
    int64_t images = 0;
    int64_t image_first = 0;              // number of the first of them in `image_rows` and `added`
    const float* image_rows = nullptr;    // [images, hidden] the embeddings
    const float* const* added = nullptr;  // [added_layers] of [images, hidden], see kAddRows
    int64_t added_layers = 0;
    // Of recurrent layers
    const int64_t* states = nullptr;   // [R] each row's slot
    const int64_t* save_at = nullptr;  // [saves] tokens behind which the row's state is copied, ascending
    const int64_t* save_to = nullptr;  // [saves] the slots
    int64_t saves = 0;
    const int64_t* adapters = nullptr;  // [R] number of each row's adapter, 0: none; null: no row wears one
};

// The rows of a batch, all of which decode: pointers to the batch's own arrays, which the step changes.
struct DecodeBatch {
    int32_t* tokens;  // [R, width], known tokens of each row
    int64_t width;
    const int32_t* tables;  // [R, table_width]
    int64_t table_width;
    int64_t* known;     // [R]
    int64_t* computed;  // [R], position of the token to compute
    int64_t count;
    const int64_t* shift = nullptr;     // [R] added to the position by which a token is rotated; null: nothing
    const int64_t* states = nullptr;    // [R] each row's slot, where there are recurrent layers
    const int64_t* adapters = nullptr;  // see Step
};

// What an adapter adds to one operation; without rows nothing.
struct LowRank {
    LowFirst first;
    std::vector<LowSecond> parts;
    int64_t panels = 0;  // of all parts
};

// An adapter whose factors' memory the caller keeps.
struct Adapter {
    std::vector<LowRank> of;  // by operation
};

// The caller's memory for a step's results.
struct Output {
    float* logits;  // [S, width of the last buffer]
    float* hidden;  // [S, width of hidden_buffer], or null
    int hidden_buffer;
    int64_t* best;  // [S], the first of each row's largest logits; -1 where some are not numbers
};

using Recurrent = std::variant<Delta, ShortConv, Mamba>;

// Measured of one operation since the last reset, for a roofline.
struct Cost {
    double seconds = 0, bytes = 0, operations = 0;
};

// A table whose rows tokens read, in memory that outlives the program: rows as a file has them, of floats or of blocks.
struct Table {
    const char* data;
    int64_t n, row_bytes;
    Source source;  // of floats
    Weights row;    // of one row; its format is kFloat where the table has floats
};

class Program : public Store {
  public:
    Program(int threads, const std::string& isa);
    ~Program();

    // Each returns the number by which operations name it.
    int add_rope(Rope rope);
    // `sinks`: the number of a norm that holds them; -1: none.
    int add_layer(Attention layer, int sinks = -1);
    // Recurrent layers. Arrays are norms' numbers, -1 where the layer has none: the convolution, decays, their bias,
    // the norm; the convolution, its bias; the convolution, its bias, decays, the steps' bias, D, the norm.
    int add_delta(Delta layer, const std::vector<int>& arrays);
    int add_short_conv(ShortConv layer, const std::vector<int>& arrays);
    int add_mamba(Mamba layer, const std::vector<int>& arrays);
    int add_buffer(int64_t width);
    int add_table(const Table& table);
    void add(Operation operation);

    // Makes zeroed keys and values of all layers in place of former ones; returns their bytes. A thread of its own maps
    // their first pages.
    int64_t make_caches(int64_t blocks, int64_t block_size, KvType type);

    // Bytes of all recurrent layers' states of one row. A row's state is that of zeros at its first token.
    int64_t state_bytes() const { return state_floats_ * 4; }
    // Makes slots for the states of rows, in place of former ones.
    void make_states(int64_t slots);
    // Copies a slot to another.
    void copy_state(int64_t from, int64_t to);

    // Copies for files, see pages.cpp. A thread may make them beside a run that does not touch the block or the slot.
    int64_t block_bytes() const;
    void read_block(int64_t block, char* to) const;
    void write_block(int64_t block, const char* from);
    void read_state(int64_t slot, char* to) const;
    void write_state(int64_t slot, const char* from);

    // Adds an adapter, after the last operation, in place of one with the same number. Throws std::invalid_argument if
    // it does not fit. `drop_adapter` tells whether there was one. Neither may be called during a run.
    void add_adapter(int64_t number, std::unique_ptr<Adapter> adapter);
    bool drop_adapter(int64_t number);

    // Runs the list. Throws std::out_of_range if the step does not fit the program.
    void run(const Step& step, Output output);
    // Runs the list for the newest token of each row, and counts it as computed; `append`: the most likely next tokens
    // become known.
    void decode(const DecodeBatch& batch, bool append, Output output);

    int64_t width(int buffer) const { return widths_.at(static_cast<size_t>(buffer)); }
    const std::vector<Operation>& operations() const { return operations_; }
    void measure(bool on);
    const std::vector<Cost>& costs() const { return costs_; }

  private:
    struct Slice;   // the tokens that go through the list at once
    struct Worker;  // one thread within a run
    struct ExpertInputs;
    struct ExpertPlan;  // of a mixture

    void check(const Step& step) const;
    void check_images(const Step& step) const;
    void check_states(const Step& step) const;
    void check_block(int64_t block) const;
    void check_adapters(const Step& step) const;
    void wear(const Step& step);
    static int64_t slice_end(const Step& step, int64_t first);
    void slice_of(const Step& step, int64_t first, int64_t last);
    void reserve(int64_t rows, int64_t logit_rows);
    bool tiled(size_t operation) const;
    int64_t most_tile_rows(const Weights& w) const { return kernels_->tile_rows(w); }
    int64_t head_rows(const Weights& w, int64_t rows) const;
    size_t input_of(const Operation& op, size_t i) const;
    double bytes_of(const Operation& op) const;
    double operations_of(const Operation& op) const;
    const float* layer_array(int number, int64_t size) const;
    template <class Layer>
    int add_state(Layer layer);
    int64_t state_floats(int layer) const;
    double state_operations(int layer) const;
    int64_t state_scratch(int64_t rows) const;

    std::unique_ptr<Arena> caches_;
    std::unique_ptr<Commit> commit_;  // of caches_
    std::vector<Recurrent> recurrent_;
    std::vector<Table> tables_;
    std::unique_ptr<Arena> state_memory_;
    float* states_ = nullptr;  // [slots][state_floats_]
    int64_t state_floats_ = 0, slots_ = 0;
    std::vector<Rope> ropes_;
    std::vector<Attention> layers_;
    std::vector<int64_t> widths_;
    std::vector<Aligned<float>> buffers_;
    std::vector<Operation> operations_;
    std::vector<char> tiled_;  // of each operation, see `tiled`
    std::vector<Cost> costs_;
    bool measured_ = false;

    std::unordered_map<int64_t, std::unique_ptr<Adapter>> adapters_;

    std::vector<int64_t> decoding_;  // tokens, positions, slots, lengths, numbers and places of rows that decode

    // Of one run
    std::unique_ptr<Slice> slice_;
    std::unique_ptr<ExpertPlan> experts_;
    std::vector<Aligned<float>> cos_sin_;  // by rope: [rows][cosines, sines]
    std::vector<std::unique_ptr<Worker>> workers_;
    Aligned<char> input_;  // of a product, shared by all threads
    Aligned<char> inner_;  // of a product whose input the product before has written in tiles
    Aligned<float> input_scales_;
    Aligned<int32_t> input_sums_;
    Aligned<float> partial_;     // attention's chunks
    Aligned<float> low_hidden_;  // [rows][low_stride_] of tokens that wear an adapter
    Aligned<float> low_wide_;    // panels of a gated product whose outputs an adapter changes
    int64_t low_stride_ = 0;
};

// Of bytes in a file: a word that tells whether they are those that were written.
uint64_t checksum(const char* data, int64_t bytes);

}  // namespace inflight
