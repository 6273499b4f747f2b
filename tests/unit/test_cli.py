"""The command line: help, errors, where options come from, what they become."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inflight.cli import main
from inflight.commands import UsageError, agents, call, resolve, serve
from inflight.commands.options import Option
from inflight.config import DEFAULT_GRPC, DEFAULT_HTTP, AgentsConfig, RanksConfig, ServableConfig, TlsConfig


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("INFLIGHT_"):
            monkeypatch.delenv(name)


def inflight(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inflight.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def values(given: dict[str, Any], env: dict[str, str] | None = None) -> dict[str, Any]:
    return resolve(serve.COMMAND, given, env or {})


def servable(directory: Path, name: str) -> Path:
    (directory / name).mkdir(parents=True)
    (directory / name / "servable_config.py").touch()
    return directory / name


# Help and errors


def test_help_shows_the_commands_and_not_the_worker() -> None:
    result = inflight("--help")
    assert result.returncode == 0
    assert all(word in result.stdout for word in ("serve", "client", "bench", "inflight serve model.onnx"))
    assert "worker" not in result.stdout


@pytest.mark.parametrize("name", ["serve", "client", "bench"])
def test_help_of_a_command_shows_every_option_its_variable_and_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    command = {"serve": serve.COMMAND, "client": call.COMMAND}.get(name)
    for option in command.options if command else ():
        assert f"[{option.variable}]" in text
        assert option.positional or f"--{option.name}" in text
    assert "examples:" in text
    assert "[INFLIGHT_CONFIG]" in text


def test_help_loads_neither_the_web_stack_nor_grpc() -> None:
    code = (
        "import sys, inflight.cli; inflight.cli.build_parser().format_help();"
        "print({'uvicorn', 'grpc', 'inflight.wire._http2', 'onnx'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "set()", result.stderr


def test_version() -> None:
    assert inflight("--version").stdout.startswith("inflight ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["srve"], "invalid choice: 'srve'"),
        (["serve"], "PATH is missing"),
        (["serve", "--htpp", "x", "y"], "did you mean --htpp -> --http?"),
        (["serve", "/no/such"], "'/no/such' does not exist; give a model file"),
        (["serve", "x", "--http", "off", "--grpc", "off"], "--http and --grpc are both off"),
        (["serve", "x", "--workers", "65"], "--workers: 65 is out of range; write 0 to 64"),
        (["serve", "x", "--workers", "two"], "--workers: 'two' is no whole number"),
        (["serve", "x", "--device-ids", "0,0"], "--device-ids: '0,0' is no list of device ids; write distinct"),
        (["serve", "x", "--device-type", "tpu"], "--device-type: 'tpu' is not known; write one of: cpu, gpu, ascend"),
        (
            ["serve", "x", "--grpc-engine", "c"],
            "--grpc-engine: 'c' is not known; write one of: auto, nghttp2, grpcio",
        ),
        (["serve", "x", "--stop-timeout", "-1"], "--stop-timeout: '-1' is no number of seconds"),
        (["serve", "x", "--tls-cert", "/no/such"], "--tls-cert: the file '/no/such' does not exist"),
        (["serve", "x", "--tls-verify-client"], "--tls-verify-client needs --tls-ca"),
        (["serve", "x", "--config", "/no/such"], "cannot read the configuration file /no/such"),
        (["client"], "ADDRESS is missing"),
        (["client", "a:1", "b"], "METHOD is missing"),
        (["client", "a:1", "b", "c"], "no input is given; write for example --input"),
        (["client", "a:1", "b", "c", "--input", "x"], "--input: 'x' has no name; write name=value"),
        (["client", "a:1", "b", "c", "--input", "x=[1"], "--input: x: '[1' is not JSON"),
        (["client", "a:1", "b", "c", "--input", "x:int=1"], "'int' is no data type; write one of: bool"),
        (["client", "a:1", "b", "c", "--input", "x=@/no/such.npy"], "x: cannot read '/no/such.npy'"),
        (["client", "ftp://a", "b", "c", "--input", "x=1"], "'ftp://a' cannot be reached; write http://host:port"),
        (["bench", "a:1", "b", "c", "d"], "unrecognized arguments: d"),
        (["bench", "http://127.0.0.1:9", "b", "c", "--input", "x=1"], "is the server running?"),
    ],
)
def test_wrong_input_is_one_line_with_the_fix(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = main(arguments)
    except SystemExit as left:
        code = left.code
    written = capsys.readouterr()
    assert code == 2
    assert text in written.err
    assert written.err.count("\n") == 1
    assert written.out == ""


# One option, three places


def test_defaults() -> None:
    found = values({})
    assert (found["http"], found["grpc"]) == (DEFAULT_HTTP, DEFAULT_GRPC)
    assert (found["device_ids"], found["max_message_mb"], found["status_codes"]) == ((0,), 100, False)


def test_a_flag_goes_before_a_variable_and_a_variable_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.json"
    file.write_text(json.dumps({"workers": 1, "version": 1, "max-enqueued": 1, "device_ids": [0, 2]}))
    found = values({"workers": "3", "config": str(file)}, {"INFLIGHT_WORKERS": "2", "INFLIGHT_VERSION": "2"})
    assert (found["workers"], found["version"], found["max_enqueued"]) == (3, 2, 1)
    assert found["device_ids"] == (0, 2)


def test_switches_and_lists_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "server.json"
    file.write_text('{"paths": ["a", "b"], "status_codes": true, "tls_verify_client": null}')
    found = values({}, {"INFLIGHT_CONFIG": str(file)})
    assert (found["paths"], found["status_codes"], found["tls_verify_client"]) == (["a", "b"], True, False)
    found = values({"status_codes": "false"}, {"INFLIGHT_PATHS": os.pathsep.join("xy"), "INFLIGHT_CONFIG": str(file)})
    assert (found["paths"], found["status_codes"]) == (["x", "y"], False)


def test_toml(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('paths = "models"\nhttp = "0.0.0.0:80"\nstop_timeout = 2.5\n')
    found = values({"config": str(file)})
    assert (found["paths"], found["http"], found["stop_timeout"]) == (["models"], "0.0.0.0:80", 2.5)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"wrokers": 1}', "'wrokers' in .* is no option; did you mean 'workers'?"),
        ('{"qqq": 1}', "'qqq' in .* is no option; use one of: paths"),
        ('{"workers": 1.5}', "'workers' in .*: '1.5' is no whole number"),
        ('{"status_codes": 7}', "'status_codes' in .*: '7' is neither true nor false"),
        ("[1]", "should hold one object"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_wrong_file_says_where(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "server.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=text):
        values({"config": str(file)})


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(UsageError, match="INFLIGHT_WORKERS: 'x' is no whole number"):
        values({}, {"INFLIGHT_WORKERS": "x"})


def test_every_option_has_a_name_of_its_own() -> None:
    for command in (serve.COMMAND, call.COMMAND):
        names = [option.key for option in command.options]
        assert len(set(names)) == len(names)
        assert all(isinstance(option, Option) for option in command.options)


# What serve makes of it


def plan(*paths: Path | str, **given: str) -> serve.Plan:
    return serve.build_plan(values({"paths": [str(path) for path in paths], **given}))


def test_a_model_file(tmp_path: Path) -> None:
    model = tmp_path / "net.v2.onnx"
    model.touch()
    (config,) = plan(model, max_batch_size="8", version="3").servables
    assert config == ServableConfig(tmp_path, "net.v2", version=3, model_file=model, max_batch_size=8)
    assert plan(model, name="other").servables[0].name == "other"
    (alone,) = plan(tmp_path).servables  # the only one of its directory
    assert alone == ServableConfig(tmp_path, tmp_path.name, model_file=model)
    (tmp_path / "second.mindir").touch()
    with pytest.raises(UsageError, match=r"give a model file itself \(here are net.v2.onnx, second.mindir\)"):
        plan(tmp_path)


def test_a_servable_and_a_directory_of_servables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = servable(tmp_path, "a"), servable(tmp_path, "b")
    (tmp_path / "no_servable").mkdir()
    expected = ServableConfig(tmp_path, "a")
    assert plan(first).servables == plan(first / "servable_config.py").servables == (expected,)
    assert [config.name for config in plan(tmp_path).servables] == ["a", "b"]
    assert [config.name for config in plan(second, first).servables] == ["b", "a"]
    monkeypatch.chdir(first)
    assert plan(".").servables == (expected,)


def test_paths_that_cannot_be_served(tmp_path: Path) -> None:
    first, same = servable(tmp_path / "x", "a"), servable(tmp_path / "y", "a")
    script = tmp_path / "script.py"
    script.touch()
    for paths, text in (
        ((first, same), "two of the paths are named 'a'"),
        ((tmp_path,), "nor a directory in it holds a servable_config.py"),
        ((script,), "is no model file"),
    ):
        with pytest.raises(UsageError, match=text):
            plan(*paths)
    with pytest.raises(UsageError, match="--name is for one model file"):
        plan(first, name="b")


def test_execution_timeouts_for_all_and_for_one(tmp_path: Path) -> None:
    servable(tmp_path, "a")
    servable(tmp_path, "b")
    assert plan(tmp_path).server.execution_timeout == 300
    made = plan(tmp_path, execution_timeout=["20", "b=0", "a=2.5"])
    assert made.server.execution_timeout == 20
    assert [config.execution_timeout for config in made.servables] == [2.5, 0]
    with pytest.raises(UsageError, match="--execution-timeout c=: no servable has that name"):
        plan(tmp_path, execution_timeout=["c=3"])


def test_server_and_listeners(tmp_path: Path) -> None:
    where = servable(tmp_path, "a")
    files = {}
    for name in ("tls_cert", "tls_key", "tls_ca", "dec_key_file"):
        (tmp_path / name).write_bytes(b"k" * 16 + b"\n")
        files[name] = str(tmp_path / name)
    made = plan(
        where,
        http="0.0.0.0:1",
        grpc="off",
        max_message_mb="7",
        max_enqueued="5",
        tls_verify_client="true",
        status_codes="true",
        stop_timeout="3",
        log_dir="logs",
        device_ids="",
        dec_mode="aes-cbc",
        grpc_engine="grpcio",
        **files,
    )
    assert made.grpc is None
    assert made.http is not None
    assert (made.http.address, made.http.max_message_mb) == ("0.0.0.0:1", 7)
    assert made.http.tls == TlsConfig(files["tls_cert"], files["tls_key"], files["tls_ca"], True)
    assert (made.server.max_enqueued_requests, made.server.stop_timeout) == (5, 3.0)
    assert (made.server.grpc_engine, plan(where).server.grpc_engine) == ("grpcio", "auto")
    assert (made.server.log_dir, made.server.rest.status_codes) == (Path("logs"), True)
    (config,) = made.servables
    assert (config.device_ids, config.num_parallel_workers) == ((), 1)
    assert (config.dec_key, config.dec_mode) == (b"k" * 16, "AES-CBC")


def test_tls_options_belong_together(tmp_path: Path) -> None:
    where = servable(tmp_path, "a")
    file = str(where / "servable_config.py")
    with pytest.raises(UsageError, match="--tls-cert and --tls-key belong together"):
        plan(where, tls_cert=file)
    with pytest.raises(UsageError, match="need --tls-cert and --tls-key"):
        plan(where, tls_ca=file)


IMPORTING = """
import os, signal, sys
import inflight.cli

