// Threads that run one function together. Between two runs they spin for a moment, yield for a while, then sleep;
// within a run they meet at barriers. The calling thread is one of them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace inflight {

class Pool {
  public:
    // The process's pool with this number of threads. Engines share it and run one at a time.
    static std::shared_ptr<Pool> shared(int threads);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return size_; }

    // Calls work(thread) on every thread, the caller being thread 0; returns when all are done. `work` must not throw.
    void run(const std::function<void(int)>& work);

    // Waits until all threads of the run are here.
    void barrier();

  private:
    void loop(int thread);

    const int size_;
    std::mutex turn_;  // held by the engine that runs
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    int sleeping_ = 0;  // under mutex_
    const std::function<void(int)>* work_ = nullptr;
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> passed_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace inflight
