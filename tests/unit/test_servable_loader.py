"""Loading folders: imports, names that clash, versions, and configurations written as the public examples are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inflight.errors import ConfigError, RegistrationError, StartError
from inflight.servable import (
    Ref,
    Version,
    bare_model,
    check_config_location,
    find_versions,
    load_servable,
    resolve_version,
)

PLAIN = """
from inflight.servable import declare_model, register_method, add_stage
model = declare_model("m.onnx", "onnx")

@register_method("y")
def predict(x):
    return add_stage(model, x, outputs_count=1)
"""
WITH_HELPER = """
from inflight.servable import declare_model, register_method, add_stage
from .helper import prepare
from . import helper
HERE = __file__
NAME = __name__

@register_method("y")
def predict(x):
    return add_stage(prepare, x, outputs_count=1)
"""
HELPER = "def prepare(x):\n    return ORIGIN\nORIGIN = {origin!r}\n"


def _search_path(module: object) -> list[str]:
    """Some modules of other packages answer any attribute, `__path__` too."""
    try:
        return list(getattr(module, "__path__", ()))
    except TypeError:
        return []


@pytest.fixture(autouse=True)
def _imports_restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for key, module in list(sys.modules.items()):
        places = [getattr(module, "__file__", None) or "", *_search_path(module)]
        if any(str(place).startswith(str(tmp_path)) for place in places):
            del sys.modules[key]


def write(directory: Path, name: str, text: str, helper: str | None = None) -> Path:
    folder = directory / name
    folder.mkdir(parents=True)
    (folder / "servable_config.py").write_text(text)
    if helper is not None:
        (folder / "helper.py").write_text(HELPER.format(origin=helper))
    return folder


def test_a_folder_becomes_a_spec(tmp_path: Path) -> None:
    folder = write(tmp_path, "tensor_one", PLAIN)
    length = len(sys.path)
    spec = load_servable(tmp_path, "tensor_one")
    assert (spec.name, spec.directory) == ("tensor_one", folder)
    assert list(spec.methods) == ["predict"]
    assert list(spec.models) == ["m.onnx"]
    assert sys.path[length:] == [str(tmp_path)], "appended to the end"
    assert "tensor_one.servable_config" in sys.modules


@pytest.mark.parametrize(
    "name",
    ["plain", "json", "email", "inflight", "os", "__main__", "my.model-v2", "2nd", "class", "with space", "ö"],
)
def test_relative_imports_work_under_any_name(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, name, WITH_HELPER, helper=name)
    spec = load_servable(tmp_path, name)
    assert spec.name == name
    stage = spec.methods["predict"].stages[0]
    assert (stage.key, stage.tag) == (f"{name}.prepare", f"Function '{name}.prepare'")
    function = spec.functions[stage.key].function
    assert function(None) == name
    module = sys.modules[f"{function.__module__.rpartition('.')[0]}.servable_config"]
    assert Path(module.HERE) == folder / "servable_config.py"


def test_a_clashing_name_leaves_the_other_package_alone(tmp_path: Path) -> None:
    write(tmp_path, "json", WITH_HELPER, helper="servable")
    load_servable(tmp_path, "json")
    assert sys.modules["json"] is json
    assert not hasattr(json, "helper")
    assert "json.helper" not in sys.modules


def test_an_earlier_folder_of_the_same_name_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path / "first", "twin", WITH_HELPER, helper="first")
    write(tmp_path / "second", "twin", WITH_HELPER, helper="second")
    for place in ("first", "second", "first"):
        spec = load_servable(tmp_path / place, "twin")
        assert spec.directory == tmp_path / place / "twin"
        assert spec.functions["twin.prepare"].function(None) == place


@pytest.mark.parametrize("name", ["changing", "json", "a.b"])
def test_loading_again_runs_the_files_again(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, name, WITH_HELPER, helper="old")
    first = load_servable(tmp_path, name)
    (folder / "helper.py").write_text(HELPER.format(origin="a newer text"))
    second = load_servable(tmp_path, name)
    assert first.functions[f"{name}.prepare"].function(None) == "old"
    assert second.functions[f"{name}.prepare"].function(None) == "a newer text"


def test_a_file_that_changes_within_a_second_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python compares byte code with the size of its file and with whole seconds."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = write(tmp_path, "quick", WITH_HELPER, helper="old")
    helper, second = folder / "helper.py", 1_700_000_000 * 10**9
    os.utime(helper, ns=(second, second))
    assert load_servable(tmp_path, "quick").functions["quick.prepare"].function(None) == "old"
    (compiled,) = folder.glob("__pycache__/helper.*")
    os.utime(compiled, ns=(second + 10**8, second + 10**8))
    helper.write_text(HELPER.format(origin="new"))
    os.utime(helper, ns=(second + 5 * 10**8, second + 5 * 10**8))
    assert load_servable(tmp_path, "quick").functions["quick.prepare"].function(None) == "new"


@pytest.mark.parametrize("name", ["packed", "packed-too"])
def test_a_folder_that_is_a_package_runs_its_init(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, name, "from . import START\n" + PLAIN + "assert START == 1\n")
    (folder / "__init__.py").write_text("START = 1\n")
    assert list(load_servable(tmp_path, name).methods) == ["predict"]


def test_absolute_imports_of_the_own_folder_work(tmp_path: Path) -> None:
    write(tmp_path, "own", WITH_HELPER.replace("from .helper", "from own.helper"), helper="own")
    assert load_servable(tmp_path, "own").functions["own.prepare"].function(None) == "own"


def test_a_callable_beside_the_configuration_is_a_model(tmp_path: Path) -> None:
    text = "from inflight.servable import *\ndeclare_model('.helper:prepare', 'callable')\n"
    write(tmp_path, "calls-it", text + "register_method('y')(lambda x: x)\n", helper="beside")
    target = load_servable(tmp_path, "calls-it").models[".helper:prepare"].target
    assert target is not None
    assert target(None) == "beside"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import absent_module", "No module named 'absent_module'"),
        ("from .absent import x", "No module named 'broken.absent'"),
        ("1 // 0", "integer division or modulo by zero"),
        ("def (", "invalid syntax"),
        ("raise KeyError()", "KeyError()"),
        ("import sys; sys.exit(3)", "3"),
        ("undefined_name", "name 'undefined_name' is not defined"),
    ],
)
def test_an_import_that_fails_fails_the_start(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "broken", text)
    with pytest.raises(StartError) as failure:
        load_servable(tmp_path, "broken")
    assert str(failure.value).startswith("import broken.servable_config failed, ")
    assert message in str(failure.value)


def test_a_servable_without_methods_does_not_start(tmp_path: Path) -> None:
    write(tmp_path, "silent", "from inflight.servable import declare_model\ndeclare_model('a.onnx')\n")
    with pytest.raises(RegistrationError, match="There is no method registered for servable 'silent'"):
        load_servable(tmp_path, "silent")


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as failure:
        check_config_location(tmp_path, "absent")
    assert str(failure.value).startswith(f"Check servable config failed, directory '{tmp_path}/absent' not exist")
    (tmp_path / "absent").mkdir()
    with pytest.raises(ConfigError) as failure:
        load_servable(tmp_path, "absent")
    assert str(failure.value).startswith(
        f"Check servable config failed, file '{tmp_path}/absent/servable_config.py' not exist"
    )


def test_without_a_loader_the_folder_on_the_stack_names_the_servable(tmp_path: Path) -> None:
    folder = write(tmp_path, "by_hand", PLAIN + "SPEC = __import__('inflight.servable').servable.current_registry()\n")
    for other in ("by_hand", "by_hand_two"):
        names: dict[str, object] = {}
        file = folder.parent / other / "servable_config.py"
        exec(compile((folder / "servable_config.py").read_text(), str(file), "exec"), names)
        registry = names["SPEC"]
        assert getattr(registry, "name", None) == other
        assert list(getattr(registry, "methods", ())) == ["predict"]


VERSIONS = [
    # directories, files, requested, with models, without models
    ([], [], 0, "There is no valid version directory of models", (1, None)),
    (["0"], [], 0, "There is no valid version directory of models", (1, None)),
    (["1"], [], 0, (1, "1"), (1, "1")),
    (["1", "2", "10"], [], 0, (10, "10"), (10, "10")),
    (["1", "2", "10"], [], 2, (2, "2"), (2, "2")),
    (["1"], [], 2, "There is no specified version directory of models, specified version number: 2", (2, None)),
    ([], [], 3, "There is no valid version directory of models while there are models declared", (3, None)),
    (["0", "v3"], ["3"], 3, "There is no valid version directory of models while there are models", (3, None)),
    (["01"], [], 0, (1, "01"), (1, "01")),
    (["01", "1", "001"], [], 1, (1, "1"), (1, "1")),
    (["1", "-3", "4a", "v5", "²", "__pycache__"], ["9"], 0, (1, "1"), (1, "1")),
]


@pytest.mark.parametrize(("folders", "files", "requested", "with_models", "without"), VERSIONS)
def test_versions(
    tmp_path: Path,
    folders: list[str],
    files: list[str],
    requested: int,
    with_models: str | tuple[int, str],
    without: tuple[int, str | None],
) -> None:
    servable = tmp_path / "s"
    servable.mkdir()
    for name in folders:
        (servable / name).mkdir()
    for name in files:
        (servable / name).write_text("")

    def expected(number: int, name: str | None) -> Version:
        return Version(number, None if name is None else servable / name)

    assert resolve_version(tmp_path, "s", requested, has_models=False) == expected(*without)
    if isinstance(with_models, str):
        with pytest.raises(StartError) as failure:
            resolve_version(tmp_path, "s", requested, has_models=True)
        assert str(failure.value).startswith(with_models)
    else:
        assert resolve_version(tmp_path, "s", requested, has_models=True) == expected(*with_models)


def test_find_versions_sorts_by_number(tmp_path: Path) -> None:
    assert find_versions(tmp_path, "s") == []
    for name in ("10", "9", "0", "02"):
        (tmp_path / "s" / name).mkdir(parents=True)
    assert find_versions(tmp_path, "s") == [2, 9, 10]


def test_a_bare_model_has_one_method(tmp_path: Path) -> None:
    spec = bare_model(tmp_path / "net.onnx", "net", ["input:0", "mask"], ["scores", "labels"], "onnx", 8)
    method = spec.methods["predict"]
    assert (spec.name, spec.directory) == ("net", tmp_path)
    assert (method.inputs, method.outputs) == (("input:0", "mask"), ("scores", "labels"))
    assert method.returns == (Ref(1, 0), Ref(1, 1))
    assert [(stage.kind, stage.key, stage.inputs) for stage in method.stages] == [
        ("model", "net.onnx", (Ref(0, 0), Ref(0, 1)))
    ]
    model = spec.models["net.onnx"]
    assert (model.files, model.format, model.max_batch_size) == (("net.onnx",), "onnx", 8)
    with pytest.raises(RegistrationError, match="Parameter 'outputs' should not be empty"):
        bare_model(tmp_path / "net.onnx", "net", ["x"], [], None, 8)
