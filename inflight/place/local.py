"""Starts worker processes on this machine and reports when they end.

A worker gets one end of a socket pair and two arena files by inheritance, so it has no address and leaves
nothing in any file system. It is a session of its own: Ctrl+C in a terminal reaches the server alone, and whatever the
worker's user code starts can be ended with it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from inflight.early import DUMP, spawn
from inflight.errors import StartError
from inflight.link import ArenaReader, ServerChannel
from inflight.link import Handler as OnMessage


@dataclass(frozen=True)
class Launch:
    """One worker process to start.

    Attributes:
        label: shown in the command line, for people who read process lists.
        inbox, outbox: descriptors of the arena files to inherit.
        environment: added to this process's environment.
        log: file for its output; None: this process's stderr.
        append: keep the contents of the log file.
    """

    label: Sequence[str]
    inbox: int
    outbox: int
    environment: Mapping[str, str]
    log: Path | None
    append: bool


async def happened(event: asyncio.Event, timeout: float) -> bool:
    """Whether an event happens within `timeout` seconds."""
    try:
        await asyncio.wait_for(event.wait(), timeout)
    except asyncio.TimeoutError:
        return False
    return True


class WorkerProcess:
    """A started process.

    Attributes:
        status: how it ended: its exit status, or the number of the signal with a minus sign; None while it runs.
    """

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self._process = process
        self.pid = process.pid
        self.socket = sock
        self.status: int | None = None
        self._exited = asyncio.Event()

    async def open(
        self, on_message: OnMessage, on_closed: Callable[[], None], reader: ArenaReader | None
    ) -> ServerChannel:
        """Opens the channel; arguments and errors as for `ServerChannel.open`."""
        return await ServerChannel.open(self.socket, on_message, on_closed, reader)

    def watch(self, on_exit: Callable[[int], None]) -> None:
        """Waits for the end without polling. `on_exit` is called once, on the loop, with `status`."""
        loop = asyncio.get_running_loop()

        def reap() -> None:
            # End what user code started in the worker's session. The worker itself is not collected yet, so its number
            # cannot belong to another process group.
            self._signal_group(signal.SIGKILL)
            self.status = status = self._process.wait()
            self._exited.set()
            on_exit(status)

        try:
            fd = os.pidfd_open(self.pid)

            def readable() -> None:
                loop.remove_reader(fd)
                os.close(fd)
                reap()

            loop.add_reader(fd, readable)
        except (AttributeError, OSError):  # not Linux, or no descriptor left
            threading.Thread(
                target=lambda: (self._process.wait(), loop.call_soon_threadsafe(reap)), daemon=True
            ).start()

    @property
    def running(self) -> bool:
        return not self._exited.is_set()

    async def ended(self, timeout: float) -> bool:
        """Waits for the end; returns False if the process still runs after `timeout` seconds."""
        return await happened(self._exited, timeout)

    def dump(self) -> None:
        """Asks the worker to write the stacks of its threads to its log. It can do so at any time."""
        if self.running:
            os.kill(self.pid, DUMP)

    def kill(self) -> None:
        if self.running:
            self._signal_group(signal.SIGKILL)

    def end(self) -> None:
        """Kills and collects a process that is not watched."""
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        self.socket.close()

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass


@contextmanager
def open_log(launch: Launch) -> Iterator[int | None]:
    """Opens the log file of a worker; gives None if it has none."""
    if launch.log is None:
        yield None
        return
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    mode = os.O_APPEND if launch.append else os.O_TRUNC
    output = os.open(launch.log, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | mode, 0o644)
    try:
        yield output
    finally:
        os.close(output)


def start_worker(launch: Launch) -> WorkerProcess:
    """Starts `python -m inflight.worker`.

    Raises:
        StartError: the process could not be started or its log file not be opened.
    """
    try:
        with open_log(launch) as output:
            return WorkerProcess(*spawn(launch.label, launch.inbox, launch.outbox, launch.environment, output))
    except OSError as error:
        raise StartError(f"cannot start a worker process: {error}") from error
