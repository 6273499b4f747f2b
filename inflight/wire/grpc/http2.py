"""HTTP/2 connections for gRPC: uvicorn's protocol over zttp, kept open while idle, one write per turn of the loop."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import Mapping
from typing import Any, cast

import uvicorn

from inflight.wire.connections import OpenConnections
from inflight.wire.grpc.protocol import GrpcProtocol
from inflight.wire.http.asgi import App

_logger = logging.getLogger("inflight.grpc")
_JOINED = 64 * 1024
_A_DAY = 86_400
KNOWN: Mapping[str, tuple[str, ...]] = {"uvicorn": ("0.54.0",), "zttp": ("0.0.34", "0.0.35")}
"""The releases that the extra `zttp` pins. A private class of uvicorn's is extended here; others may differ."""


def check_versions(known: Mapping[str, tuple[str, ...]] = KNOWN) -> None:
    """Whether the releases that this engine is made for are installed.

    Raises:
        ImportError: another one is.
    """
    for package, releases in known.items():
        found = importlib.metadata.version(package)
        if found not in releases:
            raise ImportError(f"{package} {found} is installed, but the engine is made for {' or '.join(releases)}")


class Http2Connection(GrpcProtocol):
    """One gRPC channel. It has no timeout between calls: channels rest for hours and must not be closed meanwhile;
    a peer that is gone is found by TCP keep-alive. Only a peer that says nothing at all is cut.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        shared: OpenConnections,
        loop: asyncio.AbstractEventLoop,
        first_byte_timeout: float,
    ) -> None:
        super().__init__(config=config, server_state=shared, app_state={}, _loop=loop)
        self.logger = _logger
        self.access_log = False
        self.transport: Any = None
        # Never None, so that the base class arms no timer of its own after each frame.
        self.timeout_keep_alive_task = _Never()
        self._first_byte_timeout = first_byte_timeout
        self._silent: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(Any, GatheredTransport(cast(asyncio.Transport, transport), self.loop)))
        self._silent = self.loop.call_later(self._first_byte_timeout, self.transport.abort)
        if self.server_state.stopping:
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._silent is not None:
            self._heard()
        super().data_received(data)

    def on_stream_closed(self) -> None:
        if self.transport.is_closing():
            return
        self.resume_reading_if_idle()
        if self.shutdown_requested and not self.cycles:
            self._close_connection()

    def busy(self) -> bool:
        """Whether a call runs, or its answer is still on its way."""
        return bool(self.cycles) or self.transport.get_write_buffer_size() > 0

    def _heard(self) -> None:
        if self._silent is not None:
            self._silent.cancel()
            self._silent = None

    def _unset_keepalive_if_required(self) -> None:
        """There is no such timer."""


class _Never:
    """A timer that does not run."""


class GatheredTransport:
    """A transport whose writes wait for the end of the loop's turn.

    A gRPC answer is three frames in three messages, and calls that share a channel end together: they leave in one
    system call instead of one each.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.abort = transport.abort

    def write(self, data: bytes) -> None:
        if data:
            if not self._waiting:
                self._loop.call_soon(self._flush)
            self._waiting.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def get_write_buffer_size(self) -> int:
        """Bytes that the peer has not taken yet."""
        return sum(map(len, self._waiting)) + self._transport.get_write_buffer_size()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting or self._transport.is_closing():
            return
        if len(waiting) == 1 or sum(map(len, waiting)) <= _JOINED:
            self._transport.write(b"".join(waiting))
        else:
            self._transport.writelines(waiting)


def http2_config(app: App) -> uvicorn.Config:
    """uvicorn's configuration of the protocol, loaded; nothing is read from the environment or printed."""
    config = uvicorn.Config(
        cast(Any, app),
        http=Http2Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        loop="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        forwarded_allow_ips="",
        workers=1,
        timeout_keep_alive=_A_DAY,
    )
    config.load()
    return config
