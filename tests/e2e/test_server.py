"""A whole server under way: limits, deadlines, callers that leave, odd results, neighbours, counting."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from inflight.client import Client
from inflight.config import ServableConfig
from tests.e2e.running import (
    Background,
    Running,
    ask,
    connect,
    crowd,
    eventually,
    get,
    in_flight,
    metrics,
    request,
    running,
    states,
    workers,
    write_servable,
)

MODEL = """
    from inflight.servable import add_stage, declare_model, register_method

    model = declare_model("model.onnx", "onnx")

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(model, x, outputs_count=1)
"""

ODD = """
    from inflight.servable import add_stage, register_method

    class Nasty(Exception):
        def __str__(self):
            raise ValueError("no text")

    def make(kind):
        if kind == "surrogate":
            return "\\ud800"
        if kind == "surrogate error":
            raise ValueError("\\ud800")
        if kind == "not a number":
            return float("nan")
        if kind == "nasty error":
            raise Nasty
        if kind == "exit":
            raise SystemExit(3)
        if kind == "deep":
            return make(kind)
        if kind == "object":
            return object()
        if kind == "none":
            return None
        return kind

    @register_method(output_names=["y"])
    def predict(kind):
        return add_stage(make, kind, outputs_count=1)
"""


def perceptron(sizes: tuple[int, ...] = (32, 64, 10)) -> bytes:
    """An ONNX model x -> y, float32 [N, sizes[0]] -> [N, sizes[-1]], of random layers."""
    rng = np.random.default_rng(7)
    nodes, weights, name = [], [], "x"
    for layer, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        for kind, shape in (("w", (rows, columns)), ("b", (columns,))):
            array = rng.standard_normal(shape).astype(np.float32)
            weights.append(numpy_helper.from_array(array, f"{kind}{layer}"))
        last = layer == len(sizes) - 2
        out = "y" if last else f"h{layer}"
        nodes.append(helper.make_node("Gemm", [name, f"w{layer}", f"b{layer}"], [out]))
        if not last:
            nodes.append(helper.make_node("Tanh", [out], [name := f"t{layer}"]))
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT, ["N", size])
        for end, size in (("x", sizes[0]), ("y", sizes[-1]))
    ]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server in this process for most tests."""
    directory = tmp_path_factory.mktemp("servables")
    write_servable(directory, "work")
    write_servable(directory, "mlp", MODEL, {"1/model.onnx": perceptron()})
    write_servable(directory, "odd", ODD)
    with running(*(ServableConfig(directory, name) for name in ("work", "mlp", "odd"))) as it:
        yield it


def post(address: str, servable: str, method: str, value: Any, seconds: float = 60) -> http.client.HTTPConnection:
    """Sends a request and does not wait for the answer."""
    connection = connect(address, seconds)
    body = json.dumps({"instances": {"x": value}})
    connection.request("POST", f"/model/{servable}:{method}", body)
    return connection


def oip_rest(address: str, model: str, value: float, **parameters: Any) -> tuple[int, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [value]}
    body = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    status, answer = request(address, "POST", f"/v2/models/{model}/infer", body)
    return status, json.loads(answer)


def oip_grpc(address: str, model: str, value: float, seconds: float = 60) -> Any:
    tensor = triton_grpc.InferInput("x", [1], "FP32")
    tensor.set_data_from_numpy(np.array([value], np.float32))
    with triton_grpc.InferenceServerClient(address) as client:
        return client.infer(model, [tensor], client_timeout=seconds)


@contextmanager
def napping(here: Running, count: int, seconds: float) -> Iterator[list[Background]]:
    """The worker sleeps for `count` requests, and so does whoever comes after them."""
    before = in_flight(here.http)
    naps = [Background(ask, here.http, "work", "nap", seconds) for _ in range(count)]
    eventually(lambda: in_flight(here.http) == before + count)
    yield naps
    for nap in naps:
        assert "pid" in nap.result()["instances"][0]


# Limits, deadlines, callers that leave


def test_too_many_requests_are_refused_at_every_door(here: Running) -> None:
    here.server.set_max_enqueued(1)
    text = "Serving Error: enqueued requests count exceeds the limit 1"
    try:
        with napping(here, 1, 2.0):
            assert text in ask(here.http, "work", "echo", 1)["error_msg"]
            status, answer = oip_rest(here.http, "work.echo", 1)
            assert status == 429
            assert text in answer["error"]
            with pytest.raises(triton_grpc.InferenceServerException, match=text) as caught:
                oip_grpc(here.grpc, "work.echo", 1)
            assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
            with Client(here.grpc, "work", "echo", timeout=60) as client:
                assert text in client.infer({"x": 1})["error"]
    finally:
        here.server.set_max_enqueued(10_000)
    assert ask(here.http, "work", "echo", 1) == {"instances": [{"y": 1}]}


