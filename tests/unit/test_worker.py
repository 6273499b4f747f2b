"""One worker in this process: what it answers to the messages of a server, which the tests play."""

from __future__ import annotations

import faulthandler
import gc
import os
import queue
import signal
import socket
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.config import AdapterConfig, GeneratorConfig
from inflight.contract import Row, TensorSpec, Value
from inflight.errors import InflightError
from inflight.link import (
    LARGE,
    AdapterReady,
    AnyMessage,
    Arena,
    ArenaReader,
    Call,
    CallDone,
    CallOutcome,
    Done,
    DropAdapter,
    Failed,
    GraphOffer,
    LoadAdapter,
    LoadShard,
    ModelOffer,
    Offer,
    Packer,
    Phase,
    Ready,
    Stop,
    Trial,
    Unpacker,
    Work,
    WorkerChannel,
    WorkerJob,
    create_file,
    frames,
    parts,
)
from inflight.place import DUMP, shard_job
from inflight.worker import elsewhere, process, shard
from inflight.worker.load import Hooks, load
from inflight.worker.process import Worker
from tests.conftest import binary_model, floats

ARENA = 1 << 26
M = TypeVar("M")

JOB = WorkerJob(
    directory="/nowhere",
    name="demo",
    version=0,
    model_file=None,
    max_batch_size=None,
    device_id=0,
    device_type=None,
    own_models=True,
    threads=1,
    dec_key=None,
    dec_mode="AES-GCM",
    models=[],
    runtimes=None,
)

STAGES = """
    from inflight.servable import add_stage, declare_model, register_method

    def double(x):
        if x.size and x.flat[0] == -1:
            raise ValueError("minus one")
        return x * 2

    class Ten:
        def __call__(self, x):
            return x * 10

    model = declare_model(Ten())

    @register_method(output_names=["y"])
    def doubled(x):
        return add_stage(double, x, outputs_count=1)

    @register_method(output_names=["y"])
    def tenfold(x):
        return add_stage(model, add_stage(double, x, outputs_count=1), outputs_count=1)

    @register_method(output_names=["n"])
    def complex_numbers(x):
        return add_stage(lambda x: x.astype("complex64") if x > 0 else x, x, outputs_count=1)

    @register_method(output_names=["y"])
    def called(x):
        def call(x):
            return model.call(x)
        return add_stage(call, x, outputs_count=1)
"""


