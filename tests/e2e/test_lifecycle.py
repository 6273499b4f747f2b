"""Start, stop, loss and death of whole servers: nothing may be left, nobody may be left waiting."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from msgspec.structs import replace

from inflight.client import Client
from inflight.config import ListenConfig, ServableConfig, ServerConfig
from inflight.errors import ConfigError, StartError
from inflight.proto import health_pb2, open_inference_pb2
from inflight.server import SIGNALS, Server
from tests.e2e.running import (
    FREE,
    SLOW_MODEL,
    Background,
    Served,
    alive,
    ask,
    connect,
    eventually,
    get,
    in_flight,
    process,
    running,
    serve,
    shared_memory,
    states,
    workers,
    write_servable,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def work(tmp_path: Path) -> ServableConfig:
    return ServableConfig(write_servable(tmp_path, "work"), "work")


def refused(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def family(pid: int) -> list[int]:
    """Every process that a server started, and what those started."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def check_gone(served: Served, processes: list[int], memory: list[str], seconds: float = 20) -> None:
    """Nothing of a server that has ended is left."""
    eventually(lambda: not any(map(alive, processes)), seconds, f"processes are left: {processes}")
    eventually(lambda: set(shared_memory()) <= set(memory), 5, "shared memory is left")
    assert list(served.cwd.iterdir()) == []
    for address in (served.http, served.grpc):
        assert not address or refused(address)
    assert "Traceback" not in served.stderr.read_text()


# In one process


@linux
def test_starting_and_stopping_many_times_leaves_nothing(work: ServableConfig) -> None:
    me = psutil.Process()
    threads = threading.active_count()

    def once() -> None:
        with running(work) as here:
            assert ask(here.http, "work", "echo", 1, 2) == {"instances": [{"y": 1}, {"y": 2}]}
            big = np.zeros(1 << 18, np.float32)
            with Client(here.grpc, "work", "echo", timeout=60) as client:
                (result,) = client.infer({"x": big})
            assert np.array_equal(result["y"], big)
        assert not me.children()
        eventually(lambda: threading.active_count() <= threads)

    once()
    once()
    gc.collect()
    gc.disable()  # what is left must not depend on when garbage is collected
    try:
        # A poller of gRPC's C core comes and goes; what is left of every server shows all the same.
        before = me.num_fds() + 2
        for _ in range(5):
            once()
            eventually(lambda: me.num_fds() <= before)  # gRPC's client closes its own a little later
    finally:
        gc.enable()


def test_signal_handlers_are_given_back(work: ServableConfig) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with running(work):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_two_servers_in_one_process_do_not_meet(work: ServableConfig) -> None:
    with running(work) as one:
        with running(work) as two:
            assert len(workers()) == 2
            (first,), (second,) = ([reply["pid"] for reply in nap(each.http, 0)] for each in (one, two))
            assert {first, second} == set(workers())
        assert refused(two.http)
        assert nap(one.http, 0) == [{"pid": first}]


def nap(address: str, seconds: float) -> Any:
    return ask(address, "work", "nap", seconds)["instances"]


def test_a_stopped_server_says_so(work: ServableConfig) -> None:
    with running(work) as here:
        pass
    assert not here.server.running
    for call in (lambda: here.server.start_servables([work]), lambda: here.server.start_http(ListenConfig(FREE))):
        with pytest.raises(StartError, match="the server has stopped; make a new Server"):
            call()
    here.server.stop()
    here.server.wait()


def test_a_start_that_fails_can_be_repeated(work: ServableConfig, tmp_path: Path) -> None:
    write_servable(tmp_path, "broken", "import no_such_module")
    missing = ServableConfig(tmp_path, "missing")
    with running() as here:
        for wrong, error in ((missing, ConfigError), (ServableConfig(tmp_path, "broken"), StartError)):
            with pytest.raises(error):
                here.server.start_servables([work, wrong])
            assert here.server.servables() == []
            assert not workers()
            assert get(here.http, "/")["servables"] == []
        assert states(here.http) == {}
        here.server.start_servables([work])
        assert get(here.http, "/health/ready")["ready"] is True
        assert ask(here.http, "work", "echo", 5) == {"instances": [{"y": 5}]}


