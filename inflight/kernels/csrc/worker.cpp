#include "worker.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace inflight {

namespace {

constexpr int64_t kUnitBytes = 65536;  // of weights, in one unit of work
constexpr int64_t kManyTiles = 8;      // row tiles of one unit of work
constexpr int64_t kMoreTiles = 16;     // the same on AMX, and where a chunk of the panel is opened for all of them

// Brings floats into the second-level cache ahead of their use.
void prefetch(const float* from, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i, 0, 2);
}

// Cosines and sines [half] each of a token at `position`, in a sequence that reaches as far as `reach`. Beyond the
// original length the frequencies are those of dynamic NTK, or `far_inverse`, where the rotation has such. `places`:
// the token's positions by axis, `stride` apart; null: `position` on all axes.
void rope_cos_sin(const Rope& rope, int64_t position, int64_t reach, const int64_t* places, int64_t stride,
                  float* out) {
    const int64_t half = static_cast<int64_t>(rope.inverse.size());
    const bool beyond = reach > rope.original, dynamic = rope.stretch > 0 && beyond;
    const std::vector<float>& stored = beyond && !rope.far_inverse.empty() ? rope.far_inverse : rope.inverse;
    const double dim = static_cast<double>(2 * half);
    double base = 0;
    if (dynamic) {
        double grown =
            rope.stretch * static_cast<double>(reach) / static_cast<double>(rope.original) - (rope.stretch - 1);
        base = rope.theta * std::pow(grown, dim / std::max(dim - 2, 1e-9));
    }
    for (int64_t j = 0; j < half; j++) {
        const float inverse = dynamic ? static_cast<float>(1.0 / std::pow(base, static_cast<double>(2 * j) / dim))
                                      : stored[static_cast<size_t>(j)];
        const int64_t at = places ? places[rope.axes[static_cast<size_t>(j)] * stride] : position;
        const float angle = static_cast<float>(at) * inverse;
        out[j] = std::cos(angle) * rope.factor;
        out[half + j] = std::sin(angle) * rope.factor;
    }
}

// What queries at a position are multiplied with, see Operation::growth.
float growth_at(const Operation& op, int64_t position) {
    if (!op.period || position < op.period) return 1.0f;
    return 1.0f + op.growth * std::log(1.0f + static_cast<float>(position / op.period));
}

}  // namespace

void Program::Worker::run() {
    using Clock = std::chrono::steady_clock;
    auto began = Clock::now();
    int64_t rows = slice().step.count;
    if (!program.ropes_.empty()) cos_sin();
    for (size_t i = 0; i < program.operations_.size(); i++) {
        const Operation& op = program.operations_[i];
        switch (op.code) {
            case OpCode::kEmbed: embed(op); break;
            case OpCode::kProduct: product(i, rows); break;
            case OpCode::kRotate: rotate(op); break;
            case OpCode::kAttend: attend(op); break;
            case OpCode::kNorm: norm(op, rows); break;
            case OpCode::kGather:
                gather(op);
                rows = slice().step.wanted;
                break;
            case OpCode::kCap:
                each(rows, [&](int64_t row) {
                    kernels().cap(buffer(op.to) + row * width(op.to), width(op.to), op.scale, op.softcap);
                });
                break;
            case OpCode::kMixture: mixture(op); break;
            case OpCode::kAddRows: add_rows(op); break;
            case OpCode::kRecur: recur(op); break;
            case OpCode::kOutputGate: output_gate(op); break;
            case OpCode::kScale: scale(op); break;
            case OpCode::kAddTable: add_table(op); break;
            case OpCode::kGateBy: gate_by(op); break;
            case OpCode::kHeads: multiply_heads(op); break;
            case OpCode::kLatent: store_latent(op); break;
            case OpCode::kXielu: xielu(op); break;
            case OpCode::kEndUnwanted:
                if (!slice().step.wanted) return;
                break;
            case OpCode::kGate:
                each(rows, [&](int64_t row) {
                    const int64_t columns = width(op.to);
                    const float* wide = buffer(op.from) + row * width(op.from);
                    kernels().gate(op.act, wide, op.scale, wide + columns, columns, buffer(op.to) + row * columns);
                });
                break;
        }
        if (op.code == OpCode::kGather && !rows) return;  // a chunk of a prompt: what follows is not wanted
        if (program.measured_ && thread == 0) {
            auto now = Clock::now();
            Cost& cost = program.costs_[i];
            cost.seconds += std::chrono::duration<double>(now - began).count();
            cost.bytes += program.bytes_of(op);
            cost.operations += program.operations_of(op);
            began = now;
        }
    }
    write_output();
}

