"""The loads of the benchmark: the servers that each one starts, the requests, the targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from bench import bodies, cells, load, servers
from bench.bodies import Body
from bench.cells import Cell, Sample, Target
from bench.load import Load
from bench.models import BATCH, MLP_WIDTHS, mlp_model
from bench.procs import Server, cpu_seconds, cpu_times, memory, reset_peak

V2 = "/v2/models/{}/infer"
MINDSPORE = "/model/{}:predict"
PREDICT = "/mindspore.serving.proto.MSService/Predict"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
CONNECTIONS = (16, 64)
GRPC_SHAPES = (*((count, 1) for count in CONNECTIONS), (4, 16))
"""Connections, and concurrent calls on each."""
INSTANCES = 1000
BULK_SHAPE = (2048, 2048)
BULK_BYTES = 4 * 2048 * 2048
_MB = 1e6

OURS_V2 = "Inflight, Open Inference Protocol"
OURS_MINDSPORE = "Inflight, MindSpore form"
OURS_GRPC = "Inflight, MSService"
OURS_V2_GRPC = "Inflight, Open Inference Protocol, gRPC"
OURS_BINARY = "Inflight, REST binary"
OURS_GRPCIO = "Inflight on grpcio, MSService"
TRITON = "Triton, Python backend"
GRPC_PARSED = "bare grpc.aio, messages"
GRPC_BYTES = "bare grpc.aio, bytes"
ASGI = "bare uvicorn echo"
SOCKET = "bare blocking socket echo"
ORT = "ONNX Runtime, batches of 32"
BARE_PAIR = "two bare sessions, two processes"


@dataclass(frozen=True)
class Case:
    """One group of loads that shares its servers.

    Attributes:
        key: for `--only`.
        open: starts the servers, checks one reply of each and yields the cells of one round.
        targets: figures to reach.
    """

    key: str
    open: Callable[[], AbstractContextManager[list[Cell]]]
    targets: tuple[Target, ...]


def add_arrays(rows: int = 1) -> tuple[bodies.Named, bodies.Named]:
    first = np.array([[[1, 2], [3, 4]]] * rows, np.float32)
    second = np.array([[[5, 6], [7, 8]]] * rows, np.float32)
    return {"x1": first, "x2": second}, {"y": first + second}


def _mlp_arrays(rows: int) -> tuple[bodies.Named, bodies.Named]:
    import onnxruntime as ort

    inputs = np.random.default_rng(2).standard_normal((rows, MLP_WIDTHS[0])).astype(np.float32)
    session = ort.InferenceSession(mlp_model().SerializeToString(), providers=["CPUExecutionProvider"])
    return {"x": inputs}, {"y": session.run(None, {"x": inputs})[0]}


def _add_row(door: str, connections: int) -> str:
    return f"`add`, {door}, {connections} connections"


@contextmanager
def add_rest() -> Iterator[list[Cell]]:
    inputs, outputs = add_arrays()
    body = bodies.v2_json(inputs, outputs)
    own_body = bodies.mindspore_json(inputs, outputs)
    with ExitStack() as stack:
        ours = stack.enter_context(servers.inflight("add"))
        triton = stack.enter_context(servers.triton("add")) if servers.has_triton() else None
        echo = stack.enter_context(servers.asgi_echo())
        measured = []
        for connections in CONNECTIONS:
            row = _add_row("REST", connections)
            measured.append(cells.rest(row, OURS_V2, ours, V2.format("add"), body, connections))
            if triton is not None:
                measured.append(cells.rest(row, TRITON, triton, V2.format("add"), body, connections))
            measured.append(cells.rest(row, OURS_MINDSPORE, ours, MINDSPORE.format("add"), own_body, connections))
            measured.append(cells.rest(row, ASGI, echo, "/", bodies.same_bytes(body), connections))
        yield measured


def _add_grpc_row(connections: int, streams: int) -> str:
    return _add_row("gRPC", connections) + (f" of {streams} streams" if streams > 1 else "")


@contextmanager
def add_grpc() -> Iterator[list[Cell]]:
    inputs, outputs = add_arrays()
    body = bodies.mindspore_grpc("add", inputs, outputs)
    v2_body = bodies.v2_grpc("add", inputs, outputs)
    with ExitStack() as stack:
        ours = stack.enter_context(servers.inflight("add"))
        parsed = stack.enter_context(servers.grpc_echo("parsed"))
        as_bytes = stack.enter_context(servers.grpc_echo("bytes"))
        contestants = [
            (OURS_GRPC, ours, PREDICT, body),
            (GRPC_PARSED, parsed, PREDICT, bodies.same_message(body)),
            (GRPC_BYTES, as_bytes, PREDICT, bodies.same_bytes(body)),
            (OURS_V2, ours, MODEL_INFER, v2_body),
        ]
        if servers.has_nghttp2():
            grpcio = stack.enter_context(servers.inflight("add", engine="grpcio"))
            contestants.insert(1, (OURS_GRPCIO, grpcio, PREDICT, body))
        if servers.has_triton():
            contestants.append((TRITON, stack.enter_context(servers.triton("add")), MODEL_INFER, v2_body))
        measured: list[Cell] = []
        for connections, streams in GRPC_SHAPES:
            row = _add_grpc_row(connections, streams)
            for who, server, path, sent in contestants:
                measured.append(cells.grpc(row, who, server, path, sent, connections, streams))
        yield measured


MLP_ROW = "MLP, REST, one row a request, 64 connections"
ALONE_ROW = "MLP, ONNX Runtime, one row at a time"


@contextmanager
def mlp_rest() -> Iterator[list[Cell]]:
    inputs, outputs = _mlp_arrays(1)
    body = bodies.v2_json(inputs, outputs)
    with ExitStack() as stack:
        ours = stack.enter_context(servers.inflight("mlp"))
        measured = [cells.rest(MLP_ROW, OURS_V2, ours, V2.format("mlp"), body, 64)]
        if servers.has_triton():
            triton = stack.enter_context(servers.triton("mlp"))
            measured.append(cells.rest(MLP_ROW, TRITON, triton, V2.format("mlp"), body, 64))
        measured.append(cells.direct(MLP_ROW, ORT, "req/s", 1, "batches", 2, BATCH))
        measured.append(cells.direct(ALONE_ROW, "ONNX Runtime, two threads", "req/s", 1, "batches", 2, 1))
        own_body = bodies.mindspore_json(inputs, outputs)
        measured.append(cells.rest(MLP_ROW, OURS_MINDSPORE, ours, MINDSPORE.format("mlp"), own_body, 64))
        yield measured


CALLED = "a Python function calls the model"
STAGED = "the model is a stage"


def _calls_row(connections: int) -> str:
    return f"MLP, gRPC, one row a request, {connections} connections"


@contextmanager
def calls() -> Iterator[list[Cell]]:
    inputs, outputs = _mlp_arrays(1)
    with ExitStack() as stack:
        contestants = [
            (who, stack.enter_context(servers.inflight(servable)), bodies.v2_grpc(servable, inputs, outputs))
            for who, servable in ((CALLED, "mlp_call"), (STAGED, "mlp"))
        ]
        yield [
            cells.grpc(_calls_row(connections), who, server, MODEL_INFER, body, connections)
            for connections in CONNECTIONS
            for who, server, body in contestants
        ]


REPLICAS_ROW = f"MLP, one request of {INSTANCES:,} instances, two replicas of one thread"


@contextmanager
def replicas() -> Iterator[list[Cell]]:
    inputs, outputs = _mlp_arrays(INSTANCES)
    with servers.inflight("mlp_thread", replicas=2) as ours:
        measured = [
            _bulk_grpc(who, ours, path, body)
            for who, path, body in (
                (OURS_GRPC, PREDICT, bodies.mindspore_grpc("mlp_thread", inputs, outputs)),
                (OURS_V2_GRPC, MODEL_INFER, bodies.v2_grpc("mlp_thread", inputs, outputs)),
            )
        ]
        measured.append(cells.direct(REPLICAS_ROW, BARE_PAIR, "rows/s", 1, "split", 2, INSTANCES))
        for who, path, body in (
            (OURS_V2, V2.format("mlp_thread"), bodies.v2_json(inputs, outputs)),
            (OURS_BINARY, V2.format("mlp_thread"), bodies.v2_binary(inputs, outputs)),
            (OURS_MINDSPORE, MINDSPORE.format("mlp_thread"), bodies.mindspore_json(inputs, outputs)),
        ):
            measured.append(cells.bulk(REPLICAS_ROW, who, ours, ours.ports["http"], path, body, INSTANCES, "rows/s"))
        yield measured


def _bulk_grpc(who: str, server: Server, path: str, body: Body) -> Cell:
    port = server.ports["grpc"]
    size = load.check_grpc(port, path, body)

    def run(seconds: int) -> Load:
        return load.grpc(port, path, body, 1, seconds, size)

    return cells.rate(REPLICAS_ROW, who, server, run, INSTANCES, "rows/s")


BULK_ROW = "16 MB array in, the same out: bytes in and out a second"
COPY_ROW = "16 MB array: memcpy from one buffer to another"
PEAK_ROW = "16 MB array: memory of the server process at its peak over its rest, in arrays"
COPIES_ROW = "16 MB array: user time of the server process, in copies of the array"


@contextmanager
def large_array() -> Iterator[list[Cell]]:
    array = np.random.default_rng(3).standard_normal((1, *BULK_SHAPE)).astype(np.float32)
    body = bodies.v2_binary({"x": array}, {"y": array})
    message = bodies.mindspore_grpc("echo", {"x": array}, {"y": array})
    with ExitStack() as stack:
        ours = stack.enter_context(servers.inflight("echo"))
        echo = stack.enter_context(servers.asgi_echo())
        sockets = stack.enter_context(servers.socket_echo())
        grpc_echo = stack.enter_context(servers.grpc_echo("bytes"))
        sized = (
            (OURS_BINARY, ours, V2.format("echo"), body),
            (ASGI, echo, "/", bodies.same_bytes(body)),
            (SOCKET, sockets, "/", bodies.same_bytes(body)),
        )
        # Before all other requests, so that memory that the server keeps for later ones counts too.
        peaks = [Sample(PEAK_ROW, who, _peak(server, path, sent), "arrays") for who, server, path, sent in sized]
        measured: list[Cell] = [lambda seconds: peaks]
        for who, server, path, sent in sized:
            measured.append(_over_rest(who, server, path, sent))
        for who, server, sent in (
            (OURS_GRPC, ours, message),
            (GRPC_BYTES, grpc_echo, bodies.same_bytes(message)),
        ):
            measured.append(_over_grpc(who, server, sent))
        measured.append(cells.direct(COPY_ROW, "numpy", "GB/s", 1e-9, "copy", BULK_BYTES))
        yield measured


def _over_rest(who: str, server: Server, path: str, body: Body) -> Cell:
    port = server.ports["http"]
    rate = cells.bulk(BULK_ROW, who, server, port, path, body, 2 * BULK_BYTES / 1e9, "GB/s")
    return _with_copies(who, server, rate)


def _over_grpc(who: str, server: Server, body: Body) -> Cell:
    port = server.ports["grpc"]
    size = load.check_grpc(port, PREDICT, body)

    def run(seconds: int) -> Load:
        return load.grpc(port, PREDICT, body, 1, seconds, size)

    return _with_copies(who, server, cells.rate(BULK_ROW, who, server, run, 2 * BULK_BYTES / 1e9, "GB/s"))


def _with_copies(who: str, server: Server, rate: Cell) -> Cell:
    """A rate, and the server process's user time per request, expressed in copies of the array."""
    copying = cells.direct("", "", "copies/s", 1 / BULK_BYTES, "copy", BULK_BYTES)

    def cell(seconds: int) -> list[Sample]:
        before, _ = cpu_times(server.pid)
        (seen,) = rate(seconds)
        after, _ = cpu_times(server.pid)
        (copies,) = copying(1)
        requests = seen.value * 1e9 / (2 * BULK_BYTES) * seconds
        return [seen, Sample(COPIES_ROW, who, (after - before) / requests * copies.value, "copies")]

    return cell