def test_a_full_queue_of_one_method_leaves_the_others_alone(here: Running) -> None:
    with napping(here, 1, 1.0):
        answers = crowd(lambda i: ask(here.http, "work", "short_queue", 0.0), 20)
        refused = [answer["error_msg"] for answer in answers if "error_msg" in answer]
        assert 0 < len(refused) < 20
        assert all("the queue of method 'short_queue' is full: 2 of 2 instances wait" in each for each in refused)
        assert ask(here.http, "work", "echo", 1) == {"instances": [{"y": 1}]}


def test_a_deadline_ends_the_wait_and_drops_the_work(here: Running) -> None:
    marks = [0.011, 0.022, 0.033]
    with napping(here, 1, 2.0) as (nap,), Client(here.grpc, "work", "nap", timeout=0.3) as client:
        by_ms_service = Background(client.infer, {"x": np.float32(marks[0])})
        by_oip = Background(oip_grpc, here.grpc, "work.nap", marks[1], 0.3)
        by_rest = Background(oip_rest, here.http, "work.nap", marks[2], timeout=300_000)  # microseconds
        assert "(4, 'deadline exceeded')" in by_ms_service.result()["error"]
        with pytest.raises(triton_grpc.InferenceServerException) as caught:
            by_oip.result()
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        assert by_rest.result()[0] == 504
        assert not nap.done, "none of them waited for the worker"
    began = ask(here.http, "work", "naps", 0)["instances"][0]["seconds"]
    assert began
    assert not any(np.isclose(one, mark) for one in began for mark in marks)


def test_a_caller_that_leaves_frees_its_place(here: Running) -> None:
    here.server.set_max_enqueued(3)
    try:
        with napping(here, 1, 3.0) as (nap,):
            leaving = [post(here.http, "work", "nap", mark) for mark in (0.044, 0.055)]
            eventually(lambda: in_flight(here.http) == 3)
            assert "exceeds the limit" in ask(here.http, "work", "echo", 1)["error_msg"]
            for connection in leaving:
                connection.close()
            eventually(lambda: in_flight(here.http) == 1)
            assert not nap.done, "it frees its place at once"
            stays = post(here.http, "work", "echo", 7)
            eventually(lambda: in_flight(here.http) == 2)
        response = stays.getresponse()
        assert json.loads(response.read()) == {"instances": [{"y": 7}]}
        stays.close()
    finally:
        here.server.set_max_enqueued(10_000)
    began = ask(here.http, "work", "naps", 0)["instances"][0]["seconds"]
    assert not any(np.isclose(one, mark) for one in began for mark in (0.044, 0.055))
    cancelled = metrics(here.http)["inflight_request_failures_total"]
    assert cancelled["cancelled", "nap", "work"] >= 2


# Answers


def test_odd_results_fail_alone(here: Running) -> None:
    """Nothing that a stage returns or raises ends its worker."""
    (pid,) = (reply["pid"] for reply in ask(here.http, "work", "nap", 0)["instances"])
    before = workers()
    assert pid in before
    kinds = ["surrogate", "fine", "surrogate error", "nasty error", "exit", "deep", "object", "none", "also fine"]
    body = json.dumps({"instances": [{"kind": kind} for kind in kinds]}).encode()
    answer = json.loads(request(here.http, "POST", "/model/odd:predict", body)[1])
    assert [instance.get("y") for instance in answer["instances"]] == [
        kind if "fine" in kind else None for kind in kinds
    ], answer
    with Client(here.grpc, "odd", "predict", timeout=60) as client:
        results = client.infer([{"kind": kind} for kind in kinds])
        assert [result.get("y") for result in results] == [kind if "fine" in kind else None for kind in kinds]
        assert all("error" in result for result, kind in zip(results, kinds) if "fine" not in kind)
        (number,) = client.infer([{"kind": "not a number"}])
        assert np.isnan(number["y"])
    answer = json.loads(request(here.http, "POST", "/model/odd:predict", b'{"instances": {"kind": "not a number"}}')[1])
    assert "instances" in answer or "error_msg" in answer
    assert workers() == before


