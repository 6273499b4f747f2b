// Adapters within a run: which tokens wear which, and the two products that each operation adds for them.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "worker.h"

namespace inflight {

namespace {

constexpr int64_t kLowRows = 8;    // fewest rows of a first factor in a unit of work
constexpr int64_t kLowPanels = 8;  // panels of second factors in a unit of work

}  // namespace

void Program::add_adapter(int64_t number, std::unique_ptr<Adapter> adapter) {
    if (number == 0) throw std::invalid_argument("0 stands for no adapter");
    if (adapter->of.size() != operations_.size()) throw std::invalid_argument("the adapter is another program's");
    for (size_t i = 0; i < adapter->of.size(); i++) {
        LowRank& low = adapter->of[i];
        if (!low.first.rows) continue;
        const Operation& op = operations_[i];
        const bool gated = op.mode == Mode::kGate;
        if (op.code != OpCode::kProduct || low.first.k != weights(op.products[0]).k)
            throw std::invalid_argument("operation " + std::to_string(i) + " is no product of such inputs");
        int64_t columns = 0;
        for (int product : op.products) columns += weights(product).n;
        for (size_t before = 0; before < i; before++)
            if (operations_[before].code == OpCode::kGather)
                throw std::invalid_argument("an adapter cannot change the head");
        low.panels = 0;
        for (const LowSecond& part : low.parts) {
            const bool inside = part.column >= 0 && part.n > 0 && part.hidden >= 0 && part.rank > 0 &&
                                part.hidden + part.rank <= low.first.rows;
            const bool fits = gated ? part.half >= 0 && part.half < 2 && !part.column && part.n == columns / 2
                                    : part.half < 0 && part.column + part.n <= columns;
            if (!inside || !fits) throw std::invalid_argument("a factor does not fit operation " + std::to_string(i));
            low.panels += part.panels();
        }
    }
    adapters_[number] = std::move(adapter);
}

bool Program::drop_adapter(int64_t number) { return adapters_.erase(number) > 0; }

void Program::check_adapters(const Step& step) const {
    for (int64_t row = 0; row < step.rows; row++)
        if (step.adapters[row] && !adapters_.count(step.adapters[row]))
            throw std::out_of_range("there is no adapter " + std::to_string(step.adapters[row]));
}

// Puts the slice's tokens of each adapter together in tiles.
void Program::wear(const Step& step) {
    Slice& s = *slice_;
    s.low.clear();
    s.low_panels.clear();
    if (!step.adapters) return;
    std::vector<std::pair<const Adapter*, std::vector<int64_t>>> worn;
    for (size_t row = 0; row < s.begins.size(); row++) {
        const int64_t number = step.adapters[s.tables[row]];
        if (!number) continue;
        const Adapter* adapter = adapters_.at(number).get();
        auto found = std::find_if(worn.begin(), worn.end(), [&](const auto& each) { return each.first == adapter; });
        if (found == worn.end()) found = worn.insert(worn.end(), {adapter, {}});
        for (int64_t i = 0; i < s.lengths[row]; i++) found->second.push_back(s.begins[row] + i);
    }
    if (worn.empty()) return;
    s.low_panels.assign(operations_.size(), 0);
    int64_t rows = 0, depth = 0, wide = 0;
    for (const auto& [adapter, tokens] : worn) {
        for (size_t at = 0; at < tokens.size(); at += kLowTokens) {
            LowTile tile{adapter, std::min<int64_t>(kLowTokens, static_cast<int64_t>(tokens.size() - at)), {}};
            std::copy_n(tokens.begin() + static_cast<int64_t>(at), tile.count, tile.tokens);
            s.low.push_back(tile);
        }
        for (size_t i = 0; i < operations_.size(); i++) {
            const LowRank& low = adapter->of[i];
            s.low_panels[i] = std::max(s.low_panels[i], low.panels);
            rows = std::max(rows, low.first.rows);
            depth = std::max(depth, low.first.depth);
            if (low.panels && operations_[i].mode == Mode::kGate)
                wide = std::max(wide, weights(operations_[i].products[0]).panels * kPanel);
        }
    }
    low_stride_ = (rows + kLanes - 1) / kLanes * kLanes;
    low_hidden_.reserve(s.step.count * low_stride_);
    low_wide_.reserve(s.step.count * wide);
    for (auto& worker : workers_) worker->low_input.reserve(kLowTokens * depth);
}

// How many units of work the first factors of an operation are.
int64_t Program::Worker::shrink_units(size_t number) const {
    int64_t most = 0;
    for (const LowTile& tile : slice().low) most = std::max(most, tile.adapter->of[number].first.rows);
    const int64_t tiles = static_cast<int64_t>(slice().low.size());
    const int64_t groups = std::min(ceil_div(most, kLowRows), ceil_div(2 * threads, tiles));
    return tiles * std::max<int64_t>(1, groups);
}

// Hidden values of a tile's tokens: some rows of the first factors with the operation's normed input.
void Program::Worker::shrink(size_t number, int64_t unit) {
    const Operation& op = program.operations_[number];
    const int64_t tiles = static_cast<int64_t>(slice().low.size()), groups = shrink_units(number) / tiles;
    const LowTile& tile = slice().low[static_cast<size_t>(unit / groups)];
    const LowFirst& factors = tile.adapter->of[number].first;
    const int64_t group = unit % groups, begin = factors.rows * group / groups,
                  end = factors.rows * (group + 1) / groups;
    if (begin == end) return;
    const Norm norm = norm_of(op.norm, op);
    const float* x[kLowTokens];
    float* out[kLowTokens];
    for (int64_t i = 0; i < tile.count; i++) {
        const float* from = buffer(op.from) + tile.tokens[i] * width(op.from);
        float* own = low_input.get() + i * factors.depth;
        if (norm.weight)
            kernels().norm(from, factors.k, norm, false, 1.0f, own);
        else if (factors.depth > factors.k)
            std::memcpy(own, from, static_cast<size_t>(factors.k) * 4);
        std::memset(own + factors.k, 0, static_cast<size_t>(factors.depth - factors.k) * 4);
        x[i] = norm.weight || factors.depth > factors.k ? own : from;
        out[i] = program.low_hidden_.get() + tile.tokens[i] * program.low_stride_;
    }
    kernels().shrink(factors, x, tile.count, begin, end, out);
}

// Adds the second factors' products of the hidden values to what the operation has written; a gated one's activation
// follows here.
void Program::Worker::expand(size_t number, int64_t rows) {
    const Operation& op = program.operations_[number];
    const bool gated = op.mode == Mode::kGate;
    const int64_t stride = gated ? low_width(op) : width(op.to);
    float* to = gated ? program.low_wide_.get() : buffer(op.to);
    const int64_t strips = ceil_div(slice().low_panels[number], kLowPanels);
    each(static_cast<int64_t>(slice().low.size()) * strips, [&](int64_t unit) {
        const LowTile& tile = slice().low[static_cast<size_t>(unit / strips)];
        const LowRank& low = tile.adapter->of[number];
        int64_t first = unit % strips * kLowPanels, last = std::min(low.panels, first + kLowPanels);
        const float* hidden[kLowTokens];
        float* out[kLowTokens];
        for (int64_t i = 0; i < tile.count; i++) {
            hidden[i] = program.low_hidden_.get() + tile.tokens[i] * program.low_stride_;
            out[i] = to + tile.tokens[i] * stride;
        }
        for (LowSecond part : low.parts) {
            const int64_t panels = part.panels();
            if (op.mode == Mode::kAdd) part.scale *= op.scale;
            if (first < panels && last > 0)
                kernels().expand(part, hidden, tile.count, std::max<int64_t>(first, 0), std::min(panels, last), out);
            first -= panels;
            last -= panels;
        }
    });
    if (!gated) return;
    each(rows, [&](int64_t row) {
        kernels().gate_panels(op.act, to + row * stride, width(op.to), buffer(op.to) + row * width(op.to));
    });
}

}  // namespace inflight
