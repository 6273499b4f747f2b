#include "tower.h"

#include <algorithm>
#include <cstring>
#include <ctime>
#include <thread>

#include "share.h"

namespace inflight {

namespace {

constexpr int64_t kMostRows = 16;        // of a tile of a product's input, on any instruction set
constexpr int64_t kUnitBytes = 65536;    // of weights, in one unit of work
constexpr int64_t kUnitTiles = 8;        // of rows, in one unit of work, at least
constexpr int64_t kBandBytes = 1 << 20;  // of a product's input: half of a second-level cache
constexpr int64_t kTaskQueries = 48;     // of attention, in one unit of work: whole tiles of 12 and of 16

constexpr size_t kStages = 2;  // most of an operation
constexpr int kSpins = 4000;   // of a wait, before the processor is given to others; as in Pool

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

double processor_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

struct Tower::Thread {
    Tower& tower;
    const int thread, threads;
    size_t stage = 0;          // of the run
    Aligned<float> rows;       // of a product's input, on their way
    Aligned<float> attention;  // scratch

    Thread(Tower& t, int number) : tower(t), thread(number), threads(t.pool_->size()) {}

    // Calls work(unit) for each unit of [0, units), on some thread; returns when all are done. Units are divided
    // evenly; a thread whose share is done takes units of the others'. A thread does not wait for those that came to
    // none of the stage's units: where other processes take a processor away, the others go on without the thread that
    // had it, and it finds the stages done.
    template <class Work>
    void each(int64_t units, Work work) {
        if (threads == 1) {
            for (int64_t unit = 0; unit < units; unit++) work(unit);
            return;
        }
        Counter* const taken = tower.counters_.get() + stage++ * static_cast<size_t>(threads + 1);
        std::atomic<int64_t>& done = taken[threads].value;
        int64_t own = 0;
        for (int i = 0; i < threads; i++) {
            const int owner = (thread + i) % threads;
            const int64_t begin = units * owner / threads, last = units * (owner + 1) / threads;
            while (true) {
                const int64_t unit = begin + taken[owner].value.fetch_add(1, std::memory_order_relaxed);
                if (unit >= last) break;
                work(unit);
                own++;
            }
        }
        if (own) done.fetch_add(own, std::memory_order_acq_rel);
        for (int spins = 0; done.load(std::memory_order_acquire) != units; spins++)
            if (spins >= kSpins)
                std::this_thread::yield();
            else
                pause();
    }

    void run();
    void carry_out(size_t number);
    void product(size_t number);
    void rotate(const TowerOperation&);
    void attend(const TowerOperation&);
    void gather(const TowerOperation&);
    void prepare(const TowerOperation&, const Weights&, const Input&, int64_t tile);
    void normed(const TowerNorm&, const float* x, int64_t n, float* out) const;

    float* buffer(int number) const { return tower.buffers_[static_cast<size_t>(number)].data.get(); }
    int64_t width(int number) const { return tower.buffers_[static_cast<size_t>(number)].width; }
    int64_t rows_of(int number) const {
        return tower.run_->rows[static_cast<size_t>(tower.buffers_[static_cast<size_t>(number)].group)];
    }
    const float* norm_weight(int number) const { return tower.norms_[static_cast<size_t>(number)].data(); }
    const Kernels& kernels() const { return *tower.kernels_; }
};

Tower::Tower(int threads, const std::string& isa, bool half) : Store(threads, isa), half_(half) {
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
    a.heads = op.heads;
    a.kv_heads = op.heads;
    a.dim = width / (3 * op.heads);
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
    if (reader.products.size() > 1 || reader.to == op.to) return false;
    const Weights &w = weights(op.products[0]), &next = weights(reader.products[0]);
    if (next.format != Format::kBf16 || next.k != next.depth) return false;
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
    while (tiled_.size() < operations_.size()) tiled_.push_back(static_cast<char>(tiled(tiled_.size())));
    for (size_t i = 0; i < operations_.size(); i++) {
        const TowerOperation& op = operations_[i];
        if (op.code == TowerCode::kAttend) heads = std::max(heads, op.heads);
        if (op.code != TowerCode::kProduct) continue;
        const Weights& w = weights(op.products[0]);
        const int64_t rows = run.rows[static_cast<size_t>(buffers_[static_cast<size_t>(op.to)].group)];
        int64_t& room = i && tiled_[i - 1] ? inner : bytes;
        room = std::max(room, rows * w.input_row());
        scales = std::max(scales, rows * w.input_scales());
        sums = std::max(sums, rows * w.groups());
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
        scratch = std::max(scratch, attend_scratch(a));
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
        each->rows.reserve(kMostRows * (widest + kLanes));
        each->attention.reserve(scratch);
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
                normed(op.norm, buffer(op.from) + row * columns, columns, buffer(op.to) + row * columns);
            });
            break;
        case TowerCode::kRotate: rotate(op); break;
        case TowerCode::kAttend: attend(op); break;
        case TowerCode::kGather:
        case TowerCode::kAverage: gather(op); break;
    }
}

void Tower::Thread::normed(const TowerNorm& norm, const float* x, int64_t n, float* out) const {
    if (norm.bias >= 0)
        kernels().layer_norm(x, n, norm_weight(norm.weight), norm_weight(norm.bias), norm.eps, out);
    else
        kernels().norm(x, n, {norm_weight(norm.weight), norm.eps, false}, false, 1.0f, out);
}

// A tile's rows are normed in memory of the thread, from where they are rounded.
void Tower::Thread::prepare(const TowerOperation& op, const Weights& w, const Input& in, int64_t tile) {
    const float* x[kMostRows];
    const int64_t start = in.start(tile), end = in.start(tile + 1), stride = ceil_div(w.k, kLanes) * kLanes;
    for (int64_t row = start; row < end; row++) {
        const float* from = buffer(op.from) + row * w.k;
        float* at = rows.get() + (row - start) * stride;
        if (op.norm.weight >= 0) {
            normed(op.norm, from, w.k, at);
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
    if (!given) each(in.tiles, [&](int64_t tile) { prepare(op, first, in, tile); });
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
        int64_t column = 0;
        for (int number : op.products) {
            const Weights& w = tower.weights(number);
            const int64_t panels = panels_of(w), groups = ceil_div(w.panels, panels), own = groups * bands;
            if (unit >= own) {
                unit -= own;
                column += w.n;
                continue;
            }
            const int64_t panel = unit % groups * panels, tile = unit / groups * band_tiles;
            const Target target{buffer(op.to) + column, width(op.to), op.mode, op.act, op.scale, tiles};
            kernels().product(w, in, panel, std::min(w.panels, panel + panels), tile,
                              std::min(in.tiles, tile + band_tiles), target);
            return;
        }
    });
}

// Queries and keys in place; `from` has them and the values side by side.
void Tower::Thread::rotate(const TowerOperation& op) {
    const int64_t columns = width(op.to), dim = columns / (3 * op.heads), half = dim / 2;
    const float* angles = tower.run_->arrays[static_cast<size_t>(op.number)];
    each(rows_of(op.to), [&](int64_t row) {
        const float* cosines = angles + row * dim;
        for (int64_t head = 0; head < 2 * op.heads; head++)
            kernels().rotate(buffer(op.to) + row * columns + head * dim, dim, Norm{nullptr, 0.0f, false}, cosines,
                             cosines + half, dim);
    });
}

void Tower::Thread::attend(const TowerOperation& op) {
    const Attention a = tower.attention_of(op);
    const Parts& parts = tower.parts_[static_cast<size_t>(op.number)];
    const int64_t from_width = width(op.from), to_width = width(op.to), all = rows_of(op.from);
    const float* from = buffer(op.from);
    each(ceil_div(all, kSub), [&](int64_t unit) {
        for (int64_t head = 0; head < a.heads; head++)
            for (int64_t row = unit * kSub; row < std::min(all, (unit + 1) * kSub); row++) {
                const float* key = from + row * from_width + (a.heads + head) * a.dim;
                kernels().store_kv(a, key, key + a.heads * a.dim, head, parts.slots[static_cast<size_t>(row)]);
            }
    });
    each(static_cast<int64_t>(parts.tasks.size()), [&](int64_t unit) {
        const Task& task = parts.tasks[static_cast<size_t>(unit)];
        const int64_t begin = task.begin + task.first;
        const int64_t* lasts = parts.lasts.data() + begin;
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
        q.kv_head = task.head;
        q.table = tower.blocks_.data() + task.place / kSub;
        q.chunk = -1;
        q.out = buffer(op.to) + begin * to_width + task.head * a.dim;
        q.out_stride = to_width;
        q.next = Keys{};
        kernels().attend(a, q, attention.get());
    });
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

}  // namespace inflight