def test_a_result_does_not_depend_on_the_neighbours(here: Running) -> None:
    rows = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)

    def infer(index: int) -> np.ndarray:
        data = rows[index].tobytes()
        size = {"parameters": {"binary_data_size": len(data)}}
        head = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 32], **size}]}).encode()
        status, answer = request(
            here.http, "POST", "/v2/models/mlp/infer", head + data, {"Inference-Header-Content-Length": str(len(head))}
        )
        assert status == 200, answer
        return np.array(json.loads(answer)["outputs"][0]["data"], np.float32)

    def runs() -> float:
        return metrics(here.http)["inflight_batch_size_count"]["predict", "mlp", "model.onnx"]

    alone = np.stack([infer(index) for index in range(64)])
    before = runs()
    crowds = [np.stack(crowd(infer, 64)) for _ in range(3)]
    assert runs() - before < 3 * 64, "some of them must have shared a batch"
    for each in crowds:
        # The back end may choose another kernel for another batch size, which rounds differently in the last bits.
        np.testing.assert_allclose(each, alone, rtol=1e-5, atol=1e-5)


# Counting


def test_metrics_add_up(here: Running) -> None:
    def counts(name: str) -> float:
        return sum(value for labels, value in metrics(here.http).get(name, {}).items() if "work" in labels)

    names = ["inflight_requests_total", "inflight_request_seconds_count", "inflight_request_failures_total"]
    before = [counts(name) for name in names]
    crowd(lambda i: ask(here.http, "work", "echo", i, i + 1), 10)
    assert "error_msg" in ask(here.http, "work", "failing", 1)
    assert "error_msg" in ask(here.http, "work", "nobody", 1)
    assert [counts(name) - start for name, start in zip(names, before)] == [11, 11, 1]
    instances = metrics(here.http)["inflight_batch_size_sum"]
    assert instances["echo", "work", "work.same"] >= 20


def test_a_replica_that_is_killed_shows(here: Running) -> None:
    everybody = {(name, "device0"): "ready" for name in ("work", "mlp", "odd")}
    assert states(here.http) == everybody
    pid = ask(here.http, "work", "nap", 0)["instances"][0]["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: states(here.http)["work", "device0"] == "lost")
    waiting = Background(ask, here.http, "work", "echo", 3)
    assert waiting.result() == {"instances": [{"y": 3}]}
    assert states(here.http) == everybody
    assert get(here.http, "/health/ready") == {"ready": True, "not_ready": []}


# Extra workers

BORROWER = """
    import os, time
    import numpy as np
    from inflight.servable import add_stage, declare_model, register_method

    def slow(x):
        time.sleep(float(x.max()))
        return x * 10

    model = declare_model(slow, "callable", with_batch_dim=True)

    def borrow(x):
        return model.call(np.array([x], np.float64))[0]

    def who(x):
        return os.getpid()

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(borrow, x, outputs_count=1)

    @register_method(output_names=["pid"])
    def pid(x):
        return add_stage(who, x, outputs_count=1)
"""


def test_an_extra_worker_that_starts_again_gets_no_answer_to_an_older_call(tmp_path: Path) -> None:
    write_servable(tmp_path, "lend", BORROWER)
    config = replace(ServableConfig(tmp_path, "lend"), num_parallel_workers=2)
    with running(config) as here:

        def extra() -> int:
            for pid in workers():
                with contextlib.suppress(psutil.Error):  # it may end just now
                    if "--device_id=extra0" in psutil.Process(pid).cmdline():
                        return pid
            return 0

        eventually(lambda: extra() in [reply["pid"] for reply in ask(here.http, "lend", "pid", 0, 0)["instances"]])
        old = extra()
        # One on each worker; the model runs on the device's, for both. Their callers leave, so they are not replayed.
        leaving = [post(here.http, "lend", "predict", 1.5) for _ in range(2)]
        eventually(lambda: in_flight(here.http) == 2)
        time.sleep(0.3)
        os.kill(old, signal.SIGKILL)
        for connection in leaving:
            connection.close()
        eventually(lambda: extra() not in (0, old) and list(states(here.http).values()) == ["ready", "ready"])
        answers = crowd(lambda i: ask(here.http, "lend", "predict", i / 100), 4)
        assert [answer["instances"][0]["y"] for answer in answers] == pytest.approx([0, 0.1, 0.2, 0.3])
