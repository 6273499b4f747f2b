"""One worker process with the channel to it, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Protocol

from inflight.link import AnyMessage, ArenaReader, Handler, Packer, ServerChannel, Stop, Unpacker

log = logging.getLogger("inflight")

STOP_GRACE = 1.0
"""Seconds a worker has to leave after it was told to stop, or has closed its channel, before it is killed."""

KILL_TIMEOUT = 10.0
"""Seconds in which a killed process must end."""

FAREWELL = 0.2
"""Seconds after a process's end in which what it sent last is read. Its channel ends sooner, unless a process that it
has left behind holds it open."""

OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that a process gets from others. Crashes of its own are SIGSEGV, SIGABRT and the like."""


class Process(Protocol):
    """A started worker process, on this machine (`WorkerProcess`) or on another one (`RemoteProcess`)."""

    pid: int
    status: int | None

    @property
    def running(self) -> bool: ...

    async def open(
        self, on_message: Handler, on_closed: Callable[[], None], reader: ArenaReader | None
    ) -> ServerChannel:
        """Opens the channel to it.

        Raises:
            OSError: it cannot be opened.
            StartError: a process of another machine did not come.
        """
        ...

    def watch(self, on_exit: Callable[[int], None]) -> None:
        """Calls `on_exit` once, on the loop, with `status` when the process has ended."""
        ...

    async def ended(self, timeout: float) -> bool:
        """Waits for the end; returns False if the process still runs after `timeout` seconds."""
        ...

    def dump(self) -> None: ...

    def kill(self) -> None: ...


class WorkerHandle:
    """A started worker process and the channel to it. Lives on one event loop.

    Args:
        name: names the process in the log.
        on_message: called on the loop for every message.
        on_end: called on the loop, once, when the process has ended and all that it sent was read.
        outbox: has the large values of its messages; None: it sends none.

    Attributes:
        killed: set if the process was ended by a signal that this server did not send.
    """

    def __init__(
        self,
        name: str,
        process: Process,
        on_message: Callable[[AnyMessage, Unpacker], None],
        on_end: Callable[[WorkerHandle], None],
        outbox: ArenaReader | None = None,
    ) -> None:
        self._name = name
        self._process = process
        self._on_message = on_message
        self._on_end = on_end
        self._outbox = outbox
        self._channel: ServerChannel | None = None
        self._ended = False
        self._kill_sent = False
        self.killed = False

    async def connect(self) -> None:
        """Opens the channel. To be called once, before anything else.

        Raises:
            OSError, StartError: the channel cannot be opened. The process runs until `end`.
        """
        try:
            self._channel = await self._process.open(self._on_message, self._closed, self._outbox)
        finally:
            self._process.watch(self._exited)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.running

    @property
    def status(self) -> int | None:
        """How it ended: its exit status, or the number of the signal with a minus sign; None while it runs."""
        return self._process.status

    def send(self, message: AnyMessage, packer: Packer | None = None) -> None:
        """Sends a message; without an open channel it does nothing.

        Args:
            packer: has the message's values.
        """
        if self._channel is not None:
            self._channel.send(message, packer)

    def dump(self) -> None:
        """Asks the worker to write the stacks of its threads to its log. It can do so at any time."""
        self._process.dump()

    def kill(self) -> None:
        """Kills the process and what it has started, at once. May be called from any thread."""
        if self._process.running:
            self._kill_sent = True
            self._process.kill()

    async def end(self, grace: float = STOP_GRACE) -> None:
        """Ends the process: sends `Stop`, waits `grace` seconds, kills it. `on_end` was called when this returns."""
        if grace > 0 and self._channel is not None and not self._channel.closed:
            self._channel.send(Stop())
            await self._process.ended(grace)
        self.kill()
        if await self._process.ended(KILL_TIMEOUT):
            self._conclude(all_read=True)
            return
        log.error("%s (pid %s) cannot be killed", self._name, self.pid)
        if self._channel is not None:
            self._channel.close()

    def _closed(self) -> None:
        if self._process.running:  # a worker without its channel can do nothing
            asyncio.get_running_loop().call_later(STOP_GRACE, self.kill)
        else:
            self._conclude()

    def _exited(self, status: int) -> None:
        self.killed = -status in OUTSIDE and not self._kill_sent
        self._conclude()
        if not self._ended:
            asyncio.get_running_loop().call_later(FAREWELL, self._conclude, True)

    def _conclude(self, all_read: bool = False) -> None:
        """Calls `on_end` once the process has ended and its channel is read to the end.

        Args:
            all_read: do not wait for the end of the channel any longer.
        """
        if self._ended or self._process.running:
            return
        if not (all_read or self._channel is None or self._channel.closed):
            return
        self._ended = True
        if self._channel is not None:
            self._channel.close()
        self._on_end(self)
