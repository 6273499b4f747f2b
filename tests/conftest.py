"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from inflight.log import LOGGER
from tests.grpc_server import ENGINES

# What tests start must not ignore SIGHUP because whoever started the tests did so (nohup).
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Imports this worker's share of the test files before it collects all of them.

    Every worker of pytest-xdist collects everything, and they start together: each would rewrite and compile all files
    for itself, which takes longer than all else that collecting does. So each begins with other files, and finds the
    rest compiled. What cannot be imported is told when it is collected.
    """
    worker = getattr(session.config, "workerinput", None)
    if worker is None or sys.dont_write_bytecode:
        return
    index, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    for name in collected_modules(session.config)[index::count]:
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(name)


def collected_modules(config: pytest.Config) -> list[str]:
    """Names of the test modules in the folders that pytest was given, without those it was told to ignore."""
    ignored = {Path(name).resolve() for name in config.getoption("ignore") or ()}
    root = config.rootpath
    folders = [Path(argument).resolve() for argument in config.args if Path(argument).is_dir()]
    files = {file for folder in folders if folder.is_relative_to(root) for file in folder.rglob("test_*.py")} - ignored
    return [".".join(file.relative_to(root).with_suffix("").parts) for file in sorted(files)]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine of the gRPC door in turn."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Commands that a test runs in this process set the loggers up, for a stream that ends with the test."""
    state = LOGGER.handlers[:], LOGGER.propagate, LOGGER.level
    yield
    LOGGER.handlers[:], LOGGER.propagate = state[:2]
    LOGGER.setLevel(state[2])


@pytest.fixture(autouse=True)
def one_thread_of_torch() -> None:
    """Tests run beside each other: threads of torch's that wait for one that another test's took away spin."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture
def servable(tmp_path: Path) -> Callable[..., Path]:
    """Writes a servable's folder: `servable("name", config_text, {"1/add.onnx": add_model()})`; returns its parent."""

    def write(name: str, config: str, files: dict[str, bytes] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "servable_config.py").write_text(textwrap.dedent(config))
        for file, data in (files or {}).items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path

    return write


def binary_model(op: str = "Add", batch: int | str = "N", shape: tuple[int, ...] = (2, 2)) -> bytes:
    """An ONNX model of one element-wise operator: x1, x2 -> y, float32 [batch, *shape]."""
    dims = [batch, *shape]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in ("x1", "x2")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, dims)
    graph = helper.make_graph([helper.make_node(op, ["x1", "x2"], ["y"])], op, inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)