// Copies the rows whose logits are wanted to the caller's memory, and finds the largest of each.
void Program::Worker::write_output() {
    const Output& out = slice().output;
    int last = program.operations_.back().to;
    int64_t columns = width(last);
    each(slice().step.wanted, [&](int64_t row) {
        const float* logits = buffer(last) + row * columns;
        std::memcpy(out.logits + row * columns, logits, static_cast<size_t>(columns) * 4);
        out.best[row] = kernels().argmax(logits, columns);
        if (!out.hidden) return;
        int64_t hidden = width(out.hidden_buffer);
        std::memcpy(out.hidden + row * hidden, buffer(out.hidden_buffer) + row * hidden,
                    static_cast<size_t>(hidden) * 4);
    });
}

// Cosines and sines of every token's angles, for each rotation of the program.
void Program::Worker::cos_sin() {
    constexpr int64_t unit_tokens = 16;
    const Step& step = slice().step;
    each(ceil_div(step.count, unit_tokens), [&](int64_t unit) {
        const int64_t begin = unit * unit_tokens, end = std::min(step.count, begin + unit_tokens);
        for (size_t number = 0; number < program.ropes_.size(); number++) {
            const Rope& rope = program.ropes_[number];
            const int64_t half = static_cast<int64_t>(rope.inverse.size());
            const int64_t* places = rope.axes.empty() ? nullptr : step.places;
            for (int64_t i = begin; i < end; i++) {
                const int64_t reach = step.reach ? step.reach[i] : step.positions[i] + 1;
                rope_cos_sin(rope, step.positions[i], reach, places ? places + i : nullptr, step.place_stride,
                             program.cos_sin_[number].get() + i * 2 * half);
            }
        }
    });
}

void Program::Worker::embed(const Operation& op) {
    const Step& step = slice().step;
    const int64_t *first = step.image_at, *last = first + step.images;
    const int64_t columns = width(op.to);
    each(step.count, [&](int64_t row) {
        float* out = buffer(op.to) + row * columns;
        const int64_t* found = std::lower_bound(first, last, row);
        if (found == last || *found != row)
            return kernels().unpack(program.weights(op.products[0]), step.tokens[row], op.scale, out);
        std::memcpy(out, step.image_rows + (step.image_first + (found - first)) * columns,
                    static_cast<size_t>(columns) * 4);
    });
}

// Adds an image's features to the hidden states of its tokens.
void Program::Worker::add_rows(const Operation& op) {
    const Step& step = slice().step;
    if (!step.images || op.layer >= step.added_layers) return;
    const int64_t columns = width(op.to);
    const float* rows = step.added[op.layer] + step.image_first * columns;
    each(step.images, [&](int64_t i) {
        kernels().axpy(buffer(op.to) + step.image_at[i] * columns, rows + i * columns, 1.0f, columns);
    });
}

// How one operation's products are divided: what they read, and their units of work.
struct Program::Worker::ProductPlan {
    // One product: `units` pieces of `panels` panels by `band_tiles` tiles of rows.
    struct Share {
        const Weights* w;
        Input in;
        size_t reads;    // the first product of the operation that reads its input as this one does
        int64_t column;  // of `to`, where its outputs begin
        int64_t panels, bands, band_tiles, units;
    };
    Share shares[kMostProducts];
    size_t count;
    bool tiled;          // the product before has written the input as it is read here
    bool alone;          // every thread prepares the input for itself
    int64_t inputs = 0;  // tiles to prepare
    int64_t units = 0;
};

