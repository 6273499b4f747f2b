// A server's side of HTTP/2 connections that carry gRPC calls. nghttp2 does framing, HPACK, flow control and the
// protocol's limits; this cuts messages out of DATA frames, tells Python whole ones, and keeps what a caller has not
// taken yet.
//
// All calls come from one event loop, with the GIL. A session reads no socket and writes none: `feed` takes what
// arrived and returns its events, `take` gives what is to be sent.
#pragma once

#include <nanobind/nanobind.h>
#include <nghttp2/nghttp2.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace inflight {

namespace nb = nanobind;
using Clock = std::chrono::steady_clock;

constexpr size_t kPrefix = 5;  // before each message: one byte of flags, four of length

// Events that `feed` returns as tuples: the first item is one of these, the second the stream's number.
enum Event : int {
    kCall,     // a call with its one message: route, grpc-timeout, grpc-encoding, authorization, message, compressed
    kOpen,     // a call whose messages follow: route, grpc-timeout, grpc-encoding, authorization
    kMessage,  // one more message: message, compressed
    kEnd,      // no more messages
    kFault,    // the request cannot be read: Fault, two numbers
    kUnknown,  // a call that no route is for: path
    kClosed,   // the caller has left, or was cut; not told for a call that was answered
    kDrained,  // a stream of replies may go on
    kPong,     // the ping that follows `notice` came back; stream 0
};

enum Fault : int {
    kNoMessage,  // the request ended without one
    kCut,        // the request ended within a message, of which so many bytes came
    kFlags,      // a message begins with these flags
    kTooLarge,   // a message of so many bytes, so many are allowed
    kSecond,     // a call that has one message sent another
    kTooMuch,    // so many bytes of requests wait on this connection
};

struct Limits {
    size_t message = 100u << 20;     // bytes of one request
    size_t requests = 400u << 20;    // bytes of requests, or parts of them, that wait on one connection
    size_t replies = 400u << 20;     // bytes of replies that wait for one connection's window
    size_t high_water = 256u << 10;  // bytes of replies that wait for one stream's window before its handler does
    uint32_t streams = 1024;         // calls at a time on one connection
    uint32_t stream_window = 4u << 20;
    int32_t connection_window = 16 << 20;
    uint64_t resets = 10'000;  // at once, and again after as many seconds as the rate needs
    uint64_t resets_rate = 1'000;
};

// State that the connections of a listener share.
class Door {
  public:
    // Paths, and whether a call has a stream of requests. `keys`: calls are told with their `authorization`. `place`
    // is asked where a large message goes: (route, its first bytes, its size) -> a writable buffer of that size, or
    // None.
    Door(std::vector<std::pair<std::string, bool>> routes, Limits limits, bool keys, nb::object place);
    ~Door();
    Door(const Door&) = delete;
    Door& operator=(const Door&) = delete;

    const std::vector<std::pair<std::string, bool>> routes;
    const Limits limits;
    const bool keys;
    const nb::object place;
    std::unordered_map<std::string_view, int> by_path;
    nghttp2_session_callbacks* callbacks = nullptr;
    nghttp2_option* option = nullptr;
};

// A Python bytes object that belongs to its holder, and grows like a vector.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { Py_XDECREF(object_); }

    void reserve(size_t capacity);
    void append(const void* data, size_t length, size_t expected = SIZE_MAX);  // `expected`: bytes in the end
    size_t size() const { return size_; }
    const char* data() const { return object_ == nullptr ? nullptr : PyBytes_AS_STRING(object_); }
    nb::object take();  // the bytes; the buffer is empty then

  private:
    PyObject* object_ = nullptr;
    size_t size_ = 0, capacity_ = 0;
};

// The memory of a Python object, which it holds.
class View {
  public:
    View() = default;
    View(nb::handle object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) nb::raise_python_error();
    }
    View(View&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
    View& operator=(View&& other) noexcept {
        std::swap(view_, other.view_);
        return *this;
    }
    ~View() { PyBuffer_Release(&view_); }

    explicit operator bool() const { return view_.obj != nullptr; }
    char* data() const { return static_cast<char*>(view_.buf); }
    size_t size() const { return static_cast<size_t>(view_.len); }

  private:
    Py_buffer view_{};
};

// A message that is sent: its parts lie one behind the other.
struct Piece {
    std::vector<View> parts;
    size_t size = 0;
    uint8_t prefix[kPrefix];
};

