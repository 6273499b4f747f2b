"""Models of an extra worker: their rows run on a device worker, by way of the server."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

from inflight.contract import Outcome
from inflight.link import ModelOffer
from inflight.pipeline import Job, ModelPort, Pipeline

SendCall = Callable[[str, int, "list[tuple[int, list[object], int]]"], None]
"""Model, sub-graph, and number, row and instance key (0: a call from user code) of each row."""


class RemoteModel(ModelPort):
    """Sends each row out as a numbered call and takes the outcome back by that number."""

    _numbers = itertools.count(1)
    _waiting: dict[int, tuple[RemoteModel, Job]] = {}
    _lock = threading.Lock()

    def __init__(self, offer: ModelOffer, send_call: SendCall) -> None:
        self._key = offer.key
        self._send = send_call
        self._pipeline: Pipeline | None = None
        self.batch_size = offer.batch_size
        self.counts = tuple((len(graph.inputs), len(graph.outputs)) for graph in offer.graphs)

    def bind(self, pipeline: Pipeline, alone: bool) -> None:
        self._pipeline = pipeline

    def put(self, jobs: Sequence[Job]) -> None:
        calls: dict[int, list[tuple[int, list[object], int]]] = {}
        for job in jobs:
            called, subgraph = job.method.hidden, job.method.subgraph
            for index, row in enumerate(job.inputs(job.stage)):
                number = next(self._numbers)
                with self._lock:
                    self._waiting[number] = (self, job.part(index, index + 1))
                calls.setdefault(subgraph, []).append((number, list(row), 0 if called else job.keys[index]))
        for subgraph, items in calls.items():
            self._send(self._key, subgraph, items)

    def close(self) -> None:
        self._pipeline = None

    @classmethod
    def answered(cls, outcomes: Sequence[tuple[int, Outcome]]) -> None:
        """Hands outcomes of calls to the jobs that wait for them."""
        for number, outcome in outcomes:
            with cls._lock:
                entry = cls._waiting.pop(number, None)
            if entry is not None:
                port, job = entry
                if port._pipeline is not None:
                    port._pipeline.finished([job], [outcome])
