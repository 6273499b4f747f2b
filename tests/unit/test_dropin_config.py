"""`ServableStartConfig`, `merge_config` and the other arguments, with the texts that scripts match."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inflight.dropin import devices, start_config
from inflight.errors import ConfigError, RegistrationError, StartError
from inflight.servable import Ranks, declare_model, tracing
from mindspore_serving import server
from mindspore_serving.server import distributed
from mindspore_serving.server._servable_local import ServableStartConfig, merge_config
from mindspore_serving.server.common import check_type, get_abs_path

KEY = b"ABC" * 8


@pytest.fixture
def servables(tmp_path: Path) -> Path:
    """Two servables, `add` with the versions 1 and 3, `functions` without any."""
    for name in ("add/1", "add/3", "add/not_a_version", "functions"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("add", "functions"):
        (tmp_path / name / "servable_config.py").touch()
    return tmp_path


def config(directory: Path, name: str = "add", **arguments: Any) -> ServableStartConfig:
    return ServableStartConfig(str(directory), name, **arguments)


def test_defaults_and_properties() -> None:
    plain = ServableStartConfig("/models", "add")
    assert (plain.servable_directory, plain.servable_name) == ("/models", "add")
    assert (plain.device_ids, plain.version_number, plain.device_type) == ((), 0, "none")
    assert (plain.num_parallel_workers, plain.dec_key, plain.dec_mode) == (1, None, "AES-GCM")
    with pytest.raises(AttributeError):
        plain.version_number = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"device_ids": 3}, ((3,), "none", 0)),
        ({"device_ids": [2, 0]}, ((2, 0), "none", 0)),
        ({"device_ids": (0,), "num_parallel_workers": 5}, ((0,), "none", 5)),
        ({"device_type": "Ascend"}, ((), "ascend", 1)),
        ({"device_type": "NONE", "num_parallel_workers": 64}, ((), "none", 64)),
    ],
)
def test_accepted_forms(arguments: dict[str, Any], expected: tuple[Any, ...]) -> None:
    made = ServableStartConfig("/models", "add", **arguments)
    assert (made.device_ids, made.device_type, made.num_parallel_workers) == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"servable_directory": 1}, "Parameter 'servable_directory' should be str, but actually <class 'int'>"),
        ({"servable_directory": ""}, "Parameter 'servable_directory' should not be empty str"),
        ({"servable_name": False}, "Parameter 'servable_name' should be str, but actually "),
        ({"version_number": False}, "Parameter 'version_number' should be int, but actually "),
        ({"version_number": -1}, "Parameter 'version_number' should be >= 0"),
        ({"device_ids": "1"}, "Parameter 'device_ids' should be int or tuple/list of int, but actually"),
        ({"device_ids": -1}, "The item value '-1' in parameter 'device_ids' should be >= 0"),
        ({"device_ids": True}, "The item value 'True' in parameter 'device_ids' should be int, but actually"),
        ({"device_ids": (0, 1, 0)}, "The item value '0' in parameter 'device_ids' should not be repeated"),
        ({"device_type": 123}, "Parameter 'device_type' should be str, but actually"),
        ({"device_type": ""}, "Parameter 'device_type' should not be empty str"),
        ({"device_type": "tpu"}, "Unsupported device type 'tpu', only support 'Ascend', 'GPU', 'CPU' and None"),
        ({"num_parallel_workers": 65}, "Parameter 'num_parallel_workers' should be in range [0,64]"),
        ({"num_parallel_workers": "1"}, "Parameter 'num_parallel_workers' should be int, but actually "),
        ({"dec_key": "x" * 16}, "Parameter 'dec_key' should be bytes, but actually <class 'str'>"),
        ({"dec_key": b""}, "Parameter 'dec_key' should not be empty bytes"),
        ({"dec_key": b"x" * 15}, "Parameter 'dec_key' length 15 expected to be 16, 24 or 32"),
        ({"dec_mode": "AES"}, "Parameter 'dec_mode' expected to be 'AES-GCM' or 'AES-CBC'"),
        ({"dec_mode": None}, "Parameter 'dec_mode' should be str, but actually"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        ServableStartConfig(**{"servable_directory": "/models", "servable_name": "add", **arguments})
    assert text in str(caught.value)


def test_a_relative_directory_lies_beside_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    script = tmp_path / "real" / "start.py"
    script.touch()
    (tmp_path / "link.py").symlink_to(script)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "link.py")])
    monkeypatch.chdir("/")
    assert ServableStartConfig("models", "add").servable_directory == str(tmp_path / "real" / "models")
    assert ServableStartConfig("../models", "add").servable_directory == str(tmp_path / "models")
    assert ServableStartConfig("/models", "add").servable_directory == "/models"
    assert get_abs_path(".") == os.path.realpath(tmp_path / "real")


def test_missing_folder_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Check servable config failed, directory '.*/add' not exist"):
        merge_config([config(tmp_path)])
    (tmp_path / "add").mkdir()
    with pytest.raises(RuntimeError, match=r"Check servable config failed, file '.*/servable_config.py' not exist"):
        merge_config([config(tmp_path)])


def test_version_zero_is_the_newest_on_disk(servables: Path) -> None:
    first, second = merge_config((config(servables, device_ids=1), config(servables, "functions")))
    assert (first.version_number, first.device_ids) == (3, (1,))
    assert second.version_number == 0


def test_configs_of_one_version_are_merged(servables: Path) -> None:
    merged = merge_config(
        (
            config(servables, device_ids=(5, 1), device_type="CPU", num_parallel_workers=2),
            config(servables, "functions"),
            config(servables, device_ids=(3, 1), version_number=3, num_parallel_workers=7, device_type="CPU"),
        )
    )
    assert [item.servable_name for item in merged] == ["add", "functions"]
    assert merged[0].device_ids == (1, 3, 5)
    assert (merged[0].version_number, merged[0].num_parallel_workers, merged[0].device_type) == (3, 7, "cpu")


def test_versions_stay_apart_with_the_first_configs_device_type(servables: Path) -> None:
    newest, oldest = merge_config(
        (
            config(servables, device_ids=1, device_type="cpu", dec_key=KEY),
            config(servables, device_ids=1, version_number=1, dec_key=KEY[::-1], dec_mode="AES-CBC"),
        )
    )
    assert (newest.version_number, oldest.version_number) == (3, 1)
    assert (newest.dec_key, oldest.dec_key, oldest.dec_mode) == (KEY, KEY[::-1], "AES-CBC")
    assert oldest.device_type == "cpu"


def test_contradictions_are_refused(servables: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="The servable directory of servable name add is different in multiple con"):
        merge_config((config(servables), config(servables / "other")))
    with pytest.raises(RuntimeError, match="The dec key or dec mode of servable name add"):
        merge_config((config(servables, dec_key=KEY), config(servables, version_number=3)))


@pytest.mark.parametrize("exclusive", [True, False])
def test_only_ascend_910_devices_cannot_be_shared(
    servables: Path, monkeypatch: pytest.MonkeyPatch, exclusive: bool
) -> None:
    monkeypatch.setattr(devices, "devices_are_exclusive", lambda: exclusive)
    pair = (config(servables, device_ids=(0, 2)), config(servables, "functions", device_ids=2))
    if exclusive:
        with pytest.raises(RuntimeError, match="Ascend 910 device id 2 is used repeatedly in servable functions"):
            merge_config(pair)
        on_cpu = [config(servables, name, device_ids=2, device_type="cpu") for name in ("add", "functions")]
        assert len(merge_config(on_cpu)) == 2
    else:
        assert len(merge_config(pair)) == 2


def test_a_device_type_that_is_not_here(servables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_types_here", lambda: ("gpu", "cpu"))
    start_config.check_device_type_here(config(servables, device_type="GPU"))
    with pytest.raises(
        RuntimeError,
        match="The device type 'ascend' of servable name add is inconsistent with current running environment, "
        "supported device type: None, 'GPU' or 'CPU'",
    ):
        start_config.check_device_type_here(config(servables, device_type="Ascend"))


def test_a_cpu_is_never_asked_for(servables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> tuple[str, ...]:
        raise AssertionError("no subprocess is needed for a CPU")

    monkeypatch.setattr(devices, "device_types_here", never)
    start_config.check_device_type_here(config(servables, device_type="cpu"))
    start_config.check_device_type_here(config(servables))


def test_the_probe_names_the_devices_and_leaves_no_back_end_behind() -> None:
    code = """
