"""Pipelines without a process around them, for the tests of what one worker does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from inflight.contract import Array, Outcome, Row, TensorSpec
from inflight.pipeline import BatchedModel, Job, LocalModel, Pipeline, Submission
from inflight.runtime import GraphSpec, LoadedModel
from inflight.servable import Registry, tracing


class Double(LoadedModel):
    """y = 2x over [batch, 2]; remembers its batches; fails on rows that hold -1."""

    device_type = "cpu"

    def __init__(self, batch: int = -1, delay: float = 0.0) -> None:
        self.graphs = (GraphSpec((TensorSpec("x", "float32", (batch, 2)),), (TensorSpec("y", "float32", (batch, 2)),)),)
        self.sizes: list[int] = []
        self.delay = delay

    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        (x,) = inputs
        self.sizes.append(len(x))
        if (x == -1).any():
            raise ValueError("minus one")
        time.sleep(self.delay)
        return [x * 2]


def trace(body: Callable[[], None]) -> Registry:
    with tracing("demo", Path("/demo"), "demo") as registry:
        body()
    return registry


class Running:
    """A pipeline with its main loop on a thread; `run` waits for all outcomes."""

    def __init__(self, body: Callable[[], None], models: dict[str, LoadedModel] | None = None) -> None:
        spec = trace(body).spec()
        ports = {key: LocalModel(key, BatchedModel(spec.models[key], model)) for key, model in (models or {}).items()}
        self.measured: list[tuple[str, str, int]] = []
        self.pipeline = Pipeline(spec, dict(ports), self._measure, lambda: None)
        self._thread = threading.Thread(target=self.pipeline.run_functions)
        self._thread.start()

    def _measure(self, method: str, stage: str, size: int, seconds: float, count: int) -> None:
        self.measured += [(method, stage, size)] * count

    def jobs(
        self, method: str, rows: Sequence[Row], deadlines: Sequence[float] | None = None
    ) -> tuple[Job, dict[int, Outcome]]:
        outcomes: dict[int, Outcome] = {}

        def finish(_: Submission, keys: Sequence[int], results: Sequence[Outcome]) -> None:
            assert not outcomes.keys() & keys, "finished twice"
            outcomes.update(zip(keys, results, strict=True))

        keys = range(len(rows))
        spec = self.pipeline.spec.methods[method]
        return Job(Submission(spec, keys, finish, deadlines), keys, [rows]), outcomes

    def run(self, method: str, rows: Sequence[Row]) -> list[Outcome]:
        job, outcomes = self.jobs(method, rows)
        self.finish(job, outcomes)
        return [outcomes[index] for index in range(len(rows))]

    def finish(self, job: Job, outcomes: dict[int, Outcome], submitted: bool = False) -> None:
        """Submits a job, unless that is done already, and waits for all outcomes."""
        if not submitted:
            self.pipeline.submit([job])
        deadline = time.monotonic() + 20
        while len(outcomes) < job.submission.left:
            assert time.monotonic() < deadline, "jobs were lost"
            if self.pipeline.only_model is None or not self.pipeline.only_model.run_waiting()[0]:
                time.sleep(0.001)

    def close(self) -> None:
        self.pipeline.close()
        self._thread.join(5)
        assert not self._thread.is_alive()
