"""Moves jobs from stage to stage inside one worker.

Python stages run one at a time, on the thread that calls `run_functions` (the worker's main thread) and, while one
waits in `Model.call`, on further ones (crew.py). Every model has a thread of its own, so a model runs one batch while
Python prepares the next. A servable that is one model and nothing else needs no second thread: the thread that reads
the jobs calls `run_waiting`. A request then takes 0.95 of the processor time (`python -m bench.classic --only
add-rest`, 16 connections), and 0.77 at one connection.
"""

from __future__ import annotations

import inspect
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from inflight.contract import Outcome, Row, Table, chain
from inflight.errors import InflightError, InvalidRequest
from inflight.link import Board, Runner
from inflight.pipeline.batcher import BatchedModel
from inflight.pipeline.crew import Crew, Member
from inflight.pipeline.functions import At, run_stage
from inflight.pipeline.job import Job, Submission, kept_inputs
from inflight.pipeline.queue import Batch, StageQueue
from inflight.servable import MethodSpec, ServableSpec, StageSpec

Measure = Callable[[str, str, int, float, int], None]
"""Called for every run of a stage: method, stage label, instances in one run, seconds of one run, number of such
runs."""

Runs = list[tuple[int, float, int]]
"""Each: instances in one run, its seconds, the number of such runs."""

Run = Callable[["Batch", "list[Job]"], "tuple[Sequence[Outcome], Runs]"]
"""Runs the given jobs of a batch; gives the outcomes of all their instances, in order."""


class ModelPort(ABC):
    """The place where the rows of one model run: this process, or another worker by way of the server."""

    batch_size: int
    counts: tuple[tuple[int, int], ...]
    """Numbers of inputs and outputs of each sub-graph; (0, 0) if the back end does not know them."""

    @abstractmethod
    def bind(self, pipeline: Pipeline, alone: bool) -> None:
        """Called once, before any `put`; `alone`: jobs run only when `run_waiting` is called."""

    @property
    def here(self) -> bool:
        """Whether the calling thread is the only one that runs this model."""
        return False

    @abstractmethod
    def put(self, jobs: Sequence[Job]) -> None:
        """Takes jobs whose next stage is this model; hands them to `pipeline.finished` later."""

    @abstractmethod
    def close(self) -> None: ...


class LocalModel(ModelPort):
    """A model of this process, with its queue and its thread."""

    def __init__(self, key: str, model: BatchedModel) -> None:
        self._key = key
        self._model = model
        self.own_threads = model.model.own_threads
        self._queue = StageQueue()
        self._pipeline: Pipeline | None = None
        self._threads: list[int | None] = []
        self.batch_size = model.batch_size
        self.counts = tuple((len(graph.inputs), len(graph.outputs)) for graph in model.model.graphs)

    def bind(self, pipeline: Pipeline, alone: bool) -> None:
        self._pipeline = pipeline
        for method in pipeline.all_methods():
            for stage in method.stages:
                if stage.kind == "model" and stage.key == self._key:
                    self._queue.add_lane(method.name, stage, self.batch_size, method.max_wait_ms / 1000)
        first = self._lane(self._model)
        self._alone = first
        if alone:
            return
        # A model that takes several batches at once has for each thread its own way to it.
        others = [self._lane(BatchedModel(self._model.spec, self._model.model)) for _ in range(1, self.own_threads)]
        for lane in (first, *others):
            thread = threading.Thread(target=self._run, args=(lane,), name=f"model-{self._key}", daemon=True)
            thread.start()
            self._threads.append(thread.ident)

    def _lane(self, model: BatchedModel) -> _Lane:
        assert self._pipeline is not None
        runner = self._pipeline.board.runner()
        model.began = runner.again
        return _Lane(model, runner)

    @property
    def here(self) -> bool:
        return self._threads == [threading.get_ident()]

    def run_waiting(self) -> tuple[bool, float | None]:
        """Runs one batch on this thread if one is due: whether it did, and else the seconds until one is."""
        batch, due = self._queue.poll()
        if batch is None or self._pipeline is None:
            return False, due
        self._pipeline.run_batch(batch, self._alone.outcomes, self._alone.runner)
        return True, None

    def put(self, jobs: Sequence[Job]) -> None:
        self._queue.put(jobs)

    def close(self) -> None:
        self._queue.close()

    def _run(self, lane: _Lane) -> None:
        pipeline = self._pipeline
        assert pipeline is not None
        while (batch := self._queue.take()) is not None:
            pipeline.run_batch(batch, lane.outcomes, lane.runner)
        self._model.model.close()


