#include "tower.h"

#include <algorithm>
#include <cstring>
#include <ctime>

#include "tower_thread.h"

namespace inflight {

namespace {

double processor_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

Tower::Tower(int threads, const std::string& isa, bool half) : Store(threads, isa), half_(half) {
    splits_ = true;
    for (int thread = 0; thread < pool_->size(); thread++) crew_.push_back(std::make_unique<Thread>(*this, thread));
}

Tower::~Tower() = default;

int Tower::add_buffer(int64_t width, int group) {
    buffers_.push_back({width, group, {}});
    return static_cast<int>(buffers_.size()) - 1;
}

void Tower::add(TowerOperation operation) { operations_.push_back(std::move(operation)); }

Attention Tower::attention_of(const TowerOperation& op) const {
    Attention a{};
    const int64_t width = buffers_[static_cast<size_t>(op.from)].width;
    a.heads = op.key_heads();  // a unit of work is of one head of queries, so that no two of them share a key here
    a.kv_heads = op.key_heads();
    a.dim = width / (op.heads + 2 * op.key_heads());
    a.depth = ceil_div(a.dim, kLanes) * kLanes;
    a.scale = op.scale;
    a.window = op.window ? op.window + 1 : 0;  // itself counts
    a.type = half_ ? KvType::kBf16 : KvType::kFloat;
    a.block_size = kSub;
    a.blocks = static_cast<int64_t>(blocks_.size());
    a.extent = kExtent * a.kv_heads * a.depth * kv_bytes(a.type);
    a.keys = keys_.get();
    a.values = values_.get();
    return a;
}

bool Tower::whole(const TowerOperation& op, int64_t length) const {
    const int64_t dim = buffers_[static_cast<size_t>(op.to)].width / op.heads;
    const bool all = !op.window || length <= op.window + 1;
    const bool plain = op.relative < 0 && op.places.empty() && op.scale > 0.0f;
    return all && plain && dim % kLanes == 0 && length <= (half_ ? kWholeHalf : kWholeKeys);
}

// A part's keys begin at a block of their own, so that its positions count from 0.
void Tower::divide(const std::vector<int64_t>& lengths, int64_t heads, Parts& parts) const {
    parts.slots.clear();
    parts.positions.clear();
    parts.lasts.clear();
    parts.tasks.clear();
    std::vector<Task> spans;
    int64_t place = 0, begin = 0;
    for (int64_t length : lengths) {
        for (int64_t i = 0; i < length; i++) {
            parts.slots.push_back(place + i);
            parts.positions.push_back(i);
            parts.lasts.push_back(length - 1);
        }
        spans.push_back({begin, place, 0, 0, length});
        begin += length;
        place += ceil_div(length, kSub) * kSub;
    }
    for (int64_t head = 0; head < heads; head++)  // one head's keys are read by neighbouring units
        for (const Task& span : spans)
            for (int64_t first = 0; first < span.count; first += kTaskQueries)
                parts.tasks.push_back(
                    {span.begin, span.place, head, first, std::min(kTaskQueries, span.count - first)});
}

// Whether a product writes its result in the tiles that the next one reads, instead of the buffer, which nobody else
// reads then.
bool Tower::tiled(size_t operation) const {
    const TowerOperation& op = operations_[operation];
    if (op.code != TowerCode::kProduct || (op.mode != Mode::kGate && op.mode != Mode::kActivate)) return false;
    if (op.products.size() > 1 || operation + 1 >= operations_.size()) return false;
    const TowerOperation& reader = operations_[operation + 1];
    if (reader.code != TowerCode::kProduct || reader.from != op.to || reader.norm.weight >= 0) return false;
    if (reader.products.size() > 1 || reader.sliced || reader.to == op.to) return false;
    const Weights &w = weights(op.products[0]), &next = weights(reader.products[0]);
    if (next.split != w.split || (!w.split && next.format != Format::kBf16)) return false;
    if (next.k % (next.split ? 32 : step_of(next.format))) return false;  // nothing fills up the last block
    if (is_block(w.format) || kernels_->tile_rows(w) != kernels_->tile_rows(next)) return false;
    if (kernels_->lines && is_grouped(w.format)) return false;
    if (std::find(outputs_.begin(), outputs_.end(), op.to) != outputs_.end()) return false;
    for (size_t i = operation + 2; i < operations_.size(); i++) {  // nobody reads the buffer before it is written anew
        const TowerOperation& other = operations_[i];
        if (other.from == op.to) return false;
        if (other.to == op.to) return other.mode != Mode::kAdd;
    }
    return true;
}

void Tower::reserve(const TowerRun& run) {
    for (Buffer& b : buffers_) b.data.reserve(run.rows[static_cast<size_t>(b.group)] * b.width + kLanes);
    int64_t most_slots = 0, heads = 0, bytes = 0, inner = 0, scales = 0, sums = 0, widest = 0, scratch = 0;
    int64_t longest = 0;  // of the parts whose scores have content and position apart
    while (tiled_.size() < operations_.size()) tiled_.push_back(static_cast<char>(tiled(tiled_.size())));
    for (size_t i = 0; i < operations_.size(); i++) {
        const TowerOperation& op = operations_[i];
        if (op.code == TowerCode::kAttend) heads = std::max(heads, op.heads);
        if (op.code != TowerCode::kProduct) continue;
        const Weights& w = weights(op.products[0]);
        const int64_t rows = run.rows[static_cast<size_t>(buffers_[static_cast<size_t>(op.to)].group)];
        int64_t& room = i && tiled_[i - 1] ? inner : bytes;
        const int64_t inputs = rows * (op.sliced ? static_cast<int64_t>(op.products.size()) : 1);
        room = std::max(room, inputs * w.input_row());
        scales = std::max(scales, inputs * w.input_scales());
        sums = std::max(sums, inputs * w.groups());
        widest = std::max(widest, w.k);
    }
    parts_.resize(run.partitions.size());
    for (size_t i = 0; i < parts_.size(); i++) {
        divide(run.partitions[i], heads, parts_[i]);
        int64_t slots = 0;
        for (int64_t length : run.partitions[i]) slots += ceil_div(length, kSub) * kSub;
        most_slots = std::max(most_slots, slots);
    }
    const int64_t blocks = ceil_div(most_slots, kSub), extents = ceil_div(most_slots, kExtent);
    for (int64_t block = static_cast<int64_t>(blocks_.size()); block < blocks; block++)
        blocks_.push_back(static_cast<int32_t>(block));
    for (const TowerOperation& op : operations_) {
        if (op.code != TowerCode::kAttend) continue;
        const Attention a = attention_of(op);
        keys_.reserve(extents * a.extent);
        values_.reserve(extents * a.extent);
        scratch = std::max({scratch, attend_scratch(a), kLanes * (a.dim + kWholeKeys)});
        if (op.places.empty()) continue;
        for (int64_t length : run.partitions[static_cast<size_t>(op.number)]) longest = std::max(longest, length);
    }
    const size_t counters = kStages * operations_.size() * (crew_.size() + 1);
    if (counters > counters_size_) {
        counters_.reset(new Counter[counters]);
        counters_size_ = counters;
    }
    for (size_t i = 0; i < counters; i++) counters_[i].value.store(0, std::memory_order_relaxed);
    input_.reserve(bytes);
    inner_.reserve(inner);
    input_scales_.reserve(scales);
    input_sums_.reserve(sums);
    for (auto& each : crew_) {
        each->rows.reserve(kMostTileRows * (widest + kLanes));
        each->attention.reserve(scratch);
        if (longest) each->bias.reserve(kTaskQueries * ceil_div(longest, kSub) * kSub);
        each->stage = 0;
    }
}

void Tower::run(const TowerRun& run) {
    run_ = &run;
    reserve(run);
    pool_->run([this](int thread) { crew_[static_cast<size_t>(thread)]->run(); });
    for (size_t i = 0; i < outputs_.size(); i++) {
        const Buffer& b = buffers_[static_cast<size_t>(outputs_[i])];
        const int64_t floats = run.rows[static_cast<size_t>(b.group)] * b.width;
        std::memcpy(run.results[i], b.data.get(), static_cast<size_t>(floats) * 4);
    }
    run_ = nullptr;
}

void Tower::Thread::run() {
    const bool timed = thread == 0 && !tower.seconds_.empty();
    for (size_t i = 0; i < tower.operations_.size(); i++) {
        const double began = timed ? processor_seconds() : 0.0;
        carry_out(i);
        if (timed) tower.seconds_[i] = processor_seconds() - began;
    }
}

}  // namespace inflight
