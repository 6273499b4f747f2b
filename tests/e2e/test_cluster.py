"""Workers of servables on the machines of a cluster, with a stand-in for Ray that puts each in a process of this
machine (`tests/fake_ray`). `tests/e2e/test_ray.py` runs on the real one."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from inflight.client import Client
from tests.conftest import binary_model
from tests.e2e.running import Background, Served, ask, crowd, eventually, serve, states, write_servable

FAKE = Path(__file__).resolve().parents[1] / "fake_ray"
LARGE = 60_000
"""Numbers in an array that would travel through shared memory on one machine."""

SERVABLE = """
    import os, re, time
    import numpy as np
    from inflight.servable import add_stage, declare_model, register_method

    def scaled(x):
        time.sleep(0.005)
        return x * 3

    model = declare_model(lambda x: x + 1, "callable")

    def spin(x):
        if int(x) == 13:
            re.match("(a+)+$", "a" * 64 + "b")  # holds the interpreter's lock, for longer than anybody waits
        return os.getpid()

    @register_method(output_names=["y"])
    def compute(x):
        return add_stage(model, add_stage(scaled, x, outputs_count=1), outputs_count=1)

    @register_method(output_names=["where"])
    def where(x):
        return add_stage(lambda x: f"{os.getpid()} {os.environ['SERVING_DEVICE_ID']}", x, outputs_count=1)

    @register_method(output_names=["pid"])
    def spins(x):
        return add_stage(spin, x, outputs_count=1)
"""


class Load:
    """Callers who ask for arrays of all sizes until `end`, and note every answer that is not the right one."""

    def __init__(self, grpc: str, servable: str, callers: int = 4) -> None:
        self._over = threading.Event()
        self.wrong: list[object] = []
        self.answers = 0
        self._calls = [Background(self._ask, grpc, servable, number) for number in range(callers)]

    def _ask(self, grpc: str, servable: str, number: int) -> None:
        with Client(grpc, servable, "compute", timeout=60) as client:
            while not self._over.is_set():
                x = np.arange((1, 100, LARGE)[self.answers % 3], dtype=np.float32) + number
                found = client.infer([{"x": x}, {"x": -x}])
                if not isinstance(found, list) or any("y" not in one for one in found):
                    self.wrong.append(found)
                elif not all(np.array_equal(one["y"], sign * x * 3 + 1) for one, sign in zip(found, (1, -1))):
                    self.wrong.append("another value")
                self.answers += 1

    def more(self, count: int) -> None:
        """Waits for so many further answers."""
        until = self.answers + count
        eventually(lambda: self.answers >= until, 60)

    def end(self) -> None:
        self._over.set()
        for call in self._calls:
            call.result()
        assert not self.wrong, self.wrong[:3]


def ready(served: Served, servable: str = "sums") -> int:
    return sum(state == "ready" for (name, _), state in states(served.http).items() if name == servable)


def places(served: Served) -> set[str]:
    """What workers answer, of enough requests that each has some."""
    found = crowd(lambda number: ask(served.http, "sums", "where", *range(8)), 8)
    return {each["where"] for one in found for each in one["instances"]}


def lost(served: Served, count: int) -> bool:
    """Whether so many workers were lost."""
    return served.stderr.read_text().count("was lost (pid") == count


def worker_pids(served: Served) -> list[int]:
    """Processes of servables' workers that the driver has started, in the order of their starts."""
    family = [each for each in psutil.Process(served.pid).children(recursive=True) if "--join" in each.cmdline()]
    return [each.pid for each in sorted(family, key=lambda each: each.create_time())]


class Machines:
    """The stand-in's machines: a file for each."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        folder.mkdir()
        for number in range(count):
            self.add(str(number))

    def add(self, name: str) -> None:
        (self.folder / name).touch()


@contextmanager
def served_on(folder: Path, machines: Machines, *arguments: str) -> Iterator[Served]:
    root = str(FAKE.parents[1])
    environment = {"FAKE_RAY": str(machines.folder), "PYTHONPATH": os.pathsep.join([str(FAKE), root])}
    options = ("--cluster", "ray", "--device-type", "cpu", "--log-level", "info")
    with serve(folder, *arguments, *options, environment=environment) as served:
        yield served
        pids = worker_pids(served)
        assert served.end() == 0
        eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30, "they end with their server")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Machines:
    return Machines(tmp_path_factory.mktemp("cluster") / "machines", 2)


@pytest.fixture(scope="module")
def server(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three workers are asked for, and there are two machines, each with room for one."""
    folder = tmp_path_factory.mktemp("workers")
    write_servable(folder, "sums", SERVABLE)
    options = ("--device-ids", "0,1,2", "--execution-timeout", "2")
    with served_on(folder, machines, str(folder / "sums"), *options) as served:
        yield served


def test_machines_that_join_get_workers(server: Served, machines: Machines) -> None:
    eventually(lambda: ready(server) == 2, 60)
    found = places(server)
    pids = worker_pids(server)
    assert {each.split()[0] for each in found} == {str(pid) for pid in pids}
    assert {each.split()[1] for each in found} == {"0"}, "a cluster shows a worker its own devices"
    machines.add("2")
    eventually(lambda: ready(server) == 3, 60)
    assert len(worker_pids(server)) == 3


def test_a_worker_that_is_killed_costs_no_request(server: Served, machines: Machines) -> None:
    eventually(lambda: ready(server) == 3, 60)
    load = Load(server.grpc, "sums")
    for kills in (1, 2):
        load.more(20)
        os.kill(worker_pids(server)[0], signal.SIGKILL)
        eventually(partial(lost, server, kills), 60)
        eventually(lambda: ready(server) == 3, 60)
    load.more(20)
    load.end()


def test_a_run_that_holds_the_interpreters_lock_is_found(server: Served) -> None:
    """The worker cannot say that it hangs. Its instances run again one by one, and only the one to blame fails."""
    eventually(lambda: ready(server) == 3, 60)
    found = ask(server.http, "sums", "spins", *range(12, 18))["instances"]
    assert ["pid" in each for each in found] == [True, False, True, True, True, True]
    assert "execution timeout" in found[1]["error_msg"]


def test_a_machine_without_the_model_is_named(tmp_path: Path) -> None:
    """It is tried again while the others serve."""
    machines = Machines(tmp_path / "machines", 1)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adds.onnx").write_bytes(binary_model())
    with served_on(tmp_path, machines, str(folder / "adds.onnx"), "--device-ids", "0,1") as served:
        hidden = shutil.move(folder / "adds.onnx", tmp_path / "hidden.onnx")
        machines.add("1")
        wanted = f"on machine 127.0.0.1: '{folder / 'adds.onnx'}' does not exist on '"
        eventually(lambda: wanted in served.stderr.read_text(), 60)
        x = np.ones((2, 2), np.float32)
        with Client(served.grpc, "adds", "predict") as client:
            assert np.array_equal(client.infer({"x1": x, "x2": x})[0]["y"], x + x)
        shutil.move(hidden, folder / "adds.onnx")
        eventually(lambda: ready(served, "adds") == 2, 60)
