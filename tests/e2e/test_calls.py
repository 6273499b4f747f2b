"""Requests of several clients whose stages call a model: real workers, real doors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from inflight.client import Client
from inflight.config import ServableConfig
from tests.e2e.running import Running, ask, crowd, running, write_servable

CALLS = """
    import time
    import numpy as np
    from {package} import add_stage, declare_model, register_method

    def model(x):  # [n]
        time.sleep(0.02)
        return x * 2, np.full(len(x), len(x))

    declared = declare_model({model}, max_batch_size=8)

    def calls(x):
        if x < 0:
            raise ValueError("it is negative")
        y, size = declared.call(x)
        return y + 1, size

    @register_method(output_names=["y", "size"])
    def predict(x):
        return add_stage(calls, x, outputs_count=2)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("servables")
    ours = CALLS.format(package="inflight.servable", model="model")
    write_servable(directory, "calls", ours)
    write_servable(directory, "extra", ours)
    write_servable(directory, "peer", CALLS.format(package="mindspore_serving.server.register", model="model"))
    servables = [ServableConfig(directory, name) for name in ("calls", "peer")]
    with running(*servables, ServableConfig(directory, "extra", device_ids=(0,), num_parallel_workers=2)) as server:
        yield server


def by_http(here: Running, value: float) -> tuple[float, int]:
    tensor = triton_http.InferInput("x", [1], "FP32")
    tensor.set_data_from_numpy(np.array([value], np.float32))
    with triton_http.InferenceServerClient(here.http) as client:
        answer = client.infer("calls", [tensor])
    return float(answer.as_numpy("y")[0]), int(answer.as_numpy("size")[0])


def by_grpc(here: Running, value: float) -> tuple[float, int]:
    tensor = triton_grpc.InferInput("x", [1], "FP32")
    tensor.set_data_from_numpy(np.array([value], np.float32))
    with triton_grpc.InferenceServerClient(here.grpc) as client:
        answer = client.infer("calls", [tensor])
    return float(answer.as_numpy("y")[0]), int(answer.as_numpy("size")[0])


def by_client(here: Running, value: float) -> tuple[float, int]:
    with Client(here.grpc, "calls", "predict", timeout=60) as client:
        (answer,) = client.infer({"x": np.float32(value)})
    return float(answer["y"]), int(answer["size"])


def test_requests_of_all_doors_share_the_batches_of_a_called_model(here: Running) -> None:
    doors = (by_http, by_grpc, by_client)
    crowd(lambda i: doors[i % 3](here, i), 12)  # now it is known that the function calls a model
    answers = crowd(lambda i: doors[i % 3](here, i), 24)
    assert [y for y, _ in answers] == [2 * i + 1 for i in range(24)]
    sizes = [size for _, size in answers]
    assert max(sizes) > 3, sizes
    assert min(sizes) >= 1


def test_an_instance_that_fails_is_alone_with_it(here: Running) -> None:
    answers = crowd(lambda i: ask(here.http, "calls", "predict", float(i - 3)), 12)
    for i, answer in enumerate(answers):
        if i < 3:
            assert "it is negative" in answer["error_msg"]
        else:
            assert answer["instances"][0]["y"] == 2 * (i - 3) + 1


def test_extra_workers_share_batches_as_well(here: Running) -> None:
    for count in (8, 24):
        answers = crowd(lambda i: ask(here.http, "extra", "predict", float(i)), count)
        assert [answer["instances"][0]["y"] for answer in answers] == [2 * i + 1 for i in range(count)]
    assert max(answer["instances"][0]["size"] for answer in answers) > 3


def test_in_the_drop_in_package_a_call_holds_the_worker(here: Running) -> None:
    answers = crowd(lambda i: ask(here.http, "peer", "predict", float(i)), 8)
    assert [answer["instances"] for answer in answers] == [[{"y": 2 * i + 1, "size": 1}] for i in range(8)]
