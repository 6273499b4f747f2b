"""What a folder of models holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from inflight.config import RoomConfig, ServableConfig
from inflight.repository import configurations, scan
from inflight.router.demand import Demand


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


@pytest.mark.parametrize(("devices", "wanted", "workers"), [((0,), (0, 0, 0), 0), ((2, 3), (2, 3, 2), 0), ((), (), 3)])
def test_instances_stand_on_the_devices_that_are_given(
    tmp_path: Path, devices: tuple[int, ...], wanted: tuple[int, ...], workers: int
) -> None:
    """Three instances on a machine with one device are three on that one."""
    (tmp_path / "net" / "1").mkdir(parents=True)
    (tmp_path / "net" / "1" / "model.onnx").write_bytes(b"")
    (tmp_path / "net" / "config.pbtxt").write_text("instance_group [ { count: 3 } ]")
    (found,) = scan(tmp_path).values()
    (made,) = configurations(found, [1], {"device_ids": devices})
    assert isinstance(made, ServableConfig)
    assert (made.device_ids, made.num_parallel_workers) == (wanted, workers)


def test_a_name_of_nothing_but_dots_costs_nothing() -> None:
    demand = Demand(
        RoomConfig(aliases=("short=long",)), cast(Any, None), lambda name: False, lambda name, version: None
    )
    assert demand.chosen("short", None) == ("long", 0)
    assert demand.chosen("short.method", None) == ("long.method", 0)
    assert demand.chosen("." * 2_000_000, None) is None
