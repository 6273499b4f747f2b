// The Python module `_native`. Arrays come as addresses: inflight/kernels/program.py checks shapes and dtypes before it
// calls.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "blocks.h"
#include "pack.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace inflight;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Calls work(panel) for each panel of a weight, on all threads.
void in_panels(Store& program, const Weights& w, const std::function<void(int64_t)>& work) {
    std::atomic<int64_t> next{0};
    program.pool().run([&](int) {
        for (int64_t panel; (panel = next.fetch_add(1)) < w.panels;) work(panel);
    });
}

// Throws unless floats and codes can become this format: of the block types those with one float16 scale for 32 inputs.
void check_roundable(const Weights& w) {
    if (is_block(w.format) && w.format != Format::kQ8_0 && w.format != Format::kQ4_0 && w.format != Format::kQ4_1)
        throw std::invalid_argument("this block type is packed from blocks only");
}

int add_floats(Store& program, uintptr_t from, Source source, uintptr_t bias, Format format, bool gated, int64_t n,
               int64_t k, int64_t group) {
    Weights w = describe(format, false, gated, n, k, group);
    check_roundable(w);
    if (w.offsets) throw std::invalid_argument("floats are rounded without offsets");
    char* data = program.allocate(packed_bytes(w));
    float* scales = w.format == Format::kInt8
                        ? at<float>(reinterpret_cast<uintptr_t>(program.allocate(w.panels * kPanel * 4)))
                        : nullptr;
    if (scales) std::fill(scales, scales + w.panels * kPanel, 0.0f);
    in_panels(program, w, [&](int64_t panel) {
        pack_panel(w, panel, at<void>(from), source, data + panel * w.panel_bytes,
                   scales ? scales + panel * kPanel : nullptr);
    });
    w.data = data;
    w.scales = scales;
    return program.add_weights(w, at<float>(bias));
}

int add_codes(Store& program, uintptr_t codes, uintptr_t scales_from, uintptr_t offsets, uintptr_t bias, Format format,
              bool gated, int64_t n, int64_t k, int64_t group) {
    Weights w = describe(format, offsets != 0, gated, n, k, group);
    check_roundable(w);
    if (w.offsets != (offsets != 0)) throw std::invalid_argument("this format has offsets, or has none");
    char* data = program.allocate(packed_bytes(w));
    float* scales = w.format == Format::kInt8
                        ? at<float>(reinterpret_cast<uintptr_t>(program.allocate(w.panels * kPanel * 4)))
                        : nullptr;
    if (scales) std::fill(scales, scales + w.panels * kPanel, 0.0f);
    in_panels(program, w, [&](int64_t panel) {
        pack_codes(w, panel, at<uint8_t>(codes), at<float>(scales_from), at<float>(offsets),
                   data + panel * w.panel_bytes, scales ? scales + panel * kPanel : nullptr);
    });
    w.data = data;
    w.scales = scales;
    return program.add_weights(w, at<float>(bias));
}

// `from` are (address, rows) of stacked tensors, as a GGUF file holds their blocks.
int add_blocks(Store& program, const std::vector<std::pair<uintptr_t, int64_t>>& from, uintptr_t bias, Format format,
               bool gated, int64_t n, int64_t k) {
    Weights w = describe(format, false, gated, n, k, 0);
    std::vector<BlockRows> tensors;
    int64_t rows = 0;
    for (auto [address, count] : from) {
        tensors.push_back({at<void>(address), count});
        rows += count;
    }
    if (!is_block(w.format) || rows != n || k % block_form(w.format).file_inputs)
        throw std::invalid_argument("these are no blocks of a weight of " + std::to_string(n) + " by " +
                                    std::to_string(k));
    char* data = program.allocate(packed_bytes(w));
    in_panels(program, w, [&](int64_t panel) {
        pack_blocks(w, panel, tensors.data(), static_cast<int64_t>(tensors.size()), data + panel * w.panel_bytes);
    });
    w.data = data;
    return program.add_weights(w, at<float>(bias));
}

// A packed weight in memory that outlives the program (a mapped file).
int add_packed(Store& program, uintptr_t data, uintptr_t scales, uintptr_t bias, Format format, bool offsets,
               bool gated, int64_t n, int64_t k, int64_t group) {
    Weights w = describe(format, offsets, gated, n, k, group);
    if (data % 64) throw std::invalid_argument("packed weights begin at a multiple of 64");
    w.data = at<char>(data);
    w.scales = at<float>(scales);
    return program.add_weights(w, at<float>(bias));
}

