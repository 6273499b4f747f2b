"""The process-wide functions over a stand-in for the server: what they pass on, print, refuse and tear down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from inflight.config import ListenConfig, ServableConfig, ServerConfig
from inflight.dropin import process
from inflight.errors import NotFound, StartError
from mindspore_serving import server
from mindspore_serving.server.master import at_stop_list, context, stop_on_except


class FakeServer:
    """The methods of `inflight.server.Server`, recording."""

    made: list[FakeServer] = []

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.calls: list[str] = []
        self.listeners: list[ListenConfig] = []
        self.servables: list[ServableConfig] = []
        self.failure: Exception | None = None
        self.callback: Callable[[], object] = lambda: None
        self.max_enqueued = config.max_enqueued_requests
        FakeServer.made.append(self)

    def start_servables(self, configs: Sequence[ServableConfig]) -> None:
        self.calls.append("servables")
        if self.failure:
            raise self.failure
        self.servables.extend(configs)

    def start_http(self, listen: ListenConfig) -> str:
        return self._listen("http", listen)

    def start_grpc(self, listen: ListenConfig) -> str:
        return self._listen("grpc", listen)

    def _listen(self, kind: str, listen: ListenConfig) -> str:
        self.calls.append(kind)
        if self.failure:
            raise self.failure
        self.listeners.append(listen)
        return listen.address

    def set_max_enqueued(self, n: int) -> None:
        self.max_enqueued = n

    def stop(self) -> None:
        self.calls.append("stop")
        self.callback()

    def on_stopped(self, callback: Callable[[], object]) -> None:
        self.callback = callback


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeServer]]:
    module = ModuleType("inflight.server")
    module.Server = FakeServer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "inflight.server", module)
    monkeypatch.setattr(process, "_max_enqueued", 10_000)
    FakeServer.made = []
    yield FakeServer
    server.stop()
    at_stop_list.clear()


@pytest.fixture
def config(tmp_path: Path) -> server.ServableStartConfig:
    (tmp_path / "add" / "2").mkdir(parents=True)
    (tmp_path / "add" / "servable_config.py").touch()
    return server.ServableStartConfig(str(tmp_path), "add", device_ids=(1, 0))


def test_a_whole_start_up(
    config: server.ServableStartConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.start_servables(config)
    server.start_grpc_server("127.0.0.1:5500")
    tls = server.SSLConfig("cert", "key", "ca", verify_client=True)
    server.start_restful_server("127.0.0.1:1500", max_msg_mb_size=512, ssl_config=tls)

    (made,) = FakeServer.made
    assert made.calls == ["servables", "grpc", "http"]
    assert made.servables == [ServableConfig(tmp_path, "add", (0, 1), version=2, num_parallel_workers=0)]
    assert made.config.restart.only_proven
    assert made.config.exit_when_lost
    assert made.config.log_dir == Path("serving_logs")
    assert (made.listeners[0].max_message_mb, made.listeners[0].tls) == (100, None)
    rest = made.listeners[1]
    assert rest.tls is not None
    assert (rest.max_message_mb, rest.tls.custom_ca, rest.tls.verify_client) == (512, "ca", True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Serving: Master server start success, listening on ")
    assert lines[1:] == [
        "Serving: Serving gRPC server start success, listening on 127.0.0.1:5500",
        "Serving: Serving RESTful server start success, listening on 127.0.0.1:1500",
    ]


def test_doors_may_open_first_and_all_belong_to_one_server(config: server.ServableStartConfig) -> None:
    server.start_restful_server("127.0.0.1:1500")
    server.start_grpc_server("unix:socket")
    server.start_servables([config], enable_lite=True)
    (made,) = FakeServer.made
    assert made.calls == ["http", "grpc", "servables"]


def test_ca_is_dropped_without_verify_client() -> None:
    server.start_grpc_server("127.0.0.1:5500", ssl_config=server.SSLConfig("cert", "key", "ca"))
    tls = FakeServer.made[0].listeners[0].tls
    assert tls is not None
    assert tls.custom_ca is None


@pytest.mark.parametrize(
    ("again", "text"),
    [
        (lambda config: server.start_grpc_server("a:1"), "Serving Error: Serving gRPC server is already running"),
        (lambda config: server.start_restful_server("a:1"), "Serving Error: RESTful server is already running"),
        (lambda config: server.start_servables(config), "Serving Error: Master server is already running"),
    ],
)
def test_starting_twice_fails_and_stops_everything(
    again: Callable[[Any], None], text: str, config: server.ServableStartConfig
) -> None:
    for _ in range(2):
        server.start_grpc_server("127.0.0.1:5500")
        server.start_restful_server("127.0.0.1:1500")
        server.start_servables((config,))
        with pytest.raises(RuntimeError, match=text):
            again(config)
        assert FakeServer.made[-1].calls == ["grpc", "http", "servables", "stop"]
    assert len(FakeServer.made) == 2


def test_a_failed_start_stops_the_doors_too(config: server.ServableStartConfig) -> None:
    server.start_grpc_server("127.0.0.1:5500")
    FakeServer.made[0].failure = StartError("Fail to start workers: no model")
    with pytest.raises(RuntimeError, match=r"^Fail to start workers: no model"):
        server.start_servables(config)
    assert FakeServer.made[0].calls == ["grpc", "servables", "stop"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: server.start_grpc_server(5500), "Parameter 'address' should be str, but actually <class 'int'>"),
        (lambda: server.start_restful_server(""), "Parameter 'address' should not be empty str"),
        (lambda: server.start_grpc_server("a:1", 0), "Parameter 'max_msg_mb_size' should be in range [1,512]"),
        (lambda: server.start_grpc_server("a:1", 513), "Parameter 'max_msg_mb_size' should be in range [1,512]"),
        (lambda: server.start_grpc_server("a:1", "1"), "Parameter 'max_msg_mb_size' should be int, but actually "),
        (lambda: server.start_grpc_server("a:1", ssl_config="x"), "The type of ssl_config should be type of SSLConfig"),
        (lambda: server.start_servables("add"), "should be ServableStartConfig, list or tuple of Servable"),
        (lambda: server.start_servables(["add"]), "The item of parameter 'servable_configs' should be Servable"),
        (lambda: server.start_servables([]), "Parameter 'servable_configs' should not be empty"),
    ],
)
def test_wrong_arguments_stop_everything(call: Callable[[], None], text: str) -> None:
    server.start_restful_server("127.0.0.1:1500")
    with pytest.raises(RuntimeError) as caught:
        call()
    assert text in str(caught.value)
    assert FakeServer.made[0].calls == ["http", "stop"]


def test_enable_lite_is_a_bool(config: server.ServableStartConfig) -> None:
    with pytest.raises(RuntimeError, match="Parameter 'enable_lite' should be bool, but actually "):
        server.start_servables(config, enable_lite=1)  # type: ignore[arg-type]


def test_stop_is_idempotent_and_everything_starts_again(config: server.ServableStartConfig) -> None:
    server.stop()
    for _ in range(300):
        server.start_servables(config)
        server.start_grpc_server("127.0.0.1:5500")
        server.stop()
        server.stop()
    assert len(FakeServer.made) == 300
    assert all(made.calls == ["servables", "grpc", "stop"] for made in FakeServer.made)


def test_a_server_that_stopped_by_itself_is_forgotten(config: server.ServableStartConfig) -> None:
    server.start_grpc_server("127.0.0.1:5500")
    FakeServer.made[0].callback()
    server.start_grpc_server("127.0.0.1:5500")
    assert len(FakeServer.made) == 2
    FakeServer.made[0].callback()  # a late call of the old one does not touch the new one
    with pytest.raises(RuntimeError, match="already running"):
        server.start_grpc_server("127.0.0.1:5500")


def test_the_request_limit_before_and_after_the_start() -> None:
    context.set_max_enqueued_requests(7)
    server.start_grpc_server("127.0.0.1:5500")
    assert FakeServer.made[0].config.max_enqueued_requests == 7
    context.set_max_enqueued_requests(9)
    assert FakeServer.made[0].max_enqueued == 9
    with pytest.raises(RuntimeError, match="Parameter 'max_enqueued_requests' should be >= 1"):
        context.set_max_enqueued_requests(0)


def test_callbacks_at_stop() -> None:
    calls: list[str] = []
    at_stop_list.append(lambda: calls.append("once"))
    at_stop_list.append(lambda: calls.append("done") or True)
    at_stop_list.append(lambda: calls.append("again") or False)
    server.stop()
    server.stop()
    assert calls == ["once", "done", "again", "again"]


def test_stop_on_except_passes_results_and_errors_on() -> None:
    @stop_on_except
    def add(x: int) -> int:
        """Adds."""
        if x < 0:
            raise KeyboardInterrupt
        return x + 1

    assert (add(1), add.__name__, add.__doc__) == (2, "add", "Adds.")
    server.start_grpc_server("127.0.0.1:5500")
    with pytest.raises(KeyboardInterrupt):
        add(-1)
    assert FakeServer.made[0].calls == ["grpc", "stop"]


def test_start_master_server(config: server.ServableStartConfig, capsys: pytest.CaptureFixture[str]) -> None:
    server.master.start_master_server("unix:here")
    assert capsys.readouterr().out == "Serving: Master server start success, listening on unix:here\n"
    with pytest.raises(RuntimeError, match="Master server is already running"):
        server.master.start_master_server("unix:here")


@pytest.mark.parametrize("stages", ["pass", "x = add_stage(len_of, x, outputs_count=1)"])
def test_only_model_stage(config: server.ServableStartConfig, stages: str) -> None:
    (Path(config.servable_directory) / "add" / "servable_config.py").write_text(
        f"""
from mindspore_serving.server.register import add_stage, register_method

def len_of(x):
    return len(x)

@register_method(output_names="y")
def same(x):
    {stages}
    return x
"""
    )
    with pytest.raises(NotFound, match="servable is not available"):
        server.master.only_model_stage("add")
    server.start_servables(config)
    assert server.master.only_model_stage("add") is (stages == "pass")
