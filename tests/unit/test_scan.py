"""What a folder of models holds."""

from __future__ import annotations

from pathlib import Path

from inflight.repository import scan


def test_forms_of_models(tmp_path: Path) -> None:
    """A servable, a file, a folder with one file, numbered versions; a folder with two files is none of them."""
    for name in (
        "servable/servable_config.py",
        "file.onnx",
        "alone/net.onnx",
        "many/2/model.onnx",
        "many/10/other.mindir",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("two/a.onnx", "two/b.onnx", "none/readme.txt", ".hidden/net.onnx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = scan(tmp_path)
    assert {name: dict(model.versions) for name, model in found.items()} == {
        "servable": {1: tmp_path / "servable"},
        "file": {1: tmp_path / "file.onnx"},
        "alone": {1: tmp_path / "alone" / "net.onnx"},
        "many": {2: tmp_path / "many" / "2" / "model.onnx", 10: tmp_path / "many" / "10" / "other.mindir"},
    }
    assert [name for name, model in found.items() if model.servable] == ["servable"]
    assert not any(model.language for model in found.values())
