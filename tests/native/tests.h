// The tests that kernels_test.cpp runs. Each throws what it found.
#pragma once

#include "testing.h"

namespace inflight::testing {

// Of one instruction set.
void products(const Kernels& kernels, Random& random);
void splits(const Kernels& kernels, Random& random);
void rows(const Kernels& kernels, Random& random);
void attention(const Kernels& kernels, Random& random);
void programs(const Kernels& kernels, Random& random);
void samplers(const Kernels& kernels, Random& random);
void towers(const Kernels& kernels, Random& random);
void adapters(const Kernels& kernels, Random& random);

// Of no instruction set.
void sizes(Random& random);
void pages(Random& random);
void pools(Random& random);
void refusals(Random& random);

}  // namespace inflight::testing