Program::Worker::ProductPlan Program::Worker::plan_products(size_t number, int64_t rows) {
    const Operation& op = program.operations_[number];
    ProductPlan plan;
    plan.count = op.products.size();
    int64_t widest = 0, column = 0;
    for (int product : op.products) widest = std::max(widest, program.weights(product).depth);
    plan.tiled = number && tiles(number - 1);
    plan.alone = !plan.tiled && (rows * widest <= kAloneSize || (rows == 1 && threads <= 4));
    InputSize taken;
    for (size_t i = 0; i < plan.count; i++) {
        const Weights& w = program.weights(op.products[i]);
        ProductPlan::Share& share = plan.shares[i];
        share.w = &w;
        share.reads = program.input_of(op, i);
        if (share.reads < i) {
            share.in = plan.shares[share.reads].in;
        } else {
            share.in = {(plan.alone ? input : program.input_).get() + taken.bytes,
                        (plan.alone ? input_scales : program.input_scales_).get() + taken.scales,
                        (plan.alone ? input_sums : program.input_sums_).get() + taken.sums, rows,
                        ceil_div(rows, program.most_tile_rows(w))};
            taken.add(w, rows);
            plan.inputs += share.in.tiles;
        }
        if (plan.tiled) share.in.data = program.inner_.get();
        share.column = column;
        column += w.n;
        share.bands = ceil_div(share.in.tiles, kernels().lines || is_block(w.format) ? kMoreTiles : kManyTiles);
        share.band_tiles = ceil_div(share.in.tiles, std::max<int64_t>(1, share.bands));
        // Units of about 64 KiB of weights: long enough to stream, short enough to end together.
        share.panels = std::max<int64_t>(1, std::min<int64_t>(kUnitBytes / w.panel_bytes, w.panels / (4 * threads)));
        share.units = ceil_div(w.panels, share.panels) * share.bands;
        plan.units += share.units;
    }
    return plan;
}

// One or more products of one input. Products that read their input alike share one prepared input; the units of work
// of all of them are one pool.
void Program::Worker::product(size_t number, int64_t rows) {
    const Operation& op = program.operations_[number];
    const float* from = buffer(op.from);
    const Norm norm = norm_of(op.norm, op);
    const ProductPlan plan = plan_products(number, rows);
    auto prepare = [&](int64_t unit) {
        size_t i = 0;
        for (; plan.shares[i].reads < i || unit >= plan.shares[i].in.tiles; i++)
            if (plan.shares[i].reads == i) unit -= plan.shares[i].in.tiles;
        const ProductPlan::Share& share = plan.shares[i];
        const float* x[kMostRows];
        const int64_t start = share.in.start(unit), end = share.in.start(unit + 1);
        for (int64_t row = start; row < end; row++) x[row - start] = from + row * share.w->k;
        kernels().prepare(*share.w, x, norm, share.in, unit);
    };
    if (plan.alone)
        for (int64_t unit = 0; unit < plan.inputs; unit++) prepare(unit);
    else if (!plan.tiled)
        each(plan.inputs, prepare);
    char* inner = tiles(number) ? program.inner_.get() : nullptr;
    const bool low = lowered(number), apart = low && op.mode == Mode::kGate;
    each(plan.units + (low ? shrink_units(number) : 0), [&](int64_t unit) {
        if (unit >= plan.units) return shrink(number, unit - plan.units);
        const ProductPlan::Share* share = plan.shares;
        for (; unit >= share->units; share++) unit -= share->units;
        const Weights& w = *share->w;
        // Where there are bands for all threads, each keeps to its rows: what these read and write stays in its own
        // cache from product to product. Else the units of a panel follow each other, and it is read once.
        const int64_t bands = share->bands, strips = share->units / bands;
        const bool own = bands <= threads;
        const int64_t panel = (own ? unit % strips : unit / bands) * share->panels,
                      tile = (own ? unit / strips : unit % bands) * share->band_tiles;
        const int64_t last = std::min(w.panels, panel + share->panels),
                      last_tile = std::min(share->in.tiles, tile + share->band_tiles);
        if (apart) {  // the activation waits for the adapters
            Weights whole = w;
            whole.gated = false;
            whole.n = w.panels * kPanel;
            return kernels().product(whole, share->in, panel, last, tile, last_tile,
                                     {program.low_wide_.get(), whole.n, Mode::kStore, op.act, 1.0f, nullptr});
        }
        Target target{buffer(op.to) + share->column, width(op.to), op.mode, op.act, op.scale, inner};
        kernels().product(w, share->in, panel, last, tile, last_tile, target);
    });
    if (low) expand(number, rows);
}

