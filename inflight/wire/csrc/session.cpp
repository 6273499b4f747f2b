#include "session.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

namespace inflight {

namespace {

constexpr size_t kMaxHeaders = 64u << 10;      // of one request, counted as HPACK does
constexpr size_t kFirst = 256u << 10;          // bytes that are set aside for a message before any of it has come
constexpr size_t kLarge = 512u << 10;          // bytes from which Python is asked where a message goes,
constexpr size_t kShown = 64u << 10;           // as soon as so many of them have come
constexpr uint32_t kMaxFrame = 256u << 10;     // bytes of a DATA frame, either way
constexpr size_t kSlack = 1024;                // bytes of frame heads and headers beside the messages that are sent
constexpr int32_t kNewestStream = 0x7fffffff;  // what a shutdown notice names
constexpr uint8_t kPing[8] = {'i', 'n', 'f', 'l', 'i', 'g', 'h', 't'};

nghttp2_nv field(std::string_view name, std::string_view value, uint8_t flags = NGHTTP2_NV_FLAG_NONE) {
    return {reinterpret_cast<uint8_t*>(const_cast<char*>(name.data())),
            reinterpret_cast<uint8_t*>(const_cast<char*>(value.data())), name.size(), value.size(), flags};
}

// Of fields that live as long as the process nothing is copied.
nghttp2_nv fixed(std::string_view name, std::string_view value) {
    return field(name, value, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE);
}

bool starts_with(std::string_view text, std::string_view with) { return text.substr(0, with.size()) == with; }

bool is_grpc(std::string_view type) {
    constexpr std::string_view name = "application/grpc";
    return type == name || starts_with(type, "application/grpc+proto") || starts_with(type, "application/grpc;");
}

nb::object or_none(const std::string& text) {
    return text.empty() ? nb::none() : nb::object(nb::bytes(text.data(), text.size()));
}

Session& self(void* user_data) { return *static_cast<Session*>(user_data); }

// No exception may pass through nghttp2, which is C.
template <typename Function>
auto guarded(Function function) -> decltype(function()) {
    try {
        return function();
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("inflight.wire._http2");
    } catch (...) {}
    return NGHTTP2_ERR_CALLBACK_FAILURE;
}

int begin_headers(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    return guarded([&] { return self(user_data).on_begin(frame); });
}

int header(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size, const uint8_t* value,
           size_t value_size, uint8_t, void* user_data) {
    return guarded([&] {
        return self(user_data).on_header(frame, {reinterpret_cast<const char*>(name), name_size},
                                         {reinterpret_cast<const char*>(value), value_size});
    });
}

int frame_received(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    return guarded([&] { return self(user_data).on_frame(frame); });
}

int chunk_received(nghttp2_session*, uint8_t, int32_t id, const uint8_t* data, size_t length, void* user_data) {
    return guarded([&] { return self(user_data).on_chunk(id, data, length); });
}

int stream_closed(nghttp2_session*, int32_t id, uint32_t, void* user_data) {
    return guarded([&] { return self(user_data).on_close(id); });
}

int frame_sent(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    return guarded([&] { return self(user_data).on_sent(frame); });
}

ssize_t read_replies(nghttp2_session*, int32_t, uint8_t*, size_t length, uint32_t* flags, nghttp2_data_source* source,
                     void* user_data) {
    return guarded(
        [&]() -> ssize_t { return self(user_data).on_read(*static_cast<Stream*>(source->ptr), length, flags); });
}

int send_data(nghttp2_session*, nghttp2_frame*, const uint8_t* head, size_t length, nghttp2_data_source* source,
              void* user_data) {
    return guarded([&] { return self(user_data).on_data(*static_cast<Stream*>(source->ptr), head, length); });
}

ssize_t read_length(nghttp2_session*, uint8_t, int32_t, int32_t connection, int32_t stream, uint32_t frame, void*) {
    return std::min({static_cast<ssize_t>(connection), static_cast<ssize_t>(stream),
                     static_cast<ssize_t>(std::min(frame, kMaxFrame))});
}

}  // namespace

// Door

Door::Door(std::vector<std::pair<std::string, bool>> routes_, Limits limits_, bool keys_, nb::object place_)
    : routes(std::move(routes_)), limits(limits_), keys(keys_), place(std::move(place_)) {
    for (size_t i = 0; i < routes.size(); i++) by_path.emplace(routes[i].first, static_cast<int>(i));
    if (nghttp2_option_new(&option) != 0 || nghttp2_session_callbacks_new(&callbacks) != 0) throw std::bad_alloc();
    nghttp2_option_set_no_auto_window_update(option, 1);
    nghttp2_option_set_no_closed_streams(option, 1);
    nghttp2_option_set_stream_reset_rate_limit(option, limits.resets, limits.resets_rate);
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, frame_received);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, chunk_received);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, stream_closed);
    nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, frame_sent);
    nghttp2_session_callbacks_set_send_data_callback(callbacks, send_data);
    nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, read_length);
}