nb::tuple packed(Store& program, int product) {
    const Weights& w = program.weights(product);
    return nb::make_tuple(reinterpret_cast<uintptr_t>(w.data), packed_bytes(w), reinterpret_cast<uintptr_t>(w.scales),
                          w.scales ? w.panels * kPanel * 4 : 0);
}

nb::list costs(Program& program) {
    nb::list rows;
    for (size_t i = 0; i < program.operations().size(); i++) {
        const Operation& op = program.operations()[i];
        const Cost& cost = program.costs()[i];
        rows.append(nb::make_tuple(op.code, op.products.empty() ? -1 : op.products[0], cost.seconds, cost.bytes,
                                   cost.operations));
    }
    return rows;
}

// The k largest of each row in falling order, of equal ones the first. A heap holds the best so far; nearly all others
// are below its least.
void top_k(uintptr_t from, int64_t rows, int64_t stride, int64_t n, int64_t k, uintptr_t values, uintptr_t indices) {
    auto better = [](const std::pair<float, int64_t>& a, const std::pair<float, int64_t>& b) {
        return a.first > b.first || (a.first == b.first && a.second < b.second);
    };
    std::vector<std::pair<float, int64_t>> best;
    for (int64_t row = 0; row < rows; row++) {
        const float* x = at<float>(from) + row * stride;
        best.clear();
        for (int64_t i = 0; i < n; i++) {
            if (static_cast<int64_t>(best.size()) == k && !(x[i] > best.front().first)) continue;
            if (static_cast<int64_t>(best.size()) == k) {
                std::pop_heap(best.begin(), best.end(), better);
                best.pop_back();
            }
            best.emplace_back(x[i], i);
            std::push_heap(best.begin(), best.end(), better);
        }
        std::sort(best.begin(), best.end(), better);
        for (int64_t i = 0; i < k; i++) {
            at<float>(values)[row * k + i] = best[static_cast<size_t>(i)].first;
            at<int64_t>(indices)[row * k + i] = best[static_cast<size_t>(i)].second;
        }
    }
}

void bind_functions(nb::module_& m) {
    m.def("available", &available);
    m.def("top_k", &top_k, nb::call_guard<nb::gil_scoped_release>());
    m.def("packed_bytes", [](Format format, bool offsets, bool gated, int64_t n, int64_t k, int64_t group) {
        return packed_bytes(describe(format, offsets, gated, n, k, group));
    });
    m.def("kv_bytes", &kv_bytes);
    m.def(
        "checksum", [](uintptr_t data, int64_t bytes) { return checksum(at<char>(data), bytes); },
        nb::call_guard<nb::gil_scoped_release>());
}

void bind_operation(nb::module_& m) {
    nb::class_<Routing>(m, "Routing")
        .def(nb::init<>())
        .def_rw("chosen", &Routing::chosen)
        .def_rw("sigmoid", &Routing::sigmoid)
        .def_rw("normalise", &Routing::normalise)
        .def_rw("bias", &Routing::bias)
        .def_rw("groups", &Routing::groups)
        .def_rw("kept", &Routing::kept)
        .def_rw("single", &Routing::single)
        .def_rw("floor", &Routing::floor)
        .def_rw("scale", &Routing::scale);
    nb::class_<Operation>(m, "Operation")
        .def(nb::init<>())
        .def_rw("from_", &Operation::from)
        .def_rw("to", &Operation::to)
        .def_rw("products", &Operation::products)
        .def_rw("layer", &Operation::layer)
        .def_rw("rope", &Operation::rope)
        .def_rw("norm", &Operation::norm)
        .def_rw("second", &Operation::second)
        .def_rw("third", &Operation::third)
        .def_rw("factor", &Operation::factor)
        .def_rw("into", &Operation::into)
        .def_rw("eps", &Operation::eps)
        .def_rw("centered", &Operation::centered)
        .def_rw("layered", &Operation::layered)
        .def_rw("rotated", &Operation::rotated)
        .def_rw("growth", &Operation::growth)
        .def_rw("period", &Operation::period)
        .def_rw("scale", &Operation::scale)
        .def_rw("softcap", &Operation::softcap)
        .def_rw("column", &Operation::column)
        .def_rw("routing", &Operation::routing)
        .def_rw("gated", &Operation::gated)
        .def_rw("gate_up", &Operation::gate_up)
        .def_rw("down", &Operation::down)
        .def_rw("code", &Operation::code)
        .def_rw("mode", &Operation::mode)
        .def_rw("act", &Operation::act);
}

