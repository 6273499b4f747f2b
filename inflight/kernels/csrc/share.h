// How the threads of a run divide the units of a stage.
#pragma once

#include <atomic>
#include <cstdint>

#include "pool.h"

namespace inflight {

// One thread's place in the stages of a run; a crew is a vector of pointers to what derives from it, by thread.
struct Share {
    alignas(64) std::atomic<int64_t> next[2] = {};  // units of this thread's share taken, in even and in odd stages
    int stage = 0;
};

// Calls work(unit) for each unit of [0, units), on some thread of the pool; returns when all are done. Every thread of
// the run calls it. Units are divided evenly; a thread whose share is done takes units of the others'. Which thread
// does what changes no result.
template <class Crew, class Work>
void share_out(int64_t units, int thread, const Crew& crew, Pool& pool, Work work) {
    const int threads = pool.size();
    if (threads == 1) {
        for (int64_t unit = 0; unit < units; unit++) work(unit);
        return;
    }
    Share& own = *crew[static_cast<size_t>(thread)];
    const int now = own.stage++ & 1;
    for (int i = 0; i < threads; i++) {
        const int owner = (thread + i) % threads;
        std::atomic<int64_t>& from = crew[static_cast<size_t>(owner)]->next[now];
        const int64_t begin = units * owner / threads, last = units * (owner + 1) / threads;
        while (true) {
            const int64_t unit = begin + from.fetch_add(1, std::memory_order_relaxed);
            if (unit >= last) break;
            work(unit);
        }
    }
    // All threads have passed the barrier of the stage before, so none of them reads its counters any more.
    own.next[now ^ 1].store(0, std::memory_order_relaxed);
    pool.barrier();
}

}  // namespace inflight
