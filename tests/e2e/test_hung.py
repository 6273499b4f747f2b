"""A worker that is at one call for too long is replaced; who was late is told so, and nobody else notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from inflight.client import Client
from inflight.config import ServableConfig, ServerConfig
from tests.e2e.running import (
    METHODS,
    Background,
    Running,
    ask,
    crowd,
    eventually,
    request,
    running,
    states,
    workers,
    write_servable,
)
from tests.e2e.test_server import oip_grpc

LIMIT = 2.0
"""Seconds of execution: long enough for a machine that is busy with other things, for what ends at all."""

LATE = f"ran for more than {LIMIT:g} seconds on this instance, its execution timeout; its worker was ended"

HANGS = (
    """
    import os, re, threading, time
    import numpy as np
    from inflight.servable import add_stage, declare_model, register_method

    SPIN, SLEEP, LOCK, MATCH = 1, 2, 3, 4

    def hang(kind):
        kind = int(kind)
        if kind == SPIN:
            sum(range(10 ** 15))  # in C, with the interpreter's lock
        if kind == SLEEP:
            time.sleep(10 ** 6)
        if kind == LOCK:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        if kind == MATCH:
            re.match("(a+)+$", "a" * 60 + "b")
        if kind == 10:
            time.sleep(0.8)
        if kind == 11:
            time.sleep(2.5)
        return np.int64(kind)

    def single(kind):
        return hang(kind)

    def batched(instances):
        return [hang(kind) for (kind,) in instances]

    def model(kinds):
        return np.array([hang(kind) for kind in kinds])

    declared = declare_model(model, "callable", max_batch_size=1)

    def calls(kind):
        return declared.call(kind)

    def calls_thrice(kind):
        return declared.call([[kind], [kind], [kind]])[0][0]

    def models(kinds):
        return np.array([hang(kind) for kind in kinds])

    crowded = declare_model(models, "callable", max_batch_size=8)

    def calls_with_others(kind):
        return crowded.call(kind)

    def pid(x):
        return os.getpid()

    @register_method(output_names=["y"])
    def call_with_others(x):
        return add_stage(calls_with_others, x, outputs_count=1)

    @register_method(output_names=["y"])
    def call_thrice(x):
        return add_stage(calls_thrice, x, outputs_count=1)

    @register_method(output_names=["y"], execution_timeout=0)
    def patient(x):
        return add_stage(single, x, outputs_count=1)