void run(Program& program, uintptr_t tokens, uintptr_t positions, uintptr_t slots, const std::vector<int64_t>& lengths,
         uintptr_t tables, uintptr_t logits_at, int64_t count, int64_t table_width, int64_t wanted, uintptr_t logits,
         uintptr_t hidden, int hidden_buffer, uintptr_t best, uintptr_t reach, uintptr_t places, uintptr_t until,
         uintptr_t image_at, int64_t images, uintptr_t image_rows, const std::vector<uintptr_t>& added,
         uintptr_t states, uintptr_t save_at, uintptr_t save_to, int64_t saves, uintptr_t adapters) {
    Step step{at<int64_t>(tokens),
              at<int64_t>(positions),
              at<int64_t>(slots),
              lengths.data(),
              at<int32_t>(tables),
              at<int64_t>(logits_at),
              count,
              static_cast<int64_t>(lengths.size()),
              table_width,
              wanted,
              reach ? at<int64_t>(reach) : nullptr};
    std::vector<const float*> layers;
    for (uintptr_t address : added) layers.push_back(at<float>(address));
    step.places = at<int64_t>(places);
    step.place_stride = count;
    step.until = at<int64_t>(until);
    step.image_at = at<int64_t>(image_at);
    step.images = images;
    step.image_rows = at<float>(image_rows);
    step.added = layers.data();
    step.added_layers = static_cast<int64_t>(layers.size());
    step.states = at<int64_t>(states);
    step.save_at = at<int64_t>(save_at);
    step.save_to = at<int64_t>(save_to);
    step.saves = saves;
    step.adapters = at<int64_t>(adapters);
    nb::gil_scoped_release release;
    program.run(step, {at<float>(logits), at<float>(hidden), hidden_buffer, at<int64_t>(best)});
}

void decode(Program& program, bool append, uintptr_t tokens, int64_t width, uintptr_t blocks, int64_t table_width,
            uintptr_t known, uintptr_t computed, int64_t count, uintptr_t logits, uintptr_t hidden, int hidden_buffer,
            uintptr_t best, uintptr_t shift, uintptr_t states, uintptr_t adapters) {
    DecodeBatch batch{at<int32_t>(tokens),   width, at<int32_t>(blocks), table_width,         at<int64_t>(known),
                      at<int64_t>(computed), count, at<int64_t>(shift),  at<int64_t>(states), at<int64_t>(adapters)};
    nb::gil_scoped_release release;
    program.decode(batch, append, {at<float>(logits), at<float>(hidden), hidden_buffer, at<int64_t>(best)});
}

void bind_store(nb::module_& m) {
    nb::class_<Store>(m, "Store")
        .def_prop_ro("isa", &Store::isa)
        .def_prop_ro("bytes", &Store::bytes)
        .def("add_floats", &add_floats, nb::call_guard<nb::gil_scoped_release>())
        .def("add_codes", &add_codes, nb::call_guard<nb::gil_scoped_release>())
        .def("add_blocks", &add_blocks, nb::call_guard<nb::gil_scoped_release>())
        .def("add_packed", &add_packed)
        .def("packed", &packed)
        .def("add_norm",
             [](Store& program, uintptr_t values, int64_t n) { return program.add_norm(at<float>(values), n); });
}

// `format`: of blocks; kFloat: the rows hold floats of type `source`.
int add_table(Program& program, uintptr_t data, Format format, Source source, int64_t n, int64_t k) {
    Table table{at<char>(data), n, 0, source, describe(format, false, false, 1, k, 0)};
    const BlockForm form = block_form(format);
    if (is_block(format) && k % form.file_inputs) throw std::invalid_argument("rows of blocks hold whole blocks");
    table.row_bytes =
        is_block(format) ? k / form.file_inputs * form.file_bytes : k * (source == Source::kFloat ? 4 : 2);
    return program.add_table(table);
}

