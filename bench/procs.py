"""Servers as child processes, with figures of `/proc` about them and their own children."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

_TICKS = os.sysconf("SC_CLK_TCK")


class ServerFailed(RuntimeError):
    """A server ended or did not answer in time; the text ends with the last lines of its output."""


@dataclass
class Server:
    """One server process in a session of its own; a context manager that starts and stops it.

    Attributes:
        name: its name in the report.
        argv: command line.
        log: the file that gets its output.
        ready: called until it returns true; an OSError counts as "not yet".
        environment: variables added to this process's own.
        ports: the ports that it listens on, by protocol.
    """

    name: str
    argv: Sequence[str]
    log: Path
    ready: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    start_timeout: float = 60.0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Server:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                list(self.argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Sends SIGTERM and, ten seconds later, SIGKILL to the whole session."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            print(f"{self.name} did not stop within 10 s of SIGTERM and is killed", flush=True)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()

    def tree(self) -> list[int]:
        """Process ids of the server and all its descendants, its own first."""
        return tree(self.pid)

    def cpu_seconds(self) -> float:
        """CPU time that it and its descendants have used, in seconds."""
        return sum(cpu_seconds(pid) for pid in self.tree())

    def _wait_ready(self) -> None:
        assert self._process is not None
        end = time.monotonic() + self.start_timeout
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerFailed(f"{self.name} ended with status {self._process.returncode}:\n{self._tail()}")
            try:
                if self.ready():
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise ServerFailed(f"{self.name} was not ready within {self.start_timeout:.0f} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    except OSError:
        pass  # it ended meanwhile
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of one process, in seconds; 0 for one that is gone."""
    user, system = cpu_times(pid)
    return user + system


def cpu_times(pid: int) -> tuple[float, float]:
    """User and system time of one process, in seconds; zeros for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    return int(fields[11]) / _TICKS, int(fields[12]) / _TICKS


def memory(pid: int, key: str = "VmRSS") -> int:
    """A memory figure of `/proc/<pid>/status` in bytes: VmRSS, VmHWM (its peak), RssShmem, ..."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def reset_peak(pid: int) -> None:
    """Resets the peak (VmHWM) to the memory that is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def free_port() -> int:
    """A free TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
