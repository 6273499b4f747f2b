// The packed weights of a program, and the threads and kernels that compute with them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "types.h"

namespace inflight {

class Store {
  public:
    // Throws std::invalid_argument: an instruction set that this machine does not have.
    Store(int threads, const std::string& isa);

    // The number by which operations name the weight. `bias` [n] or null.
    int add_weights(Weights w, const float* bias);
    int add_norm(const float* values, int64_t n);

    // Memory for packed weights and scales that lives as long as the store; aligned to 64.
    char* allocate(int64_t bytes) { return arena_.take(bytes); }

    const char* isa() const { return kernels_->name; }
    Pool& pool() { return *pool_; }
    const Kernels& kernels() const { return *kernels_; }
    const Weights& weights(int product) const { return weights_.at(static_cast<size_t>(product)); }
    int64_t bytes() const { return bytes_; }

  protected:
    std::shared_ptr<Pool> pool_;
    const Kernels* kernels_;
    Arena arena_;
    std::vector<Weights> weights_;
    std::vector<std::vector<float>> norms_;
    int64_t bytes_ = 0;
    bool splits_ = false;  // float32 products are computed from parts where the instruction set can
};

// The instruction set with this name; "": the best that this machine has. Throws std::invalid_argument.
const Kernels* choose(const std::string& name);
std::vector<std::string> available();

}  // namespace inflight
