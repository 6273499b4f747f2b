"""Who is refused at the head of a request already."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import psutil

from inflight.admission import Admission, Caller
from inflight.config import ListenConfig
from inflight.wire.connections import LARGE_BODY
from inflight.wire.http.asgi import Receive, Scope, Send, respond
from inflight.wire.http.gate import UPLOADS, Gate, Refusal
from inflight.wire.listen import listen_http

CLOCK: Any = SimpleNamespace(time=lambda: 0.0)
SOMEBODY = Caller(lambda offered: True)
BUSY, LARGE = Refusal(429, [], b"busy"), Refusal(413, [], b"large")


def test_large_bodies_come_in_one_after_the_other() -> None:
    """They take no places while they come, so their bytes are counted, and the first one may be of any size."""
    admission = Admission(4, loop=lambda: CLOCK)
    gate = Gate(admission, 4 * UPLOADS, BUSY, LARGE)
    assert gate.refusal(2 * UPLOADS, SOMEBODY) is None
    admission.uploading = UPLOADS - LARGE_BODY
    assert gate.refusal(LARGE_BODY, SOMEBODY) is None
    assert gate.refusal(LARGE_BODY + 1, SOMEBODY) is BUSY
    assert gate.refusal(LARGE_BODY - 1, SOMEBODY) is None, "small ones are not counted"
    assert gate.refusal(4 * UPLOADS + 1, SOMEBODY) is LARGE


def test_without_a_place_everybody_is_refused() -> None:
    refused: list[int] = []
    admission = Admission(1, lambda: refused.append(1), lambda: CLOCK)
    gate = Gate(admission, UPLOADS, BUSY, LARGE)
    admission.used = 1
    assert gate.refusal(10, SOMEBODY) is BUSY
    assert len(refused) == 1
    assert Gate(admission, UPLOADS, None, None).refusal(10, SOMEBODY) is None, "its form depends on the body"


class Doors:
    """An application of one language model: who gets in waits for `release`.

    Args:
        refuses: the form of a refusal is known from the head.
    """

    def __init__(self, refuses: bool = True) -> None:
        self.refuses = refuses
        self.admission = Admission(1)
        self.seen: list[str] = []
        self.release = asyncio.Event()

    def gate(self, scope: Scope) -> Gate | None:
        return Gate(self.admission, 4 * UPLOADS, *((BUSY, LARGE) if self.refuses else (None, None)))

    def crowded(self) -> Admission | None:
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope["path"])
        await self.release.wait()
        await respond(send, b"{}")


def test_who_waited_in_the_queue_is_refused_where_the_place_is_gone_by_then() -> None:
    """A pipelined request is not looked at before its turn, and its body need not come for it to be refused."""
    asyncio.run(_who_waited())


async def _who_waited() -> None:
    doors = Doors()
    listener = await listen_http(doors, ListenConfig("127.0.0.1:0"))
    host, _, port = listener.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        whole = b"POST /first HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
        begun = b"POST /second HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n{" % (4 * LARGE_BODY)
        writer.write(whole + begun)
        while doors.seen != ["/first"]:
            await asyncio.sleep(0.001)
        doors.admission.used = 1  # somebody else has come
        doors.release.set()
        first = await reader.readuntil(b"{}")
        assert first.startswith(b"HTTP/1.1 200 ")
        second = await reader.readuntil(b"busy")
        assert second.startswith(b"HTTP/1.1 429 ")
        assert doors.seen == ["/first"]
        assert not doors.admission.uploading, "no buffer was set aside for it"
    finally:
        writer.close()
        await listener.close(0.0)


def test_bodies_that_do_not_come_take_no_memory_where_nothing_bounds_their_number() -> None:
    """Where several models are served only the body names one, so nobody is refused from the head."""
    asyncio.run(_silent_uploads())


async def _silent_uploads() -> None:
    size = 8_000_000
    listener = await listen_http(Doors(refuses=False), ListenConfig("127.0.0.1:0"))
    host, _, port = listener.address.rpartition(":")
    process = psutil.Process()
    before = process.memory_info().rss
    writers: list[asyncio.StreamWriter] = []
    try:
        for _ in range(12):
            writers.append((await asyncio.open_connection(host, int(port)))[1])
            writers[-1].write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n{" % size)
        await asyncio.sleep(0.1)
        taken = process.memory_info().rss - before
    finally:
        for writer in writers:
            writer.close()
        await listener.close(0)
    assert taken < size