void bind_program(nb::module_& m) {
    nb::class_<Program, Store>(m, "Program")
        .def(nb::init<int, const std::string&>())
        .def(
            "add_rope",
            [](Program& program, std::vector<float> inverse, std::vector<float> far, float factor, int64_t original,
               double theta, double stretch, std::vector<int> axes) {
                return program.add_rope(
                    {std::move(inverse), std::move(far), factor, original, theta, stretch, std::move(axes)});
            },
            "inverse"_a, "far"_a, "factor"_a, "original"_a, "theta"_a = 0.0, "stretch"_a = 0.0,
            "axes"_a = std::vector<int>())
        .def("add_layer",
             [](Program& program, int64_t heads, int64_t kv_heads, int64_t dim, float scale, int64_t window,
                float softcap, int sinks, int source, int64_t latent, bool causal) {
                 Attention a{};
                 a.heads = heads;
                 a.kv_heads = kv_heads;
                 a.dim = dim;
                 a.depth = (dim + kLanes - 1) / kLanes * kLanes;
                 a.scale = scale;
                 a.window = window;
                 a.softcap = softcap;
                 a.source = source;
                 a.latent = latent;
                 a.causal = causal;
                 return program.add_layer(a, sinks);
             })
        .def("add_delta",
             [](Program& program, int64_t key_heads, int64_t value_heads, int64_t key_dim, int64_t value_dim,
                int64_t taps, bool tiled, float eps, const std::vector<int>& arrays) {
                 return program.add_delta({key_heads, value_heads, key_dim, value_dim, taps, tiled, eps, nullptr,
                                           nullptr, nullptr, nullptr, 0},
                                          arrays);
             })
        .def("add_short_conv",
             [](Program& program, int64_t channels, int64_t taps, const std::vector<int>& arrays) {
                 return program.add_short_conv({channels, taps, nullptr, nullptr, 0}, arrays);
             })
        .def("add_mamba",
             [](Program& program, int64_t heads, int64_t head_dim, int64_t groups, int64_t state, int64_t taps,
                float gate_scale, float step_scale, float least, float most, bool norm_first, float eps,
                const std::vector<int>& arrays) {
                 Mamba m{};
                 m.heads = heads;
                 m.head_dim = head_dim;
                 m.groups = groups;
                 m.state = state;
                 m.taps = taps;
                 m.gate_scale = gate_scale;
                 m.step_scale = step_scale;
                 m.least = least;
                 m.most = most;
                 m.norm_first = norm_first;
                 m.eps = eps;
                 return program.add_mamba(m, arrays);
             })
        .def_prop_ro("state_bytes", &Program::state_bytes)
        .def("make_states", &Program::make_states)
        .def("copy_state", &Program::copy_state, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("block_bytes", &Program::block_bytes)
        .def(
            "read_block",
            [](const Program& program, int64_t block, uintptr_t to) { program.read_block(block, at<char>(to)); },
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "write_block",
            [](Program& program, int64_t block, uintptr_t from) { program.write_block(block, at<char>(from)); },
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "read_state",
            [](const Program& program, int64_t slot, uintptr_t to) { program.read_state(slot, at<char>(to)); },
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "write_state",
            [](Program& program, int64_t slot, uintptr_t from) { program.write_state(slot, at<char>(from)); },
            nb::call_guard<nb::gil_scoped_release>())
        .def("add_buffer", &Program::add_buffer)
        .def("add_table", &add_table)
        .def("add", &Program::add)
        .def("make_caches", &Program::make_caches)
        .def("measure", &Program::measure)
        .def("costs", &costs)
        .def("run", &run, "tokens"_a, "positions"_a, "slots"_a, "lengths"_a, "tables"_a, "logits_at"_a, "count"_a,
             "table_width"_a, "wanted"_a, "logits"_a, "hidden"_a, "hidden_buffer"_a, "best"_a, "reach"_a = 0,
             "places"_a = 0, "until"_a = 0, "image_at"_a = 0, "images"_a = 0, "image_rows"_a = 0,
             "added"_a = std::vector<uintptr_t>(), "states"_a = 0, "save_at"_a = 0, "save_to"_a = 0, "saves"_a = 0,
             "adapters"_a = 0)
        .def("decode", &decode, "append"_a, "tokens"_a, "width"_a, "blocks"_a, "table_width"_a, "known"_a, "computed"_a,
             "count"_a, "logits"_a, "hidden"_a, "hidden_buffer"_a, "best"_a, "shift"_a, "states"_a = 0,
             "adapters"_a = 0);
}

}  // namespace

void bind_enums(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_tower(nb::module_& m);
void bind_lora(nb::module_& m);

NB_MODULE(_native, m) {
    bind_enums(m);
    bind_functions(m);
    bind_operation(m);
    bind_store(m);
    bind_program(m);
    bind_tower(m);
    bind_lora(m);
    bind_sampling(m);
}
