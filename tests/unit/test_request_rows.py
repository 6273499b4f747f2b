"""The rows of one request: they run, fail and are dropped one by one, whatever they travel with."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflight.contract import Array, Outcome, Result, Table
from inflight.errors import Cancelled, DeadlineExceeded, InflightError, ModelError
from inflight.link import frames, parts
from inflight.router import replica as replica_module
from inflight.router.request import Request, spans
from inflight.servable import add_stage, declare_model, register_method
from tests.unit.pipelines import Double, Running


class Holder:
    """Remembers which instances it was told to drop."""

    def __init__(self) -> None:
        self.dropped: list[int] = []

    def drop(self, keys: list[int]) -> None:
        self.dropped += keys


def request(rows: Sequence[Any], results: list[Result]) -> Request:
    return Request(0, rows, None, lambda _, result: results.append(result))


@given(st.permutations(range(6)), st.sets(st.integers(1, 5)), st.integers(0, 6))
def test_outcomes_come_back_in_order_in_whatever_parts(order: list[int], cuts: set[int], failed: int) -> None:
    table = Table([np.arange(12).reshape(6, 2)])
    results: list[Result] = []
    whole = request(table, results)
    borders = [0, *sorted(cuts), 6]
    parts = list(itertools.pairwise(borders))
    error = ModelError("no")
    for number in order:
        if number < len(parts):
            first, last = parts[number]
            assert not results
            outcomes: Sequence[Outcome] = table[first:last]
            if first <= failed < last:
                outcomes = [error if first + at == failed else row for at, row in enumerate(outcomes)]
            whole.settle(first, outcomes)
    (result,) = results
    assert not isinstance(result, InflightError)
    assert isinstance(result, Table) == (failed == 6)
    for index, outcome in enumerate(result):
        if index == failed:
            assert outcome is error
        else:
            assert not isinstance(outcome, InflightError)
            assert np.array_equal(outcome[0], [2 * index, 2 * index + 1])  # type: ignore[arg-type]


def test_neighbours_of_a_request_are_taken_together() -> None:
    one, other = request([[1], [2], [3]], []), request([[4], [5]], [])
    instances = [*one.instances[1:], *other.instances, one.instances[0]]
    assert spans(instances) == [(one, 1, 3), (other, 0, 2), (one, 0, 1)]


def test_an_instance_in_a_queue_does_not_keep_the_rows_of_a_request_that_was_dropped() -> None:
    column: Array = np.ones((3, 2))
    alive = weakref.ref(column)
    results: list[Result] = []
    dropped = request(Table([column]), results)
    holder = Holder()
    queue = dropped.instances[1:]
    sent = dropped.instances[0]
    sent.replica, sent.key = holder, 7
    del column
    dropped.abandon()
    assert holder.dropped == [7]
    assert isinstance(results[0], Cancelled)
    assert all(instance.request.closed for instance in queue)
    del dropped
    gc.collect()
    assert alive() is not None, "the worker may still read what it has"
    del sent
    gc.collect()
    assert alive() is None


def test_instances_of_one_job_are_dropped_late_and_failed_one_by_one(running: Callable[..., Running]) -> None:
    model = Double()

    def body() -> None:
        declared = declare_model("double.onnx", "onnx")

        @register_method(output_names=["y"])
        def method(x: Any) -> Any:
            return add_stage(declared, x, outputs_count=1)

    server = running(body, {"double.onnx": model})
    late = time.monotonic() - 1
    soon = time.monotonic() + 60
    rows = Table([np.array([[0, 0], [1, 1], [-1, -1], [3, 3], [4, 4]], np.float32)])
    job, outcomes = server.jobs("method", rows, deadlines=[soon, late, soon, soon, soon])
    job.submission.dropped.add(3)
    server.finish(job, outcomes)
    assert isinstance(outcomes[1], DeadlineExceeded)
    assert "minus one" in str(outcomes[2])
    assert isinstance(outcomes[3], Cancelled)
    for index in (0, 4):
        outcome = outcomes[index]
        assert not isinstance(outcome, InflightError)
        assert np.array_equal(outcome[0], [2 * index, 2 * index])  # type: ignore[arg-type]
    assert model.sizes == [3, 1, 1, 1], "one run of those that somebody waits for, then each of them alone"


def test_rows_of_one_form_run_together_whatever_they_came_in(running: Callable[..., Running]) -> None:
    model = Double()

    def body() -> None:
        declared = declare_model("double.onnx", "onnx", max_batch_size=4)

        @register_method(output_names=["y"])
        def method(x: Any) -> Any:
            return add_stage(declared, x, outputs_count=1)

    server = running(body, {"double.onnx": model})
    table, outcomes = server.jobs("method", Table([np.arange(10, dtype=np.float32).reshape(5, 2)]))
    rows, others = server.jobs("method", [[np.full(2, 7, np.float32)]])
    server.pipeline.submit([table, rows])
    server.finish(table, outcomes, submitted=True)
    server.finish(rows, others, submitted=True)
    assert model.sizes == [4, 2]
    assert [outcome[0].tolist() for outcome in (*outcomes.values(), *others.values())] == [  # type: ignore[union-attr,index]
        *(np.arange(10).reshape(5, 2) * 2).tolist(),
        [14, 14],
    ]


def test_instances_for_another_machine_are_divided_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, whatever request they are of; what fits no frame fails alone, and ends a request that has no other."""
    monkeypatch.setattr(replica_module, "MAX_VALUES", 1000)
    monkeypatch.setattr(replica_module, "parts", partial(parts, most=100))
    monkeypatch.setattr(replica_module, "frames", partial(frames, most=100))
    results: list[Result] = []
    sizes = [(60, 60, 30), (2000,), (30, 0, 2000, 8)]
    made = [request([[bytes(size)] for size in of], results) for of in sizes]
    table = request(Table([np.zeros((3, 10), np.float32)]), results)
    instances = [instance for each in (*made, table) for instance in each.instances]
    groups = [list(some) for some in replica_module._framed(instances)]
    large = {3, 6}
    wanted = [instance for at, instance in enumerate(instances) if at not in large]
    assert [instance for some in groups for instance in some] == wanted
    assert [len(some) for some in groups] == [1, 2, 3, 2, 1]  # of 60, 90, 38, 80 and 40 bytes
    (result,) = results
    assert not isinstance(result, InflightError)
    (failed,) = result  # the second request had nothing else
    assert "an instance of 2000 bytes cannot be sent to a worker on another machine" in str(failed)
    (index,) = made[2].outcomes
    assert index == 2
