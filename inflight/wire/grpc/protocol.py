"""HTTP/2 connections for gRPC: uvicorn's protocol over zttp, made fit for channels that live long.

What the base does that a gRPC server must not, and what is done about it (zttp 0.0.35, uvicorn 0.54):

- a connection that has opened 4,096 streams in its life, or seen 256 resets, is cut with whatever is in flight.
  Here it *retires* well before: GOAWAY, a ping to know that the client has seen it, the calls in flight run to their
  end, then it closes. Clients open a new connection by themselves and lose no call;
- a reset of a stream is only noticed by an application that reads. Here it cancels the call;
- a reply that the client has no window for is stored without limit. Here a stream of replies can wait for it;
- requests are taken at 64 KiB per round trip, 1 MB/s over 50 ms. Here clients are granted larger windows than the
  base knows of; it never notices, since it takes each frame at once and gives its credit back;
- a client that sends pings and reads nothing grows the write buffer. Here it is no longer read from, and cut after
  `WRITE_TIMEOUT`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Any

import zttp
from uvicorn.protocols.http.zttp_h2_impl import ZttpH2Protocol

from inflight.wire.grpc.asgi import STREAM_EXTENSION
from inflight.wire.grpc.status import RESOURCE_EXHAUSTED, GrpcError

MAX_STREAMS = 3072
"""Streams of one connection before it retires; a client may open about 1,000 more until it has seen the GOAWAY."""
MAX_RESETS = 112
"""Resets before it retires; the 128 streams that may be open then can all be reset too."""
RETIRE_TIMEOUT = 5.0
"""Seconds for the client to answer the ping that follows the GOAWAY."""
WRITE_TIMEOUT = 60.0
"""Seconds in which a client must take something of what its socket holds."""
HIGH_WATER = 256 * 1024
"""Bytes of replies that may wait for one stream's window before its handler does."""
MAX_WAITING = 64 << 20
"""Bytes of replies that may wait where the handler cannot, since the client sends on without reading."""
MAX_REPLIES = 256 << 20
"""Bytes of whole replies that may wait for one connection."""
_LARGE = 64 * 1024
"""Smaller replies are bounded by the number of streams."""
STREAM_WINDOW = 4 << 20
"""Bytes of one request that may be on their way."""
CONNECTION_WINDOW = 16 << 20
PROTOCOL_ERROR = 1
"""RFC 9113, section 7; zttp has a name for it only since 0.0.35, which Python 3.10 cannot have."""
_NEWEST_STREAM = 2**31 - 1
# A SETTINGS frame (INITIAL_WINDOW_SIZE) and a WINDOW_UPDATE of the connection.
_WINDOWS = struct.pack(">HBBBIHI", 0, 6, 4, 0, 0, 4, STREAM_WINDOW) + struct.pack(
    ">HBBBII", 0, 4, 8, 0, 0, CONNECTION_WINDOW - 65_535
)
_PING = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00inflight"


class GrpcStream:
    """One call's stream, as the application sees it (`wire.grpc.asgi.Stream`)."""

    __slots__ = ("_connection", "_stream", "closed", "resting", "stopping", "task")

    def __init__(self, connection: GrpcProtocol, stream: Any) -> None:
        self.closed = False
        self.stopping = False
        self.resting = False
        self.task: asyncio.Task[Any] | None = None
        self._connection = connection
        self._stream = stream

    def close(self) -> None:
        """The caller has left."""
        self.closed = True
        if self.task is not None:
            self.task.cancel()

    def stop(self) -> None:
        """The server stops: what runs goes on, what only waits for more to do ends."""
        self.stopping = True
        if self.resting and self.task is not None:
            self.task.cancel()

    def peer(self) -> object:
        """Names the connection."""
        return id(self._connection)

    def reserve(self, size: int) -> None:
        """As `Stream` says, over all calls of the connection."""
        if size < _LARGE:
            return
        held = [stream for stream in self._connection.large if stream.pending_bytes]
        waiting = sum(stream.pending_bytes or 0 for stream in held)
        if waiting and waiting + size > MAX_REPLIES:
            raise GrpcError(RESOURCE_EXHAUSTED, f"{waiting} bytes of replies wait, read them before sending more")
        self._connection.large = [*held, self._stream]

    async def drain(self) -> None:
        """Waits until at most `HIGH_WATER` bytes wait for the stream's window.

        While the connection is not read from, the window cannot grow either; then nothing waits here, up to
        `MAX_WAITING` bytes.
        """
        while not self.closed and (waiting := self._stream.pending_bytes or 0) > HIGH_WATER:
            if self._connection.flow.read_paused:
                if waiting > MAX_WAITING:
                    raise GrpcError(
                        RESOURCE_EXHAUSTED, f"{waiting} bytes of replies wait, read them before sending more"
                    )
                return
            await self._connection.news()