@dataclass(frozen=True)
class _Lane:
    """One thread's way to a model, and its part of the board."""

    model: BatchedModel
    runner: Runner

    def outcomes(self, batch: Batch, jobs: list[Job]) -> tuple[Sequence[Outcome], Runs]:
        outcomes = self.model.run(chain([job.inputs(batch.stage) for job in jobs]), jobs[0].method.subgraph)
        runs: Runs = [(count, seconds, 1) for count, seconds in self.model.runs]
        self.model.runs.clear()
        return outcomes, runs


class Pipeline:
    """All stages of one servable in one worker.

    Args:
        spec: the traced servable.
        models: a port for every model of the spec.
        measure: called for every batch that ran.
        flush: called after each batch, when some outcomes were handed to their jobs' `finish`.
        board: where runners write down what they run; None: they are not watched.
    """

    def __init__(
        self,
        spec: ServableSpec,
        models: dict[str, ModelPort],
        measure: Measure,
        flush: Callable[[], None],
        board: Board | None = None,
    ) -> None:
        self.board = board or Board()
        self.spec = spec
        self.models = models
        self._measure = measure
        self._flush = flush
        self._functions = StageQueue()
        self._crew = Crew(self._functions, self._run_stage, self.board.runner)
        self._kept: dict[tuple[str, int], tuple[bool, ...]] = {}
        self._texts = {key: function.texts for key, function in spec.functions.items()}
        self.hidden = {
            (key, subgraph): hidden_method(key, subgraph)
            for key, port in models.items()
            for subgraph in range(len(port.counts))
        }
        self.batch_size = max([1, *(port.batch_size for port in models.values()), *self._function_batches()])
        for method in spec.methods.values():
            for stage in method.stages:
                if stage.kind == "function":
                    limit = self._function_limit(method, stage)
                    self._functions.add_lane(method.name, stage, limit, method.max_wait_ms / 1000)
                    self._kept[method.name, stage.index] = self._kept_inputs(method, stage)
        self.only_model = self._only_model()
        for port in models.values():
            port.bind(self, self.only_model is not None)

    def all_methods(self) -> Iterable[MethodSpec]:
        """The declared methods and the hidden one of every sub-graph."""
        yield from self.spec.methods.values()
        yield from self.hidden.values()

    def _only_model(self) -> LocalModel | None:
        """The only runner of this servable, if that is a model."""
        functions = any(method.has_function_stage for method in self.spec.methods.values())
        ports = list(self.models.values())
        if functions or len(ports) != 1 or not isinstance(ports[0], LocalModel) or ports[0].own_threads:
            return None
        return ports[0]

    def submit(self, jobs: Sequence[Job]) -> None:
        """Sends jobs to the queue of their next stage; a job without one is finished."""
        ports: dict[str, list[Job]] = {}
        functions: list[Job] = []
        done = False
        for job in jobs:
            if job.done:
                job.finish()
                done = True
            elif job.stage.kind == "function":
                functions.append(job)
            else:
                ports.setdefault(job.stage.key, []).append(job)
        for key, waiting in ports.items():
            self.models[key].put(waiting)
        if functions:
            self._functions.put(functions)
            self._crew.notice()
        if done:
            self._flush()

    def run_functions(self) -> None:
        """Runs Python stages on the calling thread, and on others while they wait for models, until the pipeline is
        closed."""
        self._crew.work()

    def run_batch(self, batch: Batch, run: Run, runner: Runner) -> None:
        """Runs a batch with `run` and moves its jobs on; `runner` is the calling thread's part of the board."""
        jobs = self._still_wanted(batch.jobs)
        if jobs:
            runner.begin(_running(jobs))
            outcomes, runs = run(batch, jobs)
            runner.end()
            for size, seconds, count in runs:
                self._measure(jobs[0].method.name, batch.stage.key, size, seconds, count)
            self.finished(jobs, outcomes)
        else:
            self._flush()

    def finished(self, jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
        """Jobs whose current stage has run, and the outcomes of their instances, in order: those that failed end here,
        the others go on."""
        going: list[Job] = []
        start = 0
        for job in jobs:
            rows = outcomes if len(jobs) == 1 else outcomes[start : start + len(job)]
            start += len(job)
            failed = _errors(rows)
            if failed:
                rows = [row for index, row in enumerate(rows) if index not in failed]
            job = job.without(failed)
            if len(job):
                job.advance(rows)  # type: ignore[arg-type]  # the errors are not among them
                going.append(job)
        if sum(map(len, going)) < start:
            self._flush()
        if going:
            self.submit(going)

    def call(self, key: str, subgraph: int, rows: Sequence[Row]) -> list[Outcome]:
        """Runs model rows for a Python stage (`Model.call`) and waits for them.

        Called on a thread of the crew, whose turn then goes to another stage unless the method forbids that, or on any
        thread of user code, but never on a model's own. The stage's own time stands still meanwhile: the model's
        counts, and that may be on another worker, which is started again, say.
        """
        method = self.hidden.get((key, subgraph))
        if method is None:
            raise InvalidRequest(f"the model '{key}' has no sub-graph {subgraph}")
        if self.models[key].here:
            raise InvalidRequest(f"the model '{key}' calls itself, and would wait for its own end")
        if not rows:
            return []
        me = self._crew.here()
        runner = (me or self._crew.current).runner
        wait, answered = self._turns(me) if me is not None else _blocking()
        # Other stages run meanwhile, and may fill the same buffer.
        rows = [[value.copy() if isinstance(value, np.ndarray) else value for value in row] for row in rows]
        outcomes: dict[int, Outcome] = {}
        one = threading.Lock()  # threads of a model may end parts of the call at the same time

        def finish(_: Submission, keys: Sequence[int], results: Sequence[Outcome]) -> None:
            with one:
                outcomes.update(zip(keys, results))
                whole = len(outcomes) == len(rows)
            if whole:
                answered()

        keys = range(0, -len(rows), -1)  # no numbers of the server's: those are above 0
        submission = Submission(method, keys, finish, callers=runner.keys)
        runner.wait()
        try:
            self.submit([Job(submission, keys, [rows])])
            wait()
        finally:
            runner.resume()
        return [outcomes[key] for key in keys]

    def _turns(self, me: Member) -> tuple[Callable[[], None], Callable[[], None]]:
        """How a stage waits for its call, and how it learns of the answer."""
        batch = me.batch
        if batch is None or batch.jobs[0].method.exclusive:
            return _blocking()
        if batch.stage.batch_size is None:
            # It calls models: from now on each instance runs on its own, so that the next one need not wait for it.
            self._functions.limit(batch.jobs[0].method.name, batch.stage.index, 1)
        return partial(self._crew.wait, me), partial(self._crew.answered, me)

    def close(self) -> None:
        self._crew.close()
        for port in self.models.values():
            port.close()

    def _run_stage(self, batch: Batch, member: Member) -> None:
        self.run_batch(batch, partial(self._run_function, member.runner.at), member.runner)

    def _run_function(self, at: At, batch: Batch, jobs: list[Job]) -> tuple[Sequence[Outcome], Runs]:
        stage = batch.stage
        function = self.spec.functions[stage.key]
        method = jobs[0].method
        kept, texts = self._kept[method.name, stage.index], self._texts[stage.key]
        count = sum(map(len, jobs))

        def inputs(first: int) -> list[list[Any]]:
            rows: list[list[Any]] = []
            for job in jobs:
                skipped = min(first, len(job))
                first -= skipped
                if skipped == len(job):
                    continue
                rest = job.part(skipped, len(job)) if skipped else job
                rows += (
                    rest.shared_inputs(stage) if method.mindspore_values else rest.editable_inputs(stage, kept, texts)
                )
            return rows

        start = time.perf_counter()
        outcomes = run_stage(function, method, stage, inputs, count, at)
        seconds = time.perf_counter() - start
        if stage.batch_size is None:
            return outcomes, [(1, seconds / count, count)]
        return outcomes, [(count, seconds, 1)]

    def _kept_inputs(self, method: MethodSpec, stage: StageSpec) -> tuple[bool, ...]:
        """For each input of a function, whether the function gets a copy."""
        if stage.batch_size is not None and inspect.isgeneratorfunction(self.spec.functions[stage.key].function):
            # After a failure it is called again with the instances behind it, which it may have edited already.
            return (True,) * len(stage.inputs)
        return kept_inputs(method, stage)

    def _still_wanted(self, jobs: list[Job]) -> list[Job]:
        """The jobs without the instances that were dropped or are late: those are finished here."""
        now = time.monotonic()
        wanted = []
        for job in jobs:
            submission = job.submission
            if submission.deadlines is not None or submission.dropped:
                ended = enumerate(submission.ended(key, now) for key in job.keys)
                job = job.without({index: error for index, error in ended if error is not None})
            if len(job):
                wanted.append(job)
        return wanted

    def _function_batches(self) -> list[int]:
        return [
            stage.batch_size
            for method in self.spec.methods.values()
            for stage in method.stages
            if stage.kind == "function" and stage.batch_size
        ]

    def _function_limit(self, method: MethodSpec, stage: StageSpec) -> int:
        """How many instances a Python stage takes at once.

        `batch_size=0` leaves it to the server: before the models, the smallest batch among them, so that the first
        model need not wait for all; after them, the largest; 1 without models.
        """
        if stage.batch_size:
            return stage.batch_size
        if stage.batch_size is None:
            return self.batch_size
        sizes = [self.models[other.key].batch_size for other in method.stages if other.kind == "model"]
        if not sizes:
            return 1
        first = all(ref.stage == 0 for ref in stage.inputs)
        return min(sizes) if first else max(sizes)


def _running(jobs: Sequence[Job]) -> Sequence[int]:
    """The keys of the instances in whose time jobs run."""
    if len(jobs) == 1:
        return jobs[0].submission.callers or jobs[0].keys
    return [key for job in jobs for key in job.submission.callers or job.keys]


def _blocking() -> tuple[Callable[[], None], Callable[[], None]]:
    """How a thread waits for a call without letting another stage run, and how it learns of the answer."""
    gate = threading.Event()

    def wait() -> None:
        gate.wait()

    return wait, gate.set


def _errors(outcomes: Sequence[Outcome]) -> dict[int, InflightError]:
    """The errors among outcomes, by index."""
    if type(outcomes) is Table:
        return {}
    return {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, InflightError)}


def hidden_method(key: str, subgraph: int) -> MethodSpec:
    """The method that runs one sub-graph of a model on rows as they come; clients cannot reach it."""
    stage = StageSpec(index=1, kind="model", key=key, inputs=(), outputs_count=0, batch_size=None, tag=f"Model '{key}'")
    name = f"@call_{key}_{subgraph}"
    return MethodSpec(name, inputs=(), outputs=(), stages=(stage,), returns=(), hidden=True, subgraph=subgraph)