def test_a_stop_has_an_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Also where a door does not close and takes no notice of being cancelled; the log names it."""
    monkeypatch.setattr("inflight.server.END_SECONDS", 0.2)
    monkeypatch.setattr("inflight.server.DRAIN_SECONDS", 0.2)
    asked = threading.Event()

    class Door:
        address = "nowhere"

        async def close(self, grace: float) -> None:
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    asked.set()

    server = Server(ServerConfig(stop_timeout=0.0))
    server._listeners.append(Door())  # type: ignore[arg-type]
    start = time.monotonic()
    server.stop()
    assert time.monotonic() - start < 10
    assert asked.is_set()
    assert "the server ends, and the door at nowhere has not within 0.2 seconds" in caplog.text
    assert "the server ends without a task that did not" in caplog.text
    assert "Door.close" in caplog.text


def test_workers_start_where_stderr_is_replaced(work: ServableConfig) -> None:
    with contextlib.redirect_stderr(io.StringIO()), running(work) as here:
        assert ask(here.http, "work", "echo", 5) == {"instances": [{"y": 5}]}


@linux
def test_all_children_are_workers_and_come_back_when_killed(work: ServableConfig, tmp_path: Path) -> None:
    write_servable(tmp_path, "other")
    pair = replace(work, device_ids=(0, 1))
    with running(pair, ServableConfig(tmp_path, "other")) as here:
        children = psutil.Process().children(recursive=True)
        assert len(children) == 3
        assert all("inflight.worker" in child.cmdline() for child in children)
        naps = [Background(ask, here.http, name, "nap", 1.5) for name in ("work", "work", "other")]
        eventually(lambda: in_flight(here.http) == 3)
        time.sleep(0.3)
        killed = time.monotonic()
        for child in children:
            child.kill()
        for name in ("work", "other"):
            assert ask(here.http, name, "echo", 5) == {"instances": [{"y": 5}]}
        assert time.monotonic() - killed < 15, "2 s on an idle machine"
        for one in naps:
            (reply,) = one.result()["instances"]
            assert reply["pid"] not in [child.pid for child in children]
        eventually(lambda: set(states(here.http).values()) == {"ready"})
        assert len(workers()) == 3


# `inflight serve`


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serve_ends_at_once_when_nothing_runs(work: ServableConfig, number: int) -> None:
    memory = shared_memory()
    with serve(work.directory.parent, str(work.directory / "work")) as served:
        processes = family(served.pid)
        assert len(processes) == 1
        resting = connect(served.http)
        resting.request("GET", "/health/live")
        resting.getresponse().read()
        with socket.create_connection(("127.0.0.1", resting.port)), grpc.insecure_channel(served.grpc) as channel:
            watch = channel.unary_stream(
                "/grpc.health.v1.Health/Watch",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            states = watch(health_pb2.HealthCheckRequest(service="work"), timeout=60)
            assert next(states).status == health_pb2.HealthCheckResponse.SERVING
            start = time.monotonic()
            assert served.end(number) == 0
            assert time.monotonic() - start < 6, "2 s on an idle machine"
        resting.close()
        check_gone(served, processes, memory, 0.5)


def test_what_runs_is_answered_and_new_work_is_refused(work: ServableConfig) -> None:
    """Ctrl+C goes to the whole process group of the terminal; workers are not in it."""
    memory = shared_memory()
    with serve(work.directory.parent, str(work.directory / "work")) as served:
        processes = family(served.pid)
        assert all(os.getsid(worker) == worker for worker in processes)
        connection = connect(served.http)
        with Client(served.grpc, "work", "nap", timeout=60) as client:
            connection.request("POST", "/model/work:nap", json.dumps({"instances": {"x": 1.5}}))
            by_grpc = client.infer_async({"x": np.float32(1.5)})
            eventually(lambda: in_flight(served.http) == 2)
            os.killpg(served.pid, signal.SIGINT)
            eventually(lambda: refused(served.http) and refused(served.grpc))
            os.killpg(served.pid, signal.SIGINT)  # an impatient user changes nothing
            response = connection.getresponse()
            assert response.status == 200
            assert json.loads(response.read()) == {"instances": [{"pid": processes[0]}]}
            assert response.getheader("connection") == "close"
            assert by_grpc.result()[0]["pid"] == processes[0]
        connection.close()
        assert served.process.wait(20) == 0
        check_gone(served, processes, memory, 0.5)


def test_work_without_an_end_is_cut(tmp_path: Path) -> None:
    write_servable(tmp_path / "all", "work")
    write_servable(tmp_path / "all", "model", SLOW_MODEL)
    with serve(tmp_path, str(tmp_path / "all"), "--stop-timeout", "0.5") as served:
        (child,) = ask(served.http, "work", "spawn", 0)["instances"]
        processes = [*family(served.pid), child["pid"]]
        answers = [Background(ask, served.http, name, "nap", 60) for name in ("work", "work", "model")]
        eventually(lambda: in_flight(served.http) == 3)
        start = time.monotonic()
        assert served.end() == 0
        assert time.monotonic() - start < 10
        for answer in answers:
            assert "servable is not available" in str(answer.result()) or "the server stopped" in str(answer.result())
        assert not any(map(alive, processes))


@linux
def test_killing_the_server_leaves_nothing(tmp_path: Path) -> None:
    """Its workers are idle with a child process of their own, in the middle of user code or a model, or loading."""
    memory = shared_memory()
    sleeper = "import subprocess, sys, time\n"
    sleeper += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    for name in ("idle", "busy"):
        write_servable(tmp_path / "all", name)
    write_servable(tmp_path / "all", "modelling", SLOW_MODEL)
    write_servable(tmp_path / "all", "loading", sleeper + "time.sleep(600)")
    command = ["-m", "inflight.cli", "serve", str(tmp_path / "all"), "--http", free(), "--grpc", "off"]
    with process(tmp_path, *command) as served:
        served.http = command[5]
        eventually(lambda: not refused(served.http))
        eventually(lambda: list(states(served.http).values()) == ["ready"] * 3, 60)
        spawned = ask(served.http, "idle", "spawn", 0)["instances"][0]["pid"]
        busy = [Background(ask, served.http, name, "nap", 600) for name in ("busy", "modelling")]
        eventually(lambda: in_flight(served.http) == 2)
        eventually(lambda: len(family(served.pid)) == 6)  # four workers, two of which have a child
        processes = family(served.pid)
        assert spawned in processes
        served.process.kill()
        served.process.wait()
        for one in busy:
            with pytest.raises((OSError, http.client.HTTPException)):
                one.result()
        check_gone(served, processes, memory)


def free() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_a_signal_while_workers_load_ends_the_start(tmp_path: Path) -> None:
    memory = shared_memory()
    write_servable(tmp_path / "all", "quick")
    write_servable(tmp_path / "all", "loading", "import time; time.sleep(600)")
    command = ["-m", "inflight.cli", "serve", str(tmp_path / "all"), "--http", free(), "--grpc", "off"]
    with process(tmp_path, *command) as served:
        served.http = command[5]
        eventually(lambda: not refused(served.http), 60)
        eventually(lambda: states(served.http) == {("quick", "device0"): "ready"}, 60)
        processes = family(served.pid)
        start = time.monotonic()
        code = served.end()
        assert time.monotonic() - start < 10
        assert code == 0
        told = [line for line in served.stderr.read_text().splitlines() if not line.startswith("Serving: ")]
        assert told == []  # the worker that was ready says so; nobody complains
        check_gone(served, processes, memory, 0.5)


def test_a_worker_that_cannot_start_ends_serve_with_its_text(tmp_path: Path) -> None:
    memory = shared_memory()
    write_servable(tmp_path / "all", "quick")
    config = "print('about to fail')\nraise ValueError('no weights for you')"
    write_servable(tmp_path / "all", "broken", config)
    with process(tmp_path, "-m", "inflight.cli", "serve", str(tmp_path / "all"), "--http", FREE, "--grpc", FREE) as it:
        assert it.process.wait(60) == 1
        text = it.stderr.read_text()
        assert "about to fail" in text  # what it printed
        assert "inflight serve: Fail to start workers: " in text
        assert "import broken.servable_config failed, no weights for you" in text
        check_gone(it, family_of_session(it.pid), memory, 0.5)


def family_of_session(pid: int) -> list[int]:
    """Processes whose parent or session was this one."""
    return [one.pid for one in psutil.process_iter() if pid in (one.ppid(), session(one.pid))]


def session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


SCRIPT = """
import atexit, sys
from pathlib import Path
from inflight.config import ListenConfig, ServableConfig, ServerConfig
from inflight.server import Server

