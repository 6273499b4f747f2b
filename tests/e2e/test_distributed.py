"""A distributed servable by scripts as MindSpore Serving has them: one for the server and one for its agents."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from inflight.config import ListenConfig, RanksConfig, ServableConfig
from inflight.distributed import AgentsConfig, Launcher
from inflight.distributed.messages import Predict
from inflight.server import Server
from mindspore_serving.client import Client
from tests.e2e.running import Background, Served, alive, eventually, free_port, process, request, serve
from tests.e2e.running import running as running_here
from tests.unit.test_distributed import FakeRank

MINDIR = Path(__file__).resolve().parents[1] / "data" / "mindir"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "matmul_distributed"

CONFIG = """
from mindspore_serving.server import distributed, register

model = distributed.declare_servable(rank_size=2, stage_size=1, with_batch_dim=False)

@register.register_method(output_names=["y"])
def predict(x1, x2):
    return register.add_stage(model, x1, x2, outputs_count=1)
"""

SERVER = """
import os, sys
from mindspore_serving import server
from mindspore_serving.server import distributed

def start():
    servable_dir = os.path.dirname(os.path.realpath(sys.argv[0]))
    distributed.start_servable(servable_dir, "add", rank_table_json_file="rank_table.json", version_number=1,
                               distributed_address="127.0.0.1:{address}", wait_agents_time_in_seconds=0)
    server.start_grpc_server("127.0.0.1:{grpc}")
    server.start_restful_server("127.0.0.1:{rest}")

if __name__ == "__main__":
    start()
"""

AGENTS = """
from mindspore_serving.server import distributed

def start_agents():
    model_files = [f"model/device{{i}}/add.mindir" for i in range(2)]
    group_config_files = [f"model/device{{i}}/group_config.pb" for i in range(2)]
    distributed.startup_agents(distributed_address="127.0.0.1:{address}", model_files=model_files,
                               group_config_files=group_config_files, agent_start_port={agents}, agent_ip=None,
                               rank_start=None)

if __name__ == "__main__":
    start_agents()
"""


@dataclass
class Scripts:
    """The two scripts, running."""

    folder: Path
    ports: dict[str, int]
    server: subprocess.Popen[bytes] = field(init=False)
    agents: subprocess.Popen[bytes] = field(init=False)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env={**os.environ, "GLOG_v": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self, script: str) -> str:
        return (self.folder / f"{script}.log").read_text()

    def infer(self, instances: list[dict[str, Any]]) -> Any:
        with Client(f"127.0.0.1:{self.ports['grpc']}", "add", "predict", timeout=30) as client:
            return client.infer(instances)

    def post(self, body: Any) -> Any:
        url = f"http://127.0.0.1:{self.ports['rest']}/model/add:predict"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=30) as reply:
            return json.load(reply)


def write_servable(folder: Path) -> None:
    """The servable `add` of two ranks, its rank table and the ranks' files."""
    (folder / "add").mkdir()
    (folder / "add" / "servable_config.py").write_text(CONFIG)
    devices = [{"device_id": str(rank), "device_ip": "192.98.92.107", "rank_id": str(rank)} for rank in range(2)]
    table = {"version": "1.0", "server_list": [{"server_id": "127.0.0.1", "device": devices}], "status": "completed"}
    (folder / "rank_table.json").write_text(json.dumps(table))
    for rank in range(2):
        (folder / "model" / f"device{rank}").mkdir(parents=True)
        shutil.copy(MINDIR / "add.mindir", folder / "model" / f"device{rank}")
        (folder / "model" / f"device{rank}" / "group_config.pb").touch()


@contextmanager
def running(folder: Path) -> Iterator[Scripts]:
    """Both scripts of a servable `add`."""
    scripts = Scripts(folder, ports())
    write_servable(folder)
    (folder / "server.py").write_text(SERVER.format(**scripts.ports))
    (folder / "agents.py").write_text(AGENTS.format(**scripts.ports))
    scripts.server = scripts.start("server", str(folder / "server.py"))
    scripts.agents = scripts.start("agents", str(folder / "agents.py"))
    with answering(scripts):
        yield scripts


def ports() -> dict[str, int]:
    return {name: free_port() for name in ("grpc", "rest", "address", "agents")}


@contextmanager
def answering(scripts: Scripts) -> Iterator[None]:
    """Waits until the server answers. At the end all must be gone; what is not is killed."""
    started = [scripts.server.pid, scripts.agents.pid]
    try:
        try:
            eventually(lambda: "RESTful server start success" in scripts.said("server"), 60)
        except AssertionError:
            raise AssertionError(scripts.said("server") + scripts.said("agents")) from None
        started += [child.pid for pid in started[:2] for child in psutil.Process(pid).children()]
        yield
        eventually(lambda: not any(alive(pid) for pid in started), 15, "something lives on")
    finally:
        for pid in started:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        for script in (scripts.server, scripts.agents):
            script.wait(10)


INSTANCES = [{"x1": np.full((2, 2), i, np.float32), "x2": np.ones((2, 2), np.float32)} for i in range(3)]


def end(scripts: Scripts, whom: str, number: int) -> None:
    children = {name: psutil.Process(getattr(scripts, name).pid).children() for name in ("server", "agents")}
    pid = {
        "server": scripts.server.pid,
        "launcher": scripts.agents.pid,
        "agent": children["agents"][0].pid,
        "worker": children["server"][0].pid,
    }[whom]
    os.kill(pid, number)
    for script in (scripts.server, scripts.agents):
        script.wait(15)  # this process's child: it has to be collected to be gone


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        pytest.param("agent", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("server", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("launcher", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("launcher", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("worker", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("server", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_scripts_answer_and_end_together(tmp_path: Path, whom: str, number: int) -> None:
    with running(tmp_path) as scripts:
        reply = scripts.infer(INSTANCES)
        assert [item["y"].tolist() for item in reply] == [[[i + 1.0] * 2] * 2 for i in range(3)]
        body = {"instances": {"x1": [[1.0, 2.0], [3.0, 4.0]], "x2": [[1.0, 1.0], [1.0, 1.0]]}}
        assert scripts.post(body) == {"instances": [{"y": [[2.0, 3.0], [4.0, 5.0]]}]}
        assert "Given model input 1 size 4 not match the size 16" in str(
            scripts.infer([{**INSTANCES[0], "x2": np.ones(1, np.float32)}])
        )
        said = scripts.said("agents")
        assert "Child 0: Receive success" in said
        assert "Success to start agents, distributed worker_address: 127.0.0.1:" in said
        assert said.count("Serving worker Agent: wait for Ctrl+C to exit ...") == 2
        assert "Serving: Master server start success" in scripts.said("server")
        log = (tmp_path / "serving_logs" / "log_add_distributed.log").read_text()
        assert f"Distributed gRPC server start success, listening on 127.0.0.1:{scripts.ports['address']}" in log
        tables = list((tmp_path / "temp_rank_table").iterdir())
        assert [table.read_text() for table in tables] == [(tmp_path / "rank_table.json").read_text()]
        end(scripts, whom, number)
    assert "Traceback" not in scripts.said("server") + scripts.said("agents")


def test_the_example_with_ranks_that_add_up_their_products(tmp_path: Path) -> None:
    """`examples/matmul_distributed`, until one of its agents is killed."""
    pytest.importorskip("torch")
    scripts = Scripts(tmp_path, ports())
    grpc, rest, address = (f"127.0.0.1:{scripts.ports[name]}" for name in ("grpc", "rest", "address"))
    scripts.server = scripts.start("server", str(EXAMPLE / "serving_server.py"), address, grpc, rest)
    scripts.agents = scripts.start("agents", str(EXAMPLE / "serving_agent.py"), address, str(scripts.ports["agents"]))
    with answering(scripts):
        client = scripts.start("client", str(EXAMPLE / "serving_client.py"), grpc, rest)
        assert client.wait(60) == 0, scripts.said("client")
        assert scripts.said("client") == "gRPC: (128, 16) [-48.]\nREST: (128, 16) [-48.]\n"
        end(scripts, "agent", signal.SIGKILL)


def test_the_example_holds_what_its_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    export = importlib.import_module("export_model")
    monkeypatch.setattr(export, "HERE", tmp_path)
    for rank in range(2):
        export.write_rank(rank)
        file = f"model/device{rank}/matmul.mindir"
        assert (tmp_path / file).read_bytes() == (EXAMPLE / file).read_bytes()
    sys.modules.pop("export_model")


TOKEN = "a token that nobody guesses"


@contextmanager
def commands(
    folder: Path, *options: str, served: Sequence[str] = (), environment: Mapping[str, str] = {}
) -> Iterator[tuple[str, Served]]:
    """`inflight serve` for the servable of `write_servable`, and `inflight agents`. Args: served: options of the server
    alone."""
    address = f"127.0.0.1:{free_port()}"
    write_servable(folder)
    files = [str(folder / "model" / f"device{rank}" / "add.mindir") for rank in range(2)]
    ask = ["-m", "inflight.cli", "agents", *files, "--agents-address", address, "--agent-start-port", str(free_port())]
    table = str(folder / "rank_table.json")
    serving = [str(folder / "add"), "--rank-table", table, "--agents-address", address, *options, *served]
    with (
        process(folder, *ask, *options, environment=environment) as agents,
        serve(folder, *serving, environment=environment) as server,
    ):
        yield server.http, agents


def add(http: str) -> Any:
    body = {"instances": [{"x1": [[1.0, 2.0], [3.0, 4.0]], "x2": [[1.0, 1.0], [1.0, 1.0]]}]}
    return json.loads(request(http, "POST", "/model/add:predict", json.dumps(body).encode())[1])


def test_commands_with_a_token_serve_and_their_agents_come_back(tmp_path: Path) -> None:
    with commands(tmp_path, environment={"INFLIGHT_AGENTS_TOKEN": TOKEN}) as (http, agents):
        assert add(http) == {"instances": [{"y": [[2.0, 3.0], [4.0, 5.0]]}]}
        rank = psutil.Process(agents.pid).children()[0].pid
        os.kill(rank, signal.SIGKILL)
        eventually(lambda: not alive(rank))
        assert add(http) == {"instances": [{"y": [[2.0, 3.0], [4.0, 5.0]]}]}
        assert TOKEN not in " ".join(
            word for child in psutil.Process(agents.pid).children() for word in child.cmdline()
        )


SUM = {"instances": [{"y": [[2.0, 3.0], [4.0, 5.0]]}]}


PRODUCT = {"instances": [{"y": [[1.0, 2.0], [3.0, 4.0]]}]}


def change(http: str, verb: str) -> tuple[int, str]:
    status, data = request(http, "POST", f"/v2/repository/models/add/{verb}", b"{}")
    return status, data.decode()


def write_product(folder: Path, ranks: Sequence[int] = (0, 1)) -> None:
    """Another version of the ranks' files: they multiply."""
    for rank in ranks:
        product = (MINDIR / "add.mindir").read_bytes().replace(b"REF::Add", b"REF::Mul").replace(b"Add", b"Mul")
        (folder / "model" / f"device{rank}" / "add.mindir").write_bytes(product)


@pytest.mark.parametrize("listed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_second_group_takes_over_without_a_gap(tmp_path: Path, listed: bool) -> None:
    """`inflight agents` starts agents for it beside those that serve, from the files as they are. Where these cannot be
    loaded the first group serves on. No request fails, and each has the answer of one of the two. Unloaded and loaded
    again it has agents, too."""
    options = ["--admin", *(["--repository", str(tmp_path)] if listed else [])]
    with commands(tmp_path, served=options) as (http, agents):
        assert add(http) == SUM
        answers: list[Any] = []
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                answers.append(add(http))

        asking = [Background(ask) for _ in range(2)]
        broken = tmp_path / "model" / "device1" / "add.mindir"
        broken.write_bytes(b"no model")
        status, text = change(http, "load")
        assert (status, "Failed to starting all agents" in text) == (503, True), text
        assert add(http) == SUM
        write_product(tmp_path)
        assert change(http, "load")[0] == 200
        assert add(http) == PRODUCT
        over.set()
        for one in asking:
            one.result()
        assert all(each in (SUM, PRODUCT) for each in answers), answers
        turn = answers.index(PRODUCT)
        assert SUM in answers[:turn]
        assert SUM not in answers[turn + 2 :]
        eventually(lambda: len(psutil.Process(agents.pid).children()) == 2, 30, "the first group's agents have ended")
        assert change(http, "unload")[0] == 200
        assert change(http, "load")[0] == 200
        assert add(http) == PRODUCT


STAGES = """
from inflight.servable import add_stage, register_method
from mindspore_serving.server import distributed

model = distributed.declare_servable(rank_size=8, stage_size=2, with_batch_dim=False, enable_pipeline_infer={piped})

@register_method(output_names=["y"])
def predict(x1, x2):
    return add_stage(model, x1, x2, outputs_count=1)
"""


@pytest.mark.parametrize("piped", [True, False])
def test_a_pipeline_has_as_many_batches_in_flight_as_stages(tmp_path: Path, piped: bool) -> None:
    """The second stage holds its first batch back: the first stage gets another one meanwhile, or does not."""
    write_servable(tmp_path)
    (tmp_path / "add" / "servable_config.py").write_text(STAGES.format(piped=piped))
    devices = [{"device_id": str(rank), "rank_id": str(rank)} for rank in range(8)]
    (tmp_path / "rank_table.json").write_text(
        json.dumps({"server_list": [{"server_id": "127.0.0.1", "device": devices}]})
    )
    address = f"127.0.0.1:{free_port()}"
    going = threading.Event()
    ranks: list[FakeRank] = []

    def answer(message: Predict, inputs: list[Any]) -> str:
        assert going.wait(8)
        return ""

    def join() -> None:
        ranks.extend(FakeRank(address, rank, **({"answer": answer} if rank >= 4 else {})) for rank in range(8))
        for one in ranks:
            one.welcome()

    joining = threading.Thread(target=lambda: (eventually(lambda: listens(address), 60), join()))
    joining.start()
    config = ServableConfig(tmp_path, "add", ranks=RanksConfig(tmp_path / "rank_table.json", address))
    with running_here(config) as server:
        joining.join(30)
        asking = [Background(lambda: add(server.http))]
        eventually(lambda: ranks[0].batches)  # the second request comes while the first one runs
        asking.append(Background(lambda: add(server.http)))
        if piped:
            eventually(lambda: len(ranks[0].batches) == 2)
        else:
            eventually(lambda: ranks[4].batches)
            time.sleep(0.3)  # in which the second batch would have come
            assert len(ranks[0].batches) == 1
        assert len(ranks[7].batches) == 1, "the last rank has not answered the first batch"
        going.set()
        for one in asking:
            assert one.result() == {"instances": [{"y": [[72.0, 73.0], [74.0, 75.0]]}]}
    assert [len(one.batches) for one in ranks] == [2] * 8


def listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.slow
def test_a_group_comes_back_and_no_request_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of MindSpore Serving's scripts: agents that are started again, a server that replays."""
    monkeypatch.chdir(tmp_path)
    write_servable(tmp_path)
    address = f"127.0.0.1:{free_port()}"
    files = tuple((str(tmp_path / "model" / f"device{rank}" / "add.mindir"),) for rank in range(2))
    launcher = Launcher(AgentsConfig(address, files, start_port=free_port(), restart=True))
    starting = threading.Thread(target=launcher.start)
    starting.start()
    server = Server()
    try:
        ranks = RanksConfig(tmp_path / "rank_table.json", address)
        server.start_servables([ServableConfig(tmp_path, "add", ranks=ranks)])
        grpc = server.start_grpc(ListenConfig("127.0.0.1:0"))
        starting.join(30)
        answers: list[Any] = []
        stopping = threading.Event()

        def ask() -> None:
            with Client(grpc, "add", "predict", timeout=120) as client:
                while not stopping.is_set():
                    answers.append(client.infer(INSTANCES))

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for thread in asking:
            thread.start()
        for _ in range(2):
            before = len(answers)
            eventually(lambda before=before: len(answers) > before + 4, 60)  # type: ignore[misc]
            os.kill(launcher.pids[0], signal.SIGKILL)
        before = len(answers)
        eventually(lambda: len(answers) > before + 4, 60)
        stopping.set()
        for thread in asking:
            thread.join(120)
        for reply in answers:
            assert [item["y"].tolist() for item in reply] == [[[i + 1.0] * 2] * 2 for i in range(3)]
    finally:
        launcher.stop()
        server.stop()
        assert launcher.ended.wait(30)