class Signals:
    def find_spec(self, name, path=None, target=None):
        if name == "inflight.commands":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Signals())
sys.exit(inflight.cli.{call})
"""


@pytest.mark.parametrize("call", ["main(['serve', 'model.onnx'])", "launcher()"])
def test_a_signal_amid_the_imports_ends_a_server_cleanly(call: str) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING.format(call=call)], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_a_cluster_is_for(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    (table := tmp_path / "table.json").touch()
    alone = servable(tmp_path, "a")
    with pytest.raises(UsageError, match="--cluster ray:auto places language models and workers of servables, and non"):
        plan(alone, cluster="ray", rank_table=str(table))
    for path in (tmp_path / "net.onnx", alone):
        found = plan(path, cluster="ray", cluster_resources="cpu=2")
        assert found.server.cluster.cluster == "ray:auto"
        assert [each.resources for each in found.servables] == [(("CPU", 2.0),)]


def test_rank_tables_are_for_servables_whose_agents_show_a_token_or_are_near(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    (table := tmp_path / "table.json").touch()
    where, rank_table = servable(tmp_path, "a"), str(table)
    (config,) = plan(where, rank_table=rank_table, agents_wait="5").servables
    assert config.ranks == RanksConfig(table, "127.0.0.1:6200", 5.0)
    with pytest.raises(UsageError, match=r"--rank-table is for a servable with servable_config\.py"):
        plan(tmp_path / "net.onnx", rank_table=rank_table)
    for address in ("0.0.0.0:6200", "10.0.0.1:6200", "[::]:6200"):
        with pytest.raises(UsageError, match=f"whoever reaches {re.escape(address)} could take part"):
            plan(where, rank_table=rank_table, agents_address=address)
        (config,) = plan(where, rank_table=rank_table, agents_address=address, agents_token="t" * 16).servables
        assert config.ranks == RanksConfig(table, address, token="t" * 16)
    with pytest.raises(UsageError, match="the token has 15 characters and needs 16; make one with: openssl") as told:
        plan(where, rank_table=rank_table, agents_token="secretsecretsec")
    assert "secretsec" not in str(told.value)
    servable(tmp_path, "b")
    with pytest.raises(UsageError, match="several servables are given a rank table and one address"):
        plan(tmp_path, rank_table=rank_table)


def test_what_is_told_to_agents(tmp_path: Path) -> None:
    def config(*files: str, **given: Any) -> AgentsConfig:
        return agents.config_of(resolve(agents.COMMAND, {"model_files": list(files), **given}, {}))

    told = config("/a,/b", "/c,/d", agents_address="10.0.0.1:1", agents_token="t" * 16, once="true")
    assert told == AgentsConfig("10.0.0.1:1", (("/a", "/b"), ("/c", "/d")), restart=False, token="t" * 16)
    for given, text in (
        ({"agents_address": "10.0.0.1:6200"}, "INFLIGHT_AGENTS_TOKEN"),
        ({"agent_ip": "10.0.0.1"}, "--agent-ip and --rank-start belong together"),
        ({"group_config_file": ["a,,b"]}, "names no files"),
    ):
        with pytest.raises(UsageError, match=text):
            config("/a", **given)
    with pytest.raises(UsageError, match="FILES is missing"):
        config()


def test_what_a_start_has_made_is_left_alone_by_the_collector() -> None:
    code = (
        "import gc, inflight.server\n"
        "from inflight.startup.starting import settle\n"
        "settle()\n"
        "print(gc.get_freeze_count() > 10_000, len(gc.get_objects()) < 1_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr
