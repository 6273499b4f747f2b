// One thread within a run of a Tower: how its stages are divided, and what it does in each operation.
#pragma once

#include <thread>

#include "tower.h"

namespace inflight {

constexpr int64_t kMostTileRows = 16;  // of a tile of a product's input, on any instruction set
constexpr int64_t kTaskQueries = 48;   // of attention, in one unit of work: whole tiles of 12 and of 16
constexpr int64_t kWholeHalf = 64;     // rows of the longest part that is a WholeText where AMX would round it
constexpr size_t kStages = 2;          // most of an operation
constexpr int kSpins = 4000;           // of a wait, before the processor is given to others; as in Pool

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Tower::Thread {
    Tower& tower;
    const int thread, threads;
    size_t stage = 0;          // of the run
    Aligned<float> rows;       // of a product's input, on their way
    Aligned<float> attention;  // scratch
    Aligned<float> bias;       // of a unit of attention, [queries][keys]

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
    void adjust(const TowerOperation&);
    void attend(const TowerOperation&);
    void attend_whole(const TowerOperation&, const Task&, int64_t length);
    void gather(const TowerOperation&);
    void disentangle(const TowerOperation&, const Task&, int64_t length, int64_t stride);
    void prepare(const TowerOperation&, const Weights&, const Input&, int64_t tile, int64_t column);
    void normed(const TowerNorm&, const float* x, int64_t n, float* out, bool add) const;

    float* buffer(int number) const { return tower.buffers_[static_cast<size_t>(number)].data.get(); }
    int64_t width(int number) const { return tower.buffers_[static_cast<size_t>(number)].width; }
    int64_t rows_of(int number) const {
        return tower.run_->rows[static_cast<size_t>(tower.buffers_[static_cast<size_t>(number)].group)];
    }
    const float* norm_weight(int number) const { return tower.norms_[static_cast<size_t>(number)].data(); }
    const Kernels& kernels() const { return *tower.kernels_; }
};

}  // namespace inflight
