"""Callers whose requests share batches: nobody gets another one's shared inputs, or sees another stage's edits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from inflight.client import Client
from inflight.config import ServableConfig
from tests.e2e.running import Running, crowd, request, running, write_servable
from tests.graphs import F32, graph, node, value

CONFIG = """
    from {package} import add_stage, declare_model, register_method

    model = declare_model("scaled.onnx", "{format}", without_batch_dim_inputs=1)

    def calls(x, k):
        return sum(float(y[0][0]) for y in model.call([[x, k], [x, k + 1], [x, k]]))

    def edit(x):
        x += 1
        return x

    @register_method(output_names=["y"])
    def scale(x, k):
        return add_stage(model, x, k, outputs_count=1)

    @register_method(output_names=["y"])
    def from_inside(x, k):
        return add_stage(calls, x, k, outputs_count=1)

    @register_method(output_names=["x", "y", "edited"])
    def edits(x, k):
        y = add_stage(model, x, k, outputs_count=1)
        edited = add_stage(edit, y, outputs_count=1)
        return x, y, edited
"""


def scaled(batch: int | str) -> bytes:
    """y = k x, with one k for all rows."""
    return graph(
        [node("Mul", ["x", "k"], ["y"])],
        [value("x", F32, [batch, 2]), value("k", F32, [])],
        [value("y", F32, [batch, 2])],
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("neighbours")
    ours = CONFIG.format(package="inflight.servable", format="onnx")
    write_servable(folder, "open", ours, {"1/scaled.onnx": scaled("n")})
    write_servable(folder, "fixed", ours, {"1/scaled.onnx": scaled(4)})
    names = {"open": 3, "fixed": 1}
    with running(*(ServableConfig(folder, name, num_parallel_workers=count) for name, count in names.items())) as one:
        yield one


def by_rest(here: Running, servable: str, method: str, x: np.ndarray, k: np.ndarray) -> list[dict[str, object]]:
    instances = [{"x": row.tolist(), "k": float(scale)} for row, scale in zip(x, k)]
    body = json.dumps({"instances": instances}).encode()
    found: list[dict[str, object]] = json.loads(request(here.http, "POST", f"/model/{servable}:{method}", body)[1])[
        "instances"
    ]
    return found


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 9, (9, 2)).astype(np.float32), random.integers(1, 4, 9).astype(np.float32)


@pytest.mark.parametrize("servable", ["open", "fixed"])
@pytest.mark.parametrize("door", ["MindSpore REST", "MSService", "OIP gRPC"])
def test_everybody_gets_their_own_shared_input(here: Running, servable: str, door: str) -> None:
    def one(number: int) -> None:
        for turn in range(4):
            x, k = drawn(10 * number + turn)
            if door == "MindSpore REST":
                answer = [row["y"] for row in by_rest(here, servable, "scale", x, k)]
            elif door == "MSService":
                with Client(here.grpc, servable, "scale", timeout=60) as client:
                    answer = [row["y"] for row in client.infer([{"x": a, "k": b} for a, b in zip(x, k)])]
            else:
                with triton_grpc.InferenceServerClient(here.grpc) as client:
                    tensors = [triton_grpc.InferInput(name, a.shape, "FP32") for name, a in (("x", x), ("k", k))]
                    for tensor, array in zip(tensors, (x, k)):
                        tensor.set_data_from_numpy(array)
                    answer = client.infer(f"{servable}.scale", tensors).as_numpy("y")
            np.testing.assert_array_equal(np.array(answer), x * k[:, None])

    crowd(one, 8)


@pytest.mark.parametrize("servable", ["open", "fixed"])
def test_calls_from_inside_get_their_own_too(here: Running, servable: str) -> None:
    def one(number: int) -> None:
        x, k = drawn(number)
        answer = [row["y"] for row in by_rest(here, servable, "from_inside", x, k)]
        np.testing.assert_array_equal(np.array(answer), x[:, 0] * (3 * k + 1))

    crowd(one, 8)


@pytest.mark.parametrize("servable", ["open", "fixed"])
def test_an_edit_in_place_is_seen_by_nobody_else(here: Running, servable: str) -> None:
    def one(number: int) -> None:
        x, k = drawn(number)
        for row, a, b in zip(by_rest(here, servable, "edits", x, k), x, k):
            assert (row["x"], row["y"], row["edited"]) == (a.tolist(), (a * b).tolist(), (a * b + 1).tolist())

    crowd(one, 8)


def test_an_edit_in_place_is_seen_by_all_under_mindspore_serving(tmp_path: Path) -> None:
    theirs = CONFIG.format(package="mindspore_serving.server.register", format="onnx")
    write_servable(tmp_path, "old", theirs, {"1/scaled.onnx": scaled("n")})
    with running(ServableConfig(tmp_path, "old")) as server:
        x, k = drawn(1)
        for row, a, b in zip(by_rest(server, "old", "edits", x, k), x, k):
            assert row["edited"] == (a * b + 1).tolist()
            assert row["y"] == row["edited"]
