"""The native module of the gRPC door by itself: what a session tells, what it sends, and that no bytes do it harm."""

from __future__ import annotations

import random
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.http2_frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Frame,
    frame,
    frames,
    head,
    message,
)

_http2 = pytest.importorskip("inflight.wire._http2", reason="the package was built without nghttp2")

LIMIT = 1 << 20
UNARY, CHAT = "/test/unary", "/test/chat"
START = PREFACE + frame(SETTINGS, 0, 0)


def session(keys: bool = False, **limits: int) -> Any:
    made = _http2.Limits()
    for name, value in {"message": LIMIT, "requests": 4 * LIMIT, "replies": 4 * LIMIT, **limits}.items():
        setattr(made, name, value)
    return _http2.Session(_http2.Door([(UNARY, False), (CHAT, True)], made, keys))


def begun(**limits: int) -> Any:
    """A session whose settings the client has acknowledged."""
    made = session(**limits)
    assert made.feed(START) == []
    sent(made)
    assert made.feed(frame(SETTINGS, ACK, 0)) == []
    return made


def call(stream: int, data: bytes, path: str = UNARY, **headers: str) -> bytes:
    """A whole call."""
    begin = frame(HEADERS, END_HEADERS, stream, head(path, **headers))
    pieces = [data[first : first + 16_384] for first in range(0, len(data), 16_384)] or [b""]
    body = [frame(DATA, END_STREAM if piece is pieces[-1] else 0, stream, piece) for piece in pieces]
    return begin + b"".join(body)


def sent(it: Any) -> list[Frame]:
    parts = []
    while (data := it.take(1 << 16)) is not None:
        parts.append(data)
    return list(frames(b"".join(parts)))


def test_a_call_and_its_answer() -> None:
    it = session()
    assert it.feed(START + call(1, message(b"question"), grpc_timeout="5S", grpc_encoding="gzip")) == [
        (_http2.CALL, 1, 0, b"5S", b"gzip", None, b"question", False)
    ]
    assert it.reply(1, b"answer")
    kinds = [(each.kind, each.flags, each.payload) for each in sent(it) if each.stream == 1]
    assert kinds[0][:2] == (HEADERS, END_HEADERS)
    assert kinds[1] == (DATA, 0, message(b"answer"))
    assert kinds[2][:2] == (HEADERS, END_HEADERS | END_STREAM)
    assert b"grpc-status" in kinds[2][2] or len(kinds[2][2]) < 16  # Huffman's code
    assert (it.streams, it.waiting, it.take(1), it.news()) == (0, 0, None, [])


def test_answers_that_repeat_are_a_few_bytes() -> None:
    it = begun()
    sizes = []
    for stream in (1, 3, 5):
        it.feed(call(stream, message(b"")))
        it.reply(stream, b"")
        sizes.append(sum(9 + len(each.payload) for each in sent(it)))
    assert sizes[1] == sizes[2] == 3 * 9 + 5 + 3  # three frames, a prefix, three indexed headers


@pytest.mark.parametrize("step", [1, 2, 7, 100])
def test_any_cut_of_the_bytes_tells_the_same(step: int) -> None:
    data = START + call(1, message(b"x" * 300, 1)) + call(3, message(b"a") + message(b"") + message(b"b" * 99), CHAT)
    whole = session().feed(data)
    assert [event[0] for event in whole] == [_http2.CALL, _http2.OPEN, *[_http2.MESSAGE] * 3, _http2.END]
    it = session()
    told = []
    for first in range(0, len(data), step):
        told += it.feed(data[first : first + step])
    assert told == whole


def test_keys_are_told_where_they_are_wanted() -> None:
    for keys in (False, True):
        told = session(keys).feed(START + call(1, message(b""), authorization="Bearer x"))
        assert told[0][5] == (b"Bearer x" if keys else None)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", ("NO_MESSAGE", 0, 0)),
        (b"\0\0", ("CUT", 2, 0)),
        (message(b"abc")[:-1], ("CUT", 7, 0)),
        (message(b"", 2), ("FLAGS", 2, 0)),
        (b"\0\x7f\xff\xff\xff", ("TOO_LARGE", 0x7FFFFFFF, LIMIT)),
        (message(b"a") + message(b"b"), ("SECOND", 0, 0)),
    ],
)
def test_requests_that_cannot_be_read(body: bytes, what: tuple[str, int, int]) -> None:
    it = begun()
    assert it.feed(call(1, body)) == [(_http2.FAULT, 1, getattr(_http2, what[0]), *what[1:])]
    it.finish(1, 13, b"no", [("x-more", "1")])
    answer = [each for each in sent(it) if each.stream == 1]
    assert [each.kind for each in answer] == [HEADERS]
    assert answer[0].flags == END_HEADERS | END_STREAM
    assert it.streams == 0


