"""Configuration files: their kinds, several models in one, what is in force."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from inflight.cli import main
from inflight.commands import UsageError, call, resolve, serve
from inflight.config import AdapterConfig, GeneratorConfig, ServableConfig
from inflight.hub import HubModel
from tests.lm import POCKET

YAML = """\
http: off
quantize: int8        # of every language model that says nothing else
max_batch_size: 16
models:
  - path: {pocket}
    name: tales
    quantize: none
    max_total_tokens: 128
    lora_adapters: {{mine: org/adapter@v1, "yours": org/other}}
  - path: {pocket}
  - path: {folder}/net.onnx
    device-ids: [0, 1]
    max_batch_size: 4
    execution_timeout: 2.5
  - {{path: {folder}/calc, workers: 2}}
"""

TOML = """\
http = "off"
quantize = "int8"
max_batch_size = 16

[[models]]
path = "{pocket}"
name = "tales"
quantize = "none"
max_total_tokens = 128
lora_adapters = {{mine = "org/adapter@v1", yours = "org/other"}}

[[models]]
path = "{pocket}"

[[models]]
path = "{folder}/net.onnx"
device_ids = [0, 1]
max_batch_size = 4
execution_timeout = 2.5

[[models]]
path = "{folder}/calc"
workers = 2
"""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFLIGHT_CONFIG", raising=False)


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def values(file: str, env: dict[str, str] | None = None, **given: Any) -> dict[str, Any]:
    return resolve(serve.COMMAND, {"config": file, **given}, env or {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.onnx").touch()
    (tmp_path / "calc").mkdir()
    (tmp_path / "calc" / "servable_config.py").touch()
    return tmp_path


@pytest.mark.parametrize("name", ["inflight.yaml", "inflight.yml", "inflight.toml", "inflight.json"])
def test_several_models_each_with_its_own_options(name: str, folder: Path) -> None:
    text = (TOML if name.endswith("toml") else YAML).format(pocket=POCKET, folder=folder)
    if name.endswith("json"):
        table = values(written(folder, "first.yaml", text))
        assert table["http"] == "off"
        models = [
            {"path": str(POCKET), "name": "tales", "quantize": "none", "max_total_tokens": 128},
            {"path": str(POCKET)},
            {"path": f"{folder}/net.onnx", "device_ids": [0, 1], "max_batch_size": 4, "execution_timeout": 2.5},
            {"path": f"{folder}/calc", "workers": 2},
        ]
        models[0]["lora_adapters"] = {"mine": "org/adapter@v1", "yours": "org/other"}
        text = json.dumps({"http": "off", "quantize": "int8", "max_batch_size": 16, "models": models})
    plan = serve.build_plan(values(written(folder, name, text)))
    assert plan.http is None
    assert plan.servables == (
        ServableConfig(folder, "net", (0, 1), model_file=folder / "net.onnx", max_batch_size=4, execution_timeout=2.5),
        ServableConfig(folder, "calc", num_parallel_workers=2, max_batch_size=16),
    )
    adapters = (
        AdapterConfig("mine", Path("org/adapter"), HubModel("org/adapter", "", "v1")),
        AdapterConfig("yours", Path("org/other"), HubModel("org/other")),
    )
    known = {"model_id": str(POCKET), "device_ids": (0,), "max_batch_size": 16}
    assert plan.generators == (
        GeneratorConfig.of(POCKET, "tales", max_total_tokens=128, adapters=adapters, **known),
        GeneratorConfig.of(POCKET, "pocket", quantize="int8", **known),
    )


def test_a_flag_and_a_variable_go_before_what_a_model_says(folder: Path) -> None:
    file = written(folder, "a.yaml", f"models: [{{path: {POCKET}, quantize: int4, threads: 3, block_size: 8}}]")
    (config,) = serve.build_plan(values(file, {"INFLIGHT_THREADS": "2"}, quantize="none")).generators
    assert (config.model.quantize, config.model.threads, config.model.block_size) == ("none", 2, 8)


def test_paths_and_models_together(folder: Path) -> None:
    file = written(folder, "a.yaml", f"models: [{{path: {POCKET}, name: one}}]\nworkers: 1")
    plan = serve.build_plan(values(file, paths=[str(folder / "net.onnx")]))
    assert ([each.name for each in plan.servables], [each.name for each in plan.generators]) == (["net"], ["one"])
    with pytest.raises(UsageError, match="--name is for one model"):
        serve.build_plan(values(file, paths=[str(folder / "net.onnx")], name="x"))
    twice = written(folder, "b.yaml", f"models: [{{path: {POCKET}}}, {{path: {POCKET}}}]")
    with pytest.raises(UsageError, match="two of the paths are named 'pocket'"):
        serve.build_plan(values(twice))


def test_yaml_says_texts(folder: Path) -> None:
    file = written(folder, "a.yaml", "http: off\napi_key: 0123\nlog_dir: 2026-01-01\nlog_level:\nstatus_codes: true\n")
    found = values(file)
    assert (found["http"], found["api_key"], found["log_level"]) == ("off", "0123", None)
    assert (found["log_dir"], found["status_codes"]) == (Path("2026-01-01"), True)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.yaml", "wrokers: 1", r"'wrokers' in \S+a.yaml is no option; did you mean 'workers'\?"),
        ("a.yaml", "model: []", r"'model' in \S+a.yaml is no option; did you mean 'models'\?"),
        ("a.yaml", "models: m.onnx", "'models' in .* should be a list of objects, each with its path"),
        ("a.yaml", "models: [m.onnx]", "'models' in .* should be a list of objects, each with its path"),
        ("a.yaml", "models: [{path: a}, {name: b}]", r"models\[1\] in \S+a.yaml has no 'path'; write path:"),
        (
            "a.yaml",
            "models: [{path: a, dtpye: x}]",
            r"'dtpye' in models\[0\] in \S+ is no option; did you mean 'dtype'",
        ),
        ("a.yaml", "models: [{path: a, http: x}]", r"'http' in models\[0\] .* whole server; write it beside 'models'"),
        ("a.yaml", "models: [{path: a, dtype: x}]", r"'dtype' in models\[0\] in .*: 'x' is not known; write one of: a"),
        ("a.yaml", "workers: 1\nworkers: 2", "a.yaml is not valid YAML: the key 'workers' is written twice"),
        ("a.yaml", "models: [", "a.yaml is not valid YAML: .*line 1"),
        ("a.yaml", "", "should hold one object"),
        ("a.toml", "workers = ", "a.toml is not valid TOML"),
        ("a.json", '{"workers": 1, "workers": 2}', "the key 'workers' is written twice"),
        ("a.conf", "workers: 2", r"not valid JSON \(name other kinds \*.yaml or \*.toml\)"),
    ],
)
def test_an_error_names_file_and_key_and_says_what_to_write(folder: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        values(written(folder, name, text))


def test_models_are_of_serve_only(folder: Path) -> None:
    file = written(folder, "a.yaml", "models: []")
    with pytest.raises(UsageError, match=r"'models' in .* is no option"):
        resolve(call.COMMAND, {"config": file}, {})


def test_what_is_in_force_reads_back_as_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(folder, "a.yaml", YAML.format(pocket=POCKET, folder=folder))
    given = [
        "serve",
        str(folder / "calc"),
        "--config",
        file,
        "--kv-cache-memory",
        "4g",
        "--name",
        "off",
        "--no-status-codes",
    ]
    given += ["--execution-timeout", "3", "--execution-timeout", "calc=0", "--device-ids", "", "--api-key", "0123"]
    assert main([*given, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "kv_cache_memory: 4g\n" in printed
    assert "max_batch_size: 16\n" in printed
    assert "0123" not in printed
    again = written(folder, "again.yaml", printed)
    flags = {"paths": [str(folder / "calc")], "kv_cache_memory": "4g", "name": "off", "status_codes": "false"}
    flags.update(execution_timeout=["3", "calc=0"], device_ids="")
    assert values(again) == values(file, **flags)
    assert main(["serve", "--config", again, "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_a_wrong_option_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--workers", "many", "--print-config"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, "--workers: 'many' is no whole number" in captured.err) == ("", True)


def test_the_file_of_the_documentation(folder: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    first, second, third = values(
        written(folder, "docs.yaml", block.replace("{pirate: adapters/pirate}", "org/pirate"))
    )["models"]
    assert (first["path"], first["quantize"], first["max_total_tokens"]) == ("Qwen/Qwen3-0.6B", "int8", 4096)
    assert (second["name"], second["threads"], second["max_concurrent_requests"]) == ("storyteller", 1, 64)
    assert (third["device_ids"], third["execution_timeout"]) == ((0, 1), [("", 5.0)])
