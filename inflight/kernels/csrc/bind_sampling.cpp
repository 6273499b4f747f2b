// Sampling in the Python module `_native`. inflight/kernels/sampling.py checks shapes and dtypes before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "sampling.h"

namespace nb = nanobind;
using namespace inflight;

namespace {

using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// `rows` are tuples (row, sampling, known tokens, tokens of the prompt, mask or None). Writes `tokens` and `logprobs`
// by row. Returns the most likely tokens of rows that asked for them, and the rows whose logits are not all numbers.
nb::tuple sample(Sampler& sampler, uintptr_t logits, int64_t stride, int64_t n, nb::list rows, uintptr_t tokens,
                 uintptr_t logprobs) {
    std::vector<Known> known;
    for (nb::handle each : rows) {
        nb::tuple row = nb::cast<nb::tuple>(each);
        Tokens held = nb::cast<Tokens>(row[2]);
        Known k{nb::cast<int64_t>(row[0]),
                &nb::cast<const Sampling&>(row[1]),
                held.data(),
                static_cast<int64_t>(held.size()),
                nb::cast<int64_t>(row[3]),
                nullptr,
                0};
        if (!row[4].is_none()) {
            nb::bytes mask = nb::cast<nb::bytes>(row[4]);
            k.mask = static_cast<const uint8_t*>(mask.data());
            k.mask_bytes = static_cast<int64_t>(mask.size());
        }
        known.push_back(k);
    }
    std::vector<Chosen> chosen(known.size());
    {
        nb::gil_scoped_release release;
        sampler.sample(reinterpret_cast<float*>(logits), stride, n, known, chosen.data());
    }
    nb::list top, unsound;
    for (size_t i = 0; i < known.size(); i++) {
        int64_t row = known[i].row;
        reinterpret_cast<int64_t*>(tokens)[row] = chosen[i].token;
        reinterpret_cast<float*>(logprobs)[row] = chosen[i].logprob;
        if (known[i].sampling->top) top.append(nb::make_tuple(row, nb::cast(chosen[i].top)));
        if (!chosen[i].sound) unsound.append(row);
    }
    return nb::make_tuple(top, unsound);
}

}  // namespace

void bind_sampling(nb::module_& m) {
    nb::class_<Sampling>(m, "Sampling")
        .def(nb::init<>())
        .def_rw("draw", &Sampling::draw)
        .def_rw("temperature", &Sampling::temperature)
        .def_rw("top_k", &Sampling::top_k)
        .def_rw("top_p", &Sampling::top_p)
        .def_rw("min_p", &Sampling::min_p)
        .def_rw("typical_p", &Sampling::typical_p)
        .def_rw("repetition", &Sampling::repetition)
        .def_rw("frequency", &Sampling::frequency)
        .def_rw("presence", &Sampling::presence)
        .def_rw("bias", &Sampling::bias)
        .def_rw("seed", &Sampling::seed)
        .def_rw("logprob", &Sampling::logprob)
        .def_rw("top", &Sampling::top)
        .def_rw("watermark", &Sampling::watermark)
        .def_rw("key", &Sampling::key)
        .def_rw("gamma", &Sampling::gamma)
        .def_rw("delta", &Sampling::delta);
    nb::class_<Sampler>(m, "Sampler")
        .def(nb::init<int, const std::string&>())
        .def("sample", &sample)
        .def("log_softmax_at", [](Sampler& sampler, uintptr_t logits, int64_t rows, int64_t stride, int64_t n,
                                  uintptr_t tokens, uintptr_t out) {
            nb::gil_scoped_release release;
            sampler.log_softmax_at(reinterpret_cast<const float*>(logits), rows, stride, n,
                                   reinterpret_cast<const int64_t*>(tokens), reinterpret_cast<float*>(out));
        });
}