void Program::Worker::rotate(const Operation& op) {
    const Attention& a = program.layers_[static_cast<size_t>(op.layer)];
    const Step& step = slice().step;
    const Norm queries = norm_of(op.norm, op), keys = norm_of(op.second, op), values = norm_of(op.third, op);
    const size_t rope = static_cast<size_t>(op.rope);
    const int64_t group = a.heads / a.kv_heads;
    const int64_t half = op.rope < 0 ? 0 : static_cast<int64_t>(program.ropes_[rope].inverse.size());
    each(step.count * a.kv_heads, [&](int64_t unit) {
        int64_t i = unit / a.kv_heads, head = unit % a.kv_heads;
        float* all = buffer(op.to) + i * width(op.to);
        if (!head && i + 1 < step.count) prefetch(all + width(op.to), width(op.to));
        const float* cos = half ? program.cos_sin_[rope].get() + i * 2 * half : nullptr;
        auto turn = [&](float* x, const Norm& norm) {
            const Norm none{nullptr, 0.0f, false};
            kernels().rotate(x, a.dim, op.rotated ? none : norm, cos, cos + half, 2 * half);
            if (op.rotated && norm.weight) kernels().norm(x, a.dim, norm, false, 1.0f, x);
        };
        const float grown = growth_at(op, step.positions[i]);
        for (int64_t g = 0; g < group; g++) {
            float* query = all + (head * group + g) * a.dim;
            turn(query, queries);
            for (int64_t d = 0; d < a.dim && grown != 1.0f; d++) query[d] *= grown;
        }
        if (a.source >= 0) return;
        float *key = all + (a.heads + head) * a.dim, *value = key + a.kv_heads * a.dim;
        turn(key, keys);
        if (values.weight) kernels().norm(value, a.dim, values, false, 1.0f, value);
        kernels().store_kv(a, key, value, head, step.slots[i]);
    });
}

Keys Program::Worker::keys_of(const Attention& a, const Task& task) const {
    const Slice& s = slice();
    const size_t row = static_cast<size_t>(task.row);
    const int64_t end = s.step.positions[s.begins[row]] + 1;
    int64_t begin = std::max<int64_t>(task.chunk, 0) * kChunk;
    if (a.window) begin = std::max(begin, (end - a.window) / kBlock * kBlock);
    return Keys{s.step.tables + s.tables[row] * s.step.table_width, task.kv_head, begin, end};
}

void Program::Worker::attend(const Operation& op) {
    const Slice& s = slice();
    const Attention& a = program.layers_[static_cast<size_t>(op.layer)];
    const std::vector<Task>& own = s.tasks[static_cast<size_t>(op.layer)];
    const std::vector<Task>& tasks = own.empty() ? s.tasks[0] : own;
    const std::vector<Task>& merges = own.empty() ? s.merges[0] : s.merges[static_cast<size_t>(op.layer)];
    const int64_t group = a.heads / a.kv_heads, from_width = width(op.from), to_width = width(op.to);
    const int64_t each_partial = a.value_depth() + 2;
    float* partial = program.partial_.get();
    auto begin_of = [&](const Task& task) { return s.begins[static_cast<size_t>(task.row)]; };
    auto queries_of = [&](const Task& task) {
        return buffer(op.from) + begin_of(task) * from_width + task.kv_head * group * a.dim;
    };
    auto out_of = [&](const Task& task) {
        return buffer(op.to) + begin_of(task) * to_width + task.kv_head * group * a.value_dim();
    };
    each(static_cast<int64_t>(tasks.size()), [&](int64_t unit) {
        const Task& task = tasks[static_cast<size_t>(unit)];
        Queries q;
        q.q = queries_of(task);
        q.q_stride = from_width;
        q.positions = s.step.positions + begin_of(task);
        q.until = s.step.until && !a.causal ? s.step.until + begin_of(task) : nullptr;
        q.first = task.first;
        q.count = task.count;
        q.kv_head = task.kv_head;
        q.table = s.step.tables + s.tables[static_cast<size_t>(task.row)] * s.step.table_width;
        q.chunk = task.chunk;
        q.out = task.chunk < 0 ? out_of(task) : partial + task.partial;
        q.out_stride = to_width;
        q.next = Keys{};
        if (static_cast<size_t>(unit) + 1 < tasks.size()) {
            const Task& next = tasks[static_cast<size_t>(unit) + 1];
            q.next = keys_of(a, next);
            for (int64_t token = next.first / group; token <= (next.first + next.count - 1) / group; token++)
                prefetch(queries_of(next) + token * from_width, group * a.dim);
        }
        kernels().attend(a, q, attention.get());
    });
    if (merges.empty()) return;
    each(static_cast<int64_t>(merges.size()), [&](int64_t unit) {
        const Task& task = merges[static_cast<size_t>(unit)];
        for (int64_t g = 0; g < group; g++) {
            const float* first = partial + task.partial + g * each_partial;
            kernels().merge(a, task.kv_head * group + g, &first, task.count * each_partial, task.chunk,
                            out_of(task) + g * a.value_dim());
        }
    });
}

