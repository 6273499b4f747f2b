// The door to Python: inflight/text/_bpe.pyi has the types.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>

#include "bpe.h"

namespace nb = nanobind;
using namespace inflight;

namespace {

constexpr size_t kQuick = 4096;  // bytes that are encoded before other threads are let in

nb::object text_of(std::string_view text) {
    return nb::steal(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr));
}

// Without the copy that CPython would keep of each text that is not ASCII.
void add(Texts& texts, nb::handle item) {
    if (!PyUnicode_Check(item.ptr())) throw nb::type_error("a text is wanted");
    if (PyUnicode_IS_ASCII(item.ptr())) {
        const auto* data = static_cast<const char*>(PyUnicode_DATA(item.ptr()));
        return texts.add({data, static_cast<size_t>(PyUnicode_GET_LENGTH(item.ptr()))});
    }
    nb::object bytes = nb::steal(PyUnicode_AsUTF8String(item.ptr()));
    if (!bytes.is_valid()) throw nb::python_error();
    texts.add({PyBytes_AS_STRING(bytes.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr()))});
}

Texts listed(nb::list items) {
    Texts texts;
    texts.reserve(items.size());
    for (nb::handle item : items) add(texts, item);
    return texts;
}

struct Buffer {
    Py_buffer view{};
    explicit Buffer(nb::handle object) {
        if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_SIMPLE)) throw nb::python_error();
    }
    ~Buffer() { PyBuffer_Release(&view); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// From byte `start` of a buffer on: sizes as little-endian uint64, each followed by its text.
Texts in_a_file(nb::handle object, size_t start, size_t count) {
    const Buffer buffer(object);
    const auto size = static_cast<size_t>(buffer.view.len);
    const auto* bytes = static_cast<const char*>(buffer.view.buf);
    if (start > size || count > (size - start) / 8) throw std::out_of_range("texts");
    Texts texts;
    texts.reserve(count);
    for (size_t at = start; count; --count) {
        uint64_t length;
        if (size - at < sizeof length) throw std::out_of_range("texts");
        std::memcpy(&length, bytes + at, sizeof length);
        at += sizeof length;
        if (length > size - at) throw std::out_of_range("texts");
        const std::string_view text(bytes + at, length);
        if (!is_utf8(text)) throw std::invalid_argument("a text is no UTF-8");
        texts.add(text);
        at += length;
    }
    return texts;
}

// As Python indexes.
std::string_view item(const Texts& texts, Py_ssize_t index) {
    const auto size = static_cast<Py_ssize_t>(texts.size());
    if (index < -size || index >= size) throw nb::index_error();
    return texts.at(static_cast<size_t>(index < 0 ? index + size : index));
}

bool has_empty(const Texts& texts) {
    for (size_t index = 0; index < texts.size(); ++index)
        if (texts.at(index).empty()) return true;
    return false;
}

using Order = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

class Encoder {
  public:
    Encoder(const Tokens& tokens, std::optional<uint32_t> unknown, bool bytes, bool whole_pieces, nb::object merges,
            const std::vector<uint32_t>& added)
        : tokens_(tokens), added_(checked(added)) {
        const Kind kind{unknown.value_or(kNone), bytes, whole_pieces};
        if (kind.unknown != kNone && kind.unknown >= tokens.size()) throw std::out_of_range("unknown");
        if (nb::isinstance<Texts>(merges)) {
            bpe_ = std::make_unique<Bpe>(tokens, kind, nb::cast<const Texts&>(merges));
        } else {
            const Order order = nb::cast<Order>(merges);
            if (order.shape(0) != tokens.size()) throw std::invalid_argument("an order for each token is wanted");
            bpe_ =
                std::make_unique<Bpe>(tokens, kind, std::vector<uint32_t>(order.data(), order.data() + order.shape(0)));
        }
    }

    nb::list split(std::string_view text) const {
        nb::list parts;
        for (const auto& [id, part] : added_.split(text)) {
            if (id == kNone)
                parts.append(text_of(part));
            else
                parts.append(id);
        }
        return parts;
    }

    std::vector<uint32_t> encode(nb::list pieces) const {
        const Texts texts = listed(pieces);
        std::vector<uint32_t> ids;
        const auto all = [&] {
            Memo memo;
            for (size_t index = 0; index < texts.size(); ++index) bpe_->encode(texts.at(index), memo, ids);
        };
        if (texts.bytes() > kQuick) {
            nb::gil_scoped_release others;
            all();
        } else {
            all();
        }
        return ids;
    }

  private:
    Added checked(const std::vector<uint32_t>& added) const {
        for (uint32_t id : added)
            if (id >= tokens_.size() || tokens_.text(id).empty()) throw std::out_of_range("added");
        return Added(tokens_, added);
    }

    const Tokens& tokens_;
    Added added_;
    std::unique_ptr<Bpe> bpe_;
};

}  // namespace

NB_MODULE(_bpe, m) {
    nb::set_leak_warnings(
        false);  // a tokenizer lives as long as the process, whose objects are not collected at its end
    nb::class_<Texts>(m, "Texts")
        .def("__init__", [](Texts* made, nb::list texts) { new (made) Texts(listed(texts)); })
        .def_static("in_a_file", &in_a_file, nb::arg("buffer"), nb::arg("start"), nb::arg("count"))
        .def("has_empty", &has_empty)
        .def("__len__", &Texts::size)
        .def("__getitem__", [](const Texts& texts, Py_ssize_t index) { return text_of(item(texts, index)); });
    nb::class_<Tokens>(m, "Tokens")
        .def(nb::init<Texts>())
        .def("__len__", &Tokens::size)
        .def("__getitem__", [](const Tokens& tokens, Py_ssize_t index) { return text_of(item(tokens.texts(), index)); })
        .def("find", [](const Tokens& tokens, std::string_view text) {
            const uint32_t id = tokens.find(text);
            return id == kNone ? std::nullopt : std::optional<uint32_t>(id);
        });
    nb::class_<Encoder>(m, "Encoder")
        .def(nb::init<const Tokens&, std::optional<uint32_t>, bool, bool, nb::object, const std::vector<uint32_t>&>(),
             nb::arg("tokens"), nb::arg("unknown").none(), nb::arg("bytes"), nb::arg("whole_pieces"), nb::arg("merges"),
             nb::arg("added"), nb::keep_alive<1, 2>())
        .def("split", &Encoder::split)
        .def("encode", &Encoder::encode);
}