class Served:
    """A worker on a thread, and the server's end of its channel.

    Attributes:
        told: messages that came before it was ready.
    """

    def __init__(self, job: WorkerJob) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        inbox, outbox = create_file("inbox", ARENA), create_file("outbox", ARENA)
        self.inbox = Arena(inbox)
        self.released: list[int] = []
        self.channel = WorkerChannel(ours, ArenaReader(outbox, self.released.append))
        self.outbox = Arena(os.dup(outbox))
        self._theirs = WorkerChannel(theirs, ArenaReader(inbox))
        self.worker = Worker(self._theirs, self.outbox)
        self._next = 1
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()
        self.told: list[AnyMessage] = []
        while True:
            message = self.receive()[0]
            if isinstance(message, Ready):
                break
            self.told.append(message)
        self.offer: Offer = message.offer
        self.methods = [method.name for method in self.offer.methods]

    def _run(self, job: WorkerJob) -> None:
        self.worker.listen()
        self.worker.start(job)
        self.worker.serve()

    def receive(self) -> tuple[AnyMessage, Unpacker]:
        received = self.channel.receive()
        assert received is not None, "the worker ended"
        return received

    def expect(self, kind: type[M]) -> tuple[M, Unpacker]:
        message, values = self.receive()
        assert isinstance(message, kind), message
        return message, values

    def work(
        self, method: str, rows: Sequence[Sequence[Value]], seconds: list[float | None] | None = None, frees: Any = ()
    ) -> int:
        """Sends instances; their first number."""
        first, self._next = self._next, self._next + len(rows)
        packer = Packer(self.inbox)
        work = Work(self.methods.index(method), first, packer.rows([rows]), seconds, list(frees))
        assert self.channel.send(work, packer)
        return first

    def outcomes(self, count: int) -> dict[int, Row | tuple[str, str]]:
        """Of so many instances: the outputs, or kind and text of the error."""
        result: dict[int, Row | tuple[str, str]] = {}
        while len(result) < count:
            done, values = self.expect(Done)
            rows = zip(done.ids, values.rows(done.rows))
            errors = ((error.key, (error.kind, error.text)) for error in done.errors)
            for key, outcome in (*rows, *errors):
                assert key not in result, "answered twice"
                result[key] = outcome
        return result

    def run(self, method: str, rows: Sequence[Sequence[Value]], **more: Any) -> list[Row | tuple[str, str]]:
        first = self.work(method, rows, **more)
        outcomes = self.outcomes(len(rows))
        return [outcomes[first + index] for index in range(len(rows))]

    def stop(self) -> None:
        self.channel.send(Stop())
        self.join()
        self.channel.close()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the worker goes on"
        self._theirs.close()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker does to its process must not be done to this one."""
    monkeypatch.setattr(process, "kill_group", lambda: None)
    monkeypatch.setattr(process, "settle", lambda: None)


@pytest.fixture
def serve() -> Iterator[Callable[[WorkerJob], Served]]:
    served: list[Served] = []

    def start(job: WorkerJob) -> Served:
        served.append(Served(job))
        return served[-1]

    yield start
    for each in served:
        each.stop()


@pytest.fixture
def stages(servable: Callable[..., Path], serve: Callable[[WorkerJob], Served]) -> Served:
    return serve(job(servable("demo", STAGES)))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "add.onnx"
    path.write_bytes(binary_model(shape=(2,)))
    return path


def job(folder: Path, **changes: Any) -> WorkerJob:
    return msgspec.structs.replace(JOB, directory=str(folder), **changes)


def bare(path: Path, **changes: Any) -> WorkerJob:
    return job(path.parent, name="add", model_file=str(path), **changes)


def arrays(outcomes: Sequence[Row | tuple[str, str]]) -> list[Any]:
    for outcome in outcomes:
        assert not isinstance(outcome, tuple), outcome
    return [np.asarray(outcome[0]).tolist() for outcome in outcomes]


def test_what_it_offers(stages: Served) -> None:
    offer = stages.offer
    assert offer.own_models
    assert offer.version == 1
    declared = [method for method in offer.methods if not method.name.startswith("@")]
    assert [method.name for method in declared] == ["doubled", "tenfold", "complex_numbers", "called"]
    assert all(method.has_function_stage for method in declared)
    assert [tensor.name for tensor in declared[0].inputs] == ["x"]
    assert len(offer.models) == 1
    assert any(isinstance(message, Phase) for message in stages.told)


def test_a_bare_model_is_tried_and_then_described_without_its_batch(
    serve: Callable[[WorkerJob], Served], model_file: Path
) -> None:
    served = serve(bare(model_file, trial_seconds=20.0))
    trials = [message.running for message in served.told if isinstance(message, Trial)]
    assert trials
    assert trials == [True, False] * (len(trials) // 2)
    (method,) = (method for method in served.offer.methods if not method.name.startswith("@"))
    assert method.inputs == [TensorSpec("x1", "float32", (2,)), TensorSpec("x2", "float32", (2,))]
    assert method.outputs == [TensorSpec("y", "float32", (2,))]
    assert not method.whole
    assert arrays(served.run(method.name, [[floats(1, 2), floats(3, 4)]] * 3)) == [[4.0, 6.0]] * 3


def test_a_model_that_is_not_tried_takes_one_request_a_call(
    serve: Callable[[WorkerJob], Served], model_file: Path
) -> None:
    method = serve(bare(model_file)).offer.methods[0]
    assert method.whole
    assert method.inputs[0] == TensorSpec("x1", "float32", (-1, 2))


numbers = st.tuples(st.integers(0, 5) | st.just(LARGE // 8 + 1), st.integers(-1, 9))
messages = st.tuples(st.sampled_from([("doubled", 2), ("tenfold", 20)]), st.lists(numbers, min_size=1, max_size=5))


@settings(max_examples=25, deadline=None)
@given(sent=st.lists(messages, min_size=1, max_size=4))
def test_every_instance_is_answered_once_with_its_own_outcome(
    shared: Served, sent: list[tuple[tuple[str, int], list[tuple[int, int]]]]
) -> None:
    """Whatever their sizes, their methods, and how they are cut into messages."""
    wanted: dict[int, tuple[Any, int]] = {}
    for (method, factor), part in sent:
        rows = [[np.full(size, number, np.int64)] for size, number in part]
        first = shared.work(method, rows)
        wanted.update({first + index: (row[0], factor) for index, row in enumerate(rows)})
    outcomes = shared.outcomes(len(wanted))
    assert outcomes.keys() == wanted.keys()
    for key, (x, factor) in wanted.items():
        outcome = outcomes[key]
        if x.size and x[0] == -1:
            assert isinstance(outcome, tuple)
            assert outcome[0] == "ModelError"
            assert "minus one" in outcome[1]
        else:
            assert not isinstance(outcome, tuple), outcome
            assert np.array_equal(np.asarray(outcome[0]), x * factor)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("shared") / "demo"
    folder.mkdir()
    (folder / "servable_config.py").write_text(textwrap.dedent(STAGES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "kill_group", lambda: None)
        patch.setattr(process, "settle", lambda: None)
        served = Served(job(folder.parent))
        yield served
        served.stop()


def test_blocks_of_large_outputs_are_free_once_the_server_says_so(stages: Served) -> None:
    used = stages.outbox.in_use
    (outcome,) = stages.run("doubled", [[np.ones(LARGE)]])
    assert stages.outbox.in_use > used
    del outcome
    gc.collect()
    assert len(stages.released) == 1
    stages.run("doubled", [[np.ones(1)]], frees=stages.released)
    assert stages.outbox.in_use == used


def test_what_is_late_does_not_run(stages: Served) -> None:
    late, other = stages.run("doubled", [[np.ones(1)], [np.ones(1)]], seconds=[-1.0, None])
    assert late[0] == "DeadlineExceeded"
    assert arrays([other]) == [[2.0]]


def test_outputs_that_cannot_travel_fail_their_instance_alone(stages: Served) -> None:
    good, bad = stages.run("complex_numbers", [[np.array(-1.0)], [np.array(1.0)]])
    assert arrays([good]) == [-1.0]
    assert isinstance(bad, tuple)
    assert "complex64" in bad[1]


def test_a_stage_calls_a_model_of_the_same_worker(stages: Served) -> None:
    assert arrays(stages.run("called", [[np.arange(3)]] * 5)) == [[0, 10, 20]] * 5


EXTRA = [
    ModelOffer(
        key="net.onnx",
        graphs=[GraphOffer([TensorSpec("x", "float32", (-1, 2))], [TensorSpec("y", "float32", (-1, 2))])],
        batch_size=8,
        fixed=False,
        batched=True,
        unbatched_inputs=[],
    )
]


def test_an_extra_worker_has_its_models_rows_run_elsewhere(
    servable: Callable[..., Path], serve: Callable[[WorkerJob], Served]
) -> None:
    config = """
        from inflight.servable import add_stage, declare_model, register_method

        model = declare_model("net.onnx")

        def plus_one(x):
            return x + 1

        @register_method(output_names=["y"])
        def method(x):
            return add_stage(model, add_stage(plus_one, x, outputs_count=1), outputs_count=1)
    """
    folder = servable("demo", config, {"1/net.onnx": b"never read"})
    served = serve(job(folder, own_models=False, device_id=None, models=EXTRA))
    assert not served.offer.own_models
    assert served.methods == ["method"]
    first = served.work("method", [[floats(number, 0)] for number in range(4)])
    asked: list[tuple[int, Row, int]] = []
    while len(asked) < 4:
        call, values = served.expect(Call)
        assert (call.model, call.subgraph) == ("net.onnx", 0)
        asked += [(item.number, values.row(item.row), item.key) for item in call.items]
    assert [key for _, _, key in asked] == [first + index for index in range(4)]
    packer = Packer(served.inbox)
    answers = [CallOutcome(number, packer.row([np.asarray(row[0]) * 3])) for number, row, _ in asked[:3]]
    answers.append(CallOutcome(asked[3][0], None, "Unavailable", "the worker was lost"))
    served.channel.send(CallDone(list(reversed(answers))), packer)
    outcomes = served.outcomes(4)
    assert arrays([outcomes[first + index] for index in range(3)]) == [[3, 3], [6, 3], [9, 3]]
    assert outcomes[first + 3] == ("Unavailable", "the worker was lost")


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("only_model", [True, False])
def test_it_ends_when_it_is_stopped_and_when_its_server_is_gone(
    servable: Callable[..., Path], model_file: Path, stopped: bool, only_model: bool
) -> None:
    served = Served(bare(model_file) if only_model else job(servable("demo", STAGES)))
    if stopped:
        served.stop()
    else:
        served.channel.close()
        served.join()
    assert served.worker.orphaned is not stopped


VERSIONED = """
    from inflight.servable import add_stage, declare_model, register_method

    model = declare_model("no.onnx")

    @register_method(output_names=["y"])
    def method(x):
        return add_stage(model, x, outputs_count=1)