import sys
from inflight.dropin import device_types_here
print(*device_types_here())
print({"onnx", "onnxruntime", "torch", "mindspore"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    found, back_ends = result.stdout.splitlines()
    assert found.split()[-1] == "cpu"
    assert set(found.split()) <= {"ascend", "gpu", "cpu"}
    assert back_ends == "set()"


def test_a_probe_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "servable_config.py").write_text("raise ValueError('no luck')\n")
    with pytest.raises(StartError, match="servable_config failed, no luck"):
        devices.probe("--servable", str(tmp_path), "broken")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "key"), "Parameter 'certificate' should be str, but actually "),
        (("cert", ""), "Parameter 'private_key' should not be empty str"),
        (("cert", "key", None, 1), "Parameter 'verify_client' should be bool, but actually "),
        (("cert", "key", None, True), "Parameter 'custom_ca' should be str, but actually "),
    ],
)
def test_tls_arguments(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        server.SSLConfig(*arguments)


def test_custom_ca_is_not_looked_at_without_verify_client() -> None:
    assert server.SSLConfig("cert", "key", 5).verify_client is False  # type: ignore[arg-type]


def test_arguments_of_distributed_servables(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Parameter 'rank_size' should be >= 1"):
        distributed.declare_servable(0, 1)
    with pytest.raises(RuntimeError, match="Parameter 'with_batch_dim' should be bool"):
        distributed.declare_servable(8, 1, 1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Parameter 'rank_table_json_file' should be str"):
        distributed.start_servable("/models", "add", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Check servable config failed, directory '/models/add' not exist"):
        distributed.start_servable("/models", "add", "table.json")


def test_arguments_of_agents(tmp_path: Path) -> None:
    model = tmp_path / "device0.mindir"
    with pytest.raises(ConfigError, match="The format of the distributed address '6200' is illegal"):
        distributed.startup_agents("6200", [str(model)])
    with pytest.raises(ConfigError, match=r"should be in range \[1,65528\]"):
        distributed.startup_agents("127.0.0.1:6200", [str(model)], agent_start_port=65529)
    with pytest.raises(ConfigError, match="must have values at the same time"):
        distributed.startup_agents("127.0.0.1:6200", [str(model)], agent_ip="127.0.0.1")
    with pytest.raises(ConfigError, match="length 3 expected to be 16, 24 or 32"):
        distributed.startup_agents("127.0.0.1:6200", [str(model)], dec_key=b"abc")


def test_a_servable_has_one_distributed_model(tmp_path: Path) -> None:
    with tracing("add", tmp_path) as registry:
        model = distributed.declare_servable(8, 2, False, (1,), True)
        assert model.model_key == "add"
        spec = registry.models["add"]
        assert (spec.ranks, spec.with_batch_dim, spec.without_batch_dim_inputs) == (Ranks(8, 2, True), False, (1,))
        with pytest.raises(RegistrationError, match="repeatedly been declared as distributed servable"):
            distributed.declare_servable(8, 1)
        with pytest.raises(RegistrationError, match="servable has already been declared as distributed servable"):
            declare_model("add.mindir", "MindIR")
    with tracing("add", tmp_path):
        declare_model("add.mindir", "MindIR")
        with pytest.raises(RegistrationError, match="servable has already been declared as local servable"):
            distributed.declare_servable(8, 1)


def test_check_type_keeps_its_functions() -> None:
    assert check_type.check_and_as_int_tuple_list("x", 3) == (3,)
    assert check_type.check_and_as_str_tuple_list("x", ["a", "b"]) == ("a", "b")
    with pytest.raises(RuntimeError, match="The item of parameter 'x' should be str, but actually"):
        check_type.check_and_as_str_tuple_list("x", ["a", 1])
    with pytest.raises(RuntimeError, match="should be <= 3"):
        check_type.check_int("x", 4, maximum=3)
    with pytest.raises(RuntimeError, match=r"in range \[1,65535\]"):
        check_type.check_ip_port("x", 0)
