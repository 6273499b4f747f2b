"""What runs on a machine of a Ray cluster: starts one process, and tells how it ends. Ray imports it there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from inflight.place.placement import free_port
from inflight.version import __version__


class RankHost:
    """One process of a model. Its methods are called by Ray, each on a thread of its own.

    The process ends with this one: it holds the other end of its standard input.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._over = False

    def where(self) -> tuple[str, str, str]:
        """This machine's address, Ray's number of it, and the version of Inflight there."""
        import ray

        return ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id(), __version__

    def start(self, command: Sequence[str], invitation: str, address: str) -> tuple[int, int]:
        """Starts Python with these arguments. Its output goes where Ray keeps that of this process.

        Args:
            address: of this machine.

        Returns:
            The process's number, and a port that is free.
        """
        with self._lock:
            if self._over:
                raise RuntimeError("it was given up")
            self._process = subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.PIPE, start_new_session=True, close_fds=True
            )
        assert self._process.stdin is not None
        self._process.stdin.write(invitation.encode())
        self._process.stdin.flush()
        try:
            port = free_port(address)
        except OSError:  # an address of a network that this machine sees in another way
            port = free_port(socket.gethostbyname(socket.gethostname()))
        return self._process.pid, port

    def wait(self) -> int:
        """Waits for the end of the process; returns its status, or the number of its signal with a minus sign."""
        assert self._process is not None
        # What it has started is ended before it is collected, while no other process can have its number.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self._signal_group(signal.SIGKILL)
        with self._lock:
            return self._process.wait()

    def signal(self, number: int) -> None:
        with self._lock:
            process = self._process
            if number == signal.SIGKILL:
                self._over = True
            if process is None or process.returncode is not None:
                return
            if number == signal.SIGKILL:
                self._signal_group(number)
            else:
                os.kill(process.pid, number)

    def _signal_group(self, number: int) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass
