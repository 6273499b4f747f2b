"""Whole servers for tests: in this process, or `inflight serve` in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from inflight.config import ListenConfig, ServableConfig, ServerConfig
from inflight.server import Server

FREE = "127.0.0.1:0"

WORK = """
    import os, subprocess, sys, threading, time
    import numpy as np
    from inflight.servable import add_stage, register_method

    ran = []

    def same(x):
        return x

    def sleep(seconds):
        ran.append(float(seconds))
        time.sleep(float(seconds))
        return os.getpid()

    def began(x):
        return np.array(ran + [0.0])

    def die(x):
        os._exit(3)

    def fail(x):
        raise ValueError(f"no {x}")

    def child(x):
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    @register_method(output_names=["y"])
    def echo(x):
        return add_stage(same, x, outputs_count=1)

    @register_method(output_names=["pid"])
    def nap(x):
        return add_stage(sleep, x, outputs_count=1)

    @register_method(output_names=["pid"], queue_size=2)
    def short_queue(x):
        return add_stage(sleep, x, outputs_count=1)

    @register_method(output_names=["seconds"])
    def naps(x):
        return add_stage(began, x, outputs_count=1)

    @register_method(output_names=["y"])
    def deadly(x):
        return add_stage(die, x, outputs_count=1)

    @register_method(output_names=["y"])
    def failing(x):
        return add_stage(fail, x, outputs_count=1)

    @register_method(output_names=["pid"])
    def spawn(x):
        return add_stage(child, x, outputs_count=1)
"""
"""A servable of Python functions: `echo`, and what a test needs to make trouble."""


METHODS = """
    @register_method(output_names=["y"])
    def function(x):
        return add_stage(single, x, outputs_count=1)

    @register_method(output_names=["y"])
    def batch(x):
        return add_stage(batched, x, outputs_count=1, batch_size=8)

    @register_method(output_names=["y"])
    def stage(x):
        return add_stage(declared, x, outputs_count=1)

    @register_method(output_names=["y"])
    def call(x):
        return add_stage(calls, x, outputs_count=1)
"""
"""Methods for the end of a servable that has `single`, `batched`, `declared` and `calls`."""


SLOW_MODEL = """
    import time
    from inflight.servable import add_stage, declare_model, register_method

    def slow(x):
        time.sleep(float(x.max()))
        return x

    model = declare_model(slow, "callable")

    @register_method(output_names=["y"])
    def nap(x):
        return add_stage(model, x, outputs_count=1)
"""
"""A servable that is one model and nothing else, which takes as long as it is told."""


def write_servable(directory: Path, name: str, config: str = WORK, files: Mapping[str, bytes] = {}) -> Path:
    """Writes a servable's folder; returns its parent."""
    folder = directory / name
    folder.mkdir(parents=True)
    (folder / "servable_config.py").write_text(textwrap.dedent(config))
    for file, data in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


# A server in this process


@dataclass
class Running:
    """A server with both doors open."""

    server: Server
    http: str
    grpc: str


@contextmanager
def running(
    *servables: ServableConfig, config: ServerConfig = ServerConfig(), http: str = FREE, grpc: str = FREE, **listen: Any
) -> Iterator[Running]:
    """A server in this process; afterwards it must have left nothing."""
    before = workers()
    server = Server(config)
    try:
        server.start_servables(servables)
        http = server.start_http(ListenConfig(http, **listen))
        grpc = server.start_grpc(ListenConfig(grpc, **listen))
        yield Running(server, http, grpc)
    finally:
        server.stop()
    assert workers() == before


# A server in a process of its own


@dataclass
class Served:
    """`inflight serve`, or a script, in a process of its own that writes to files."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path
    cwd: Path
    http: str = ""
    grpc: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self, start: str, seconds: float = 60) -> str:
        """The rest of the first line of its output that begins like this; waits for it."""

        def found() -> list[str]:
            text = self.stdout.read_text()
            return [line[len(start) :].strip() for line in text.splitlines(keepends=True) if line.startswith(start)]

        eventually(lambda: found() or self.process.poll() is not None, seconds)
        assert found(), self.stderr.read_text()
        return found()[0]

    def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Sends a signal and waits for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ
"""Whether `make coverage` measures: a process that is killed takes along what it has run."""


def _end_gently(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """Lets a process and what it started write down what they ran. Who is stopped or hangs is left as it is."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