def _peak(server: Server, path: str, body: Body) -> float:
    """Peak memory of the server process during three requests, above its memory at rest, in arrays."""
    rest = memory(server.pid)
    reset_peak(server.pid)
    for _ in range(3):
        load.check_rest(server.ports["http"], path, body)
    return (memory(server.pid, "VmHWM") - rest) / BULK_BYTES


IDLE_CPU_ROW = "idle for 10 s: CPU"
RSS_ROW = "memory (RSS)"
SERVER_PROCESS = "Inflight, server process"
WORKER_PROCESS = "Inflight, its worker"
_IDLE_SECONDS = 10.0


@contextmanager
def idle() -> Iterator[list[Cell]]:
    inputs, outputs = add_arrays()
    body = bodies.v2_json(inputs, outputs)
    with ExitStack() as stack:
        ours = stack.enter_context(servers.inflight("add"))
        triton = stack.enter_context(servers.triton("add")) if servers.has_triton() else None
        watched = _parts(ours)
        if triton is not None:
            watched[TRITON + ", all processes"] = triton.tree()
        fresh = [
            Sample(f"{RSS_ROW} after the start", who, sum(map(memory, pids)) / _MB, "MB")
            for who, pids in watched.items()
        ]
        for server in (ours, triton):
            if server is not None:
                load.check_rest(server.ports["http"], V2.format("add"), body)

        def cell(seconds: int) -> list[Sample]:
            load.rest(ours.ports["http"], V2.format("add"), body, 64, seconds)
            time.sleep(1)
            before = {who: sum(map(cpu_seconds, pids)) for who, pids in watched.items()}
            time.sleep(_IDLE_SECONDS)
            samples = list(fresh)
            for who, pids in watched.items():
                used = sum(map(cpu_seconds, pids)) - before[who]
                samples.append(Sample(IDLE_CPU_ROW, who, used / _IDLE_SECONDS * 100, "%"))
                if who.startswith("Inflight"):
                    held = sum(map(memory, pids)) / _MB
                    samples.append(Sample(f"{RSS_ROW} after a load of 64 connections", who, held, "MB"))
            return samples

        yield [cell]


