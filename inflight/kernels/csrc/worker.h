// The private half of Program: the plan of a run, which program.cpp makes, and the threads that carry it out
// (worker.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"
#include "share.h"

namespace inflight {

constexpr int64_t kPieceTokens = 12;  // the fewest tokens of a prompt in a task of attention
constexpr int64_t kAloneSize = 8192;  // inputs that every thread prepares for itself rather than wait for the others
constexpr size_t kMostProducts = 8;   // of one operation
constexpr int kMostRows = 16;         // of a tile, on any instruction set
constexpr int64_t kHeadTiles = 8;     // of rows that pass one head's weight together

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes of the arrays of products' inputs, in elements.
struct InputSize {
    int64_t bytes = 0, scales = 0, sums = 0;

    void add(const Weights& w, int64_t rows) {
        bytes += ceil_div(rows * w.depth * input_bytes(w.format), 64) * 64;
        scales += rows * w.input_scales();
        sums += rows * w.groups();
    }
    void cover(const InputSize& other) {
        bytes = std::max(bytes, other.bytes);
        scales = std::max(scales, other.scales);
        sums = std::max(sums, other.sums);
    }
    void reserve(Aligned<char>& data, Aligned<float>& its_scales, Aligned<int32_t>& its_sums) const {
        data.reserve(bytes);
        its_scales.reserve(scales);
        its_sums.reserve(sums);
    }
};

// A unit of attention's work: queries of one row for one key head, over one chunk of the keys or over all (-1). In the
// list of merges: the chunks of a row whose partial results are merged, `chunk` of them.
struct Task {
    int64_t row, kv_head, first, count, chunk;
    int64_t partial;  // where a chunk's result goes, in floats
};

// Tokens of one adapter.
struct LowTile {
    const Adapter* adapter;
    int64_t count;
    int64_t tokens[kLowTokens];
};

// The tokens that go through the operations together, and how their attention is divided.
struct Program::Slice {
    Step step;  // of these tokens only
    Output output;
    std::vector<int64_t> begins, lengths, tables;  // of rows that have tokens here
    std::vector<std::vector<Task>> tasks, merges;  // by layer; empty: those of the first layer
    std::vector<int64_t> image_at;                 // tokens of this slice whose embeddings are given
    std::vector<int64_t> save_at;                  // tokens of this slice behind which a state is saved
    std::vector<LowTile> low;                      // tokens that wear an adapter
    std::vector<int64_t> low_panels;  // by operation: most panels that an adapter's second factors have; 0: none
};

// The inputs of one product of every expert, one expert's rows after the other's.
struct Program::ExpertInputs {
    std::vector<Input> of;  // by expert
    Aligned<char> data;
    Aligned<float> scales;
    Aligned<int32_t> sums;

    // Makes room for the rows [begins[e], begins[e + 1]) of each expert e, as products with `w` read them.
    void lay_out(const Weights& w, const std::vector<int64_t>& begins, const Program& program);
};

// Which expert computes which rows of a mixture. Thread 0 writes it, between two barriers.
struct Program::ExpertPlan {
    std::vector<int> chosen;      // [rows][chosen] experts, most likely first
    std::vector<float> probs;     // [rows][chosen]
    std::vector<int64_t> place;   // [rows][chosen] row of the experts' buffers
    std::vector<int64_t> tokens;  // token of each such row
    std::vector<int64_t> begins;  // [experts + 1] first such row of each expert
    ExpertInputs inputs, inner_inputs;
    Aligned<float> inner, out;  // results of the first and the second products

    void reserve_choices(size_t count) {
        chosen.resize(count);
        probs.resize(count);
        place.resize(count);
    }
};

struct Program::Worker : Share {
    Program& program;
    int thread, threads;
    std::vector<std::unique_ptr<Worker>>& all;
    Aligned<float> attention;
    Aligned<float> recurrence;  // of a recurrent layer
    Aligned<char> opened;       // of a row of a table: a packed panel, then floats
    Aligned<float> low_input;   // [kLowTokens][inputs] of a tile of tokens that wear an adapter
    Aligned<char> input;
    Aligned<float> input_scales;
    Aligned<int32_t> input_sums;
    Aligned<char> head_input;  // of one head's product
    Aligned<float> head_scales;
    Aligned<int32_t> head_sums;

    Worker(Program& p, int thread_number, std::vector<std::unique_ptr<Worker>>& workers)
        : program(p), thread(thread_number), threads(p.pool_->size()), all(workers) {}

    template <class Work>
    void each(int64_t units, Work work) {
        share_out(units, thread, all, *program.pool_, work);
    }

    void run();
    void cos_sin();
    void embed(const Operation&);
    void add_rows(const Operation&);
    void add_table(const Operation&);
    void read_row(const Table&, int64_t row, float scale, float* out);
    void scale(const Operation&);
    void gate_by(const Operation&);
    void xielu(const Operation&);
    struct ProductPlan;
    ProductPlan plan_products(size_t number, int64_t rows);
    void product(size_t number, int64_t rows);
    int64_t shrink_units(size_t number) const;
    void shrink(size_t number, int64_t unit);
    void expand(size_t number, int64_t rows);
    void rotate(const Operation&);
    Keys keys_of(const Attention&, const Task&) const;
    void attend(const Operation&);
    void multiply_heads(const Operation&);
    void store_latent(const Operation&);
    void recur(const Operation&);
    template <class Work>
    void in_states(const Operation&, int64_t at, int64_t units, int64_t floats, Work work);
    void mamba(const Operation&, const Mamba&);
    void output_gate(const Operation&);
    void norm(const Operation&, int64_t rows);
    void gather(const Operation&);
    void write_output();
    void mixture(const Operation&);
    void choose_experts(const Operation&, int64_t row);
    void group_by_expert(const Operation&);
    template <class RowAt>
    void prepare_experts(const Weights&, const ExpertInputs&, Norm, RowAt row_at);
    void multiply_experts(const Operation&, const std::vector<int>& products, const ExpertInputs&, float* out,
                          int64_t stride, Mode);

    const Slice& slice() const { return *program.slice_; }
    // Whether adapters of this slice change the operation.
    bool lowered(size_t number) const { return !slice().low.empty() && slice().low_panels[number]; }
    // Whether the operation writes its result in tiles. What an adapter may read or change lies in the buffer.
    bool tiles(size_t number) const { return program.tiled_[number] && slice().low.empty(); }
    // Columns of a gated product's panels.
    int64_t low_width(const Operation& op) const { return program.weights(op.products[0]).panels * kPanel; }
    float* buffer(int number) const { return program.buffers_[static_cast<size_t>(number)].get(); }
    int64_t width(int number) const { return program.widths_[static_cast<size_t>(number)]; }
    Norm norm_of(int weight, const Operation& op) const {
        return {weight < 0 ? nullptr : program.norms_[static_cast<size_t>(weight)].data(), op.eps, op.centered};
    }
    const Kernels& kernels() const { return *program.kernels_; }
};

}  // namespace inflight