Door::~Door() {
    nghttp2_option_del(option);
    nghttp2_session_callbacks_del(callbacks);
}

// Buffer

void Buffer::reserve(size_t capacity) {
    if (capacity <= capacity_) return;
    if (object_ == nullptr) {
        object_ = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(capacity));
    } else {
        _PyBytes_Resize(&object_, static_cast<Py_ssize_t>(capacity));
    }
    if (object_ == nullptr) {
        PyErr_Clear();
        size_ = capacity_ = 0;
        throw std::bad_alloc();
    }
    capacity_ = capacity;
}

void Buffer::append(const void* data, size_t length, size_t expected) {
    if (length == 0) return;
    if (size_ + length > capacity_) reserve(std::max(size_ + length, std::min(2 * capacity_, expected)));
    std::memcpy(PyBytes_AS_STRING(object_) + size_, data, length);
    size_ += length;
}

nb::object Buffer::take() {
    PyObject* object = object_ != nullptr ? object_ : PyBytes_FromStringAndSize(nullptr, 0);
    object_ = nullptr;
    if (object != nullptr && size_ != capacity_) _PyBytes_Resize(&object, static_cast<Py_ssize_t>(size_));
    size_ = capacity_ = 0;
    if (object == nullptr) nb::raise_python_error();
    return nb::steal(object);
}

// Incoming

void Incoming::append(const void* data, size_t length, size_t expected) {
    if (placed()) {
        std::memcpy(view_.data() + size_, data, length);
    } else {
        bytes_.append(data, length, expected);
    }
    size_ += length;
}

nb::object Incoming::first() const { return nb::bytes(bytes_.data(), bytes_.size()); }

void Incoming::move_to(nb::object memory, View view) {
    std::memcpy(view.data(), bytes_.data(), size_);
    bytes_.take();
    memory_ = std::move(memory);
    view_ = std::move(view);
}

nb::object Incoming::take() {
    size_ = 0;
    if (!placed()) return bytes_.take();
    view_ = View();
    return std::move(memory_);
}

// Session: from Python

// A session is not entered twice: Python code that runs when an object is freed may come here again.
class Session::Turn {
  public:
    explicit Turn(Session& session) : session_(session) {
        if (session.busy_) throw std::runtime_error("the session is in use");
        session.busy_ = true;
    }
    ~Turn() { session_.busy_ = false; }

  private:
    Session& session_;
};

Session::Session(Door& door) : door_(door) {
    check(nghttp2_session_server_new2(&session_, door.callbacks, this, door.option));
    const nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, door.limits.streams},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, door.limits.stream_window},
        {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, kMaxFrame},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, kMaxHeaders},
#if NGHTTP2_VERSION_NUM >= 0x013100
        {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},  // calls are served as they come
#endif
    };
    check(nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, settings, sizeof settings / sizeof *settings));
    check(nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, door.limits.connection_window));
}

Session::~Session() { nghttp2_session_del(session_); }

void Session::check(int result) const {
    if (result == NGHTTP2_ERR_NOMEM) throw std::bad_alloc();
    if (result < 0) throw std::runtime_error(nghttp2_strerror(result));
}

