#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace inflight {

constexpr int64_t kMostQueries = 12;  // at once, on any instruction set

int64_t attend_scratch(const Attention& a) {
    return kMostQueries * (2 * kBlock + 3 * a.depth) + 2 * kBlock * a.depth + 2 * kBlock + 16 * 16;
}

namespace {

constexpr int64_t kSlice = 512;       // tokens that go through the list at once: what they need stays in the caches
constexpr int64_t kAloneSize = 8192;  // inputs that every thread prepares for itself rather than wait for the others
constexpr int kMostRows = 16;         // of a tile, on any instruction set
constexpr int64_t kManyTiles = 8;     // row tiles of one unit of work

bool supported(const std::string& name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool dots = wide && __builtin_cpu_supports("avx512vnni");
    if (name == "avx512_bf16") return dots && __builtin_cpu_supports("avx512bf16");
    if (name == "avx512_vnni") return dots;
    if (name == "avx512") return wide;
    if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
    if (name == "neon") return true;
#endif
    return name == "scalar";
}

struct Set {
    const char* name;
    const Kernels* (*get)();
};

const std::vector<Set>& sets() {
    static const std::vector<Set> all = {
#if defined(__x86_64__)
        {"avx512_bf16", kernels_avx512_bf16},
        {"avx512_vnni", kernels_avx512_vnni},
        {"avx512", kernels_avx512},
        {"avx2", kernels_avx2},
#elif defined(__aarch64__)
        {"neon", kernels_neon},
#endif
        {"scalar", kernels_scalar},
    };
    return all;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Set& set : sets())
        if (supported(set.name)) names.push_back(set.name);
    return names;
}

const Kernels* choose(const std::string& name) {
    std::string known;
    for (const Set& set : sets()) {
        if ((name.empty() || name == set.name) && supported(set.name)) return set.get();
        if (supported(set.name)) known += std::string(known.empty() ? "" : ", ") + set.name;
    }
    throw std::invalid_argument("the instruction set '" + name + "' is not to be had on this machine; it has " + known);
}

// One (row, key head, some of its queries, one chunk of keys or all).
struct Task {
    int64_t row, kv_head, first, count, chunk;
    int64_t partial;  // where a chunk's result goes, in floats
};

struct Program::Slice {
    Step step;  // of these tokens only
    Output output;
    std::vector<int64_t> begins, lengths, tables;  // of rows that have tokens here
    std::vector<std::vector<Task>> tasks, merges;  // by layer; empty: those of the first one
};

// The step of a mixture: which expert computes which rows. Written by thread 0 between two barriers.
struct Program::Routed {
    std::vector<int> chosen;       // [rows][chosen] experts, most likely first
    std::vector<float> shares;     // [rows][chosen]
    std::vector<int64_t> place;    // [rows][chosen] row of the experts' buffers
    std::vector<int64_t> tokens;   // token of each such row
    std::vector<int64_t> begins;   // [experts + 1] of such rows
    std::vector<Input> inputs, inners;  // by expert
    Aligned<char> data, inner_data;
    Aligned<float> scales, inner_scales, hidden, out;
    Aligned<int32_t> sums, inner_sums;
};

struct Program::Worker {
    Program& program;
    int thread, threads;
    std::vector<std::unique_ptr<Worker>>& all;
    alignas(64) std::atomic<int64_t> next[2] = {};  // of this thread's share, in even and in odd stages
    int stage = 0;
    Aligned<float> attention;
    Aligned<char> input;
    Aligned<float> input_scales;
    Aligned<int32_t> input_sums;

    Worker(Program& p, int thread_number, std::vector<std::unique_ptr<Worker>>& workers)
        : program(p), thread(thread_number), threads(p.pool_->size()), all(workers) {}

    // Calls work(unit) for each unit of [0, units), on some thread; returns when all are done. Units are divided evenly;
    // who is ready early helps the others. Which thread does what changes no result.
    template <class Work>
    void each(int64_t units, Work work) {
        if (threads == 1) {
            for (int64_t unit = 0; unit < units; unit++) work(unit);
            return;
        }
        int now = stage++ & 1;
        for (int i = 0; i < threads; i++) {
            int owner = (thread + i) % threads;
            std::atomic<int64_t>& from = all[static_cast<size_t>(owner)]->next[now];
            int64_t begin = units * owner / threads, last = units * (owner + 1) / threads;
            while (true) {
                int64_t unit = begin + from.fetch_add(1, std::memory_order_relaxed);
                if (unit >= last) break;
                work(unit);
            }
        }
        // Nobody takes from the other stage's counters now: all passed its barrier.
        next[now ^ 1].store(0, std::memory_order_relaxed);
        program.pool_->barrier();
    }

