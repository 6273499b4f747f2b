"""Measures the bare libraries without a server; each command prints one line of JSON.

python -m bench.peers.direct batches SECONDS THREADS BATCH     one session, full batches back to back
python -m bench.peers.direct split SECONDS PROCESSES ROWS      the rows shared by sessions in processes of their own
python -m bench.peers.direct copy SECONDS BYTES                copies of an array of that size
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench.load import percentile
from bench.models import BATCH, MLP_WIDTHS, mlp_model


def _session(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(mlp_model().SerializeToString(), options, providers=["CPUExecutionProvider"])


def _rows(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, MLP_WIDTHS[0])).astype(np.float32)


def batches(seconds: float, threads: int, batch: int) -> dict[str, float]:
    """Rows per second of one session, and a run's latency."""
    session, rows = _session(threads), _rows(batch)
    for _ in range(10):
        session.run(None, {"x": rows})
    times: list[float] = []
    start = last = time.perf_counter()
    while last < start + seconds:
        session.run(None, {"x": rows})
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return _figures(times, last - start, batch)


def split(seconds: float, processes: int, rows: int) -> dict[str, float]:
    """Rows per second of one-thread sessions that start together and wait for each other, as for one request."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    workers = []
    for index in range(processes):
        ours, theirs = context.Pipe()
        share = rows // processes + (index < rows % processes)
        worker = context.Process(target=_half, args=(theirs, share), daemon=True)
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    for pipe in pipes:
        pipe.recv()
    times: list[float] = []
    start = last = time.perf_counter()
    while last < start + seconds:
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    for pipe in pipes:
        pipe.send(False)
    for worker in workers:
        worker.join(10)
    return _figures(times, last - start, rows)


def _half(pipe: Connection, count: int) -> None:
    session, rows = _session(1), _rows(count)
    parts = [rows[at : at + BATCH] for at in range(0, count, BATCH)]
    for part in parts:
        session.run(None, {"x": part})
    pipe.send(True)
    while pipe.recv():
        for part in parts:
            session.run(None, {"x": part})
        pipe.send(True)


def copy(seconds: float, size: int) -> dict[str, float]:
    """Bytes per second of copying one array into another existing one."""
    source = np.ones(size, np.uint8)
    target = np.empty_like(source)
    np.copyto(target, source)
    times: list[float] = []
    start = last = time.perf_counter()
    while last < start + seconds:
        np.copyto(target, source)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return _figures(times, last - start, size)


def _figures(times: list[float], seconds: float, each: int) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "rate": len(times) * each / seconds,
        "p50_ms": percentile(ordered, 50) * 1000,
        "p99_ms": percentile(ordered, 99) * 1000,
        "requests": len(times),
        "seconds": seconds,
    }


def main() -> None:
    command, seconds, *numbers = sys.argv[1:]
    commands: dict[str, Callable[..., dict[str, float]]] = {"batches": batches, "split": split, "copy": copy}
    run = commands[command]
    print(json.dumps(run(float(seconds), *(int(number) for number in numbers))))


if __name__ == "__main__":
    main()
