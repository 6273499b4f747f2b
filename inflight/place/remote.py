"""A worker process on another machine, as the server sees it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Protocol

from inflight.early import DUMP
from inflight.errors import StartError
from inflight.link import ArenaReader, Gate, Handler, Invitation, ServerChannel
from inflight.place.local import happened

ARRIVAL_SECONDS = 60.0
"""Seconds in which a process that was started must come."""

REPORT_SECONDS = 0.5
"""Seconds after the end of a process's connection in which its machine may tell how it ended. Then the machine is taken
for lost, and the process for one that was killed."""


class Starter(Protocol):
    """Whoever has started a process on another machine and can signal it."""

    def signal(self, number: int) -> None:
        """Sends a signal to the process; SIGKILL also to all that it has started. From any thread; a machine that is
        gone gets none."""
        ...


class RemoteProcess:
    """A process that was told to come to the gate.

    It has ended when its machine says so, or when its connection has and its machine says nothing.

    Args:
        gate: where it comes; `invitation`: what it was told.
        host: its machine, for messages.
        pid: there.

    Attributes:
        status: as that of `WorkerProcess`.
    """

    def __init__(self, gate: Gate, invitation: Invitation, starter: Starter, host: str, pid: int) -> None:
        self._gate = gate
        self._invitation = invitation
        self._starter = starter
        self._exited = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._on_exit: Callable[[int], None] | None = None
        self.host = host
        self.pid = pid
        self.status: int | None = None

    async def open(
        self, on_message: Handler, on_closed: Callable[[], None], reader: ArenaReader | None
    ) -> ServerChannel:
        def closed() -> None:
            self._loop.call_later(REPORT_SECONDS, self.end, -signal.SIGKILL)
            on_closed()

        assert reader is None, "another machine has no shared memory with this one"
        try:
            guest = await self._gate.arrival(self._invitation, ARRIVAL_SECONDS)
        except asyncio.TimeoutError:
            raise StartError(
                f"a process on {self.host} did not come to {self._invitation.address} within {ARRIVAL_SECONDS:g} "
                "seconds; can that machine reach this address? Write another one with --cluster-listen"
            ) from None
        return guest.channel(on_message, closed)

    def watch(self, on_exit: Callable[[int], None]) -> None:
        if self.status is not None:
            on_exit(self.status)
        else:
            self._on_exit = on_exit

    @property
    def running(self) -> bool:
        return self.status is None

    async def ended(self, timeout: float) -> bool:
        return await happened(self._exited, timeout)

    def dump(self) -> None:
        self._starter.signal(DUMP)

    def kill(self) -> None:
        """Kills it. If its machine does not say that it has ended, it counts as ended a moment later: without its
        connection it can do nothing."""
        self._starter.signal(signal.SIGKILL)
        self._loop.call_soon_threadsafe(self._loop.call_later, REPORT_SECONDS, self.end, -signal.SIGKILL)

    def end(self, status: int) -> None:
        """Takes note of its end. Called on the loop; only the first call counts."""
        if self.status is not None:
            return
        self.status = status
        how = f"signal {-status}" if status < 0 else f"status {status}"
        self._gate.take_back(self._invitation, f"the process on {self.host} ended with {how} before it came")
        self._exited.set()
        told, self._on_exit = self._on_exit, None
        if told is not None:
            told(status)
