// The door to Python: inflight/wire/_http2.pyi has the types.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "session.h"

using namespace inflight;

NB_MODULE(_http2, m) {
    m.attr("VERSION") = NGHTTP2_VERSION;
    const std::pair<const char*, int> numbers[] = {
        {"CALL", kCall},          {"OPEN", kOpen},       {"MESSAGE", kMessage},  {"END", kEnd},
        {"FAULT", kFault},        {"UNKNOWN", kUnknown}, {"CLOSED", kClosed},    {"DRAINED", kDrained},
        {"PONG", kPong},          {"CUT", kCut},         {"FLAGS", kFlags},      {"NO_MESSAGE", kNoMessage},
        {"TOO_LARGE", kTooLarge}, {"SECOND", kSecond},   {"TOO_MUCH", kTooMuch},
    };
    for (const auto& [name, number] : numbers) m.attr(name) = number;

    nb::class_<Limits>(m, "Limits")
        .def(nb::init<>())
        .def_rw("message", &Limits::message)
        .def_rw("requests", &Limits::requests)
        .def_rw("replies", &Limits::replies)
        .def_rw("high_water", &Limits::high_water)
        .def_rw("streams", &Limits::streams)
        .def_rw("stream_window", &Limits::stream_window)
        .def_rw("connection_window", &Limits::connection_window)
        .def_rw("resets", &Limits::resets)
        .def_rw("resets_rate", &Limits::resets_rate);
    nb::class_<Door>(m, "Door").def(nb::init<std::vector<std::pair<std::string, bool>>, Limits, bool, nb::object>(),
                                    nb::arg("routes"), nb::arg("limits"), nb::arg("keys"),
                                    nb::arg("place") = nb::none());
    nb::class_<Session>(m, "Session")
        .def(nb::init<Door&>(), nb::keep_alive<1, 2>())
        .def("feed", &Session::feed)
        .def("news", &Session::news)
        .def("take", &Session::take)
        .def("reply", &Session::reply)
        .def("send", &Session::send)
        .def("begin", &Session::begin)
        .def("finish", &Session::finish)
        .def("took", &Session::took)
        .def("notice", &Session::notice)
        .def("goaway", &Session::goaway)
        .def("expire", &Session::expire)
        .def_prop_ro("over", &Session::over)
        .def_prop_ro("wants_write", &Session::wants_write)
        .def_prop_ro("has_news", &Session::has_news)
        .def_prop_ro("waiting", &Session::waiting)
        .def_prop_ro("streams", &Session::streams);
}