// to *= σ of columns of `from`; by one column where it has no more.
void Program::Worker::output_gate(const Operation& op) {
    const int64_t columns = width(op.to), from_width = width(op.from);
    each(slice().step.count, [&](int64_t row) {
        kernels().output_gate(buffer(op.from) + row * from_width + op.column, from_width - op.column == 1, columns,
                              buffer(op.to) + row * columns);
    });
}

// The norm of as many columns as it has weights.
void Program::Worker::norm(const Operation& op, int64_t rows) {
    const Norm norm = norm_of(op.norm, op);
    const int64_t columns = static_cast<int64_t>(program.norms_[static_cast<size_t>(op.norm)].size());
    each(rows, [&](int64_t row) {
        const float* from = buffer(op.from) + row * width(op.from) + op.column;
        float* to = buffer(op.to) + row * width(op.to) + op.column;
        if (op.layered) return kernels().layer_norm(from, columns, norm.weight, nullptr, norm.eps, to);
        kernels().norm(from, columns, norm, op.mode == Mode::kAdd, op.scale, to);
    });
}

void Program::Worker::gather(const Operation& op) {
    Norm norm = norm_of(op.norm, op);
    int64_t columns = width(op.to);
    const Step& step = slice().step;
    each(step.wanted, [&](int64_t row) {
        const float* from = buffer(op.from) + step.logits_at[row] * columns;
        float* to = buffer(op.to) + row * columns;
        if (op.layered) return kernels().layer_norm(from, columns, norm.weight, nullptr, norm.eps, to);
        kernels().norm(from, columns, norm, false, 1.0f, to);
    });
}

// A mixture of experts in five stages: each token's experts are chosen, the tokens are grouped by expert, then come the
// experts' first products with the activation, their second products, and the weighted sum of each token's results.
void Program::Worker::mixture(const Operation& op) {
    ExpertPlan& plan = *program.experts_;
    const int64_t rows = slice().step.count, hidden = width(op.from);
    const size_t chosen = static_cast<size_t>(op.routing.chosen);
    const Weights& gate = program.weights(op.gate_up[0]);
    const Weights& down = program.weights(op.down[0]);
    if (thread == 0) plan.reserve_choices(static_cast<size_t>(rows) * chosen);
    program.pool_->barrier();
    each(rows, [&](int64_t row) { choose_experts(op, row); });
    if (thread == 0) group_by_expert(op);
    program.pool_->barrier();
    float *x = buffer(op.from), *sum = op.into < 0 ? x : buffer(op.into);
    prepare_experts(gate, plan.inputs, norm_of(op.norm, op),
                    [&](int64_t place) { return x + plan.tokens[static_cast<size_t>(place)] * hidden; });
    multiply_experts(op, op.gate_up, plan.inputs, plan.inner.get(), down.k, op.gated ? Mode::kGate : Mode::kActivate);
    prepare_experts(down, plan.inner_inputs, Norm{nullptr, 0.0f, false},
                    [&](int64_t place) { return plan.inner.get() + place * down.k; });
    multiply_experts(op, op.down, plan.inner_inputs, plan.out.get(), hidden, Mode::kStore);
    each(rows, [&](int64_t row) {
        if (op.into >= 0) std::memset(sum + row * hidden, 0, static_cast<size_t>(hidden) * 4);
        for (size_t c = 0; c < chosen; c++) {
            const size_t i = static_cast<size_t>(row) * chosen + c;
            kernels().axpy(sum + row * hidden, plan.out.get() + plan.place[i] * hidden, plan.probs[i] * op.scale,
                           hidden);
        }
    });
}

void Program::Worker::choose_experts(const Operation& op, int64_t row) {
    ExpertPlan& plan = *program.experts_;
    const Routing& r = op.routing;
    const size_t first = static_cast<size_t>(row) * static_cast<size_t>(r.chosen);
    const float* bias = r.bias < 0 ? nullptr : program.norms_[static_cast<size_t>(r.bias)].data();
    inflight::choose_experts(r, buffer(op.to) + row * width(op.to), op.gate_up.size(), bias, plan.chosen.data() + first,
                             plan.probs.data() + first);
    if (op.third < 0) return;
    const std::vector<float>& factors = program.norms_[static_cast<size_t>(op.third)];
    for (size_t c = first; c < first + static_cast<size_t>(r.chosen); c++)
        plan.probs[c] *= factors[static_cast<size_t>(plan.chosen[c])];
}

