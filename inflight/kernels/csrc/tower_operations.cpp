// What the threads of a run do in each operation of a Tower.
#include <algorithm>
#include <cstring>

#include "tower_thread.h"

namespace inflight {

namespace {

constexpr int64_t kUnitBytes = 65536;    // of weights, in one unit of work
constexpr int64_t kUnitTiles = 8;        // of rows, in one unit of work, at least
constexpr int64_t kBandBytes = 1 << 20;  // of a product's input: half of a second-level cache

}  // namespace

void Tower::Thread::carry_out(size_t number) {
    const TowerOperation& op = tower.operations_[number];
    const int64_t columns = width(op.to);
    switch (op.code) {
        case TowerCode::kInput:
            each(rows_of(op.to), [&](int64_t row) {
                const float* from = tower.run_->arrays[static_cast<size_t>(op.number)] + row * columns;
                std::memcpy(buffer(op.to) + row * columns, from, static_cast<size_t>(columns) * 4);
            });
            break;
        case TowerCode::kProduct: product(number); break;
        case TowerCode::kNorm:
            each(rows_of(op.to), [&](int64_t row) {
                normed(op.norm, buffer(op.from) + row * columns, columns, buffer(op.to) + row * columns,
                       op.mode == Mode::kAdd);
            });
            break;
        case TowerCode::kRotate: rotate(op); break;
        case TowerCode::kAttend: attend(op); break;
        case TowerCode::kGather:
        case TowerCode::kAverage: gather(op); break;
        case TowerCode::kAdjust: adjust(op); break;
        case TowerCode::kGate:
            each(rows_of(op.to), [&](int64_t row) {
                const float* from = buffer(op.from) + row * 2 * columns;
                kernels().gate(op.act, from, 1.0f, from + columns, columns, buffer(op.to) + row * columns);
            });
            break;
    }
}

// Only an RMSNorm is added.
void Tower::Thread::normed(const TowerNorm& norm, const float* x, int64_t n, float* out, bool add) const {
    if (norm.bias >= 0)
        kernels().layer_norm(x, n, norm_weight(norm.weight), norm_weight(norm.bias), norm.eps, out);
    else
        kernels().norm(x, n, {norm_weight(norm.weight), norm.eps, false}, add, 1.0f, out);
}

// A tile's rows are normed in memory of the thread, from where they are rounded.
void Tower::Thread::prepare(const TowerOperation& op, const Weights& w, const Input& in, int64_t tile, int64_t column) {
    const float* x[kMostTileRows];
    const int64_t start = in.start(tile), end = in.start(tile + 1), stride = ceil_div(w.k, kLanes) * kLanes;
    for (int64_t row = start; row < end; row++) {
        const float* from = buffer(op.from) + row * width(op.from) + column;
        float* at = rows.get() + (row - start) * stride;
        if (op.norm.weight >= 0) {
            normed(op.norm, from, w.k, at, false);
            from = at;
        }
        x[row - start] = from;
    }
    kernels().prepare(w, x, Norm{nullptr, 0.0f, false}, in, tile);
}

void Tower::Thread::product(size_t number) {
    const TowerOperation& op = tower.operations_[number];
    const bool given = number && tower.tiled_[number - 1];  // the input lies there already
    char* const tiles = tower.tiled_[number] ? tower.inner_.get() : nullptr;
    const Weights& first = tower.weights(op.products[0]);
    const int64_t all = rows_of(op.to);
    const Input in{given ? tower.inner_.get() : tower.input_.get(), tower.input_scales_.get(), tower.input_sums_.get(),
                   all, ceil_div(all, kernels().tile_rows(first))};
    const int64_t slices = op.sliced ? static_cast<int64_t>(op.products.size()) : 1;
    auto input_of = [&](int64_t slice) {
        Input one = in;
        one.data += slice * all * first.input_row();
        one.scales += slice * all * first.input_scales();
        one.sums += slice * all * first.groups();
        return one;
    };
    if (!given)
        each(in.tiles * slices, [&](int64_t unit) {
            const int64_t slice = unit / in.tiles;
            prepare(op, first, input_of(slice), unit % in.tiles, op.column + slice * first.k);
        });
    // Neighbouring units are panels that pass by the same band of rows, which stays in the second-level cache.
    const int64_t tile_bytes = ceil_div(all, in.tiles) * first.input_row();
    const int64_t most = std::max(kUnitTiles, kBandBytes / tile_bytes);
    const int64_t bands = ceil_div(in.tiles, most), band_tiles = ceil_div(in.tiles, bands);
    int64_t units = 0;
    auto panels_of = [&](const Weights& w) {
        return std::max<int64_t>(1, std::min(kUnitBytes / w.panel_bytes, w.panels / (4 * threads)));
    };
    for (int number : op.products) {
        const Weights& w = tower.weights(number);
        units += ceil_div(w.panels, panels_of(w)) * bands;
    }
    each(units, [&](int64_t unit) {
        int64_t column = 0, slice = 0;
        for (int number : op.products) {
            const Weights& w = tower.weights(number);
            const int64_t panels = panels_of(w), groups = ceil_div(w.panels, panels), own = groups * bands;
            if (unit >= own) {
                unit -= own;
                column += w.n;
                slice += op.sliced ? 1 : 0;
                continue;
            }
            const int64_t panel = unit % groups * panels, tile = unit / groups * band_tiles;
            const Target target{buffer(op.to) + column, width(op.to), op.mode, op.act, op.scale, tiles};
            kernels().product(w, input_of(slice), panel, std::min(w.panels, panel + panels), tile,
                              std::min(in.tiles, tile + band_tiles), target);
            return;
        }
    });
}

// Queries and keys in place; `from` has them and the values side by side.
void Tower::Thread::rotate(const TowerOperation& op) {
    const int64_t heads = op.heads + op.key_heads(), columns = width(op.to);
    const int64_t dim = columns / (heads + op.key_heads()), half = dim / 2;
    auto norm_of = [&](int weight) { return Norm{weight < 0 ? nullptr : norm_weight(weight), op.norm.eps, false}; };
    const Norm queries = norm_of(op.norm.weight), keys = norm_of(op.key_norm), values = norm_of(op.value_norm);
    const float* angles = tower.run_->arrays[static_cast<size_t>(op.number)];
    each(rows_of(op.to), [&](int64_t row) {
        const float* cosines = angles + row * dim;
        for (int64_t head = 0; head < heads; head++)
            kernels().rotate(buffer(op.to) + row * columns + head * dim, dim, head < op.heads ? queries : keys, cosines,
                             cosines + half, dim);
        if (!values.weight) return;
        for (int64_t head = heads; head < heads + op.key_heads(); head++) {
            float* x = buffer(op.to) + row * columns + head * dim;
            kernels().norm(x, dim, values, false, 1.0f, x);
        }
    });
}

void Tower::Thread::attend(const TowerOperation& op) {
    const Attention a = tower.attention_of(op);
    const Parts& parts = tower.parts_[static_cast<size_t>(op.number)];
    const int64_t from_width = width(op.from), to_width = width(op.to), all = rows_of(op.from);
    const float* from = buffer(op.from);
    const auto& lengths = tower.run_->partitions[static_cast<size_t>(op.number)];
    const auto is_whole = [&](int64_t length) { return tower.whole(op, length); };
    const bool stores = !std::all_of(lengths.begin(), lengths.end(), is_whole);
    each(stores ? ceil_div(all, kSub) : 0, [&](int64_t unit) {
        for (int64_t head = 0; head < a.kv_heads; head++)
            for (int64_t row = unit * kSub; row < std::min(all, (unit + 1) * kSub); row++) {
                if (is_whole(parts.lasts[static_cast<size_t>(row)] + 1)) continue;
                const float* key = from + row * from_width + (op.heads + head) * a.dim;
                kernels().store_kv(a, key, key + a.kv_heads * a.dim, head, parts.slots[static_cast<size_t>(row)]);
            }
    });
    each(static_cast<int64_t>(parts.tasks.size()), [&](int64_t unit) {
        const Task& task = parts.tasks[static_cast<size_t>(unit)];
        const int64_t begin = task.begin + task.first;
        const int64_t* lasts = parts.lasts.data() + begin;
        if (is_whole(*lasts + 1)) return attend_whole(op, task, *lasts + 1);
        int64_t until[kTaskQueries];
        for (int64_t i = 0; i < task.count; i++)
            until[i] = op.window ? std::min(lasts[i], task.first + i + op.window) : lasts[i];
        Queries q;
        q.q = from + begin * from_width + task.head * a.dim;
        q.q_stride = from_width;
        q.positions = op.window ? parts.positions.data() + begin : lasts;
        q.until = until;
        q.first = 0;
        q.count = task.count;
        q.kv_head = task.head / (op.heads / a.kv_heads);
        q.table = tower.blocks_.data() + task.place / kSub;
        q.chunk = -1;
        q.out = buffer(op.to) + begin * to_width + task.head * a.dim;
        q.out_stride = to_width;
        q.next = Keys{};
        if (op.relative >= 0) {
            q.bias_stride = -1;
            q.bias = norm_weight(op.relative) + task.head * (2 * op.reach + kSub) + op.reach - 1 - task.first;
        } else if (!op.places.empty()) {
            const int64_t length = lasts[0] + 1;
            q.bias_stride = ceil_div(length, kSub) * kSub;
            q.bias = bias.get();
            disentangle(op, task, length, q.bias_stride);
        }
        kernels().attend(a, q, attention.get());
    });
}

void Tower::Thread::attend_whole(const TowerOperation& op, const Task& task, int64_t length) {
    const int64_t from_width = width(op.from), to_width = width(op.to), dim = to_width / op.heads;
    const int64_t kv_heads = op.key_heads(), kv_head = task.head / (op.heads / kv_heads);
    const float* row = buffer(op.from) + task.begin * from_width;
    const float* keys = row + (op.heads + kv_head) * dim;
    const WholeText text{row + task.first * from_width + task.head * dim,
                         keys,
                         keys + kv_heads * dim,
                         from_width,
                         task.count,
                         length,
                         dim,
                         op.scale,
                         buffer(op.to) + (task.begin + task.first) * to_width + task.head * dim,
                         to_width};
    kernels().attend_whole(text, attention.get());
}

// What a query and a key say of their distance (He et al., 2021, "DeBERTa"), for the queries of a unit and all keys of
// their part.
void Tower::Thread::disentangle(const TowerOperation& op, const Task& task, int64_t length, int64_t stride) {
    const int64_t wide = width(op.by_query), column = task.head * (wide / op.heads);
    const float* queries = buffer(op.by_query) + (task.begin + task.first) * wide + column;
    const float* keys = buffer(op.by_key) + task.begin * wide + column;
    float* to = bias.get();
    for (int64_t j = 0; j < length; j++, keys += wide) {
        const int32_t* places = op.places.data() + task.first - j + op.reach - 1;
        for (int64_t i = 0; i < task.count; i++) to[i * stride + j] = queries[i * wide + places[i]] + keys[places[i]];
    }
}

// Rows of `from` side by side, or their mean.
void Tower::Thread::gather(const TowerOperation& op) {
    const int64_t columns = width(op.from), to_columns = width(op.to);
    const bool average = op.code == TowerCode::kAverage;
    const int64_t parts = op.parts;
    const int64_t* table = tower.run_->tables[static_cast<size_t>(op.number)];
    each(rows_of(op.to), [&](int64_t row) {
        float* out = buffer(op.to) + row * to_columns;
        if (average) std::memset(out, 0, static_cast<size_t>(columns) * 4);
        for (int64_t i = 0; i < parts; i++) {
            const float* from = buffer(op.from) + table[row * parts + i] * columns;
            if (average)
                kernels().axpy(out, from, 1.0f / static_cast<float>(parts), columns);
            else
                std::memcpy(out + i * columns, from, static_cast<size_t>(columns) * 4);
        }
    });
}

// Columns of `from`, times a weight, plus another, within limits.
void Tower::Thread::adjust(const TowerOperation& op) {
    const int64_t from_width = width(op.from), to_width = width(op.to);
    const float* factors = op.norm.weight < 0 ? nullptr : norm_weight(op.norm.weight);
    const float* terms = op.norm.bias < 0 ? nullptr : norm_weight(op.norm.bias);
    each(rows_of(op.to), [&](int64_t row) {
        const float* from = buffer(op.from) + row * from_width + op.from_column;
        float* to = buffer(op.to) + row * to_width + op.column;
        for (int64_t i = 0; i < op.columns; i++) {
            float x = from[i];
            if (factors) x *= factors[i];
            if (terms) x += terms[i];
            to[i] = std::min(std::max(x, op.low), op.high);
        }
    });
}

}  // namespace inflight
