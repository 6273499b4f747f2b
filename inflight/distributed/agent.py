"""One rank in one process: loads its part of the model, registers with the worker, runs what it is sent.

The process ends when its launcher or its worker is gone; nothing is left behind whoever is killed.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from inflight.contract import Array
from inflight.distributed.connection import Connection, connect, guard_of
from inflight.distributed.messages import (
    PROTOCOL,
    Exit,
    Ping,
    Pong,
    Predict,
    Predicted,
    ProtocolError,
    Refused,
    Register,
    Registered,
    WireGraph,
    arrays_of,
    describe,
)
from inflight.errors import InflightError, StartError
from inflight.errors import describe as text_of
from inflight.runtime import SUFFIXES, Exchanges, LoadedModel, LoadRequest, configure, find_runtime
from inflight.version import __version__

log = logging.getLogger("inflight")

REGISTER_SECONDS = 10.0
SILENT_SECONDS = 20.0
"""A worker that has not pinged for so long is gone."""

LINGER = 1.0
"""Seconds that a running batch may take once this process is to end."""


class AgentJob(msgspec.Struct, frozen=True):
    """What an agent is told by its launcher, in the first line of the control socket.

    Attributes:
        index: among the agents of its launcher.
        address: of the worker.
        listen: `ip:port` that names the agent, as the launcher counted it.
        files: the sub-graphs, absolute.
        group_file: its groups of ranks, as MindSpore writes them.
        threads: for the CPU.
        runtimes: value of INFLIGHT_RUNTIMES.
        token, tls: as in `AgentsConfig`.
    """

    index: int
    rank: int
    rank_size: int
    device_id: int
    device_type: str | None
    address: str
    listen: str
    files: list[str]
    group_file: str | None
    threads: int
    dec_key: bytes | None
    dec_mode: str
    runtimes: str | None
    token: str | None = None
    tls: bool = True


class AgentReport(msgspec.Struct, frozen=True):
    """What an agent tells its launcher, in one line: it is registered, or why not."""

    failure: str | None = None


class _Told(msgspec.Struct, frozen=True):
    """Launcher to agent: all agents of the launcher are registered."""


class Agent:
    """The process of one rank.

    Args:
        control: the socket pair to the launcher; its end is the end of this process.
    """

    def __init__(self, control: socket.socket, job: AgentJob) -> None:
        self._control = control
        self._job = job
        self._connection: Connection | None = None
        self._work: queue.SimpleQueue[tuple[Predict, bytearray]] = queue.SimpleQueue()
        self._leaving = threading.Lock()

    def run(self) -> None:
        """The agent's life; ends the process."""
        threading.Thread(target=self._follow_launcher, name="launcher", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            model = self._load()
            connection = self._connected()
            self._register(connection, model)
        except BaseException as error:  # a back end may raise anything
            text = text_of(error) if isinstance(error, InflightError) else f"{type(error).__name__}: {text_of(error)}"
            self._report(AgentReport(text))
            log.error("agent of rank %d cannot start: %s", self._job.rank, text)
            self._end(1)
        self._report(AgentReport())
        threading.Thread(target=self._read, args=(connection,), name="worker", daemon=True).start()
        threading.Thread(target=self._watch, args=(connection,), name="heartbeat", daemon=True).start()
        while True:
            self._predict(connection, model, *self._work.get())

    # Start

    def _connected(self) -> Connection:
        """Opened when there is something to say: the worker turns away whoever is silent, and loading may take long."""
        if self._connection is None:
            job = self._job
            self._connection = connect(job.address, REGISTER_SECONDS, guard_of(job.token, job.tls))
        return self._connection

    def _load(self) -> LoadedModel:
        job = self._job
        configure(job.runtimes)
        files = tuple(Path(file) for file in job.files)
        # MindSpore Serving takes files of any name for MindIR.
        known = files[0].suffix.lower() in SUFFIXES
        runtime = find_runtime(None if known else "mindir", files[0])
        usable = runtime.devices()
        device = job.device_type or usable[0]
        if device not in usable:
            raise StartError(f"device type '{device}' cannot be used here, choose one of: {', '.join(usable)}")
        return runtime.load(
            LoadRequest(
                files,
                device_type=device,
                device_id=job.device_id,
                threads=job.threads,
                dec_key=job.dec_key,
                dec_mode=job.dec_mode,
                exchanges=lambda: self._join(device),
            )
        )

    def _join(self, device: str) -> Exchanges:
        from inflight.distributed.exchange import join_ranks  # for models whose ranks exchange tensors

        job = self._job
        host = job.listen.rpartition(":")[0]
        return join_ranks(self._connected(), job.rank, job.rank_size, host, (device, job.device_id), job.group_file)

    def _register(self, connection: Connection, model: LoadedModel) -> None:
        graphs = [WireGraph(list(graph.inputs), list(graph.outputs)) for graph in model.graphs]
        job = self._job
        connection.send(Register(job.rank, job.listen, model.device_type, graphs, PROTOCOL, __version__, os.getpid()))
        connection.known = True
        answer = self._answer(connection, REGISTER_SECONDS)
        if not isinstance(answer, Registered):
            raise ProtocolError(f"{self._job.address} is not the worker of a distributed servable")

    def _answer(self, connection: Connection, seconds: float) -> object:
        """Raises StartError where the worker refuses or is gone."""
        try:
            received = connection.receive(seconds)
        except TimeoutError as error:
            raise StartError(f"Failed to register agent of rank {self._job.rank}: {error}") from None
        if received is None:
            raise StartError(f"Failed to register agent of rank {self._job.rank}: the worker is gone")
        if isinstance(received[0], Refused):
            raise StartError(f"Failed to register agent of rank {self._job.rank}: {received[0].text}")
        return received[0]

    # Service

    def _read(self, connection: Connection) -> None:
        try:
            while (received := connection.receive()) is not None:
                message, blob = received
                if isinstance(message, Predict):
                    self._work.put((message, blob))
                elif isinstance(message, Ping):
                    connection.send(Pong())
                elif isinstance(message, Exit):
                    self._end(0)
                else:
                    raise ProtocolError(f"an unexpected message, {type(message).__name__}")
        except ProtocolError as error:
            log.error("worker %s: %s", self._job.address, error)
        self._worker_gone()

    def _watch(self, connection: Connection) -> None:
        while time.monotonic() - connection.heard < SILENT_SECONDS:
            time.sleep(1)
        self._worker_gone()

    def _worker_gone(self) -> None:
        log.error("Recv Ping Time Out from %s, host address is %s", self._job.address, self._job.listen)
        self._end(0)

    def _predict(self, connection: Connection, model: LoadedModel, message: Predict, blob: bytearray) -> None:
        outputs: Sequence[Array] = ()
        failed = ""
        try:
            inputs = arrays_of(message.inputs, blob)
            if not 0 <= message.subgraph < len(model.graphs):
                raise ValueError(f"there is no sub-graph {message.subgraph}")
            outputs = model.run(inputs, message.subgraph)
            described = describe(outputs) if message.return_result else []
        except Exception as error:  # a back end may raise anything; the worker tells whoever asked
            failed = f"Predict Failed, {text_of(error)}"
        if failed:
            log.error("rank %d: %s", self._job.rank, failed)
        if failed:
            connection.send(Predicted(message.number, [], failed))
        else:
            connection.send(Predicted(message.number, described), outputs if message.return_result else ())

    # The launcher, and the end

    def _follow_launcher(self) -> None:
        for line in self._control.makefile("rb"):
            if line == TOLD:
                # Scripts search the agents' output for these words.
                log.info("Child %d: Receive success", self._job.index)
                print("Serving worker Agent: wait for Ctrl+C to exit ...", flush=True)
        self._end(0)

    def _report(self, report: AgentReport) -> None:
        try:
            self._control.sendall(msgspec.json.encode(report) + b"\n")
        except OSError:
            pass  # the launcher is gone, and the end of its socket ends this process

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Not from the handler itself: it may have interrupted a holder of the lock that sending takes.
        threading.Thread(target=self._end, args=(0,), daemon=True).start()

    def _end(self, status: int) -> NoReturn:
        """Tells the worker, and ends this process at once: its model may be in the middle of a run."""
        with self._leaving:
            threading.Timer(LINGER, os._exit, (status,)).start()  # where the worker does not read
            if self._connection is not None and status == 0:
                self._connection.send(Exit())
                print("Serving worker Agent: exited ...", flush=True)
            os._exit(status)


TOLD = b"told\n"
"""The launcher's line that all of its agents are registered."""


def run_agent(fd: int) -> NoReturn:
    """The life of an agent's process.

    Args:
        fd: its end of the socket pair to the launcher.
    """
    control = socket.socket(fileno=fd)
    job = msgspec.json.decode(_line(control), type=AgentJob)
    Agent(control, job).run()
    raise AssertionError


def _line(control: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = control.recv(1)
        if not part:
            os._exit(1)
        data += part
    return data