class GrpcProtocol(ZttpH2Protocol):  # type: ignore[misc]  # uvicorn is not followed by the type checker
    """One HTTP/2 connection of a gRPC client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._streams_left = MAX_STREAMS
        self._resets_left = MAX_RESETS
        self._retiring: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._news: asyncio.Event | None = None
        self.large: list[Any] = []  # streams with a large reply, some of them long sent

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(_WINDOWS)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._retiring, self._stalled):
            if timer is not None:
                timer.cancel()
        cycles = list(self.cycles.values())
        super().connection_lost(exc)
        for cycle in cycles:
            _close(cycle)
        self._tell()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._news is not None:
            self._tell()

    def events(self) -> Iterator[Any]:
        for event in super().events():
            if type(event) is zttp.Ping and event.ack and self._retiring is not None:
                self._retired()
            yield event

    def handle_request(self, event: Any) -> None:
        self._streams_left -= 1
        if self._streams_left <= 0:
            self.retire()
        if not event.path.isascii():  # the base class cannot decode it
            self.conn.stream(event.stream_id).reset(PROTOCOL_ERROR)
            return
        super().handle_request(event)
        cycle = self.cycles[event.stream_id]
        cycle.scope["extensions"][STREAM_EXTENSION] = GrpcStream(self, cycle.stream)

    def handle_rst_stream(self, event: Any) -> None:
        self._resets_left -= 1
        if self._resets_left <= 0:
            self.retire()
        cycle = self.cycles.get(event.stream_id)
        super().handle_rst_stream(event)
        if cycle is not None:
            _close(cycle)

    def resume_reading_if_idle(self) -> None:
        if not self.flow.write_paused:
            super().resume_reading_if_idle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.flow.pause_reading()
        self._stalled = self.loop.call_later(WRITE_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()
        self.resume_reading_if_idle()

    def shutdown(self) -> None:
        """Called when the server stops: as any retirement, but idle streams of requests end too."""
        self.retire()
        for cycle in self.cycles.values():
            cycle.scope["extensions"][STREAM_EXTENSION].stop()

    def retire(self) -> None:
        """Asks the client to go elsewhere, and closes when its calls in flight are done."""
        if self._retiring is not None or self.shutdown_requested or self.transport.is_closing():
            return
        self._retiring = self.loop.call_later(RETIRE_TIMEOUT, self._retired)
        self.conn.close(0, _NEWEST_STREAM)
        self.flush()
        self.transport.write(_PING)

    async def news(self) -> None:
        """Returns when the client has sent something, or the connection is lost."""
        if self._news is None:
            self._news = asyncio.Event()
        await self._news.wait()

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None

    def _retired(self) -> None:
        """The client opens no further stream here. From now on the base class closes when the last call is done."""
        self.shutdown_requested = True
        if not self.cycles:
            self._close_connection()


def _close(cycle: Any) -> None:
    if not cycle.response_complete:
        cycle.scope["extensions"][STREAM_EXTENSION].close()