// Where each chosen (row, expert) lies in the experts' buffers, one expert's rows after the other's, and these buffers.
// A counting sort: rows of one expert keep their order.
void Program::Worker::group_by_expert(const Operation& op) {
    ExpertPlan& plan = *program.experts_;
    const size_t experts = op.gate_up.size(), chosen = static_cast<size_t>(op.routing.chosen);
    plan.begins.assign(experts + 1, 0);
    for (int expert : plan.chosen) plan.begins[static_cast<size_t>(expert) + 1]++;
    for (size_t e = 0; e < experts; e++) plan.begins[e + 1] += plan.begins[e];
    std::vector<int64_t> next(plan.begins.begin(), plan.begins.end() - 1);
    plan.tokens.resize(plan.chosen.size());
    for (size_t i = 0; i < plan.chosen.size(); i++) {
        plan.place[i] = next[static_cast<size_t>(plan.chosen[i])]++;
        plan.tokens[static_cast<size_t>(plan.place[i])] = static_cast<int64_t>(i / chosen);
    }
    const Weights& down = program.weights(op.down[0]);
    plan.inputs.lay_out(program.weights(op.gate_up[0]), plan.begins, program);
    plan.inner_inputs.lay_out(down, plan.begins, program);
    const int64_t rows = static_cast<int64_t>(plan.chosen.size());
    plan.inner.reserve(rows * down.k + kLanes);
    plan.out.reserve(rows * width(op.from) + kLanes);
}

void Program::ExpertInputs::lay_out(const Weights& w, const std::vector<int64_t>& begins, const Program& program) {
    const int64_t rows = begins.back(), row_bytes = w.depth * input_bytes(w.format);
    data.reserve(rows * row_bytes);
    scales.reserve(rows * w.input_scales());
    sums.reserve(rows * w.groups());
    of.clear();
    for (size_t e = 0; e + 1 < begins.size(); e++) {
        const int64_t begin = begins[e], count = begins[e + 1] - begin;
        of.push_back({data.get() + begin * row_bytes, scales.get() + begin * w.input_scales(),
                      sums.get() + begin * w.groups(), count, ceil_div(count, program.most_tile_rows(w))});
    }
}

// The inputs of all experts' products, which read as `w` does. `row_at` gives the row that lies at a place.
template <class RowAt>
void Program::Worker::prepare_experts(const Weights& w, const ExpertInputs& inputs, Norm norm, RowAt row_at) {
    const std::vector<int64_t>& begins = program.experts_->begins;
    int64_t tiles = 0;
    for (const Input& in : inputs.of) tiles += in.tiles;
    each(tiles, [&](int64_t tile) {
        size_t e = 0;
        while (tile >= inputs.of[e].tiles) tile -= inputs.of[e++].tiles;
        const Input& in = inputs.of[e];
        const int64_t start = in.start(tile), end = in.start(tile + 1);
        const float* x[kMostRows];
        for (int64_t row = start; row < end; row++) x[row - start] = row_at(begins[e] + row);
        kernels().prepare(w, x, norm, in, tile);
    });
}

// One product of each expert, all of one shape, into the rows of `out` that are its own.
void Program::Worker::multiply_experts(const Operation& op, const std::vector<int>& products,
                                       const ExpertInputs& inputs, float* out, int64_t stride, Mode mode) {
    const std::vector<int64_t>& begins = program.experts_->begins;
    const Weights& shape = program.weights(products[0]);
    const int64_t panels = std::max<int64_t>(1, kUnitBytes / shape.panel_bytes),
                  strips = ceil_div(shape.panels, panels);
    each(static_cast<int64_t>(products.size()) * strips, [&](int64_t unit) {
        const size_t e = static_cast<size_t>(unit / strips);
        const Input& in = inputs.of[e];
        if (!in.rows) return;
        const Weights& w = program.weights(products[e]);
        const int64_t first = unit % strips * panels;
        kernels().product(w, in, first, std::min(w.panels, first + panels), 0, in.tiles,
                          {out + begins[e] * stride, stride, mode, op.act, 1.0f, nullptr});
    });
}

}  // namespace inflight