def main():
    server = Server()
    server.on_stopped(lambda: print("stopped", flush=True))
    server.start_servables([ServableConfig(Path(sys.argv[1]), "work")])
    print("http", server.start_http(ListenConfig("127.0.0.1:0")), flush=True)

main()
print("the script ends", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_script_may_end_and_its_server_lives_on(work: ServableConfig, number: int) -> None:
    with process(work.directory.parent, "-c", SCRIPT, str(work.directory)) as script:
        script.http = script.line("http ")
        script.line("the script ends")
        processes = family(script.pid)
        assert len(processes) == 1
        assert ask(script.http, "work", "echo", 1) == {"instances": [{"y": 1}]}
        running_nap = Background(ask, script.http, "work", "nap", 2.0)
        eventually(lambda: in_flight(script.http) == 1)
        assert script.end(number) == 0
        assert running_nap.result() == {"instances": [{"pid": processes[0]}]}
        assert "stopped" in script.stdout.read_text()
        check_gone(script, processes, shared_memory(), 0.5)


NOBODY_WAKES = """
import signal, sys, threading, time
from inflight.config import ListenConfig
from inflight.server import Server

server = Server()
server.on_stopped(lambda: print("stopped", flush=True))
print("http", server.start_http(ListenConfig("127.0.0.1:0")), flush=True)

def take():
    time.sleep(0.2)  # the main thread waits by then
    signal.pthread_kill(threading.get_ident(), int(sys.argv[2]))

threading.Thread(target=take, daemon=True).start()
if sys.argv[1] == "waits":
    server.wait()
"""


@linux
@pytest.mark.parametrize(("main", "number"), [("waits", signal.SIGTERM), ("has ended", signal.SIGINT)])
def test_a_signal_that_interrupts_no_wait_stops_the_server(main: str, number: int, tmp_path: Path) -> None:
    """As one that comes in the moment before the main thread begins to wait, or that another thread takes: Python does
    not run its handler before that wait ends."""
    with process(tmp_path, "-c", NOBODY_WAKES, main, str(int(number))) as script:
        script.line("http ")
        assert script.process.wait(20) == 0
        assert "stopped" in script.stdout.read_text()
        assert "Traceback" not in script.stderr.read_text()


def test_an_idle_stream_of_requests_does_not_hold_up_the_end(work: ServableConfig) -> None:
    with running(work) as here, grpc.insecure_channel(here.grpc) as channel:
        infer = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=open_inference_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=open_inference_pb2.ModelStreamInferResponse.FromString,
        )
        hold = threading.Event()

        def requests() -> Any:
            yield open_inference_pb2.ModelInferRequest(model_name="nobody")
            hold.wait(60)

        replies = infer(requests(), timeout=60)
        assert "nobody" in next(replies).error_message
        start = time.monotonic()
        here.server.stop()
        assert time.monotonic() - start < 6
        hold.set()