@contextmanager
def process(
    directory: Path, *command: str, environment: Mapping[str, str] = {}, python: str = sys.executable
) -> Iterator[Served]:
    """Runs `python *command` in an empty working directory; kills what is left of it afterwards."""
    cwd = directory / f"cwd{time.monotonic_ns()}"
    cwd.mkdir(parents=True)
    stdout, stderr = (cwd.with_suffix(suffix) for suffix in (".out", ".err"))
    with stdout.open("wb") as out, stderr.open("wb") as err:
        started = subprocess.Popen(
            [python, *command],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    family: list[psutil.Process] = []
    try:
        yield Served(started, stdout, stderr, cwd)
    finally:
        if started.poll() is None:
            family = psutil.Process(started.pid).children(recursive=True)
            if MEASURED:
                _end_gently(started)
            started.kill()
        started.wait()
        for one in family:
            if one.is_running():
                one.kill()


@contextmanager
def serve(
    directory: Path, *arguments: str, environment: Mapping[str, str] = {}, python: str = sys.executable
) -> Iterator[Served]:
    """`inflight serve` with both doors on free ports, ready."""
    doors = [] if "--http" in arguments else ["--http", FREE]
    doors += [] if "--grpc" in arguments else ["--grpc", FREE]
    command = ["-m", "inflight.cli", "serve", *arguments, *doors]
    with process(directory, *command, environment=environment, python=python) as served:
        served.line("try ")
        served.http = served.line("REST").partition("//")[2]
        served.grpc = served.line("gRPC")
        yield served


# What a test asks


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def workers(pid: int | None = None) -> list[int]:
    """Child processes of a server, by default of this process."""
    return sorted(child.pid for child in psutil.Process(pid).children())


def eventually(condition: Callable[[], object], seconds: float = 15, why: str = "it did not happen") -> None:
    """Waits for a condition; the bound is generous because the machine may be busy."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, why
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has collected does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def shared_memory() -> list[str]:
    """Names in the directory of POSIX shared memory and semaphores."""
    return sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []


def connect(address: str, timeout: float = 60) -> http.client.HTTPConnection:
    host, _, port = address.rpartition(":")
    return http.client.HTTPConnection(host, int(port), timeout=timeout)


def request(
    address: str, verb: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
) -> tuple[int, bytes]:
    """One HTTP request on a connection of its own: status and body."""
    connection = connect(address)
    try:
        connection.request(verb, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def get(address: str, path: str) -> Any:
    """The JSON document at a path."""
    return json.loads(request(address, "GET", path)[1])


def ask(address: str, servable: str, method: str, *values: Any, **inputs: Any) -> Any:
    """A request by MindSpore Serving's REST: an instance `{"x": value}` for each value; the answer's JSON."""
    instances = [{"x": value} for value in values] or [inputs]
    status, body = request(
        address, "POST", f"/model/{servable}:{method}", json.dumps({"instances": instances}).encode()
    )
    assert status == 200, body
    return json.loads(body)


class Background:
    """A call on a thread; `result` gives what it returned or raises what it raised."""

    def __init__(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        self._result: Any = None
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self._result = call(*arguments, **named)
            except BaseException as error:  # handed to whoever asks for the result
                self._error = error

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, seconds: float = 60) -> Any:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the call does not return"
        if self._error is not None:
            raise self._error
        return self._result


def crowd(call: Callable[[int], Any], count: int) -> list[Any]:
    """Calls it `count` times at once, from as many threads, with 0, 1, ...; the results in order."""
    calls = [Background(call, index) for index in range(count)]
    return [one.result() for one in calls]


def metrics(address: str) -> dict[str, dict[tuple[str, ...], float]]:
    """What the server counts: by name of the sample, by the values of its labels, ordered by label."""
    text = request(address, "GET", "/metrics")[1].decode()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {})
            found[sample.name][labels] = sample.value
    return found


def in_one_batch(address: str, begin: Callable[[], Background], count: int, least: int) -> list[Background]:
    """Begins generations and returns them when at least `least` of them are seen in one batch. Where a busy machine has
    ended one before that, all of them begin again."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        calls = [begin() for _ in range(count)]
        while not any(call.done for call in calls):
            if metrics(address)["tgi_batch_current_size"][()] >= least:
                return calls
        for call in calls:
            call.result()
    raise AssertionError(f"{least} generations were never seen in one batch")


def in_flight(address: str) -> int:
    """Requests in the server now."""
    return int(metrics(address)["inflight_requests_in_flight"][()])


def states(address: str) -> dict[tuple[str, str], str]:
    """The state of every replica, by servable and replica."""
    samples = metrics(address).get("inflight_replica_state", {})
    return {(servable, replica): state for (replica, servable, state, _), value in samples.items() if value}