"""
    + METHODS
)

WITH_OTHERS = (10, 20, 21, 22, 2, 23)

ONLY_A_MODEL = """
    import time
    from inflight.servable import add_stage, declare_model, register_method

    def model(x):
        time.sleep(10 ** 6 if x.max() > 1 else float(x.max()))
        return x

    declared = declare_model(model, "callable", max_batch_size=1)

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(declared, x, outputs_count=1)
"""


@dataclass
class Hung:
    """A server, and requests that went to it together: most of them hang, each on a worker of its own.

    Attributes:
        before: its workers then.
        replaced: how many of those must be ended.
    """

    here: Running
    logs: Path
    before: list[int]
    replaced: int
    answers: dict[str, list[Background]]


def by_grpc(address: str) -> Any:
    with Client(address, "model", "predict", timeout=60) as client:
        return client.infer({"x": np.float32(9)})


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hung]:
    directory, logs = tmp_path_factory.mktemp("servables"), tmp_path_factory.mktemp("logs")
    for name in ("functions", "models", "batches", "together", "shared"):
        write_servable(directory, name, HANGS)
    write_servable(directory, "model", ONLY_A_MODEL)
    limited = ServableConfig(directory, "", device_ids=(0, 1, 2), execution_timeout=LIMIT)
    servables = [replace(limited, name=name) for name in ("functions", "models", "model")]
    servables += [replace(limited, name=name, device_ids=(0,)) for name in ("batches", "together")]
    servables.append(replace(limited, name="shared", device_ids=(0,), num_parallel_workers=2))
    with running(*servables, config=ServerConfig(log_dir=logs)) as here:
        ask(here.http, "together", "call_with_others", 20)  # now it is known that the function calls a model
        before = workers()
        body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [9.0]}]}).encode()
        answers = {
            "function": [Background(ask, here.http, "functions", "function", kind) for kind in (1, 2, 3)],
            "stage": [Background(ask, here.http, "models", "stage", kind) for kind in (1, 4)],
            "call": [Background(ask, here.http, "models", "call", 2)],
            "gRPC": [Background(by_grpc, here.grpc)],
            "OIP REST": [Background(request, here.http, "POST", "/v2/models/model/infer", body)],
            "OIP gRPC": [Background(oip_grpc, here.grpc, "model", 9.0)],
            "batch": [Background(ask, here.http, "batches", "batch", *[2 if i == 3 else 20 + i for i in range(6)])],
            # The last ones wait for the model while it is busy with the first, and run together.
            "call_with_others": [Background(ask, here.http, "together", "call_with_others", *WITH_OTHERS)],
            # A stage on each of two workers waits for the model, which is on one of them, for longer than its limit.
            "call_thrice": [Background(ask, here.http, "shared", "call_thrice", 10) for _ in range(2)],
        }
        # The batch hangs twice: with its neighbours and alone.
        yield Hung(here, logs, before, 3 + 2 + 1 + 3 + 1 + 1, answers)


def error_of(answer: Any) -> str:
    return str(answer["error_msg"] if "error_msg" in answer else answer["instances"][0]["error_msg"])


def test_whatever_hangs_is_ended_and_its_caller_is_told(hung: Hung) -> None:
    others = crowd(lambda i: ask(hung.here.http, "functions", "function", 20 + i), 12)
    assert [other["instances"] for other in others] == [[{"y": 20 + i}] for i in range(12)]
    for kind in ("function", "stage", "call"):
        for one in hung.answers[kind]:
            assert LATE in error_of(one.result())


def test_the_log_says_where_it_hung(hung: Hung) -> None:
    for one in hung.answers["function"]:
        one.result()
    text = "".join(file.read_text() for file in hung.logs.glob("log_functions_*"))
    assert text.count("most recent call first") >= 3
    assert "in hang" in text


def test_every_door_tells_of_it_in_its_own_form(hung: Hung) -> None:
    """Of a servable that is one model: the thread that reads its channel is the one that hangs."""
    assert LATE in str(hung.answers["gRPC"][0].result())
    status, answer = hung.answers["OIP REST"][0].result()
    assert status == 504
    assert LATE in json.loads(answer)["error"]
    with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
        hung.answers["OIP gRPC"][0].result()
    assert ask(hung.here.http, "model", "predict", 0.5) == {"instances": [{"y": 0.5}]}


def test_a_batch_that_hangs_is_run_again_one_by_one(hung: Hung) -> None:
    answer = hung.answers["batch"][0].result()["instances"]
    assert [one for i, one in enumerate(answer) if i != 3] == [{"y": 20 + i} for i in range(6) if i != 3]
    assert LATE in answer[3]["error_msg"]


def test_of_calls_that_share_a_run_only_the_one_that_hangs_is_late(hung: Hung) -> None:
    answer = hung.answers["call_with_others"][0].result()["instances"]
    assert [one.get("y") for one in answer] == [kind if kind != 2 else None for kind in WITH_OTHERS]
    assert LATE in answer[4]["error_msg"]


def test_waiting_is_not_executing(hung: Hung) -> None:
    """For another worker's model; for one's turn among calls that are short; and where a method has no limit."""
    assert [one.result() for one in hung.answers["call_thrice"]] == [{"instances": [{"y": 10}]}] * 2
    patient = Background(ask, hung.here.http, "functions", "patient", 11)
    assert ask(hung.here.http, "model", "predict", *[0.75] * 9) == {"instances": [{"y": 0.75}] * 9}
    assert patient.result() == {"instances": [{"y": 11}]}


def test_only_what_hung_was_replaced(hung: Hung) -> None:
    for answers in hung.answers.values():
        for one in answers:
            eventually(lambda one=one: one.done, 60)  # type: ignore[misc]
    eventually(lambda: set(states(hung.here.http).values()) == {"ready"})
    assert len(set(hung.before) - set(workers())) == hung.replaced
    assert len(workers()) == len(hung.before)
