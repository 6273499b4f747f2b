"""The server's side of a cluster, with a stand-in for Ray (`tests/fake_ray`): waiting for machines, losses, ends."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from inflight.config import ClusterConfig, GeneratorConfig, check
from inflight.config.parse import cluster as read_cluster
from inflight.config.parse import resources
from inflight.errors import ConfigError, StartError
from inflight.link import AnyMessage, Leaving, Unpacker
from inflight.llm import LLM
from inflight.place import Cluster, OnCluster, RemoteProcess, ray_driver
from inflight.place.cluster import MachineLost
from inflight.place.orders import Ended, Host, Placed
from tests.lm import POCKET

FAKE = Path(__file__).resolve().parents[1] / "fake_ray"

RANK = """
import os, signal, sys
from inflight.link import Invitation, Leaving, WorkerChannel, join
channel = WorkerChannel(join(Invitation.unpack(sys.stdin.buffer.readline())))
channel.send(Leaving())
channel.receive()
"""
"""A process that comes, says one word, and ends when its channel does."""


def run(
    test: Callable[[Cluster, Path], Awaitable[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: int = 1
) -> None:
    monkeypatch.setenv("FAKE_RAY", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), str(FAKE.parents[1])]))
    monkeypatch.syspath_prepend(str(FAKE))  # so that it is found here, too
    monkeypatch.setattr(ray_driver, "PATIENCE", 0.0)
    for number in range(machines):
        (tmp_path / str(number)).touch()

    async def main() -> None:
        cluster = Cluster("auto")
        try:
            await asyncio.wait_for(test(cluster, tmp_path), 60)
        finally:
            await cluster.stop()
            for heard in Heard.all:
                await heard.end()
            Heard.all.clear()

    asyncio.run(main())


async def placed(cluster: Cluster, ranks: int = 1, script: str = RANK) -> tuple[str, list[RemoteProcess]]:
    name, _, processes = await cluster.place("m", [["-c", script]] * ranks, {}, True)
    return name, processes


class Heard:
    """Opens the channel of a process."""

    all: ClassVar[list[Heard]] = []

    def __init__(self, process: RemoteProcess) -> None:
        self.said = asyncio.Event()
        self.closed = asyncio.Event()
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        process.watch(self.status.set_result)
        self._process = process

    async def open(self) -> None:
        self._channel = await self._process.open(self._hear, self.closed.set, None)
        Heard.all.append(self)
        await self.said.wait()

    async def end(self) -> None:
        self._channel.close()
        await self.closed.wait()

    def _hear(self, message: AnyMessage, values: Unpacker) -> None:
        assert isinstance(message, Leaving)
        self.said.set()


def test_processes_come_end_and_wait_for_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(cluster: Cluster, folder: Path) -> None:
        first, (process,) = await placed(cluster)
        heard = Heard(process)
        await heard.open()
        waiting = asyncio.ensure_future(placed(cluster))
        given_up = asyncio.ensure_future(placed(cluster))
        await asyncio.sleep(0.2)
        assert not waiting.done(), "there is one machine"
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        (folder / "another").touch()
        _, (second,) = await waiting
        await Heard(second).open()

        os.kill(process.pid, signal.SIGSEGV)  # how it ended is known
        assert await heard.status == -signal.SIGSEGV
        await heard.closed.wait()
        third = asyncio.ensure_future(placed(cluster))
        await asyncio.sleep(0.1)
        assert not third.done(), "its machine is given back only with `remove`"
        cluster.remove(first)
        _, (process,) = await third
        heard = Heard(process)
        await heard.open()
        process.kill()
        assert await heard.status == -signal.SIGKILL
        assert not process.running

        # A process that ends before it comes.
        (folder / "one more").touch()
        _, (broken,) = await placed(cluster, script="import sys; sys.exit(7)")
        with pytest.raises(StartError, match=r"on 127\.0\.0\.1 ended with status 7 before it came"):
            await broken.open(lambda message, values: None, lambda: None, None)

    run(test, tmp_path, monkeypatch)


def test_an_end_that_is_told_together_with_the_start_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before whoever asked for the process has heard of it."""

    async def test(cluster: Cluster, folder: Path) -> None:
        await cluster.open()
        placing = asyncio.ensure_future(placed(cluster))
        while not cluster._groups:
            await asyncio.sleep(0)
        (name,) = cluster._groups
        cluster._take(Placed(name, [Host("127.0.0.1", 5, 4000, 1, 1)]))
        cluster._take(Ended(name, 0, 7))
        _, (process,) = await placing
        assert process.status == 7

    run(test, tmp_path, monkeypatch)


