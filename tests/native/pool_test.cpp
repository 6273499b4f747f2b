// Threads that run together, used by several engines at once.
#include <atomic>
#include <chrono>
#include <thread>

#include "pool.h"
#include "tests.h"

namespace inflight::testing {
namespace {

// Every thread adds to its own number, reads all after the barrier, and goes on when everyone has.
void meet(Pool& pool, int rounds) {
    std::vector<int64_t> numbers(static_cast<size_t>(pool.size()), 0);  // not atomic: the barrier orders them
    std::atomic<int> wrong{0};
    pool.run([&](int thread) {
        for (int round = 1; round <= rounds; round++) {
            numbers[static_cast<size_t>(thread)]++;
            pool.barrier();
            for (int64_t number : numbers) wrong += number != round;
            pool.barrier();
        }
    });
    CHECK(!wrong, "a thread passed the barrier before the others were there");
    for (int64_t number : numbers) CHECK(number == rounds, "run returned before its threads were done");
}

}  // namespace

void pools(Random& random) {
    // Several engines share the pool; between their runs it sleeps, or not yet.
    std::vector<std::thread> engines;
    std::atomic<int> wrong{0};
    for (int engine = 0; engine < 4; engine++)
        engines.emplace_back([&wrong, seed = random.bits()] {
            Random own(seed);
            for (int repeat = 0; repeat < 30; repeat++) {
                std::shared_ptr<Pool> pool = Pool::shared(static_cast<int>(own.between(1, 3)));
                if (Pool::shared(pool->size()) != pool) wrong++;
                try {
                    meet(*pool, static_cast<int>(own.between(0, 5)));
                } catch (const std::runtime_error&) {
                    wrong++;
                }
                if (!own.between(0, 9)) std::this_thread::sleep_for(std::chrono::milliseconds(3));
            }
        });
    for (std::thread& engine : engines) engine.join();
    CHECK(!wrong, wrong.load(), " runs of a shared pool went wrong");

    // Pools come and go, used or not, within another one's run too.
    for (int repeat = 0; repeat < 20; repeat++) {
        Pool outer(2);
        outer.run([&](int) {
            Pool inner(2);
            if (repeat % 2) inner.run([](int) {});
        });
        meet(outer, 2);
        Pool unused(3);
    }
    Pool none(0);
    CHECK(none.size() == 1, "a pool has the calling thread at least");
    meet(none, 2);
}

}  // namespace inflight::testing
