#include "pool.h"

#include <chrono>
#include <map>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace inflight {

namespace {

constexpr int kSpins = 4000;                          // about 50 us: longer than between two operations
constexpr std::chrono::microseconds kPatience(1000);  // about the time between two steps

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Pins a thread to a processor if the pool has as many threads as the process has processors. A smaller pool shares its
// processors with other work, and the system's scheduler places its threads better.
void pin(std::thread& worker, int thread, int threads) {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) != threads) return;
    int seen = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && seen++ == thread) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            pthread_setaffinity_np(worker.native_handle(), sizeof one, &one);
        }
#else
    (void)worker, (void)thread, (void)threads;
#endif
}

}  // namespace

std::shared_ptr<Pool> Pool::shared(int threads) {
    static std::mutex mutex;
    static std::map<int, std::weak_ptr<Pool>> pools;
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Pool> found = pools[threads].lock();
    if (!found) pools[threads] = found = std::make_shared<Pool>(threads);
    return found;
}

Pool::Pool(int threads) : size_(threads < 1 ? 1 : threads) {
    for (int thread = 1; thread < size_; thread++) {
        workers_.emplace_back([this, thread] { loop(thread); });
        pin(workers_.back(), thread, size_);
    }
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(const std::function<void(int)>& work) {
    std::lock_guard<std::mutex> turn(turn_);
    if (workers_.empty()) return work(0);
    bool wake;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        work_ = &work;
        round_.fetch_add(1, std::memory_order_release);
        wake = sleeping_ > 0;
    }
    if (wake) wake_.notify_all();
    work(0);
    barrier();
}

void Pool::barrier() {
    if (size_ == 1) return;
    uint32_t before = passed_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.store(before + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; passed_.load(std::memory_order_acquire) == before; spins++) {
        if (spins < kSpins)
            pause();
        else
            std::this_thread::yield();  // another thread of the pool may wait for this processor
    }
}

void Pool::loop(int thread) {
    uint32_t seen = 0;
    while (true) {
        int spins = 0;
        while (round_.load(std::memory_order_acquire) == seen && spins++ < kSpins) pause();
        if (round_.load(std::memory_order_acquire) == seen) {
            auto until = std::chrono::steady_clock::now() + kPatience;
            while (round_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
                std::this_thread::yield();
        }
        if (round_.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleeping_++;
            wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
            sleeping_--;
        }
        seen = round_.load(std::memory_order_acquire);
        if (stop_) return;
        (*work_)(thread);
        barrier();
    }
}

}  // namespace inflight