Stream* Session::find(int32_t id) {
    auto entry = streams_.find(id);
    return entry == streams_.end() ? nullptr : entry->second.get();
}

template <typename... Args>
void Session::tell(Event event, int32_t id, Args&&... args) {
    events_.append(nb::make_tuple(static_cast<int>(event), id, std::forward<Args>(args)...));
}

nb::list Session::news() {
    nb::list events = std::move(events_);
    events_ = nb::list();
    return events;
}

nb::list Session::feed(nb::handle data) {
    Turn turn(*this);
    Py_buffer view;
    if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) nb::raise_python_error();
    if (!dead_) {
        ssize_t read =
            nghttp2_session_mem_recv(session_, static_cast<const uint8_t*>(view.buf), static_cast<size_t>(view.len));
        dead_ = read < 0;  // its later frames cannot be read
    }
    PyBuffer_Release(&view);
    return news();
}

nb::object Session::take(size_t limit) {
    Turn turn(*this);
    if (dead_) return nb::none();
    out_.reserve(kSlack + std::min(limit, waiting_));
    while (out_.size() < limit) {
        const uint8_t* data;
        ssize_t length = nghttp2_session_mem_send(session_, &data);
        if (length < 0) dead_ = true;
        if (length <= 0) break;
        out_.append(data, static_cast<size_t>(length));
    }
    if (out_.size() == 0) return nb::none();
    return out_.take();
}

Piece as_piece(nb::handle message) {
    Piece piece;
    if (PyList_Check(message.ptr())) {
        for (nb::handle part : nb::borrow<nb::list>(message)) piece.parts.emplace_back(part, PyBUF_SIMPLE);
    } else {
        piece.parts.emplace_back(message, PyBUF_SIMPLE);
    }
    for (const View& part : piece.parts) piece.size += part.size();
    if (piece.size > UINT32_MAX) throw std::length_error("a message has four bytes of length");
    piece.prefix[0] = 0;
    for (size_t i = 0; i < 4; i++) piece.prefix[1 + i] = static_cast<uint8_t>(piece.size >> (24 - 8 * i));
    return piece;
}

bool Session::reply(int32_t id, nb::object message) {
    Stream* stream = find(id);
    if (stream == nullptr || stream->ended) return true;
    Piece piece = as_piece(message);
    if (waiting_ != 0 && waiting_ + piece.size > door_.limits.replies) return false;
    put(*stream, std::move(piece));
    stream->ended = true;
    begin(id);
    resume(*stream);
    return true;
}

size_t Session::send(int32_t id, nb::object message) {
    Stream* stream = find(id);
    if (stream == nullptr || stream->ended) return 0;
    put(*stream, as_piece(message));
    begin(id);
    resume(*stream);
    stream->wake = stream->queued > door_.limits.high_water;
    return stream->queued;
}

void Session::begin(int32_t id) {
    Stream* stream = find(id);
    if (stream != nullptr && !stream->begun) respond(*stream, "200", true);
}

void Session::finish(int32_t id, int status, nb::bytes text, std::vector<std::pair<std::string, std::string>> headers) {
    Stream* stream = find(id);
    if (stream == nullptr || stream->ended) return;
    stream->ended = true;
    drop(*stream);
    if (stream->begun) {
        stream->status = status;
        stream->text.assign(text.c_str(), text.size());
        resume(*stream);
        return;
    }
    stream->begun = true;
    const std::string code = std::to_string(status);
    std::vector<nghttp2_nv> fields = {fixed(":status", "200"), fixed("content-type", "application/grpc")};
    for (const auto& [name, value] : headers) fields.push_back(field(name, value));
    fields.push_back(field("grpc-status", code));
    if (text.size() != 0) fields.push_back(field("grpc-message", {text.c_str(), text.size()}));
    check(nghttp2_submit_response(session_, id, fields.data(), fields.size(), nullptr));
}