def _parts(server: Server) -> dict[str, Sequence[int]]:
    tree = server.tree()
    return {SERVER_PROCESS: tree[:1], WORKER_PROCESS: tree[1:]}


def _ahead(row: str, versus: str = TRITON) -> Target:
    return Target(row, OURS_V2, f"ahead of {versus}", versus, least=1.0, strict=True)


CASES = (
    Case("add-rest", add_rest, tuple(_ahead(_add_row("REST", count)) for count in CONNECTIONS)),
    Case(
        "add-grpc",
        add_grpc,
        tuple(
            Target(_add_row("gRPC", count), OURS_GRPC, f"at least 0.85 of {GRPC_PARSED}", GRPC_PARSED, least=0.85)
            for count in CONNECTIONS
        )
        + tuple(_ahead(_add_grpc_row(*shape)) for shape in GRPC_SHAPES),
    ),
    Case(
        "mlp-rest",
        mlp_rest,
        (_ahead(MLP_ROW), Target(MLP_ROW, OURS_V2, f"at least 0.6 of {ORT}", ORT, least=0.6)),
    ),
    Case(
        "calls",
        calls,
        tuple(
            Target(_calls_row(count), CALLED, f"at least 0.7 of where {STAGED}", STAGED, least=0.7)
            for count in CONNECTIONS
        ),
    ),
    Case(
        "replicas",
        replicas,
        tuple(
            Target(REPLICAS_ROW, who, f"at least 0.95 of {BARE_PAIR}", BARE_PAIR, least=0.95)
            for who in (OURS_GRPC, OURS_V2_GRPC, OURS_V2, OURS_BINARY, OURS_MINDSPORE)
        ),
    ),
    Case(
        "large-array",
        large_array,
        (
            Target(BULK_ROW, OURS_BINARY, "at least 1 GB/s", least=1.0),
            Target(BULK_ROW, OURS_GRPC, "at least 1 GB/s", least=1.0),
            Target(COPIES_ROW, OURS_BINARY, "at most two copies in the server", most=2.0),
        ),
    ),
    Case(
        "idle",
        idle,
        (
            Target(IDLE_CPU_ROW, SERVER_PROCESS, "0.0 %", most=0.05),
            Target(IDLE_CPU_ROW, WORKER_PROCESS, "0.0 %", most=0.05),
            Target(f"{RSS_ROW} after the start", SERVER_PROCESS, "under 80 MB", most=80.0, strict=True),
            Target(f"{RSS_ROW} after a load of 64 connections", SERVER_PROCESS, "under 80 MB", most=80.0, strict=True),
        ),
    ),
)
