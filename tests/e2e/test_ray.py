"""Replicas on a Ray cluster: machines that come, and machines that are killed while requests run. Needs `make ray`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from inflight.contract import Sampling
from inflight.llm import LLM
from tests.e2e.running import Background, Served, eventually, metrics, request, serve, write_servable
from tests.e2e.test_cluster import SERVABLE, Load
from tests.e2e.test_cluster import ready as workers_ready
from tests.e2e.test_replicas import COUNT, POCKET, prompt, stream

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed; `make ray` installs it and runs these", allow_module_level=True)

pytestmark = pytest.mark.timeout(400)
KINDS = [{}, {"do_sample": True, "seed": 11, "temperature": 0.9}]


class Cluster:
    """Ray's own test cluster: machines as processes of this one, each with resources of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_cluster"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def order(self, what: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._line()

    def end(self) -> None:
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.communicate("end\n", 60)
        for process in family:
            if process.is_running():
                process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def server(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three replicas are asked for, and there are two machines."""
    assert [cluster.order("add 1"), cluster.order("add 1")] == ["0", "1"]
    options = ("--cluster", f"ray:{cluster.address}", "--replicas", "3", "--device-type", "cpu", "--log-level", "info")
    with serve(tmp_path_factory.mktemp("ray"), str(POCKET), *options) as served:
        yield served
        assert served.end() == 0
        eventually(lambda: not processes(), 30, "they end with their server")


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    with LLM(POCKET) as llm:
        return [
            llm.generate([prompt(number)], Sampling(**KINDS[number % 2]), max_new_tokens=COUNT)[0].token_ids
            for number in range(12)
        ]


def processes() -> list[int]:
    """The ranks that run, wherever they are."""
    found = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        line = process.info["cmdline"] or []
        if "--join" in line and "inflight.worker" in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.info["pid"])
    return found


def ready(server: Served) -> int:
    values = metrics(server.http).get("inflight_generator_replica_ready", {})
    return int(sum(values.values()))


def test_machines_that_join_get_replicas(server: Served, cluster: Cluster) -> None:
    eventually(lambda: ready(server) == 2, 60)
    eventually(lambda: "waits for a machine: it needs 1 CPU, and free are 0 CPU" in server.stderr.read_text(), 30)
    assert request(server.http, "GET", "/health")[0] == 200
    assert cluster.order("add 1") == "2"
    eventually(lambda: ready(server) == 3, 60)


def test_a_machine_that_is_killed_costs_no_request(server: Served, cluster: Cluster, alone: list[list[int]]) -> None:
    eventually(lambda: ready(server) == 3, 60)

    def many(number: int) -> list[list[int]]:
        return [kind(server, number) for _ in range(4)]

    calls = [Background(many, number) for number in range(12)]
    eventually(lambda: sum(metrics(server.http)["inflight_generator_replica_running"].values()) >= 9, 30)
    assert cluster.order("kill 1") == "killed"
    assert [call.result(200) for call in calls] == [[tokens] * 4 for tokens in alone]
    assert sum(metrics(server.http)["inflight_generator_replica_taken_over_total"].values()) >= 1
    assert ready(server) == 2
    assert request(server.http, "GET", "/health")[0] == 200
    assert cluster.order("add 1") == "3"
    eventually(lambda: ready(server) == 3, 90, "a machine that joins takes the place of the one that was lost")
    assert kind(server, 0) == alone[0]


def kind(server: Served, number: int) -> list[int]:
    return stream(server.http, number, KINDS[number % 2])


def test_a_script_has_its_replicas_there_too(server: Served, cluster: Cluster, alone: list[list[int]]) -> None:
    cluster.order("add 2")
    options = {"cluster": f"ray:{cluster.address}", "device_type": "cpu", "cluster_resources": {"cpu": 1}}
    with LLM(POCKET, replicas=2, **options) as llm:  # type: ignore[arg-type]
        found = llm.generate([prompt(0), prompt(2)], Sampling(**KINDS[0]), max_new_tokens=COUNT)
    assert [one.token_ids for one in found] == [alone[0], alone[2]]


def test_workers_of_a_servable(cluster: Cluster, tmp_path: Path) -> None:
    """Three are asked for, and there are two machines; a third one comes, and one is killed under load."""
    write_servable(tmp_path, "sums", SERVABLE)
    first = [int(cluster.order("add 0 classic")) for _ in range(2)]
    options = ("--cluster", f"ray:{cluster.address}", "--cluster-resources", "classic=1", "--device-type", "cpu")
    with serve(tmp_path, str(tmp_path / "sums"), *options, "--device-ids", "0,1,2", "--log-level", "info") as served:
        eventually(lambda: workers_ready(served) == 2, 60)
        eventually(lambda: "waits for a machine: it needs 1 classic" in served.stderr.read_text(), 30)
        load = Load(served.grpc, "sums")
        load.more(20)
        cluster.order("add 0 classic")
        eventually(lambda: workers_ready(served) == 3, 60)
        load.more(20)
        assert cluster.order(f"kill {first[0]}") == "killed"
        eventually(lambda: "was lost (pid" in served.stderr.read_text(), 60)
        load.more(20)
        assert workers_ready(served) == 2
        cluster.order("add 0 classic")
        eventually(lambda: workers_ready(served) == 3, 90, "a machine that joins takes the place of the lost one")
        load.more(20)
        load.end()
        assert served.end() == 0
