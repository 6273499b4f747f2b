"""Connections that come while a model takes nobody: real sockets, an application of a few lines."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop

from inflight.admission import Admission, arrival
from inflight.config import ListenConfig
from inflight.wire import Answer, Gate, Receive, Refusal, Scope, Send, listen_http, respond
from inflight.wire.listen import SocketListener

ASK = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nwhat"
UPLOAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n" + bytes(3_000_000)
OTHER = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class App:
    """One model with one place, and a page."""

    def __init__(self) -> None:
        self.admission = Admission(1)
        self.told = Gate(self.admission, 1 << 22, Refusal(429, [], b"full"), Refusal(413, [], b"large"))
        self.bodies: list[bytes] = []

    def gate(self, scope: Scope) -> Gate | None:
        return self.told if scope["path"] == "/generate" else None

    def crowded(self) -> Admission | None:
        return self.admission if self.admission.full else None

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> None:
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/generate":
            await respond(send, b"page")
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        kept = arrival.get()
        assert kept is not None
        assert kept.kept_by(self.admission)
        self.admission.enter()
        await respond(send, b"good")
        self.admission.leave()


@asynccontextmanager
async def listening(
    app: App, allocate: Callable[[int], memoryview | None] | None = None
) -> AsyncIterator[tuple[SocketListener, Callable[[], Awaitable[Any]]]]:
    listener = await listen_http(app, ListenConfig("127.0.0.1:0"), allocate=allocate)
    host, _, port = listener.address.rpartition(":")
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        return reader, writer

    try:
        yield listener, connect
    finally:
        await listener.close(1.0)
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head[9:12]), await asyncio.wait_for(reader.readexactly(length), 10)


async def until(true: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not true():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), 10)


async def refusable(
    app: App, connect: Callable[[], Awaitable[Any]], known: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection while the model is full. Args: known: it is one of the event loop's, since it was there before."""
    if not known:
        app.admission.enter()
    reader, writer = await connect()
    if known:
        writer.write(OTHER)
        assert await answer(reader) == (200, b"page")
        app.admission.enter()
    return reader, writer


def run(main: Callable[[App], Awaitable[None]]) -> None:
    async def test() -> None:
        await main(App())

    uvloop.run(test())


@pytest.fixture(autouse=True)
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.wire.http.acceptor.SILENCE", 0.01)


def test_who_has_no_chance_is_answered_on_the_bare_socket() -> None:
    async def main(app: App) -> None:
        async with listening(app) as (listener, connect):
            app.admission.enter()
            reader, writer = await connect()
            for _ in range(2):
                writer.write(ASK)
                assert await answer(reader) == (429, b"full")
            assert not listener._shared.connections
            app.admission.leave()
            writer.write(ASK)
            assert await answer(reader) == (200, b"good")
            assert len(listener._shared.connections) == 1
            assert (app.admission.used, app.admission.arriving) == (0, 0)

    run(main)


def test_a_place_goes_to_who_waits_and_not_to_who_has_left() -> None:
    async def main(app: App) -> None:
        async with listening(app) as (_, connect):
            app.admission.enter()
            app.admission.spent(1.0)  # nobody can be refused at once
            first = await connect()
            first[1].write(ASK)
            await until(lambda: app.admission.waiting == 1)
            second = await connect()
            second[1].write(ASK)
            await until(lambda: app.admission.waiting == 2)
            app.admission.spent(10.0)
            first[1].transport.abort()
            await asyncio.sleep(0.01)
            app.admission.leave()
            assert app.admission.arriving == 1
            assert await answer(second[0]) == (200, b"good")
            assert app.admission.arriving == 0

    run(main)


@pytest.mark.parametrize(
    ("parts", "answers"),
    [
        ([OTHER], [(200, b"page")]),
        ([ASK[:30], ASK[30:]], [(429, b"full")]),
        ([ASK[:-2], ASK[-2:]], [(429, b"full")]),
        ([ASK + OTHER], [(429, b"full"), (200, b"page")]),
        ([ASK.replace(b"HTTP/1.1", b"HTTP/1.0")], [(429, b"full")]),
        ([ASK.replace(b"th: 4", b"th: 5000000")[:-4]], [(413, b"large")]),
        ([b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwhat\r\n0\r\n\r\n"], [(429, b"full")]),
    ],
)
def test_whatever_comes_is_answered(parts: list[bytes], answers: list[tuple[int, bytes]]) -> None:
    async def main(app: App) -> None:
        async with listening(app) as (_, connect):
            app.admission.enter()
            reader, writer = await connect()
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.03 if len(parts) > 1 else 0)
            assert [await answer(reader) for _ in answers] == answers

    run(main)


def test_nonsense_is_told_so_and_closed() -> None:
    async def main(app: App) -> None:
        async with listening(app) as (_, connect):
            app.admission.enter()
            reader, writer = await connect()
            writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
            assert (await answer(reader))[0] == 400
            assert await reader.read() == b""
            reader, writer = await connect()
            writer.write(ASK.replace(b"Host: x", b"Connection: close"))
            assert await answer(reader) == (429, b"full")
            assert await reader.read() == b""

    run(main)


def test_the_silent_and_those_who_left_are_not_kept() -> None:
    async def main(app: App) -> None:
        async with listening(app) as (listener, connect):
            (acceptor,) = listener._servers
            app.admission.enter()
            silent, leaving = await connect(), await connect()
            await until(lambda: len(acceptor._visitors) + len(listener._shared.connections) == 2)  # type: ignore[attr-defined]
            leaving[1].close()
            await until(lambda: len(listener._shared.connections) == 1 and not acceptor._visitors)  # type: ignore[attr-defined]
            silent[1].write(OTHER)
            assert await answer(silent[0]) == (200, b"page")
            gone = await connect()
            gone[1].write(ASK)
            assert await answer(gone[0]) == (429, b"full")
            gone[1].close()
            await until(lambda: not acceptor._visitors)  # type: ignore[attr-defined]
            staying = await connect()
            staying[1].write(ASK)
            assert await answer(staying[0]) == (429, b"full")
        assert await staying[0].read() == b""

    run(main)


def test_it_goes_on_when_there_were_no_descriptors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [errno.EMFILE]
    accept = socket.socket.accept

    def failing(one: socket.socket) -> Any:
        if failures:
            raise OSError(failures.pop(), "Too many open files")
        return accept(one)

    monkeypatch.setattr("inflight.wire.http.acceptor._RETRY", 0.01)

    async def main(app: App) -> None:
        async with listening(app) as (_, connect):
            with monkeypatch.context() as patched:
                patched.setattr(socket.socket, "accept", failing)
                reader, writer = await connect()
                writer.write(OTHER)
                assert await answer(reader) == (200, b"page")

    run(main)
    assert "cannot accept a connection" in caplog.text
    assert not failures


@pytest.mark.parametrize("known", [False, True])
def test_a_refused_body_is_received_and_the_connection_goes_on(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.wire.http.acceptor.SILENCE", 1.0)

    async def main(app: App) -> None:
        async with listening(app) as (listener, connect):
            reader, writer = await refusable(app, connect, known)
            for turn in range(2):
                writer.write(UPLOAD[:1000])
                assert await answer(reader) == (429, b"full")
                assert turn or len(listener._shared.connections) == known
                writer.write(UPLOAD[1000:] + ASK)
                assert await answer(reader) == (429, b"full")
            writer.write(UPLOAD + OTHER)
            app.admission.leave()
            assert await answer(reader) == (200, b"good")
            assert await answer(reader) == (200, b"page")
            assert app.bodies == [bytes(3_000_000)]
            assert (app.admission.uploading, app.admission.arriving, app.admission.used) == (0, 0, 0)

    run(main)


@pytest.mark.parametrize("known", [False, True])
def test_who_sends_all_before_it_reads_gets_its_refusal(known: bool) -> None:
    async def main(app: App) -> None:
        async with listening(app) as (_, connect):
            reader, writer = await refusable(app, connect, known)
            writer.write(UPLOAD.replace(b"Host: x", b"Connection: close"))
            await asyncio.wait_for(writer.drain(), 10)
            assert await answer(reader) == (429, b"full")
            assert await asyncio.wait_for(reader.read(), 10) == b""

    run(main)


def test_a_refused_body_that_never_comes_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.wire.http.acceptor.PATIENCE", 0.1)

    async def main(app: App) -> None:
        async with listening(app) as (listener, connect):
            (acceptor,) = listener._servers
            known = await connect()
            known[1].write(OTHER)
            assert await answer(known[0]) == (200, b"page")
            app.admission.enter()
            new = await connect()
            for reader, writer in (known, new):
                writer.write(UPLOAD[:500_000])
                assert await answer(reader) == (429, b"full")
            with suppress(ConnectionError):
                assert await asyncio.wait_for(new[0].read(), 10) == b""
            assert not acceptor._visitors  # type: ignore[attr-defined]
            assert not next(iter(listener._shared.connections)).busy()
            await asyncio.wait_for(listener.close(60.0), 10)

    run(main)


@pytest.mark.parametrize("known", [False, True])
def test_bodies_that_never_come_do_not_pile_up(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the clients that were refused amid a body only so many are waited for; the others have their answer too."""
    monkeypatch.setattr("inflight.wire.connections.LINGERING", 2)

    async def main(app: App) -> None:
        async with listening(app) as (listener, connect):
            clients = [await connect() for _ in range(5 if known else 0)]
            for reader, writer in clients:
                writer.write(OTHER)
                assert await answer(reader) == (200, b"page")
            app.admission.enter()
            clients = clients or [await connect() for _ in range(5)]
            (acceptor,) = listener._servers
            for reader, writer in clients:
                writer.write(UPLOAD[:500_000])
                assert await answer(reader) == (429, b"full")
            await until(lambda: len(acceptor._visitors) + len(listener._shared.connections) <= 2)  # type: ignore[attr-defined]
            for reader, _ in clients[:3]:
                with suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), 10) == b""
            reader, writer = clients[4]
            writer.write(UPLOAD[500_000:] + OTHER)
            assert await answer(reader) == (200, b"page"), "who was refused last goes on"

    run(main)


def test_of_a_connection_that_waits_little_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop reads a new connection even if that was made to wait at once."""
    monkeypatch.setattr("inflight.admission.SHARE", 0.0)  # so its turn never comes

    async def main(app: App) -> None:
        async with listening(app) as (listener, connect):
            app.admission.enter()
            app.admission.spent(1.0)
            seen: list[Admission | None] = [app.admission, None]  # last first: the acceptor sees nobody yet
            monkeypatch.setattr(app, "crowded", lambda: seen.pop())
            _, writer = await connect()
            await until(lambda: len(listener._shared.connections) == 1)
            connection: Any = next(iter(listener._shared.connections))
            assert connection._caller.waits
            writer.write(UPLOAD)
            await until(lambda: bool(connection._queue))
            await asyncio.sleep(0.05)
            assert len(connection._queue[0]._body) < 500_000

    run(main)


@pytest.mark.parametrize("sent", [OTHER, ASK[:30], UPLOAD[:500_000], UPLOAD])
def test_a_connection_that_ended_is_freed_at_once(sent: bytes) -> None:
    """And not by the garbage collector: it may hold a large body."""

    async def main(app: App) -> None:
        async with listening(app) as (listener, connect):
            reader, writer = await connect()
            writer.write(OTHER)
            assert await answer(reader) == (200, b"page")
            connection = weakref.ref(next(iter(listener._shared.connections)))
            gc.disable()
            try:
                writer.write(sent)
                await asyncio.sleep(0.02)
                writer.close()
                await until(lambda: connection() is None)
            finally:
                gc.enable()

    run(main)


def test_a_body_for_a_language_model_takes_no_memory_that_workers_share() -> None:
    asked: list[int] = []

    def allocate(size: int) -> None:
        asked.append(size)

    async def main(app: App) -> None:
        async with listening(app, allocate) as (_, connect):
            reader, writer = await connect()
            writer.write(UPLOAD)
            assert await answer(reader) == (200, b"good")
            assert app.bodies == [bytes(3_000_000)]
            assert not asked
            writer.write(UPLOAD.replace(b"/generate", b"/other"))
            assert await answer(reader) == (200, b"page")
            assert asked

    run(main)
