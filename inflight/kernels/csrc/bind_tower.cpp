// Towers in Python. Arrays come as addresses: inflight/kernels/tower.py checks shapes and dtypes before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "tower.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace inflight;

namespace {

template <class T>
std::vector<T*> addresses(const std::vector<uintptr_t>& from) {
    std::vector<T*> out;
    for (uintptr_t address : from) out.push_back(reinterpret_cast<T*>(address));
    return out;
}

void run(Tower& tower, const std::vector<int64_t>& rows, const std::vector<uintptr_t>& arrays,
         const std::vector<std::vector<int64_t>>& partitions, const std::vector<uintptr_t>& tables,
         const std::vector<uintptr_t>& results) {
    const TowerRun one{rows, addresses<const float>(arrays), partitions, addresses<const int64_t>(tables),
                       addresses<float>(results)};
    nb::gil_scoped_release release;
    tower.run(one);
}

}  // namespace

void bind_tower(nb::module_& m) {
    nb::enum_<TowerCode>(m, "TowerCode", nb::is_arithmetic())
        .value("INPUT", TowerCode::kInput)
        .value("PRODUCT", TowerCode::kProduct)
        .value("NORM", TowerCode::kNorm)
        .value("ROTATE", TowerCode::kRotate)
        .value("ATTEND", TowerCode::kAttend)
        .value("GATHER", TowerCode::kGather)
        .value("AVERAGE", TowerCode::kAverage)
        .value("ADJUST", TowerCode::kAdjust)
        .value("GATE", TowerCode::kGate);
    nb::class_<TowerOperation>(m, "TowerOperation")
        .def(nb::init<>())
        .def_rw("code", &TowerOperation::code)
        .def_rw("from_", &TowerOperation::from)
        .def_rw("to", &TowerOperation::to)
        .def_rw("products", &TowerOperation::products)
        .def_rw("mode", &TowerOperation::mode)
        .def_rw("scale", &TowerOperation::scale)
        .def_prop_rw(
            "norm", [](const TowerOperation& op) { return op.norm.weight; },
            [](TowerOperation& op, int weight) { op.norm.weight = weight; })
        .def_prop_rw(
            "norm_bias", [](const TowerOperation& op) { return op.norm.bias; },
            [](TowerOperation& op, int bias) { op.norm.bias = bias; })
        .def_prop_rw(
            "eps", [](const TowerOperation& op) { return op.norm.eps; },
            [](TowerOperation& op, float eps) { op.norm.eps = eps; })
        .def_rw("act", &TowerOperation::act)
        .def_rw("heads", &TowerOperation::heads)
        .def_rw("kv_heads", &TowerOperation::kv_heads)
        .def_rw("key_norm", &TowerOperation::key_norm)
        .def_rw("value_norm", &TowerOperation::value_norm)
        .def_rw("from_column", &TowerOperation::from_column)
        .def_rw("columns", &TowerOperation::columns)
        .def_rw("low", &TowerOperation::low)
        .def_rw("high", &TowerOperation::high)
        .def_rw("sliced", &TowerOperation::sliced)
        .def_rw("column", &TowerOperation::column)
        .def_rw("reach", &TowerOperation::reach)
        .def_rw("relative", &TowerOperation::relative)
        .def_rw("by_query", &TowerOperation::by_query)
        .def_rw("by_key", &TowerOperation::by_key)
        .def_rw("places", &TowerOperation::places)
        .def_rw("window", &TowerOperation::window)
        .def_rw("parts", &TowerOperation::parts)
        .def_rw("number", &TowerOperation::number);
    nb::class_<Tower, Store>(m, "Tower")
        .def(nb::init<int, const std::string&, bool>())
        .def("add_buffer", &Tower::add_buffer)
        .def("add", &Tower::add)
        .def("add_output", &Tower::add_output)
        .def_prop_ro("splits", &Tower::splits)
        .def("measure", &Tower::measure)
        .def("seconds", &Tower::seconds)
        .def("run", &run);
}