def test_an_early_answer_ends_the_upload() -> None:
    it = begun()
    it.feed(frame(HEADERS, END_HEADERS, 1, head("/nothing")))
    it.finish(1, 12, b"", [])
    assert [each.kind for each in sent(it) if each.stream == 1] == [HEADERS, RST_STREAM]
    assert it.streams == 0
    assert it.feed(frame(DATA, END_STREAM, 1, b"late")) == []
    assert not it.over


def test_credit_comes_back_as_a_handler_takes_its_messages() -> None:
    window = 65_536
    it = begun(stream_window=window, connection_window=4 * window)
    part = message(b"m" * (16_384 - 5))
    it.feed(frame(HEADERS, END_HEADERS, 1, head(CHAT)) + frame(DATA, 0, 1, part))
    it.feed(b"".join(frame(DATA, 0, 1, part) for _ in range(3)))
    credited = [each.stream for each in sent(it) if each.kind == WINDOW_UPDATE]
    assert credited.count(1) == 0  # four messages wait
    for _ in range(4):
        it.took(1, 16_379)
    assert [each.stream for each in sent(it) if each.kind == WINDOW_UPDATE].count(1) == 1
    it.feed(frame(HEADERS, END_HEADERS, 3, head(CHAT)) + frame(DATA, 0, 3, part) * 4)  # another call is not held up
    assert 0 in [each.stream for each in sent(it) if each.kind == WINDOW_UPDATE]


def test_what_is_kept_of_a_connection_has_bounds() -> None:
    it = begun(requests=3 * LIMIT)
    half = message(b"h" * LIMIT)[: LIMIT - 100]
    told = []
    for stream in range(1, 13, 2):  # never whole
        told += it.feed(call(stream, half)[: -9 - len(half) % 16_384])
    assert {event[0] for event in told} == {_http2.FAULT}
    assert told[0][2] == _http2.TOO_MUCH
    it = session(replies=LIMIT)
    it.feed(PREFACE + frame(SETTINGS, 0, 0, b"\0\x04\0\0\0\0"))
    assert INITIAL_WINDOW_SIZE == 4
    it.feed(call(1, message(b"")) + call(3, message(b"")))
    assert it.reply(1, b"r" * LIMIT)
    assert not it.reply(3, b"r" * 100)
    assert it.waiting == LIMIT + 5


def test_a_stream_of_replies_waits_for_its_window() -> None:
    it = begun(high_water=1000)
    it.feed(frame(HEADERS, END_HEADERS, 1, head(CHAT)))
    assert it.send(1, b"x" * 100_000) == 100_005
    got = b"".join(each.payload for each in sent(it) if each.kind == DATA)
    assert len(got) == 65_535
    assert it.news() == []
    for stream in (0, 1):
        it.feed(frame(WINDOW_UPDATE, 0, stream, (100_000).to_bytes(4, "big")))
    got += b"".join(each.payload for each in sent(it) if each.kind == DATA)
    assert got == message(b"x" * 100_000)
    assert it.news() == [(_http2.DRAINED, 1)]
    it.finish(1, 0, b"", [])
    assert [each.kind for each in sent(it) if each.stream == 1] == [HEADERS, RST_STREAM]


def test_callers_that_leave_and_callers_that_wait_too_long() -> None:
    it = begun()
    it.feed(call(1, message(b"")) + frame(HEADERS, END_HEADERS, 3, head(UNARY)))
    assert it.feed(frame(RST_STREAM, 0, 1, b"\0\0\0\x08")) == [(_http2.CLOSED, 1)]
    assert it.reply(1, b"late")  # does nothing
    it.expire(1000.0, 1000.0, 1.0)
    assert it.streams == 1
    it.expire(0.0, 0.0, 1e9)
    assert [each.kind for each in sent(it)] == [RST_STREAM]
    assert (it.streams, it.news()) == (0, [])


def test_a_stop_lets_calls_end() -> None:
    it = begun()
    it.feed(call(1, message(b"")))
    it.notice()
    first = sent(it)
    assert [each.kind for each in first] == [GOAWAY, 6]
    assert it.feed(frame(6, 1, 0, first[1].payload) + call(3, message(b"")))[0] == (_http2.PONG, 0)
    it.goaway()
    assert [each.kind for each in sent(it)] == [GOAWAY]
    assert it.feed(call(5, message(b""))) == []  # too late
    for stream in (1, 3):
        assert not it.over
        it.reply(stream, b"")
    sent(it)
    assert it.over


def mutated(chance: random.Random, data: bytes) -> bytes:
    """The bytes with a few changed, left out, said twice or put in."""
    made = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        where = chance.randrange(len(made))
        how = chance.randrange(4)
        if how == 0:
            made[where] = chance.randrange(256)
        elif how == 1:
            del made[where : where + chance.randrange(1, 12)]
        elif how == 2:
            made[where:where] = made[where : where + chance.randrange(1, 60)]
        else:
            made[where:where] = chance.randbytes(chance.randrange(1, 12))
        if not made:
            return b""
    return bytes(made)


def some_frame(chance: random.Random) -> bytes:
    """A frame that may well be wrong."""
    payload = chance.randbytes(chance.choice((0, 1, 4, 5, 6, 8, 40)))
    return frame(chance.randrange(11), chance.randrange(256), chance.choice((0, 1, 3, 5, 2)), payload)