void Session::took(int32_t id, size_t size) {
    Stream* stream = find(id);
    if (stream == nullptr || stream->untaken == 0) return;
    size = std::min(size, stream->unread);
    stream->unread -= size;
    requests_ -= size;
    if (--stream->untaken == 0 && stream->held != 0) {
        check(nghttp2_session_consume_stream(session_, id, stream->held));
        stream->held = 0;
    }
}

void Session::notice() { check(nghttp2_submit_shutdown_notice(session_)); }

void Session::goaway() {
    int32_t last = nghttp2_session_get_last_proc_stream_id(session_);
    check(nghttp2_submit_goaway(session_, NGHTTP2_FLAG_NONE, last, NGHTTP2_NO_ERROR, nullptr, 0));
}

void Session::expire(double read_timeout, double write_timeout, double min_rate) {
    const auto now = Clock::now();
    auto seconds = [&](Clock::time_point since) { return std::chrono::duration<double>(now - since).count(); };
    for (const auto& [id, stream] : streams_) {
        const Stream& s = *stream;
        bool reads = !s.told && !s.ended;
        if (reads ? seconds(s.begun_at) > read_timeout + static_cast<double>(s.unread) / min_rate
                  : s.ended && seconds(s.moved_at) > write_timeout)
            check(nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, id, NGHTTP2_CANCEL));
    }
}

void Session::put(Stream& stream, Piece piece) {
    if (stream.pieces.empty()) stream.moved_at = Clock::now();
    stream.queued += kPrefix + piece.size;
    waiting_ += kPrefix + piece.size;
    stream.pieces.push_back(std::move(piece));
}

void Session::resume(Stream& stream) {
    if (!stream.deferred) return;
    stream.deferred = false;
    check(nghttp2_session_resume_data(session_, stream.id));
}

// The head of an answer: with replies and trailers behind it, or alone.
void Session::respond(Stream& stream, const char* status, bool body) {
    stream.begun = true;
    if (!body) {
        const nghttp2_nv fields[] = {fixed(":status", status), fixed("content-length", "0"), fixed("allow", "POST")};
        check(nghttp2_submit_response(session_, stream.id, fields, stream.post ? 2 : 3, nullptr));
        return;
    }
    const nghttp2_nv fields[] = {fixed(":status", status), fixed("content-type", "application/grpc")};
    nghttp2_data_provider replies;
    replies.source.ptr = &stream;
    replies.read_callback = read_replies;
    check(nghttp2_submit_response(session_, stream.id, fields, 2, &replies));
}

// Session: from nghttp2

int Session::on_begin(const nghttp2_frame* frame) {
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
    streams_[frame->hd.stream_id] = std::make_unique<Stream>(frame->hd.stream_id);
    return 0;
}

int Session::on_header(const nghttp2_frame* frame, std::string_view name, std::string_view value) {
    Stream* stream = find(frame->hd.stream_id);
    if (stream == nullptr) return 0;
    stream->header_bytes += name.size() + value.size() + 32;
    if (stream->header_bytes > kMaxHeaders) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    if (frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;  // trailers
    if (name == ":method") {
        stream->post = value == "POST";
    } else if (name == ":path") {
        auto route = door_.by_path.find(value);
        if (route != door_.by_path.end()) {
            stream->route = route->second;
        } else {
            stream->path = value;
        }
    } else if (name == "content-type") {
        stream->grpc = is_grpc(value);
    } else if (name == "grpc-timeout") {
        stream->timeout = value;
    } else if (name == "grpc-encoding") {
        if (value != "identity") stream->encoding = value;
    } else if (door_.keys && name == "authorization") {
        stream->authorization = value;
    }
    return 0;
}

int Session::on_frame(const nghttp2_frame* frame) {
    if (frame->hd.type == NGHTTP2_PING && (frame->hd.flags & NGHTTP2_FLAG_ACK) != 0) {
        if (std::memcmp(frame->ping.opaque_data, kPing, sizeof kPing) == 0) tell(kPong, 0);
        return 0;
    }
    if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
    Stream* stream = find(frame->hd.stream_id);
    if (stream == nullptr) return 0;
    if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST) head_ended(*stream);
    if ((frame->hd.flags & NGHTTP2_FLAG_END_STREAM) != 0 && !stream->dropped) request_ended(*stream);
    return 0;
}

