// Memory for streams of weights: aligned to lines, in huge pages where the system gives them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace inflight {

// A buffer that only grows. Growing loses its contents.
template <class T>
class Aligned {
  public:
    void reserve(int64_t count) {
        if (count <= size_) return;
        void* found = nullptr;
        size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
        if (posix_memalign(&found, 64, bytes)) throw std::bad_alloc();
        data_.reset(static_cast<T*>(found));
        size_ = count;
    }
    T* get() const { return data_.get(); }
    int64_t size() const { return size_; }

  private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T[], Free> data_;
    int64_t size_ = 0;
};

// Takes memory from the system in large pieces and gives it back all at once.
class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() {
        for (const Piece& piece : pieces_) munmap(piece.base, piece.size);
    }

    char* take(int64_t bytes) {
        size_t size = (static_cast<size_t>(bytes) + 63) / 64 * 64;
        if (pieces_.empty() || pieces_.back().size - pieces_.back().used < size) grow(size);
        Piece& piece = pieces_.back();
        char* at = piece.base + piece.used;
        piece.used += size;
        return at;
    }

  private:
    struct Piece {
        char* base;
        size_t size, used;
    };
    void grow(size_t least) {
        constexpr size_t kHuge = size_t(2) << 20, kPiece = size_t(64) << 20;
        size_t size = ((least > kPiece ? least : kPiece) + 2 * kHuge - 1) / kHuge * kHuge;
        void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (found == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        madvise(found, size, MADV_HUGEPAGE);
#endif
        char* base = static_cast<char*>(found);
        size_t skip = (kHuge - reinterpret_cast<uintptr_t>(base) % kHuge) % kHuge;
        pieces_.push_back({base, size, skip + least <= size ? skip : 0});
    }
    std::vector<Piece> pieces_;
};

// Has the system map an Arena's pages while the Arena is not in use. Otherwise the first write to a page waits until
// the page is zeroed: up to 5 ms for a huge page in a virtual machine. Without MADV_POPULATE_WRITE (Linux before 5.14,
// macOS) this does nothing.
class Commit {
  public:
    // While a Use lives, and for kQuiet afterwards, no page is mapped: the work needs the processors.
    class Use {
      public:
        explicit Use(Commit* commit) : commit_(commit) {
            if (commit_) commit_->uses_.fetch_add(1);
        }
        Use(const Use&) = delete;
        Use& operator=(const Use&) = delete;
        ~Use() {
            if (commit_) commit_->uses_.fetch_add(1);
        }

      private:
        Commit* commit_;
    };

    Commit(char* data, int64_t bytes) : thread_([=] { run(data, bytes); }) {}
    Commit(const Commit&) = delete;
    Commit& operator=(const Commit&) = delete;
    ~Commit() {
        stop_.store(true);
        thread_.join();
    }

  private:
    static constexpr std::chrono::milliseconds kQuiet{5};  // longer than between two steps of a busy server

    // Waits until there was no use for kQuiet since `seen`, or until the end.
    void wait(uint64_t& seen) const {
        for (uint64_t now; !stop_.load() && ((now = uses_.load()) != seen || now % 2); seen = now)
            std::this_thread::sleep_for(kQuiet);
    }

    void run(char* data, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
        constexpr int64_t kHuge = int64_t(2) << 20;  // Arena begins where such a page does
        uint64_t seen = 0;
        for (int64_t at = 0; at < bytes; at += kHuge) {
            wait(seen);
            size_t size = static_cast<size_t>(std::min(kHuge, bytes - at));
            if (stop_.load() || madvise(data + at, size, MADV_POPULATE_WRITE)) return;
        }
#else
        (void)data, (void)bytes;
#endif
    }

    std::atomic<uint64_t> uses_{0};  // counts beginnings and ends: odd during a use
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

}  // namespace inflight