def drive(chance: random.Random, it: Any, data: bytes) -> None:
    """Feeds bytes in random pieces, and does what handlers do, in any order."""
    acts: list[Callable[[int], object]] = [
        lambda stream: it.reply(stream, chance.randbytes(chance.choice((0, 9, 70_000)))),
        lambda stream: it.send(stream, chance.randbytes(chance.choice((0, 9, 70_000)))),
        lambda stream: it.finish(stream, chance.randrange(17), b"why", [("x", "y")]),
        lambda stream: it.begin(stream),
        lambda stream: it.took(stream, chance.randrange(100)),
        lambda stream: it.expire(chance.choice((0.0, 9.0)), chance.choice((0.0, 9.0)), 1e9),
        lambda stream: it.notice(),
        lambda stream: it.goaway(),
    ]
    weights = (8, 8, 4, 4, 4, 1, 1, 1)
    while data:
        size = chance.choice((1, 9, 100, 10_000))
        told = it.feed(data[:size])
        data = data[size:]
        for event in told:
            if chance.random() < 0.7:
                chance.choices(acts, weights)[0](event[1])
        if chance.random() < 0.3:
            chance.choices(acts, weights)[0](chance.choice((0, 1, 3, 5, 7, 2**31 - 1)))
        if chance.random() < 0.5:
            it.take(chance.choice((1, 100, 1 << 18)))
            it.news()


def test_no_bytes_do_a_session_harm() -> None:
    """Valid conversations with faults in them; nothing crashes, and what is kept stays in bounds."""
    chance = random.Random(21)
    valid = [
        call(1, message(b"x" * 200), grpc_timeout="1S"),
        call(3, message(b"a") + message(b"b" * 40_000), CHAT),
        frame(HEADERS, END_HEADERS, 5, head(CHAT)) + frame(DATA, 0, 5, message(b"c")),
        call(7, message(b"y" * 20_000)),
        frame(RST_STREAM, 0, 5, b"\0\0\0\x08"),
        frame(WINDOW_UPDATE, 0, 0, b"\0\x01\0\0"),
        frame(SETTINGS, 0, 0, b"\0\x04\0\0\x10\0"),
    ]
    before = 0
    for number in range(1500):
        it = session(replies=LIMIT)
        parts = [*valid, *(some_frame(chance) for _ in range(chance.randrange(4)))]
        chance.shuffle(parts)
        whole = b"".join(parts)
        drive(chance, it, START + (mutated(chance, whole) if number % 4 else whole))
        assert it.waiting <= 64 * 70_005 + LIMIT
        if number == 500:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB


def test_a_large_message_goes_where_python_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the place costs a copy, not the call."""
    data = bytes(range(256)) * 4096
    asked: list[tuple[int, int]] = []
    places: list[Any] = []
    wrong: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: wrong.append(told.exc_type))

    def place(route: int, first: bytes, size: int) -> Any:
        assert data.startswith(first)
        assert len(first) >= 65_536
        asked.append((route, size))
        if places[-1] is KeyError:
            raise KeyError("no place")
        return places[-1]

    limits = _http2.Limits()
    limits.message = limits.requests = 4 * LIMIT
    for where in (memoryview(bytearray(len(data))), None, memoryview(bytearray(9)), memoryview(data), KeyError):
        places.append(where)
        it = _http2.Session(_http2.Door([(UNARY, False), (CHAT, True)], limits, False, place))
        it.feed(START)
        sent(it)
        it.feed(frame(SETTINGS, ACK, 0))
        [(kind, stream, route, *_, found, compressed)] = it.feed(call(1, message(data)))
        assert (kind, stream, route, compressed) == (_http2.CALL, 1, 0, False)
        assert bytes(found) == data
        assert (found is where) == (where is places[0])
    assert asked == [(0, len(data))] * 5
    assert wrong == [BufferError, KeyError]  # memory that cannot be written, and no answer
    it.feed(call(3, message(data[: LIMIT // 4])))
    assert len(asked) == 5  # small ones are not asked for


@pytest.mark.parametrize("limit", [1, 100, 16_384, 1 << 20])
def test_parts_lie_one_behind_the_other(limit: int) -> None:
    it = begun()
    parts = [b"", b"head", memoryview(np.arange(30_000, dtype=np.uint8)), b"", memoryview(b"tail"), b""]
    it.feed(call(1, message(b"")) + call(3, message(b""), CHAT))
    it.send(3, parts)
    it.send(3, [])
    it.send(3, parts[:2])
    assert it.reply(1, parts)
    data = []
    while (more := it.take(limit)) is not None:
        data.append(more)
    got = {1: b"", 3: b""}
    for each in frames(b"".join(data)):
        if each.kind == DATA:
            got[each.stream] += each.payload
    whole = b"".join(parts)
    assert got == {1: message(whole), 3: message(whole) + message(b"") + message(b"head")}