"""


@pytest.mark.parametrize(
    ("changes", "config", "text"),
    [
        ({}, "raise KeyError('mine')", "mine"),
        ({"name": "other"}, STAGES, "other"),
        ({"version": 7}, VERSIONED, "version"),
        (
            {},
            VERSIONED,
            "no.onnx",
        ),
        ({"device_type": "tpu"}, STAGES, "device type 'tpu' cannot be used here"),
    ],
)
def test_what_cannot_be_loaded_says_why(
    servable: Callable[..., Path], changes: dict[str, Any], config: str, text: str
) -> None:
    folder = servable("demo", config, {"1/other.onnx": b""})
    with pytest.raises(InflightError, match=text):
        load(job(folder, **changes), Hooks(lambda *call: None, nullcontext, lambda phase: None))


# Ranks


def test_a_rank_that_cannot_load_says_why_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    channels: list[WorkerChannel] = []

    def channel(sock: socket.socket) -> WorkerChannel:
        channels.append(WorkerChannel(sock))
        return channels[-1]

    monkeypatch.setattr(shard, "kill_group", lambda: None)
    monkeypatch.setattr(shard, "WorkerChannel", channel)
    config = GeneratorConfig.of(Path("/nowhere"), "story")
    ours, theirs = socket.socketpair()
    server = WorkerChannel(ours)
    server.send(LoadShard(shard_job(config, 0)))
    server.send(Stop())
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = shard.run_rank(theirs)
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        faulthandler.unregister(DUMP)
    assert status == 1
    ours.settimeout(20)
    while (received := server.receive()) is not None and not isinstance(received[0], Failed):
        pass
    assert received is not None
    assert "/nowhere" in str(received[0])
    for each in (server, *channels):
        each.close()


def test_an_adapter_that_is_given_up_while_it_is_read_is_not_kept() -> None:
    """Nobody would drop it any more."""

    class Runner:
        def __init__(self) -> None:
            self.has: set[int] = set()

        def read_adapter(self, adapter: AdapterConfig) -> str:
            return adapter.name

        def add_adapter(self, number: int, factors: object) -> None:
            self.has.add(number)

        def drop_adapter(self, number: int) -> None:
            self.has.discard(number)

    sent: list[AnyMessage] = []
    runner, work = Runner(), queue.SimpleQueue[Any]()
    adapters = shard._Adapters(cast(Any, SimpleNamespace(send=sent.append)), cast(Any, runner), work)
    red = LoadAdapter(AdapterConfig("red", Path("/red"), number=7))
    adapters.take(red)
    adapters.take(DropAdapter(7))
    adapters.take(work.get(timeout=10))
    assert (runner.has, sent) == (set(), [])
    adapters.take(red)
    adapters.take(work.get(timeout=10))
    assert (runner.has, sent) == ({7}, [AdapterReady(7)])


def test_outcomes_for_another_machine_are_divided_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits no frame becomes an error of its instance alone."""
    monkeypatch.setattr(elsewhere, "MAX_VALUES", 1000)
    monkeypatch.setattr(elsewhere, "parts", partial(parts, most=100))
    monkeypatch.setattr(elsewhere, "frames", partial(frames, most=100))
    rows: list[list[Value]] = [[bytes(size)] for size in (60, 60, 30, 2000, 30, 0)]
    failed = InflightError("failed")
    done: list[tuple[Sequence[int], Sequence[Any]]] = [([7], [rows[0]]), (range(8, 14), [*rows[1:], failed])]
    found = list(elsewhere.framed(done))
    assert [key for some in found for keys, _ in some for key in keys] == list(range(7, 14))
    outcomes = [outcome for some in found for _, each in some for outcome in each]
    assert "outputs of 2000 bytes cannot be sent" in str(outcomes[3])
    assert outcomes[:3] + outcomes[4:] == [*rows[:3], *rows[4:], failed]
    assert [sum(len(keys) for keys, _ in some) for some in found] == [1, 3, 3]