def test_the_process_that_speaks_with_ray_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is all that it has started; the next replica starts it again."""

    async def test(cluster: Cluster, folder: Path) -> None:
        _, both = await placed(cluster, ranks=2)
        heard = [Heard(process) for process in both]
        for each in heard:
            await each.open()
        waiting = asyncio.ensure_future(placed(cluster))
        await asyncio.sleep(0.1)
        assert cluster._driver is not None
        cluster._driver.kill()
        assert [await each.status for each in heard] == [-signal.SIGKILL] * 2
        with pytest.raises(MachineLost, match="the connection to the Ray cluster was lost"):
            await waiting
        _, (process,) = await placed(cluster)
        await Heard(process).open()

    run(test, tmp_path, monkeypatch, machines=2)


def test_where_there_is_no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def absent(cluster: Cluster, folder: Path) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            StartError, match=r"needs Ray, which is not installed: pip install 'inflight-serving\[ray\]'"
        ):
            await cluster.open()

    async def silent(cluster: Cluster, folder: Path) -> None:
        cluster._address = "127.0.0.1:1"
        with pytest.raises(StartError, match=r"no Ray cluster answers at 127.*nobody is there.*`ray start --head`"):
            await cluster.open()

    run(silent, tmp_path, monkeypatch)
    run(absent, tmp_path, monkeypatch)


def test_the_job_of_a_rank_on_a_cluster() -> None:
    class Known(Cluster):
        async def place(self, label: str, commands: Any, needs: Any, on_cpu: bool) -> Any:
            assert (label, len(commands), needs, on_cpu) == ("m-replica1", 2, {"CPU": 3.0}, False)
            host = Host("10.0.0.7", 5, 4000, 3, 4)
            return "group", [host, host], [None, None]

    async def main() -> None:
        config = GeneratorConfig.of(
            Path("/m"), replicas=3, tensor_parallel=2, device_ids=(0, 1, 2, 3, 4, 5), resources=(("CPU", 3.0),)
        ).of_replica(1)
        placed = await OnCluster(Known("auto")).start(config, 9, again=False)
        jobs = [one.job for one in placed]
        assert [(job.rank, job.world_size, job.rendezvous, job.device_id) for job in jobs] == [
            (0, 2, "10.0.0.7:4000", 0),
            (1, 2, "10.0.0.7:4000", 0),
        ]
        assert {(job.model.threads, job.replicas, job.num_blocks) for job in jobs} == {(3, 2, 9)}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("nodes", "ranks", "on_cpu", "needs"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], 1, False, {"CPU": 4.0}),
        ([{"CPU": 8.0}], 2, False, {"CPU": 4.0}),
        ([{"CPU": 0.0}, {"CPU": 1.0}], 4, False, {"CPU": 1.0}),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}], 2, False, {"GPU": 1.0, "CPU": 1.0}),
        ([{"CPU": 1.0, "GPU": 4.0}], 2, False, {"GPU": 1.0, "CPU": 0.0}),
        ([{"CPU": 8.0, "GPU": 2.0}], 2, True, {"CPU": 4.0}),
    ],
)
def test_what_a_process_gets(nodes: list[dict[str, float]], ranks: int, on_cpu: bool, needs: dict[str, float]) -> None:
    assert ray_driver.default_needs(nodes, ranks, on_cpu) == needs


def test_how_many_fit() -> None:
    node = {"CPU": 8.0, "GPU": 2.0, "memory": 64.0}
    assert ray_driver.room(node, {"GPU": 1.0, "CPU": 1.0}) == 2
    assert ray_driver.room(node, {"CPU": 3.0, "memory": 40.0}) == 1
    assert ray_driver.room({}, {"CPU": 3.0}) == 1


def test_what_is_written() -> None:
    assert [read_cluster(text) for text in ("ray", "auto", "RAY:10.0.0.5:6379", "ray:auto")] == [
        "ray:auto",
        "ray:auto",
        "ray:10.0.0.5:6379",
        "ray:auto",
    ]
    assert resources("cpu=2, GPU=0.5,memory=1k,TPU=4") == (("CPU", 2.0), ("GPU", 0.5), ("memory", 1024.0), ("TPU", 4.0))
    for text in ("cpu", "cpu=x", "cpu=1,CPU=2", "=3", "memory=0"):
        with pytest.raises(ValueError, match="is no resource; write pairs like"):
            resources(text)
    check(ClusterConfig("ray:auto", "10.0.0.5:0"))
    with pytest.raises(ConfigError, match="'slurm' is no cluster; write ray"):
        check(ClusterConfig("slurm"))
    with pytest.raises(ConfigError, match="write ip:port"):
        check(ClusterConfig("ray:auto", "10.0.0.5"))


def test_a_script_has_its_model_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_RAY", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), str(FAKE.parents[1])]))
    monkeypatch.syspath_prepend(str(FAKE))
    (tmp_path / "0").touch()
    before = psutil.Process().children()
    with LLM(POCKET, device_type="cpu") as here:
        expected = here.generate(["Once upon"], max_new_tokens=12)[0].token_ids
    with LLM(POCKET, device_type="cpu", cluster="ray", cluster_resources={"cpu": 1}) as llm:
        assert [llm.generate(["Once upon"], max_new_tokens=12)[0].token_ids for _ in range(2)] == [expected] * 2
        assert any("ray_driver" in " ".join(each.cmdline()) for each in psutil.Process().children())
    assert psutil.Process().children() == before
    with pytest.raises(ConfigError, match="'slurm' is no cluster; write ray"):
        LLM(POCKET, cluster="slurm")
    for given in ({"cpu": "8"}, {"cpu": -1}, "cpu=8"):
        with pytest.raises(ConfigError, match=r"names no resources; write for example \{'cpu': 8"):
            LLM(POCKET, cluster="ray", cluster_resources=given)  # type: ignore[arg-type]


def test_a_script_is_told_that_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError, match="needs Ray, which is not installed"):
        LLM(POCKET, cluster="ray")


def test_a_server_that_stops_does_not_wait_for_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the machine of the cluster's head is gone, and nothing answers at its address."""
    (tmp_path / "ray.py").write_text("import time\n\ndef init(**given):\n    time.sleep(300)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(FAKE.parents[1])]))
    monkeypatch.syspath_prepend(str(tmp_path))

    async def main() -> None:
        cluster = Cluster("10.0.0.5:6379")
        opening = asyncio.ensure_future(cluster.open())
        await asyncio.sleep(0.1)
        await asyncio.wait_for(cluster.stop(), 40)
        with pytest.raises(StartError, match="the server stops"):
            await opening

    asyncio.run(main())
