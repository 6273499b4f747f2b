#include "worker.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace inflight {

namespace {

constexpr int kMostRows = 16;      // of a tile, on any instruction set
constexpr int64_t kManyTiles = 8;  // row tiles of one unit of work
constexpr int64_t kManyBlockTiles = 16;  // the same where a chunk of the panel is opened for all of them

// Into the second-level cache, before somebody waits for it.
void fetch(const float* from, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i, 0, 2);
}

// Cosines and sines of a token within a sequence of length `reach` beyond the original one: dynamic NTK.
void stretch(const Rope& rope, int64_t position, int64_t reach, float* out) {
    int64_t half = static_cast<int64_t>(rope.inverse.size());
    double dim = static_cast<double>(2 * half);
    double grown = rope.stretch * static_cast<double>(reach) / static_cast<double>(rope.original) - (rope.stretch - 1);
    double base = rope.theta * std::pow(grown, dim / std::max(dim - 2, 1e-9));
    for (int64_t j = 0; j < half; j++) {
        float inverse = static_cast<float>(1.0 / std::pow(base, static_cast<double>(2 * j) / dim));
        float angle = static_cast<float>(position) * inverse;
        out[j] = std::cos(angle) * rope.factor;
        out[half + j] = std::sin(angle) * rope.factor;
    }
}

}  // namespace

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
            case Code::kGate:
                each(rows, [&](int64_t row) {
                    kernels().gate(op.act, buffer(op.from) + row * width(op.from), width(op.to), buffer(op.to) + row * width(op.to));
                });
                break;
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
                int64_t reach = step.reach ? step.reach[i] : step.positions[i] + 1;
                if (rope.stretch > 0 && reach > rope.original) {
                    stretch(rope, step.positions[i], reach, out);
                    continue;
                }
                bool far = !rope.far_inverse.empty() && reach > rope.original;
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
        kernels().unpack(program.weights(op.products[0]), step.tokens[row], op.scale, buffer(op.to) + row * width(op.to));
    });
}

// One or more products of one input. What they read is prepared once for all that read alike; their units of work are one
// pool.
void Program::Worker::product(size_t number, int64_t rows) {
    const Operation& op = program.operations_[number];
    const float* from = buffer(op.from);
    Norm norm = norm_of(op.norm, op);
    struct Piece {
        const Weights* w;
        Input in;
        int64_t column, panels, bands, per_band, units;
    };
    Piece pieces[kMostProducts];
    size_t count = op.products.size();
    int64_t column = 0, widest = 0, units = 0;
    for (int product : op.products) widest = std::max(widest, program.weights(product).depth);
    bool written = number && program.tiled_[number - 1];
    bool alone = !written && (rows * widest <= kAloneSize || (rows == 1 && threads <= 4));
    Room taken;
    for (size_t i = 0; i < count; i++) {
        const Weights& w = program.weights(op.products[i]);
        size_t first = program.input_of(op, i);
        Piece& piece = pieces[i];
        piece.w = &w;
        if (first < i) {
            piece.in = pieces[first].in;
        } else {
            piece.in = {(alone ? input : program.input_).get() + taken.bytes,
                        (alone ? input_scales : program.input_scales_).get() + taken.scales,
                        (alone ? input_sums : program.input_sums_).get() + taken.sums, rows,
                        ceil_div(rows, program.most_tile_rows(w))};
            taken.add(w, rows);
        }
        if (written) piece.in.data = program.inner_.get();
        int64_t tiles = piece.in.tiles;
        piece.column = column;
        column += w.n;
        piece.bands = ceil_div(tiles, is_block(w.format) ? kManyBlockTiles : kManyTiles);
        piece.per_band = ceil_div(tiles, std::max<int64_t>(1, piece.bands));
        // Units of about 64 KiB of weights: long enough to stream, short enough to end together.
        piece.panels = std::max<int64_t>(1, std::min<int64_t>(65536 / w.panel_bytes, w.panels / (4 * threads)));
        piece.units = ceil_div(w.panels, piece.panels) * piece.bands;
        units += piece.units;
    }
    auto prepare = [&](int64_t unit) {
        size_t i = 0;
        for (; program.input_of(op, i) < i || unit >= pieces[i].in.tiles; i++)
            if (program.input_of(op, i) == i) unit -= pieces[i].in.tiles;
        const Piece& piece = pieces[i];
        const float* x[kMostRows];
        for (int64_t row = piece.in.start(unit); row < piece.in.start(unit + 1); row++)
            x[row - piece.in.start(unit)] = from + row * piece.w->k;
        kernels().prepare(*piece.w, x, norm, piece.in, unit);
    };
    int64_t inputs = 0;
    for (size_t i = 0; i < count; i++)
        if (program.input_of(op, i) == i) inputs += pieces[i].in.tiles;
    if (alone)
        for (int64_t unit = 0; unit < inputs; unit++) prepare(unit);
    else if (!written)
        each(inputs, prepare);
    char* tiles = program.tiled_[number] ? program.inner_.get() : nullptr;
    each(units, [&](int64_t unit) {
        const Piece* piece = pieces;
        for (; unit >= piece->units; piece++) unit -= piece->units;
        int64_t strip = unit / piece->bands, band = unit % piece->bands;
        Target target{buffer(op.to) + piece->column, width(op.to), op.mode, op.act, op.scale, tiles};
        kernels().product(*piece->w, piece->in, strip * piece->panels, std::min(piece->w->panels, (strip + 1) * piece->panels),
                          band * piece->per_band, std::min(piece->in.tiles, (band + 1) * piece->per_band), target);
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
        if (!head && i + 1 < step.count) fetch(all + width(op.to), width(op.to));
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
    auto queries_of = [&](const Task& task) {
        return buffer(op.from) + s.begins[static_cast<size_t>(task.row)] * width(op.from) + task.kv_head * group * a.dim;
    };
    each(static_cast<int64_t>(tasks.size()), [&](int64_t unit) {
        const Task& task = tasks[static_cast<size_t>(unit)];
        size_t row = static_cast<size_t>(task.row);
        int64_t begin = s.begins[row];
        Queries q;
        q.q = queries_of(task);
        q.q_stride = width(op.from);
        q.positions = s.step.positions + begin;
        q.first = task.first;
        q.count = task.count;
        q.kv_head = task.kv_head;
        q.table = s.step.tables + s.tables[row] * s.step.table_width;
        q.chunk = task.chunk;
        q.out = task.chunk < 0 ? out + begin * width(op.to) + task.kv_head * group * a.dim : partial + task.partial;
        q.out_stride = width(op.to);
        q.next = Keys{};
        if (static_cast<size_t>(unit) + 1 < tasks.size()) {
            const Task& next = tasks[static_cast<size_t>(unit) + 1];
            q.next = keys_of(next);
            for (int64_t token = next.first / group; token <= (next.first + next.count - 1) / group; token++)
                fetch(queries_of(next) + token * width(op.from), group * a.dim);
        }
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
            scales.reserve(all * w.input_scales());
            sums.reserve(all * w.groups());
            inputs.clear();
            for (size_t e = 0; e < experts; e++) {
                int64_t begin = r.begins[e], count = r.begins[e + 1] - begin;
                inputs.push_back({data.get() + begin * w.depth * input_bytes(w.format), scales.get() + begin * w.input_scales(),
                                  sums.get() + begin * w.groups(), count,
                                  ceil_div(count, program.most_tile_rows(w))});
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
