#include "program.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "worker.h"

namespace inflight {

int64_t attend_scratch(const Attention& a) {
    constexpr int64_t rows = 16;  // most queries that are computed together, on any instruction set
    int64_t dots = rows * (2 * kBlock + 3 * a.depth) + 2 * kBlock * a.depth + 2 * kBlock;
    int64_t tiles = rows * (kChunk + 3 * a.depth) + (kChunk + kBlock) * a.depth / 2 + 2 * kChunk;
    const int64_t shared = a.latent ? (kChunk + kSharedTiles * rows) * a.value_depth() : 0;
    return std::max(dots, tiles) + shared + 16 * 32;
}

namespace {

constexpr int64_t kSlice =
    512;  // tokens that go through the list at once: their buffers stay in the processor's caches
constexpr int64_t kCommitted = int64_t(256) << 20;  // bytes of the caches that are mapped ahead of their use

}  // namespace

Program::Program(int threads, const std::string& isa)
    : Store(threads, isa), slice_(new Slice), experts_(new ExpertPlan) {
    for (int thread = 0; thread < pool_->size(); thread++)
        workers_.push_back(std::make_unique<Worker>(*this, thread, workers_));
}

Program::~Program() = default;

int Program::add_rope(Rope rope) {
    ropes_.push_back(std::move(rope));
    cos_sin_.emplace_back();
    return static_cast<int>(ropes_.size()) - 1;
}

int Program::add_layer(Attention layer, int sinks) {
    if (layer.source >= 0) {
        const Attention& of = layers_.at(static_cast<size_t>(layer.source));
        if (of.source >= 0 || of.kv_heads != layer.kv_heads || of.dim != layer.dim || of.latent != layer.latent)
            throw std::invalid_argument("a layer reads keys and values of heads like its own, which are in the cache");
    }
    if (sinks >= 0) {
        const std::vector<float>& values = norms_.at(static_cast<size_t>(sinks));
        if (static_cast<int64_t>(values.size()) != layer.heads) throw std::invalid_argument("every head has one sink");
        layer.sinks = values.data();
    }
    layers_.push_back(layer);
    return static_cast<int>(layers_.size()) - 1;
}

int Program::add_table(const Table& table) {
    tables_.push_back(table);
    return static_cast<int>(tables_.size()) - 1;
}

int Program::add_buffer(int64_t width) {
    widths_.push_back(width);
    buffers_.emplace_back();
    return static_cast<int>(widths_.size()) - 1;
}

void Program::add(Operation operation) {
    if (operation.code != OpCode::kHeads && operation.products.size() > kMostProducts)
        throw std::invalid_argument("one operation has at most " + std::to_string(kMostProducts) + " products");
    operations_.push_back(std::move(operation));
    costs_.emplace_back();
}

int64_t Program::make_caches(int64_t blocks, int64_t block_size, KvType type) {
    if (blocks < 1 || block_size < 1 || blocks > INT32_MAX) throw std::invalid_argument("a cache needs blocks");
    commit_.reset();
    caches_ = std::make_unique<Arena>();
    int64_t positions = blocks * block_size, extents = ceil_div(positions, kExtent), extent = 0, scales = 0;
    for (const Attention& a : layers_) {
        if (a.source >= 0) continue;
        const int64_t arrays = a.latent ? 1 : 2;
        extent += arrays * kExtent * a.kv_heads * a.depth * kv_bytes(type);
        if (type == KvType::kInt8) scales += arrays * positions * a.kv_heads * 4;
    }
    char* entries = caches_->take(extents * extent);
    char* scale = scales ? caches_->take(scales) : nullptr;
    commit_ = std::make_unique<Commit>(entries, std::min(extents * extent, kCommitted));
    for (Attention& a : layers_) {
        a.blocks = blocks;
        a.block_size = block_size;
        a.type = type;
        a.extent = extent;
        if (a.source >= 0) {
            const Attention& of = layers_[static_cast<size_t>(a.source)];
            a.keys = of.keys, a.values = of.values;
            a.key_scales = of.key_scales, a.value_scales = of.value_scales;
            continue;
        }
        for (char** array : {&a.keys, &a.values}) {
            if (a.latent && array == &a.values) continue;
            *array = entries;
            entries += kExtent * a.kv_heads * a.depth * kv_bytes(type);
        }
        for (float** array : {&a.key_scales, &a.value_scales}) {
            if (a.latent && array == &a.value_scales) continue;
            *array = reinterpret_cast<float*>(scale);
            if (scale) scale += positions * a.kv_heads * 4;
        }
        if (a.latent) a.values = a.keys, a.value_scales = a.key_scales;
    }
    return extents * extent + scales;
}

void Program::measure(bool on) {
    measured_ = on;
    costs_.assign(operations_.size(), Cost());
}

// Checks all numbers of a step that come from Python, before one of them is used as an index.
void Program::check(const Step& step) const {
    auto outside = [](const char* what, int64_t value, int64_t limit) {
        throw std::out_of_range(std::string(what) + " " + std::to_string(value) + " is not below " +
                                std::to_string(limit));
    };
    if (operations_.empty() || layers_.empty()) throw std::out_of_range("the program has no operations or no layers");
    const Attention& a = layers_.front();
    if (!a.keys) throw std::out_of_range("the program has no cache yet");
    int64_t vocabulary = 0, total = 0, slots = a.blocks * a.block_size;
    for (const Operation& op : operations_)
        if (op.code == OpCode::kEmbed) vocabulary = weights(op.products[0]).n;
    for (const Table& table : tables_) vocabulary = std::min(vocabulary, table.n);
    for (int64_t i = 0; i < step.count; i++) {
        if (step.tokens[i] < 0 || step.tokens[i] >= vocabulary) outside("token", step.tokens[i], vocabulary);
        if (step.slots[i] < 0 || step.slots[i] >= slots) outside("slot", step.slots[i], slots);
        if (step.positions[i] < 0 || step.positions[i] >= step.table_width * a.block_size)
            outside("position", step.positions[i], step.table_width * a.block_size);
    }
    for (int64_t row = 0; row < step.rows; row++) {
        if (step.lengths[row] < 1) outside("length", step.lengths[row], step.count + 1);
        int64_t first = total;
        if (step.lengths[row] > step.count - total)
            outside("sum of lengths", step.lengths[row], step.count - total + 1);
        total += step.lengths[row];
        for (int64_t i = first + 1; i < total; i++)
            if (step.positions[i] - 1 != step.positions[i - 1])
                throw std::out_of_range("the positions of a row must follow each other");
        int64_t blocks = step.positions[total - 1] / a.block_size + 1;
        for (int64_t i = 0; i < blocks; i++) {
            int64_t block = step.tables[row * step.table_width + i];
            if (block < 0 || block >= a.blocks) outside("block", block, a.blocks);
        }
    }
    if (total != step.count) throw std::out_of_range("the rows' lengths do not add up to the step's tokens");
    for (int64_t i = 1; i < step.wanted; i++)
        if (step.logits_at[i] < step.logits_at[i - 1])
            throw std::out_of_range("the tokens whose logits are wanted must ascend");
    for (int64_t i = 0; i < step.wanted; i++)
        if (step.logits_at[i] < 0 || step.logits_at[i] >= step.count)
            outside("logits of token", step.logits_at[i], step.count);
    if (step.until || step.images) check_images(step);
    if (!recurrent_.empty()) check_states(step);
    if (step.adapters) check_adapters(step);
}

void Program::check_images(const Step& step) const {
    for (int64_t i = 0; i < step.images; i++)
        if (step.image_at[i] >= step.count || step.image_at[i] < (i ? step.image_at[i - 1] + 1 : 0))
            throw std::out_of_range("the tokens of images must ascend and lie in the step");
    for (int64_t row = 0, at = 0; step.until && row < step.rows; at += step.lengths[row++]) {
        const int64_t last = step.positions[at + step.lengths[row] - 1];
        for (int64_t i = at; i < at + step.lengths[row]; i++)
            if (step.until[i] < step.positions[i] || step.until[i] > last)
                throw std::out_of_range("a token sees keys up to " + std::to_string(step.until[i]) +
                                        ", the row's last one is at " + std::to_string(last));
    }
}

void Program::slice_of(const Step& step, int64_t first, int64_t last) {
    Slice& s = *slice_;
    s.step = step;
    s.step.tokens += first;
    s.step.positions += first;
    s.step.slots += first;
    if (s.step.reach) s.step.reach += first;
    if (s.step.places) s.step.places += first;
    if (s.step.until) s.step.until += first;
    s.step.count = last - first;
    s.image_at.clear();
    s.step.image_first = std::lower_bound(step.image_at, step.image_at + step.images, first) - step.image_at;
    for (int64_t i = s.step.image_first; i < step.images && step.image_at[i] < last; i++)
        s.image_at.push_back(step.image_at[i] - first);
    s.step.image_at = s.image_at.data();
    s.save_at.clear();
    const int64_t saved = std::lower_bound(step.save_at, step.save_at + step.saves, first) - step.save_at;
    for (int64_t i = saved; i < step.saves && step.save_at[i] < last; i++) s.save_at.push_back(step.save_at[i] - first);
    s.step.save_at = s.save_at.data();
    s.step.save_to = step.save_to + saved;
    s.step.saves = static_cast<int64_t>(s.save_at.size());
    s.step.images = static_cast<int64_t>(s.image_at.size());
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
        bool same = layer && a.heads == layers_[0].heads && a.kv_heads == layers_[0].kv_heads &&
                    a.value_depth() == layers_[0].value_depth();
        if (same) continue;
        int64_t group = a.heads / a.kv_heads, rows = kernels_->query_rows,
                most = a.latent ? kSharedTiles * rows : ceil_div(kPieceTokens, rows) * rows * group;
        for (size_t row = 0; row < s.begins.size(); row++) {
            int64_t queries = s.lengths[row] * group;
            int64_t end =
                s.step.positions[s.begins[row] + s.lengths[row] - 1] + 1;  // `until` of a last token is itself
            int64_t chunks = s.lengths[row] == 1 ? ceil_div(end, kChunk) : 1;
            for (int64_t head = 0; head < a.kv_heads; head++) {
                if (chunks > 1) {
                    s.merges[layer].push_back({static_cast<int64_t>(row), head, 0, queries, chunks, room});
                    for (int64_t chunk = 0; chunk < chunks; chunk++, room += queries * (a.value_depth() + 2))
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
    wear(step);
}

void Program::reserve(int64_t rows, int64_t logit_rows) {
    bool gathered = false;
    std::vector<int64_t> needed(widths_.size(), 0);
    for (const Operation& op : operations_) {
        gathered |= op.code == OpCode::kGather;
        for (int buffer : {op.from, op.to, op.into})
            if (buffer >= 0)
                needed[static_cast<size_t>(buffer)] =
                    std::max(needed[static_cast<size_t>(buffer)], gathered && buffer == op.to ? logit_rows : rows);
    }
    for (size_t i = 0; i < buffers_.size(); i++) buffers_[i].reserve(needed[i] * widths_[i] + kLanes);
    int64_t bytes = 0, most = std::max(rows, logit_rows);
    for (const Weights& w : weights_) bytes = std::max(bytes, most * w.depth * input_bytes(w.format));
    inner_.reserve(bytes);
    InputSize all, alone;
    for (const Operation& op : operations_) {
        if (op.code != OpCode::kProduct) continue;
        InputSize of_all, of_alone;
        for (size_t i = 0; i < op.products.size(); i++)
            if (input_of(op, i) == i) {
                const Weights& w = weights(op.products[i]);
                of_all.add(w, most);
                of_alone.add(w, std::max<int64_t>(1, std::min(most, kAloneSize / w.depth)));
            }
        all.cover(of_all);
        alone.cover(of_alone);
    }
    all.reserve(input_, input_scales_, input_sums_);
    InputSize heads;
    for (const Operation& op : operations_) {
        if (op.code != OpCode::kHeads) continue;
        InputSize one;
        one.add(weights(op.products[0]), head_rows(weights(op.products[0]), most));
        heads.cover(one);
    }
    for (size_t rope = 0; rope < ropes_.size(); rope++)
        cos_sin_[rope].reserve(rows * 2 * static_cast<int64_t>(ropes_[rope].inverse.size()) + kLanes);
    int64_t scratch = 0;
    for (const Attention& a : layers_) scratch = std::max(scratch, attend_scratch(a));
    for (auto& worker : workers_) {
        worker->attention.reserve(scratch);
        worker->recurrence.reserve(state_scratch(rows));
        for (const Table& table : tables_) worker->opened.reserve(table.row.panel_bytes + table.row.k * 4);
        alone.reserve(worker->input, worker->input_scales, worker->input_sums);
        heads.reserve(worker->head_input, worker->head_scales, worker->head_sums);
    }
}

// The first of an operation's products that reads its input as product `i` does: they share one prepared input.
size_t Program::input_of(const Operation& op, size_t i) const {
    const Weights& w = weights(op.products[i]);
    for (size_t first = 0; first < i; first++)
        if (same_input(weights(op.products[first]), w) &&
            most_tile_rows(weights(op.products[first])) == most_tile_rows(w))
            return first;
    return i;
}

// Whether a gated product writes its result in the tiles that the next product reads, instead of the buffer.
bool Program::tiled(size_t operation) const {
    const Operation& op = operations_[operation];
    if (op.code != OpCode::kProduct || op.mode != Mode::kGate || operation + 1 >= operations_.size()) return false;
    const Operation& reader = operations_[operation + 1];
    if (reader.code != OpCode::kProduct || reader.from != op.to || reader.norm >= 0 || reader.to == op.to) return false;
    if (reader.products.size() > 1) return false;
    const Weights &w = weights(op.products[0]), &next = weights(reader.products[0]);
    if (next.format != Format::kBf16 || next.k != next.depth) return false;
    if (is_block(w.format) || most_tile_rows(w) != most_tile_rows(next)) return false;
    if (kernels_->lines && is_grouped(w.format)) return false;
    for (size_t i = operation + 2; i < operations_.size();
         i++) {  // no other operation reads the buffer before it is written anew
        const Operation& other = operations_[i];
        if (other.from == op.to) return false;
        if (other.to == op.to) return other.code == OpCode::kProduct && other.mode != Mode::kAdd;
    }
    return true;
}

// The end of the slice that begins at `first`. A slice holds all keys that its tokens see: where the usual border cuts
// an image whose tokens see each other, the slice ends in front of the image, or behind it if it is the first.
int64_t Program::slice_end(const Step& step, int64_t first) {
    const int64_t usual = std::min(step.count, first + kSlice);
    auto cuts = [&](int64_t end) { return step.until && step.until[end - 1] > step.positions[end - 1]; };
    int64_t end = usual;
    while (end > first && cuts(end)) end--;
    if (end == first)
        for (end = usual; cuts(end);) end++;
    return end;
}

void Program::run(const Step& step, Output output) {
    check(step);
    Commit::Use use(commit_.get());
    if (tiled_.size() != operations_.size()) {
        tiled_.clear();
        for (size_t i = 0; i < operations_.size(); i++) tiled_.push_back(static_cast<char>(tiled(i)));
    }
    int64_t columns = width(operations_.back().to), done = 0;
    for (int64_t first = 0, end; first < step.count; first = end) {
        end = slice_end(step, first);
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

void Program::decode(const DecodeBatch& batch, bool append, Output output) {
    if (layers_.empty() || !layers_.front().keys) throw std::out_of_range("the program has no cache yet");
    int64_t count = batch.count, block_size = layers_.front().block_size;
    decoding_.resize(static_cast<size_t>(batch.shift ? 8 * count : 5 * count));
    int64_t* tokens = decoding_.data();
    int64_t *positions = tokens + count, *slots = positions + count, *lengths = slots + count,
            *numbers = lengths + count, *places = numbers + count;
    for (int64_t row = 0; row < count; row++) {
        int64_t at = batch.computed[row];
        if (at < 0 || at >= batch.width || at / block_size >= batch.table_width || batch.known[row] != at + 1 ||
            (append && at + 1 >= batch.width))
            throw std::out_of_range("row " + std::to_string(row) + " does not decode at " + std::to_string(at));
        tokens[row] = batch.tokens[row * batch.width + at];
        positions[row] = at;
        slots[row] = batch.tables[row * batch.table_width + at / block_size] * block_size + at % block_size;
        lengths[row] = 1;
        numbers[row] = row;
        if (batch.shift) places[row] = places[count + row] = places[2 * count + row] = at + batch.shift[row];
    }
    Step step{tokens, positions, slots, lengths, batch.tables, numbers, count, count, batch.table_width, count};
    if (batch.shift) step.places = places, step.place_stride = count;
    step.states = batch.states;
    step.adapters = batch.adapters;
    run(step, output);
    for (int64_t row = 0; row < count; row++) {
        batch.computed[row]++;
        if (append)
            batch.tokens[row * batch.width + batch.known[row]++] =
                static_cast<int32_t>(std::max<int64_t>(0, output.best[row]));
    }
}

double Program::bytes_of(const Operation& op) const {
    const Slice& s = *slice_;
    double rows = static_cast<double>(s.step.count);
    if (op.code == OpCode::kProduct || op.code == OpCode::kHeads) {
        double total = 0;
        for (int product : op.products)
            total += static_cast<double>(weights(product).panels * weights(product).panel_bytes);
        return total;
    }
    if (op.code == OpCode::kAttend) {
        const Attention& a = layers_[static_cast<size_t>(op.layer)];
        double keys = 0;
        for (size_t row = 0; row < s.begins.size(); row++) {
            int64_t end = s.step.positions[s.begins[row] + s.lengths[row] - 1] + 1;
            keys += static_cast<double>(a.window && end > a.window ? a.window + s.lengths[row] - 1 : end);
        }
        return keys * static_cast<double>(a.kv_heads * a.depth * (a.latent ? 1 : 2) * kv_bytes(a.type));
    }
    if (op.code == OpCode::kMixture) {
        double total = 0;
        for (size_t e = 0; e < op.gate_up.size(); e++)
            if (experts_->begins[e + 1] > experts_->begins[e])
                for (int product : {op.gate_up[e], op.down[e]})
                    total += static_cast<double>(weights(product).panels * weights(product).panel_bytes);
        return total;
    }
    if (op.code == OpCode::kRecur)  // read and written
        return 8.0 * static_cast<double>(s.begins.size()) * static_cast<double>(state_floats(op.layer));
    if (op.code == OpCode::kAddTable)
        return rows * static_cast<double>(tables_[static_cast<size_t>(op.layer)].row_bytes);
    if (op.from < 0) return 0;
    return rows * static_cast<double>(width(op.from)) * 4;
}

double Program::operations_of(const Operation& op) const {
    const Slice& s = *slice_;
    bool gathered = false;
    for (const Operation& other : operations_) {
        if (&other == &op) break;
        gathered |= other.code == OpCode::kGather;
    }
    double rows = static_cast<double>(gathered ? s.step.wanted : s.step.count);
    if (op.code == OpCode::kProduct || op.code == OpCode::kHeads) {
        double total = 0;
        for (int product : op.products)
            total += static_cast<double>(weights(product).n) * static_cast<double>(weights(product).k);
        return 2.0 * rows * total;
    }
    if (op.code == OpCode::kMixture) {
        const Weights& gate = weights(op.gate_up[0]);
        const Weights& down = weights(op.down[0]);
        return 2.0 * rows * op.routing.chosen * static_cast<double>(gate.n * gate.k + down.n * down.k);
    }
    if (op.code == OpCode::kRecur) return rows * state_operations(op.layer);
    if (op.code == OpCode::kAttend) {
        const Attention& a = layers_[static_cast<size_t>(op.layer)];
        double pairs = 0;
        for (int64_t i = 0; i < s.step.count; i++) {
            int64_t seen = s.step.positions[i] + 1;
            pairs += static_cast<double>(a.window && seen > a.window ? a.window : seen);
        }
        return 2.0 * pairs * static_cast<double>(a.heads * (a.dim + a.value_dim()));
    }
    return 0;
}

}  // namespace inflight