void Session::head_ended(Stream& stream) {
    if (!stream.post || !stream.grpc) {
        stream.ended = true;
        drop(stream);
        respond(stream, stream.post ? "415" : "405", false);
    } else if (stream.route < 0) {
        drop(stream);
        tell(kUnknown, stream.id, nb::bytes(stream.path.data(), stream.path.size()));
    } else if (door_.routes[static_cast<size_t>(stream.route)].second) {
        stream.told = true;
        tell(kOpen, stream.id, stream.route, or_none(stream.timeout), or_none(stream.encoding),
             or_none(stream.authorization));
    }
}

void Session::request_ended(Stream& stream) {
    if (stream.message.size() != 0 || stream.prefix_size != 0) {
        fault(stream, kCut, stream.prefix_size + stream.message.size(), 0);
    } else if (stream.told) {
        tell(kEnd, stream.id);
    } else if (!stream.whole.is_valid()) {
        fault(stream, kNoMessage, 0, 0);
    } else {
        stream.told = true;
        requests_ -= stream.unread;
        stream.unread = 0;
        tell(kCall, stream.id, stream.route, or_none(stream.timeout), or_none(stream.encoding),
             or_none(stream.authorization), std::move(stream.whole), stream.compressed);
        stream.whole.reset();
    }
}

int Session::on_chunk(int32_t id, const uint8_t* data, size_t length) {
    const size_t all = length;
    Stream* stream = find(id);
    while (length != 0 && stream != nullptr && !stream->dropped) {
        if (stream->prefix_size < kPrefix) {
            size_t part = std::min(kPrefix - stream->prefix_size, length);
            std::memcpy(stream->prefix + stream->prefix_size, data, part);
            stream->prefix_size += part;
            data += part;
            length -= part;
            if (stream->prefix_size < kPrefix || !prefix_ended(*stream)) continue;
        }
        size_t part = std::min(stream->length - stream->message.size(), length);
        if (requests_ + part > door_.limits.requests) {
            fault(*stream, kTooMuch, requests_, 0);
            break;
        }
        stream->message.append(data, part, stream->length);
        if (!stream->shown && stream->message.size() >= kShown) place(*stream);
        stream->unread += part;
        requests_ += part;
        data += part;
        length -= part;
        if (stream->message.size() == stream->length) message_ended(*stream);
    }
    // The connection's credit returns at once, so that no call stands in another's way; a stream's when its handler
    // took what came.
    if (stream != nullptr && stream->untaken != 0 && !stream->dropped) {
        stream->held += all;
        check(nghttp2_session_consume_connection(session_, all));
    } else {
        check(nghttp2_session_consume(session_, id, all));
    }
    return 0;
}

// Whether the message may come.
bool Session::prefix_ended(Stream& stream) {
    const uint8_t* p = stream.prefix;
    stream.length =
        static_cast<size_t>(p[1]) << 24 | static_cast<size_t>(p[2]) << 16 | static_cast<size_t>(p[3]) << 8 | p[4];
    if (p[0] > 1) {
        fault(stream, kFlags, p[0], 0);
    } else if (stream.length > door_.limits.message) {
        fault(stream, kTooLarge, stream.length, door_.limits.message);
    } else if (stream.whole.is_valid()) {
        fault(stream, kSecond, 0, 0);
    } else {
        stream.compressed = p[0] == 1;
        stream.shown = door_.place.is_none() || stream.compressed || stream.length < kLarge;
        stream.message.reserve(std::min(stream.length, kFirst));
        return true;
    }
    return false;
}

// Asks Python for the memory of the message that comes in. What goes wrong there costs a copy, not the call.
void Session::place(Stream& stream) {
    stream.shown = true;
    try {
        nb::object memory = door_.place(stream.route, stream.message.first(), stream.length);
        if (memory.is_none()) return;
        View view(memory, PyBUF_WRITABLE);
        if (view.size() == stream.length) stream.message.move_to(std::move(memory), std::move(view));
    } catch (nb::python_error& error) {
        error.discard_as_unraisable("inflight.wire._http2");
    }
}

