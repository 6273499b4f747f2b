// Pages that are asked for ahead of their use.
#include "memory.h"

#include <unistd.h>

#include <chrono>
#include <thread>

#include "tests.h"

namespace inflight::testing {

#if defined(MADV_POPULATE_WRITE)
namespace {

using std::chrono::milliseconds;

// Bytes of [data, data + bytes) that are there.
int64_t resident(char* data, int64_t bytes) {
    int64_t size = sysconf(_SC_PAGESIZE);
    std::vector<unsigned char> pages(static_cast<size_t>(bytes / size));
    CHECK(!mincore(data, static_cast<size_t>(bytes), pages.data()), "mincore");
    int64_t there = 0;
    for (unsigned char page : pages) there += page & 1;
    return there * size;
}

// Not before Linux 5.14, nor in an emulator that takes any advice and does nothing.
bool supported() {
    constexpr int64_t kBytes = 1 << 20;
    Arena arena;
    char* data = arena.take(kBytes);
    return !madvise(data, kBytes, MADV_POPULATE_WRITE) && resident(data, kBytes) == kBytes;
}

}  // namespace

void pages(Random&) {
    if (!supported()) return;
    constexpr int64_t kBytes = int64_t(256) << 20, kMost = kBytes / 2;
    Arena arena;
    char* data = arena.take(kBytes);
    Commit commit(data, kMost);
    {
        Commit::Use use(&commit);
        std::this_thread::sleep_for(milliseconds(100));  // the page that it was at
        int64_t before = resident(data, kBytes);
        CHECK(before < kMost, before, " bytes were there at once");
        std::this_thread::sleep_for(milliseconds(50));
        CHECK(resident(data, kBytes) == before, "pages are asked for while others work");
    }
    auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (resident(data, kBytes) < kMost) {
        CHECK(std::chrono::steady_clock::now() < deadline, resident(data, kBytes), " bytes are there, not ", kMost);
        std::this_thread::sleep_for(milliseconds(1));
    }
    std::this_thread::sleep_for(milliseconds(20));
    CHECK(resident(data, kBytes) == kMost, "more than was allowed");
}
#else
void pages(Random&) {}
#endif

}  // namespace inflight::testing