    void run();
    void turns();
    void embed(const Operation&);
    void product(size_t number, int64_t rows);
    void rotate(const Operation&);
    void attend(const Operation&);
    void norm(const Operation&, int64_t rows);
    void gather(const Operation&);
    void give();
    void mixture(const Operation&);

    const Slice& slice() const { return *program.slice_; }
    float* buffer(int number) const { return program.buffers_[static_cast<size_t>(number)].get(); }
    int64_t width(int number) const { return program.widths_[static_cast<size_t>(number)]; }
    Norm norm_of(int weight, const Operation& op) const {
        return {weight < 0 ? nullptr : program.norms_[static_cast<size_t>(weight)].data(), op.eps, op.centered};
    }
    const Kernels& kernels() const { return *program.kernels_; }
};

Program::Program(int threads, const std::string& isa)
    : pool_(Pool::shared(std::max(1, threads))), kernels_(choose(isa)), slice_(new Slice), routed_(new Routed) {
    for (int thread = 0; thread < pool_->size(); thread++) workers_.push_back(std::make_unique<Worker>(*this, thread, workers_));
}

Program::~Program() = default;

int Program::add_weights(Weights w, const float* bias) {
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

int Program::add_norm(const float* values, int64_t n) {
    norms_.emplace_back(values, values + n);
    return static_cast<int>(norms_.size()) - 1;
}

int Program::add_rope(Rope rope) {
    ropes_.push_back(std::move(rope));
    turns_.emplace_back();
    return static_cast<int>(ropes_.size()) - 1;
}

int Program::add_layer(const Attention& layer) {
    layers_.push_back(layer);
    return static_cast<int>(layers_.size()) - 1;
}

int Program::add_buffer(int64_t width) {
    widths_.push_back(width);
    buffers_.emplace_back();
    return static_cast<int>(widths_.size()) - 1;
}

void Program::add(Operation operation) {
    operations_.push_back(std::move(operation));
    costs_.emplace_back();
}

int64_t Program::make_caches(int64_t blocks, int64_t block_size, KvType type) {
    if (blocks < 1 || block_size < 1 || blocks > INT32_MAX) throw std::invalid_argument("a cache needs blocks");
    caches_ = std::make_unique<Arena>();
    int64_t bytes = 0;
    auto take = [&](int64_t size) {
        bytes += size;
        return caches_->take(size);
    };
    for (Attention& a : layers_) {
        int64_t positions = blocks * block_size * a.kv_heads, size = positions * a.depth * kv_bytes(type);
        a.blocks = blocks;
        a.block_size = block_size;
        a.type = type;
        a.keys = take(size);
        a.values = take(size);
        bool scaled = type == KvType::kInt8;
        a.key_scales = scaled ? reinterpret_cast<float*>(take(positions * 4)) : nullptr;
        a.value_scales = scaled ? reinterpret_cast<float*>(take(positions * 4)) : nullptr;
    }
    return bytes;
}

void Program::measure(bool on) {
    measured_ = on;
    costs_.assign(operations_.size(), Cost());
}

// What comes from outside this library is checked once, before any pointer is followed.
void Program::check(const Step& step) const {
    auto outside = [](const char* what, int64_t value, int64_t limit) {
        throw std::out_of_range(std::string(what) + " " + std::to_string(value) + " is not below " + std::to_string(limit));
    };
    if (operations_.empty() || layers_.empty()) throw std::out_of_range("the program has no operations or no layers");
    const Attention& a = layers_.front();
    if (!a.keys) throw std::out_of_range("the program has no cache yet");
    int64_t vocabulary = 0, total = 0, slots = a.blocks * a.block_size;
    for (const Operation& op : operations_)
        if (op.code == Code::kEmbed) vocabulary = weights_[static_cast<size_t>(op.product)].n;
    for (int64_t i = 0; i < step.count; i++) {
        if (step.tokens[i] < 0 || step.tokens[i] >= vocabulary) outside("token", step.tokens[i], vocabulary);
        if (step.slots[i] < 0 || step.slots[i] >= slots) outside("slot", step.slots[i], slots);
        if (step.positions[i] < 0 || step.positions[i] >= step.table_width * a.block_size)
            outside("position", step.positions[i], step.table_width * a.block_size);
    }
    for (int64_t row = 0; row < step.rows; row++) {
        if (step.lengths[row] < 1) outside("length", step.lengths[row], step.count + 1);
        int64_t first = total;
        if (step.lengths[row] > step.count - total) outside("sum of lengths", step.lengths[row], step.count - total + 1);
        total += step.lengths[row];
        for (int64_t i = first + 1; i < total; i++)
            if (step.positions[i] - 1 != step.positions[i - 1]) throw std::out_of_range("the positions of a row must follow each other");
        int64_t blocks = step.positions[total - 1] / a.block_size + 1;
        for (int64_t i = 0; i < blocks; i++) {
            int64_t block = step.tables[row * step.table_width + i];
            if (block < 0 || block >= a.blocks) outside("block", block, a.blocks);
        }
    }
    if (total != step.count) throw std::out_of_range("the rows' lengths do not add up to the step's tokens");
    for (int64_t i = 1; i < step.wanted; i++)
        if (step.logits_at[i] < step.logits_at[i - 1]) throw std::out_of_range("the tokens whose logits are wanted must ascend");
    for (int64_t i = 0; i < step.wanted; i++)
        if (step.logits_at[i] < 0 || step.logits_at[i] >= step.count) outside("logits of token", step.logits_at[i], step.count);
}

void Program::slice_of(const Step& step, int64_t first, int64_t last) {
    Slice& s = *slice_;
    s.step = step;
    s.step.tokens += first;
    s.step.positions += first;
    s.step.slots += first;
    s.step.count = last - first;
    s.begins.clear();
    s.lengths.clear();
    s.tables.clear();
    int64_t begin = 0;
    for (int64_t row = 0; row < step.rows; begin += step.lengths[row++]) {
        int64_t from = std::max(begin, first), to = std::min(begin + step.lengths[row], last);
        if (from >= to) continue;
        s.begins.push_back(from - first);
        s.lengths.push_back(to - from);
        s.tables.push_back(row);
    }
    s.tasks.assign(layers_.size(), {});
    s.merges.assign(layers_.size(), {});
    int64_t room = 0;
    for (size_t layer = 0; layer < layers_.size(); layer++) {
        const Attention& a = layers_[layer];
        // Layers of one shape share their tasks.
        bool same = layer && a.heads == layers_[0].heads && a.kv_heads == layers_[0].kv_heads && a.depth == layers_[0].depth;
        if (same) continue;
        int64_t group = a.heads / a.kv_heads, most = kMostQueries / std::min(group, kMostQueries) * group;
        for (size_t row = 0; row < s.begins.size(); row++) {
            int64_t queries = s.lengths[row] * group;
            int64_t end = s.step.positions[s.begins[row] + s.lengths[row] - 1] + 1;
            int64_t chunks = s.lengths[row] == 1 ? ceil_div(end, kChunk) : 1;
            for (int64_t head = 0; head < a.kv_heads; head++) {
                if (chunks > 1) {
                    s.merges[layer].push_back({static_cast<int64_t>(row), head, 0, queries, chunks, room});
                    for (int64_t chunk = 0; chunk < chunks; chunk++, room += queries * (a.depth + 2))
                        s.tasks[layer].push_back({static_cast<int64_t>(row), head, 0, queries, chunk, room});
                    continue;
                }
                for (int64_t at = 0; at < queries; at += most) {
                    int64_t count = std::min(most, queries - at);
                    s.tasks[layer].push_back({static_cast<int64_t>(row), head, at, count, -1, 0});
                }
            }
        }
    }
    partial_.reserve(room);
}

void Program::reserve(int64_t rows, int64_t logit_rows) {
    bool gathered = false;
    std::vector<int64_t> needed(widths_.size(), 0);
    for (const Operation& op : operations_) {
        gathered |= op.code == Code::kGather;
        for (int buffer : {op.from, op.to})
            if (buffer >= 0) needed[static_cast<size_t>(buffer)] = std::max(needed[static_cast<size_t>(buffer)], gathered && buffer == op.to ? logit_rows : rows);
    }
    for (size_t i = 0; i < buffers_.size(); i++) buffers_[i].reserve(needed[i] * widths_[i] + kLanes);
    int64_t bytes = 0, sums = 0, most = std::max(rows, logit_rows), widest = 0, groups = 0;
    for (const Weights& w : weights_) {
        bytes = std::max(bytes, most * w.depth * input_bytes(w.format));
        sums = std::max(sums, most * w.groups());
        widest = std::max(widest, w.depth);
        groups = std::max(groups, w.groups());
    }
    input_.reserve(bytes);
    inner_.reserve(bytes);
    input_scales_.reserve(most);
    input_sums_.reserve(sums);
    for (size_t rope = 0; rope < ropes_.size(); rope++)
        turns_[rope].reserve(rows * 2 * static_cast<int64_t>(ropes_[rope].inverse.size()) + kLanes);
    int64_t scratch = 0;
    for (const Attention& a : layers_) scratch = std::max(scratch, attend_scratch(a));
    for (auto& worker : workers_) {
        worker->attention.reserve(scratch);
        worker->input.reserve(kAloneSize * 4 + widest * 4 + 64);
        worker->input_scales.reserve(kAloneSize);
        worker->input_sums.reserve(std::max(kAloneSize, groups));
    }
}

// Whether a gated product writes its result as the next product reads it: rounded once, in tiles, past the buffer.
bool Program::tiled(size_t operation) const {
    const Operation& op = operations_[operation];
    if (op.code != Code::kProduct || op.mode != Mode::kGate || operation + 1 >= operations_.size()) return false;
    const Operation& reader = operations_[operation + 1];
    if (reader.code != Code::kProduct || reader.from != op.to || reader.norm >= 0 || reader.to == op.to) return false;
    const Weights &w = weights(op.product), &next = weights(reader.product);
    if (next.format != Format::kBf16 || next.k != next.depth) return false;
    if (kernels_->tile_rows[static_cast<int>(w.format)] != kernels_->tile_rows[static_cast<int>(next.format)]) return false;
    for (size_t i = operation + 2; i < operations_.size(); i++) {  // nobody else reads the buffer before it is written anew
        const Operation& other = operations_[i];
        if (other.from == op.to) return false;
        if (other.to == op.to) return other.code == Code::kProduct && other.mode != Mode::kAdd;
    }
    return true;
}

void Program::run(const Step& step, Output output) {
    check(step);
    if (tiled_.size() != operations_.size()) {
        tiled_.clear();
        for (size_t i = 0; i < operations_.size(); i++) tiled_.push_back(tiled(i));
    }
    int64_t columns = width(operations_.back().to), done = 0;
    for (int64_t first = 0; first < step.count; first += kSlice) {
        int64_t end = std::min(step.count, first + kSlice);
        int64_t wanted = 0;
        while (done + wanted < step.wanted && step.logits_at[done + wanted] < end) wanted++;
        slice_of(step, first, end);
        std::vector<int64_t> at(step.logits_at + done, step.logits_at + done + wanted);
        for (int64_t& each : at) each -= first;
        slice_->step.logits_at = at.data();
        slice_->step.wanted = wanted;
        slice_->output = {output.logits + done * columns,
                          output.hidden ? output.hidden + done * width(output.hidden_buffer) : nullptr,
                          output.hidden_buffer, output.best + done};
        reserve(end - first, std::max<int64_t>(1, wanted));
        for (auto& worker : workers_) {
            worker->stage = 0;
            worker->next[0] = worker->next[1] = 0;
        }
        pool_->run([this](int thread) { workers_[static_cast<size_t>(thread)]->run(); });
        done += wanted;
    }
}

void Program::decode(const Rows& rows, bool append, Output output) {
    if (layers_.empty() || !layers_.front().keys) throw std::out_of_range("the program has no cache yet");
    int64_t count = rows.count, block_size = layers_.front().block_size;
    decoding_.resize(static_cast<size_t>(5 * count));
    int64_t* tokens = decoding_.data();
    int64_t *positions = tokens + count, *slots = positions + count, *lengths = slots + count, *numbers = lengths + count;
    for (int64_t row = 0; row < count; row++) {
        int64_t at = rows.computed[row];
        if (at < 0 || at >= rows.width || at / block_size >= rows.table_width || rows.known[row] != at + 1 ||
            (append && at + 1 >= rows.width))
            throw std::out_of_range("row " + std::to_string(row) + " does not decode at " + std::to_string(at));
        tokens[row] = rows.tokens[row * rows.width + at];
        positions[row] = at;
        slots[row] = rows.tables[row * rows.table_width + at / block_size] * block_size + at % block_size;
        lengths[row] = 1;
        numbers[row] = row;
    }
    run({tokens, positions, slots, lengths, rows.tables, numbers, count, count, rows.table_width, count}, output);
    for (int64_t row = 0; row < count; row++) {
        rows.computed[row]++;
        if (append) rows.tokens[row * rows.width + rows.known[row]++] = static_cast<int32_t>(output.best[row]);
    }
}

double Program::bytes_of(const Operation& op) const {
    const Slice& s = *slice_;
    double rows = static_cast<double>(s.step.count);
    if (op.code == Code::kProduct) {
        const Weights& w = weights(op.product);
        return static_cast<double>(w.panels * w.panel_bytes);
    }
    if (op.code == Code::kAttend) {
        const Attention& a = layers_[static_cast<size_t>(op.layer)];
        double keys = 0;
        for (size_t row = 0; row < s.begins.size(); row++) {
            int64_t end = s.step.positions[s.begins[row] + s.lengths[row] - 1] + 1;
            keys += static_cast<double>(a.window && end > a.window ? a.window + s.lengths[row] - 1 : end);
        }
        return keys * static_cast<double>(a.kv_heads * a.depth * 2 * kv_bytes(a.type));
    }
    if (op.code == Code::kMixture) {
        double total = 0;
        for (size_t e = 0; e < op.gate_up.size(); e++)
            if (routed_->begins[e + 1] > routed_->begins[e])
                for (int product : {op.gate_up[e], op.down[e]})
                    total += static_cast<double>(weights(product).panels * weights(product).panel_bytes);
        return total;
    }
    if (op.from < 0) return 0;
    return rows * static_cast<double>(width(op.from)) * 4;
}

double Program::operations_of(const Operation& op) const {
    const Slice& s = *slice_;
    bool gathered = false;
    for (const Operation& other : operations_) {
        if (&other == &op) break;
        gathered |= other.code == Code::kGather;
    }
    double rows = static_cast<double>(gathered ? s.step.wanted : s.step.count);
    if (op.code == Code::kProduct) {
        const Weights& w = weights(op.product);
        return 2.0 * rows * static_cast<double>(w.n) * static_cast<double>(w.k);
    }
    if (op.code == Code::kMixture) {
        const Weights& gate = weights(op.gate_up[0]);
        const Weights& down = weights(op.down[0]);
        return 2.0 * rows * op.chosen * static_cast<double>(gate.n * gate.k + down.n * down.k);
    }
    if (op.code == Code::kAttend) {
        const Attention& a = layers_[static_cast<size_t>(op.layer)];
        double pairs = 0;
        for (int64_t i = 0; i < s.step.count; i++) {
            int64_t seen = s.step.positions[i] + 1;
            pairs += static_cast<double>(a.window && seen > a.window ? a.window : seen);
        }
        return 4.0 * pairs * static_cast<double>(a.heads * a.dim);
    }
    return 0;
}

void Program::Worker::run() {
    using Clock = std::chrono::steady_clock;
    auto began = Clock::now();
    int64_t rows = slice().step.count;
    if (!program.ropes_.empty()) turns();
    for (size_t i = 0; i < program.operations_.size(); i++) {
        const Operation& op = program.operations_[i];
        switch (op.code) {
            case Code::kEmbed: embed(op); break;
            case Code::kProduct: product(i, rows); break;
            case Code::kRotate: rotate(op); break;
            case Code::kAttend: attend(op); break;
            case Code::kNorm: norm(op, rows); break;
            case Code::kGather:
                gather(op);
                rows = slice().step.wanted;
                break;
            case Code::kCap:
                each(rows, [&](int64_t row) { kernels().cap(buffer(op.to) + row * width(op.to), width(op.to), op.scale, op.softcap); });
                break;
            case Code::kMixture: mixture(op); break;
        }
        if (op.code == Code::kGather && !rows) return;  // a chunk of a prompt: nobody asks what follows
        if (program.measured_ && thread == 0) {
            auto now = Clock::now();
            Cost& cost = program.costs_[i];
            cost.seconds += std::chrono::duration<double>(now - began).count();
            cost.bytes += program.bytes_of(op);
            cost.operations += program.operations_of(op);
            began = now;
        }
    }
    give();
}

// The rows whose logits are wanted, to whoever asked.
void Program::Worker::give() {
    const Output& out = slice().output;
    int last = program.operations_.back().to;
    int64_t columns = width(last);
    each(slice().step.wanted, [&](int64_t row) {
        const float* logits = buffer(last) + row * columns;
        std::memcpy(out.logits + row * columns, logits, static_cast<size_t>(columns) * 4);
        out.best[row] = kernels().argmax(logits, columns);
        if (!out.hidden) return;
        int64_t hidden = width(out.hidden_buffer);
        std::memcpy(out.hidden + row * hidden, buffer(out.hidden_buffer) + row * hidden, static_cast<size_t>(hidden) * 4);
    });
}

void Program::Worker::turns() {
    const Step& step = slice().step;
    each(ceil_div(step.count, 16), [&](int64_t unit) {
        for (size_t number = 0; number < program.ropes_.size(); number++) {
            const Rope& rope = program.ropes_[number];
            int64_t half = static_cast<int64_t>(rope.inverse.size());
            for (int64_t i = unit * 16; i < std::min(step.count, unit * 16 + 16); i++) {
                float* out = program.turns_[number].get() + i * 2 * half;
                bool far = !rope.far_inverse.empty() && step.positions[i] >= rope.original;
                const std::vector<float>& inverse = far ? rope.far_inverse : rope.inverse;
                for (int64_t j = 0; j < half; j++) {
                    float angle = static_cast<float>(step.positions[i]) * inverse[static_cast<size_t>(j)];
                    out[j] = std::cos(angle) * rope.factor;
                    out[half + j] = std::sin(angle) * rope.factor;
                }
            }
        }
    });
}

void Program::Worker::embed(const Operation& op) {
    const Step& step = slice().step;
    each(step.count, [&](int64_t row) {
        kernels().unpack(program.weights(op.product), step.tokens[row], op.scale, buffer(op.to) + row * width(op.to));
    });
}

void Program::Worker::product(size_t number, int64_t rows) {
    const Operation& op = program.operations_[number];
    const Weights& w = program.weights(op.product);
    const float* from = buffer(op.from);
    Norm norm = norm_of(op.norm, op);
    int64_t most = kernels().tile_rows[static_cast<int>(w.format)];
    Input in{program.input_.get(), program.input_scales_.get(), program.input_sums_.get(), rows, ceil_div(rows, most)};
    auto prepare = [&](int64_t tile) {
        const float* x[kMostRows];
        for (int64_t row = in.start(tile); row < in.start(tile + 1); row++) x[row - in.start(tile)] = from + row * w.k;
        kernels().prepare(w, x, norm, in, tile);
    };
    if (number && program.tiled_[number - 1]) {
        in.data = program.inner_.get();
    } else if (rows * w.depth <= kAloneSize || (rows == 1 && threads <= 4)) {
        in.data = input.get();
        in.scales = input_scales.get();
        in.sums = input_sums.get();
        input.reserve(rows * w.depth * input_bytes(w.format));
        for (int64_t tile = 0; tile < in.tiles; tile++) prepare(tile);
    } else {
        each(in.tiles, prepare);
    }
    char* tiles = program.tiled_[number] ? program.inner_.get() : nullptr;
    Target target{buffer(op.to), width(op.to), op.mode, op.act, op.scale, tiles};
    int64_t bands = ceil_div(in.tiles, kManyTiles), per_band = ceil_div(in.tiles, bands);
    // Units of about 64 KiB of weights: long enough to stream, short enough to end together.
    int64_t panels = std::max<int64_t>(1, std::min<int64_t>(65536 / w.panel_bytes, w.panels / (4 * threads)));
    int64_t strips = ceil_div(w.panels, panels);
    each(strips * bands, [&](int64_t unit) {
        int64_t strip = unit / bands, band = unit % bands;
        kernels().product(w, in, strip * panels, std::min(w.panels, (strip + 1) * panels), band * per_band,
                          std::min(in.tiles, (band + 1) * per_band), target);
    });
}

void Program::Worker::rotate(const Operation& op) {
    const Attention& a = program.layers_[static_cast<size_t>(op.layer)];
    const Step& step = slice().step;
    Norm queries = norm_of(op.norm, op), keys = norm_of(op.second, op);
    int64_t group = a.heads / a.kv_heads, half = op.rope < 0 ? 0 : static_cast<int64_t>(program.ropes_[static_cast<size_t>(op.rope)].inverse.size());
    each(step.count * a.kv_heads, [&](int64_t unit) {
        int64_t i = unit / a.kv_heads, head = unit % a.kv_heads;
        float* all = buffer(op.to) + i * width(op.to);
        const float* turns = half ? program.turns_[static_cast<size_t>(op.rope)].get() + i * 2 * half : nullptr;
        for (int64_t g = 0; g < group; g++)
            kernels().rotate(all + (head * group + g) * a.dim, a.dim, queries, turns, turns + half, 2 * half);
        float* key = all + (a.heads + head) * a.dim;
        kernels().rotate(key, a.dim, keys, turns, turns + half, 2 * half);
        kernels().keep(a, key, all + (a.heads + a.kv_heads + head) * a.dim, head, step.slots[i]);
    });
}

void Program::Worker::attend(const Operation& op) {
    const Slice& s = slice();
    const Attention& a = program.layers_[static_cast<size_t>(op.layer)];
    const std::vector<Task>& own = s.tasks[static_cast<size_t>(op.layer)];
    const std::vector<Task>& tasks = own.empty() ? s.tasks[0] : own;
    const std::vector<Task>& merges = own.empty() ? s.merges[0] : s.merges[static_cast<size_t>(op.layer)];
    int64_t group = a.heads / a.kv_heads;
    float* out = buffer(op.to);
    float* partial = program.partial_.get();
    auto keys_of = [&](const Task& task) {
        size_t row = static_cast<size_t>(task.row);
        int64_t end = s.step.positions[s.begins[row]] + 1, begin = std::max<int64_t>(task.chunk, 0) * kChunk;
        if (a.window) begin = std::max(begin, (end - a.window) / kBlock * kBlock);
        return Keys{s.step.tables + s.tables[row] * s.step.table_width, task.kv_head, begin, end};
    };
    each(static_cast<int64_t>(tasks.size()), [&](int64_t unit) {
        const Task& task = tasks[static_cast<size_t>(unit)];
        size_t row = static_cast<size_t>(task.row);
        int64_t begin = s.begins[row];
        Queries q;
        q.q = buffer(op.from) + begin * width(op.from) + task.kv_head * group * a.dim;
        q.q_stride = width(op.from);
        q.positions = s.step.positions + begin;
        q.first = task.first;
        q.count = task.count;
        q.kv_head = task.kv_head;
        q.table = s.step.tables + s.tables[row] * s.step.table_width;
        q.chunk = task.chunk;
        q.out = task.chunk < 0 ? out + begin * width(op.to) + task.kv_head * group * a.dim : partial + task.partial;
        q.out_stride = width(op.to);
        q.next = static_cast<size_t>(unit) + 1 < tasks.size() ? keys_of(tasks[static_cast<size_t>(unit) + 1]) : Keys{};
        kernels().attend(a, q, attention.get());
    });
    if (merges.empty()) return;
    each(static_cast<int64_t>(merges.size()), [&](int64_t unit) {
        const Task& task = merges[static_cast<size_t>(unit)];
        float* row = out + s.begins[static_cast<size_t>(task.row)] * width(op.to) + task.kv_head * group * a.dim;
        for (int64_t g = 0; g < group; g++) {
            const float* first = partial + task.partial + g * (a.depth + 2);
            kernels().merge(a, &first, task.count * (a.depth + 2), task.chunk, row + g * a.dim);
        }
    });
}

void Program::Worker::norm(const Operation& op, int64_t rows) {
    Norm norm = norm_of(op.norm, op);
    int64_t columns = width(op.to);
    each(rows, [&](int64_t row) {
        kernels().norm(buffer(op.from) + row * columns, columns, norm, op.mode == Mode::kAdd, op.scale, buffer(op.to) + row * columns);
    });
}

void Program::Worker::gather(const Operation& op) {
    Norm norm = norm_of(op.norm, op);
    int64_t columns = width(op.to);
    const Step& step = slice().step;
    each(step.wanted, [&](int64_t row) {
        kernels().norm(buffer(op.from) + step.logits_at[row] * columns, columns, norm, false, 1.0f, buffer(op.to) + row * columns);
    });
}

void Program::Worker::mixture(const Operation& op) {
    Routed& r = *program.routed_;
    int64_t rows = slice().step.count, hidden = width(op.from);
    size_t experts = op.gate_up.size(), chosen = static_cast<size_t>(op.chosen);
    const Weights& gate = program.weights(op.gate_up[0]);
    const Weights& down = program.weights(op.down[0]);
    if (thread == 0) {
        r.chosen.resize(static_cast<size_t>(rows) * chosen);
        r.shares.resize(r.chosen.size());
        r.place.resize(r.chosen.size());
    }
    program.pool_->barrier();
    each(rows, [&](int64_t row) {
        // Softmax over all experts, then the best ones; of two alike the first.
        const float* logits = buffer(op.to) + row * width(op.to);
        int* best = r.chosen.data() + static_cast<size_t>(row) * chosen;
        float* shares = r.shares.data() + static_cast<size_t>(row) * chosen;
        float peak = *std::max_element(logits, logits + experts), total = 0.0f, taken = 0.0f;
        for (size_t e = 0; e < experts; e++) total += std::exp(logits[e] - peak);
        std::vector<char> used(experts, 0);
        for (size_t c = 0; c < chosen; c++) {
            size_t found = experts;
            for (size_t e = 0; e < experts; e++)
                if (!used[e] && (found == experts || logits[e] > logits[found])) found = e;
            used[found] = 1;
            best[c] = static_cast<int>(found);
            shares[c] = std::exp(logits[found] - peak) / total;
            taken += shares[c];
        }
        if (op.normalise)
            for (size_t c = 0; c < chosen; c++) shares[c] /= taken;
    });
    if (thread == 0) {
        r.begins.assign(experts + 1, 0);
        for (int expert : r.chosen) r.begins[static_cast<size_t>(expert) + 1]++;
        for (size_t e = 0; e < experts; e++) r.begins[e + 1] += r.begins[e];
        std::vector<int64_t> at(r.begins.begin(), r.begins.end() - 1);
        r.tokens.resize(r.chosen.size());
        for (size_t i = 0; i < r.chosen.size(); i++) {
            r.place[i] = at[static_cast<size_t>(r.chosen[i])]++;
            r.tokens[static_cast<size_t>(r.place[i])] = static_cast<int64_t>(i / chosen);
        }
        int64_t all = static_cast<int64_t>(r.chosen.size());
        auto region = [&](const Weights& w, Aligned<char>& data, Aligned<float>& scales, Aligned<int32_t>& sums, std::vector<Input>& inputs) {
            data.reserve(all * w.depth * input_bytes(w.format));
            scales.reserve(all);
            sums.reserve(all * w.groups());
            inputs.clear();
            for (size_t e = 0; e < experts; e++) {
                int64_t begin = r.begins[e], count = r.begins[e + 1] - begin;
                inputs.push_back({data.get() + begin * w.depth * input_bytes(w.format), scales.get() + begin,
                                  sums.get() + begin * w.groups(), count,
                                  ceil_div(count, kernels().tile_rows[static_cast<int>(w.format)])});
            }
        };
        region(gate, r.data, r.scales, r.sums, r.inputs);
        region(down, r.inner_data, r.inner_scales, r.inner_sums, r.inners);
        r.hidden.reserve(all * down.k + kLanes);
        r.out.reserve(all * hidden + kLanes);
    }
    program.pool_->barrier();
    // Tiles of all experts, those of one expert after the other.
    auto prepare = [&](const Weights& w, const std::vector<Input>& inputs, Norm norm, auto row_at) {
        int64_t tiles = 0;
        for (const Input& in : inputs) tiles += in.tiles;
        each(tiles, [&](int64_t tile) {
            size_t e = 0;
            while (tile >= inputs[e].tiles) tile -= inputs[e++].tiles;
            const Input& in = inputs[e];
            const float* x[kMostRows];
            for (int64_t row = in.start(tile); row < in.start(tile + 1); row++) x[row - in.start(tile)] = row_at(r.begins[e] + row);
            kernels().prepare(w, x, norm, in, tile);
        });
    };
    prepare(gate, r.inputs, norm_of(op.norm, op),
            [&](int64_t place) { return buffer(op.from) + r.tokens[static_cast<size_t>(place)] * hidden; });
    auto multiply = [&](const std::vector<int>& products, const std::vector<Input>& inputs, float* out, int64_t stride, Mode mode) {
        const Weights& shape = program.weights(products[0]);
        int64_t panels = std::max<int64_t>(1, 65536 / shape.panel_bytes), strips = ceil_div(shape.panels, panels);
        each(static_cast<int64_t>(experts) * strips, [&](int64_t unit) {
            size_t e = static_cast<size_t>(unit / strips);
            const Input& in = inputs[e];
            if (!in.rows) return;
            const Weights& w = program.weights(products[e]);
            int64_t first = unit % strips * panels;
            kernels().product(w, in, first, std::min(w.panels, first + panels), 0, in.tiles,
                              {out + r.begins[e] * stride, stride, mode, op.act, 1.0f, nullptr});
        });
    };
    multiply(op.gate_up, r.inputs, r.hidden.get(), down.k, Mode::kGate);
    prepare(down, r.inners, Norm{nullptr, 0.0f, false}, [&](int64_t place) { return r.hidden.get() + place * down.k; });
    multiply(op.down, r.inners, r.out.get(), hidden, Mode::kStore);
    each(rows, [&](int64_t row) {
        for (size_t c = 0; c < chosen; c++) {
            size_t i = static_cast<size_t>(row) * chosen + c;
            kernels().axpy(buffer(op.from) + row * hidden, r.out.get() + r.place[i] * hidden, r.shares[i] * op.scale, hidden);
        }
    });
}

}  // namespace inflight