// A message that comes in: bytes, or memory that Python gave for it.
class Incoming {
  public:
    size_t size() const { return size_; }
    bool placed() const { return static_cast<bool>(view_); }
    void reserve(size_t capacity) { bytes_.reserve(capacity); }
    void append(const void* data, size_t length, size_t expected);
    nb::object first() const;                    // what has come, as bytes
    void move_to(nb::object memory, View view);  // copies what has come
    nb::object take();                           // the message; this is empty then

  private:
    Buffer bytes_;
    nb::object memory_;
    View view_;
    size_t size_ = 0;
};

// One call.
struct Stream {
    explicit Stream(int32_t number) : id(number), begun_at(Clock::now()), moved_at(begun_at) {}

    const int32_t id;
    // Of its head.
    int route = -1;
    bool post = false, grpc = false;
    size_t header_bytes = 0;
    std::string path, timeout, encoding, authorization;
    // The request.
    bool told = false;     // Python has had its first event
    bool dropped = false;  // the rest of the request is ignored
    uint8_t prefix[kPrefix];
    size_t prefix_size = 0;
    size_t length = 0;  // of the message that comes in
    Incoming message;
    nb::object whole;  // the one message of a call, until the request has ended
    bool compressed = false;
    bool shown = true;   // Python has been asked where the message goes, or need not be
    size_t unread = 0;   // bytes that wait for the end of their message, or for the handler
    size_t untaken = 0;  // messages that wait for the handler
    size_t held = 0;     // bytes of credit that wait for that
    // The replies.
    bool begun = false, ended = false, deferred = false;
    bool wake = false;  // a handler waits until the caller has taken more
    std::deque<Piece> pieces;
    size_t sent = 0;                 // bytes of the first piece, its prefix among them
    size_t part = 0, part_sent = 0;  // the part of it that comes next, and bytes of that
    size_t queued = 0;               // bytes of all pieces, less those
    int status = 0;
    std::string text;
    const Clock::time_point begun_at;
    Clock::time_point moved_at;  // when the caller last took something
};

class Session {
  public:
    explicit Session(Door& door);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    nb::list feed(nb::handle data);
    nb::list news();                             // events that `take` or `expire` caused
    nb::object take(size_t limit);               // None where there is nothing to send
    bool reply(int32_t id, nb::object message);  // bytes, or a list of buffers
    size_t send(int32_t id, nb::object message);
    void begin(int32_t id);
    void finish(int32_t id, int status, nb::bytes text, std::vector<std::pair<std::string, std::string>> headers);
    void took(int32_t id, size_t size);
    void notice();
    void goaway();
    void expire(double read_timeout, double write_timeout, double min_rate);
    bool over() const {
        return dead_ || (!nghttp2_session_want_read(session_) && !nghttp2_session_want_write(session_));
    }
    bool wants_write() const { return !dead_ && nghttp2_session_want_write(session_); }
    bool has_news() const { return events_.size() != 0; }
    size_t waiting() const { return waiting_; }
    size_t streams() const { return streams_.size(); }

    // nghttp2's callbacks
    int on_begin(const nghttp2_frame* frame);
    int on_header(const nghttp2_frame* frame, std::string_view name, std::string_view value);
    int on_frame(const nghttp2_frame* frame);
    int on_chunk(int32_t id, const uint8_t* data, size_t length);
    int on_close(int32_t id);
    int on_sent(const nghttp2_frame* frame);
    ssize_t on_read(Stream& stream, size_t length, uint32_t* flags);
    int on_data(Stream& stream, const uint8_t* head, size_t length);

  private:
    class Turn;
    Stream* find(int32_t id);
    template <typename... Args>
    void tell(Event event, int32_t id, Args&&... args);
    void head_ended(Stream& stream);
    void request_ended(Stream& stream);
    void fault(Stream& stream, Fault what, size_t first, size_t second);
    bool prefix_ended(Stream& stream);
    void message_ended(Stream& stream);
    void drop(Stream& stream);
    void put(Stream& stream, Piece piece);
    void place(Stream& stream);
    void respond(Stream& stream, const char* status, bool body);
    void resume(Stream& stream);
    void check(int result) const;

    Door& door_;
    nghttp2_session* session_ = nullptr;
    std::unordered_map<int32_t, std::unique_ptr<Stream>> streams_;
    nb::list events_;
    Buffer out_;
    size_t waiting_ = 0;   // bytes of replies
    size_t requests_ = 0;  // bytes of requests
    bool dead_ = false;
    bool busy_ = false;
};

}  // namespace inflight
