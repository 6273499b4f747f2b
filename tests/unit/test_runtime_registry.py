"""Which runtime is found: by format, by ending, by plug-in, by the operator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inflight.errors import ConfigError, StartError
from inflight.runtime import (
    LoadedModel,
    LoadRequest,
    Runtime,
    available_formats,
    configure,
    devices_for,
    find_runtime,
    parse_overrides,
    registry,
)


class ByOverride(Runtime):
    formats = ("tflite",)
    suffixes = (".tflite",)

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        return ("gpu", "cpu")

    @classmethod
    def load(cls, request: LoadRequest) -> LoadedModel:
        raise StartError("not in this test")


PLUGIN = """
from inflight.runtime import Runtime

class ByEntryPoint(Runtime):
    formats = ("onnx", "gguf")
    suffixes = (".gguf",)
    @classmethod
    def devices(cls): return ("cpu",)
    @classmethod
    def load(cls, request): raise NotImplementedError

class NotOne: pass
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    configure(None)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution that brings a runtime of its own for onnx and a new one for gguf."""
    (tmp_path / "some_plugin.py").write_text(PLUGIN)
    info = tmp_path / "some_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[inflight.runtimes]\nonnx = some_plugin:ByEntryPoint\nGGUF = some_plugin:ByEntryPoint\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    configure(None)
    yield
    sys.modules.pop("some_plugin", None)


def test_the_table_of_built_ins_agrees_with_their_classes() -> None:
    for name, target in registry.BUILTINS.items():
        assert name in find_runtime(name).formats, target
    for suffix, name in registry.SUFFIXES.items():
        assert suffix in find_runtime(name).suffixes
    for name in registry.BUILTINS:
        runtime = find_runtime(name)
        assert set(runtime.formats) <= set(registry.BUILTINS)
        assert set(runtime.suffixes) <= set(registry.SUFFIXES)


@pytest.mark.parametrize("file", ["m.onnx", "M.ONNX", "a.b/m.v2.onnx"])
def test_the_ending_of_a_file_tells_its_format(file: str) -> None:
    assert find_runtime(None, Path(file)) is find_runtime("onnx")


def test_a_named_format_wins_over_the_ending() -> None:
    assert find_runtime("OnnX", Path("model.pt")).__name__ == "OnnxRuntime"


def test_unknown_formats_and_endings_are_answered_with_the_known_ones() -> None:
    for arguments in (("keras", None), (None, Path("model.keras")), (None, None), (None, Path("model"))):
        with pytest.raises(StartError, match=r"callable, mindir, .*onnx.*torch"):
            find_runtime(*arguments)


def test_devices_for_asks_the_runtime() -> None:
    configure(f"tflite={__name__}:ByOverride")
    assert devices_for("tflite") == ("gpu", "cpu")
    assert devices_for(None, Path("m.tflite")) == ("gpu", "cpu")


@pytest.mark.usefixtures("plugin")
def test_an_entry_point_takes_a_format_over_and_adds_one() -> None:
    assert find_runtime("onnx").__name__ == "ByEntryPoint"
    assert find_runtime(None, Path("m.onnx")).__name__ == "ByEntryPoint"
    assert find_runtime("gguf").__name__ == "ByEntryPoint"
    assert find_runtime(None, Path("m.gguf")).__name__ == "ByEntryPoint"
    assert "gguf" in available_formats()


@pytest.mark.usefixtures("plugin")
def test_an_override_wins_over_an_entry_point_until_it_is_removed() -> None:
    configure(f" ONNX = {__name__}:ByOverride ,")
    assert find_runtime("onnx").__name__ == "ByOverride"
    configure(None)
    assert find_runtime("onnx").__name__ == "ByEntryPoint"


def test_overrides_are_parsed() -> None:
    assert parse_overrides(None) == parse_overrides("") == parse_overrides(" , ") == {}
    assert parse_overrides("onnx=a.b:C, My-Format=d:E") == {"onnx": "a.b:C", "my-format": "d:E"}


@pytest.mark.parametrize(
    "text", ["onnx", "onnx=", "=a:B", "onnx=a", "onnx=a:", "onnx=a:B:C", "onnx=a:B;pt=c:D", "a b=c:D"]
)
def test_malformed_overrides_say_how_to_write_them(text: str) -> None:
    with pytest.raises(ConfigError, match="format=module:Class"):
        configure(text)


def test_a_format_named_twice_is_refused_and_the_old_overrides_stay() -> None:
    configure(f"onnx={__name__}:ByOverride")
    with pytest.raises(ConfigError, match="twice"):
        configure("onnx=a:B,ONNX=c:D")
    assert find_runtime("onnx").__name__ == "ByOverride"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("no_such_module_here:C", "no_such_module_here.*not installed"),
        (f"{__name__}:Missing", "Missing"),
        (f"{__name__}:PLUGIN", r"derived from inflight\.runtime\.Runtime"),
        ("pathlib:Path", r"derived from inflight\.runtime\.Runtime"),
    ],
)
def test_an_override_that_cannot_be_used_is_a_start_error(target: str, text: str) -> None:
    configure(f"onnx={target}")
    with pytest.raises(StartError, match=text):
        find_runtime("onnx")


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "inflight.runtime.torch", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Hides("torch"), *sys.meta_path])
    with pytest.raises(StartError, match=r"'torch'.*inflight-serving\[torch\]"):
        find_runtime("torch")


class _Hides:
    """An importer that knows no such package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def test_older_runtimes_find_the_specification_where_it_was() -> None:
    import inflight.types
    from inflight.contract import TensorSpec

    assert inflight.types.TensorSpec is TensorSpec
