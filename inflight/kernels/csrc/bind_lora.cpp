// Adapters in Python. inflight/kernels/lora.py lays their factors out and keeps the memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "program.h"

namespace nb = nanobind;
using namespace inflight;

namespace {

// operation; first factors: address, rows, k, depth
using First = std::tuple<int64_t, uintptr_t, int64_t, int64_t, int64_t>;
// operation; a second factor: address, rank, hidden, n, column, half, scale
using Second = std::tuple<int64_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int, float>;

void add_adapter(Program& program, int64_t number, bool floats, const std::vector<First>& firsts,
                 const std::vector<Second>& seconds) {
    auto adapter = std::make_unique<Adapter>();
    adapter->of.resize(program.operations().size());
    for (const auto& [operation, data, rows, k, depth] : firsts)
        adapter->of.at(static_cast<size_t>(operation)).first = {reinterpret_cast<const char*>(data), floats, rows, k,
                                                                depth};
    for (const auto& [operation, data, rank, hidden, n, column, half, scale] : seconds)
        adapter->of.at(static_cast<size_t>(operation))
            .parts.push_back({reinterpret_cast<const char*>(data), floats, rank, hidden, n, column, half, scale});
    program.add_adapter(number, std::move(adapter));
}

}  // namespace

void bind_lora(nb::module_& m) {
    m.def("add_adapter", &add_adapter);
    m.def("drop_adapter", [](Program& program, int64_t number) { return program.drop_adapter(number); });
}