void Session::message_ended(Stream& stream) {
    nb::object message = stream.message.take();
    stream.prefix_size = 0;
    if (stream.told) {
        stream.untaken++;
        tell(kMessage, stream.id, std::move(message), stream.compressed);
    } else {
        stream.whole = std::move(message);
    }
}

void Session::fault(Stream& stream, Fault what, size_t first, size_t second) {
    drop(stream);
    tell(kFault, stream.id, static_cast<int>(what), first, second);
}

// What came of a request goes, and what still comes is not kept.
void Session::drop(Stream& stream) {
    stream.dropped = true;
    requests_ -= stream.unread;
    stream.unread = stream.untaken = stream.prefix_size = 0;
    stream.message.take();
    stream.whole.reset();
}

int Session::on_close(int32_t id) {
    auto entry = streams_.find(id);
    if (entry == streams_.end()) return 0;
    std::unique_ptr<Stream> stream = std::move(entry->second);
    streams_.erase(entry);
    requests_ -= stream->unread;
    waiting_ -= stream->queued;
    if (stream->told && !stream->ended) tell(kClosed, id);
    return 0;
}

int Session::on_sent(const nghttp2_frame* frame) {
    // The ping goes behind the notice: nghttp2 lets one that waits with it pass first.
    if (frame->hd.type == NGHTTP2_GOAWAY && frame->goaway.last_stream_id == kNewestStream)
        check(nghttp2_submit_ping(session_, NGHTTP2_FLAG_NONE, kPing));
    // An answer may come before the request has ended; then the caller is told to stop.
    if (frame->hd.type != NGHTTP2_HEADERS || (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) == 0) return 0;
    if (nghttp2_session_get_stream_remote_close(session_, frame->hd.stream_id) != 0) return 0;
    check(nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_NO_ERROR));
    return 0;
}

// How many bytes come next; `on_data` gives them.
ssize_t Session::on_read(Stream& stream, size_t length, uint32_t* flags) {
    if (stream.queued == 0 && !stream.ended) {
        stream.deferred = true;
        return NGHTTP2_ERR_DEFERRED;
    }
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (stream.queued > length) return static_cast<ssize_t>(length);
    if (stream.ended) {
        *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
        const std::string code = std::to_string(stream.status);
        const nghttp2_nv fields[] = {field("grpc-status", code), field("grpc-message", stream.text)};
        check(nghttp2_submit_trailer(session_, stream.id, fields, stream.text.empty() ? 1 : 2));
    }
    return static_cast<ssize_t>(stream.queued);
}

int Session::on_data(Stream& stream, const uint8_t* head, size_t length) {
    out_.append(head, 9);
    stream.queued -= length;
    waiting_ -= length;
    stream.moved_at = Clock::now();
    while (length != 0) {
        Piece& piece = stream.pieces.front();
        if (stream.sent < kPrefix) {
            size_t part = std::min(kPrefix - stream.sent, length);
            out_.append(piece.prefix + stream.sent, part);
            stream.sent += part;
            length -= part;
        }
        while (length != 0 && stream.part < piece.parts.size()) {
            const View& view = piece.parts[stream.part];
            size_t part = std::min(view.size() - stream.part_sent, length);
            out_.append(view.data() + stream.part_sent, part);
            stream.sent += part;
            stream.part_sent += part;
            length -= part;
            if (stream.part_sent == view.size()) {
                stream.part++;
                stream.part_sent = 0;
            }
        }
        if (stream.sent == kPrefix + piece.size) {
            stream.pieces.pop_front();
            stream.sent = stream.part = stream.part_sent = 0;
        }
    }
    if (stream.wake && stream.queued <= door_.limits.high_water / 2) {
        stream.wake = false;
        tell(kDrained, stream.id);
    }
    return 0;
}

}  // namespace inflight
